"""run.mirror: a run whose disk is lost continues from a bucket; a bucket that fails does not stop a run."""

import errno
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast
from unittest.mock import patch

import pytest
import torch
from range_server import s3_bucket
from whole_runs import STEPS, Process, Run, write_images

from byolt.configs import schema
from byolt.files.lock import Lock
from byolt.files.storage import mirror
from byolt.files.storage.mirror import Mirror
from byolt.files.storage.retry import MissingError
from byolt.files.storage.store import Entry, Store
from byolt.model.distributed import World
from byolt.model.run import checkpoint
from byolt.model.run.resume import open_mirror

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
    assert f"run.mirror={url} is up to date" in texts[-1]
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
    assert re.search(
        "(; the mirror|=s3://bucket/dead) lacks the latest files", process.text
    )  # whichever limit is first
    assert "is up to date" not in process.text
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
    assert store.done[3:] == ["metrics.jsonl", "encoder.safetensors"]
    assert said[1:] == ["run.mirror=s3://bucket/run is up to date"]


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


class Bucket:
    """A store whose objects, by URL of the folder, are in memory."""

    folders: ClassVar[dict[str, dict[str, bytes]]] = {}

    def __init__(self, url: str, minutes: float) -> None:
        self.objects = self.folders.setdefault(url, {})

    def list(self) -> dict[str, Entry]:
        return {name: Entry(len(content), None) for name, content in self.objects.items()}

    def get(self, name: str) -> bytes:
        return self.objects[name]

    def ranges(self, name: str, starts: Sequence[int], lengths: Sequence[int]) -> Iterator[bytes]:
        for start, length in zip(starts, lengths, strict=True):
            yield self.objects[name][start : start + length]

    def put(self, name: str, content: bytes | Path, there: dict[str, Entry]) -> None:
        try:
            self.objects[name] = content.read_bytes() if isinstance(content, Path) else content
        except FileNotFoundError:
            raise MissingError("does not exist") from None  # as obstore does

    def delete(self, name: str) -> None:
        del self.objects[name]


class Mirrored:
    """A run's folder with a mirror in a `Bucket`."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.out = folder / "run"
        self.out.mkdir()
        settings = [f"run.out={self.out}", "run.mirror=s3://bucket/run", "run.keep_checkpoints=2"]
        self.config = schema.load("quickstart", [*settings, *overrides])
        self.source = SimpleNamespace(fingerprint="images", former_fingerprints=["before"])
        self.there = Bucket.folders.setdefault("s3://bucket/run", {})

    def save(self, step: int, name: str = "checkpoint", there: bool = False) -> Path:
        """Writes a checkpoint here or there, and metrics that say where."""
        path = self.out / f"{name}-{step:09d}.pt"
        empty: dict[str, Any] = {key: {} for key in ("model", "momentum", "train_step", "config")}
        checkpoint.write(path, {"step": step, **empty, "data": "images", "knn_untrained": None})
        (self.out / "metrics.jsonl").write_text("here")
        if there:
            self.there[path.name] = path.read_bytes()
            self.there["metrics.jsonl"] = b"there"
            path.unlink()
        return path

    def started(self, *overrides: str, data: str = "images") -> None:
        """Writes the start of a run there, behind others."""
        config = schema.load("quickstart", [f"run.out={self.out}", *overrides])
        row = {"step": 0, "config": config.model_dump(mode="json"), "data": data}
        self.there["starts.jsonl"] = (
            self.there.get("starts.jsonl", b"") + json.dumps(row).encode() + b"\n{torn\n"
        )

    def open(self, resume: str | None = "auto", *allowed: str) -> Mirror:
        world = World(0, 0, 1, torch.device("cpu"), "none")
        with Lock(self.out / "run.lock", "run.out") as lock:
            found = open_mirror(self.config, resume, [*allowed], self.source, lock, world)
        assert found
        return found

    @property
    def metrics(self) -> str:
        return (self.out / "metrics.jsonl").read_text()


@pytest.fixture
def mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirrored:
    monkeypatch.setattr(mirror, "Store", Bucket)
    monkeypatch.setattr(Bucket, "folders", {})
    return Mirrored(tmp_path)


@pytest.mark.parametrize("here", [10, 30])
@pytest.mark.parametrize(("other", "data"), [("run.seed=7", "images"), ("run.log_every=9", "others")])
def test_the_mirror_of_another_run_is_refused(mirrored: Mirrored, here: int, other: str, data: str) -> None:
    """Its files would replace those of this run, or, if it is older, would be replaced."""
    mirrored.save(20, there=True)
    local = mirrored.save(here)
    mirrored.started(other, data=data)
    for resume in ("auto", str(local)):
        with pytest.raises(
            ValueError, match=r"run\.mirror=s3://bucket/run is from a run with other settings"
        ):
            mirrored.open(resume)
    assert mirrored.metrics == "here" and {path.name for path in mirrored.out.iterdir()} == {
        "metrics.jsonl", local.name,
    }  # fmt: skip
    key = "data.fingerprint" if data == "others" else "run.seed"
    mirrored.open("auto", key)
    assert mirrored.metrics == ("there" if here < 20 else "here")


def test_the_mirror_of_this_run_is_continued(mirrored: Mirrored) -> None:
    """Also with values in the place of auto, other settings that may change, and an older release's fingerprint."""
    mirrored.save(20, there=True)
    train = mirrored.config.train.model_copy(update={"batch_size": "auto"})
    mirrored.config = mirrored.config.model_copy(update={"train": train})
    mirrored.started("run.log_every=9", data="before")
    mirrored.started("optimizer.base_lr=9")  # tried in vain
    mirrored.open()
    assert mirrored.metrics == "there"


