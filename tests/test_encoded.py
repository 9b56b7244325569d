"""Headers of encoded images: accepted with the right size, refused with the right reason."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from byolt.pipelines.convert.rules import prove, to_jpeg
from byolt.pipelines.formats.encoded import ImageHeader, check, inspect, ppm_header, ppm_pixels


def encode(
    mode: str = "RGB", size: tuple[int, int] = (40, 24), kind: str = "JPEG", **options: object
) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


WHOLE = encode()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (WHOLE, ("jpeg", 24, 40, 3, 8)),
        (encode("L"), ("jpeg", 24, 40, 1, 8)),
        (encode("CMYK"), ("jpeg", 24, 40, 4, 8)),
        (encode(size=(1, 1)), ("jpeg", 1, 1, 3, 8)),
        (encode(progressive=True), ("jpeg", 24, 40, 3, 8)),
        (encode(restart_marker_blocks=1), ("jpeg", 24, 40, 3, 8)),
        (encode(kind="PNG"), ("png", 24, 40, 3, 8)),
        (encode("RGBA", kind="PNG"), ("png", 24, 40, 4, 8)),
        (encode("P", kind="PNG"), ("png", 24, 40, 3, 8)),
        (encode("I;16", kind="PNG"), ("png", 24, 40, 1, 16)),
        (encode(kind="PPM"), ("ppm", 24, 40, 3, 8)),
    ],
)
def test_reads_the_header(data: bytes, expected: tuple[str, int, int, int, int]) -> None:
    assert inspect(data) == ImageHeader(*expected)


def test_exif_thumbnail_is_stepped_over() -> None:
    thumbnail = b"Exif\0\0" + encode(size=(8, 8))
    # with a fill byte before the marker
    data = WHOLE[:2] + b"\xff\xff\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + WHOLE[2:]
    assert inspect(data)[1:3] == (24, 40)
    with pytest.raises(ValueError, match="no end marker"):
        inspect(data[: len(data) - 20])  # the thumbnail's own end marker does not count


@pytest.mark.parametrize("tail", [b"\0" * 10, b"\xff" * 70_000, b"text" * 50_000])
def test_bytes_after_the_end_are_tolerated(tail: bytes) -> None:
    assert inspect(WHOLE + tail) == inspect(WHOLE)
    assert inspect(encode(kind="PNG") + tail)[1:3] == (24, 40)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "^empty$"),
        (b"hello", "not a JPEG or PNG"),
        (b"\xff\xd8", "cut short"),
        (b"\xff\xd8\xff\xd9", "cut short"),
        (b"\xff\xd8\xff\xd9\0\0", "ends before any image data"),
        (WHOLE.replace(b"\xff\xc0", b"\xff\xfe"), "no frame header"),
        (WHOLE.replace(b"\xff\xc0", b"\xff\xc3"), "lossless"),
        (WHOLE.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "12-bit"),
        (
            WHOLE.replace(b"\x08" + struct.pack(">HH", 24, 40), b"\x08" + struct.pack(">HH", 0, 40)),
            "zero size: 0 x 40",
        ),
        (WHOLE.replace(struct.pack(">HH", 24, 40), b"\xff\xdc\xff\xdc"), "above the limit of 178,956,970"),
        (encode(kind="PNG")[:-4], "no end chunk"),
        (encode(kind="PNG")[:20], "cut short"),
        (encode(kind="PPM")[:-1], "cut short: PPM of 2,892 bytes, 24 x 40 pixels need 2,893"),
        (encode(kind="PPM") + b"\n", "PPM has 1 bytes after its pixels"),
        (b"P6\n1 1\n65535\n" + bytes(6), "PPM header is not"),
        (b"P6\n1 1\n127\n" + bytes(3), "PPM header is not"),
        (b"P6\n0 1\n255\n", "PPM header is not"),
        (b"P6\n-1 1\n255\n", "PPM header is not"),
        (b"P6\n#\n1 1\n255\n" + bytes(3), "PPM header is not"),
        (b"P6 1 1 255\n" + bytes(3), "PPM header is not"),
        (b"P6", "PPM header is not"),
        (b"P5\n1 1\n255\n0", "not a JPEG or PNG"),
        (b"P6\n99999 99999\n255\n", "cut short"),
    ],
)
def test_refuses_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        inspect(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PPM"])
def test_every_cut_is_noticed(kind: str) -> None:
    data = encode(kind=kind)
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"cut short|empty|not a JPEG or PNG|no end|PPM header"):
            inspect(data[:length])


@given(st.binary(max_size=60), st.integers(0, len(WHOLE) - 1))
def test_any_bytes_give_a_header_or_a_value_error(junk: bytes, at: int) -> None:
    for data in (junk, b"\xff\xd8" + junk, b"P6\n" + junk, WHOLE[:at] + junk + WHOLE[at + len(junk) :]):
        try:
            header = inspect(data)
        except ValueError:
            continue
        assert header.height > 0
        assert header.width > 0


def test_real_photographs_agree_with_pil(shared_data: Path) -> None:
    files = sorted((shared_data / "imagenet-sample").glob("*.JPEG"))
    assert len(files) == 250
    for file in files:
        data = file.read_bytes()
        header = inspect(data)
        prove(data, header)
        with Image.open(io.BytesIO(data)) as image:
            assert (header.width, header.height) == image.size
            assert header.channels == len(image.getbands())


def test_proof_finds_damage_that_pil_does_not() -> None:
    data = encode(size=(400, 300), quality=90)
    zeroed = data[: len(data) // 2] + bytes(4096) + data[len(data) // 2 + 4096 :]
    for damaged in (data[: len(data) // 2] + b"\xff\xd9", zeroed):
        with Image.open(io.BytesIO(damaged)) as image:
            image.load()
        with pytest.raises(ValueError, match="Corrupt JPEG data"):
            to_jpeg(damaged)


def test_check_gives_the_header_and_pixels_lie_behind_it() -> None:
    pixels = bytes(range(24))
    data = ppm_header(2, 4) + pixels
    header = check(data, 2, 4)
    assert header == ("ppm", 2, 4, 3, 8)
    assert ppm_pixels(data, header) == pixels and ppm_pixels(data, header).obj is data
    with pytest.raises(ValueError, match="is 2 x 4 pixels, and 4 x 2 by the index"):
        check(data, 4, 2)


def test_max_pixels_is_the_only_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # PIL would refuse twice as many
    for data in (WHOLE, encode(kind="PNG"), encode(kind="BMP")):
        assert inspect(to_jpeg(data, max_pixels=24 * 40))[1:3] == (24, 40)
        with pytest.raises(ValueError, match="24 x 40 is above the limit of 959 pixels"):
            to_jpeg(data, max_pixels=24 * 40 - 1)
        assert Image.MAX_IMAGE_PIXELS == 10  # others of the process may rely on it


def test_sides_that_no_jpeg_has_are_refused_before_decoding() -> None:
    buffer = io.BytesIO()
    Image.new("1", (65501, 2)).save(buffer, "PNG")
    with pytest.raises(ValueError, match=r"^2 x 65501: a side has at most 65500 pixels"):
        to_jpeg(buffer.getvalue())
    assert inspect(to_jpeg(buffer.getvalue(), max_size=100))[1:3] == (1, 100)


def png16(values: np.ndarray) -> bytes:
    """A 16-bit PNG, gray (H, W) or RGB (H, W, 3); PIL writes none in color."""
    height, width = values.shape[:2]
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
        (b"IEND", b""),
    )
    body = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_sixteen_bits_have_one_rule_for_gray_and_color() -> None:
    gray = np.repeat(np.arange(256)[:, None] * 256 + 255, 16, axis=1)  # rounding would give the next value
    color = np.stack([gray] * 3, axis=-1)
    decoded = []
    for values in (gray, color):
        with Image.open(io.BytesIO(to_jpeg(png16(values), quality=100))) as image:
            decoded.append(np.asarray(image.convert("L")).astype(int))
    assert np.abs(decoded[0] - (gray >> 8)).mean() < 0.2
    assert np.abs(decoded[0] - decoded[1]).max() <= 1


@pytest.mark.parametrize("data", [WHOLE, encode(kind="PNG"), encode("CMYK")])
def test_want_of_memory_is_no_fault_of_the_image(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", exhausted)
    monkeypatch.setattr("simplejpeg.decode_jpeg", exhausted)
    with pytest.raises(MemoryError):
        to_jpeg(data)
