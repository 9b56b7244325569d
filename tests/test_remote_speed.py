"""A short run of benchmarks/remote: its numbers are consistent. How fast the loader is depends on the machine."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from whole_runs import SERVER

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "remote"


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "measure", raising=False)
    yield importlib.import_module("measure")
    sys.modules.pop("measure", None)


def test_computed_connections_follow_littles_law(speed: Any) -> None:
    # 23,200 images/s of 110 kB: 304 requests of 8.4 MB a second, each of 0.15 s.
    assert speed.connections(23_200, 110_000, 0.03, 70e6) == 46
    assert speed.connections(500, 196_608, 0.03, 70e6) == 2
    assert speed.connections(1, 1, 0.03, 70e6) == 1


@pytest.mark.slow
def test_local_and_remote_cases(
    speed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server and the cases in forked processes, which need not import torch."""
    out = tmp_path / "out.json"
    words = [
        "--json",
        str(out),
        "--folder",
        str(tmp_path),
        "--pixels",
        "32",
        "--rate",
        "100",
        "--orders",
        "lanes",
    ]
    words += ["--seconds", "2", "--settle", "1", "--local-seconds", "1"]
    monkeypatch.setattr(speed, "SPAWN", SERVER)
    monkeypatch.setattr(sys, "argv", ["measure.py", *words])
    assert speed.main() == 0
    report, shown = json.loads(out.read_text()), capsys.readouterr().out
    local, once, twice = report["results"]
    assert report["computed_connections"] == once["connections"] == 1 and twice["connections"] == 2
    assert "requests" not in local and once["requests"] > 0 and once["sent_mb"] > 0
    for row in report["results"]:
        assert 0 < row["settled"]["images_per_s"] <= 101 and 0 <= row["settled"]["wait"] <= 1
        assert row["images"] > 0 and row["settled"]["cpu_ms"] > 0 and row["case"] in shown
    assert list(tmp_path.iterdir()) == [out]
