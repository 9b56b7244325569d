"""FFCV's .beton files as a source, without ffcv: version 2 of the format, as ffcv 0.0.3 to 1.0.2 write it.

    header 24 B | fields, 1,041 B each | one metadata record per sample | pages of data | allocation table

A record contains an image's mode, size and pointer; its length in bytes is only in the allocation table, which is
joined by pointer. Opening checks everything, in pieces, so that memory use does not grow with the file.
"""

import bisect
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from byolt.files import stop
from byolt.files.console import shown
from byolt.files.paths import MissingDataError, expand_pattern, searched
from byolt.files.regular import open_regular
from byolt.pipelines.formats.beton_index import read_indexes, stale_index
from byolt.pipelines.formats.encoded import are_others, check_unchanged, checksum, ppm_header, spots

VERSION = 2
# table: byte offset of the allocation table, which extends to the end of the file.
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")]
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])  # packed: 13 B
REGION = np.dtype([("pointer", "<u8"), ("size", "<u8")])
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
LARGEST_SIDE = 0xFFFF  # pixels: IMAGE has 16 bits for each
JPEG, RAW = 0, 1  # IMAGE's mode; raw: height x width x RGB, uint8
INT_TYPE, IMAGE_TYPE, JSON_TYPE = 1, 2, 5
TYPES: dict[int, tuple[str, np.dtype]] = {
    0: ("float", np.dtype("<f8")),
    INT_TYPE: ("int", np.dtype("<i8")),
    IMAGE_TYPE: ("RGB image", IMAGE),
    3: ("bytes", REGION),
    4: ("array", np.dtype("<u8")),
    JSON_TYPE: ("json", REGION),
    6: ("tensor", np.dtype("<u8")),
}  # the entry of a field in a metadata record, by the field's type

_PIECE = 1 << 14  # records per read
WHOLE = 1 << 30  # bytes up to which the fingerprint covers every image: 5 s from a disk of 215 MB/s
SAMPLED = 4096  # images of larger files that it covers: one changed in 1,000 is noticed with 98 % probability
_FORMERLY = 64  # images that it covered in earlier releases
_READERS = 8  # threads that read for the fingerprint
_TOGETHER = 512  # images that one of them reads
_MAX_NOTE = 1 << 20  # bytes of a sample's JSON; more is damage
_REMEDY = "copy the file again, or write it again"


