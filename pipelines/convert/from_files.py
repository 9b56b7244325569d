"""Image files as the inputs of a conversion: a folder, a tar (also compressed) or a zip, listed and read in place.

No member of an archive is written to disk. A compressed tar has no random access: it is decompressed once, to a
temporary tar. WebDataset tars are recognized by the names of their members. A tar within a tar, or in a folder of tars,
is a class, as in ImageNet's own archive.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from byolt.files.atomic import writing
from byolt.files.console import shown
from byolt.files.paths import copy_first, expand_pattern, is_url, searched, without_secrets
from byolt.pipelines.convert.from_shards import InputTar, are_samples, is_image, list_samples
from byolt.pipelines.convert.inputs import InputImage, Inputs, RefusedFile
from byolt.pipelines.formats.encoded import MAX_BYTES
from byolt.pipelines.formats.folder import is_hidden, label_names, list_folder
from byolt.pipelines.formats.labels import class_names, label_number, listed_labels, numbers_of
from byolt.pipelines.formats.tar import Tar

_MAX_ZIPPED = 256 << 20  # bytes of one member of a zip: a few kilobytes may claim to unpack to more
_EMPTY_ZIP = b"PK\5\6" + bytes(18)
_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\xfd7zXZ\0": lzma.open,
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
}

_Place = tuple[int | zipfile.ZipInfo, int, int, str]  # place, length, modified and archive of an InputImage
_Member = tuple[str, str, int | zipfile.ZipInfo, int, str]  # name, kind, place, length, target of a hard link


class _Files(NamedTuple):
    """What a folder or an archive holds."""

    places: dict[str, _Place]
    refused: list[RefusedFile]
    hidden: list[str]  # hidden or system files and folders, which are left out

    def below(self, folder: str) -> "_Files":
        """The part in a folder, with names relative to it; "" for everything."""
        if not folder:
            return self
        prefix, start = f"{folder}/", len(folder) + 1
        return _Files(
            {name[start:]: place for name, place in self.places.items() if name.startswith(prefix)},
            [RefusedFile(file[start:], why) for file, why in self.refused if file.startswith(prefix)],
            [top[start:] for top in self.hidden if top.startswith(prefix)],
        )


def expand_source(text: str) -> tuple[Path, tuple[str, ...]]:
    """SRC as it was typed; a pattern (tars/*.tar, tars/{00..09}.tar) names tars of one folder.

    Returns:
        The folder or file, and the names in it that the pattern matches; () for all of it.

    Raises:
        ValueError: SRC is not local, or its pattern matches no file, or others than the tars of one folder.
    """
    if is_url(text):
        raise ValueError(f"SRC {without_secrets(text)} must be local: {copy_first(text)}")
    if ".beton" in text:  # has patterns of its own, see `beton.split_path`
        return Path(text), ()
    try:
        found = [Path(name) for name in expand_pattern(text)]
    except ValueError as error:
        raise ValueError(f"SRC {str(error).removeprefix('data path ')}") from None
    if len(found) == 1 and (found[0] == Path(text) or found[0].suffix != ".tar"):
        return found[0], ()
    folders = {path.parent for path in found}
    if len(folders) > 1 or any(path.suffix != ".tar" for path in found):
        raise ValueError(
            f"SRC {text!r} names {shown(found)}: name one folder, tar or zip, or several tars of one folder"
        )
    if missing := [path for path in found if not path.exists()]:
        raise ValueError(f"SRC {text!r}: {shown(missing)} does not exist{searched(text)}")
    return folders.pop(), tuple(path.name for path in found)


def list_files(
    source: Path, inside: str, scratch: Path, listed: Path | None = None, only: Collection[str] = ()
) -> Inputs:
    """Lists the files of `source` below its folder `inside` ("" for all).

    Args:
        source: Folder, tar, compressed tar (.xz, .gz, .bz2) or zip; decided by content.
        inside: Folder within the source that holds the class folders or the images.
        scratch: Folder for the copy of a compressed tar.
        listed: A list of labels, see `labels.listed_labels`; None for those that class folders give.
        only: Tars of the folder that are read instead of everything in it; () for everything.

    Raises:
        ValueError: The source is none of these, is damaged, is empty, or has its images a level further down;
            `inside` leads out of it; the list cannot be used.
        OSError: It cannot be read, or the disk is full.
    """
    if ".." in inside.split("/"):
        raise ValueError(f"--inside {inside} leads out of SRC {source}: name a folder within it")
    inside, path = _tidy(inside), source
    tars: list[InputTar] = []
    if source.is_dir():
        path = source / inside
        files = _walk_folder(path)
        if only:
            files = _Files({name: files.places[name] for name in only if name in files.places}, [], [])
        tars = _tars_in(files.places, True)
    elif not source.is_file():
        raise ValueError(f"SRC {source} is neither a folder nor a regular file")
    elif _starts_as_zip(source):
        files = _walk_archive(_zip_members(source), source.stat().st_mtime_ns).below(inside)
    else:
        path = _decompressed(source, scratch)
        whole = InputTar("", "", 0, path.stat().st_size, source.stat().st_mtime_ns)
        files = _walk_tar(path, source, whole).below(inside)
        if are_samples(files.places):
            return _samples(source, path, [whole], inside, listed)
        tars = _tars_in(files.places, False)
    notes = []
    if tars:
        if beside := sorted(files.places.keys() - {part.name for part in tars}):
            notes.append(f"left out, beside the tars: {shown(beside)}")
        if are_samples(_walk_tar(path, source, tars[0]).places) or _are_numbered(tars):
            found = _samples(source, path, tars, "", listed)
            return found._replace(notes=(*found.notes, *notes))
        inner = _class_tars(source, path, tars)
        files = _Files(inner.places, files.refused + inner.refused, files.hidden + inner.hidden)
    places, refused, hidden = files
    where = f"{source}, folder {inside}" if inside else f"{source}"
    if not places:
        raise ValueError(f"SRC {where} holds no files: name a folder, tar or zip with images")
    folders = sorted({name.rpartition("/")[0] for name in places if name.endswith(".tar")})
    if folders and not tars and not any(map(is_image, places)):
        raise ValueError(f"SRC {where} has its tars in folders ({shown(folders)}): name one with --inside")
    if listed:
        labels, classes, more, unmatched = _listed(listed, sorted(places))
        refused += more
        notes += unmatched
    else:
        try:
            names, numbers, classes, stray = label_names(sorted(places))
        except ValueError as error:
            raise ValueError(f"SRC {where}: {error} {'as SRC' if tars else 'with --inside'}") from None
        labels = dict(zip(names, numbers, strict=True))
        refused += [RefusedFile(name, "is beside the class folders") for name in stray]
    images = []
    for name, label in labels.items():
        image = InputImage(name, label, *places[name])
        limit = MAX_BYTES if isinstance(image.place, int) else _MAX_ZIPPED
        if image.length <= limit:
            images.append(image)
        else:
            refused.append(RefusedFile(name, f"{image.length:,} bytes: more than the limit of {limit:,}"))
    if hidden:
        notes.append(f"left out: {len(hidden)} hidden or system files and folders, for example {min(hidden)}")
    fingerprint = hashlib.sha256(repr(classes).encode()).hexdigest() if listed else ""
    return Inputs(path, images, classes, sorted(refused), notes=tuple(notes), fingerprint=fingerprint)


def _listed(
    path: Path, names: list[str]
) -> tuple[dict[str, int], list[str] | None, list[RefusedFile], list[str]]:
    """The label of each file by a list, the class names, the files without a label, and a note about the list."""
    texts, unmatched = listed_labels(path, names)
    classes = class_names(texts.values())
    numbers = numbers_of(classes)
    labels, refused = {}, []
    for name in names:
        try:
            if name not in texts:
                raise ValueError(f"has no label in {path}")
            labels[name] = label_number(texts[name], numbers)
        except ValueError as error:
            refused.append(RefusedFile(name, str(error)))
    note = f"{path} has {len(unmatched)} names that are not of a file: {shown(unmatched)}"
    return labels, classes, refused, [note] if unmatched else []


def _samples(source: Path, path: Path, tars: list[InputTar], inside: str, listed: Path | None) -> Inputs:
    if listed:
        raise ValueError(f"--labels {listed}: SRC {source} is a WebDataset, which has labels of its own")
    return list_samples(source, path, tars, inside)


def _tars_in(places: dict[str, _Place], is_folder: bool) -> list[InputTar]:
    """The tars at the top of a folder or tar without images."""
    if any(map(is_image, places)):
        return []
    tars = []
    for name in sorted(places):
        place, length, modified, _ = places[name]
        if name.endswith(".tar") and "/" not in name and isinstance(place, int):
            tars.append(InputTar(name if is_folder else "", name, place, place + length, modified))
    return tars


def _are_numbered(tars: list[InputTar]) -> bool:
    """Whether the names of tars differ by consecutive numbers: they are shards, not classes."""
    parts = [re.fullmatch(r"(.*?)(\d+)\.tar", tar.name) for tar in tars]
    numbers = sorted(int(part[2]) for part in parts if part)
    return (
        len({part and part[1] for part in parts}) == 1
        and len(numbers) == len(tars) > 1
        and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    )


def _class_tars(source: Path, path: Path, tars: list[InputTar]) -> _Files:
    """The files in tars, each tar a class folder; a lone tar stands for SRC."""
    found = _Files({}, [], [])
    for part in tars:
        inner = _walk_tar(path, source, part)
        folder = f"{part.name[: -len('.tar')]}/"
        if len(tars) == 1 or all(name.startswith(folder) for name in inner.places):
            folder = ""
        found.places.update({folder + name: place for name, place in inner.places.items()})
        found.refused.extend(RefusedFile(folder + name, reason) for name, reason in inner.refused)
        found.hidden.extend(inner.hidden)
    return found


def _walk_folder(folder: Path) -> _Files:
    if not folder.is_dir():
        raise ValueError(f"SRC {folder} is not a folder")
    places: dict[str, _Place] = {}
    refused = []
    hidden: list[str] = []
    for name in list_folder(folder, hidden):
        path = folder / name
        try:
            found = path.stat()
        except OSError as error:
            reason = "broken link" if os.path.islink(path) else f"{error.strerror}"
            refused.append(RefusedFile(name, reason))
            continue
        if stat.S_ISREG(found.st_mode):
            places[name] = (0, found.st_size, found.st_mtime_ns, "")
        else:
            refused.append(RefusedFile(name, "not a regular file, or a folder that cannot be read"))
    return _Files(places, refused, hidden)


def _walk_tar(path: Path, source: Path, part: InputTar) -> _Files:
    """The files of a tar at `path`; errors name it as a part of `source`."""
    with Tar(path / part.archive, source / part.name) as file:
        walk = file.walk(part.start, part.end)
        members = ((found.name, found.kind, found.offset, found.length, found.link) for found in walk)
        return _walk_archive(members, part.modified, part.archive)


def _walk_archive(members: Iterable[_Member], modified: int, archive: str = "") -> _Files:
    """Sorts the members of an archive; of equal names the last counts."""
    places: dict[str, _Place] = {}
    tops: set[str] = set()  # hidden files and folders
    refused = []
    for raw_name, kind, place, length, target in members:
        name = _tidy(raw_name)
        if kind == "folder":
            continue
        if top := _hidden_top(name):
            tops.add(top)
        elif raw_name.startswith("/") or ".." in raw_name.split("/"):
            refused.append(RefusedFile(raw_name, "unsafe name"))
        elif kind == "file":
            places[name] = (place, length, modified, archive)
        elif kind == "hard link" and _tidy(target) in places:
            places[name] = places[_tidy(target)]
        else:
            refused.append(RefusedFile(name, f"a {kind}, not a file"))
    return _Files(places, refused, list(tops))


def _zip_members(path: Path) -> Iterator[_Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            slashes = any("/" in info.filename for info in entries)
            for info in entries:
                name = info.filename
                if info.create_system == 0 or not slashes:  # on Windows .NET 4.5 wrote backslashes
                    name = name.replace("\\", "/")
                yield name, "folder" if name.endswith("/") else "file", info, info.file_size, ""
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"SRC {path} is a damaged or unusual zip: {error}") from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _starts_as_zip(path: Path) -> bool:
    """By the first bytes: zipfile.is_zipfile would take a tar whose last member is a zip for that zip."""
    with open(path, "rb") as file:
        return file.read(4) in (b"PK\3\4", b"PK\5\6")


def _tidy(name: str) -> str:
    """Without empty parts and dots: "./a//b" is "a/b"."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _hidden_top(name: str) -> str:
    """The name up to its first hidden part; "" if it has none."""
    parts = name.split("/")
    for i, part in enumerate(parts):
        if part != ".." and is_hidden(part):
            return "/".join(parts[: i + 1])
    return ""


def _decompressed(source: Path, scratch: Path) -> Path:
    """The tar itself, or its decompressed copy, which an earlier run may have left: it is renamed when it is whole."""
    with open(source, "rb") as file:
        start = file.read(6)
    opener = next((value for magic, value in _OPENERS.items() if start.startswith(magic)), None)
    if opener is None:
        return source
    found = source.stat()
    identity = f"{source.resolve()}\0{found.st_size}\0{found.st_mtime_ns}"
    path = scratch / f"source-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.tar"
    if not path.exists():
        try:
            with opener(source) as compressed, writing(path) as plain:
                shutil.copyfileobj(compressed, plain, 1 << 20)
        except (lzma.LZMAError, EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # the disk's: gzip and bz2 give no number
                raise
            raise ValueError(f"SRC {source} is damaged: {error}") from None
    return path


class FileReader:
    """Reads the images that `list_files` listed; one for each worker."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._archive = None if path.is_dir() else open(path, "rb", buffering=0)  # noqa: SIM115

    def read(self, image: InputImage) -> bytes:
        """The file's bytes. Raises ValueError with the reason where they cannot be read."""
        try:
            if image.archive:
                with Tar(self._path / image.archive) as file:
                    data = file.read(image.length, cast(int, image.place))
            elif self._archive is None:
                data = (self._path / image.name).read_bytes()
            elif isinstance(image.place, int):
                data = os.pread(self._archive.fileno(), image.length, image.place)
            else:
                data = _read_from_zip(self._archive, image.place)
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror or error}") from None
        except MemoryError:
            raise  # not the file's fault: the run must not continue without it
        except Exception as error:  # zlib.error, BadZipFile, RuntimeError (encrypted), NotImplementedError
            raise ValueError(f"cannot be unpacked: {error}") from None
        if len(data) != image.length:
            raise ValueError(f"has {len(data):,} bytes, and had {image.length:,} when SRC was listed")
        return data


def _read_from_zip(file: io.FileIO, info: zipfile.ZipInfo) -> bytes:
    """Reads one member by its directory entry; ZipFile would parse the whole directory, in each worker."""
    archive = zipfile.ZipFile(io.BytesIO(_EMPTY_ZIP))
    archive.fp = file
    return archive.read(info)
