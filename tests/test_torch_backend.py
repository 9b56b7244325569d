"""Every operation against the reference implementation's own numbers, and properties that hold for any image."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from byolt.configs.schema import AugmentConfig, ViewConfig
from byolt.pipelines import torch_backend as ops
from byolt.pipelines.formats.decode import UndecodableError
from byolt.pipelines.torch_backend import TorchBackend
from byolt.pipelines.views import draw


@pytest.fixture(scope="module")
def augment(reference: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in reference.items()}


@pytest.fixture(scope="module")
def image(augment: dict[str, torch.Tensor]) -> torch.Tensor:
    return augment["in_u8"][None].float() / 255


COLOR = [f"{op}/{v}" for op, values in {
    "brightness": ("-0.4", "0.4"), "contrast": ("0.6", "1.4"), "saturation": ("0.8", "1.2"), "hue": ("-0.1", "0.1")
}.items() for v in values]  # fmt: skip


@pytest.mark.parametrize("name", COLOR)
def test_color_operation_equals_reference(name: str, augment: dict, image: torch.Tensor) -> None:
    operation, value = name.split("/")
    ours = getattr(ops, operation)(image, torch.tensor([float(value)]))
    assert (ours[0] - augment[name]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["blur23/0.1", "blur23/1.0", "blur23/2.0", "blur5/1.0"])
def test_blur_equals_reference(name: str, augment: dict, image: torch.Tensor) -> None:
    taps, sigma = name.removeprefix("blur").split("/")
    ours = ops.gaussian_blur(image, torch.tensor([float(sigma)]), int(taps))
    assert (ours[0] - augment[name]).abs().max() < 1e-5


def test_gray_and_solarize_equal_reference(augment: dict, image: torch.Tensor) -> None:
    assert (ops.grayscale(image)[0] - augment["gray"]).abs().max() < 1e-5
    assert (ops.solarize(image)[0] - augment["solarize"]).abs().max() < 1e-6


def test_composition_equals_reference(augment: dict, image: torch.Tensor) -> None:
    x = ops.contrast(image, torch.tensor([1.3]))
    x = ops.hue(x, torch.tensor([0.07]))
    x = ops.saturation(x, torch.tensor([0.85]))
    x = ops.brightness(x, torch.tensor([-0.2]))
    x = ops.solarize(ops.gaussian_blur(x, torch.tensor([1.5]), 23))
    assert (x[0] - augment["compose"]).abs().max() < 1e-5


@pytest.mark.parametrize("size", [32, 64, 224])
def test_resize_equals_reference(size: int, fixtures: Path) -> None:
    with np.load(fixtures / "resize.npz") as data:
        image, expected = torch.from_numpy(data["in_u8"]), torch.from_numpy(data[f"out{size}"])
    ours = ops.resize_bicubic(image, 0, 0, *image.shape[:2], size)
    assert (ours[: expected.shape[0], : expected.shape[1]] - expected).abs().max() < 1e-6


def test_resize_reads_the_window_only(fixtures: Path) -> None:
    """Cropping first and resizing a window give the same pixels: nothing outside the window leaks in."""
    with np.load(fixtures / "resize.npz") as data:
        image = torch.from_numpy(data["in_u8"])
    window = image[30:101, 7:60].contiguous()
    assert torch.equal(
        ops.resize_bicubic(image, 30, 7, 71, 53, 40), ops.resize_bicubic(window, 0, 0, 71, 53, 40)
    )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (2, 3)])
def test_resize_of_a_constant_is_that_constant(height: int, width: int) -> None:
    image = torch.full((height, width, 3), 77, dtype=torch.uint8)
    out = ops.resize_bicubic(image, 0, 0, height, width, 32)
    assert (out - 77 / 255).abs().max() < 1e-6


def test_operations_keep_each_image_to_itself(image: torch.Tensor) -> None:
    """A batch of two gives what its images give alone."""
    batch, value = torch.cat([image, image.flip(1) ** 2]), torch.tensor([0.7, 1.3])
    for operation in (ops.brightness, ops.contrast, ops.saturation, ops.hue):
        together = operation(batch, value)
        for i in range(2):
            assert torch.allclose(together[i], operation(batch[i : i + 1], value[i : i + 1])[0], atol=1e-6)
    together = ops.gaussian_blur(batch, value, 7)
    assert torch.allclose(together[1], ops.gaussian_blur(batch[1:], value[1:], 7)[0], atol=1e-6)


def test_gray_pixels_survive_hue_and_saturation() -> None:
    gray = torch.linspace(0, 1, 64).view(1, 8, 8, 1).expand(1, 8, 8, 3)
    assert torch.allclose(ops.hue(gray, torch.tensor([0.1])), gray, atol=1e-6)
    assert torch.allclose(ops.saturation(gray, torch.tensor([1.2])), gray, atol=1e-6)


def _jpegs(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    out = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        buffer = io.BytesIO()
        small.resize((50, 40), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
        out.append(buffer.getvalue())
    return out


AUGMENT = AugmentConfig(
    size=32, view1=ViewConfig(blur=1.0, solarize=0.0), view2=ViewConfig(blur=0.1, solarize=0.2)
)


def test_backend_applies_drawn_parameters_and_normalizes() -> None:
    encoded = _jpegs(3)
    ids, heights, widths = np.arange(3), np.full(3, 40), np.full(3, 50)
    params = [
        draw(view, 0, 0, ids, i, heights, widths) for i, view in enumerate((AUGMENT.view1, AUGMENT.view2))
    ]
    backend = TorchBackend(AUGMENT, torch.device("cpu"), torch.float32, threads=2)
    views = backend(encoded, *params)
    for view, drawn in zip(views, params, strict=True):
        assert view.shape == (3, 3, 32, 32) and view.is_contiguous(memory_format=torch.channels_last)
        for i in range(3):
            plain = ops.apply(ops.decode(encoded[i]), drawn[i : i + 1], 32, AUGMENT.blur_taps, "byol")[0]
            expected = (plain.permute(2, 0, 1) - torch.tensor(AUGMENT.mean).view(3, 1, 1)) / torch.tensor(
                AUGMENT.std
            ).view(3, 1, 1)
            assert torch.allclose(view[i], expected, atol=1e-6)


def test_backend_names_the_images_that_do_not_decode() -> None:
    encoded = _jpegs(3)
    encoded[1] = encoded[1][:200]
    ids, size = np.arange(3), np.full(3, 40)
    params = draw(AUGMENT.view1, 0, 0, ids, 0, size, size)
    backend = TorchBackend(AUGMENT, torch.device("cpu"), torch.float32, threads=1)
    with pytest.raises(UndecodableError, match="image 1 of the batch") as caught:
        backend(encoded, params, params)
    assert set(caught.value.reasons) == {1}
