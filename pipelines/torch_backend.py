"""The back end in plain torch: the fallback without DALI, and the definition that the fast kernels are tested against.

The public operations are those of profile byol, as DeepMind's byol defines them (byol/utils/augmentations.py):
brightness is added, contrast is about the mean of each channel, saturation and hue work in HSV, the resize is bicubic
with a = -0.5 and without antialias, the blur pads with zeros. Images are float32 (N, H, W, 3) in [0, 1]. Profile
torchvision calls torchvision.transforms.v2.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from byolt.configs.schema import AugmentConfig, Profile
from byolt.pipelines.formats.decode import UndecodableError, decode
from byolt.pipelines.views import GRAY_WEIGHTS, ViewParams


class TorchBackend:
    """Decodes and augments one batch on the CPU, in a pool of threads, and moves the result to the device.

    It refuses JPEGs with damaged pixels, see `proof.prove_jpeg`, so that their first read need not decode them.
    """

    def __init__(
        self, augment: AugmentConfig, device: torch.device, dtype: torch.dtype, threads: int
    ) -> None:
        """The device receives the views, of this dtype; the threads work on an image each."""
        self._augment, self._device, self._dtype = augment, device, dtype
        self._pool = ThreadPoolExecutor(threads)

    def __call__(
        self, encoded: Sequence[bytes], params1: ViewParams, params2: ViewParams
    ) -> tuple[Tensor, Tensor]:
        """See `backends.Backend`."""
        settings = self._augment.size, self._augment.blur_taps, self._augment.profile

        def work(i: int) -> tuple[Tensor, Tensor] | str:
            try:
                image = decode(encoded[i], strict=True)
            except ValueError as error:
                return str(error)
            row = slice(i, i + 1)
            return apply(image, params1[row], *settings), apply(image, params2[row], *settings)

        results = list(self._pool.map(work, range(len(encoded))))
        reasons = {i: result for i, result in enumerate(results) if isinstance(result, str)}
        if reasons:
            raise UndecodableError(reasons)
        both = [result for result in results if not isinstance(result, str)]
        mean, std = torch.tensor(self._augment.mean), torch.tensor(self._augment.std)

        def deliver(views: list[Tensor]) -> Tensor:
            batch = ((torch.cat(views) - mean) / std).to(self._device, self._dtype)
            return batch.permute(0, 3, 1, 2)  # channels_last: NCHW shape, NHWC memory

        return deliver([first for first, _ in both]), deliver([second for _, second in both])


def apply(image: Tensor, view: ViewParams, size: int, taps: int, profile: Profile) -> Tensor:
    """Makes one view of an image uint8 (H, W, 3), before normalization: float32 (1, size, size, 3) in [0, 1].

    `view` are the parameters of one sample; the blur kernel has `taps` taps.
    """
    operations = _operations(profile)
    window = (int(side[0]) for side in (view.top, view.left, view.height, view.width))
    x = operations.resize(image, *window, size)[None]
    if view.flip[0]:
        x = x.flip(2)
    values = view.brightness, view.contrast, view.saturation, view.hue
    for operation in view.order[0] if view.jitter[0] else ():
        x = operations.jitter[operation](x, torch.from_numpy(values[operation]))
    if view.gray[0]:
        x = operations.grayscale(x)
    if view.blur[0]:
        x = operations.blur(x, torch.from_numpy(view.sigma), taps)
    return solarize(x) if view.solarize[0] else x


def resize_bicubic(image: Tensor, top: int, left: int, height: int, width: int, size: int) -> Tensor:
    """Crops a window of an image, uint8 (H, W, 3), and resizes it to float32 (size, size, 3), clipped to [0, 1].

    Keys' cubic kernel with a = -0.5, half-pixel centers, no antialias. Taps outside the window are dropped and the
    weights renormalized, as in tf.image.resize of the cropped image.
    """
    window = image[top : top + height, left : left + width].float() / 255
    rows, row_weights = _cubic_taps(height, size)
    columns, column_weights = _cubic_taps(width, size)
    narrow = torch.einsum("hstc,st->hsc", window[:, columns], column_weights)
    return torch.einsum("stwc,st->swc", narrow[rows], row_weights).clamp(0, 1)


def resize_squares(images: Tensor, size: int) -> Tensor:
    """`resize_bicubic` of whole square images (N, L, L, 3) uint8 of any device to float32 (N, size, size, 3)."""
    count, length = images.shape[:2]
    taps, weights = (values.to(images.device) for values in _cubic_taps(length, size))
    x = images.float().flatten(0, 1) / 255
    x = torch.einsum("hstc,st->hsc", x[:, taps], weights)
    x = x.view(count, length, size, 3).transpose(0, 1).flatten(1, 2)
    x = torch.einsum("stwc,st->swc", x[taps], weights).clamp(0, 1)
    return x.view(size, count, size, 3).transpose(0, 1).contiguous()


@functools.lru_cache(maxsize=4096)
def _cubic_taps(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Source indices (size, 4) and weights (size, 4) of a cubic resize of an axis."""
    center = (torch.arange(size, dtype=torch.float64) + 0.5) * (length / size) - 0.5
    first = center.floor()
    fraction = ((center - first) * 1024).round() / 1024  # the reference tabulates the kernel in 1024 steps
    taps = first.long()[:, None] + torch.arange(-1, 3)
    distance = (fraction[:, None] - torch.arange(-1, 3)).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))
    weights = torch.where((taps >= 0) & (taps < length), weights, 0.0)
    return taps.clamp(0, length - 1), (weights / weights.sum(1, keepdim=True)).float()