class BetonSource:
    """One or several .beton files as one data set; see `sources.Source`. A cut file is an error, not SIGBUS.

    The image is the first RGB image field and the label the first int field, unless they are named. `read` returns a
    JPEG as stored, and raw pixels with a PPM header, which every decoder reads.

    Attributes:
        offsets: int64 (len,), bytes from the start of the file to the image; lengths likewise.
        raw: bool (len,), whether an image is stored as raw pixels.
        ends: The number of samples in the files up to and including each.
        checksums: Known from an index beside each file, or once the fingerprint of at most WHOLE bytes was asked for.
    """

    classes: list[str] | None = None  # the format has no names for labels

    def __init__(
        self, paths: Sequence[str | os.PathLike[str]], image: str | None = None, label: str | None = None
    ) -> None:
        """Opens the files.

        Raises:
            ValueError: A file is missing, not a .beton of version 2, unfinished, cut short, lacks a field, has a field
                of a custom type or an index of another file, or an image is not where the file states; names file and
                sample.
        """
        self.paths = [os.fspath(path) for path in paths]
        self._fields = image, label
        self._descriptors: list[int] = []
        layouts = []
        for path in self.paths:
            self._descriptors.append(_open(path))
            layouts.append(_layout(path, self._descriptors[-1], image, label))
        self._layouts = layouts
        self.ends = list(itertools.accumulate(layout.samples for layout in layouts))
        total = self.ends[-1]
        self.labels = np.full(total, -1, np.int64)
        self.heights, self.widths = np.empty(total, np.int64), np.empty(total, np.int64)
        self.offsets, self.lengths = np.empty(total, np.int64), np.empty(total, np.int64)
        self.raw = np.empty(total, bool)
        for layout, end in zip(layouts, self.ends, strict=True):
            rows = slice(end - layout.samples, end)
            self._read_metadata(layout, rows)
            self._read_sizes(layout, rows)
        counts = [layout.samples for layout in layouts]
        self.checksums: npt.NDArray[np.uint64] | None = read_indexes(self.paths, counts)
        if replaced := self._replaced():
            raise stale_index(replaced)
        self.proven = self.checksums is not None  # verify_shards decodes before it writes an index

    def _replaced(self) -> str | None:
        """The first file whose images are others than those of the checksums, by all lengths and some of the bytes."""
        for path, layout, end in zip(self.paths, self._layouts, self.ends, strict=True):
            rows = slice(end - layout.samples, end)
            if self.checksums is not None:
                some = spots(rows.start, layout.samples)
                differ = are_others(map(self._stored, some), self.checksums[some].tolist())
                if differ or not np.array_equal(self.checksums[rows] >> np.uint64(32), self.lengths[rows]):
                    return path
        return None

    def _read_metadata(self, layout: "_Layout", rows: slice) -> None:
        for first, piece in _pieces(layout, layout.record, layout.metadata, layout.samples):
            image = piece[layout.image]
            mode, pointer = image["mode"], image["pointer"]
            layout.refuse(first, mode > RAW, "its image is neither JPEG nor raw")
            layout.refuse(first, (image["height"] == 0) | (image["width"] == 0), "its image has no pixels")
            layout.refuse(first, pointer < layout.metadata_end, "its image is inside the header")
            layout.refuse(first, pointer >= layout.table, "its image is beyond the data")
            part = slice(rows.start + first, rows.start + first + len(piece))
            self.heights[part], self.widths[part] = image["height"], image["width"]
            self.offsets[part], self.raw[part] = pointer, mode == RAW
            if layout.label is not None:
                self.labels[part] = piece[layout.label]

    def _read_sizes(self, layout: "_Layout", rows: slice) -> None:
        """Joins the allocation table to the images by pointer.

        Its rows are unordered, and an empty region shares the pointer of the next one: the largest size counts.
        """
        starts = np.sort(np.append(self.offsets[rows], layout.table))  # np.unique takes .4 s of a million
        starts = starts[np.append(True, starts[1:] != starts[:-1])]
        found = np.zeros(len(starts), np.uint64)
        for _, piece in _pieces(layout, ALLOCATION, layout.table, layout.allocations):
            pointer = piece["pointer"].view(np.int64)
            place = np.minimum(np.searchsorted(starts, pointer), len(starts) - 1)
            hit = starts[place] == pointer
            np.maximum.at(found, place[hit], piece["size"][hit])
        for first in range(0, layout.samples, _PIECE):
            part = slice(rows.start + first, min(rows.start + first + _PIECE, rows.stop))
            place = np.searchsorted(starts, self.offsets[part])
            size, room = found[place], starts[place + 1] - starts[place]
            layout.refuse(first, size == 0, "its image has no bytes in the allocation table")
            outside = size > room.view(np.uint64)
            layout.refuse(first, outside, "its image extends into the next, or beyond the data")
            self.lengths[part] = size
            unfit = self.raw[part] & (self.lengths[part] != 3 * self.heights[part] * self.widths[part])
            layout.refuse(first, unfit, "its raw image does not have 3 x height x width bytes")

    @cached_property
    def fingerprint(self) -> str:
        """Digest of labels, sizes and images, independent of their place and the number of files.

        It covers every image if there is an index or their bytes are at most WHOLE, else SAMPLED ones.
        """
        if self.checksums is None and self.lengths.sum() <= WHOLE:
            self.checksums = self._read_checksums(range(len(self)))
        return self._sampled_fingerprint() if self.checksums is None else self._digest(self.checksums.data)

    @cached_property
    def former_fingerprints(self) -> list[str]:
        formerly = np.linspace(0, len(self) - 1, min(_FORMERLY, len(self))).astype(int).tolist()
        images = (self._with_header(i, self._stored(i)) for i in formerly)
        return [self._sampled_fingerprint(), self._digest(*images)]

    def _sampled_fingerprint(self) -> str:
        shuffled = np.random.RandomState(0).permutation(len(self))  # the same in every version of numpy
        return self._digest(self._read_checksums(np.sort(shuffled[:SAMPLED]).tolist()).data)

    def _digest(self, *images: bytes | memoryview) -> str:
        digest = hashlib.sha256()
        for column in (self.labels, self.heights, self.widths, self.lengths, self.raw):
            digest.update(column.data)
        for part in images:
            digest.update(part)
        return digest.hexdigest()

    def _read_checksums(self, ids: Sequence[int]) -> npt.NDArray[np.uint64]:
        def read(part: Sequence[int]) -> npt.NDArray[np.uint64]:
            stop.check()
            return np.fromiter((checksum(self._stored(i)) for i in part), np.uint64, len(part))

        with ThreadPoolExecutor(_READERS) as pool:
            parts = [ids[first : first + _TOGETHER] for first in range(0, len(ids), _TOGETHER)]
            return np.concatenate(list(pool.map(read, parts)))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> bytes:
        return self._with_header(i, self.region(i))

    def _with_header(self, i: int, data: bytes) -> bytes:
        return ppm_header(self.heights[i], self.widths[i]) + data if self.raw[i] else data

    def region(self, i: int) -> bytes:
        """Image `i` as stored: a JPEG, or raw pixels without a header; raises as `sources.Source.read`."""
        data = self._stored(i)
        if self.checksums is not None:
            check_unchanged(data, self.checksums[i])
        return data

    def _stored(self, i: int) -> bytes:
        length = int(self.lengths[i])
        try:
            data = os.pread(self._descriptors[self._locate(i)[0]], length, int(self.offsets[i]))
        except OSError as error:
            raise OSError(error.errno, f"{self.describe(i)}: {error.strerror}") from error
        if len(data) != length:
            raise OSError(
                f"{self.describe(i)}: read {len(data)} of {length} bytes: the file was cut since it was opened"
            )
        return data

    def note(self, i: int) -> bytes:
        """The first JSON field of sample `i`, without its final zero; empty if the file has none.

        Raises:
            ValueError: It is outside the data.
        """
        file, number = self._locate(i)
        layout = self._layouts[file]
        if layout.note is None:
            return b""
        place = layout.metadata + number * layout.record.itemsize
        record = np.frombuffer(os.pread(layout.descriptor, layout.record.itemsize, place), layout.record)[0]
        pointer, size = record[layout.note].item()
        if size > _MAX_NOTE or pointer < layout.metadata_end or pointer + size > layout.table:
            raise ValueError(f"{self.describe(i)}: its JSON is outside the data: {_REMEDY}")
        return os.pread(layout.descriptor, size, pointer).rstrip(b"\0")

    def unread_fields(self) -> list[str]:
        """Names of the fields that are neither image nor label nor note, as "file: field"."""
        return [f"{layout.path}: {name}" for layout in self._layouts for name in layout.unread]

    def describe(self, i: int) -> str:
        file, number = self._locate(i)
        return f"{self.paths[file]} sample {number}"

    def _locate(self, i: int) -> tuple[int, int]:
        """Index of the file that contains sample `i`, and the sample's number in it."""
        i = range(len(self))[i]
        file = bisect.bisect_right(self.ends, i)
        return file, i - (self.ends[file - 1] if file else 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return BetonSource, (self.paths, *self._fields)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", ()):
            os.close(descriptor)


class _Layout(NamedTuple):
    """The structure of one file, from its header and fields; offsets and sizes in bytes."""

    path: str
    descriptor: int
    samples: int
    record: np.dtype  # of the metadata
    image: str  # member of `record`
    label: str | None
    note: str | None  # the first JSON field
    unread: list[str]  # names of all other fields
    metadata: int  # offset
    metadata_end: int
    table: int  # offset of the allocation table
    allocations: int

    def refuse(self, first: int, bad: npt.NDArray[np.bool_], reason: str) -> None:
        """Raises ValueError if any of the samples from `first` on is bad."""
        if bad.any():
            sample = first + int(bad.argmax())
            raise ValueError(f"{self.path} sample {sample}: {reason}: {_REMEDY}")


def split_path(text: str) -> tuple[list[str], dict[str, str]]:
    """ "a.beton,b.beton?image=img&label=cls" -> ["a.beton", "b.beton"], {"image": "img", "label": "cls"}.

    Raises:
        ValueError: The part after the question mark is not image=FIELD, label=FIELD or both, or a pattern of files
            matches none.
    """
    names, mark, query = (text, "", "") if os.path.exists(text) else text.partition(".beton?")
    names += mark[:-1]
    fields = dict(part.partition("=")[::2] for part in query.split("&")) if mark else {}
    if not (fields.keys() <= {"image", "label"} and all(fields.values())):
        raise ValueError(
            f"data path {text!r}: after the question mark write image=FIELD, label=FIELD, or both joined by &"
        )
    if os.path.exists(names):
        return [names], fields
    parts = re.split(r",(?![^{}]*\})", names)  # commas outside braces
    return [file for part in parts for file in expand_pattern(part.strip())], fields


def _open(path: str) -> int:
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise MissingDataError(
            f"data path {path!r} does not exist{searched(path)}: name a .beton file that does"
        ) from None
    except OSError as error:
        raise ValueError(f"data path {path!r} cannot be read: {error.strerror}") from None


def _layout(path: str, descriptor: int, image: str | None, label: str | None) -> _Layout:
    try:
        size = os.fstat(descriptor).st_size
        start = os.pread(descriptor, HEADER.itemsize, 0)
    except OSError as error:
        raise ValueError(f"data path {path!r} cannot be read: {error.strerror}") from None

    def refuse(bad: bool, problem: str) -> None:
        if bad:
            raise ValueError(f"{path} {problem}")

    short = f"is cut short inside the header ({size:,} bytes): {_REMEDY}"
    refuse(len(start) < HEADER.itemsize, short)
    header = np.frombuffer(start, HEADER)[0]
    version, num_fields, samples, table = (int(header[k]) for k in ("version", "fields", "samples", "table"))
    stated = f"is not a .beton of version {VERSION}, but states version {version}: write it with ffcv 1.0"
    refuse(version != VERSION, stated)
    metadata = HEADER.itemsize + num_fields * FIELD.itemsize
    fields = os.pread(descriptor, metadata - HEADER.itemsize, HEADER.itemsize)
    refuse(len(fields) < metadata - HEADER.itemsize, short)
    members = _members(path, np.frombuffer(fields, FIELD), image, label)
    record = members[0]
    refuse(not samples, "has no samples: write it again")
    metadata_end = metadata + samples * record.itemsize
    unfinished = "has no allocation table: its writer was stopped before the end: write it again"
    refuse(table in (0, size), unfinished)
    refuse(table < metadata_end, f"is damaged: its allocation table is inside the header: {_REMEDY}")
    refuse(
        table > size or (size - table) % ALLOCATION.itemsize != 0,
        f"is cut short: it has {size:,} bytes, its allocation table begins at {table:,} and has rows of "
        f"{ALLOCATION.itemsize}: {_REMEDY}",
    )
    rows = (size - table) // ALLOCATION.itemsize
    return _Layout(path, descriptor, samples, *members, metadata, metadata_end, table, rows)


def _members(
    path: str, fields: np.ndarray, image: str | None, label: str | None
) -> tuple[np.dtype, str, str | None, str | None, list[str]]:
    """The metadata record, its members for image, label and JSON, and the names of the other fields."""
    names = [name.decode("ascii", "replace") for name in fields["name"].tolist()]
    types = fields["type"].tolist()
    for name, kind in zip(names, types, strict=True):
        if kind not in TYPES:
            raise ValueError(
                f"{path}: field {name!r} has the custom type {kind}, whose size the file does not state: "
                "write it again without that field"
            )
    found = shown(f"{name!r} ({TYPES[kind][0]})" for name, kind in zip(names, types, strict=True))

    def place(wanted: int, name: str | None) -> int | None:
        for k, kind in enumerate(types):
            if kind == wanted and name in (None, names[k]):
                return k
        if name is None and wanted != IMAGE_TYPE:
            return None
        raise ValueError(
            f"{path} has no {TYPES[wanted][0]} field{f' named {name!r}' if name else ''}, only "
            f"{found or 'none at all'}: name another {'field' if name else 'file'}"
        )

    places = place(IMAGE_TYPE, image), place(INT_TYPE, label), place(JSON_TYPE, None)
    record = np.dtype([(f"f{k}", TYPES[kind][1]) for k, kind in enumerate(types)], align=True)
    of_image, of_label, of_note = (None if k is None else f"f{k}" for k in places)
    assert of_image is not None  # `place` raised
    return record, of_image, of_label, of_note, [name for k, name in enumerate(names) if k not in places]


def _pieces(layout: _Layout, dtype: np.dtype, offset: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields `count` records from byte `offset` on in pieces, each with the number of its first record."""
    for first in range(0, count, _PIECE):
        stop.check()
        length = min(_PIECE, count - first) * dtype.itemsize
        data = os.pread(layout.descriptor, length, offset + first * dtype.itemsize)
        if len(data) < length:
            raise ValueError(f"{layout.path} was cut while it was being opened: {_REMEDY}")
        yield first, np.frombuffer(data, dtype)
