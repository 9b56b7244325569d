"""What the header of an encoded image says, and whether its bytes are whole.

A decoder is handed bytes only after they passed here: DALI's CPU decoder ends the process (SIGSEGV) on empty
or non-image samples in batches of 64 and more. Nothing is decoded; a damaged interior is for `convert.prove`.
"""

import re
from typing import NamedTuple

MAX_PIXELS = 178_956_970  # where PIL raises DecompressionBombError by default: 2 * (1 GiB / 4 / 3)

_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG\r\n\x1a\n"
_PPM = b"P6"
# Width, height; as ppm_header writes it.
_PPM_HEADER = re.compile(rb"P6\n([1-9]\d{0,4}) ([1-9]\d{0,4})\n255\n")
_EOI = b"\xff\xd9"
_IEND = b"IEND\xaeB`\x82"
_TAIL = 65536  # bytes at the end that are searched for the end marker before the whole file is
_SOF = frozenset((0xC0, 0xC1, 0xC2, 0xC9, 0xCA))  # Huffman and arithmetic, sequential and progressive
_SOF_UNSUPPORTED = frozenset((0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF))  # lossless, hierarchical
_STANDALONE = frozenset((0x01, *range(0xD0, 0xD8)))  # TEM and RST0..7 carry no length
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by colour type; a palette holds RGB


class ImageHeader(NamedTuple):
    """Size as stored, in pixels (EXIF orientation is not applied), and bits per channel."""

    format: str
    height: int
    width: int
    channels: int
    bits: int


def inspect(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Reads the header of a JPEG, PNG or binary PPM and checks that its end is there.

    Bytes after the end marker are tolerated: decoders ignore them. A PPM, raw pixels of a .beton, has no end
    marker: its header is accepted in one form only, and its size must fit to the byte.

    Args:
        data: The whole encoded image.
        max_pixels: Largest height x width that is accepted.

    Raises:
        ValueError: Empty, not JPEG, PNG or PPM, cut short, zero size, more than `max_pixels`, or a kind that no
            common decoder reads (lossless or hierarchical JPEG, 12-bit JPEG); the message is the reason.
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


def check(data: bytes, height: int, width: int) -> ImageHeader:
    """The header of an image of the indexed size.

    Raises:
        ValueError: The bytes are no whole image (see `inspect`), or one of another size; the message is the reason.
    """
    header = inspect(data)
    if (header.height, header.width) != (height, width):
        raise ValueError(f"is {header.height} x {header.width} pixels, and {height} x {width} by the index")
    return header


def _inspect_jpeg(data: bytes) -> ImageHeader:
    """Walks the markers up to the first scan; an EXIF thumbnail lies inside a segment and is stepped over."""
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
    # Image data never holds FF D9. The whole file is searched only when its tail has none.
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
    bits, colour = data[24], data[25]
    if colour not in _PNG_CHANNELS or bits not in (1, 2, 4, 8, 16):
        raise ValueError(f"damaged PNG header: colour type {colour}, {bits} bits")
    if data.rfind(_IEND, max(33, len(data) - _TAIL)) < 0 and data.find(_IEND, 33) < 0:
        raise ValueError("cut short: PNG has no end chunk (IEND)")
    return ImageHeader("png", height, width, _PNG_CHANNELS[colour], 8 if colour == 3 else bits)


def ppm_header(height: int, width: int) -> bytes:
    """What stands before raw pixels (height x width x RGB, uint8) so that every decoder reads them."""
    return b"P6\n%d %d\n255\n" % (width, height)


def ppm_pixels(data: bytes, header: ImageHeader) -> memoryview:
    """The raw pixels of a whole PPM whose header was read, height x width x RGB, uint8: no copy, they keep `data`."""
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


MAX_BYTES = 1 << 30  # of one encoded image
