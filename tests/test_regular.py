"""Only regular files are opened: a FIFO, a device or a folder in the place of a file is named, and nobody waits for it."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from byolt.configs import schema
from byolt.files.atomic import sha256_of
from byolt.files.lock import Lock
from byolt.files.regular import open_regular, read_regular
from byolt.files.rows import append_row, read_rows
from byolt.model.run import checkpoint
from byolt.model.run.trained import load_trained
from byolt.pipelines.formats.index import SAMPLE
from byolt.pipelines.manifest import Manifest, Shard
from byolt.pipelines.sources import open_source


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    signal.alarm(30)
    yield
    signal.alarm(0)


def _dataset(folder: Path) -> None:
    samples = np.array([(0, 0, 512, 10, 8, 8, 0)], SAMPLE)
    Manifest([Shard("a.tar", 2048, "0" * 64, 1)], samples).save(folder)


def _read_shard(path: Path) -> None:
    """The shard is replaced after the data set was opened."""
    _dataset(path.parent)
    kept = path.rename(path.with_name("kept"))
    path.write_bytes(bytes(2048))
    source = open_source(path.parent)
    kept.replace(path)
    source.read(0)


def _load_samples(path: Path) -> None:
    kept = path.rename(path.with_name("kept"))
    _dataset(path.parent)
    kept.replace(path)
    Manifest.load(path.parent)


OPENS: dict[str, Callable[[Path], object]] = {
    "metrics.jsonl": read_rows,
    "corrupt.jsonl": lambda path: append_row(path, {}),
    "run.lock": lambda path: Lock(path, str(path)).take(),
    "any": sha256_of,
    "checkpoint-000000001.pt": checkpoint.load,
    "encoder.safetensors": load_trained,
    "tiny.yaml": schema.load,
    "manifest.json": lambda path: Manifest.load(path.parent),
    "samples.npy": _load_samples,
    "a.tar": _read_shard,
    "a.beton": open_source,
}


@pytest.mark.parametrize("name", OPENS)
def test_fifo_is_named_and_not_waited_for(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(
        (OSError, ValueError, checkpoint.CheckpointError), match=r"not a regular file"
    ) as caught:
        OPENS[name](path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_link_is_followed_and_a_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link") == b"abc"
    before = os.listdir("/proc/self/fd")
    for path, error in ((Path("/dev/zero"), OSError), (tmp_path, IsADirectoryError)):
        with pytest.raises(error):
            open_regular(path)
    assert os.listdir("/proc/self/fd") == before
