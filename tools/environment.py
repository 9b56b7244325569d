"""Answers a forgotten environment with one line instead of a traceback.

The commands import this before anything else. Run as scripts they import it by the name `environment`, because Python
then finds the modules of this folder, but perhaps not byolt.
"""

import sys
from types import TracebackType


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints a missing library in one line; every other uncaught error, and a missing module of ours, in full."""
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("byolt."):
        advice = "activate the environment (. .venv/bin/activate), or install byolt into this one"
        print(f"error: {error}: {advice}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _explain
