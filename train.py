"""Pre-trains an encoder with BYOL. One file, read top to bottom:

settings → world → data → model → resume → loop → results

python train.py --config configs/quickstart.yaml
torchrun --nproc-per-node=8 train.py --config configs/r50_1000ep.yaml run.out=runs/r50 --resume auto
"""

import argparse
import os
import signal
import sys
import time
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
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
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
        config.images_per_rank(int(os.environ.get("WORLD_SIZE", "1")))
        if args.print_config:
            print(describe(config))
            return 0
        if args.resume not in (None, "auto") and not Path(args.resume).is_file():
            raise ValueError(f"--resume {args.resume}: no such checkpoint; give an existing file, or auto")
    except ValueError as error:
        return fail(error)
    try:
        return train(config, args.resume, args.allow_change, Stop())
    except KeyboardInterrupt:
        return 130


def fail(error: Exception) -> int:
    """A user's mistake: one message, no traceback."""
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"error: {rank}{error}", file=sys.stderr)
    return 2


def describe(config: schema.Config) -> str:
    """The resolved config as YAML, and as comments what follows from it."""
    from pipelines.sources import open_source

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    lines = [schema.to_yaml(config).rstrip(), "", "# derived"]
    lines.append(f"# peak learning rate: {config.peak_lr:g}")
    lines.append(
        f"# images per rank and micro-batch: {config.images_per_rank(world_size)} on {world_size} rank(s)"
    )
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

    from model import checkpoint, distributed, metrics, schedules
    from model.byol import make_byol
    from model.optim import LARS
    from model.step import PRECISIONS, TrainStep
    from pipelines.loader import CorruptBudgetError, Loader, make_backend
    from pipelines.sources import open_source

    out = Path(config.run.out)
    try:
        # ------------------------------------------------------------------------------------------- world
        world = distributed.init(config.train.device, config.train.timeout_minutes * 60)
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
        source = open_source(config.data.path)
        queries = open_source(config.eval.path) if config.eval.path else None
        check_labels(config, source, queries)
        total_steps, warmup_steps = config.total_steps(len(source)), config.warmup_steps(len(source))
        if total_steps < 1:
            raise ValueError(f"train.epochs={config.train.epochs:g} is less than one step; raise it")
        last_step = min(total_steps, config.train.stop_at_step or total_steps)
        delivered = PRECISIONS[precision] if on_gpu else torch.float32
        backend, backend_reason = make_backend(config, world.device, delivered)

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
        out.mkdir(parents=True, exist_ok=True)
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
        )
        log = metrics.MetricLog(out, step) if world.is_main else None
    except (ValueError, OSError, checkpoint.CheckpointError) as error:
        return fail(error)

    # ------------------------------------------------------------------------------------------------ loop
    display = metrics.Display(step, last_step, enabled=world.is_main)
    started = saved = time.monotonic()

    def save() -> None:
        """Rank 0 writes what is the same on every rank; the others meet it at their next reduction."""
        nonlocal saved
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
        display.say(f"step {step}  kNN top-1 {accuracy:.1f} %{' (untrained)' if untrained else ''}")
        if log:
            log.add(step, {"knn_top1": accuracy})
        return accuracy

    steps_per_eval = max(1, round(config.eval.every_epochs * len(source) / config.train.batch_size))
    loss_sum = torch.zeros((), device=world.device)
    finite = torch.ones((), dtype=torch.bool, device=world.device)
    stopping = False
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
            if step == 0:
                knn_untrained = evaluate(untrained=True)
            batches = iter(loader)
            logged_step, logged_at, logged_wait = step, time.monotonic(), loader.waited
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
                tau = schedules.tau(step, base_tau=config.optimizer.base_tau, total_steps=total_steps)
                result = train_step([(b.view1, b.view2) for b in batch], lr, tau, gauges=logging)
                loss_sum += result.loss
                finite &= result.finite
                step += 1
                display.step(step)

                if logging:
                    loss = distributed.all_reduce_mean(loss_sum, world).item() / (step - logged_step)
                    if not finite and precision != "fp16":  # fp16 lowers its scale and goes on
                        raise FloatingPointError(
                            f"a loss or gradient is not finite after step {logged_step}; nothing was updated by "
                            "it. Lower optimizer.base_lr, or set train.precision=fp32"
                        )
                    seconds = time.monotonic() - logged_at
                    row = {
                        "epoch": step * config.train.batch_size / len(source),
                        "loss": loss,
                        "lr": lr,
                        "tau": tau,
                        "images_per_second": (step - logged_step) * config.train.batch_size / seconds,
                        "data_wait_percent": 100 * (loader.waited - logged_wait) / seconds,
                        "gradient_norm": result.gradient_norm.item(),
                        "corrupt_images": loader.corrupt_count,
                    }
                    if result.gauges:
                        row |= {name: value.item() for name, value in result.gauges._asdict().items()}
                    display.row(step, row)
                    if log:
                        log.add(step, row)
                    loss_sum.zero_()
                    logged_step, logged_at, logged_wait = step, time.monotonic(), loader.waited
                if step % steps_per_eval == 0 and last_step - step > steps_per_eval // 2:
                    before = time.monotonic()
                    evaluate()
                    logged_at += time.monotonic() - before
                if time.monotonic() - saved > config.run.checkpoint_minutes * 60:
                    save()

            # --------------------------------------------------------------------------------------- results
            save()
            if stopping:
                number = stop.signal or signal.SIGTERM  # another rank's signal: torchrun sends SIGTERM
                display.say(
                    f"stopped by {signal.Signals(number).name} at step {step}; go on with --resume auto"
                )
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
            print(f"kNN top-1: {knn_untrained:.1f} % untrained, {knn_trained:.1f} % trained")
    except (CorruptBudgetError, FloatingPointError, OSError) as error:
        print(f"error: rank {world.rank}, step {step}: {error}", file=sys.stderr)
        return 1
    distributed.shutdown(world)
    return 0


