"""JPEGs that libjpeg-turbo decodes: every pixel is PIL's, and damage is found where it is asked for."""

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from byolt.pipelines.formats import decode as module
from byolt.pipelines.formats.decode import decode

SUBSAMPLING = {"444": (1, 1), "422": (2, 1), "420": (2, 2), "440": (1, 2), "411": (4, 1)}


def by_pil(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def photograph(height: int, width: int) -> np.ndarray:
    """Gradients, an edge and noise: saturated colors and all frequencies."""
    y, x = np.mgrid[:height, :width] / 16
    waves = np.stack([np.sin(x + y), np.cos(x * 1.7), np.sin(y * 0.6 - x)], -1) * 150 + 128
    noise = np.random.default_rng(height * width).normal(0, 25, (height, width, 3))
    return np.clip(waves + noise + 80 * (x > y)[..., None], 0, 255).astype(np.uint8)


def pil_jpeg(height: int, width: int, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photograph(height, width)).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def kinds() -> Iterator[tuple[str, bytes]]:
    sizes = (1, 1), (7, 9), (16, 16), (33, 17), (32, 32), (61, 130)
    for (height, width), quality, name in itertools.product(sizes, (30, 75, 100), SUBSAMPLING):
        pixels = photograph(height, width)
        yield f"{name} {height}x{width} q{quality}", simplejpeg.encode_jpeg(pixels, quality, "RGB", name)
    for (height, width), subsampling, progressive in itertools.product(sizes, (0, 1, 2), (False, True)):
        options = {"subsampling": subsampling, "progressive": progressive, "quality": 90}
        name = f"PIL {height}x{width} {options}"
        yield name, pil_jpeg(height, width, **options)
        yield f"{name} restart", pil_jpeg(height, width, restart_marker_blocks=3, **options)
        yield f"{name} gray", pil_jpeg(height, width, "L", **options)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    yield "EXIF", pil_jpeg(20, 30, exif=exif)
    yield "kept RGB, Adobe", pil_jpeg(20, 30, keep_rgb=True)
    plain = pil_jpeg(20, 30, subsampling=0)
    for transform in (0, 1):  # components are RGB, or YCbCr
        adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
        yield f"Adobe {transform}", plain[:2] + adobe + plain[20:]  # instead of the JFIF segment
    yield "bytes after the end", plain + b"more"
    yield "ICC profile", pil_jpeg(20, 30, icc_profile=bytes(100))


def unequal(images: Iterator[tuple[str, bytes]]) -> list[str]:
    return [
        name
        for name, data in images
        if not np.array_equal(by_pil(data), decode(data, True).numpy())
        or not np.array_equal(by_pil(data), decode(data).numpy())
    ]


def test_every_kind_has_pils_pixels_without_pil() -> None:
    with patch.object(module, "_decode_by_pil", side_effect=AssertionError):
        assert unequal(kinds()) == []


def test_cmyk_is_left_to_pil() -> None:
    cmyk = pil_jpeg(24, 40, "CMYK")
    assert unequal(iter([("CMYK", cmyk)])) == []
    start = cmyk.index(b"\xff\xda") + 14
    bad = cmyk[: start + 200] + bytes(300) + cmyk[start + 500 :]
    assert decode(bad).shape == (24, 40, 3)
    with pytest.raises(ValueError, match="Corrupt JPEG data"):
        decode(bad, strict=True)


def test_a_damaged_image_has_pils_pixels_unless_strict() -> None:
    whole = pil_jpeg(64, 64, quality=90)
    middle = len(whole) * 2 // 3
    for bad in (whole[:middle] + b"\xff\xd9", whole[:middle] + bytes(200) + whole[middle + 200 :]):
        assert np.array_equal(decode(bad).numpy(), by_pil(bad))
        with pytest.raises(ValueError, match="Corrupt JPEG data"):
            decode(bad, strict=True)


@pytest.mark.parametrize("strict", [False, True])
def test_the_limit_of_pixels_is_checked_before_decoding(strict: bool) -> None:
    data = pil_jpeg(8, 8)
    at = data.index(b"\xff\xc0") + 5
    bomb = data[:at] + b"\xff\x00\xff\x00" + data[at + 4 :]  # 65280 x 65280
    with (
        patch("simplejpeg.decode_jpeg", side_effect=AssertionError),
        pytest.raises(ValueError if strict else Image.DecompressionBombError, match=r"limit|exceeds"),
    ):
        decode(bomb, strict)


def test_the_pixels_can_be_written() -> None:
    assert decode(pil_jpeg(8, 8)).fill_(3).eq(torch.tensor(3)).all()


@pytest.mark.slow
def test_real_photographs_have_pils_pixels(shared_data: Path) -> None:
    files = sorted((shared_data / "imagenet-sample").iterdir())
    assert unequal((path.name, path.read_bytes()) for path in files) == []
