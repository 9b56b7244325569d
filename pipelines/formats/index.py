"""Lists the samples of one shard: offset, size and label of each image.

In a WebDataset tar, consecutive members whose names are equal up to the first dot form a sample: an image, perhaps a
label (.cls, an integer or a name) and a note (.json); `_samples` has the exceptions. Damage to the tar is an error; an
unusable sample is left out and reported. A .beton is accepted or refused as a whole.
"""

import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from byolt.files.console import shown
from byolt.pipelines.formats.beton import BetonSource
from byolt.pipelines.formats.encoded import MAX_BYTES, inspect
from byolt.pipelines.formats.labels import UNLABELED, label_number, numbers_of
from byolt.pipelines.formats.tar import Member, Tar

IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png"))
# Kinds that training does not read, and that make_shards converts; see `convert.rules`.
CONVERTIBLE_EXTENSIONS = frozenset(
    ("avif", "bmp", "gif", "j2k", "jfif", "jp2", "jpe", "pbm", "pgm", "pnm", "ppm", "tif", "tiff", "webp")
)
DOTTED = "{:,} keys with dots: the extension begins at the last dot"
SAMPLE = np.dtype(  # 32 bytes
    [
        ("shard", "<u4"),  # index into Manifest.shards
        ("label", "<i4"),  # index into Manifest.classes, or UNLABELED
        ("offset", "<u8"),  # bytes from the start of the shard to the encoded image
        ("length", "<u4"),  # bytes
        ("height", "<u4"),  # pixels as stored, EXIF orientation ignored
        ("width", "<u4"),
        ("crc32", "<u4"),  # of the encoded image: locates damage by sample, not only by shard
    ]
)
ALL_IMAGES = IMAGE_EXTENSIONS | CONVERTIBLE_EXTENSIONS
_MAX_LABEL = 256  # bytes of a .cls


_Part = tuple[str, Member]  # lower-case extension, and the member


class TarSample(NamedTuple):
    """One key of a WebDataset tar; its image is not read yet."""

    key: str  # name up to the dot where its extension begins, with its folder
    at: int  # offset of its first member's header
    image: Member | None = None  # its image, or None
    extension: str = ""  # of the image, in lower case
    label: str | None = None  # text of its .cls, or None
    note: Member | None = None  # its .json, or None
    others: tuple[str, ...] = ()  # extensions of its other members
    reason: str = ""  # why it is refused; "" if it is not
    has_dot: bool = False  # whether its key has a dot: its extension begins at the name's last dot


class Index(NamedTuple):
    """The contents of one tar."""

    records: np.ndarray  # SAMPLE records in the order of the tar, shape (samples,), with `shard` 0
    refused: list[tuple[str, str]]  # key and reason, with the offset, of each unusable sample
    imageless: int  # number of keys without an image: captions, readme files
    kinds: dict[str, int]  # number of images that have to be converted, by extension; they are refused
    dotted: int  # number of samples whose keys have a dot


class Scan(NamedTuple):
    """An `Index` whose labels are not numbered yet."""

    unlabeled: Index  # with UNLABELED records
    labels: list[str | None]  # text of each sample's .cls, or None
    places: list[tuple[str, int]]  # key of each sample, and offset of its first header

    def numbered(self, numbers: dict[str, int] | None) -> Index:
        """Numbers the labels, see `label_number`."""
        records, refused = self.unlabeled.records, list(self.unlabeled.refused)
        kept = np.ones(len(records), bool)
        for i, ((key, at), text) in enumerate(zip(self.places, self.labels, strict=True)):
            try:
                records["label"][i] = label_number(text, numbers)
            except ValueError as error:
                refused.append((key, f"offset {at}: {error}"))
                kept[i] = False
        return self.unlabeled._replace(records=records[kept], refused=refused)


def index_tar(path: str | os.PathLike[str], classes: list[str] | None = None) -> Index:
    """Reads a tar once; a sample is one .jpg, .jpeg or .png and optionally a .cls.

    Other members of a sample, folders, hidden files and names that start with two underscores are skipped. The .cls
    files hold names of `classes`, or integers if it is None.

    Raises:
        ValueError: Not a regular file, or a damaged or cut tar (see `Tar.walk`); names the tar and the offset.
    """
    return scan_tar(path).numbered(numbers_of(classes))


