"""Finds a remote data set: its manifest, fetched into the cache, or the sizes of .beton files; and stages it there."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from byolt.configs.schema import DataConfig
from byolt.files.console import shown
from byolt.files.paths import MissingDataError
from byolt.files.progress import Meter
from byolt.files.storage.retry import MissingError
from byolt.files.storage.store import Entry, Store
from byolt.pipelines.manifest import MANIFEST, SAMPLES, Manifest, parse
from byolt.pipelines.remote.cache import Cache
from byolt.pipelines.remote.urls import RemotePath

PIECE = 1 << 23  # bytes of one request
_MOST = 1 << 28  # bytes of a manifest; 100,000 shards have 20 MB


class RemoteData:
    """A data set at a URL.

    Attributes:
        store: Its folder.
        cache: The local folder that it is kept in.
        key: Names it in the cache; the same for the same content.
        manifest: Of the shards; None for .beton files that are named.
        connections: Parallel requests.
        sizes: Bytes of each shard, by name, in the order of the samples.
    """

    def __init__(self, path: RemotePath, settings: DataConfig | None = None) -> None:
        """
        Args:
            path: The data set.
            settings: data.cache, data.cache_gb, data.connections and data.remote_minutes; None for their defaults.

        Raises:
            MissingDataError: There is no data set.
            ValueError: Its manifest is damaged, or shards are missing or have other sizes.
            OSError: The store or the cache fails.
        """
        settings = settings or DataConfig.model_validate({"path": path.text})
        self.path, self.connections = path, settings.connections
        self.store = Store(path.folder, settings.remote_minutes)
        self.cache = open_cache(settings)
        self.manifest: Manifest | None = None
        entries = self.store.list()
        if path.names and path.names[0].endswith(".beton"):
            found = [self._entry(name, entries) for name in path.names]
            self.sizes = {name: entry.size for name, entry in zip(path.names, found, strict=True)}
            self.key = digest(repr((path.folder, path.names, found)).encode())
            self.cache.pin(self.key)
            return
        try:
            content = self.store.get(MANIFEST, _MOST)
        except MissingError:
            raise MissingDataError(self._no_manifest()) from None
        parse(content, f"data path {path.folder}/{MANIFEST}")  # before anything else is asked for
        self.key = digest(content)
        self.cache.pin(self.key)
        self.manifest = self._load(content, entries)
        self.sizes = {shard.name: shard.size for shard in self.manifest.shards}
        self._check_names(entries)

    def _no_manifest(self) -> str:
        url = self.path.folder
        if url.startswith("http"):  # nothing is written or listed there
            return (
                f"data path {url}/{MANIFEST} does not exist: check the URL; for tars made elsewhere run "
                f"tools/make_shards.py --index '{url}/shard-{{000000..000099}}.tar' --manifest FOLDER"
            )
        return (
            f"data path {url!r} has no {MANIFEST}: check the URL; for tars made elsewhere run tools/make_shards.py "
            f"--index {url}"
        )

    @property
    def folder(self) -> Path:
        """The data set's folder in the cache."""
        return self.cache.folder / self.key

    def stage(self) -> Path:
        """Fetches the whole data set into the cache, shard by shard; processes share the work.

        Raises:
            ValueError: There is no room, or a shard is not the one that the manifest describes.
        """
        total, room = sum(self.sizes.values()), self.cache.room(self.key)
        if total > room:
            raise ValueError(
                f"data path {self.path.text!r}: data.order=full copies its {total / 1e9:,.1f} GB first, and "
                f"{self.cache.folder} has room for {room / 1e9:,.1f} GB (data.cache_gb={self.cache.limit / 1e9:g}): "
                "raise data.cache_gb, name a larger disk as data.cache, or set data.order=block"
            )
        names = list(self.sizes)
        missing = [name for name in names if not (self.folder / name).exists()]
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        first = rank % max(1, len(missing))  # ranks begin at different shards
        done = total - sum(self.sizes[name] for name in missing)
        shows = bool(missing) and rank == 0
        with Meter("MB", total >> 20, done >> 20, enabled=shows, line_every=5.0) as meter:
            for name in missing[first:] + missing[:first]:
                self._stage_shard(name, partial(self._show, meter, done))
                done += self.sizes[name]
        return self.folder

    def _show(self, meter: Meter, done: int, at: int) -> None:
        meter.update((done + at) >> 20, self.store.url)

    def _stage_shard(self, name: str, progress: Callable[[int], None]) -> None:
        sha256 = {shard.name: shard.sha256 for shard in self.manifest.shards}[name] if self.manifest else None

        # A file under its final name was checked by the process that fetched it.
        def write(descriptor: int) -> None:
            for last in (False, True):
                hashed = hashlib.sha256() if sha256 else None
                copy(self.store, name, self.sizes[name], self.connections, descriptor, progress, hashed)
                if not hashed or hashed.hexdigest() == sha256:
                    return
                if last:
                    raise ValueError(
                        f"data path {self.path.text!r}: {name} does not have the sha256 that {MANIFEST} states: upload "
                        f"it again; tools/verify_shards.py {self.path.text} says what differs"
                    )

        self._fill(name, self.sizes[name], write)

    def _fill(self, name: str, size: int, write: Callable[[int], object]) -> None:
        if not self.cache.fill(f"{self.key}/{name}", size, write):
            own = sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())
            raise ValueError(
                f"data.cache={self.cache.folder} has no room for {name}: {size:,} bytes are needed, "
                f"{max(0, self.cache.room(self.key) - own):,} available: raise data.cache_gb, or free space on the disk"
            )

    def _load(self, content: bytes, entries: dict[str, Entry] | None) -> Manifest:
        """The manifest, from the cache or fetched; once more if the copy is damaged."""
        for last in (False, True):
            self._fill(MANIFEST, len(content), lambda file: write_all(file, content, 0))
            if not (self.folder / SAMPLES).exists():
                size = self._entry(SAMPLES, entries).size
                write = partial(copy, self.store, SAMPLES, size, self.connections)
                self._fill(SAMPLES, size, write)
            try:
                return Manifest.load(self.folder)
            except ValueError as error:
                for name in (MANIFEST, SAMPLES):
                    self.cache.drop(f"{self.key}/{name}")
                if last:
                    text = str(error).replace(str(self.folder), self.path.folder)
                    raise ValueError(f"data path {self.path.text!r}: {text}") from None
        raise AssertionError

    def _entry(self, name: str, entries: dict[str, Entry] | None) -> Entry:
        if entries is None:
            return self.store.head(name)
        if name not in entries:
            raise MissingError(f"{self.store.url}/{name} does not exist: check the URL")
        return entries[name]

    def _check_names(self, entries: dict[str, Entry] | None) -> None:
        """Refuses shards that are missing or have other sizes, and names that are not those of the manifest."""
        if self.path.names and {*self.path.names} != self.sizes.keys():
            differing = sorted({*self.path.names} ^ self.sizes.keys())
            raise ValueError(
                f"data path {self.path.text!r} names {len(self.path.names)} tars, and {MANIFEST} has "
                f"{len(self.sizes)} ({shown(differing)}): tars are read as one data set: name the folder"
            )
        for name, size in self.sizes.items() if entries is not None else ():
            found = self._entry(name, entries).size
            if found != size:
                raise ValueError(
                    f"shard {self.store.url}/{name} has {found:,} bytes, {MANIFEST} states {size:,}: upload it again"
                )


