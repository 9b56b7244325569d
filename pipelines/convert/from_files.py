"""The images that shards are made of: a folder, a tar (also compressed) or a zip, listed and read in place.

Nothing of an archive is ever written under a name that it chose. A compressed tar has no random access: it is
decompressed once, to one temporary tar.
"""

import bz2
import gzip
import hashlib
import lzma
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from byolt.files.atomic import writing
from byolt.pipelines.formats import tar
from byolt.pipelines.formats.encoded import MAX_BYTES
from byolt.pipelines.formats.folder import label_names, list_folder

_MAX_ZIPPED = 256 << 20  # bytes of one entry of a zip: a few kilobytes may claim to unpack to more
_COMPRESSED: dict[bytes, Callable[[Path], Any]] = {
    b"\xfd7zXZ\0": lzma.open,
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
}


class Entry(NamedTuple):
    """One input file.

    Attributes:
        name: Relative to the folder that was asked for.
        label: Index of its class, -1 for none.
        offset: Where its bytes start in a tar; its number in a zip or data set; 0 in a folder.
        length: Bytes.
        modified: Of the file, or of its archive: nanoseconds since 1970.
        key: What the sample is called; "" for its number.
        info: JSON that goes with it; "" for the name alone.
    """

    name: str
    label: int
    offset: int
    length: int
    modified: int
    key: str = ""
    info: str = ""


class Refused(NamedTuple):
    """An input file that is no candidate, with the reason."""

    file: str
    reason: str


class Listing(NamedTuple):
    """All input files, sorted by name. `path` is what to read from: the source, or the decompressed tar.

    A data set that was made before (kind "data set") is in its own order, and stays in it. `left_out` names what of
    it has no place in another, `fingerprint` is its `sources.Source.fingerprint`, and `proven` says that every image
    was decoded when it was made: what has the same checksum need not be decoded again.
    """

    path: Path
    kind: str
    prefix: str
    entries: list[Entry]
    classes: list[str] | None
    refused: list[Refused]
    left_out: tuple[str, ...] = ()
    fingerprint: str = ""
    proven: bool = False

    def sha256(self) -> str:
        """Identity of the source: names, labels and sizes."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for entry in self.entries:
            digest.update(f"{entry.name}\0{entry.label}\0{entry.length}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def modified(self) -> str:
        """Changes when a file is written anew with the same size: a run must not be continued with it."""
        times = [(entry.name, entry.modified) for entry in self.entries]
        return hashlib.sha256(ascii(times).encode()).hexdigest()[:16]


Places = dict[str, tuple[int, int, int]]  # name -> offset, length and modified, as in Entry


def list_originals(source: Path, inside: str, scratch: Path) -> Listing:
    """Lists the files of `source` below its folder `inside` ("" for all).

    Args:
        source: Folder, tar, compressed tar (.xz, .gz, .bz2) or zip; decided by content.
        inside: Folder within the source that holds the class folders or the images.
        scratch: Where a compressed tar is decompressed to.

    Raises:
        ValueError: It is none of these, damaged, empty, or has its images a level further down; `inside` leads
            out of it.
        OSError: It cannot be read, or the disk is full.
    """
    if not source.exists():
        raise ValueError(f"SRC {source} does not exist")
    if ".." in inside.split("/"):
        raise ValueError(f"--inside {inside} leads out of SRC {source}: name a folder within it")
    prefix = f"{_plain(inside)}/" if _plain(inside) else ""
    path = source
    if source.is_dir():
        kind, places, refused = "folder", *_list_folder(source / prefix)
    elif not source.is_file():
        raise ValueError(f"SRC {source} is neither a folder nor a regular file")
    elif _starts_as_zip(source):
        kind, places, refused = "zip", *_list_zip(source)
    else:
        path = _plain_tar(source, scratch)
        kind, places, refused = "tar", *_list_tar(path, source)
    if kind != "folder":
        places = {name[len(prefix) :]: place for name, place in places.items() if name.startswith(prefix)}
        refused = [Refused(file[len(prefix) :], why) for file, why in refused if file.startswith(prefix)]
    where = f"{source}, folder {inside}" if prefix else f"{source}"
    try:
        names, labels, classes, stray = label_names(sorted(places))
    except ValueError as error:
        raise ValueError(f"SRC {where}: {error} with --inside") from None
    if not names:
        raise ValueError(f"SRC {where} holds no files: name a folder, tar or zip with images")
    refused += [Refused(name, "lies beside the class folders") for name in stray]
    entries = [Entry(name, label, *places[name]) for name, label in zip(names, labels, strict=True)]
    limit = _MAX_ZIPPED if kind == "zip" else MAX_BYTES
    for entry in entries:
        if entry.length > limit:
            refused.append(Refused(entry.name, f"{entry.length:,} bytes: more than an image has"))
    entries = [entry for entry in entries if entry.length <= limit]
    return Listing(path, kind, prefix, entries, classes, sorted(refused))


def _list_folder(folder: Path) -> tuple[Places, list[Refused]]:
    if not folder.is_dir():
        raise ValueError(f"SRC {folder} is not a folder")
    places = {}
    refused = []
    for name in list_folder(folder):
        path = folder / name
        try:
            found = path.stat()
        except OSError as error:
            refused.append(Refused(name, "broken link" if os.path.islink(path) else f"{error.strerror}"))
            continue
        if stat.S_ISREG(found.st_mode):
            places[name] = (0, found.st_size, found.st_mtime_ns)
        else:
            refused.append(Refused(name, "not a regular file, or a folder that cannot be read"))
    return places, refused


def _list_tar(path: Path, source: Path) -> tuple[Places, list[Refused]]:
    places: Places = {}
    refused = []
    modified = source.stat().st_mtime_ns
    with tar.opened(path) as descriptor:
        for member in tar.walk(source, descriptor):
            name = _plain(member.name)
            if member.kind == "folder" or _hidden(name):
                continue
            if reason := _refusal(member.name):
                refused.append(Refused(member.name, reason))
            elif member.kind == "file":
                places[name] = (member.offset, member.length, modified)  # the last of a name counts
            elif member.kind == "hard link" and _plain(member.link) in places:
                places[name] = places[_plain(member.link)]
            else:
                refused.append(Refused(name, f"a {member.kind}, not a file"))
    return places, refused


def _list_zip(path: Path) -> tuple[Places, list[Refused]]:
    places = {}
    refused = []
    modified = path.stat().st_mtime_ns
    try:
        with zipfile.ZipFile(path) as archive:
            for number, info in enumerate(archive.infolist()):
                name = _plain(info.filename)
                if info.is_dir() or _hidden(name):
                    continue
                if reason := _refusal(info.filename):
                    refused.append(Refused(info.filename, reason))
                else:
                    places[name] = (number, info.file_size, modified)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"SRC {path} is a damaged or unusual zip: {error}") from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return places, refused


def _starts_as_zip(path: Path) -> bool:
    """By the first bytes: zipfile.is_zipfile would take a tar whose last member is a zip for that zip."""
    with open(path, "rb") as file:
        return file.read(4) in (b"PK\3\4", b"PK\5\6")


def _plain(name: str) -> str:
    """Without what changes nothing: "./a//b" is "a/b"."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") and part != ".." for part in name.split("/")) or name.startswith(
        "__MACOSX/"
    )


