"""A folder of files fetched from elsewhere, never above its limit, which any number of processes may share.

A file is written under a temporary name, whose space is reserved first, and renamed: a killed process leaves no partial
file under a final name, and its temporary file is taken over or removed by the next process. Every file has a lock of
its own, so that two processes that want it fetch it once. `.usage` holds the bytes in use, and its lock orders all
changes. Locks are the kernel's: the folder has to be on a disk of this machine.
"""

import errno
import fcntl
import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from byolt.files.atomic import TEMPORARY
from byolt.files.stop import check

EVICTABLE = "extents"  # the part of a set that may be deleted while it is in use
_PIN = ".pin"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_POLL = 0.02  # seconds between two tries to take the lock of a file that another process fetches
_pins: list[int] = []  # open until the process ends


class Cache:
    """Files of up to `limit` bytes in all, in `folder`: each in a set, named "SET/file" or "SET/extents/..."."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Counts what is there, and removes the oldest files above the limit.

        Raises:
            OSError: The folder cannot be written.
        """
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)
        with self._usage() as usage:
            for path in self._sets():
                for leftover in path.rglob(f".*{TEMPORARY}"):
                    self._remove_abandoned(leftover)
            usage.set(sum(size for path in self._sets() for _, size, _ in self._files(path)))
            self._evict(usage, limit)

    def pin(self, name: str) -> None:
        """Keeps the files of a set, except its extents, until this process ends."""
        (self.folder / name).mkdir(exist_ok=True)
        with self._usage():
            descriptor = os.open(self.folder / name / _PIN, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            _pins.append(descriptor)

    def room(self, name: str) -> int:
        """Bytes that a set can have: less than the limit by other pinned sets, or than the disk's space."""
        pinned = [path for path in self._sets() if path.name != name and not self._is_unused(path)]
        others = sum(size for path in pinned for _, size, file in self._files(path) if file.parent == path)
        disk = os.statvfs(self.folder)
        with self._usage() as usage:
            return min(self.limit, usage.value + disk.f_bavail * disk.f_frsize) - others

    def read(self, key: str, length: int, offset: int) -> bytes | None:
        """Bytes of a file; None if it is not there."""
        try:
            descriptor = os.open(self.folder / key, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def touch(self, key: str) -> bool:
        """Whether the file is there; it then counts as the newest."""
        try:
            os.utime(self.folder / key)
        except FileNotFoundError:
            return False
        return True

    def drop(self, key: str) -> None:
        """Removes a file if it is there."""
        with self._usage() as usage:
            self._remove(usage, self.folder / key)

    def fill(
        self, key: str, size: int, write: Callable[[int], object], stop: threading.Event | None = None
    ) -> bool:
        """Makes the file, unless it is there; waits for another process that is making it.

        Args:
            key: Its name.
            size: Its bytes.
            write: Writes them to the descriptor; what it raises leaves no file.
            stop: Ends the waiting for another process.

        Returns:
            True if the file was there or is now; False if the limit or the disk has no room for it.

        Raises:
            InterruptedError: `stop` was set.
        """
        path = self.folder / key
        temporary = path.with_name(f".{path.name}{TEMPORARY}")
        path.parent.mkdir(parents=True, exist_ok=True)
        while not path.exists():
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                _wait_for_lock(descriptor, stop or threading.Event())
                if not _is_at(descriptor, temporary):  # another has renamed or removed it meanwhile
                    continue
                try:
                    if path.exists():
                        break
                    if not self._reserve(descriptor, size):
                        return False
                    write(descriptor)
                    with self._usage():
                        temporary.rename(path)
                except OSError as error:
                    if error.errno in _FULL:
                        return False
                    raise
                finally:
                    with self._usage() as usage:
                        if _is_at(descriptor, temporary):
                            self._remove(usage, temporary)
            finally:
                os.close(descriptor)
        return True

    def _reserve(self, descriptor: int, size: int) -> bool:
        """Takes the space of a temporary file, which a killed process may have begun."""
        with self._usage() as usage:
            usage.add(-os.fstat(descriptor).st_size)
            os.ftruncate(descriptor, 0)
            self._evict(usage, self.limit - size)
            if usage.value + size > self.limit:
                return False
            usage.add(size)
            for last in (False, True):
                try:
                    os.posix_fallocate(descriptor, 0, size)
                    return True
                except OSError as error:
                    if error.errno not in _FULL or last:
                        os.ftruncate(descriptor, 0)
                        usage.add(-size)
                        raise
                    os.ftruncate(descriptor, 0)
                    self._evict(usage, usage.value - 2 * size)  # the disk is fuller than the limit allows
        raise AssertionError

    def _evict(self, usage: "_Usage", goal: int) -> None:
        """Removes the oldest extents, then unpinned sets, until at most `goal` bytes are in use."""
        if usage.value <= goal:
            return
        goal -= self.limit // 20  # so that the folder is not listed again for the next file
        extents = [file for path in self._sets() for file in self._files(path / EVICTABLE)]
        unused = (file for path in self._sets() if self._is_unused(path) for file in self._files(path))
        for _, _, path in itertools.chain(sorted(extents), unused):
            if usage.value <= goal:
                return
            if not path.name.endswith(TEMPORARY):
                self._remove(usage, path)

    def _sets(self) -> list[Path]:
        """Those that were pinned once; nothing in other folders, which are not of the cache, is counted or removed."""
        return [path for path in self.folder.iterdir() if (path / _PIN).is_file() and not path.is_symlink()]

    def _files(self, folder: Path) -> Iterator[tuple[float, int, Path]]:
        """Time, size and path of each file below a folder."""
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):
                found = path.lstat()
                if stat.S_ISREG(found.st_mode) and path.name != _PIN:
                    yield found.st_mtime, found.st_size, path

    def _is_unused(self, folder: Path) -> bool:
        """Whether no process has pinned the set."""
        try:
            descriptor = os.open(folder / _PIN, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)

    def _remove(self, usage: "_Usage", path: Path) -> None:
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return
        usage.add(-size)

    def _remove_abandoned(self, temporary: Path) -> None:
        """Removes a temporary file that no process is writing."""
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)

    @contextmanager
    def _usage(self) -> Iterator["_Usage"]:
        """The bytes in use, locked."""
        descriptor = os.open(self.folder / ".usage", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield _Usage(descriptor)
        finally:
            os.close(descriptor)


class _Usage:
    """The number in `.usage`: raised before a file grows, lowered after one is gone, so after a kill it is too high."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        text = os.pread(descriptor, 32, 0)
        self.value = int(text) if text.strip().isdigit() else 0

    def set(self, value: int) -> None:
        self.value = max(0, value)
        os.pwrite(self._descriptor, b"%-31d\n" % self.value, 0)

    def add(self, change: int) -> None:
        self.set(self.value + change)


def _wait_for_lock(descriptor: int, stop: threading.Event) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            check()
            if stop.wait(_POLL):
                raise InterruptedError(
                    errno.EINTR, "interrupted while another process fetched the file"
                ) from None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
