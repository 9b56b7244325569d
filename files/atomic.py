"""Writes files completely or not at all: to a temporary file, which is fsynced and renamed."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from byolt.files import failpoint
from byolt.files.regular import open_regular

TEMPORARY = ".byolt-tmp"  # suffix of unfinished files; it is ours alone, so leftovers may be deleted


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which replaces `path` on success and is removed on failure."""
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
    """Yields a binary file, which replaces `path` when the block ends and is removed if the block raises."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield file


def remove_leftovers(folder: Path, pattern: str = "*") -> None:
    """Deletes the temporary files of killed processes whose final name matches `pattern`."""
    for leftover in folder.glob(f".{pattern}{TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file's content in hex."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0, opener=open_regular) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
