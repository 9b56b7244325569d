"""The peers' harness: two made-up pipelines in turns, what it measures, and what it says of broken ones."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
FAKES = """
import time, torch
def busy(job):
    while True:
        end = time.process_time() + 0.02
        while time.process_time() < end: pass
        yield torch.zeros(job.batch_size, 3, job.size, job.size), torch.ones(job.batch_size, 3, job.size, job.size)
def idle(job):
    while True:
        time.sleep(0.02)
        yield (torch.zeros(job.batch_size, 3, job.size, job.size),) * 2
def narrow(job):
    while True:
        yield (torch.zeros(job.batch_size, 3, 1, job.size),) * 2
def ends(job):
    yield (torch.zeros(job.batch_size, 3, job.size, job.size),) * 2
def missing(job):
    import no_such_library
"""


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The harness as a module; it is a program of its own, beside its pipelines."""
    monkeypatch.syspath_prepend(str(PEERS))
    return importlib.import_module("measure")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i in range(5):
        (tmp_path / "images" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / str(i % 2) / f"{i}.JPEG")
    return tmp_path / "images"


@pytest.mark.slow
def test_two_pipelines_in_turns(images: Path, tmp_path: Path) -> None:
    fakes, out = tmp_path / "fakes.py", tmp_path / "out.json"
    fakes.write_text(FAKES)
    names = ["busy", "idle", "narrow", "ends", "missing"]
    command = [sys.executable, str(PEERS / "measure.py"), str(images), "--out", str(out), "--batch-size", "4"]
    command += ["--extra", *(f"{name}={fakes}:{name}" for name in names), "--peers", *names]
    command += ["--size", "16", "--batches", "25", "--warmup", "1", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    busy, idle, narrow, ends, missing = json.loads(out.read_text())["peers"]
    # 20 ms of CPU time a batch of 4; /proc counts in hundredths of a second.
    assert busy["cpu_ms"] == pytest.approx(5, rel=0.2) and idle["cpu_ms"] < 1 and idle["images_per_s"] < 201
    assert "shape (4, 3, 1, 16)" in narrow["error"] and "StopIteration" in ends["error"]
    assert missing["error"] == "ModuleNotFoundError: No module named 'no_such_library'"
    assert "busy" in done.stdout and "no_such_library" in done.stdout
    assert done.stderr.count("turn 1 of 1") == 5


def test_median_of_turns_or_first_error(measure: Any) -> None:
    turns = {
        "a": [{"cpu_ms": c, "images_per_s": 10 * c} for c in (3.0, 1.0, 2.0)],
        "b": [{"cpu_ms": 1.0, "images_per_s": 1.0}, {"error": "gone"}],
    }
    assert measure.summarize(turns) == [
        {"peer": "a", "cpu_ms": 2.0, "images_per_s": 20.0},
        {"peer": "b", "error": "gone"},
    ]


def test_images_are_laid_out_as_peers_read_them(measure: Any, images: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    classes, shard = measure.lay_out(images, tmp_path / "scratch", most=3)
    links = sorted(classes.rglob("*.jpg"))
    assert len(links) == 3 and all(link.is_symlink() and link.is_file() for link in links)
    with measure.tarfile.open(shard) as tar:
        assert [member.name for member in tar if member.isfile()] == [link.name for link in links]
    with pytest.raises(ValueError, match=r"holds no \.jpg"):
        measure.lay_out(tmp_path / "scratch" / "nothing", tmp_path, most=3)


def test_mistakes_are_named(images: Path, capsys: pytest.CaptureFixture[str], measure: Any) -> None:
    for words, said in ((["--peers", "lightning"], "lightning: choose from"), ([], "holds no .jpg")):
        with pytest.raises(SystemExit) as stopped:
            measure.main([str(images if words else images / "none"), *words])
        assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mocov3", "lightly", "wds-pil", "wds-v2", "kornia", "solo-learn"])
def test_every_peer_reads_the_images(measure: Any, tmp_path: Path, name: str) -> None:
    """Those whose libraries are not installed are skipped with the reason."""
    for i in range(5):
        Image.effect_noise((40, 30), 40).convert("RGB").save(tmp_path / f"{i}.jpg")
    (tmp_path / "scratch").mkdir()
    classes, shard = measure.lay_out(tmp_path, tmp_path / "scratch", most=5)
    try:
        first, second = next(measure.PEERS[name](measure.Job(str(classes), str(shard), 2, 16, 0)))
    except ImportError as error:
        pytest.skip(str(error))
    assert first.shape == second.shape == (2, 3, 16, 16) and not first.equal(second)
