"""Pre-trains an encoder with BYOL. One file, read top to bottom:

settings -> world -> data -> model -> resume -> loop -> results

python train.py --config configs/quickstart.yaml
torchrun --nproc-per-node=8 train.py --config configs/r50_1000ep.yaml run.out=runs/r50 --resume auto
"""

import argparse
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import byolt.tools.environment  # noqa: F401
from byolt.configs import command_line, derived, fixed, schema
from byolt.files import failpoint, stop
from byolt.files.console import say
from byolt.files.lock import Lock
from byolt.files.machine import cores_per_rank, find_device, ranks_here

if TYPE_CHECKING:  # torch takes seconds to import: settings are checked and signals handled before
    from byolt.model.distributed import World
    from byolt.model.run.run import Run
    from byolt.model.run.trace import Trace
    from byolt.pipelines.loader import Loader

# ── settings ───────────────────────────────────────────────────────────────────────────────────────────────


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 finished, 1 failed, 2 a mistake in settings or data, 128 + N stopped by signal N."""
    parser = command_line.SettingsParser(description="Pre-trains an encoder with BYOL.")
    add, home = parser.add_argument, os.path.expanduser
    add("--config", type=home, required=True, help="YAML file; see configs/")
    add("--resume", type=home, metavar="auto|PATH", help="continue from run.out's newest checkpoint, or PATH")
    add("--allow-change", action="append", default=[], metavar="KEY", help="resume with another value of KEY")
    add("--trace", type=int, metavar="STEPS", help="write a Chrome trace of STEPS steps to run.out")
    add("--print-config", action="store_true", help="print the resolved config and exit")
    add("overrides", nargs="*", metavar="section.key=value", help="override settings")
    args = parser.parse_intermixed_args(argv)
    try:
        config = schema.load(args.config, args.overrides)
        world_size = command_line.world_size()
        config.check_ranks(world_size)
        fixed.check_allowed(config, args.allow_change)
        if args.trace is not None and args.trace < 1:
            raise ValueError(f"--trace {args.trace} must be at least 1")
        from byolt.pipelines.order import check_batch_size
        from byolt.pipelines.sources import check_paths, open_source

        if args.print_config:
            device = find_device(config.train.device)
            say(derived.describe(config, world_size, open_source, check_batch_size, device))
            return 0
        command_line.check_resume(args.resume)
        command_line.check_logger(config.run.wandb)
        command_line.check_backbone(config.model.backbone)
        if world_size == 1:  # several ranks first connect, so that a mistake of one ends all
            check_paths({"data.path": config.data.path, "eval.path": config.eval.path}, config.run.out)
            command_line.check_init_from(config, args.resume)
    except (ValueError, OSError) as error:
        return fail(error)
    try:
        with Lock(Path(config.run.out, "run.lock"), f"run.out={config.run.out}") as lock, stop.listening():
            return train(config, args, lock)
    except KeyboardInterrupt:
        return 130


def fail(error: Exception) -> int:
    """Reports a user's mistake in one message without a traceback."""
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    say(f"error: {rank}{error}", file=sys.stderr)
    return 2


# ── the run ─────────────────────────────────────────────────────────────────────────────────────────────────


def train(config: schema.Config, args: argparse.Namespace, lock: Lock) -> int:
    """Runs or continues a whole run; returns the exit code."""
    failpoint.reach("import")
    from byolt.model import distributed
    from byolt.model.run import failure, trace
    from byolt.pipelines.loader import CorruptBudgetError

    settings, run = config.train, None
    try:
        world = distributed.init(settings.device, settings.timeout_minutes * 60, settings.deterministic)
    except ValueError as error:
        return fail(error)
    except stop.Stopped as error:
        say(error, file=sys.stderr)
        return 128 + (stop.asked() or signal.SIGTERM)
    try:
        run, loader = prepare(config, args, lock, world)
        tracing = trace.Trace(args.trace if args.trace and world.is_main else 0, run.out, run.meter.say)
        with run.meter, run.mirror or nullcontext(), loader, run.metrics or nullcontext(), tracing:
            run.begin()
            with run.stopped_by_outage():
                loop(run, loader, tracing)
            finish(run)
        code = report(run)
    except Exception as error:
        step, known = (run.step, run.config) if run else (None, config)
        return failure.report(error, step, world, known, CorruptBudgetError)
    distributed.shutdown(world)
    return code