def copy(
    store: Store,
    name: str,
    size: int,
    connections: int,
    descriptor: int,
    progress: Callable[[int], object] | None = None,
    hashed: Any = None,
) -> None:
    """Writes an object of `size` bytes to a local file.

    Args:
        store: The object's folder.
        name: Its name.
        size: Its bytes.
        connections: Parallel requests.
        descriptor: The file.
        progress: Gets the number of bytes so far.
        hashed: A hash, updated with the bytes.
    """
    starts = range(0, size, PIECE)
    lengths = [min(PIECE, size - start) for start in starts]
    for at, data in zip(starts, store.ranges(name, starts, lengths, connections), strict=True):
        write_all(descriptor, data, at)
        if hashed:
            hashed.update(data)
        if progress:
            progress(at)


@contextmanager
def fetched(store: Store, cache: Cache, key: str, name: str, size: int) -> Iterator[Path]:
    """A local copy of an object, which is removed at the end of the block.

    Raises:
        ValueError: The cache has no room for it.
    """
    cache.pin(key)
    cache.drop(f"{key}/{name}")  # of a killed process
    if not cache.fill(f"{key}/{name}", size, partial(copy, store, name, size, 8)):
        raise ValueError(f"{cache.folder} has no room for the {size:,} bytes of {name}: free space there")
    try:
        yield cache.folder / key / name
    finally:
        cache.drop(f"{key}/{name}")


def open_cache(settings: DataConfig | None = None) -> Cache:
    """The cache of these settings, or of the default ones; a ValueError if its folder cannot be written."""
    settings = settings or DataConfig.model_validate({"path": "-"})
    own = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(settings.cache or os.path.join(own, "byolt"))
    try:
        return Cache(folder, int(settings.cache_gb * 1e9))
    except OSError as error:
        raise ValueError(
            f"data.cache={folder} cannot be written: {error.strerror}: name another folder"
        ) from None


def write_all(descriptor: int, data: bytes | memoryview, at: int) -> None:
    """Writes all of a buffer at an offset."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
