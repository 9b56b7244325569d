"""tools/gpu_report.py on a CPU, shortened: one part's failure, crash or hang costs only its own figures."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from whole_runs import SERVER

from byolt.tools import gpu_report
from byolt.tools.benchmarks.gpu_parts import PARTS, Job, Part, Row, fed, step, trained
from byolt.tools.benchmarks.gpu_parts import tests as marked
from byolt.tools.benchmarks.traffic import copy_bandwidth, counted


def fails(job: Job) -> Iterator[Row]:
    yield Row(1.0, "images/s", "sent before it fails")
    raise RuntimeError("CUDA out of memory.\nTried to allocate 20 GiB")


def hangs(job: Job) -> Iterator[Row]:
    time.sleep(600)
    yield Row(1.0, "never")


def crashes(job: Job) -> Iterator[Row]:
    os._exit(7)
    yield Row(1.0, "never")


BROKEN = (Part("fails", fails), Part("hangs", hangs, (), 1), Part("crashes", crashes))


def report(out: Path, parts: tuple[Part, ...], *words: str) -> tuple[int, dict[str, list[str]]]:
    """Runs the parts; the exit code, and the cells of the Markdown table by part."""
    code = gpu_report.main(["--quick", "--device", "cpu", "--out", str(out), *words], parts)
    table: dict[str, list[str]] = {}
    for line in (out / "gpu_report.md").read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| part"):
            name, *cells = line.strip("| ").split(" | ")
            table.setdefault(name, []).append(" | ".join(cells))
    return code, table


@pytest.mark.slow
def test_broken_parts_cost_only_their_own_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In forked processes, which need not import torch; that of the test below is spawned."""
    monkeypatch.setattr(gpu_report.multiprocessing, "get_context", lambda _: SERVER)
    parts = (*BROKEN, Part("step", step, ("optimizer.backend=foreach",), 100), Part("graph", *PARTS[3][1:]))
    code, table = report(tmp_path, parts)
    assert code == 1 and list(table) == ["fails", "hangs", "crashes", "step", "graph"]
    first, error = table["fails"]
    assert first == "1 | images/s | sent before it fails"
    assert error == "not measured |  | RuntimeError: CUDA out of memory."
    assert table["hangs"] == ["not measured |  | stopped after its limit of 1 s"]
    assert "its process ended with 7" in table["crashes"][0]
    assert [row.split(" | ")[1] for row in table["step"]] == [
        *("images/s", "host ms a step", "GB moved a step", "% of the step")
    ]
    assert "not measured |  | ValueError: " in table["graph"][0] and "cpu" in table["graph"][0]
    document = json.loads((tmp_path / "gpu_report.json").read_text())
    assert all(row["value"] > 0 for row in document["rows"] if row["part"] == "step")
    assert {"date", "commit", "hardware", "versions", "command"} <= document.keys()
    assert "Tried to allocate 20 GiB" in (tmp_path / "gpu_report.log").read_text()
    with Image.open(tmp_path / "gpu_report.png") as picture:
        assert picture.width > 800
    assert capsys.readouterr().out.count("\n") == len(document["rows"]) + 1


@pytest.mark.slow
def test_loader_whole_runs_and_tests(tmp_path: Path) -> None:
    """The functions behind the other parts, each once; those that start processes of their own without one around it."""
    pytest.importorskip("nvidia.dali")
    words = "--seconds", "500", "--data", "synthetic:64:40x50"
    code, table = report(tmp_path, (Part("both", fed, (), 150),), *words)
    assert code == 0
    assert [row.split(" | ")[1] for row in table["both"]] == [*["images/s"] * 3, "% stall"]
    job = Job("cpu", quick=True, data="", seconds=150)
    assert [row.unit for row in trained(job, "r18_cifar10", "")] == ["images/s", "% waiting for data"]
    assert [row[:2] for row in marked(job)] == [(0, "passed"), (0, "failed")]


def test_time_of_all_parts_is_limited(tmp_path: Path) -> None:
    """Limits of the parts before the tests leave time for them; after --seconds no part begins."""
    before = next(i for i, part in enumerate(PARTS) if part.run is marked)
    assert sum(part.seconds for part in PARTS[:before]) <= 285
    code, table = report(tmp_path, BROKEN, "--seconds", "5")
    assert code == 1 and table == {
        name: ["not measured |  | not begun: --seconds 5 are over"] for name, *_ in BROKEN
    }


def test_without_a_gpu_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main([]) == 2
    assert "--quick --device cpu" in capsys.readouterr().err


def test_bytes_of_operations_are_counted() -> None:
    """Forward and backward of a linear layer, and what moves nothing."""
    layer, x = nn.Linear(4, 8, bias=False), torch.randn(16, 4, requires_grad=True)
    with counted() as sizes:
        y = layer(x)  # reads 16 x 4 and 8 x 4, writes 16 x 8
        y.view(8, 16).detach().t()
        torch.empty(1000)
    assert sum(sizes) == 4 * (64 + 32 + 128)
    with counted() as sizes:
        y.backward(torch.ones(16, 8))  # the two products of the gradients, among others
    assert sum(sizes) >= 4 * (128 + 32 + 64 + 128 + 64 + 32)
    with counted() as sizes:
        y.data.add_(1.0)
    assert sum(sizes) == 2 * 4 * 128
    assert copy_bandwidth(torch.device("cpu"), 2**20) > 0


def test_tensors_of_triton_kernels_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    launched = []
    monkeypatch.setattr(jit.JITFunction, "run", lambda kernel, *args, grid, warmup: launched.append(args))
    kernel = object.__new__(jit.JITFunction)
    with counted() as sizes:
        kernel[(1,)](torch.ones(10), 3, torch.ones(4, dtype=torch.bfloat16))
    kernel[(1,)](torch.ones(5))
    assert sum(sizes[-2:]) == 48 and len(launched) == 2
