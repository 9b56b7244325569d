"""Progress of a conversion on stderr: a bar on a terminal, else a line now and then."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY = 5.0  # seconds


class Meter:
    """Progress with images/s, MB/s and ETA: a bar on a terminal, else a line now and then."""

    def __init__(self, total: int, kept: int) -> None:
        self.total, self.kept = total, kept
        self.start = self.last = time.perf_counter()
        console = Console(stderr=True)
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console) if console.is_terminal else None

    def __enter__(self) -> "Meter":
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.kept, rate="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, images: int, size: int) -> None:
        now = time.perf_counter()
        speed = images / (now - self.start)
        rate = f"{speed:,.0f} images/s, {size / (now - self.start) / 1e6:,.1f} MB/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.kept + images, rate=rate)
        elif now - self.last >= _LINE_EVERY and images:
            self.last = now
            left = (self.total - self.kept - images) / speed
            print(
                f"{self.kept + images:,}/{self.total:,} images, {rate}, {left:,.0f} s left", file=sys.stderr
            )