def scan_tar(path: str | os.PathLike[str]) -> Scan:
    """`index_tar`, but for the labels: whether they are integers or names is decided over all tars of a data set."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    records, labels, places, refused = [], [], [], []
    imageless = dotted = 0
    kinds: Counter[str] = Counter()
    with Tar(path) as file:
        for sample in tar_samples(file):
            try:
                if sample.reason:
                    raise ValueError(sample.reason)
                if sample.image is None:
                    imageless += 1
                    continue
                if sample.extension in CONVERTIBLE_EXTENSIONS:
                    kinds[sample.extension] += 1
                    raise ValueError(f"is a .{sample.extension}: convert it with tools/make_shards.py")
                records.append(_record(file, sample.image))
                labels.append(sample.label)
                dotted += sample.has_dot
                places.append((sample.key, sample.at))
            except ValueError as error:
                refused.append((sample.key, f"offset {sample.at}: {error}"))
    return Scan(Index(np.array(records, SAMPLE), refused, imageless, kinds, dotted), labels, places)


def index_beton(path: str | os.PathLike[str]) -> np.ndarray:
    """SAMPLE records of one .beton, in its order, with `shard` 0; reads every image once.

    Raises:
        ValueError: See `beton.BetonSource`.
    """
    source = BetonSource([path])
    records = np.zeros(len(source), SAMPLE)
    records["label"], records["height"], records["width"] = source.labels, source.heights, source.widths
    records["offset"], records["length"] = source.offsets, source.lengths
    records["crc32"] = [zlib.crc32(source.region(i)) for i in range(len(source))]
    return records


def tar_samples(file: Tar, start: int = 0, end: int | None = None) -> Iterator[TarSample]:
    """Decides which member of a tar, or of one within it, belongs to which sample; reads the labels."""
    seen: set[str] = set()
    for first_key, group in groupby(_keyed(file.walk(start, end)), lambda item: item[0]):
        whole = [(extension, member) for _, extension, member in group]
        for key, parts in _samples(first_key, whole):
            at = parts[0][1].header
            try:
                if key in seen:
                    raise ValueError("its key occurs twice (a key ends at the first dot of a name)")
                sample = _sample(file, key, parts)
                yield sample._replace(has_dot=sample.image is not None and key != first_key)
            except ValueError as error:
                yield TarSample(key, at, reason=str(error))
            seen.add(key)


def _keyed(members: Iterable[Member]) -> Iterator[tuple[str, str, Member]]:
    """The members that can belong to a sample: key with its folder, lower-case extension, member."""
    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if member.kind != "folder" and stem and dot and not base.startswith("__"):
            yield (f"{folder}/{stem}" if folder else stem), extension.lower(), member


def _samples(key: str, parts: list[_Part]) -> list[tuple[str, list[_Part]]]:
    """The samples, with their keys, of members whose names are equal up to the first dot.

    They are one sample if it has an image. If not, the extension begins at the last dot, provided that each image then
    has its own number (img.0001.jpg, img.0002.jpg), or that there is one image.
    """
    images = [part for part in parts if part[0].rpartition(".")[2] in ALL_IMAGES]
    if not images or any(extension in ALL_IMAGES for extension, _ in parts):
        return [(key, parts)]
    if len(images) == 1:
        last = [(extension.rpartition(".")[2], member) for extension, member in parts]
        return [(images[0][1].name.rpartition(".")[0], last)]
    samples: dict[str, list[_Part]] = {}
    for extension, member in parts:
        samples.setdefault(member.name.rpartition(".")[0], []).append((extension.rpartition(".")[2], member))
    numbered = all(any(map(str.isdigit, extension)) for extension, _ in images)
    return list(samples.items()) if numbered and key not in samples else [(key, parts)]


def _sample(file: Tar, key: str, parts: list[_Part]) -> TarSample:
    """The sample of these members; raises ValueError if it cannot be used."""
    images = [part for part in parts if part[0] in IMAGE_EXTENSIONS]
    images = images or [part for part in parts if part[0] in CONVERTIBLE_EXTENSIONS]
    labels = [part for part in parts if part[0] == "cls"]
    notes = [part for part in parts if part[0] == "json" and part[1].kind == "file"][:1]
    if not images:
        for extension, member in parts:
            if extension.rpartition(".")[2] in ALL_IMAGES:
                raise ValueError(
                    f"{member.name!r} is not an image by WebDataset's rule, that an extension begins at the first dot, "
                    "and by the last dot it is one of several: rename such files without further dots"
                )
        return TarSample(key, parts[0][1].header)
    if len(images) > 1 or len(labels) > 1:
        found = shown(sorted(extension for extension, _ in parts))
        raise ValueError(f"it needs one image and at most one label, it has: {found}")
    for _, member in images + labels:
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise ValueError(f"unsafe member name {member.name!r}")
        if member.kind != "file":
            raise ValueError(f"{member.name!r} is a {member.kind}, not a file")
    if images[0][1].length > MAX_BYTES:
        raise ValueError(f"{images[0][1].length:,} bytes: an image has at most {MAX_BYTES:,}")
    label = None
    if labels:
        member = labels[0][1]
        if member.length > _MAX_LABEL:
            raise ValueError(f"its label has {member.length:,} bytes, more than {_MAX_LABEL}")
        text = file.read(member.length, member.offset)
        label = text.strip().decode("utf-8", "backslashreplace")
    others = tuple(part[0] for part in parts if part not in images + labels + notes)
    note = notes[0][1] if notes else None
    extension, image = images[0]
    return TarSample(key, parts[0][1].header, image, extension, label, note, others)


def _record(file: Tar, image: Member) -> tuple[int, ...]:
    """The SAMPLE record, without its label."""
    data = file.read(image.length, image.offset)
    header = inspect(data)
    return 0, UNLABELED, image.offset, image.length, header.height, header.width, zlib.crc32(data)
