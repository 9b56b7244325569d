"""Reads the samples of a remote data set with a manifest; see `sources.Source`.

Samples are fetched in extents: up to 8 MB of consecutive ones of a block of 256. An extent is kept in the cache;
`plan` fetches those of coming samples ahead. Each sample's crc32 is checked whenever it is read.
"""

import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from byolt.configs.schema import DataConfig
from byolt.files.console import say
from byolt.pipelines.formats.encoded import check_unchanged, inspect, ppm_header
from byolt.pipelines.manifest import BLOCK, DescribedSource
from byolt.pipelines.remote import dataset
from byolt.pipelines.remote.cache import EVICTABLE
from byolt.pipelines.remote.dataset import RemoteData, write_all
from byolt.pipelines.remote.urls import RemotePath


class RemoteSource(DescribedSource):
    """Tars or .beton files with a manifest, at a URL."""

    def __init__(
        self, path: RemotePath, settings: DataConfig | None = None, data: RemoteData | None = None
    ) -> None:
        """
        Args:
            path: The data set.
            settings: See `RemoteData`.
            data: The same, found before.
        """
        self._made_by = path, settings
        self._data = data or RemoteData(path, settings)
        manifest = self._data.manifest
        assert manifest is not None
        self._store, self._cache, self._key = self._data.store, self._data.cache, self._data.key
        super().__init__(manifest)
        self._is_beton = self._shards[0].name.endswith(".beton")
        self._extents = extents(manifest.samples, dataset.PIECE)
        self._first = np.ascontiguousarray(self._extents["first"])
        self._pool: ThreadPoolExecutor | None = None
        self._planned: set[int] = set()
        self._slots = threading.Semaphore(self._data.connections)  # of `plan` and of waiting reads together
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def read(self, i: int) -> bytes:
        """Encoded image `i`; see `sources.Source`. Bytes with another crc32 than the manifest's are fetched again."""
        record = self._samples[i]
        data = self._bytes(i)
        if zlib.crc32(data) != record["crc32"]:
            self._cache.drop(self._file(int(self._extent_of(i))))
            data = self._bytes(i)
            check_unchanged(data, int(record["length"]) << 32 | int(record["crc32"]))
        return self._with_header(i, data)

    def plan(self, ids: npt.NDArray[np.int64]) -> None:
        """Begins to fetch the extents of these samples, in the order in which they are first needed."""
        needed, first = np.unique(self._extent_of(ids), return_index=True)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._data.connections, "remote")
        for number in needed[np.argsort(first)].tolist():
            with self._lock:
                if number in self._planned:
                    continue
                self._planned.add(number)
            self._pool.submit(self._fetch_ahead, number)

    def share_ahead(self, window: float) -> float:
        """The share of a window of so many samples to plan ahead; below 1 if the cache does not hold two windows."""
        held = self._cache.limit * len(self) / sum(self._data.sizes.values())
        if held < min(2 * window, len(self)):
            say(
                f"warning: data.cache_gb={self._cache.limit / 1e9:g} holds {held:,.0f} samples, and two windows of "
                f"data.order have {2 * window:,.0f}: less is read ahead, and below one window parts of shards are "
                "fetched several times: raise data.cache_gb",
                file=sys.stderr,
            )
        return 1.0 if held >= len(self) else min(1.0, max(0.0, held / window - 1))

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """While the block runs, reads that wait for the network fail at once; planned ones are dropped."""
        pool, self._pool = self._pool, None
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)
        self._planned.clear()
        self._stop.set()
        with self._store.interrupted():
            yield
            if pool:
                pool.shutdown()  # a thread that is writing removes its temporary file
        self._stop = threading.Event()

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteSource, self._made_by

    def _fetch_ahead(self, number: int) -> None:
        with suppress(OSError):  # `read` meets it again
            if not self._cache.touch(self._file(number)):
                self._fetch(number)
        with self._lock:
            self._planned.discard(number)

    def _extent_of(self, ids: int | npt.NDArray[np.int64]) -> np.integer | npt.NDArray[np.int64]:
        return np.searchsorted(self._first, ids, "right") - 1

    def _bytes(self, i: int) -> bytes:
        """The stored bytes of sample `i`, from the cache, the extent or, without room for that, alone."""
        number, record = int(self._extent_of(i)), self._samples[i]
        length, offset = int(record["length"]), int(record["offset"])
        at = offset - int(self._extents[number]["start"])
        data = self._cache.read(self._file(number), length, at)
        if data is None or len(data) != length:
            whole = self._fetch(number)
            data = None if whole is None else bytes(memoryview(whole)[at : at + length])
        if data is None:  # another process has fetched it
            data = self._cache.read(self._file(number), length, at)
        if data is None:
            data = bytes(self._store.range(self._shards[record["shard"]].name, offset, length))
        return data

    def _fetch(self, number: int) -> Any:
        """Fetches an extent into the cache; returns its bytes, or None if it was or could not be put there."""
        extent, fetched = self._extents[number], []
        start, length = int(extent["start"]), int(extent["stop"] - extent["start"])

        def write(descriptor: int) -> None:
            with self._slots:
                fetched.append(self._store.range(self._shards[extent["shard"]].name, start, length))
            write_all(descriptor, fetched[0], 0)

        self._cache.fill(self._file(number), length, write, self._stop)
        return fetched[0] if fetched else None

    def _file(self, number: int) -> str:
        extent = self._extents[number]
        name = self._shards[extent["shard"]].name
        return f"{self._key}/{EVICTABLE}/{name}/{extent['start']}-{extent['stop']}"

    def _with_header(self, i: int, data: bytes) -> bytes:
        """Raw pixels of a .beton, which have 3 x height x width bytes, get a PPM header."""
        height, width = int(self.heights[i]), int(self.widths[i])
        if not self._is_beton or len(data) != 3 * height * width:
            return data
        with suppress(ValueError):  # a JPEG of just that length
            header = inspect(data)
            if (header.height, header.width) == (height, width):
                return data
        return ppm_header(height, width) + data


EXTENT = np.dtype([("first", np.int64), ("shard", np.int64), ("start", np.int64), ("stop", np.int64)])
_PIECE = 1 << 8  # blocks that are cut together


def extents(samples: np.ndarray, size: int) -> np.ndarray:
    """Cuts blocks of samples into extents of about `size` bytes.

    None crosses a block's end, so that in the order of lanes one rank fetches it: cut at multiples of 8 MB of a shard,
    they were 1.25 times the traffic on 8 ranks.

    Args:
        samples: SAMPLE records, in the order of shards and offsets.
        size: Bytes.

    Returns:
        EXTENT records: first sample, shard, first byte, and the byte behind the last.
    """
    parts = []
    for begin in range(0, len(samples), _PIECE * BLOCK):
        piece = samples[begin : begin + _PIECE * BLOCK]
        shard, offset = piece["shard"].astype(np.int64), piece["offset"].astype(np.int64)
        number = np.arange(len(piece))
        cell = (offset - offset[number - number % BLOCK]) // size
        starts = (number[1:] % BLOCK == 0) | (shard[1:] != shard[:-1]) | (cell[1:] != cell[:-1])
        first = np.flatnonzero(np.append(True, starts))
        found = np.empty(len(first), EXTENT)
        found["first"], found["shard"], found["start"] = begin + first, shard[first], offset[first]
        found["stop"] = np.maximum.reduceat(offset + piece["length"].astype(np.int64), first)
        parts.append(found)
    return np.concatenate(parts)
