"""Reads the header of an encoded image and checks that its bytes are complete, without decoding it.

Every image passes this check before it is decoded: DALI's CPU decoder ends the process (SIGSEGV) on empty or non-image
samples in batches of 64 and more. Damage to the pixels is found by decoding, which convert/rules.py does.
"""

import re
import zlib
from collections.abc import Iterable
from typing import NamedTuple

MAX_BYTES = 1 << 30  # of one encoded image
MAX_PIXELS = 178_956_970  # where PIL raises DecompressionBombError by default: 2 * (1 GiB / 4 / 3)
MAX_SIDE = 65500  # pixels of an image that is encoded: JPEG_MAX_DIMENSION of libjpeg

_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = frozenset((b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP"))
_PPM = b"P6"
_PPM_HEADER = re.compile(rb"P6\n([1-9]\d{0,4}) ([1-9]\d{0,4})\n255\n")  # width, height: see ppm_header
_EOI = b"\xff\xd9"
_IEND = b"IEND\xaeB`\x82"
_TAIL = 65536  # bytes at the end that are searched first for the end marker
_SOF = frozenset((0xC0, 0xC1, 0xC2, 0xC9, 0xCA))  # Huffman and arithmetic, sequential and progressive
_SOF_UNSUPPORTED = frozenset((0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF))  # lossless, hierarchical
_STANDALONE = frozenset((0x01, *range(0xD0, 0xD8)))  # TEM and RST0..7 carry no length
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by color type; a palette holds RGB


class ImageHeader(NamedTuple):
    """Format, size as stored in pixels (EXIF orientation is ignored), channels and bits per channel."""

    format: str
    height: int
    width: int
    channels: int
    bits: int


def inspect(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Reads the header of a JPEG, PNG or binary PPM and checks that its end marker is present.

    Bytes after the end marker are accepted: decoders ignore them. A PPM, raw pixels of a .beton, has no end marker:
    only the header that `ppm_header` writes is accepted, and the size must match to the byte.

    Raises:
        ValueError: The image is empty, cut short, not a JPEG, PNG or PPM, of zero size, of more than `max_pixels`, or a
            JPEG that no common decoder reads (lossless, hierarchical or 12-bit); the message is the reason.
    """
    if data[:2] == _JPEG:
        header = _inspect_jpeg(data)
    elif data[:8] == _PNG:
        header = _inspect_png(data)
    elif data[:2] == _PPM:
        header = _inspect_ppm(data)
    else:
        raise ValueError("not a JPEG or PNG" if data else "empty")
    pixels = header.height * header.width
    if not pixels:
        raise ValueError(f"zero size: {header.height} x {header.width}")
    if pixels > max_pixels:
        raise ValueError(f"{header.height} x {header.width} is above the limit of {max_pixels:,} pixels")
    return header


def for_pil(data: bytes) -> bytes:
    """The image for PIL: a PNG without text, EXIF and color profile, since PIL refuses more than 1 MB of them.

    Pixels do not depend on them. All other bytes stay.
    """
    if data[:8] != _PNG:
        return data
    kept = []
    start, at = 0, 8
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")  # with length, type and checksum
        if data[at + 4 : at + 8] in _PNG_METADATA:
            kept.append(data[start:at])
            start = end
        at = end
    return b"".join([*kept, data[start:]]) if kept else data


def check(data: bytes, height: int, width: int, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Inspects an image whose size is known from an index.

    Raises:
        ValueError: See `inspect`, or the image has another size; the message is the reason.
    """
    header = inspect(data, max_pixels)
    if (header.height, header.width) != (height, width):
        raise ValueError(f"is {header.height} x {header.width} pixels, and {height} x {width} by the index")
    return header


def checksum(data: bytes | memoryview) -> int:
    """Identifies the bytes of an encoded image: their number, and below it, in 32 bits, their crc32."""
    return len(data) << 32 | zlib.crc32(data)


def check_unchanged(data: bytes, expected: int) -> None:
    """Raises ValueError if the bytes of an image do not have the checksum that was indexed."""
    if checksum(data) != expected:
        raise ValueError("its bytes are not those that were indexed (crc32)")


def spots(first: int, count: int) -> list[int]:
    """Up to four of `count` samples from number `first` on, for `are_others`."""
    number = min(4, count)
    return [first + count * k // number for k in range(number)]


def are_others(images: Iterable[bytes], expected: Iterable[int]) -> bool:
    """Whether all of these images, two or more, have other checksums than were indexed: their file was replaced.

    Damage to some images of a shard is not enough. Of an undamaged shard one image is read.
    """
    others = 0
    for image, known in zip(images, expected, strict=False):
        if checksum(image) == known:
            return False
        others += 1
    return others > 1


def _inspect_jpeg(data: bytes) -> ImageHeader:
    """Walks the markers up to the first scan; an EXIF thumbnail is inside a segment and is skipped."""
    end = len(data)
    at = 2
    header = None
    while True:
        if at + 4 > end:
            raise ValueError("cut short: JPEG header has no image data")
        if data[at] != 0xFF:
            raise ValueError(f"damaged JPEG header: no marker at byte {at}")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xDA:  # start of scan
            break
        if marker in _STANDALONE:
            at += 2
            continue
        if marker == 0xD9:
            raise ValueError("JPEG ends before any image data")
        if marker in _SOF:
            if header is not None:
                raise ValueError("damaged JPEG header: two frame headers (SOF)")
            header = _frame_header(data, at)
        elif marker in _SOF_UNSUPPORTED:
            raise ValueError(f"lossless or hierarchical JPEG (SOF marker 0x{marker:02x})")
        length = data[at + 2] << 8 | data[at + 3]
        if length < 2:
            raise ValueError(f"damaged JPEG header: segment of {length} bytes at byte {at}")
        at += 2 + length
    if header is None:
        raise ValueError("damaged JPEG header: no frame header (SOF) before the image data")
    # Image data never contains FF D9. The whole file is searched only if its tail has none.
    if data.rfind(_EOI, max(at, end - _TAIL)) < 0 and data.find(_EOI, at) < 0:
        raise ValueError("cut short: JPEG has no end marker (EOI)")
    return header


def _frame_header(data: bytes, at: int) -> ImageHeader:
    if at + 10 > len(data):
        raise ValueError("cut short: inside the JPEG frame header (SOF)")
    bits = data[at + 4]
    channels = data[at + 9]
    if bits != 8:
        raise ValueError(f"{bits}-bit JPEG")
    if channels not in (1, 3, 4):
        raise ValueError(f"JPEG of {channels} channels")
    height = data[at + 5] << 8 | data[at + 6]
    width = data[at + 7] << 8 | data[at + 8]
    return ImageHeader("jpeg", height, width, channels, bits)


def _inspect_png(data: bytes) -> ImageHeader:
    if len(data) < 33:
        raise ValueError("cut short: inside the PNG header (IHDR)")
    if data[8:16] != b"\x00\x00\x00\rIHDR":
        raise ValueError("damaged PNG header: does not start with IHDR")
    width = int.from_bytes(data[16:20], "big")
    height = int.from_bytes(data[20:24], "big")
    bits, color = data[24], data[25]
    if color not in _PNG_CHANNELS or bits not in (1, 2, 4, 8, 16):
        raise ValueError(f"damaged PNG header: color type {color}, {bits} bits")
    if data.rfind(_IEND, max(33, len(data) - _TAIL)) < 0 and data.find(_IEND, 33) < 0:
        raise ValueError("cut short: PNG has no end chunk (IEND)")
    return ImageHeader("png", height, width, _PNG_CHANNELS[color], 8 if color == 3 else bits)


def ppm_header(height: int, width: int) -> bytes:
    """The header that makes raw pixels (height x width x RGB, uint8) an image that every decoder reads."""
    return b"P6\n%d %d\n255\n" % (width, height)


def ppm_pixels(data: bytes, header: ImageHeader) -> memoryview:
    """The raw pixels of an inspected PPM, height x width x RGB, uint8: a view of `data`, not a copy."""
    return memoryview(data)[-3 * header.height * header.width :]


def _inspect_ppm(data: bytes) -> ImageHeader:
    match = _PPM_HEADER.match(data)
    if not match:
        raise ValueError("PPM header is not 'P6', 'WIDTH HEIGHT' and '255' on a line each")
    width, height = map(int, match.groups())
    expected = match.end() + 3 * height * width
    if len(data) < expected:
        raise ValueError(
            f"cut short: PPM of {len(data):,} bytes, {height} x {width} pixels need {expected:,}"
        )
    if len(data) > expected:
        raise ValueError(f"PPM has {len(data) - expected:,} bytes after its pixels")
    return ImageHeader("ppm", height, width, 3, 8)
