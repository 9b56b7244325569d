"""Where encoded images come from: one interface over tars, .beton files, a folder and made-up images.

    len(source), source.read(i) -> bytes, source.labels | heights | widths, source.describe(i)

A source gives random access; which sample is read when is the business of `order`.
"""

import errno
import hashlib
import os
import re
import resource
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from byolt.pipelines.formats.beton import BetonSource, split_path
from byolt.pipelines.formats.folder import FolderSource
from byolt.pipelines.formats.synthetic import SyntheticSource
from byolt.pipelines.manifest import MANIFEST, Manifest, Shard

_NAMED = 5  # unreadable files that an error lists
_SPARE_DESCRIPTORS = 256  # left for the rest of the process


class Source(Protocol):
    """Encoded images with their labels and sizes.

    Attributes:
        labels: int64 (len,), -1 where a sample has none.
        heights: int64 (len,), pixels as stored, EXIF orientation ignored; widths likewise.
        classes: Name of each label, or None.
        fingerprint: Hex digest of what the data set is; equal where a run may resume.
    """

    labels: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    classes: list[str] | None
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes:
        """Encoded image `i`; safe from several threads and after a fork. Raises OSError naming the place."""
        ...

    def describe(self, i: int) -> str:
        """Where sample `i` is, for messages."""
        ...


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens what `path` names: a folder of shards, a folder of images, .beton files, or "synthetic:NUM:HxW".

    Several .beton files, separated by commas, are one data set in that order; "?image=FIELD&label=FIELD" behind them
    names the fields to read, where the first of their type are not the ones.

    Raises:
        ValueError: It is none of these, or the data set is damaged; names the path and the remedy.
    """
    text = os.fspath(path)
    if text.startswith("synthetic:"):
        match = re.fullmatch(r"synthetic:(\d+):(\d+)x(\d+)", text)
        if not match:
            raise ValueError(f"data path {text!r}: synthetic images are written synthetic:NUM:HxW")
        return SyntheticSource(*map(int, match.groups()))
    folder = Path(text)
    files, fields = split_path(text)
    if any(file.endswith(".beton") for file in files):
        return BetonSource(files, **fields)
    if not folder.exists():
        raise ValueError(f"data path {text!r} does not exist: make it with tools/make_shards.py SRC {text}")
    if not folder.is_dir():
        raise ValueError(f"data path {text!r} is a file: name the folder of a data set, or of images")
    if (folder / MANIFEST).exists():
        is_beton = Manifest.load(folder).shards[0].name.endswith(".beton")
        return BetonFolder(folder) if is_beton else TarSource(folder)
    if any(folder.glob("*.tar")):
        raise ValueError(
            f"data path {text!r} holds tars without {MANIFEST}: run tools/make_shards.py --index {text}"
        )
    if any(folder.glob("*.beton")):
        raise ValueError(f"data path {text!r} holds .beton files: name them instead, separated by commas")
    return FolderSource(folder)


class TarSource:
    """Shards with a manifest. Read by `os.pread`, never by mmap: a cut shard is an error, not SIGBUS."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        manifest = Manifest.load(self.folder)
        self._shards = manifest.shards
        self._samples = manifest.samples
        check_sizes(self.folder, manifest)
        self.paths = [self.folder / shard.name for shard in manifest.shards]
        self.classes = manifest.classes
        self.lengths = manifest.samples["length"].astype(np.int64)
        self.labels = manifest.samples["label"].astype(np.int64)
        self.heights = manifest.samples["height"].astype(np.int64)
        self.widths = manifest.samples["width"].astype(np.int64)
        self.fingerprint = _fingerprint(manifest)
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        _allow_descriptors(len(self._shards) + _SPARE_DESCRIPTORS)

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, i: int) -> bytes:
        record = self._samples[i]
        length, offset = int(record["length"]), int(record["offset"])
        try:
            data = os.pread(self._descriptor(int(record["shard"])), length, offset)
        except OSError as error:
            raise OSError(error.errno, f"{self._place(i)}: {error.strerror}") from error
        if len(data) != length:
            raise OSError(
                f"{self._place(i)}: read {len(data)} of {length} bytes: the shard was cut since it was opened"
            )
        return data

    def describe(self, i: int) -> str:
        record = self._samples[i]
        return f"{self._shards[record['shard']].name} offset {record['offset']} (sample {i})"

    def _place(self, i: int) -> str:
        return f"{self.folder}/{self.describe(i)}"

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            with self._lock:
                if shard not in self._descriptors:
                    self._descriptors[shard] = self._open(self._shards[shard])
                descriptor = self._descriptors[shard]
        return descriptor

    def _open(self, shard: Shard) -> int:
        """Opened when it is first read, perhaps days after the sizes were checked."""
        descriptor = os.open(self.folder / shard.name, os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(descriptor).st_size
        if found != shard.size:
            os.close(descriptor)
            raise OSError(
                errno.ESTALE,
                f"the shard has {found:,} bytes now, {MANIFEST} states {shard.size:,}: it was replaced",
            )
        return descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return TarSource, (self.folder,)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


class BetonFolder(BetonSource):
    """.beton files with a manifest, as make_shards writes them: what is stated about them is compared."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises ValueError where a file is missing, damaged or not the one that the manifest describes."""
        self.folder = Path(folder)
        manifest = Manifest.load(self.folder)
        check_sizes(self.folder, manifest)
        _allow_descriptors(len(manifest.shards) + _SPARE_DESCRIPTORS)
        super().__init__([self.folder / shard.name for shard in manifest.shards])
        stated = manifest.samples["label"], manifest.samples["height"], manifest.samples["width"]
        if not all(map(np.array_equal, stated, (self.labels, self.heights, self.widths))):
            raise ValueError(
                f"{self.folder}: labels or sizes are not those that {MANIFEST} states: "
                f"tools/verify_shards.py {self.folder} says where"
            )
        self.classes = manifest.classes
        self.fingerprint = _fingerprint(manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return BetonFolder, (self.folder,)


def _fingerprint(manifest: Manifest) -> str:
    identity = [[shard.name, shard.sha256] for shard in manifest.shards], manifest.classes
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raises ValueError where a shard is missing or has another size than its manifest states."""
    for number, shard in enumerate(manifest.shards):
        path = folder / shard.name
        try:
            found = path.stat().st_size
        except OSError as error:
            raise ValueError(
                f"shard {path}: {error.strerror}: copy it again, or remake the data set"
            ) from None
        if found != shard.size:
            samples = manifest.samples
            ends = samples["offset"] + samples["length"]
            lost = np.flatnonzero((samples["shard"] == number) & (ends > found))
            first = f", from offset {samples['offset'][lost[0]]} on (sample {lost[0]})" if len(lost) else ""
            raise ValueError(
                f"shard {path} has {found:,} bytes, {MANIFEST} states {shard.size:,}{first}: "
                "copy it again, or remake the data set with tools/make_shards.py"
            )


def _allow_descriptors(number: int) -> None:
    """ImageNet is 550 shards of 256 MB; the usual soft limit of open files is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number:
        limit = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


class ParallelReader:
    """Reads samples of one source; close it to end its threads."""

    def __init__(self, source: Source, threads: int) -> None:
        """
        Args:
            source: the data set.
            threads: reads under way at a time, at least 1; with 1 the caller's own thread reads.
        """
        self._source, self._threads = source, threads
        self._pool = ThreadPoolExecutor(threads, "reader") if threads > 1 else None

    def __call__(self, ids: Sequence[int], unwanted: Collection[int] = ()) -> Iterator[bytes]:
        """The bytes of every sample in the order of `ids`; none (b"") of those that are unwanted.

        Raises:
            OSError: a sample cannot be read: the first such in the order of `ids`.
        """

        def read(part: Sequence[int]) -> list[bytes]:
            return [b"" if number in unwanted else self._source.read(number) for number in part]

        if self._pool is None:
            for number in ids:
                yield from read([number])
            return
        length = max(1, -(-len(ids) // self._threads))
        for part in self._pool.map(read, [ids[k : k + length] for k in range(0, len(ids), length)]):
            yield from part

    def close(self) -> None:
        """Ends the threads."""
        if self._pool:
            self._pool.shutdown()
