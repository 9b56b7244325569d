"""Whole runs on data behind a server that fails: the digest is that of the same shards on a local disk."""

import contextlib
import errno
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from range_server import RangeServer, s3_bucket
from whole_runs import Process, Run, write_images

from byolt.files.storage.store import Store
from byolt.model.run.run import Run as TrainRun
from byolt.pipelines.convert.make import make
from byolt.pipelines.convert.plan import ConversionOptions
from byolt.pipelines.remote import dataset

pytestmark = pytest.mark.faults
SECRET = "planted-secret-4711"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's root: 32 images in the folder "train"."""
    root = tmp_path_factory.mktemp("served")
    write_images(root / "images")
    make(ConversionOptions(src=root / "images", dst=root / "train", workers=1), print)
    return root


def new_run(folder: Path, data: str | Path, order: str = "block", cache_gb: float = 1e-5) -> Run:
    """A run whose cache holds a third of the images, so that every epoch reads from the server."""
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, data)
    extra = f"order: {order}, cache: {folder / 'cache'}, cache_gb: {cache_gb:f}, remote_minutes: 0.9"
    run.config.write_text(run.config.read_text().replace("threads: 1}", f"threads: 1, {extra}}}"))
    return run


def wait_until_idle(process: Process) -> None:
    """Waits until a run has printed no step for a second: no batch is left that was made ahead."""
    before = ""
    while process.text != before:
        before = process.text
        time.sleep(1)


def small_pieces() -> None:
    dataset.PIECE = 1 << 10


