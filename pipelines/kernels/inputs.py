"""The kernels' inputs on both devices: where the decoded pixels are, and the parameters of each view as arrays."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from byolt.configs.schema import AugmentConfig
from byolt.pipelines.views import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams

Floats = npt.NDArray[np.float32]

NOTHING = 255  # in the place of a color operation
NEGLIGIBLE = 1e-6  # a blur tap lighter than the center by this factor is dropped; together they weigh < 2e-6


class Pixels(NamedTuple):
    """N decoded images, each the whole or a part of a stored one: uint8 (height, width, 3) at an address."""

    address: npt.NDArray[np.int64]  # (N,) in the memory of the device that makes the views
    box: npt.NDArray[np.int64]  # (N, 4) top, left, height, width of the decoded part


class KernelParams(NamedTuple):
    """The parameters of one view of N images; windows are relative to the decoded part."""

    window: npt.NDArray[np.int64]  # (N, 4) top, left, height, width
    flip: npt.NDArray[np.bool_]
    order: npt.NDArray[np.uint8]  # (N, 4) color operations, NOTHING without jitter
    value: Floats  # (N, 4) by operation
    gray: npt.NDArray[np.bool_]
    sigma: Floats  # (N,) 0 without blur
    solarize: npt.NDArray[np.bool_]


def kernel_params(pixels: Pixels, params: Sequence[ViewParams]) -> tuple[KernelParams, ...]:
    """Translates the sampled parameters of each view of N decoded images.

    Raises:
        ValueError: a window is not inside its image's box. (The kernels read memory without checks.)
    """
    result = tuple(_of_view(view, pixels.box) for view in params)
    for window in (view.window for view in result):
        if (window[:, :2] < 0).any() or (window[:, 2:] < 1).any():
            raise ValueError("a window begins outside its image, or is empty")
        if (window[:, :2] + window[:, 2:] > pixels.box[:, 2:]).any():
            raise ValueError("a window reaches beyond its image")
    return result


def _of_view(params: ViewParams, box: npt.NDArray[np.int64]) -> KernelParams:
    value = np.empty((len(params), 4), np.float32)
    value[:, BRIGHTNESS], value[:, CONTRAST] = params.brightness, params.contrast
    value[:, SATURATION], value[:, HUE] = params.saturation, params.hue
    top, left = params.top - box[:, 0], params.left - box[:, 1]
    return KernelParams(
        window=np.stack([top, left, params.height, params.width], 1).astype(np.int64),
        flip=np.ascontiguousarray(params.flip, np.bool_),
        order=np.where(params.jitter[:, None], params.order, NOTHING).astype(np.uint8),
        value=value,
        gray=np.ascontiguousarray(params.gray, np.bool_),
        sigma=np.where(params.blur, params.sigma, 0).astype(np.float32),
        solarize=np.ascontiguousarray(params.solarize, np.bool_),
    )


def normalization(augment: AugmentConfig) -> Floats:
    """Scale and shift, (2, 3): (x - mean) / std is x times the first row plus the second."""
    std = np.array(augment.std)
    return np.array([1 / std, -np.array(augment.mean) / std], np.float32)
