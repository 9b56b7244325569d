"""Which rank failed first, and which fell silent: what every other rank says when a run breaks.

A rank that ends takes the others' next collective with it, and their errors speak of sockets. So each failing rank
leaves its reason in the store that all share; those that lost a peer read there whose reason came first. A rank that
says nothing was killed, stopped, or cannot be reached.
"""

import contextlib
import threading
import time

from byolt.model import distributed
from byolt.model.distributed import World

GRACE = 5.0  # seconds that a failing rank waits for the others' reasons
PATIENCE = 2.0  # seconds that rank 0, failing, lets the others speak


def explain(error: Exception, step: int | None, world: World) -> str:
    """Tells the other ranks why this one fails; returns the first failure of the run, for people.

    Args:
        error: what ended this rank.
        step: steps that it has done; None before the loop.
        world: the processes. A rank that lost another waits `GRACE` seconds at most for what the others have to say.
    """
    here = f"rank {world.rank}" + ("" if step is None else f", step {step}")
    mine = f"{here}: {error or type(error).__name__}"
    if world.size == 1:
        return mine if step is not None else str(error)
    lost = distributed.is_lost_peer(error)
    if not lost:
        distributed.record(error)
    said: list[str] = []
    # In a thread, because a store whose process was stopped answers neither yes nor no.
    talk = threading.Thread(
        target=lambda: said.append(_ask(here, world) if lost else _tell(mine, world)), daemon=True
    )
    talk.start()
    talk.join(2 * GRACE)
    if not lost:
        return mine
    time.sleep(1)  # torchrun takes the earliest whole second for the first error
    return said[0] if said else f"{here}: rank 0, where all ranks meet, does not answer"


def _tell(mine: str, world: World) -> str:
    with contextlib.suppress(RuntimeError):  # the process that keeps the store has ended
        if world.store.add("failures", 1) == 1:
            world.store.set("first failure", mine)
        world.store.set(f"failed {world.rank}", "")
        # Rank 0 keeps the store: where all fail alike it lets the others speak before it ends.
        end, silent = time.monotonic() + PATIENCE, list(range(1, world.size))
        while world.is_main and silent and time.monotonic() < end:
            time.sleep(0.05)
            silent = [
                r for r in silent if not _has(world, f"failed {r}") and not _has(world, f"lost a rank {r}")
            ]
    return mine


def _has(world: World, key: str) -> bool:
    return bool(world.store.check([key]))


def _ask(here: str, world: World) -> str:
    """The first failure, or what is known of the others."""
    try:
        world.store.set(f"lost a rank {world.rank}", "")
        end = time.monotonic() + GRACE
        silent = [rank for rank in range(world.size) if rank != world.rank]
        while silent and time.monotonic() < end:
            if _has(world, "first failure"):
                return world.store.get("first failure").decode()
            time.sleep(0.05)
            silent = [rank for rank in silent if not _has(world, f"lost a rank {rank}")]
    except RuntimeError:
        return f"{here}: lost rank 0; see what it said"
    names = ", ".join(map(str, silent)) or "another"
    return (
        f"{here}: rank {names} did not come to this step: killed, stopped, or waiting longer than "
        "train.timeout_minutes"
    )
