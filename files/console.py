"""Prints text for people: names of files and classes may hold any byte, terminals obey some of them."""

import argparse
import errno
import io
import math
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, TextIO

from byolt.files import stop
from byolt.files.paths import without_secrets

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 5  # items of a list
_LENGTH = 100  # characters of one of them

# Control characters but newline and tab; marks that reorder text; bytes that are not UTF-8, as Python keeps them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """The text without the secrets of URLs, and with escapes (\\x1b) for characters that a terminal would obey."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], without_secrets(str(text)))


def say(text: object = "", file: TextIO | None = None) -> None:
    """Prints a line to stdout, or to `file`; see `printable` and `without_reader`."""
    with without_reader(file or sys.stdout):
        print(printable(text), file=file, flush=True)


@contextmanager
def without_reader(file: TextIO) -> Iterator[None]:
    """Around a write to `file`: if its reader has gone, later writes go nowhere.

    A command (`command | head -1`) then ends without a message, as by SIGPIPE. A run, whose terminal may have gone too,
    saves first, as after a signal.
    """
    try:
        yield
    except OSError as error:
        in_run = stop.asked() is not None
        if error.errno != errno.EPIPE and not (in_run and error.errno == errno.EIO):
            raise
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, file.fileno())  # so that nothing fails at the end of the process either
        os.close(null)
        if in_run:
            stop.ask(stop.asked() or signal.SIGPIPE)
        elif threading.current_thread() is threading.main_thread():  # for another one somebody may wait
            raise SystemExit(128 + signal.SIGPIPE) from None


class Parser(argparse.ArgumentParser):
    """Prints wrong arguments as `say` does."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def say_table(table: "Table") -> None:
    """Prints a table, as wide as the terminal or else 120 characters, as `say` does."""
    from rich.console import Console

    width = shutil.get_terminal_size().columns if sys.stdout and sys.stdout.isatty() else 120
    drawn = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    with drawn.capture() as text:
        drawn.print(table)
    say(text.get().rstrip("\n"))


def count(number: int, noun: str) -> str:
    """ "1 shard", "2 shards", "1,024 shards"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """ "90 s", "5 min", "1 h 5 min", "12 days": rounded up."""
    if seconds <= 119:
        return f"{max(1, math.ceil(seconds))} s"
    minutes = math.ceil(seconds / 60)
    if minutes >= 100 * 60:
        return f"{math.ceil(minutes / 60 / 24):,} days"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def shown(items: Iterable[object], separator: str = ", ") -> str:
    """The first five items, each cut to 100 characters on one line, and the number of the others: fits a screen."""
    texts = [str(item).replace("\n", "\\n") for item in items]
    first = [
        text if len(text) <= _LENGTH else f"{text[: _LENGTH // 2 - 2]}...{text[1 - _LENGTH // 2 :]}"
        for text in texts[:_SHOWN]
    ]
    if len(texts) > _SHOWN:
        first.append(f"and {len(texts) - _SHOWN:,} more")
    return separator.join(first)


def difference(key: str, names: list[str], other_key: str, other_names: list[str]) -> str:
    """How two different lists of names differ, for example "only in --train: cat, dog"."""
    sides = ((key, names, {*other_names}), (other_key, other_names, {*names}))
    only = [(side, [name for name in mine if name not in others]) for side, mine, others in sides]
    said = [f"only in {side}: {shown(found)}" for side, found in only if found]
    return "; ".join(said) or "the same names in another order, or repeated"
