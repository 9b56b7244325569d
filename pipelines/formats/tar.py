"""Lists the members of a tar with their offsets, strictly: any damage is a ValueError with the tar and the offset.

`tarfile` and the webdataset package accept a tar that was cut at a member boundary and silently lose the rest. Reading
the offsets by `tarfile` also takes 3.3 times as long (18.1 µs a member, 5.4 here), and indexing a shard 1.7 times.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from byolt.files.regular import open_regular

BLOCK = 512
_ZEROS = bytes(BLOCK)
_REGULAR = frozenset("0\0" + "7")
_KINDS = {"1": "hard link", "2": "symbolic link", "3": "device", "4": "device", "5": "folder", "6": "fifo"}
_EXTENSIONS = frozenset("LKxg")  # GNU long name and long link, PAX for one member and for all that follow
_MAX_EXTENSION = 1 << 20  # bytes; a name longer than this is damage


class Member(NamedTuple):
    """One member, with the offsets of its header and its data in bytes.

    `kind` is "file", "folder", "hard link", ...; `link` is the target of a link.
    """

    name: str
    kind: str
    header: int
    offset: int
    length: int
    link: str = ""


class Tar:
    """An uncompressed tar (ustar, GNU or PAX), open for reading until the end of the with block."""

    def __init__(self, path: Path, name: Path | None = None) -> None:
        """`name` is what errors call it; by default its path."""
        self.name = name or path
        self._descriptor = open_regular(path)

    def __enter__(self) -> "Tar":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, length: int, offset: int) -> bytes:
        """`os.pread` whose OSError names the tar."""
        try:
            return os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.name)) from None

    def walk(self, start: int = 0, end: int | None = None) -> Iterator[Member]:
        """Yields the members in order; of a tar within it, from its first header to the byte behind it.

        Raises:
            ValueError: The tar is cut inside a header or data, or at a member boundary (no end-of-archive block), a
                header's checksum is wrong, or data follow the end of the archive.
            OSError: It cannot be read; names the tar.
        """
        size = os.fstat(self._descriptor).st_size if end is None else end
        at = start
        long_name: str | None = None
        long_link: str | None = None
        long_size: int | None = None
        while True:
            header = self.read(max(0, min(BLOCK, size - at)), at)
            if not header:
                raise self._problem(at, "cut at a member boundary: the end-of-archive block is missing")
            if len(header) < BLOCK:
                raise self._problem(at, f"cut inside a header: {len(header)} of {BLOCK} bytes")
            if header == _ZEROS:
                self._check_only_zeros(at, size)
                return
            if not _checksum_holds(header):
                raise self._problem(at, "header checksum is wrong: damaged, or not an uncompressed tar")
            flag = chr(header[156])
            length = self._number(at, header[124:136])
            if flag not in _EXTENSIONS and long_size is not None:
                length = long_size
            if flag in _KINDS:
                length = 0  # whatever the header states: the next header follows
            offset = at + BLOCK
            if flag == "S":
                offset = self._behind_sparse_map(header, offset)
            if offset + length > size:
                raise self._problem(at, f"cut inside a member's data: {size - offset} of {length} bytes")
            if flag in _EXTENSIONS:
                if length > _MAX_EXTENSION:
                    raise self._problem(at, f"extension header of {length} bytes")
                extension = self.read(length, offset)
                if flag == "L":
                    long_name = _text(extension.rstrip(b"\0"))
                elif flag == "K":
                    long_link = _text(extension.rstrip(b"\0"))
                elif flag == "x":
                    records = self._pax_records(at, extension)
                    long_name = records.get("path", long_name)
                    long_link = records.get("linkpath", long_link)
                    long_size = int(records["size"]) if "size" in records else long_size
            else:
                kind = "file" if flag in _REGULAR else _KINDS.get(flag, f"member of type {flag!r}")
                name = long_name if long_name is not None else _name(header)
                link = long_link if long_link is not None else _text(header[157:257].split(b"\0", 1)[0])
                yield Member(name, kind, at, offset, length, link)
                long_name = long_link = long_size = None
            at = offset + (length + BLOCK - 1) // BLOCK * BLOCK

    def _behind_sparse_map(self, header: bytes, offset: int) -> int:
        """The end of the map of a GNU sparse file (type S): byte 504 of each block states whether another follows."""
        extended = header[482]
        while extended:
            block = self.read(BLOCK, offset)
            if len(block) < BLOCK:
                raise self._problem(offset, "cut inside the map of a sparse file")
            extended = block[504]
            offset += BLOCK
        return offset

    def _number(self, at: int, field: bytes) -> int:
        """Octal text, or base 256 where the first bit is set (sizes of 8 GiB and more)."""
        if field[0] & 0x80:
            return int.from_bytes(bytes((field[0] & 0x7F,)) + field[1:], "big")
        try:
            value = int(field.strip(b" \0") or b"0", 8)
        except ValueError:
            value = -1
        if value < 0:
            raise self._problem(at, f"header states the size {field!r}")
        return value

    def _pax_records(self, at: int, data: bytes) -> dict[str, str]:
        """Records "LENGTH key=value\\n", LENGTH counting the whole record (POSIX.1-2001, pax)."""
        records = {}
        start = 0
        while start < len(data) and data[start]:
            space = data.find(b" ", start, start + 20)
            length = int(data[start:space]) if space > 0 and data[start:space].isdigit() else 0
            key, equals, value = data[space + 1 : start + length].partition(b"=")
            if length < 5 or start + length > len(data) or not equals or not value.endswith(b"\n"):
                raise self._problem(at, "damaged PAX header")
            if key == b"size" and not value[:-1].isdigit():
                raise self._problem(at, f"PAX header states the size {value[:-1]!r}")
            records[_text(key)] = _text(value[:-1])
            start += length
        return records

    def _check_only_zeros(self, at: int, end: int) -> None:
        """Refuses data after the end of the archive (concatenated tars), which readers would lose."""
        while chunk := self.read(max(0, min(1 << 20, end - at)), at):
            if chunk.count(0) != len(chunk):
                raise self._problem(at, "data after the end of the archive (concatenated tars?)")
            at += len(chunk)

    def _problem(self, offset: int, what: str) -> ValueError:
        return ValueError(f"{self.name}: offset {offset}: {what}")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = _text(header[:100].split(b"\0", 1)[0])
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""  # GNU has no prefix
    return f"{_text(prefix)}/{name}" if prefix else name


def _checksum_holds(header: bytes) -> bool:
    """Whether the sum of all header bytes, with the checksum field as spaces, is the stated one."""
    try:
        stated = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    return sum(header) - sum(header[148:156]) + 8 * 32 == stated
