"""A lock on a folder: refuses a second process that would write to it.

The lock is the kernel's (flock), so it ends with its process, however that ends; the lock file's content only says who
holds it. Between machines it works where the file system passes flock on: NFS since Linux 2.6.12, Lustre mounted with
`-o flock`, GPFS, CephFS. Lustre's `localflock` and some FUSE file systems keep it to one machine: there the file's
content reveals a process on another machine, and `take` warns of it.
"""

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

from byolt.files.regular import open_regular


class Lock:
    """The right to write to a folder; ends with the `with` block or the process.

    `take` creates the lock file `path` and its folder. Messages name what is protected: "run.out=runs/a".
    """

    def __init__(self, path: Path, folder: str) -> None:
        self._path, self._folder, self._descriptor = path, folder, -1

    def take(self) -> str:
        """Takes the lock, unless it is taken already.

        Returns:
            "", or a sentence for the user: the last holder ended without releasing the lock, or the file system has no
            locks.

        Raises:
            ValueError: another process holds the lock (names its host and pid), the folder cannot be written, or the
                lock file is not a regular file.
            OSError: the file system failed.
        """
        if self._descriptor >= 0:
            return ""
        descriptor = self._open()
        try:
            holder = _holder(descriptor)
            locked = self._lock(descriptor, holder)
        except BaseException:
            os.close(descriptor)  # it is another's file: `release` must not empty it
            raise
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        mine = {"host": socket.gethostname(), "pid": os.getpid()}
        os.pwrite(descriptor, json.dumps(mine).encode() + b"\n", 0)
        if not locked:
            return f"{self._path}: this file system has no locks; use {self._folder} on one machine only"
        if not holder:
            return ""
        host, pid = holder
        taken = f"took over {self._path} from pid {pid} on {host}, which ended without releasing it"
        if host == socket.gethostname():
            return taken
        return f"{taken} (or still runs, if this file system keeps locks to one machine: then stop one of the two)"

    def release(self) -> None:
        """Releases the lock if it was taken. The file stays: removing it would race with another process's open."""
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _open(self) -> int:
        """Opens the lock file; never follows a symbolic link nor waits for a FIFO's other end."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return open_regular(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            kind = {errno.ELOOP: "a symbolic link", errno.EINVAL: "not a regular file"}.get(error.errno or 0)
            reason = f"{self._path.name} is {kind}" if kind else error.strerror
            raise ValueError(f"{self._folder} cannot be written: {reason}; choose another folder") from None

    def _lock(self, descriptor: int, holder: tuple[str, int] | None) -> bool:
        """Returns True if locked, False if the file system has no locks and the named holder is not running here."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = error.errno in (errno.EAGAIN, errno.EACCES)
            if not held and error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(self._path)) from None
            here = holder and holder[0] == socket.gethostname()
            if held or (holder and here and Path(f"/proc/{holder[1]}").exists()):
                who = "a process that has not named itself yet"
                if holder:
                    who = f"pid {holder[1]} on {holder[0]}"
                raise ValueError(
                    f"{self._folder} is in use by {who}: wait for it, stop it, or choose another folder"
                ) from None
            return False
        return True


def _holder(descriptor: int) -> tuple[str, int] | None:
    """Host and pid that the lock file names; None if it names none."""
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
        return str(content["host"]), int(content["pid"])
    except (ValueError, KeyError, TypeError):
        return None
