"""Pre-trains an encoder with BYOL. One file, read top to bottom:

settings → world → data → model → resume → loop → results

python train.py --config configs/quickstart.yaml
torchrun --nproc-per-node=8 train.py --config configs/r50_1000ep.yaml run.out=runs/r50 --resume auto
"""

import argparse
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from configs import schema

if TYPE_CHECKING:  # importing torch takes seconds; a wrong setting is refused before that
    from torch import nn

    from model.distributed import World
    from pipelines.sources import Source


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
    parser.add_argument("--print-config", action="store_true", help="print the resolved config, and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override settings")
    args = parser.parse_intermixed_args()
    try:
        config = schema.load(args.config, args.overrides)
        config.images_per_rank(world_size())
        check_allowed(config, args.allow_change)
        if args.print_config:
            print(describe(config))
            return 0
        if args.resume not in (None, "auto") and not Path(args.resume).is_file():
            raise ValueError(f"--resume {args.resume}: no such checkpoint; give an existing file, or auto")
    except (ValueError, OSError) as error:
        return fail(error)
    try:
        return train(config, args.resume, args.allow_change, Stop())
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
    from pipelines.sources import open_source

    ranks = world_size()
    lines = [schema.to_yaml(config).rstrip(), "", "# derived"]
    lines.append(f"# peak learning rate: {config.peak_lr:g}")
    lines.append(f"# images per rank and micro-batch: {config.images_per_rank(ranks)} on {ranks} rank(s)")
    try:
        images, origin = len(open_source(config.data.path)), config.data.path
    except ValueError:
        images, origin = config.data.expected_images or 0, "data.expected_images; data.path is not there"
    if images:
        lines.append(f"# images: {images} ({origin})")
        lines.append(
            f"# steps: {config.total_steps(images)}, of these warm-up: {config.warmup_steps(images)}"
        )
    else:
        lines.append(f"# steps: unknown until data.path={config.data.path} is there")
    return "\n".join(lines)


