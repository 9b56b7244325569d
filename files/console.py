"""Prints text for people: names of files and classes may hold any byte, terminals obey some of them."""

import math
import re
from collections.abc import Iterable
from typing import TextIO

from byolt.files.paths import without_secrets

_SHOWN = 5  # items of a list
_LENGTH = 100  # characters of one of them

# Control characters but newline and tab; marks that reorder text; bytes that are not UTF-8, as Python keeps them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """The text with escapes, such as \\x1b, in the place of characters that a terminal would obey."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], str(text))


def say(text: object, file: TextIO | None = None) -> None:
    """Prints a printable line, without the secrets of URLs, to stdout, or to `file`."""
    print(printable(without_secrets(str(text))), file=file, flush=True)


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
