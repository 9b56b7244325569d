"""Files that are whole or not there: written to a temporary, fsynced, renamed."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from byolt.files import failpoint

TEMPORARY = (
    ".byolt-tmp"  # suffix of files that are not whole yet; no user gives it, so leftovers may be deleted
)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name on success and is removed on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield temporary
        _sync(temporary)
        failpoint.reach(f"rename {path.name}")
        temporary.replace(path)
        _sync(path.parent)  # the rename itself survives a power cut
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that gets the name `path` when the block ends, and is removed if the block raises."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield file
        file.flush()


def remove_leftovers(folder: Path, pattern: str = "*") -> None:
    """Deletes the temporaries of killed processes whose final name matches `pattern`."""
    for leftover in folder.glob(f".{pattern}{TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
