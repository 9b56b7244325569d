"""Faults on demand, so that tests can show what a run survives.

BYOLT_FAIL="POINT:COUNT:ACTION[:RANK]" lets rank RANK (default 0) do ACTION when it reaches POINT for that COUNT: the
name of a signal is sent to the process itself, the name of an errno is raised as OSError, "raise" raises RuntimeError.
After a restart by torchrun nothing fails again. Without the variable a point costs a look into the environment.
"""

import errno
import os
import signal


def reach(point: str, count: int = 0) -> None:
    """Fails here if BYOLT_FAIL says so.

    Args:
        point: name of the place, such as "step".
        count: which time, such as the number of the step.
    """
    if "BYOLT_FAIL" in os.environ:
        _fail(os.environ["BYOLT_FAIL"], point, count)


def _fail(wanted: str, point: str, count: int) -> None:
    place, at, action, *rank = wanted.split(":")
    here = os.environ.get("RANK", "0") == (rank[0] if rank else "0")
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if (place, int(at)) != (point, count) or not here or again:
        return
    if action.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[action])
    elif action == "raise":
        raise RuntimeError(f"fail-point {point} at {count}")
    else:
        number = getattr(errno, action)
        raise OSError(number, os.strerror(number))