def train(config: schema.Config, resume: str | None, allowed: list[str], stop: Stop) -> int:
    """Runs or continues a whole run; returns the exit code."""
    import torch

    from model import checkpoint, distributed, metrics, provenance, schedules
    from model.byol import make_byol
    from model.optim import LARS
    from model.step import PRECISIONS, TrainStep
    from pipelines.loader import CorruptBudgetError, Loader, make_backend, make_resident
    from pipelines.order import steps_per_epoch

    out = Path(config.run.out)
    # ----------------------------------------------------------------------------------------------- world
    try:
        world = distributed.init(config.train.device, config.train.timeout_minutes * 60)
    except ValueError as error:
        return fail(error)
    try:
        on_gpu = world.device.type == "cuda"
        precision = config.train.precision
        if precision == "auto":
            precision = "bf16" if on_gpu else "fp32"
        if not on_gpu:
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
        torch.backends.cudnn.benchmark = on_gpu
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
        model = make_byol(**config.model.model_dump())
        optimizer = LARS(
            model.online.parameters(),
            lr=0.0,  # set at every step
            momentum=config.optimizer.momentum,
            weight_decay=config.optimizer.weight_decay,
            trust_coefficient=config.optimizer.trust_coefficient,
            backend=config.optimizer.backend,
        )
        train_step = TrainStep(
            model,
            optimizer,
            world,
            precision,
            config.train.accumulation,
            config.train.channels_last,
            config.train.compile,
        )

        # ------------------------------------------------------------------------------------------ resume
        make_out(out)
        found, state = find_checkpoint(out, resume, world)
        step, seconds_before, knn_untrained = 0, 0.0, None
        if found:
            check_same_run(config, source.fingerprint, found, state, allowed)
            model.load_state_dict(state["model"])
            groups = optimizer.state_dict()["param_groups"]  # settings are the config's, momentum the run's
            optimizer.load_state_dict({"state": state["momentum"], "param_groups": groups})
            train_step.load_state_dict(state["train_step"])
            step, seconds_before, knn_untrained = state["step"], state["seconds"], state["knn_untrained"]
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
            facts = {
                "ranks": world.size,
                "precision": precision,
                "backend": backend_reason,
                "config": config.model_dump(mode="json"),
            }
            provenance.record_start(out, step, world.device, facts)
    except (ValueError, OSError, checkpoint.CheckpointError) as error:
        distributed.shutdown(world)
        return fail(error)

    # ------------------------------------------------------------------------------------------------ loop
    display = metrics.Display(step, last_step, enabled=world.is_main)
    started = saved = time.monotonic()

    def check_finite() -> None:
        if broken:
            raise FloatingPointError(
                f"loss or gradient not finite in a step between {logged_step} and {step}; such a step updates no "
                "weight, but batch-norm statistics hold its values, so nothing was saved since. Go on from the last "
                "checkpoint with a lower optimizer.base_lr or train.precision=fp32, and look at the images"
            )

    def save() -> None:
        """Rank 0 writes what is the same on every rank; the others meet it at their next reduction."""
        nonlocal saved
        check_finite()
        saved = time.monotonic()
        if world.is_main:
            state = {
                "step": step,
                "seconds": seconds_before + saved - started,
                "model": model.state_dict(),
                "momentum": optimizer.state_dict()["state"],
                "train_step": train_step.state_dict(),
                "config": config.model_dump(mode="json"),
                "data": source.fingerprint,
                "knn_untrained": knn_untrained,
            }
            checkpoint.save(out, step, state, config.run.keep_checkpoints)

    def evaluate(untrained: bool = False) -> float | None:
        """kNN top-1 in per cent, shown and logged; None without a labelled split."""
        if queries is None:
            return None
        accuracy = knn_accuracy(config, model.online.encoder, source, queries, world, calibrate=untrained)
        if not math.isfinite(accuracy):
            raise FloatingPointError("the encoder's features are not finite; nothing is exported")
        display.say(f"step {step}  kNN top-1 {accuracy:.1f} %{' (untrained)' if untrained else ''}")
        if log:
            log.add(step, {"knn_top1": accuracy})
        return accuracy

    steps_per_eval = max(1, round(config.eval.every_epochs * len(source) / config.train.batch_size))
    loss_sum = torch.zeros((), device=world.device)
    broken = torch.zeros((), dtype=torch.bool, device=world.device)
    logged_step, logged_at, logged_wait = step, time.monotonic(), loader.waited
    try:
        with display, loader:
            display.say(backend_reason)
            begin = f"resumed from {found}" if found else "new run"
            display.say(
                f"{begin}: steps {step} to {last_step} of {total_steps}, {len(source)} images, "
                f"{world.size} x {world.device.type}, {precision}"
            )
            if config.data.expected_images not in (None, len(source)):
                display.say(
                    f"the recipe was written for {config.data.expected_images} images, {config.data.path} "
                    f"holds {len(source)}: the schedules follow the latter"
                )
            stopping = distributed.any_rank(bool(stop.signal), world)
            if step == 0 and not stopping:
                knn_untrained = evaluate(untrained=True)
            batches = iter(loader)
            logged_at, logged_wait = time.monotonic(), loader.waited
            while step < last_step:
                # On a GPU the vote makes the host wait for the device: every tenth step is often enough.
                if not on_gpu or world.size == 1 or step % 10 == 0:
                    stopping = distributed.any_rank(bool(stop.signal), world)
                    if stopping:
                        break
                batch = next(batches)
                if step == 0 and world.is_main:
                    first = batch[0]
                    mean, std = config.augment.mean, config.augment.std
                    metrics.save_view_pairs(out / "views.png", first.view1, first.view2, mean, std)
                logging = (step + 1) % config.run.log_every == 0 or step + 1 == last_step
                lr = schedules.learning_rate(
                    step,
                    base_lr=config.optimizer.base_lr,
                    batch_size=config.train.batch_size,
                    warmup_steps=warmup_steps,
                    total_steps=total_steps,
                )
                tau = schedules.tau(
                    step,
                    base_tau=config.optimizer.base_tau,
                    total_steps=total_steps,
                    schedule=config.optimizer.tau_schedule,
                )
                result = train_step([(b.view1, b.view2) for b in batch], lr, tau, gauges=logging)
                loss_sum += result.loss
                # An fp16 gradient may overflow: the scale is lowered and the run goes on. Its loss may not.
                broken |= ~(result.loss.isfinite() if precision == "fp16" else result.finite)
                step += 1
                display.step(step)

                if logging:
                    check_finite()
                    steps, seconds = step - logged_step, time.monotonic() - logged_at
                    local = (loss_sum / steps, (loader.waited - logged_wait) / seconds, loader.corrupt_count)
                    loss, waiting, corrupt = distributed.all_reduce_mean(
                        torch.tensor(local, dtype=torch.float64, device=world.device), world
                    ).tolist()
                    row = {
                        "epoch": step * config.train.batch_size / len(source),
                        "loss": loss,
                        "lr": lr,
                        "tau": tau,
                        "images_per_second": steps * config.train.batch_size / seconds,
                        "data_wait_percent": 100 * waiting,
                        "gradient_norm": result.gradient_norm.item(),
                        "corrupt_images": corrupt * world.size,
                    }
                    if result.gauges:
                        row |= {name: value.item() for name, value in result.gauges._asdict().items()}
                    display.row(step, row)
                    if log:
                        log.add(step, row)
                    loss_sum.zero_()
                    logged_step, logged_at, logged_wait = step, time.monotonic(), loader.waited
                if step % steps_per_eval == 0 and last_step - step > steps_per_eval // 2:
                    logged_at += seconds_of(evaluate)  # images/s is the training's alone
                if time.monotonic() - saved > config.run.checkpoint_minutes * 60:
                    logged_at += seconds_of(save)

            # --------------------------------------------------------------------------------------- results
            save()
            if stopping:
                number = stop.signal or signal.SIGTERM  # another rank's signal: torchrun sends SIGTERM
                display.say(
                    f"stopped by {signal.Signals(number).name} at step {step}; go on with --resume auto"
                )
                distributed.shutdown(world)
                return 128 + number
            knn_trained = evaluate()
            if log:
                log.close()
                metrics.save_loss_curve(out / "loss.png", metrics.read_rows(log.path))
                checkpoint.export_encoder(
                    out / "encoder.safetensors",
                    model.online.encoder.state_dict(),
                    {
                        "backbone": config.model.backbone,
                        "stem": config.model.stem,
                        "steps": str(step),
                        "config": schema.to_yaml(config),
                    },
                )
            display.say(f"finished at step {step}: {out}/encoder.safetensors, loss.png, metrics.jsonl")
        if world.is_main and knn_trained is not None:
            untrained = "not measured" if knn_untrained is None else f"{knn_untrained:.1f} %"
            print(f"kNN top-1: {untrained} untrained, {knn_trained:.1f} % trained")
    except (CorruptBudgetError, FloatingPointError, OSError) as error:
        distributed.shutdown(world)
        print(f"error: rank {world.rank}, step {step}: {error}", file=sys.stderr)
        return 1
    distributed.shutdown(world)
    return 0


