"""JSON-lines files, one object a line: metrics.jsonl, starts.jsonl, corrupt.jsonl. Nothing heavy is imported here."""

import json
import math
from pathlib import Path
from typing import Any

_LIMIT = 2**63  # of integers: what NumPy, matplotlib and a float hold without overflow


def read_rows(path: Path, key: str = "step") -> list[dict[str, Any]]:
    """The objects of a JSON-lines file whose `key` is an integer in 0 .. 2^63 - 1; none where there is no file.

    What is no such object, such as a last line that a kill cut short, is left out.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if (
            isinstance(row, dict)
            and _is_number(number := row.get(key))
            and isinstance(number, int)
            and number >= 0
        ):
            rows.append(row)
    return rows


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, with those of their values that are finite numbers; see `read_rows`."""
    return [{key: value for key, value in row.items() if _is_number(value)} for row in read_rows(path)]


def _is_number(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return -_LIMIT < value < _LIMIT
    return isinstance(value, float) and math.isfinite(value)
