"""The signal that asks a run to stop: work before the first step ends at it within seconds, the loop after its step.

Outside a run, which is inside `listening`, nothing here has an effect.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Stopped(InterruptedError):
    """A signal ended a run before its first step."""


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_signal: int | None = None  # None outside a run
_training = False


@contextmanager
def listening() -> Iterator[None]:
    """Remembers the SIGNALS while the block runs; a second Ctrl-C raises KeyboardInterrupt.

    The handlers stay: after the block a signal does not cut short the end of the process.
    """
    global _signal, _training
    _signal, _training = 0, False
    for number in SIGNALS:
        if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN):  # as nohup leaves it
            signal.signal(number, _remember)
    try:
        yield
    finally:
        _signal = None


def _remember(number: int, frame: FrameType | None) -> None:
    if _signal and number == signal.SIGINT:  # a second Ctrl-C does not wait for the step
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt
    ask(number)


def ask(number: int) -> None:
    """Asks the run to stop, as that signal does."""
    global _signal
    if _signal is not None:
        _signal = number


def asked() -> int | None:
    """The signal that asked the run to stop, or 0; None outside a run."""
    return _signal


def check() -> None:
    """Ends long work before the first step; call it every few milliseconds, from any thread.

    Raises:
        Stopped: A signal asked the run to stop, and its training has not begun.
    """
    if _signal and not _training:
        end()


def end() -> NoReturn:
    """Raises Stopped, also on a rank that got no signal itself."""
    name = signal.Signals(_signal or signal.SIGTERM).name  # torchrun sends SIGTERM
    raise Stopped(
        f"stopped by {name} before the first step: nothing was trained; the same command starts it again"
    )


def training_begins() -> None:
    """From now on `check` does nothing: the loop looks at `asked` after each step."""
    global _training
    _training = True
