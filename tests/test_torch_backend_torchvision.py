"""Profile torchvision: against torchvision.transforms.v2.functional, PIL, and the formulas written out in float64.

The back end calls torchvision's own functions, so that the first test says no more than that each gets its parameter;
the others say what these functions compute, which the compiled kernels repeat.
"""

import colorsys
import io
import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from byolt.configs.schema import AugmentConfig, ViewConfig
from byolt.pipelines import torch_backend
from byolt.pipelines.torch_backend import TorchBackend
from byolt.pipelines.views import BRIGHTNESS, CONTRAST, HUE, JITTER_ORDERS, SATURATION, ViewParams, draw

apply = partial(torch_backend.apply, profile="torchvision")
HEIGHT, WIDTH = 75, 90
EVERYTHING = ViewConfig(blur=0.7, solarize=0.5, jitter=0.9, gray=0.2)
LUMA = np.array([0.2989, 0.587, 0.114])


def pictures(count: int, height: int = HEIGHT, width: int = WIDTH) -> list[torch.Tensor]:
    """uint8 (H, W, 3): smooth colors that reach both ends of the range, with some noise and a gray patch."""
    rng = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[:height, :width] / max(height, width)
    out = []
    for _ in range(count):
        waves = [np.sin(6 * (a * y + b * x) + c) for a, b, c in rng.uniform(-1, 1, (3, 3))]
        image = 127 + 140 * np.stack(waves, 2) + rng.normal(0, 10, (height, width, 3))
        image[: height // 4, : width // 4] = rng.choice([0, 255, 90])
        out.append(torch.from_numpy(image.clip(0, 255).astype(np.uint8)))
    return out


def plain(count: int = 1, **changes: object) -> ViewParams:
    """The whole image, and no operation but what `changes` says."""
    params = draw(
        ViewConfig(flip=0, jitter=0, gray=0, blur=0, solarize=0), 0, 0, np.arange(count), 0, *sides(count)
    )
    zeros = np.zeros(count, np.int32)
    whole = {"top": zeros, "left": zeros, "height": zeros + HEIGHT, "width": zeros + WIDTH}
    return replace(params, **whole, **{name: np.full(count, value) for name, value in changes.items()})


def only(operation: str, value: float) -> ViewParams:
    """One color operation; the other factors are neutral."""
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    return plain(jitter=True, **(neutral | {operation: value}))


def sides(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(count, HEIGHT), np.full(count, WIDTH)


def chain(image: torch.Tensor, view: ViewParams, size: int, taps: int) -> torch.Tensor:
    """torchvision's functions on (3, H, W), uint8 (8 bits after every stage) or float32."""
    window = (int(a[0]) for a in (view.top, view.left, view.height, view.width))
    bicubic = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    x = F.resized_crop(image, *window, [size, size], **bicubic)
    x = x if x.dtype == torch.uint8 else x.clamp(0, 1)
    x = F.horizontal_flip(x) if view.flip[0] else x
    jitter = {
        BRIGHTNESS: (F.adjust_brightness, view.brightness),
        CONTRAST: (F.adjust_contrast, view.contrast),
        SATURATION: (F.adjust_saturation, view.saturation),
        HUE: (F.adjust_hue, view.hue),
    }
    for operation in view.order[0] if view.jitter[0] else ():
        function, value = jitter[operation]
        x = function(x, float(value[0]))
    x = F.rgb_to_grayscale(x, 3) if view.gray[0] else x
    x = F.gaussian_blur(x, [taps, taps], [float(view.sigma[0])]) if view.blur[0] else x
    return F.solarize(x, 128 if x.dtype == torch.uint8 else 0.5) if view.solarize[0] else x


@pytest.mark.parametrize("size", [32, 64, 120])
def test_view_equals_torchvisions_functions(size: int) -> None:
    """Float32 images, the same parameters: equal to 1e-6. torchvision on uint8, which stores 8 bits after every stage, and
    rounds down after the color operations, is 1.4 levels of 255 away on average and 13 at most (measured here)."""
    count, taps = 48, 2 * int(size / 10 / 2) + 1
    params = draw(EVERYTHING, 5, 0, np.arange(count), 0, *sides(count), "torchvision")
    apart = []
    for i, image in enumerate(pictures(count)):
        row = params[i : i + 1]
        ours = apply(image, row, size, taps)[0].permute(2, 0, 1)
        planes = image.permute(2, 0, 1)
        assert (ours - chain(planes.float() / 255, row, size, taps)).abs().max() < 1e-6
        if not row.solarize[0]:  # a pixel that 8 bits carry over the threshold is inverted: any distance
            apart.append((ours * 255 - chain(planes, row, size, taps)).abs())
    apart = torch.stack(apart)
    assert 0.5 < apart.mean() < 2 and apart.max() < 16


def resized(image: torch.Tensor, size: int) -> np.ndarray:
    """(size, size, 3) float64 in [0, 1] by PIL, whose filter for 32-bit floats is bicubic, a = -0.5, antialiased."""
    channels = [Image.fromarray(channel.numpy()) for channel in (image.float() / 255).unbind(-1)]
    out = [np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(out, -1).astype(np.float64).clip(0, 1)


@pytest.mark.parametrize("size", [16, 40, 75, 90, 200])
def test_resize_is_pils(size: int) -> None:
    """Shrinking, keeping and enlarging: two computations in float32 (measured: at most 1.4e-6 apart)."""
    for image in pictures(3):
        ours = apply(image, plain(), size, 1)[0].numpy()
        assert np.abs(ours - resized(image, size)).max() < 5e-6


def test_resize_reads_the_window_only() -> None:
    (image,) = pictures(1)
    window = replace(
        plain(), top=np.array([11]), left=np.array([20]), height=np.array([50]), width=np.array([44])
    )
    cut = image[11:61, 20:64].contiguous()
    whole = replace(plain(), height=np.array([50]), width=np.array([44]))
    assert torch.equal(apply(image, window, 32, 3), apply(cut, whole, 32, 3))


def hue(image: np.ndarray, turns: float) -> np.ndarray:
    pixels = [colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3)]
    return np.array([colorsys.hsv_to_rgb((h + turns) % 1, s, v) for h, s, v in pixels]).reshape(image.shape)


def blur(image: np.ndarray, sigma: float, taps: int) -> np.ndarray:
    kernel = np.exp(-0.5 * (np.arange(taps) - taps // 2) ** 2 / sigma**2)
    kernel, radius = kernel / kernel.sum(), taps // 2
    for axis in (0, 1):
        padding = [(radius, radius) if i == axis else (0, 0) for i in range(3)]
        padded, length = np.pad(image, padding, mode="reflect"), image.shape[axis]
        image = sum(w * np.take(padded, range(k, k + length), axis) for k, w in enumerate(kernel))
    return image


FORMULAS = {
    "brightness": lambda x, value: (x * value).clip(0, 1),
    "contrast": lambda x, value: ((x - (x @ LUMA).mean()) * value + (x @ LUMA).mean()).clip(0, 1),
    "saturation": lambda x, value: (x * value + (x @ LUMA)[..., None] * (1 - value)).clip(0, 1),
    "hue": hue,
}


@pytest.mark.parametrize("size", [30, 80])
@pytest.mark.parametrize("operation", FORMULAS)
def test_color_operation_is_its_formula(operation: str, size: int) -> None:
    (image,) = pictures(1)
    start = apply(image, plain(), size, 1)[0].double().numpy()
    for value in (-0.5, -0.1, 0.07, 0.5) if operation == "hue" else (0.0, 0.6, 1.4, 2.0):
        value = float(np.float32(value))
        ours = apply(image, only(operation, value), size, 1)[0].numpy()
        assert np.abs(ours - FORMULAS[operation](start, value)).max() < 1e-5
        assert np.abs(ours - start).max() > 0.01


@pytest.mark.parametrize(("sigma", "taps"), [(0.1, 3), (0.5, 7), (2.0, 23), (1.0, 1)])
def test_blur_mirrors_at_the_border(sigma: float, taps: int) -> None:
    (image,) = pictures(1)
    start = apply(image, plain(), 48, 1)[0].double().numpy()
    ours = apply(image, plain(blur=True, sigma=sigma), 48, taps)[0].numpy()
    assert np.abs(ours - blur(start, sigma, taps)).max() < 1e-5


def test_flip_gray_and_solarize() -> None:
    (image,) = pictures(1)
    start = apply(image, plain(), 48, 1)[0].double().numpy()
    flipped = apply(image, plain(flip=True), 48, 1)[0].numpy()
    assert np.abs(flipped - start[:, ::-1]).max() < 1e-7
    gray = apply(image, plain(gray=True), 48, 1)[0].numpy()
    assert np.abs(gray - (start @ LUMA)[..., None]).max() < 1e-6
    solarized = apply(image, plain(solarize=True), 48, 1)[0].numpy()
    assert np.abs(solarized - np.where(start < 0.5, start, 1 - start)).max() < 1e-6


def test_composition_in_every_order() -> None:
    """24 orders, then gray or not, blur and solarize: formulas composed in float64, and the orders differ."""
    (image,) = pictures(1)
    values = {BRIGHTNESS: 1.3, CONTRAST: 1.4, SATURATION: 0.7, HUE: -0.08}
    names = {BRIGHTNESS: "brightness", CONTRAST: "contrast", SATURATION: "saturation", HUE: "hue"}
    drawn = {names[k]: np.array([v], np.float32) for k, v in values.items()}
    start, results = apply(image, plain(), 24, 1)[0].double().numpy(), []
    for i, order in enumerate(JITTER_ORDERS):
        params = plain(jitter=True, gray=i % 4 == 0, blur=True, sigma=1.2, solarize=i % 2 == 0)
        ours = apply(image, replace(params, order=order[None], **drawn), 24, 5)[0].numpy()
        expected = start
        for operation in order:
            expected = FORMULAS[names[operation]](expected, float(drawn[names[operation]][0]))
        if i % 4 == 0:
            expected = np.repeat((expected @ LUMA)[..., None], 3, 2)
        expected = blur(expected, 1.2, 5)
        apart = np.abs(ours - (np.where(expected < 0.5, expected, 1 - expected) if i % 2 == 0 else expected))
        # float32 may be on the other side; x and 1 - x are next to each other there
        near = np.abs(expected - 0.5) < 1e-5
        assert apart.max() < 1e-5 or (apart[~near].max() < 1e-5 and apart[near].max() < 3e-5)
        results.append(apply(image, replace(plain(jitter=True), order=order[None], **drawn), 24, 5))
    different = [(a - b).abs().max() > 1e-3 for a, b in itertools.combinations(results, 2)]
    assert np.mean(different) > 0.9


def test_back_end_takes_the_profile() -> None:
    """The same parameters by both profiles: antialias and the mean of gray are other pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pictures(1)[0].numpy()).save(buffer, "PNG")
    params = draw(EVERYTHING, 5, 0, np.arange(1), 0, *sides(1), "torchvision")
    views = {}
    for profile in ("byol", "torchvision"):
        augment = AugmentConfig(
            profile=profile, size=32, mean=(0, 0, 0), std=(1, 1, 1), view1=EVERYTHING, view2=EVERYTHING
        )
        backend = TorchBackend(augment, torch.device("cpu"), torch.float32, threads=1)
        views[profile] = backend([buffer.getvalue()], params, params)[0][0].permute(1, 2, 0)
    assert torch.equal(views["torchvision"], apply(pictures(1)[0], params, 32, 3)[0])
    assert (views["byol"] - views["torchvision"]).abs().max() > 0.01