def brightness(image: Tensor, value: Tensor) -> Tensor:
    """Adds value (N,) to every pixel of (N, H, W, 3) and clips."""
    return (image + _per_image(value)).clamp(0, 1)


def contrast(image: Tensor, value: Tensor) -> Tensor:
    """Scales the distance to the image's own per-channel mean by value (N,) and clips."""
    mean = image.mean((1, 2), keepdim=True)
    return ((image - mean) * _per_image(value) + mean).clamp(0, 1)


def saturation(image: Tensor, value: Tensor) -> Tensor:
    """Scales S of HSV by value (N,), S clipped to [0, 1]."""
    h, s, v = _rgb_to_hsv(image)
    return _hsv_to_rgb(h, (s * _per_image(value)[..., 0]).clamp(0, 1), v)


def hue(image: Tensor, value: Tensor) -> Tensor:
    """Adds value (N,), in turns, to H of HSV."""
    h, s, v = _rgb_to_hsv(image)
    return _hsv_to_rgb(h + _per_image(value)[..., 0], s, v)


def grayscale(image: Tensor) -> Tensor:
    """Luma .2989 R + .5870 G + .1140 B in all three channels."""
    return (image @ image.new_tensor(GRAY_WEIGHTS))[..., None].expand_as(image)


def gaussian_blur(image: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Blurs images (N, H, W, 3) by a separable Gaussian; pads with zeros and clips to [0, 1].

    Its standard deviations (N,) are in pixels. The kernel has an odd length, `taps`, and its weights sum to 1.
    """
    n, height, width, channels = image.shape
    radius = taps // 2
    x = torch.arange(-radius, radius + 1, dtype=image.dtype)
    kernel = torch.exp(-(x**2) / (2 * sigma[:, None] ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    planes = image.permute(0, 3, 1, 2).reshape(1, n * channels, height, width)
    planes = F.conv2d(planes, kernel[:, None, None, :], padding=(0, radius), groups=n * channels)
    planes = F.conv2d(planes, kernel[:, None, :, None], padding=(radius, 0), groups=n * channels)
    return planes.view(n, channels, height, width).permute(0, 2, 3, 1).clamp(0, 1)


def solarize(image: Tensor, threshold: float = 0.5) -> Tensor:
    """Inverts the pixels that are not below the threshold."""
    return torch.where(image < threshold, image, 1 - image)


def _per_image(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)


def _rgb_to_hsv(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in turns, saturation and value, each (N, H, W)."""
    r, g, b = image.unbind(-1)
    v = image.amax(-1)
    spread = v - image.amin(-1)
    safe = torch.where(spread > 0, spread, 1)
    sector = torch.where(v == r, (g - b) / safe, torch.where(v == g, (b - r) / safe + 2, (r - g) / safe + 4))
    h = torch.where(spread > 0, sector / 6, 0.0) % 1.0
    s = torch.where(v > 0, spread / torch.where(v > 0, v, 1), 0.0)
    return h, s, v


def _hsv_to_rgb(h: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """(N, H, W, 3) from hue in turns (any real number), saturation and value."""
    sixths = (h % 1.0) * 6
    channels = []
    for shift in (5, 3, 1):  # red, green, blue: v - v s max(0, min(k, 4 - k, 1)), k = (shift + 6 h) mod 6
        k = (sixths + shift) % 6
        channels.append(v - v * s * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, -1)


class _Operations(NamedTuple):
    """The operations of a profile that differ, on images float32 (N, H, W, 3)."""

    resize: Callable[..., Tensor]
    jitter: tuple[Callable[[Tensor, Tensor], Tensor], ...]  # by BRIGHTNESS, CONTRAST, SATURATION and HUE
    grayscale: Callable[[Tensor], Tensor]
    blur: Callable[[Tensor, Tensor, int], Tensor]


def _channels_first(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of torchvision, which takes (N, 3, H, W), for (N, H, W, 3); the memory stays as it is."""
    return lambda image, *values: function(image.permute(0, 3, 1, 2), *values).permute(0, 2, 3, 1)


def _jitter(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return _channels_first(lambda image, value: function(image, float(value)))


@functools.cache
def _operations(profile: Profile) -> _Operations:
    """Imports torchvision for its profile only: that takes 1.2 CPU s, as it imports torch's compiler."""
    if profile == "byol":
        return _Operations(resize_bicubic, (brightness, contrast, saturation, hue), grayscale, gaussian_blur)
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as V

    def resize(image: Tensor, top: int, left: int, height: int, width: int, size: int) -> Tensor:
        window = image[top : top + height, left : left + width].permute(2, 0, 1)[None].float() / 255
        resized = V.resize(window, [size, size], InterpolationMode.BICUBIC, antialias=True)
        return resized[0].clamp(0, 1).permute(1, 2, 0)

    return _Operations(
        resize,
        tuple(map(_jitter, (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue))),
        _channels_first(lambda image: V.rgb_to_grayscale(image, num_output_channels=3)),
        _channels_first(lambda image, sigma, taps: V.gaussian_blur(image, [taps, taps], [float(sigma)])),
    )