@pytest.fixture(scope="module")
def whole(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Process:
    """The same run on the local shards."""
    process = new_run(tmp_path_factory.mktemp("local"), served / "train")()
    assert process.wait() == 0, process.text
    return process


@pytest.fixture
def server(served: Path) -> Iterator[RangeServer]:
    with RangeServer(served) as running:
        yield running


def size_of(cache: Path) -> int:
    total = 0
    for folder, _, names in os.walk(cache):
        for name in set(names) - {".usage"}:
            try:
                total += os.lstat(f"{folder}/{name}").st_size
            except FileNotFoundError:
                continue
    return total


def assert_equal(process: Process, whole: Process, run: Run) -> None:
    assert process.wait(120) == 0, process.text
    assert process.digest == whole.digest
    assert all(row["corrupt_images"] == 0 for row in run.rows())
    assert not [*(run.folder / "cache").rglob("*.byolt-tmp")]


def mixed(number: int, name: str) -> str:
    """Of 100 requests 5 are answered by 503, 10 cut short, 3 stalled, 2 reset and 2 sent byte by byte."""
    place = random.Random(number).randrange(100)
    for fault, share in (("503", 5), ("truncate", 10), ("stall", 3), ("reset", 2), ("loris", 2)):
        if place < share:
            return fault
        place -= share
    return ""


def test_faults_of_all_kinds(server: RangeServer, whole: Process, tmp_path: Path) -> None:
    server.fault = mixed
    run = new_run(tmp_path, f"{server.url}/train")
    assert_equal(run(before=small_pieces), whole, run)
    assert all(server.counts[fault] for fault in ("503", "truncate", "stall", "reset")), server.counts


def test_server_is_gone_for_10_s(server: RangeServer, whole: Process, tmp_path: Path) -> None:
    run = new_run(tmp_path, f"{server.url}/train")
    process = run.start(before=small_pieces)
    process.wait_for("^step 3/")
    server.down = True
    time.sleep(10)
    server.down = False
    assert_equal(process, whole, run)
    assert re.search(
        r"warning: http.*/train/shard-000000\.tar: the connection was reset; tried", process.text
    )


@pytest.mark.parametrize(("status", "words"), [("403", "access is denied"), ("404", "does not exist")])
def test_refusal_ends_the_run_in_one_line(
    server: RangeServer, tmp_path: Path, status: str, words: str
) -> None:
    run = new_run(tmp_path, f"{server.url}/train")
    process = run.start(before=small_pieces)
    process.wait_for("^step 2/")
    server.fault = lambda number, name: status
    began = time.monotonic()
    assert process.wait() == 1
    assert time.monotonic() - began < 10
    (line,) = [line for line in process.text.splitlines() if line.startswith("error:")]
    assert re.search(rf"{server.url}/train/shard-000000\.tar: {words} \(HTTP {status}\): check", line)
    assert "Traceback" not in process.text


def test_second_ctrl_c_ends_the_waiting_for_a_server(server: RangeServer, tmp_path: Path) -> None:
    run = new_run(tmp_path, f"{server.url}/train")
    process = run.start(before=small_pieces)
    process.wait_for("^step 2/")
    server.down = True
    wait_until_idle(process)
    for _ in range(2):
        process.signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.wait(5) == 130


def test_sigterm_during_an_outage_saves_and_ends(server: RangeServer, whole: Process, tmp_path: Path) -> None:
    run = new_run(tmp_path, f"{server.url}/train")
    process = run.start(before=small_pieces)
    process.wait_for("^step 2/")
    server.down = True
    wait_until_idle(process)
    process.signal(signal.SIGTERM)
    assert process.wait(12) == 143, process.text
    assert re.search(r"does not answer.*\n.*stopped by SIGTERM at step \d+; continue", process.text)
    process = run.start("--resume", "auto", before=small_pieces)  # while it starts there is nothing to save
    time.sleep(8)
    process.signal(signal.SIGTERM)
    assert process.wait(12) == 143, process.text
    server.down = False
    assert_equal(run("--resume", "auto", before=small_pieces), whole, run)


def one_rank_far_as_on_gpus() -> None:
    """Rank 0 reads a copy of the data on its disk; the host asks for signals every 10 steps."""
    small_pieces()
    if os.environ["RANK"] == "0":
        sys.argv.append(f"data.path={os.environ['COPY']}")

    def begin(self: TrainRun, plain: Callable = TrainRun.begin) -> None:
        self.on_gpu = True
        plain(self)

    TrainRun.begin = begin  # type: ignore[method-assign,assignment]


def test_sigterm_while_one_of_two_ranks_has_no_batch(
    server: RangeServer, served: Path, tmp_path: Path
) -> None:
    """The other one is inside its next step. Both save the last whole step, as if there had been no outage."""
    far, near = (new_run(tmp_path / name, f"{server.url}/train") for name in ("far", "near"))
    options = ("run.log_every=100", "run.checkpoint_minutes=9")
    ranks = far.start_ranks(2, *options, before=one_rank_far_as_on_gpus, COPY=str(served / "train"))
    ranks[0].wait_for("^step 2/")
    server.down = True
    wait_until_idle(ranks[0])
    for rank in ranks:
        rank.signal(signal.SIGTERM)
    assert [rank.wait(20) for rank in ranks] == [143, 143], ranks[0].text + ranks[1].text
    assert "does not answer: the run stops" in ranks[1].text and "does not answer" not in ranks[0].text
    server.down = False
    step = ranks[0].digest.split()[0]
    assert f"stopped by SIGTERM at step {step}; continue" in ranks[0].text and int(step) > 2
    assert far.newest()[1]["step"] == int(step)
    whole = near.start_ranks(2, f"train.stop_at_step={step}", before=small_pieces)
    assert whole[0].wait() == 0 and whole[0].digest == ranks[0].digest


def test_sigterm_while_the_data_is_copied(server: RangeServer, tmp_path: Path) -> None:
    run = new_run(tmp_path, f"{server.url}/train", order="full", cache_gb=1)
    server.latency = 1.0
    process = run.start(before=small_pieces)  # 8 pieces in a second, 5 s in all
    while server.counts["GET"] < 6:
        time.sleep(0.05)
    process.signal(signal.SIGTERM)
    assert process.wait(8) == 143
    assert process.text.endswith(
        "stopped by SIGTERM before the first step: nothing was trained; the same command starts it again\n"
    )
    assert not list(tmp_path.rglob("*.byolt-tmp")) and not list(tmp_path.rglob("shard-*"))


def test_killed_at_random_moments(server: RangeServer, whole: Process, tmp_path: Path) -> None:
    """BYOLT_KILLS=50 kills as often, and later; a run that ends before is compared, and the next one begins."""
    longest = 4.0 if "BYOLT_KILLS" in os.environ else 1.0
    server.latency = 0.01
    generator, runs, killed = random.Random(0), [new_run(tmp_path / "0", f"{server.url}/train")], 0
    while killed < int(os.environ.get("BYOLT_KILLS", "8")):
        run = runs[-1]
        process = run.start("--resume", "auto", before=small_pieces)
        time.sleep(0.2 + longest * generator.random())
        with contextlib.suppress(ProcessLookupError):
            process.signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed += 1
        else:
            assert_equal(process, whole, run)
            runs.append(new_run(tmp_path / str(len(runs)), f"{server.url}/train"))
        assert size_of(run.folder / "cache") <= 10_000
    assert_equal(runs[-1]("--resume", "auto", before=small_pieces), whole, runs[-1])
    print(f"{killed} kills, {len(runs)} runs")


def test_runs_share_a_cache(server: RangeServer, whole: Process, tmp_path: Path) -> None:
    runs = [new_run(tmp_path / name, f"{server.url}/train", cache_gb=1e-4) for name in "ab"]
    for run in runs[1:]:
        text = run.config.read_text().replace(str(run.folder / "cache"), str(runs[0].folder / "cache"))
        run.config.write_text(text)
    cache, largest = runs[0].folder / "cache", [0]
    started = [run.start(before=small_pieces) for run in runs]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            largest.append(size_of(cache))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for run, process in zip(runs, started, strict=True):
        assert_equal(process, whole, run)
    ended.set()
    watcher.join()
    assert 10_000 < max(largest) <= 100_000
    assert server.counts["GET"] < 2 * 60  # most extents were fetched by one of the two


def full_disk() -> None:
    small_pieces()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept = dataset.Cache.fill

    def fill(self: dataset.Cache, key: str, *others: Any) -> bool:
        os.posix_fallocate = refuse if "extents" in key else posix_fallocate
        return kept(self, key, *others)

    posix_fallocate = os.posix_fallocate
    dataset.Cache.fill = fill  # type: ignore[method-assign]


def test_full_disk_in_the_cache(server: RangeServer, whole: Process, tmp_path: Path) -> None:
    run = new_run(tmp_path, f"{server.url}/train")
    assert_equal(run(before=full_disk), whole, run)


def test_ranks_with_lanes_in_a_bucket(served: Path, tmp_path: Path) -> None:
    """Two ranks share a cache; a planted secret is in no output and no file."""
    with s3_bucket(SECRET) as environment, pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        for file in (served / "train").iterdir():
            Store("s3://bucket/train").put(file.name, file)
        digests = set()
        for data in ("s3://bucket/train", str(served / "train")):
            run = new_run(tmp_path / data[:2].strip("/"), data, "lanes")
            ranks = run.start_ranks(2, before=small_pieces, **environment)
            assert [rank.wait(120) for rank in ranks] == [0, 0], ranks[0].text + ranks[1].text
            digests.add(ranks[0].digest)
            files = [path.read_bytes() for path in run.folder.rglob("*") if path.is_file()]
            assert len(files) > 5 and not [content for content in files if SECRET.encode() in content]
        assert len(digests) == 1
