"""Progress on stderr: on a terminal a bar below the lines of text, elsewhere the lines alone."""

import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from byolt.files.console import printable, say, without_reader


class Meter:
    """Shows how much of a known amount of work is done, and when it will be; a context manager around the work."""

    def __init__(
        self, unit: str, total: int, done: int = 0, *, enabled: bool = True, line_every: float = 0.0
    ) -> None:
        """
        Args:
            unit: name of one piece of work: "step", "image".
            total: pieces in all.
            done: pieces that an earlier start has done; they do not count for the time left.
            enabled: False silences it.
            line_every: seconds between two lines of text where there is no terminal; lines in between are dropped. On a
                terminal each text then replaces the one before; with 0 all texts stay above the bar.
        """
        self._unit, self._total, self._first, self._line_every = unit, total, done, line_every
        self._start = self._last_line = time.perf_counter()
        self._enabled, console = enabled, Console(stderr=True, highlight=False)
        bar = BarColumn(bar_width=None)  # takes the width that is left
        self._bar = Progress(bar, MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn(), expand=True)
        self._task = self._bar.add_task("", total=total, completed=done)
        self._live = Live(self._bar, console=console) if console.is_terminal and enabled else None

    def __enter__(self) -> "Meter":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            with without_reader(sys.stderr):
                self._live.stop()

    def update(self, done: int, text: str = "") -> None:
        """Moves the bar to `done` pieces and shows a text as a line; see `line_every`."""
        self._bar.update(self._task, completed=done)
        if text and self._live and not self._line_every:
            self.say(f"{self._unit} {done}  {text}")
        elif text and self._live:
            self._live.update(Group(Text(printable(text)), self._bar))
        elif text and (now := time.perf_counter()) - self._last_line >= self._line_every:
            self._last_line = now
            left = (now - self._start) / max(done - self._first, 1) * (self._total - done)
            self.say(f"{self._unit} {done}/{self._total}  {text}  ETA {_clock(left)}")

    def say(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        if self._live:
            with without_reader(sys.stderr):
                self._live.console.print(printable(text), soft_wrap=True, markup=False)
        elif self._enabled:
            say(text, sys.stderr)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
