"""One run, one folder: a second process that would write to it is refused.

The lock is the kernel's (flock) on `run.lock`, so it ends with its process, however that ends; what the file says is
only who it was. Between machines it holds where the file system passes flock on: NFS since Linux 2.6.12, Lustre mounted
with `-o flock`, GPFS, CephFS. Lustre's `localflock` and some FUSE file systems keep it to one machine: there a second
run on another machine is noticed only by what the file says, and warned of.
"""

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType

NAME = "run.lock"


class RunLock:
    """The right to write to the folder of a run; released when the `with` block or the process ends."""

    def __init__(self, folder: Path) -> None:
        self._path, self._descriptor = folder / NAME, -1

    def take(self) -> str:
        """Takes the lock.

        Returns:
            "", or a sentence for the user: it was taken over from a process that ended without releasing it, or the
            file system has no locks.

        Raises:
            ValueError: another process holds it; names its host and pid. Or the folder, which is made where it is not
                there, cannot be written.
            OSError: the file system failed.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(
                f"run.out={self._path.parent} cannot be written: {error.strerror or error}; choose another folder"
            ) from None
        try:
            locked = self._lock(descriptor)
        except BaseException:
            os.close(descriptor)  # the file is another's: `release` must not empty it
            raise
        self._descriptor = descriptor
        holder = _holder(descriptor)
        os.ftruncate(self._descriptor, 0)
        mine = {"host": socket.gethostname(), "pid": os.getpid()}
        os.pwrite(self._descriptor, json.dumps(mine).encode() + b"\n", 0)
        if not locked:
            return (
                f"{self._path}: this file system has no locks; see that no other machine runs in this folder"
            )
        if not holder:
            return ""
        taken = (
            f"took over {self._path} from pid {holder[1]} on {holder[0]}, which ended without releasing it"
        )
        if holder[0] != socket.gethostname():
            taken += " (or goes on, if this file system keeps locks to one machine: then stop one of the two)"
        return taken

    def release(self) -> None:
        """Gives the lock back, if it was taken. The file stays: removing it would race with the next one's open."""
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _lock(self, descriptor: int) -> bool:
        """True if locked; False where the file system has no locks and no live local holder is named.

        Raises:
            ValueError: another process holds it.
            OSError: the file system failed.
        """
        holder = _holder(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal(holder) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            if holder and holder[0] == socket.gethostname() and Path(f"/proc/{holder[1]}").exists():
                raise self._refusal(holder) from None
            return False
        return True

    def _refusal(self, holder: tuple[str, int] | None) -> ValueError:
        who = f"pid {holder[1]} on {holder[0]}" if holder else "a process that has not yet written its name"
        return ValueError(
            f"run.out={self._path.parent} is in use by {who}: wait for it or stop it, or choose another run.out"
        )


def _holder(descriptor: int) -> tuple[str, int] | None:
    """Host and pid that the file names, None where it names none."""
    try:
        said = json.loads(os.pread(descriptor, 4096, 0))
        return str(said["host"]), int(said["pid"])
    except (ValueError, KeyError, TypeError):
        return None
