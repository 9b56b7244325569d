"""Pre-trains an encoder with BYOL. One file, read top to bottom:

settings → world → data → model → resume → loop → results

python train.py --config configs/quickstart.yaml
torchrun --nproc-per-node=8 train.py --config configs/r50_1000ep.yaml run.out=runs/r50 --resume auto
"""

import argparse
import copy
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from byolt.configs import fixed, schema
from byolt.files import failpoint
from byolt.files.lock import Lock

if TYPE_CHECKING:  # importing torch takes seconds; a wrong setting is refused before that
    from torch import nn

    from byolt.model.distributed import World
    from byolt.pipelines.sources import Source


class Stop:
    """Remembers the signal that asks the run to end; installed before the slow imports."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:  # a second Ctrl-C does not wait for the step
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt
        self.signal = number


def main() -> int:
    parser = argparse.ArgumentParser(description="Pre-trains an encoder with BYOL.")
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="continue from run.out's newest checkpoint, or PATH"
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="resume although this setting differs",
    )
    parser.add_argument(
        "--trace",
        type=int,
        metavar="STEPS",
        help="write a Chrome trace of so many steps, after a warm-up, into run.out",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config, and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override settings")
    args = parser.parse_intermixed_args()
    try:
        config = schema.load(args.config, args.overrides)
        config.check_ranks(world_size())
        fixed.check_allowed(config, args.allow_change)
        if args.trace is not None and args.trace < 1:
            raise ValueError(f"--trace {args.trace}: give the number of steps, 1 or more")
        if args.print_config:
            print(describe(config))
            return 0
        if args.resume not in (None, "auto") and not Path(args.resume).is_file():
            raise ValueError(f"--resume {args.resume}: no such checkpoint; give an existing file, or auto")
    except (ValueError, OSError) as error:
        return fail(error)
    try:
        with Lock(Path(config.run.out, "run.lock"), f"run.out={config.run.out}") as lock:
            return train(config, args.resume, args.allow_change, args.trace or 0, Stop(), lock)
    except KeyboardInterrupt:
        return 130


def fail(error: Exception) -> int:
    """A user's mistake: one message, no traceback."""
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    print(f"error: {rank}{error}", file=sys.stderr)
    return 2


