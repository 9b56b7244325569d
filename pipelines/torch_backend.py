"""The reference implementation's augmentations in plain torch: what tests compare with, and the fallback without DALI.

Every operation here is the definition of DeepMind's byol (byol/utils/augmentations.py), not torchvision's: brightness
is added, contrast turns about the per-channel mean, saturation and hue work in HSV, the resize is bicubic with
a = -0.5 and without antialias, the blur pads with zeros. Images are float32 (N, H, W, 3) in [0, 1]. The other profile's
are those of torchvision.transforms.v2 (`apply_torchvision`); the back end serves both.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V

from byolt.configs.schema import AugmentConfig
from byolt.pipelines.formats.decode import UndecodableError, decode
from byolt.pipelines.views import BRIGHTNESS, CONTRAST, GRAY_WEIGHTS, HUE, SATURATION, ViewParams


class TorchBackend:
    """Decodes and augments one batch on the CPU, in a pool of threads, and moves the result to the device."""

    def __init__(
        self, augment: AugmentConfig, device: torch.device, dtype: torch.dtype, threads: int
    ) -> None:
        """
        Args:
            augment: profile and size of the views, mean and std.
            device: where the views are delivered.
            dtype: float32, float16 or bfloat16.
            threads: images that are worked on at a time.
        """
        self._augment, self._device, self._dtype = augment, device, dtype
        self._apply = apply_byol if augment.profile == "byol" else apply_torchvision
        self._pool = ThreadPoolExecutor(threads)

    def __call__(
        self, encoded: Sequence[bytes], params1: ViewParams, params2: ViewParams
    ) -> tuple[Tensor, Tensor]:
        """Makes both views of every image; each is decoded once.

        Args:
            encoded: N encoded images.
            params1: N drawn views.
            params2: N drawn views.

        Returns:
            Two (N, 3, size, size) tensors, normalised, in channels_last memory.

        Raises:
            UndecodableError: names the images of the batch that do not decode.
        """
        size, taps = self._augment.size, self._augment.blur_taps

        def work(i: int) -> tuple[Tensor, Tensor] | str:
            try:
                image = decode(encoded[i])
            except ValueError as error:
                return str(error)
            row = slice(i, i + 1)
            return self._apply(image, params1[row], size, taps), self._apply(image, params2[row], size, taps)

        results = list(self._pool.map(work, range(len(encoded))))
        reasons = {i: result for i, result in enumerate(results) if isinstance(result, str)}
        if reasons:
            raise UndecodableError(reasons)
        both = [result for result in results if not isinstance(result, str)]
        mean, std = torch.tensor(self._augment.mean), torch.tensor(self._augment.std)

        def deliver(views: list[Tensor]) -> Tensor:
            batch = ((torch.cat(views) - mean) / std).to(self._device, self._dtype)
            return batch.permute(0, 3, 1, 2)  # NHWC memory behind an NCHW shape: channels_last

        return deliver([first for first, _ in both]), deliver([second for _, second in both])


def apply_byol(image: Tensor, view: ViewParams, size: int, taps: int) -> Tensor:
    """One drawn view of an image by profile byol, before normalisation.

    Args:
        image: uint8 (H, W, 3).
        view: parameters of one sample.
        size: side of the view.
        taps: taps of the blur kernel.

    Returns:
        float32 (1, size, size, 3) in [0, 1].
    """
    top, left, height, width = (int(a[0]) for a in (view.top, view.left, view.height, view.width))
    x = resize_bicubic(image, top, left, height, width, size)[None]
    if view.flip[0]:
        x = x.flip(2)
    if view.jitter[0]:
        for operation in view.order[0]:
            if operation == BRIGHTNESS:
                x = brightness(x, torch.from_numpy(view.brightness))
            elif operation == CONTRAST:
                x = contrast(x, torch.from_numpy(view.contrast))
            elif operation == SATURATION:
                x = saturation(x, torch.from_numpy(view.saturation))
            elif operation == HUE:
                x = hue(x, torch.from_numpy(view.hue))
    if view.gray[0]:
        x = grayscale(x)
    if view.blur[0]:
        x = gaussian_blur(x, torch.from_numpy(view.sigma), taps)
    if view.solarize[0]:
        x = solarize(x)
    return x


def resize_bicubic(image: Tensor, top: int, left: int, height: int, width: int, size: int) -> Tensor:
    """Crops a window and resizes it to a square.

    Keys' cubic kernel with a = -0.5, half-pixel centres, no antialias. Taps outside the window are dropped and the
    weights renormalised, as tf.image.resize of the cropped image does.

    Args:
        image: uint8 (H, W, 3).
        top: first row of the window.
        left: first column.
        height: rows of the window, at least 1.
        width: columns of the window, at least 1.
        size: side of the result.

    Returns:
        float32 (size, size, 3) in [0, 1], clipped.
    """
    window = image[top : top + height, left : left + width].float() / 255
    rows, row_weights = _cubic_taps(height, size)
    columns, column_weights = _cubic_taps(width, size)
    narrow = torch.einsum("hstc,st->hsc", window[:, columns], column_weights)
    return torch.einsum("stwc,st->swc", narrow[rows], row_weights).clamp(0, 1)


def _cubic_taps(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Source indices (size, 4) and weights (size, 4) of a cubic resize of an axis."""
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * (length / size) - 0.5
    first = centre.floor()
    fraction = ((centre - first) * 1024).round() / 1024  # the reference tabulates the kernel in 1024 steps
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
    """Separable Gaussian; outside the image is zero.

    Args:
        image: (N, H, W, 3).
        sigma: (N,) standard deviation in pixels.
        taps: odd length of the kernel, whose weights sum to 1.

    Returns:
        (N, H, W, 3), clipped to [0, 1].
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


def apply_torchvision(image: Tensor, view: ViewParams, size: int, taps: int) -> Tensor:
    """One drawn view of an image, before normalisation: what `apply_byol` is to profile byol.

    Args:
        image: uint8 (H, W, 3).
        view: parameters of one sample.
        size: side of the view.
        taps: taps of the blur kernel.

    Returns:
        float32 (1, size, size, 3) in [0, 1].
    """
    top, left, height, width = (int(a[0]) for a in (view.top, view.left, view.height, view.width))
    window = image[top : top + height, left : left + width].permute(2, 0, 1)[None].float() / 255
    x = V.resize(window, [size, size], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    if view.flip[0]:
        x = V.horizontal_flip(x)
    if view.jitter[0]:
        for operation in view.order[0]:
            if operation == BRIGHTNESS:
                x = V.adjust_brightness(x, float(view.brightness[0]))
            elif operation == CONTRAST:
                x = V.adjust_contrast(x, float(view.contrast[0]))
            elif operation == SATURATION:
                x = V.adjust_saturation(x, float(view.saturation[0]))
            elif operation == HUE:
                x = V.adjust_hue(x, float(view.hue[0]))
    if view.gray[0]:
        x = V.rgb_to_grayscale(x, num_output_channels=3)
    if view.blur[0]:
        x = V.gaussian_blur(x, [taps, taps], [float(view.sigma[0])])
    if view.solarize[0]:
        x = V.solarize(x, 0.5)
    return x.permute(0, 2, 3, 1)
