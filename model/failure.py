"""Which rank failed first, and which fell silent: what every other rank says when a run breaks.

A rank that ends takes the others' next collective with it, and their errors speak of sockets. So each failing rank
leaves its reason in the store that all share; those that lost a peer read there whose reason came first. A rank that
left none was killed, stopped, or cannot be reached.
"""

import threading
import time

from model import distributed
from model.distributed import World

GRACE = 5.0  # seconds that a failing rank waits for the others' reasons


def explain(error: Exception, step: int, world: World) -> str:
    """Tells the other ranks why this one fails; returns the first failure of the run, for people.

    Args:
        error: what ended this rank's loop.
        step: steps that it has done.
        world: the processes; it must be called on every rank that fails, and each waits `GRACE` seconds at most.
    """
    mine = f"rank {world.rank}, step {step}: {error or type(error).__name__}"
    if world.size == 1:
        return mine
    lost = distributed.is_lost_peer(error)
    first: list[str] = []
    # In a thread, because a store whose process was stopped answers neither yes nor no.
    talk = threading.Thread(target=lambda: first.append(_first(mine, lost, step, world)), daemon=True)
    talk.start()
    talk.join(2 * GRACE)
    if first:
        message = first[0]
    elif lost:
        message = f"rank {world.rank}, step {step}: lost the other ranks; rank 0, which all meet at, does not answer"
    else:
        message = mine
    distributed.record(RuntimeError(message))
    return message


def _first(mine: str, lost: bool, step: int, world: World) -> str:
    try:
        if not lost:
            first = world.store.add("failed of itself", 1) == 1
            if first:
                world.store.set("first failure", mine)
        world.store.set(f"failed {world.rank}", "")
        end = time.monotonic() + GRACE
        others = [rank for rank in range(world.size) if rank != world.rank]
        while silent := [rank for rank in others if not world.store.check([f"failed {rank}"])]:
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        if world.store.check(["first failure"]):
            return world.store.get("first failure").decode()
    except RuntimeError:  # the process that keeps the store has ended
        return mine if not lost else f"rank {world.rank}, step {step}: lost rank 0; see what it said"
    if not lost or not silent:
        return mine
    names = ", ".join(map(str, silent))
    return (
        f"rank {world.rank}, step {step}: rank {names} did not come to this step: killed, stopped, or waiting longer "
        "than train.timeout_minutes"
    )
