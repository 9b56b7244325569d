"""JSON-lines files, one object a line: metrics.jsonl, starts.jsonl, corrupt.jsonl, quarantine.jsonl."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from byolt.files.regular import open_regular, read_regular

_LIMIT = 2**63  # of integers: NumPy, matplotlib and a float hold smaller ones without overflow


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Appends one line. A line that a kill or a full disk cut short before is ended first, so that only it is lost.

    It is not fsynced: a power cut may lose the newest rows, never the checkpoints.
    """
    with open(path, "ab+", opener=open_regular) as file:
        torn = file.tell() > 0 and file.seek(-1, 2) >= 0 and file.read(1) != b"\n"
        file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")


def read_rows(path: Path | bytes, **fields: type) -> list[dict[str, Any]]:
    """Reads the objects of a JSON-lines file, or of its content; a missing file has none.

    The fields are keys that an object must have and the types of their values, int or str; integers are 0 .. 2^63 - 1.
    The default is step=int.

    Returns:
        The matching objects. Every other line, for example one cut short by a kill, is left out.
    """
    return [row for _, row in _lines(path, fields) if row is not None]


def unread_lines(path: Path, **fields: type) -> list[int]:
    """The numbers, from 1, of the lines that `read_rows` leaves out, but for empty ones and an unfinished last one."""
    return [number for number, row in _lines(path, fields, unfinished=False) if row is None]


def _lines(
    path: Path | bytes, fields: dict[str, type], unfinished: bool = True
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The number of each line that is not empty, and its object if it has the fields."""
    if isinstance(path, Path):
        path = read_regular(path) if path.exists() else b""
    lines = path.decode(errors="replace").split("\n")
    for number, line in enumerate(lines if unfinished else lines[:-1], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        sound = isinstance(row, dict) and all(
            type(row.get(key)) is kind and (kind is not int or 0 <= row[key] < _LIMIT)
            for key, kind in (fields or {"step": int}).items()
        )
        yield number, row if sound else None


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, with only those values that are finite numbers; see `read_rows`."""
    return [{key: value for key, value in row.items() if _is_number(value)} for row in read_rows(path)]


def _is_number(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return -_LIMIT < value < _LIMIT
    return isinstance(value, float) and math.isfinite(value)
