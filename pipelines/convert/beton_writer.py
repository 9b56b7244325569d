"""Writes a .beton without ffcv: fields image, label and key; a JPEG as it is, a PPM as raw pixels.

    header | fields | metadata, room for all | zeros | pages ... | allocation table

The data of a sample are within one page. The header states the number of samples, so it is written last.
"""

import json
from typing import Any, BinaryIO

import numpy as np

from byolt.pipelines.formats.beton import (
    ALLOCATION,
    FIELD,
    HEADER,
    IMAGE_TYPE,
    INT_TYPE,
    JPEG,
    JSON_TYPE,
    LARGEST_SIDE,
    RAW,
    TYPES,
    VERSION,
)
from byolt.pipelines.formats.encoded import inspect, ppm_pixels

PAGE_SIZE = 1 << 23  # bytes: ffcv's default
_LARGEST_PAGE = 1 << 31  # the header has 32 bits for it
_FIELDS = np.array([(IMAGE_TYPE, b"image", b""), (INT_TYPE, b"label", b""), (JSON_TYPE, b"key", b"")], FIELD)
_RECORD = np.dtype([(f"f{k}", TYPES[kind][1]) for k, kind in enumerate(_FIELDS["type"].tolist())], align=True)
_METADATA = HEADER.itemsize + _FIELDS.nbytes  # offset


class PageTooSmallError(Exception):
    """A sample is larger than a page: write the file again with `page_size`."""

    def __init__(self, page_size: int) -> None:
        super().__init__(f"a sample needs a page of {page_size:,} bytes")
        self.page_size = page_size


def page_size_for(size: int) -> int:
    """The size of a page for samples of up to `size` bytes: a power of two.

    Raises:
        ValueError: No page is that large.
    """
    page_size = max(PAGE_SIZE, 1 << (size - 1).bit_length())
    if page_size > _LARGEST_PAGE:
        raise ValueError(f"{size:,} bytes: a page of a .beton has at most {_LARGEST_PAGE:,}")
    return page_size


class BetonWriter:
    """Adds samples to an open, empty file; `finish` completes it."""

    def __init__(self, file: BinaryIO, capacity: int, page_size: int = PAGE_SIZE) -> None:
        """
        Args:
            file: Writable and seekable, at its start.
            capacity: The largest number of samples.
            page_size: Bytes, a power of two from 2 MiB to 2 GiB.
        """
        self._file, self._page_size = file, page_size
        self._metadata = np.zeros(capacity, _RECORD)
        self._table = np.zeros(2 * capacity, ALLOCATION)
        self._at = self._next_page(_METADATA + self._metadata.nbytes)
        self.count = 0

    def _next_page(self, offset: int) -> int:
        return -(-offset // self._page_size) * self._page_size

    def add(self, key: str, data: bytes, label: int, info: dict[str, Any]) -> None:
        """Writes one sample.

        Args:
            key: The field `key` is the JSON {"key": key, **info}.
            data: A JPEG, or a PPM in the form of `encoded.inspect`, whose pixels are stored raw.
            label: -1 for none.
            info: Serializable to JSON.

        Raises:
            PageTooSmallError: The sample is larger than a page.
            ValueError: It is neither a JPEG nor a PPM, has a side above LARGEST_SIDE, or is larger than any page.
        """
        image = inspect(data)
        if image.format not in ("jpeg", "ppm"):
            raise ValueError(f"a .beton cannot hold a {image.format}")
        if max(image.height, image.width) > LARGEST_SIDE:
            raise ValueError(f"{image.height} x {image.width}: a side has at most {LARGEST_SIDE} pixels")
        mode = RAW if image.format == "ppm" else JPEG
        body = ppm_pixels(data, image) if mode == RAW else data
        note = json.dumps({"key": key, **info}).encode() + b"\0"
        size = len(body) + len(note)
        if size > self._page_size:
            raise PageTooSmallError(page_size_for(size))
        if self._at + size > self._next_page(self._at + 1):
            self._at = self._next_page(self._at)
        self._file.seek(self._at)  # bytes that are skipped read as zeros
        self._file.write(body)
        self._file.write(note)
        i, at, after = self.count, self._at, self._at + len(body)
        self._metadata[i] = (mode, image.width, image.height, at), label, (after, len(note))
        self._table[2 * i : 2 * i + 2] = [(i, at, len(body)), (i, after, len(note))]
        self._at += size
        self.count += 1

    def finish(self) -> None:
        """Writes the allocation table, the metadata and the header."""
        table = self._next_page(self._at)
        self._file.seek(table)
        self._file.write(self._table[: 2 * self.count].tobytes())
        self._file.seek(HEADER.itemsize)
        self._file.write(_FIELDS.tobytes())
        self._file.write(self._metadata.tobytes())
        self._file.seek(0)
        header = np.array((VERSION, len(_FIELDS), self._page_size, self.count, table), HEADER)
        self._file.write(header.tobytes())
