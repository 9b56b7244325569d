"""starts.jsonl: one line per start."""

import sys
from pathlib import Path

import pytest
import torch

from byolt.files.rows import read_rows
from byolt.model.run import provenance


def test_a_start_is_a_line_and_a_new_run_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/some/where/python")
    monkeypatch.setattr(sys, "argv", ["train.py", "run.out=a b"])
    cpu = torch.device("cpu")
    assert read_rows(tmp_path / provenance.FILE) == []
    for step in (0, 7):
        provenance.record_start(tmp_path, step, cpu, {"ranks": 2})
    rows = read_rows(tmp_path / provenance.FILE)
    assert [(row["step"], row["ranks"]) for row in rows] == [(0, 2), (7, 2)]
    assert rows[0]["command"] == "python train.py 'run.out=a b'"
    assert rows[0]["versions"]["torch"] == torch.__version__
    assert " core" in rows[0]["hardware"]
    provenance.record_start(tmp_path, 0, cpu, {})
    assert [row["step"] for row in read_rows(tmp_path / provenance.FILE)] == [0]
