"""Sources: random access to encoded images in tars, .beton files or a folder, or synthetic ones, through one interface.

    len(source), source.read(i) -> bytes, source.labels | heights | widths, source.describe(i)

First on a batch's path: the loader reads the samples that `order` names, with `ParallelReader`.
"""

import errno
import glob
import os
import re
import resource
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from byolt.configs.schema import DataConfig
from byolt.files.paths import MissingDataError, expand_home, nearest, searched
from byolt.files.regular import open_regular
from byolt.files.storage.retry import RemoteError
from byolt.pipelines.formats.beton import BetonSource, split_path
from byolt.pipelines.formats.encoded import MAX_PIXELS, are_others, check, check_unchanged, spots
from byolt.pipelines.formats.folder import FolderSource, is_hidden
from byolt.pipelines.formats.proof import prove_jpeg
from byolt.pipelines.formats.synthetic import SyntheticSource
from byolt.pipelines.formats.tar import Tar
from byolt.pipelines.manifest import MANIFEST, DescribedSource, Manifest, Shard, checksums
from byolt.pipelines.remote.dataset import RemoteData
from byolt.pipelines.remote.source import RemoteSource
from byolt.pipelines.remote.urls import RemotePath, is_remote, parse

_OPENERS = 8  # threads: a network file system takes milliseconds for each shard
_LEAST_DESCRIPTORS = 64  # of the rest of a process that trains
_SPARE_DESCRIPTORS = 256  # for the rest of the process