def test_a_state_set_aside_is_continued_beside_a_mirror(mirrored: Mirrored) -> None:
    mirrored.save(20, there=True)
    mirrored.open(str(mirrored.save(21, "aside")))
    with pytest.raises(
        ValueError, match="holds later checkpoints of an earlier run, up to checkpoint-000000020"
    ):
        mirrored.open(str(mirrored.save(19, "aside")))


def test_what_cannot_be_fetched_leaves_the_folder_as_it_is(mirrored: Mirrored) -> None:
    """A damaged checkpoint, a run that is still running, a full disk."""
    mirrored.save(10)
    mirrored.save(20, there=True)
    whole, name = mirrored.there["checkpoint-000000020.pt"], "checkpoint-000000020.pt"
    mirrored.there[name] = whole[:-1] + b"x"
    mirrored.open()
    assert mirrored.metrics == "here"
    mirrored.there[name] = whole
    (mirrored.out / f".{name}.4711.byolt-tmp").write_bytes(whole[:100])  # of a fetch that was killed
    with Lock(mirrored.out / "run.lock", "run.out") as other:
        other.take()
        with pytest.raises(ValueError, match=r"run\.out is in use by pid"):
            mirrored.open()
    assert mirrored.metrics == "here"
    full = patch.object(Bucket, "ranges", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with full, pytest.raises(ValueError, match=r"s3://bucket/run cannot be copied to run\.out=/.*: No space"):
        mirrored.open()
    assert mirrored.metrics == "here" and not [path for path in mirrored.out.iterdir() if "tmp" in path.name]
    mirrored.open()
    assert mirrored.metrics == "there"


def test_a_new_checkpoint_is_kept_beside_others(mirrored: Mirrored) -> None:
    """Beside later ones there that are damaged, and a copy of one's own here; one may be removed while it is sent."""
    for step in (8, 9):
        mirrored.there[f"checkpoint-{step:09d}.pt"] = b"damaged"
    mirrored.save(5)
    (mirrored.out / "checkpoint-best.pt").write_bytes(b"mine")
    os.mkfifo(mirrored.out / "pipe.json")
    (mirrored.out / "folder.json").mkdir()
    said: list[str] = []
    with mirrored.open() as copy:
        copy._say = said.append  # type: ignore[method-assign]
        mirrored.save(6)
    assert sorted(mirrored.there) == ["checkpoint-000000006.pt", "checkpoint-000000009.pt", "metrics.jsonl"]
    newest = mirrored.save(7)

    def put(self: Bucket, name: str, content: bytes | Path, there: dict[str, Entry]) -> None:
        if name == newest.name:
            newest.unlink()
        plain(self, name, content, there)

    plain = Bucket.put
    with patch.object(Bucket, "put", put), mirrored.open() as copy:
        copy._say = said.append  # type: ignore[method-assign]
    assert "checkpoint-000000006.pt" in mirrored.there
    assert said == ["run.mirror=s3://bucket/run is up to date"] * 2


@pytest.mark.parametrize(
    "url", ["https://host/run", "s3://me:secret@bucket/run", "s3://bucket/run?secret", "runs"]
)
def test_refused_urls(url: str) -> None:
    with pytest.raises(ValueError, match=r"run\.mirror.*must be a folder in object storage") as caught:
        schema.load("quickstart", [f"run.mirror={url}"])
    assert "secret" not in str(caught.value)
    assert schema.load("quickstart", ["run.mirror=gs://bucket/a/run/"]).run.mirror == "gs://bucket/a/run"
