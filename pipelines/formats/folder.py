"""A folder of image files as a source; its class folders give the labels."""

import hashlib
import os
from pathlib import Path

import numpy as np

from byolt.files import stop
from byolt.files.console import count, shown
from byolt.files.regular import read_regular
from byolt.pipelines.formats.encoded import check_unchanged, checksum, inspect

# Synology's thumbnails; macOS's metadata; fsck's
_SYSTEM_FOLDERS = frozenset(("@eaDir", "__MACOSX", "lost+found"))


class FolderSource:
    """JPEG and PNG files as they are; see `sources.Source`. Opening reads every file: make shards of large sets."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self._names, labels, self.classes, stray = label_names(list_folder(self.folder))
        except OSError as error:
            raise ValueError(f"data path {self.folder} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"data path {self.folder}: {error}") from None
        if not self._names:
            raise ValueError(f"data path {self.folder} holds no images")
        closed = "a broken link, or a folder that cannot be read"
        problems = [
            f"{name}: {'is beside the class folders' if (self.folder / name).is_file() else closed}"
            for name in stray
        ]
        sizes, checksums = [], []
        digest, former = hashlib.sha256(), hashlib.sha256()
        for name, label in zip(self._names, labels, strict=True):
            stop.check()
            try:
                if not (self.folder / name).is_file():
                    raise ValueError("not a regular file")
                data = (self.folder / name).read_bytes()
                header = inspect(data)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                problems.append(f"{name}: {reason}")
                continue
            sizes.append((header.height, header.width))
            checksums.append(checksum(data))
            former.update(f"{name}\0{label}\0{len(data)}\0{header}\n".encode("utf-8", "surrogateescape"))
            digest.update(f"{name}\0{label}\0{checksums[-1]}\n".encode("utf-8", "surrogateescape"))
        if problems:
            raise ValueError(
                f"data path {self.folder}: {count(len(problems), 'unusable file')} ({shown(problems, '; ')}): "
                f"tools/make_shards.py {self.folder} DST leaves them out and lists them in a quarantine file"
            )
        self.labels = np.array(labels, np.int64)
        self.heights, self.widths = np.array(sizes, np.int64).T.copy()
        self.checksums, self.proven = np.array(checksums, np.uint64), False
        self.fingerprint = digest.hexdigest()
        self.former_fingerprints = [former.hexdigest()]  # of names, labels, lengths and headers only

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> bytes:
        data = read_regular(self.folder / self._names[i])
        check_unchanged(data, self.checksums[i])
        return data

    def describe(self, i: int) -> str:
        return f"{self._names[i]} (sample {i})"


def is_hidden(part: str) -> bool:
    """Whether a part of a path is hidden, or a folder of thumbnails, metadata or lost files that a system made."""
    return part.startswith(".") or part in _SYSTEM_FOLDERS


def list_folder(folder: Path, hidden: list[str] | None = None) -> list[str]:
    """Sorted relative names of all files; links to files and folders are followed.

    Within a class folder a real folder is entered once, even if several links lead to it. Entries that cannot be
    entered or examined are listed as files, so that reading them reports the error. `hidden` receives the names of
    the files and folders that are left out, see `is_hidden`.
    """
    return sorted(_walk(folder, "", set(), [] if hidden is None else hidden))


def label_names(names: list[str]) -> tuple[list[str], list[int], list[str] | None, list[str]]:
    """Labels of image files, by their sorted relative names: in class folders (at any depth), or in one flat folder.

    Returns:
        The names; their labels, indices into the sorted class names (-1 in a flat folder); the class names or None; the
        names of files beside the class folders, which have no class.

    Raises:
        ValueError: Most images are one level below the class folders, or beside them.
    """
    classed = [name for name in names if "/" in name]
    if not classed:
        return names, [-1] * len(names), None, []
    deep = sum(name.count("/") > 1 for name in classed)
    if 2 * deep > len(classed):
        tops = sorted({name.split("/", 1)[0] for name in classed})
        raise ValueError(
            f"{deep} of {len(classed)} images are a level below the class folders "
            f"({shown(tops)}): name one of them"
        )
    if len(names) - len(classed) > len(classed):
        raise ValueError(
            f"{len(names) - len(classed)} images are beside the folders and {len(classed)} in them, so the "
            "folder is neither flat nor sorted into classes: name one folder"
        )
    classes = sorted({name.split("/", 1)[0] for name in classed})
    number = {name: label for label, name in enumerate(classes)}
    labels = [number[name.split("/", 1)[0]] for name in classed]
    return classed, labels, classes, [name for name in names if "/" not in name]


def _walk(root: Path, inside: str, entered: set[str], hidden: list[str]) -> list[str]:
    real = os.path.realpath(root / inside)
    if real in entered:  # a link to a folder entered before
        return []
    entered.add(real)
    names = []
    for entry in sorted(os.scandir(root / inside), key=lambda entry: entry.name):
        name = f"{inside}/{entry.name}" if inside else entry.name
        if is_hidden(entry.name):
            hidden.append(name)
            continue
        try:
            within = entered if inside else {real}  # each class folder on its own
            names += _walk(root, name, within, hidden) if entry.is_dir() else [name]
        except OSError:  # a link to itself, or a folder without permission
            names.append(name)
    return names
