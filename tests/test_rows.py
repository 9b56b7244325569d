"""JSON-lines files: rows that are read, damaged lines, and imports."""

import subprocess
import sys
from pathlib import Path

import pytest

from byolt.files.rows import append_row, read_metrics, read_rows

ROOT = Path(__file__).resolve().parent.parent


def test_objects_with_the_key_are_read_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    lines = [b'{"step": 1, "loss": 2.5}', b"", b"null", b'["step"]', b'{"id": 4}', b"\xff\xfe", b'{"step": 2']
    path.write_bytes(b"\n".join(lines))
    assert read_rows(path) == [{"step": 1, "loss": 2.5}]
    assert read_rows(path, id=int) == [{"id": 4}]


def test_fields_have_types(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1, "reason": "empty"}\n{"id": "1", "reason": "x"}\n{"id": 1, "reason": 2}\n')
    assert read_rows(path, id=int, reason=str) == [{"id": 1, "reason": "empty"}]


def test_a_torn_line_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, {"step": 1})
    path.write_bytes(path.read_bytes() + b'{"step": 2, "lo')
    for step in (3, 4):
        append_row(path, {"step": step, "loss": 0.5})
    assert path.read_text().splitlines()[0] == '{"step": 1}'
    assert [row["step"] for row in read_rows(path)] == [1, 3, 4]


def test_hostile_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    steps = ["-1", "true", "null", "1.0", '"3"', "[1]", str(2**63), "9" * 400, "9" * 5000, "NaN"]
    lines = ["[" * 100_000, *(f'{{"step": {step}}}' for step in steps), f'{{"step": {2**63 - 1}}}']
    path.write_text("\n".join(lines))
    assert read_rows(path) == [{"step": 2**63 - 1}]


def test_metrics_are_finite_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    odd = ["NaN", "-Infinity", "1e999", '"x"', "null", "true", "[2]", "{}", "9" * 400]
    numbers = ", ".join(f'"odd{i}": {value}' for i, value in enumerate(odd))
    path.write_text(f'{{"step": 3, {numbers}, "loss": 1e308, "count": -2}}')
    assert read_metrics(path) == [{"step": 3, "loss": 1e308, "count": -2}]


@pytest.mark.parametrize("module", ["byolt.files.rows", "byolt.tools.ablate"])
def test_reading_lines_takes_neither_torch_nor_matplotlib(module: str) -> None:
    check = f"import sys, {module}; print({{'torch', 'matplotlib', 'tensorboard'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