def world_size() -> int:
    """Number of ranks, as torchrun says it."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"environment variable WORLD_SIZE={text} is no number of ranks; start with torchrun")
    return int(text)


def describe(config: schema.Config) -> str:
    """The resolved config as YAML, and as comments what follows from it."""
    from byolt.pipelines.sources import open_source

    ranks = world_size()
    lines = [schema.to_yaml(config).rstrip(), "", "# derived"]
    lines.append(f"# peak learning rate: {config.peak_lr:g}")
    lines.append(f"# images per rank and micro-batch: {config.images_per_rank(ranks)} on {ranks} rank(s)")
    images, why = config.data.expected_images, f"data.path={config.data.path}"
    try:
        images = len(open_source(config.data.path))
    except ValueError as error:
        why = ("data.expected_images; " if images else "") + str(error).replace("\n", " ")
    if images:
        lines.append(f"# images: {images} ({why})")
        lines.append(
            f"# steps: {config.total_steps(images)}, of these warm-up: {config.warmup_steps(images)}"
        )
    else:
        lines.append(f"# steps: unknown: {why}")
    return "\n".join(lines)


def train(
    config: schema.Config, resume: str | None, allowed: list[str], trace_steps: int, stop: Stop, lock: Lock
) -> int:
    """Runs or continues a whole run; returns the exit code."""
    failpoint.reach("import")
    import torch

    from byolt.files.progress import Meter
    from byolt.files.rows import read_rows
    from byolt.model import distributed, schedules
    from byolt.model.quality.probe import make_probe
    from byolt.model.run import checkpoint, digest, failure, guard, pictures, provenance, trace
    from byolt.model.run import log as metrics
    from byolt.model.run.resume import begin
    from byolt.model.run.trained import export_trained
    from byolt.model.step import PRECISIONS, make_step
    from byolt.pipelines.backends import make_backend, make_resident
    from byolt.pipelines.loader import CorruptBudgetError, Loader
    from byolt.pipelines.order import steps_per_epoch

    out = Path(config.run.out)
    # ----------------------------------------------------------------------------------------------- world
    try:
        world = distributed.init(
            config.train.device, config.train.timeout_minutes * 60, config.train.deterministic
        )
    except ValueError as error:
        return fail(error)
    step, begun = 0, False
    try:
        on_gpu = world.device.type == "cuda"
        fitting = "bf16" if on_gpu else "fp32"
        precision = fitting if config.train.precision == "auto" else config.train.precision
        if not on_gpu:
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            if ranks_here > 1 or "OMP_NUM_THREADS" not in os.environ:  # torchrun sets 1 for several ranks
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
        torch.manual_seed(config.run.seed)  # of the weights: order and views have generators of their own

        # -------------------------------------------------------------------------------------------- data
        source = open_split("data.path", config.data.path)
        queries = open_split("eval.path", config.eval.path) if config.eval.path else None
        check_labels(config, source, queries, world.size)
        steps_per_epoch(len(source), config.train.batch_size)  # refuses a batch larger than the data set
        total_steps, warmup_steps = config.total_steps(len(source)), config.warmup_steps(len(source))
        if total_steps < 1:
            raise ValueError(f"train.epochs={config.train.epochs:g} is less than one step; raise it")
        last_step = min(total_steps, config.train.stop_at_step or total_steps)
        delivered = PRECISIONS[precision] if on_gpu else torch.float32
        resident = make_resident(config, source, world.device, delivered)
        backend, backend_reason = resident or make_backend(config, world.device, delivered)

        # ------------------------------------------------------------------------------------------- model
        train_step = make_step(config, world, precision)
        model = train_step.model
        probe = make_probe(config, int(model.online.encoder.num_features), source.labels, world)  # type: ignore[arg-type]
        finite = guard.FiniteCheck(world, overflow_allowed=precision == "fp16")

        # ------------------------------------------------------------------------------------------ resume
        note = distributed.on_main(lock.take, world)
        if note and world.is_main:
            print(f"warning: {note}", file=sys.stderr)
        out.mkdir(parents=True, exist_ok=True)  # on other machines, if they do not share it
        found, step, knn_untrained = begin(
            resume, config, source.fingerprint, allowed, train_step, probe, world
        )
        if (
            not found
        ):  # the list of bad images is an earlier attempt's; it goes before any rank begins a new one
            distributed.on_main(lambda: (out / "corrupt.jsonl").unlink(missing_ok=True), world)
        trace.check_length(trace_steps, last_step - step)
        loader = Loader(
            config,
            source,
            backend,
            rank=world.rank,
            world_size=world.size,
            first_step=step,
            corrupt_log=out / "corrupt.jsonl",
            device=world.device,
        )
        log = metrics.MetricLog(out, step) if world.is_main else None
        if world.is_main:
            facts: dict[str, Any] = {"ranks": world.size, "precision": precision, "backend": backend_reason}
            facts["config"] = config.model_dump(mode="json")
            provenance.record_start(out, step, world.device, facts)

        # -------------------------------------------------------------------------------------------- loop
        begun, saved = True, time.monotonic()
        display = Meter("step", last_step, step, enabled=world.is_main)

        def run_state() -> dict[str, Any]:
            """What a checkpoint holds; the same on every rank."""
            return {
                "step": step,
                "model": model.state_dict(),
                "momentum": train_step.optimizer.state_dict()["state"],
                "train_step": train_step.state_dict(),
                "probe": probe.state_dict() if probe else None,
                "config": config.model_dump(mode="json"),
                "data": source.fingerprint,
                "knn_untrained": knn_untrained,
            }

        @contextmanager
        def writing(stop: bool = config.run.on_write_error == "stop") -> Iterator[None]:
            """What fails to be written within ends the run, or is told; run.on_write_error says which."""
            try:
                yield
            except OSError as error:
                if stop:
                    raise
                display.say(f"warning: step {step}: {error}; going on")

        def save() -> None:
            """Rank 0 writes what is the same on every rank; the others meet it at their next reduction."""
            nonlocal saved
            saved = time.monotonic()
            if world.is_main:
                checkpoint.save(out, step, run_state(), config.run.keep_checkpoints)

        def evaluate(untrained: bool = False) -> float | None:
            """kNN top-1 in per cent, shown and logged; None without a labelled split."""
            if queries is None:
                return None
            accuracy = knn_top1(config, model.online.encoder, source, queries, world, calibrate=untrained)
            if not math.isfinite(accuracy):
                raise FloatingPointError("the encoder's features are not finite; nothing is exported")
            display.say(f"step {step}  kNN top-1 {accuracy:.1f} %{' (untrained)' if untrained else ''}")
            if log:
                with writing():
                    log.add(step, {"knn_top1": accuracy})
            return accuracy

        steps_per_eval = max(1, round(config.eval.every_epochs * len(source) / config.train.batch_size))
        tracing = trace.Trace(trace_steps if world.is_main else 0, out, display.say)
        with display, loader, log or nullcontext(), tracing:
            display.say(backend_reason)
            how = f"resumed from {found}" if found else "new run"
            display.say(
                f"{how}: steps {step} to {last_step} of {total_steps}, {len(source)} images, "
                f"{world.size} x {world.device.type}, {precision}"
            )
            if step >= last_step:
                display.say(f"nothing is left to train: step {step} was the last")
            if config.data.expected_images not in (None, len(source)):
                display.say(
                    f"the recipe was written for {config.data.expected_images} images, {config.data.path} "
                    f"holds {len(source)}: the schedules follow the latter"
                )
            stopping = distributed.any_rank(bool(stop.signal), world)
            if step == 0 and not stopping:
                knn_untrained = evaluate(untrained=True)
            batches = iter(loader)
            window = metrics.Window(world, config.train.batch_size, step)
            while step < last_step and not stopping:
                with tracing.range("wait for data"):
                    batch = next(batches)
                if step == 0 and world.is_main:
                    mean, std = config.augment.mean, config.augment.std
                    with writing():
                        pictures.save_view_pairs(out / "views.png", batch[0].view1, batch[0].view2, mean, std)
                logging = (step + 1) % config.run.log_every == 0 or step + 1 == last_step
                lr, tau = schedules.of_run(step, config, warmup_steps, total_steps)
                failpoint.reach("step", step)
                with tracing.range("training step"):
                    result = train_step([(b.view1, b.view2) for b in batch], lr, tau, gauges=logging)
                right = None
                if probe:
                    labels = torch.cat([b.label for b in batch])
                    right = probe(torch.cat(result.features1), labels, lr, result.finite)
                window.add(result.loss, right)
                finite.add(step + 1, result, torch.cat([b.id for b in batch]))
                step += 1
                display.update(step)
                tracing.step(step)

                # On a GPU a look or a vote makes the host wait for the device.
                if logging or not on_gpu:
                    finite.check(out, run_state)
                if logging:
                    assert result.gauges
                    row = {
                        "epoch": step * config.train.batch_size / len(source),
                        "lr": lr,
                        "tau": tau,
                        "gradient_norm": result.gradient_norm.item(),
                        **window.row(
                            step, loader.waited, loader.corrupt_count, result.gauges._asdict(), bool(probe)
                        ),
                    }
                    display.update(
                        step,
                        f"epoch {row['epoch']:.2f}  loss {row['loss']:.4f}  lr {lr:.4g}  tau {tau:.5f}  "
                        f"{row['images_per_second']:.0f} images/s  data wait {row['data_wait_percent']:.1f} %",
                    )
                    if log:
                        with writing():
                            failpoint.reach("log", step)
                            log.add(step, row)
                    if said := guard.collapse_warning(row["projection_std"], config):
                        if config.train.on_collapse == "stop":
                            save()
                            raise guard.CollapseError(f"{said}; saved, and stopped as train.on_collapse says")
                        display.say(f"warning: step {step}: {said}")
                if step % steps_per_eval == 0 and last_step - step > steps_per_eval // 2:
                    with window.paused():  # images/s is the training's alone
                        evaluate()
                if step < last_step and (not on_gpu or world.size == 1 or step % 10 == 0):
                    late = time.monotonic() - saved > config.run.checkpoint_minutes * 60
                    if distributed.any_rank(late, world):
                        # A flag not yet looked at would be lost with this process.
                        finite.check(out, run_state)
                        with writing(), window.paused():
                            save()
                    stopping = distributed.any_rank(bool(stop.signal), world)

            # --------------------------------------------------------------------------------------- results
            finite.check(out, run_state)
            save()
            if not stopping:
                knn_trained = evaluate()
                if log:
                    export_trained(out / "encoder.safetensors", model.online.encoder, config, step)
                    with writing(stop=False):  # a picture does not undo a finished run
                        pictures.save_loss_curve(out / "loss.png", read_rows(log.path))
                done = (
                    "finished"
                    if step == total_steps
                    else f"stopped as train.stop_at_step says, {total_steps} are planned,"
                )
                display.say(f"{done} at step {step}: {out}/encoder.safetensors")
            if log:
                with writing():
                    log.close()
        code = 0
        if stopping:
            number = stop.signal or signal.SIGTERM  # another rank's signal: torchrun sends SIGTERM
            code = 128 + number
            display.say(f"stopped by {signal.Signals(number).name} at step {step}; go on with --resume auto")
        elif world.is_main and knn_trained is not None:
            untrained = "not measured" if knn_untrained is None else f"{knn_untrained:.1f} %"
            print(f"kNN top-1: {untrained} untrained, {knn_trained:.1f} % trained")
        sha256 = digest.agreed(run_state(), world)
        if world.is_main:
            print(f"digest: step {step} sha256 {sha256}", flush=True)
    except Exception as error:
        mistake = not begun and isinstance(error, (ValueError, OSError, checkpoint.CheckpointError))
        foreseen = (guard.CollapseError, CorruptBudgetError, FloatingPointError, OSError)
        if not mistake and not isinstance(error, foreseen) and not distributed.is_lost_peer(error):
            traceback.print_exc()
        print(f"error: {failure.explain(error, step if begun else None, world)}", file=sys.stderr)
        return 2 if mistake else 1
    distributed.shutdown(world)
    return code


def open_split(key: str, path: str) -> "Source":
    """Opens a data set; an error names the setting."""
    from byolt.pipelines.sources import open_source

    try:
        return open_source(path)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def check_labels(config: schema.Config, source: "Source", queries: "Source | None", ranks: int) -> None:
    """Refuses splits that kNN cannot compare."""
    from byolt.model.quality.scores import num_classes

    if queries is None:
        return
    if len(queries) < ranks:
        raise ValueError(
            f"eval.path={config.eval.path} holds {len(queries)} images for {ranks} ranks: use more"
        )
    for key, split in (("data.path", source), ("eval.path", queries)):
        if (split.labels < 0).any():
            raise ValueError(
                f"{key} holds unlabelled images, and kNN needs labels in both sets: set eval.path=null, and judge the "
                "encoder with tools/evaluate.py --train LABELLED --data LABELLED"
            )
    num_classes(source.labels, queries.labels)
    if source.classes and queries.classes and source.classes != queries.classes:
        raise ValueError(
            f"eval.path={config.eval.path} has other classes than data.path={config.data.path}: "
            f"{queries.classes} and {source.classes}"
        )


def knn_top1(
    config: schema.Config,
    encoder: "nn.Module",
    source: "Source",
    queries: "Source",
    world: "World",
    calibrate: bool,
) -> float:
    """kNN top-1 in per cent (NaN if a feature is not finite): bank data.path, queries eval.path, ranks share them.

    Args:
        calibrate: average the batch-norm statistics over 2,048 plain images first (in a copy): an untrained
            encoder has none, and the comparison with it would flatter the trained one.
    """
    from byolt.model.quality import features, knn, scores
    from byolt.pipelines.plain import plain_images
    from byolt.pipelines.subset import spaced

    if calibrate:
        encoder = copy.deepcopy(encoder)
        batch = max(2, 256 // world.size)  # batch norm needs 2 images
        whole, count = batch * world.size, min(2048, len(source))
        # Whole batches, as many on every rank: each counts as much. Of fewer images one batch.
        count = count // whole * whole or count // world.size * world.size
        ids = spaced(len(source), count)[world.rank :: world.size]
        features.calibrate_batch_norm(encoder, plain_images(source, ids, config, batch))
    bank, tested = (
        plain_images(split, spaced(len(split), config.eval.max_images)[world.rank :: world.size], config)
        for split in (source, queries)
    )
    classes = scores.num_classes(source.labels, queries.labels)
    return knn.knn_of_run(encoder, bank, tested, classes, config.eval.k, config.eval.temperature, world)


if __name__ == "__main__":
    sys.exit(main())
