"""Copies a run's folder to object storage in a thread that neither delays nor stops the run, and back to a new disk."""

import threading
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from byolt.files.atomic import remove_leftovers, replacing, writing
from byolt.files.stop import Stopped
from byolt.files.storage.retry import MissingError
from byolt.files.storage.store import Entry, Store

SERIES = f"checkpoint-{'[0-9]' * 9}.pt"  # names sort by age; the newest are kept
_SMALL = ("*.jsonl", "*.json", "*.png")  # may grow while they are sent
_OTHERS = (*_SMALL, "*.safetensors", "aside-*.pt")
_PIECE = 1 << 23  # bytes of one request


class Mirror:
    """The copy of one folder; its checkpoint is written after all other files.

    Args:
        folder: The local folder.
        url: The remote one: s3://bucket/folder, gs://..., az://...
        minutes: How long a failing request is repeated, and how long leaving the block waits at most.
        keep: Number of checkpoints there.
        say: Prints a line.
    """

    def __init__(
        self, folder: Path, url: str, minutes: float, keep: int, say: Callable[[str], object]
    ) -> None:
        self.url, self._folder, self._minutes, self._keep, self._say = url, folder, minutes, keep, say
        self._store = Store(url, minutes)
        self._there: dict[str, Entry] | None = None  # at the first contact
        self._sent: dict[str, tuple[int, int]] = {}  # time and size of each file, by name
        self._series: set[str] = set()  # checkpoints there that are of this run
        self._asked, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def checkpoints(self, minutes: float) -> list[str]:
        """The names of the checkpoints there, the newest first; from then on they count as this run's.

        Args:
            minutes: How long a failing request is repeated, if that is less than usual.

        Raises:
            RemoteError: The folder cannot be listed.
        """
        self._there = Store(self.url, min(minutes, self._minutes)).list() or {}
        self._series = {name for name in self._there if fnmatch(name, SERIES)}
        return sorted(self._series, reverse=True)

    def fetch(self, name: str, check: Callable[[Path], object]) -> Path:
        """Copies a checkpoint to the local folder, and the other small files, which then fit it.

        Args:
            name: One of `checkpoints`.
            check: Called with the path of the copy, before it gets its name; what it raises leaves the folder as it is.

        Raises:
            RemoteError: A file cannot be read.
        """
        assert self._there is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        for pattern in ("checkpoint-*", "*.jsonl"):  # of killed processes: they may fill the disk
            remove_leftovers(self._folder, pattern)
        path, size = self._folder / name, self._there[name].size
        starts = range(0, size, _PIECE)
        with replacing(path) as temporary:
            with temporary.open("wb") as file:
                for data in self._store.ranges(name, starts, [min(_PIECE, size - at) for at in starts]):
                    file.write(data)
            check(temporary)
            for other in self._there:
                if any(fnmatch(other, pattern) for pattern in _SMALL):
                    with writing(self._folder / other) as file:
                        file.write(self._store.get(other))
        return path

    def read(self, name: str) -> bytes:
        """The content of a small file that was there when `checkpoints` was called; empty if it was not."""
        return self._store.get(name) if name in (self._there or {}) else b""

    def update(self) -> None:
        """Copies in the background what is new in the folder."""
        if self._thread.ident is None:
            self._thread.start()
        self._asked.set()

    def __enter__(self) -> "Mirror":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits until all files are there, at most `minutes`; not after a second Ctrl-C, or if nothing was trained."""
        if kind in (KeyboardInterrupt, Stopped):
            return
        self._closing = True
        self.update()
        self._thread.join(60 * self._minutes)
        if self._thread.is_alive():
            self._say(
                f"warning: run.mirror={self.url} lacks the latest files: they were not written within "
                f"data.remote_minutes={self._minutes:g}"
            )

    def _run(self) -> None:
        last = False
        while not last:
            self._asked.wait()
            self._asked.clear()
            last = self._closing
            try:
                self._copy()
            except Exception as error:  # whatever it is, the run continues
                later = (
                    "the mirror lacks the latest files" if last else "tried again after the next checkpoint"
                )
                if last or not isinstance(error, InterruptedError):  # by a signal: `last` is next
                    self._say(f"warning: run.mirror={self.url}: {error}; {later}")
            else:
                if last:
                    self._say(f"run.mirror={self.url} is up to date")

    def _copy(self) -> None:
        if self._there is None:
            self._there = self._store.list() or {}
        newest = sorted(self._folder.glob(SERIES))[-1:]
        for path in [path for pattern in _OTHERS for path in self._folder.glob(pattern)] + newest:
            with suppress(FileNotFoundError):  # a newer one has taken its place
                if path.is_file():  # no FIFO, which would block, nor a folder
                    self._send(path)
                self._series |= {path.name for path in newest if path.name in self._sent}
        last = max((path.name for path in newest), default="")  # later ones were damaged
        for name in sorted(self._series, key=lambda name: (name <= last, name), reverse=True)[self._keep :]:
            with suppress(MissingError):
                self._store.delete(name)
            self._series.remove(name)

    def _send(self, path: Path) -> None:
        found = path.stat()
        state = (found.st_mtime_ns, found.st_size)
        if self._sent.get(path.name) != state:
            is_small = any(fnmatch(path.name, pattern) for pattern in _SMALL)
            try:
                self._store.put(path.name, path.read_bytes() if is_small else path, self._there)
            except MissingError:  # it says the same of a local file
                path.stat()
                raise
            self._sent[path.name] = state
