"""JSON-lines files, one object a line: metrics.jsonl, starts.jsonl, corrupt.jsonl. Nothing heavy is imported here."""

import json
from pathlib import Path
from typing import Any


def read_rows(path: Path, key: str = "step") -> list[dict[str, Any]]:
    """The objects of a JSON-lines file that have `key`; none where there is no file.

    What is no such object, such as a last line that a kill cut short, is left out.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and key in row:
            rows.append(row)
    return rows
