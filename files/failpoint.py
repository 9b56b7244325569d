"""Injects faults, so that tests can show what a run survives.

With BYOLT_FAIL="POINT:COUNT:ACTION[:RANK]", rank RANK (default 0) fails when it reaches POINT with that COUNT. ACTION
is the name of a signal, which the process sends to itself, the name of an errno, raised as OSError, or "raise" for a
RuntimeError. After a restart by torchrun nothing fails again.
"""

import errno
import os
import signal


def reach(point: str, count: int = 0) -> None:
    """Fails if BYOLT_FAIL asks for it at this point, "step" for example, and this count: the step's number."""
    if "BYOLT_FAIL" not in os.environ:
        return
    place, at, action, *rank = os.environ["BYOLT_FAIL"].split(":")
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
