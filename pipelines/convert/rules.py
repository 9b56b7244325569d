"""The rules that turn an input image into a sample, and the check that an image decodes.

    JPEG, gray or color, small enough      passes byte for byte (EXIF stays; pixels are used as stored)
    JPEG above --max-size                  resized so that the longer side is that (Lanczos), JPEG --quality
    JPEG in CMYK or YCCK                   PIL's convert("RGB"), JPEG --quality
    PNG and all other FORMATS              first frame, alpha dropped as convert("RGB") does, JPEG --quality
    16 bits a channel                      the high byte, then as above
    anything else, damaged, too large      refused with the reason

A .beton stores a color PPM (P6) as raw pixels, whatever --raw-fraction is: raw images of another .beton arrive as PPMs
and stay raw. Of all other images the share --raw-fraction becomes raw.

The bytes of a file decide its format, never its name.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, features

from byolt.pipelines.formats.beton import LARGEST_SIDE
from byolt.pipelines.formats.encoded import MAX_PIXELS, MAX_SIDE, ImageHeader, for_pil, inspect, ppm_header
from byolt.pipelines.formats.proof import prove_jpeg

# PIL may have been built without the last two.
_OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000"}
FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"),
    *(name for name, feature in _OPTIONAL.items() if features.check(feature)),
)
_MAX_COMMENT = 65533  # bytes in a JPEG: a GIF may have more
_GRAY = frozenset(("1", "L", "LA"))
_SIXTEEN_BITS = frozenset(("I;16", "I;16L", "I;16B", "I;16N"))


def to_jpeg(
    data: bytes, *, max_size: int = 0, quality: int = 95, max_pixels: int = MAX_PIXELS, decode: bool = True
) -> bytes:
    """The sample made of one input file, which was fully decoded as a check.

    Args:
        data: The file's bytes.
        max_size: Longest side in pixels; 0 for no limit.
        quality: JPEG quality of a re-encoded image, 1 to 100; chroma is halved in both directions.
        max_pixels: Larger images are refused by their header, before decoding.
        decode: Whether to decode an image that passes byte for byte; if not, only its header and end are checked.

    Raises:
        ValueError: The image cannot be used; says why.
    """

    def encode(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        if len(image.info.get("comment", b"")) > _MAX_COMMENT:
            del image.info["comment"]
        image.save(buffer, "JPEG", quality=quality)
        return buffer.getvalue()

    header = _checked(data, max_pixels, decode)
    if header and header.format == "jpeg" and header.channels != 4 and _fits(header, max_size):
        return data
    return _reencode(data, max_size, max_pixels, encode)


def to_raw(data: bytes, *, max_size: int = 0, max_pixels: int = MAX_PIXELS, decode: bool = True) -> bytes:
    """As `to_jpeg`, but RGB pixels behind a PPM header, in the form of `encoded.inspect`, for a .beton."""

    def encode(image: Image.Image) -> bytes:
        return ppm_header(image.height, image.width) + image.convert("RGB").tobytes()

    header = _checked(data, max_pixels, decode)
    if header and header.format == "ppm" and _fits(header, max_size or LARGEST_SIDE):
        return data
    return _reencode(data, max_size, max_pixels, encode)


def _checked(data: bytes, max_pixels: int, decode: bool) -> ImageHeader | None:
    """The header of a whole JPEG or PPM; None if the image has to be re-encoded."""
    if not data:
        raise ValueError("empty")
    if data[:2] == b"\xff\xd8":
        header = inspect(data, max_pixels)
        if decode:
            prove(data, header)
        return header
    try:
        header = inspect(data, max_pixels)
    except ValueError:
        return None  # PIL reads more formats, and says what is wrong
    return header if header.format == "ppm" else None


def _fits(header: ImageHeader, max_size: int) -> bool:
    return not max_size or max(header.height, header.width) <= max_size


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """PIL's image, not yet decoded. Errors while it is open become a ValueError with the reason.

    No argument raises PIL's own limit of pixels. It is lifted only while the image is open: other code of the process
    may rely on it.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about palettes with alpha, unusual metadata
            with Image.open(io.BytesIO(for_pil(data)), formats=FORMATS) as image:
                yield image
    except MemoryError:
        raise  # not the image's fault: the run must not continue without it
    except Image.UnidentifiedImageError:
        raise ValueError(f"not an image ({', '.join(FORMATS)})") from None
    except Exception as error:  # PIL's readers raise far more than OSError on damaged bytes
        raise ValueError(str(error) or type(error).__name__) from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _reencode(data: bytes, max_size: int, max_pixels: int, encode: Callable[[Image.Image], bytes]) -> bytes:
    """Encodes the first frame, as 8-bit gray or RGB, shrunk to `max_size`."""
    with _opened(data) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.height} x {image.width} is above the limit of {max_pixels:,} pixels")
        if not max_size and max(image.size) > MAX_SIDE:
            raise ValueError(
                f"{image.height} x {image.width}: a side has at most {MAX_SIDE} pixels (set --max-size)"
            )
        image.load()
        plain = _eight_bits(image)
        if max_size and max(plain.size) > max_size:
            scale = max_size / max(plain.size)
            size = max(1, round(plain.width * scale)), max(1, round(plain.height * scale))
            plain = plain.resize(size, Image.Resampling.LANCZOS)
        return encode(plain)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray stays gray, all else becomes RGB. PIL takes the high byte of 16-bit color, but clips 16-bit gray at 255."""
    if image.mode in _SIXTEEN_BITS:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels have no defined range (mode {image.mode})")
    return image.convert("L" if image.mode in _GRAY else "RGB")


def prove(data: bytes, header: ImageHeader) -> None:
    """Decodes an image to check that it can be decoded and is not damaged.

    JPEG: see `proof.prove_jpeg`. PNG: PIL. A PPM that `inspect` accepted is whole.

    Raises:
        ValueError: With the decoder's reason.
    """
    if header.format == "png" or (header.format == "jpeg" and not prove_jpeg(data, header)):
        with _opened(data) as image:
            image.load()