def seconds_of(action: Callable[[], object]) -> float:
    """Runs the action and returns how long it took."""
    start = time.monotonic()
    action()
    return time.monotonic() - start


def open_split(key: str, path: str) -> "Source":
    """Opens a data set; an error names the setting."""
    from pipelines.sources import open_source

    try:
        return open_source(path)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def make_out(out: Path) -> None:
    """Makes the folder of the run and sees that it can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(
            f"run.out={out} cannot be written: {error.strerror or error}; choose another folder"
        ) from None


def check_labels(config: schema.Config, source: "Source", queries: "Source | None", ranks: int) -> None:
    """Refuses splits that kNN cannot compare."""
    if queries is None:
        return
    if len(queries) < ranks:
        raise ValueError(
            f"eval.path={config.eval.path} holds {len(queries)} images for {ranks} ranks: use more"
        )
    for key, split in (("data.path", source), ("eval.path", queries)):
        if (split.labels < 0).any():
            raise ValueError(f"{key} holds unlabelled images, and kNN needs labels: set eval.path=null")
    if source.classes and queries.classes and source.classes != queries.classes:
        raise ValueError(
            f"eval.path={config.eval.path} has other classes than data.path={config.data.path}: "
            f"{queries.classes} and {source.classes}"
        )


def find_checkpoint(out: Path, resume: str | None, world: "World") -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to continue from and its state; (None, {}) for a new run. Rank 0 chooses for all."""
    from model import checkpoint, distributed

    def choose() -> tuple[Path | None, dict[str, Any]]:
        newest, state, damaged = checkpoint.load_newest(out)
        if resume is None and (newest or damaged):
            raise ValueError(
                f"run.out={out} holds checkpoints of an earlier run: add --resume auto to continue it, "
                "or choose another run.out"
            )
        if resume not in (None, "auto"):
            chosen = checkpoint.load(Path(resume))
            if newest and state["step"] > chosen["step"]:
                raise ValueError(
                    f"--resume {resume} is of step {chosen['step']}, but run.out={out} holds later ones, up to "
                    f"{newest.name}: move those away, or choose another run.out"
                )
            return Path(resume), chosen
        for sentence in damaged:
            print(f"warning: {sentence}; passed over", file=sys.stderr)
        if damaged and newest is None:
            raise ValueError(
                f"run.out={out} holds damaged checkpoints only: restore one, or use another run.out"
            )
        return newest, state

    path: Path | None = None
    state: dict[str, Any] = {}
    mistake = ""
    if world.is_main:
        try:
            path, state = choose()
        except (ValueError, checkpoint.CheckpointError) as error:
            mistake = str(error)
    path, mistake = distributed.broadcast_object((path, mistake), world)
    if mistake:
        raise ValueError(mistake)
    if path and not world.is_main:
        state = checkpoint.load(path)  # fails by name where the ranks do not share run.out
    return path, state


