"""Which rank failed first: every rank prints it when a run breaks.

A rank that ends breaks the others' next collective, and their errors speak of sockets. So a failing rank leaves its
reason in the store that all ranks share, and a rank that lost a peer reads there which reason came first. A rank that
leaves no word was killed, stopped, or cannot be reached.
"""

import threading
import time
from contextlib import suppress
from datetime import timedelta

from byolt.files.console import shown
from byolt.files.limits import limit_behind
from byolt.model import distributed
from byolt.model.distributed import World

GRACE = timedelta(seconds=5)  # a rank that lost a peer waits for a reason
PATIENCE = timedelta(seconds=2)  # rank 0, which keeps the store, waits for the others before it ends


def explain(error: Exception, step: int | None, world: World) -> str:
    """Tells the other ranks why this one fails; returns the run's first failure for the user.

    Args:
        error: the error that ended this rank.
        step: steps done; None before the loop.
        world: the processes.

    Returns:
        "rank R, step S: reason", after 11 seconds at most.
    """
    here = f"rank {world.rank}" + ("" if step is None else f", step {step}")
    reason = f"{str(error) or type(error).__name__}{limit_behind(error)}"
    mine = f"{here}: {reason}"
    if world.size == 1:
        return mine if step is not None else reason
    if is_first := not distributed.is_lost_peer(error):
        distributed.record(error)
    said = [mine if is_first else f"{here}: rank 0, which keeps the store, does not answer"]
    # In a thread, because a store whose process was stopped never answers.
    talk = _tell if is_first else _ask
    thread = threading.Thread(target=lambda: said.append(talk(here, mine, world)), daemon=True)
    thread.start()
    thread.join(2 * GRACE.total_seconds())
    if not is_first:
        time.sleep(1)  # torchrun compares whole seconds to find the first error
    return said[-1]


def _tell(here: str, mine: str, world: World) -> str:
    with suppress(RuntimeError):  # the store's process has ended, or others keep silent
        world.store.compare_set("first failure", "", mine)
        world.store.set(f"spoke {world.rank}", "")
        if world.is_main:
            world.store.wait([f"spoke {rank}" for rank in range(world.size)], PATIENCE)
    return mine


def _ask(here: str, mine: str, world: World) -> str:
    """Returns the first failure, or the ranks that left no word."""
    try:
        world.store.set(f"spoke {world.rank}", "")
        with suppress(RuntimeError):
            world.store.wait(["first failure"], GRACE)
            return world.store.get("first failure").decode()
        silent = [str(rank) for rank in range(world.size) if not world.store.check([f"spoke {rank}"])]
    except RuntimeError:
        return f"{here}: lost rank 0; see its output"
    return (
        f"{here}: rank {shown(silent) or 'another'} did not come to this step: killed, stopped, or waiting longer "
        "than train.timeout_minutes"
    )