def check_labels(config: schema.Config, source: "Source", queries: "Source | None") -> None:
    """Refuses splits that kNN cannot compare."""
    if queries is None:
        return
    for key, split in (("data.path", source), ("eval.path", queries)):
        if (split.labels < 0).any():
            raise ValueError(f"{key} holds unlabelled images, and kNN needs labels: set eval.path=null")
    if source.classes != queries.classes:
        raise ValueError(
            f"eval.path={config.eval.path} has other classes than data.path={config.data.path}: "
            f"{queries.classes} and {source.classes}"
        )


def find_checkpoint(out: Path, resume: str | None, world: "World") -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to continue from and its state; (None, {}) for a new run. Rank 0 chooses for all."""
    from model import checkpoint, distributed

    if resume not in (None, "auto"):
        return Path(resume), checkpoint.load(Path(resume))
    path: Path | None = None
    state: dict[str, Any] = {}
    if world.is_main:
        path, state, damaged = checkpoint.load_newest(out)
        if resume is None and (path or damaged):
            raise ValueError(
                f"run.out={out} holds checkpoints of an earlier run: add --resume auto to continue it, "
                "or choose another run.out"
            )
        for sentence in damaged:
            print(f"warning: {sentence}; passed over", file=sys.stderr)
        if damaged and path is None:
            raise ValueError(
                f"run.out={out} holds damaged checkpoints only: restore one, or use another run.out"
            )
    chosen = distributed.broadcast_object(path, world)
    if chosen and not world.is_main:
        state = checkpoint.load(chosen)  # fails by name where the ranks do not share run.out
    return chosen, state


# What may not change within a run; everything else (paths, threads, logging, precision) may.
FIXED = ("run.seed", "data.order", "augment.", "model.", "optimizer.", "train.epochs", "train.batch_size",
         "train.accumulation", "data.fingerprint")  # fmt: skip


def check_same_run(
    config: schema.Config, fingerprint: str, path: Path, state: dict[str, Any], allowed: list[str]
) -> None:
    """Refuses to continue a run with other settings than it was begun with."""
    then = flatten(state["config"]) | {"data.fingerprint": state["data"]}
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
    """kNN top-1 in per cent: bank data.path, queries eval.path, the ranks share the images.

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
        evaluate.calibrate_batch_norm(encoder, plain_images(source, ids, config))
    classes = int(max(source.labels.max(), queries.labels.max())) + 1
    accuracy = evaluate.knn_accuracy(
        *features(source), *features(queries), classes, config.eval.k, config.eval.temperature
    )
    return 100 * accuracy


if __name__ == "__main__":
    sys.exit(main())