# What may not change within a run; everything else (paths, threads, logging, precision) may.
FIXED = ("run.seed", "data.order", "augment.", "model.", "optimizer.", "train.epochs", "train.batch_size",
         "train.accumulation", "data.fingerprint")  # fmt: skip


def check_allowed(config: schema.Config, allowed: list[str]) -> None:
    """Refuses an --allow-change that cannot be meant."""
    known = [key for key in [*flatten(config.model_dump()), "data.fingerprint"] if key.startswith(FIXED)]
    for key in allowed:
        if key.startswith("model."):
            raise ValueError(
                f"--allow-change {key}: the weights of another network do not fit; begin a new run"
            )
        if key not in known:
            raise ValueError(f"--allow-change {key}: not one of {', '.join(known)}")


def check_same_run(
    config: schema.Config, fingerprint: str, path: Path, state: dict[str, Any], allowed: list[str]
) -> None:
    """Refuses to continue a run with other settings than it was begun with."""
    then = flatten(schema.complete(state["config"])) | {"data.fingerprint": state["data"]}
    now = flatten(config.model_dump(mode="json")) | {"data.fingerprint": fingerprint}
    changed = [
        key
        for key in sorted(then.keys() | now.keys())
        if key.startswith(FIXED) and then.get(key) != now.get(key) and key not in allowed
    ]
    if changed:
        lines = [f"{key}: {then.get(key)} in the checkpoint, {now.get(key)} now" for key in changed]
        raise ValueError(
            f"{path} is from a run with other settings; restore them, or insist with --allow-change KEY:\n  "
            + "\n  ".join(lines)
        )


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def knn_accuracy(
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
    import copy

    import numpy as np
    from torch import Tensor

    from model import distributed, evaluate
    from pipelines.loader import plain_images

    def share(split: "Source", count: int) -> "np.ndarray":
        """This rank's part of `count` samples, evenly spaced over the split."""
        spaced = np.linspace(0, len(split), min(count, len(split)), endpoint=False).astype(np.int64)
        return spaced[world.rank :: world.size]

    def features(split: "Source") -> tuple[Tensor, Tensor]:
        images = plain_images(split, share(split, config.eval.max_images), config)
        mine, labels = evaluate.extract_features(encoder, images)
        return distributed.gather_rows(mine, world), distributed.gather_rows(labels, world)

    if calibrate:
        encoder = copy.deepcopy(encoder)
        ids = share(
            source, min(2048, len(source)) // world.size * world.size
        )  # as many batches on every rank
        evaluate.calibrate_batch_norm(encoder, plain_images(source, ids, config, 256 // world.size))
    classes = int(max(source.labels.max(), queries.labels.max())) + 1
    bank, bank_labels = features(source)
    tested, tested_labels = features(queries)
    if not (bank.isfinite().all() and tested.isfinite().all()):
        return math.nan
    return 100 * evaluate.knn_accuracy(
        bank, bank_labels, tested, tested_labels, classes, config.eval.k, config.eval.temperature
    )


if __name__ == "__main__":
    sys.exit(main())
