"""run.mirror: a run whose disk is lost continues from a bucket; a bucket that fails does not stop a run."""

import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from range_server import s3_bucket
from whole_runs import STEPS, Process, Run, write_images

from byolt.configs import schema
from byolt.files.storage import mirror
from byolt.files.storage.mirror import Mirror
from byolt.files.storage.store import Entry, Store

SECRET = "planted-secret-4711"


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with s3_bucket(SECRET) as environment, pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        yield environment


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Process:
    process = Run(tmp_path_factory.mktemp("whole"), images)()
    assert process.wait() == 0, process.text
    return process


@pytest.mark.faults
def test_a_run_on_lost_disks_continues(
    environment: dict[str, str], images: Path, whole: Process, tmp_path: Path
) -> None:
    """It is stopped, then killed, and its disk lost; the newest checkpoint in the bucket is damaged."""
    url, run, texts = "s3://bucket/run", Run(tmp_path, images), []
    store = Store(url)

    def start(*arguments: str, **more: str) -> int:
        process = run(*arguments, f"run.mirror={url}", **environment, **more)
        texts.append(process.text)
        return process.wait()

    def checkpoints() -> list[str]:
        return sorted(name for name in store.list() or {} if name.startswith("checkpoint"))

    assert start(BYOLT_FAIL="step:4:SIGTERM") == 143, texts[-1]
    assert len(checkpoints()) == 2 and checkpoints()[-1] == "checkpoint-000000005.pt"  # run.keep_checkpoints
    assert {"metrics.jsonl", "starts.jsonl", "views.png"} < (store.list() or {}).keys()
    assert start("--resume", "auto", BYOLT_FAIL="step:8:SIGKILL") == -signal.SIGKILL
    shutil.rmtree(run.out)
    assert start() == 2
    assert f"run.mirror={url} holds the checkpoints of an earlier run, up to checkpoint-0" in texts[-1]

    older, newest = checkpoints()[-2:]
    content = bytearray(store.get(newest))
    content[-100] ^= 1
    store.put(newest, bytes(content))
    assert start("--resume", "auto") == 0, texts[-1]
    assert f"warning: {url}/{newest} is damaged: its bytes do not match its sha256; skipped" in texts[-1]
    assert f"run.mirror={url}: fetched {older}" in texts[-1]
    assert whole.digest.split()[1] in texts[-1]
    assert [row["step"] for row in run.rows()] == [*range(1, STEPS + 1)]
    here = {path.name: path.stat().st_size for path in run.out.iterdir() if path.is_file()}
    there = {name: entry.size for name, entry in (store.list() or {}).items()}
    assert len(checkpoints()) == 2 and here.items() - there.items() <= {
        (name, here[name]) for name in ("run.lock", "checkpoint-000000011.pt")
    }

    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not [content for content in files if SECRET.encode() in content]


@pytest.mark.faults
def test_a_dead_bucket_does_not_stop_a_run(
    environment: dict[str, str], images: Path, whole: Process, tmp_path: Path
) -> None:
    run = Run(tmp_path, images)

    def start(*arguments: str) -> Process:
        settings = ("run.mirror=s3://bucket/dead", "data.remote_minutes=0.01")
        return run(*arguments, *settings, **environment | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})

    process = start()
    assert process.wait() == 0 and process.digest == whole.digest, process.text
    assert re.search(
        r"warning: run.mirror=s3://bucket/dead: .* the connection is refused.*; tried again", process.text
    )
    assert "; the mirror lacks the latest files" in process.text
    assert SECRET not in process.text
    shutil.rmtree(run.out)
    process = start("--resume", "auto")
    assert process.wait() == 2 and "run.out" in process.text and not run.out.exists(), process.text
    assert "may hold checkpoints of this run" in process.text


class FakeStore:
    """Remembers what is done; `hang` and `error` break it."""

    def __init__(self, url: str, minutes: float) -> None:
        self.done: list[str] = []
        self.hang = threading.Event()
        self.hang.set()
        self.error: Exception | None = None

    def list(self) -> dict[str, Entry]:
        return {"checkpoint-000000001.pt": Entry(1, None), "others.txt": Entry(1, None)}

    def put(self, name: str, content: bytes | Path, there: dict[str, Entry]) -> None:
        self.hang.wait(20)
        if self.error:
            raise self.error
        self.done.append(name)

    def delete(self, name: str) -> None:
        self.done.append(f"-{name}")


def wait_until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_checkpoints_are_sent_last_and_removed_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "Store", FakeStore)
    said: list[str] = []
    copy = Mirror(tmp_path, "s3://bucket/run", 1, 1, said.append)
    store = cast(Any, copy)._store
    assert copy.checkpoints(1) == ["checkpoint-000000001.pt"]
    for name in ("metrics.jsonl", "run.lock", "checkpoint-000000002.pt", "checkpoint-000000003.pt"):
        (tmp_path / name).write_text("a")
    with copy:
        copy.update()
        wait_until(lambda: len(store.done) == 3)
        assert store.done == ["metrics.jsonl", "checkpoint-000000003.pt", "-checkpoint-000000001.pt"]
        store.error = ValueError("broken")
        (tmp_path / "metrics.jsonl").write_text("ab")
        copy.update()
        wait_until(lambda: bool(said))
        assert said == ["warning: run.mirror=s3://bucket/run: broken; tried again after the next checkpoint"]
        store.error = None
        (tmp_path / "encoder.safetensors").write_text("a")
    assert store.done[3:] == ["metrics.jsonl", "encoder.safetensors"] and len(said) == 1


def test_a_store_that_hangs_delays_only_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "Store", FakeStore)
    said: list[str] = []
    copies = [Mirror(tmp_path, "s3://bucket/run", minutes, 1, said.append) for minutes in (0.002, 10)]
    for copy in copies:
        cast(Any, copy)._store.hang.clear()
    (tmp_path / "metrics.jsonl").write_text("a")
    began = time.monotonic()
    with copies[0]:
        copies[0].update()
        copies[0].update()
        assert not said
    assert time.monotonic() - began >= 0.12 and "lacks the latest files" in said[0]
    copies[1].update()
    with pytest.raises(KeyboardInterrupt), copies[1]:
        raise KeyboardInterrupt
    assert time.monotonic() - began < 5
    for copy in copies:
        cast(Any, copy)._store.hang.set()


@pytest.mark.parametrize(
    "url", ["https://host/run", "s3://me:secret@bucket/run", "s3://bucket/run?secret", "runs"]
)
def test_refused_urls(url: str) -> None:
    with pytest.raises(ValueError, match=r"run\.mirror.*must be a folder in object storage") as caught:
        schema.load("quickstart", [f"run.mirror={url}"])
    assert "secret" not in str(caught.value)
    assert schema.load("quickstart", ["run.mirror=gs://bucket/a/run/"]).run.mirror == "gs://bucket/a/run"
