"""Encoded bytes of many samples, read by several threads at a time: what waits for a disk or a network waits together.

Each thread gets one run of neighbouring places, because handing over every sample by itself costs more than a read
from memory does.
"""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipelines.sources import Source


class Reader:
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