class Source(Protocol):
    """Encoded images with their labels and sizes.

    Attributes:
        labels: int64 (len,), -1 for a sample without a label.
        heights: Integers (len,), pixels as stored, EXIF orientation ignored; widths likewise.
        classes: Name of each label, or None.
        checksums: uint64 (len,), `encoded.checksum` of each image as stored; None if they are not known. `read` refuses
            other bytes.
        proven: Whether every image was decoded when its checksum was taken, and found undamaged.
        fingerprint: Hex digest that identifies the data set; a run resumes only if it is unchanged.
        former_fingerprints: What identified the same data in an earlier release, or before it had an index.
    """

    labels: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    classes: list[str] | None
    proven: bool

    @property
    def checksums(self) -> npt.NDArray[np.uint64] | None: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def former_fingerprints(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes:
        """Encoded image `i`; safe from several threads and after a fork.

        Raises:
            OSError: It cannot be read; names the place.
            ValueError: Its bytes are not those of its checksum.
        """
        ...

    def describe(self, i: int) -> str:
        """The place of sample `i`, for messages."""
        ...


def open_source(path: str | os.PathLike[str], settings: DataConfig | None = None) -> Source:
    """Opens a folder of shards, a folder of images, .beton files, "synthetic:NUM:HxW", or shards at a URL.

    Several .beton files, separated by commas or named by a pattern (part-{00..09}.beton, *.beton), are one data set in
    that order. "?image=FIELD&label=FIELD" after them names the fields to read instead of the first of their type.

    The settings say where and how a URL is cached. With data.order=full it is first copied to the cache as a whole,
    also without a manifest; without settings only what is asked for is read.

    Raises:
        ValueError: `path` is none of these, or the data set is damaged; names the path and the remedy.
    """
    return locate(path, settings)()


def locate(path: str | os.PathLike[str], settings: DataConfig | None = None) -> Callable[[], Source]:
    """Finds the data set that `open_source` opens, but reads no file, so that a wrong path is refused at once.

    Raises:
        ValueError: there is no data set; names the path and the remedy.
    """
    text = expand_home(os.fspath(path))
    if text.startswith("synthetic:"):
        match = re.fullmatch(r"synthetic:(\d+):(\d+)x(\d+)", text)
        if not match:
            raise ValueError(f"data path {text!r}: write synthetic images as synthetic:NUM:HxW")
        return partial(SyntheticSource, *map(int, match.groups()))
    if is_remote(text):
        return partial(_open_remote, parse(text), settings)
    files, fields = split_path(text)
    if any(file.endswith(".beton") for file in files):
        return partial(BetonSource, files, **fields)
    folder = Path(text if files == [text.strip()] else _folder_of(text, files))
    try:
        return _locate_folder(folder, text)
    except OSError as error:
        raise ValueError(f"data path {text!r} cannot be read: {error.strerror}: {error.filename}") from None


def _locate_folder(folder: Path, text: str) -> Callable[[], Source]:
    if not folder.exists():
        near = nearest(folder)
        remedy = f"did you mean {near}? Otherwise make it" if near else "make it"
        raise MissingDataError(
            f"data path {text!r} does not exist{searched(text)}: {remedy} with tools/make_shards.py SRC {text}"
        )
    if not folder.is_dir():
        raise ValueError(f"data path {text!r} is a file: name the folder of a data set, or of images")
    if (folder / MANIFEST).exists():
        return partial(_open_shards, folder)
    if any(folder.glob("*.tar")):
        raise ValueError(
            f"data path {text!r} has tars but no {MANIFEST}: run tools/make_shards.py --index {folder}"
        )
    if any(folder.glob("*.beton")):
        raise ValueError(
            f"data path {text!r} has .beton files: name the files, separated by commas or as {folder}/*.beton"
        )
    return partial(FolderSource, folder)


def open_split(key: str, path: str, settings: DataConfig | None = None) -> Source:
    """Opens a data set, see `open_source`; errors name its setting or option, the key."""
    with _named(key):
        return open_source(path, settings)


def check_paths(paths: dict[str, str | None], out: str | None = None) -> None:
    """Refuses a path at which there is no data set, see `locate`; the message names its setting or option, the key.

    Args:
        paths: The data sets.
        out: run.out, which must not be among the images of a folder: its pictures would become part of the data.
    """
    for key, path in paths.items():
        if path is None:
            continue
        with _named(key):
            found = locate(path)
        folder = Path(expand_home(path)).resolve()
        if out and isinstance(found, partial) and found.func is FolderSource:
            place = Path(out).resolve()
            if place.is_relative_to(folder) and not any(map(is_hidden, place.relative_to(folder).parts)):
                raise ValueError(
                    f"run.out={out} is in {key}={path}, a folder of images, which what the run writes would change: "
                    "choose another folder"
                )


@contextmanager
def _named(key: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if str(error).startswith("data.cache="):  # names its setting
            raise
        raise ValueError(f"{key}: {str(error).removeprefix('data path ')}") from None


def _folder_of(text: str, files: list[str]) -> str:
    """The one folder that a pattern matches, or that of the tars that it matches."""
    if len(files) == 1 and os.path.isdir(files[0]):
        return files[0]
    folder = os.path.dirname(files[0]) or "."
    present = glob.glob(f"{glob.escape(folder)}/*.tar")
    if all(file.endswith(".tar") for file in files) and present:
        if {*map(os.path.realpath, files)} == {*map(os.path.realpath, present)}:
            return folder
        raise ValueError(
            f"data path {text!r} names {len(files)} files, but {folder} has {len(present)} tars: tars are read as one "
            f"data set: name the folder, {folder}, or move the others elsewhere and run tools/make_shards.py --index"
        )
    missing = [file for file in files if not os.path.exists(file)]
    if missing:
        raise MissingDataError(f"data path {text!r}: {missing[0]!r} does not exist{searched(missing[0])}")
    raise ValueError(f"data path {text!r} names {len(files)} files or folders: name one folder")


def _open_remote(path: RemotePath, settings: DataConfig | None) -> Source:
    try:
        data = RemoteData(path, settings)
        if data.manifest is not None and not (settings and settings.order == "full"):
            return RemoteSource(path, settings, data)
        folder = data.stage()
    except RemoteError as error:
        raise ValueError(f"data path {error}") from None
    if data.manifest is not None:
        return _open_shards(folder)
    return BetonSource([folder / name for name in path.names], **path.fields)


def _open_shards(folder: Path) -> Source:
    manifest = Manifest.load(folder)
    is_beton = manifest.shards[0].name.endswith(".beton")
    return BetonFolder(folder, manifest) if is_beton else TarSource(folder, manifest)


def read_sound(source: Source, i: int, max_pixels: int = MAX_PIXELS, prove: bool = False) -> bytes:
    """Encoded image `i`, whose bytes, header and end are those of the index; see `encoded.check`.

    With `prove` a JPEG is also fully decoded; see `proof.prove_jpeg`.

    Raises:
        OSError: it cannot be read; names the place.
        ValueError: it is not valid, or larger than `max_pixels`; the message is the reason.
    """
    data = source.read(i)
    header = check(data, int(source.heights[i]), int(source.widths[i]), max_pixels)
    if prove and header.format == "jpeg":
        prove_jpeg(data, header)
    return data


class ParallelReader:
    """Reads and checks samples of one source in threads; `close` ends them.

    The first read of an image also decodes it fully, unless that was done when the data set was made or the reader's
    caller does it (`prove`). With one thread the caller's own reads. Larger images than `max_pixels` are not valid.
    """

    def __init__(
        self, source: Source, threads: int, max_pixels: int = MAX_PIXELS, prove: bool = True
    ) -> None:
        self._proven = np.full(len(source), source.proven or not prove)
        self._source, self._threads, self._max_pixels = source, threads, max_pixels
        self._pool = ThreadPoolExecutor(threads, "reader") if threads > 1 else None

    def __call__(self, ids: Sequence[int], unwanted: Collection[int] = ()) -> Iterator[bytes | ValueError]:
        """Yields the bytes of each sample in the order of `ids`, or why it is not valid; b"" for unwanted ones.

        Raises:
            OSError: a sample cannot be read; the first such sample in the order of `ids`.
        """

        def read(part: Sequence[int]) -> list[bytes | ValueError]:
            return [b"" if number in unwanted else self.read(number) for number in part]

        if self._pool is None:
            for number in ids:
                yield from read([number])
            return
        length = max(1, -(-len(ids) // self._threads))
        for part in self._pool.map(read, [ids[k : k + length] for k in range(0, len(ids), length)]):
            yield from part

    def read(self, number: int) -> bytes | ValueError:
        """One sample, in the caller's thread; see `__call__`."""
        try:
            prove = not self._proven[number]
            data = read_sound(self._source, number, self._max_pixels, prove)
        except ValueError as error:
            return error
        self._proven[number] |= prove
        return data

    def close(self) -> None:
        """Ends the threads."""
        if self._pool:
            self._pool.shutdown()


class TarSource(DescribedSource):
    """Tars with a manifest. Read by `os.pread`, not mmap: a cut shard is an error, not SIGBUS."""

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest | None = None) -> None:
        """Raises ValueError if the manifest is damaged, or a shard is missing, has another size or other images."""
        self.folder = Path(folder)
        manifest = _checked_manifest(self.folder, manifest or Manifest.load(folder))
        super().__init__(manifest)
        self.paths = [self.folder / shard.name for shard in manifest.shards]
        self.lengths = manifest.samples["length"]
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        with ThreadPoolExecutor(_OPENERS) as pool:
            for _ in pool.map(_check_images, self.paths, manifest.by_shard()):
                pass

    def read(self, i: int) -> bytes:
        record = self._samples[i]
        length, offset = int(record["length"]), int(record["offset"])
        try:
            data = os.pread(self._descriptor(int(record["shard"])), length, offset)
        except OSError as error:
            raise OSError(error.errno, f"{self.folder}/{self.describe(i)}: {error.strerror}") from error
        if len(data) != length:
            place = f"{self.folder}/{self.describe(i)}"
            raise OSError(
                f"{place}: read {len(data)} of {length} bytes: the shard was cut since it was opened"
            )
        check_unchanged(data, length << 32 | int(record["crc32"]))
        return data

    def place(self, i: int) -> tuple[Path, int]:
        """The tar that holds sample `i`, and the offset of its image."""
        record = self._samples[i]
        return self.paths[record["shard"]], int(record["offset"])

    def _descriptor(self, number: int) -> int:
        """Opens a shard at its first read, perhaps days after the sizes were checked."""
        if number not in self._descriptors:
            with self._lock:
                if number not in self._descriptors:
                    descriptor = open_regular(self.paths[number])
                    found, stated = os.fstat(descriptor).st_size, self._shards[number].size
                    if found != stated:
                        os.close(descriptor)
                        what = f"the shard has {found:,} bytes now, {MANIFEST} states {stated:,}: it was replaced"
                        raise OSError(errno.ESTALE, what)
                    self._descriptors[number] = descriptor
        return self._descriptors[number]

    def __reduce__(self) -> tuple[Any, ...]:
        return TarSource, (self.folder,)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


class BetonFolder(BetonSource):
    """.beton files with a manifest, as make_shards writes them."""

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest | None = None) -> None:
        """Raises ValueError if a file is missing, damaged or not the one that the manifest describes."""
        self.folder = Path(folder)
        manifest = _checked_manifest(self.folder, manifest or Manifest.load(folder))
        super().__init__([self.folder / shard.name for shard in manifest.shards])
        stated = manifest.samples["label"], manifest.samples["height"], manifest.samples["width"]
        if not all(map(np.array_equal, stated, (self.labels, self.heights, self.widths))):
            raise ValueError(
                f"{self.folder}: labels or sizes differ from {MANIFEST}: "
                f"tools/verify_shards.py {self.folder} says where"
            )
        self.classes, self.proven = manifest.classes, manifest.proven
        self.checksums = checksums(manifest.samples)
        self.fingerprint = manifest.fingerprint()
        self.former_fingerprints = []
        if path := self._replaced():
            raise _other_images(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return BetonFolder, (self.folder,)


def _check_images(path: Path, described: tuple[Shard, int, np.ndarray]) -> None:
    """Refuses a tar with other images than its records; usually reads one."""
    records = described[2][spots(0, len(described[2]))]
    try:
        with Tar(path) as file:
            images = (file.read(int(r["length"]), int(r["offset"])) for r in records)
            if are_others(images, checksums(records).tolist()):
                raise _other_images(path)
    except OSError as error:
        raise ValueError(f"shard {path} cannot be read: {error.strerror}") from None


def _other_images(path: str | os.PathLike[str]) -> ValueError:
    return ValueError(
        f"shard {path} holds other images than {MANIFEST} states: it was replaced: copy it again, or remake the data "
        "set with tools/make_shards.py (for tars made elsewhere: --index)"
    )


def _checked_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest, if the shards have the stated sizes; also lets the process open as many files as there are."""
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
    # ImageNet is 550 shards of 256 MB; the usual soft limit of open files is 1,024.
    needed = len(manifest.shards) + _SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < len(manifest.shards) + _LEAST_DESCRIPTORS:
        raise ValueError(
            f"{folder} has {len(manifest.shards)} shards, each an open file, and RLIMIT_NOFILE is {hard}: raise it "
            "(ulimit -Hn), or make fewer shards (make_shards.py --shard-size)"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return manifest