def _refusal(name: str) -> str:
    return "unsafe name" if name.startswith("/") or ".." in name.split("/") else ""


def _plain_tar(source: Path, scratch: Path) -> Path:
    """The tar itself, or its decompressed copy (kept from an earlier run: its rename says it is whole)."""
    with open(source, "rb") as file:
        start = file.read(6)
    opener = next((value for magic, value in _COMPRESSED.items() if start.startswith(magic)), None)
    if opener is None:
        return source
    stat = source.stat()
    identity = hashlib.sha256(f"{source.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    path = scratch / f"source-{identity[:16]}.tar"
    if not path.exists():
        try:
            with opener(source) as compressed, writing(path) as plain:
                for chunk in _chunks(compressed):
                    plain.write(chunk)
        except _DamagedError as error:
            raise ValueError(f"SRC {source} is damaged: {error}") from None
    return path


class _DamagedError(Exception):
    """The compressed stream; an OSError while writing what comes out of it is something else."""


def _chunks(compressed: Any) -> Iterator[bytes]:
    try:
        while chunk := compressed.read(1 << 20):
            yield chunk
    except (lzma.LZMAError, EOFError, OSError, zlib.error) as error:
        raise _DamagedError(error) from None


class Reader:
    """Reads entries of a listing; one for each worker."""

    def __init__(self, path: Path, kind: str, prefix: str) -> None:
        self._root = path / prefix
        self._zip = zipfile.ZipFile(path) if kind == "zip" else None
        self._tar = open(path, "rb", buffering=0) if kind == "tar" else None  # noqa: SIM115

    def read(self, entry: Entry) -> bytes:
        """The file's bytes. Raises ValueError with the reason where they cannot be read."""
        try:
            if self._zip is not None:
                data = self._zip.read(self._zip.infolist()[entry.offset])
            elif self._tar is not None:
                data = os.pread(self._tar.fileno(), entry.length, entry.offset)
            else:
                data = (self._root / entry.name).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror or error}") from None
        except MemoryError:
            raise  # no fault of the file's: the run must not go on without it
        except Exception as error:  # zlib.error, BadZipFile, RuntimeError (encrypted), NotImplementedError
            raise ValueError(f"cannot be unpacked: {error}") from None
        if len(data) != entry.length:
            raise ValueError(f"has {len(data):,} bytes, and had {entry.length:,} when SRC was listed")
        return data

    def __del__(self) -> None:
        for file in (getattr(self, "_zip", None), getattr(self, "_tar", None)):
            if file is not None:
                file.close()
