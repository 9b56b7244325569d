"""Finds which rank failed first, so that every rank can print it.

A rank that ends makes the next collective of the other ranks fail with an error about sockets. So a failing rank writes
its reason to the store that all ranks share, and a rank that lost a peer reads the first reason there. A rank that
reports nothing was killed or stopped, or cannot be reached.
"""

import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta

import torch

from byolt.configs import estimate
from byolt.configs.schema import Config
from byolt.files import stop
from byolt.files.console import count, say, shown
from byolt.files.limits import limit_behind
from byolt.model import distributed
from byolt.model.distributed import World
from byolt.model.run import provenance
from byolt.model.run.checkpoint import CheckpointError
from byolt.model.run.guard import CollapseError

REASON_TIMEOUT = timedelta(seconds=5)  # a rank that lost a peer waits this long for a reason
REPORT_TIMEOUT = timedelta(seconds=2)  # rank 0, whose process is the store, waits this long for the others


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left; on a CPU torch raises no narrower error."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")
    named = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return named or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _memory_reason(config: Config, step: int | None, world: World) -> str:
    """Names batch, size and remedies, in two lines."""
    train, device = config.train, provenance.device_of(world.device)
    micro = f"train.batch_size={train.batch_size} train.accumulation={train.accumulation}"
    line = f"out of memory on {device}: {micro} augment.size={config.augment.size}"
    if config.undecided:
        return f"{line}\n  set a smaller train.batch_size, augment.size or model.backbone"
    need = estimate.memory(config, device.kind) if estimate.is_known(config) else None
    images = config.images_per_rank(world.size)
    parts = estimate.fitting_accumulation(config, device, world.size, above=train.accumulation)
    allowed = " --allow-change train.accumulation" * bool(step)
    remedies = f"train.accumulation={parts}{allowed}, " if parts > train.accumulation else ""
    remedies += "a smaller train.batch_size or augment.size"
    if need and need.largest(device.memory) < 2:
        remedies = "a smaller network (model.backbone, model.projector_hidden, model.predictor_hidden)"
    if train.precision_on(device.kind) == "fp32" and device.kind == "cuda":
        remedies += ", or train.precision=bf16"
    each = f"{count(images, 'image')} per rank and micro-batch"
    amount = f"about {need.total(images) / 2**30:.1f} GiB" if need else "more than there is"
    return f"{line}\n  {each} need {amount}: set {remedies}"


def report(
    error: Exception, step: int | None, world: World, config: Config, *foreseen: type[Exception]
) -> int:
    """Prints why a run of train.py ended on this rank, with a traceback where the error itself does not say it.

    Args:
        error: a ValueError, OSError or CheckpointError before the loop is a user's mistake.
        step: steps done; None before the loop.
        world: the ranks; see `explain`.
        config: of the run.
        foreseen: further errors that need no traceback.

    Returns:
        The exit code: 2 for a user's mistake, 128 + N after signal N, otherwise 1.
    """
    mistake = step is None and isinstance(error, (ValueError, OSError, CheckpointError))
    mistake = mistake or is_out_of_memory(error)
    known = mistake or isinstance(error, (CollapseError, FloatingPointError, OSError, *foreseen))
    lost_peer = distributed.is_lost_peer(error)
    if not (known or lost_peer or limit_behind(error)):
        traceback.print_exc()
    stopped = isinstance(error, InterruptedError) or (lost_peer and stop.asked())  # as were the others
    reason = explain(error, None if isinstance(error, stop.Stopped) else step, world, config)
    say(reason if stopped else f"error: {reason}", file=sys.stderr)
    if stopped:
        return 128 + (stop.asked() or signal.SIGTERM)
    return 2 if mistake else 1


def explain(error: Exception, step: int | None, world: World, config: Config | None = None) -> str:
    """Reports the error that ended this rank after `step` steps (None before the loop) to the other ranks.

    Returns:
        The run's first failure, "rank R, step S: reason", after 11 seconds at most.
    """
    here = f"rank {world.rank}" + ("" if step is None else f", step {step}")
    if config and is_out_of_memory(error):
        reason = f"{_memory_reason(config, step, world)}{limit_behind(error)}"
    else:
        reason = f"{str(error) or type(error).__name__}{limit_behind(error)}"
    mine = f"{here}: {reason}"
    if world.size == 1:
        return mine if step is not None else reason
    lost_peer = distributed.is_lost_peer(error)
    if not lost_peer:
        distributed.record(error)
    reasons = [f"{here}: rank 0, which keeps the store, does not answer" if lost_peer else mine]

    def exchange() -> None:
        reasons.append(_read_first(here, world) if lost_peer else _write(mine, world))

    thread = threading.Thread(target=exchange, daemon=True)  # a store whose process is stopped never answers
    thread.start()
    thread.join(2 * REASON_TIMEOUT.total_seconds())
    if lost_peer:
        time.sleep(1)  # torchrun compares whole seconds to find the first error
    return reasons[-1]


def _write(mine: str, world: World) -> str:
    with suppress(RuntimeError):  # the store's process has ended, or other ranks do not report
        world.store.compare_set("first failure", "", mine)
        world.store.set(f"reported {world.rank}", "")
        if world.is_main:
            world.store.wait([f"reported {rank}" for rank in range(world.size)], REPORT_TIMEOUT)
    return mine


def _read_first(here: str, world: World) -> str:
    """Returns the first failure, or the ranks that have not reported."""
    try:
        world.store.set(f"reported {world.rank}", "")
        with suppress(RuntimeError):
            world.store.wait(["first failure"], REASON_TIMEOUT)
            return world.store.get("first failure").decode()
        missing = [str(rank) for rank in range(world.size) if not world.store.check([f"reported {rank}"])]
    except RuntimeError:
        return f"{here}: lost rank 0; see its output"
    return (
        f"{here}: rank {shown(missing) or 'another'} did not reach this step: it was killed (perhaps "
        "for its memory) or stopped, or it waits longer than train.timeout_minutes"
    )