def prepare(
    config: schema.Config, args: argparse.Namespace, lock: Lock, world: "World"
) -> tuple["Run", "Loader"]:
    """Everything before the first step; a ValueError, OSError or CheckpointError in it is a user's mistake."""
    import torch

    from byolt.model import distributed
    from byolt.model.quality.monitor import KnnMonitor
    from byolt.model.quality.probe import make_probe
    from byolt.model.run import provenance, trace
    from byolt.model.run.resume import begin, open_mirror, settle
    from byolt.model.run.run import Run
    from byolt.model.step import PRECISIONS, make_step
    from byolt.pipelines.backends import make_backend, make_resident
    from byolt.pipelines.loader import Loader
    from byolt.pipelines.order import check_batch_size
    from byolt.pipelines.plain import plain_images
    from byolt.pipelines.sources import check_paths, open_split
    from byolt.pipelines.subset import spaced

    # ── world ───────────────────────────────────────────────────────────────────────────────────────────────
    device, precision = world.device, config.train.precision_on(world.device.type)
    if device.type == "cpu" and (ranks_here() > 1 or "OMP_NUM_THREADS" not in os.environ):
        torch.set_num_threads(cores_per_rank())
    torch.manual_seed(config.run.seed)  # of the weights: order and views have generators of their own

    # ── data ────────────────────────────────────────────────────────────────────────────────────────────────
    check_paths({"data.path": config.data.path, "eval.path": config.eval.path}, config.run.out)
    source = open_split("data.path", config.data.path, config.data)
    mirror = open_mirror(config, args.resume, args.allow_change, source, lock, world)
    config = settle(config, args.resume, len(source), world)
    queries = open_split("eval.path", config.eval.path, config.data) if config.eval.path else None
    knn = KnnMonitor(config, source, queries, world, plain_images, spaced) if queries is not None else None
    check_batch_size(len(source), config.train.batch_size)
    total_steps = config.total_steps(len(source))
    last_step = min(total_steps, config.train.stop_at_step or total_steps)
    dtype = PRECISIONS[precision] if device.type == "cuda" else torch.float32
    backend, reason = make_resident(config, source, device, dtype) or make_backend(config, device, dtype)

    # ── model ───────────────────────────────────────────────────────────────────────────────────────────────
    train_step = make_step(config, world, precision)
    num_features = int(train_step.model.online.encoder.num_features)  # type: ignore[arg-type]
    probe = make_probe(config, num_features, source.labels, world)

    # ── resume ──────────────────────────────────────────────────────────────────────────────────────────────
    if (note := distributed.on_main(lock.take, world)) and world.is_main:
        say(f"warning: {note}", file=sys.stderr)
    (out := Path(config.run.out)).mkdir(parents=True, exist_ok=True)  # on machines that do not share it
    rounding = provenance.rounding_of(config, world, precision, type(backend).__name__)
    start = begin(args.resume, config, source, args.allow_change, train_step, probe, world, rounding)
    corrupt_log = out / "corrupt.jsonl"
    if not start.path:  # an earlier attempt's list of bad images goes before any rank begins a new one
        distributed.on_main(lambda: corrupt_log.unlink(missing_ok=True), world)
    trace.check_length(args.trace or 0, last_step - start.step)
    loader = Loader(
        config, source, backend, rank=world.rank, world_size=world.size, first_step=start.step,
        corrupt_log=corrupt_log, device=device,
    )  # fmt: skip
    run = Run(
        config, world, train_step, probe, knn, num_images=len(source), fingerprint=source.fingerprint,
        rounding=rounding, start=start, last_step=last_step, mirror=mirror,
    )  # fmt: skip
    run.introduce(start, precision, reason)
    return run, loader


# ── loop ────────────────────────────────────────────────────────────────────────────────────────────────────


def loop(run: "Run", loader: "Loader", tracing: "Trace") -> None:
    """Trains to the last step, or until a rank gets a signal."""
    import torch

    batches = iter(loader)
    while run.step < run.last_step and not run.stopping:
        with tracing.range("wait for data"):
            batch = run.next_batch(batches, lambda: loader.stand_in(run.world.device))
        lr, tau = run.lr_and_tau()
        logged = run.is_logged(run.step + 1)
        failpoint.reach("step", run.step)
        with tracing.range("training step"):
            result = run.train_step([(b.view1, b.view2) for b in batch], lr, tau, gauges=logged)
        if run.step == 0:
            run.draw_views(batch[0].view1, batch[0].view2)
        right = None
        if run.probe:
            labels = torch.cat([b.label for b in batch])
            right = run.probe(torch.cat(result.features1), labels, lr, result.finite)
        run.count(result, right, torch.cat([b.id for b in batch]))
        tracing.step(run.step)
        if logged:
            run.log(lr, tau, result, loader.waited, loader.corrupt_count)
        run.evaluate_if_due()
        run.save_or_stop_if_due()
    run.check_finite()


# ── results ─────────────────────────────────────────────────────────────────────────────────────────────────


def finish(run: "Run") -> None:
    """Saves; unless a signal stopped the run, also evaluates, exports the encoder and draws the loss curve."""
    from byolt.files.rows import read_rows
    from byolt.model.run.pictures import save_loss_curve
    from byolt.model.run.trained import export_trained

    run.check_finite()  # the loop has not, if an outage ended it
    run.save()
    if not run.stopping:
        run.knn_trained = run.evaluate()
        path = run.out / "encoder.safetensors"
        if run.metrics:
            export_trained(path, run.train_step.model.online.encoder, run.config, run.step)
            with run.writing("loss.png", may_stop=False):  # a missing picture does not undo a finished run
                save_loss_curve(run.out / "loss.png", read_rows(run.metrics.path))
        total = run.config.total_steps(run.num_images)
        asked = ", as train.stop_at_step asks" * (run.step == run.last_step)
        early = f" of {total}{asked}" if run.step < total else ""
        run.meter.say(f"finished at step {run.step}{early}: {path}")
    if run.metrics:
        with run.writing("TensorBoard's file"):
            run.metrics.close()


def report(run: "Run") -> int:
    """Prints the kNN accuracy and, as the last line, the digest; returns the exit code."""
    from byolt.model.run import digest

    code = 0
    if run.stopping:
        number = signal.Signals(stop.asked() or signal.SIGTERM)  # another rank got it: torchrun sends SIGTERM
        code = 128 + number
        run.meter.say(f"stopped by {number.name} at step {run.step}; continue with --resume auto")
    elif run.world.is_main and run.knn_trained is not None:
        before = "not measured" if run.knn_untrained is None else f"{run.knn_untrained:.1f} %"
        say(f"kNN top-1: {before} before training, {run.knn_trained:.1f} % after")
    sha256 = digest.agreed(run.state(), run.world)
    if run.world.is_main:
        began = ", initialized from {path} sha256 {sha256}".format_map(run.init_from) if run.init_from else ""
        say(f"digest: step {run.step} sha256 {sha256}{began}")
    return code


if __name__ == "__main__":
    sys.exit(main())
