"""Lists the samples of one shard: offset, size and label of each image.

In a WebDataset tar, consecutive members whose names are equal up to the first dot form a sample. Damage to the tar is
an error; a sample that cannot be used is left out and reported. A .beton is accepted or refused as a whole.
"""

import os
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from byolt.pipelines.formats import tar
from byolt.pipelines.formats.beton import BetonSource
from byolt.pipelines.formats.encoded import MAX_BYTES, inspect

IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png"))
UNLABELED = -1
SAMPLE = np.dtype(
    [
        ("shard", "<u4"),  # index into Manifest.shards
        ("label", "<i4"),  # index into Manifest.classes, or UNLABELED
        ("offset", "<u8"),  # bytes from the start of the shard to the encoded image
        ("length", "<u4"),  # bytes
        ("height", "<u4"),  # pixels as stored, EXIF orientation ignored
        ("width", "<u4"),
        ("crc32", "<u4"),  # of the encoded image: locates damage by sample, not only by shard
    ]
)  # 32 bytes


class Index(NamedTuple):
    """The contents of one tar.

    Attributes:
        records: SAMPLE records in the order of the tar, shape (samples,), with `shard` 0.
        refused: Key and reason, with the offset, of each unusable sample.
        imageless: Number of keys without an image that we read: captions, readme files, other image formats.
    """

    records: np.ndarray
    refused: list[tuple[str, str]]
    imageless: int


def index_tar(path: str | os.PathLike[str]) -> Index:
    """Reads a tar once; a sample is one .jpg, .jpeg or .png and optionally a .cls with an integer.

    Other members of a sample, folders, hidden files and names that start with two underscores are skipped.

    Raises:
        ValueError: Not a regular file, or a damaged or cut tar (see `tar.walk`); names the tar and the offset.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    records = []
    refused = []
    imageless = 0
    seen: set[str] = set()
    with tar.opened(path) as descriptor:
        for key, group in groupby(keyed_members(path, descriptor), lambda item: item[0]):
            members = list(group)
            try:
                if key in seen:
                    raise ValueError("its key occurs twice (a key ends at the first dot of a name)")
                record = _record(path, descriptor, members)
            except ValueError as error:
                refused.append((key, f"offset {members[0][2].header}: {error}"))
            else:
                records += [record] if record else []
                imageless += record is None
            seen.add(key)
    return Index(np.array(records, SAMPLE), refused, imageless)


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


def keyed_members(path: Path, descriptor: int) -> Iterator[tuple[str, str, tar.Member]]:
    """The members that can belong to a sample: key with its folder, lower-case extension, member."""
    for member in tar.walk(path, descriptor):
        folder, _, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if member.kind != "folder" and stem and dot and not base.startswith("__"):
            yield (f"{folder}/{stem}" if folder else stem), extension.lower(), member


def _record(
    path: Path, descriptor: int, members: list[tuple[str, str, tar.Member]]
) -> tuple[int, ...] | None:
    """The record of one sample, or None if it has no image; raises ValueError if it cannot be used."""
    images = [member for _, extension, member in members if extension in IMAGE_EXTENSIONS]
    labels = [member for _, extension, member in members if extension == "cls"]
    if not images:
        for _, extension, member in members:
            if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                raise ValueError(
                    f"WebDataset does not see {member.name!r} as an image, since extensions begin at the first dot: "
                    "rename such files without further dots"
                )
        return None
    if len(images) > 1 or len(labels) > 1:
        found = ", ".join(sorted(extension for _, extension, _ in members))
        raise ValueError(f"it needs one image and at most one label, it has: {found}")
    for member in images + labels:
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise ValueError(f"unsafe member name {member.name!r}")
        if member.kind != "file":
            raise ValueError(f"{member.name!r} is a {member.kind}, not a file")
    image = images[0]
    if image.length > MAX_BYTES:
        raise ValueError(f"{image.length:,} bytes: an image has at most {MAX_BYTES:,}")
    data = tar.read_at(path, descriptor, image.length, image.offset)
    header = inspect(data)
    label = (
        _label(tar.read_at(path, descriptor, min(labels[0].length, 64), labels[0].offset))
        if labels
        else UNLABELED
    )
    return 0, label, image.offset, image.length, header.height, header.width, zlib.crc32(data)


def _label(text: bytes) -> int:
    """The class number in a .cls; -1 for none."""
    if text.strip() == b"-1":
        return UNLABELED
    if not text.strip().isdigit() or int(text) > np.iinfo(np.int32).max:
        raise ValueError(f"its label is {text!r}, not an integer")
    return int(text)
