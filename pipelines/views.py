"""Samples the augmentation parameters of both views; a back end applies them. Pure numpy.

The parameters depend only on (seed, epoch, sample id, view), not on the rank, the batch or the back end. Both profiles
(augment.profile) read the same random numbers: a sample that one flips, the other flips too.
"""

import itertools
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from byolt.configs.schema import AugmentConfig, Profile, ViewConfig
from byolt.pipelines.philox import uniform

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # in ViewParams.order
GRAY_WEIGHTS = (0.2989, 0.5870, 0.1140)  # tf.image.rgb_to_grayscale
JITTER_ORDERS = np.array(list(itertools.permutations(range(4))), np.uint8)  # (24, 4)
CROP_TRIES = 10  # of torchvision's RandomResizedCrop, which then falls back to a centered window
# The random numbers of a view, in order; their places must not change, or every run would. A new operation takes number
# 15, and further ones begin after those of torchvision's other nine tries, so that the others keep theirs.
SLOTS = (
    "area", "ratio", "top", "left", "flip", "jitter", "order", "brightness", "contrast", "saturation", "hue", "gray",
    "blur", "sigma", "solarize",
)  # fmt: skip
_TRIES = 16  # the first number of those tries: area and ratio of each

Uniform = npt.NDArray[np.float64]
Sides = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ViewParams:
    """Parameters of one view of N samples; the first axis of every array is the sample."""

    top: npt.NDArray[np.int32]  # (N,) crop window in pixels of the stored image
    left: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]
    width: npt.NDArray[np.int32]
    flip: npt.NDArray[np.bool_]
    jitter: npt.NDArray[np.bool_]  # whether the next five fields apply
    order: npt.NDArray[np.uint8]  # (N, 4) BRIGHTNESS, CONTRAST, SATURATION and HUE, first to last
    brightness: npt.NDArray[np.float32]  # added, range [0, 1]; torchvision: a factor
    contrast: npt.NDArray[np.float32]  # factor about the mean of each channel; torchvision: of gray
    saturation: npt.NDArray[np.float32]  # factor in HSV; torchvision: about the gray image
    hue: npt.NDArray[np.float32]  # turns in HSV
    gray: npt.NDArray[np.bool_]
    blur: npt.NDArray[np.bool_]
    sigma: npt.NDArray[np.float32]  # pixels of the view; applies where blur is set
    solarize: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.top)

    def __getitem__(self, rows: slice) -> "ViewParams":
        """The parameters of a part of the samples."""
        return ViewParams(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def draw_both(
    augment: AugmentConfig,
    seed: int,
    epoch: int,
    ids: npt.NDArray[np.integer],
    heights: npt.NDArray[np.integer],
    widths: npt.NDArray[np.integer],
) -> tuple[ViewParams, ViewParams]:
    """Samples the parameters of both views by a config's distributions and profile; arguments as in `draw`."""
    first, second = (
        draw(view, seed, epoch, ids, index, heights, widths, augment.profile)
        for index, view in enumerate((augment.view1, augment.view2))
    )
    return first, second


def draw(
    view: ViewConfig,
    seed: int,
    epoch: int,
    ids: npt.NDArray[np.integer],
    view_index: int,
    heights: npt.NDArray[np.integer],
    widths: npt.NDArray[np.integer],
    profile: Profile = "byol",
) -> ViewParams:
    """Samples the parameters of one view, as the reference implementation (byol/utils) or torchvision does.

    Args:
        view: the distributions.
        seed: 0 <= seed < 2**63.
        epoch: 0-based.
        ids: (N,) sample ids.
        view_index: 0 or 1; the two views are independent.
        heights: (N,) stored heights in pixels.
        widths: (N,) stored widths in pixels.
        profile: decides how the window is sampled, and whether brightness is an offset or a factor.
    """
    byol = profile == "byol"
    numbers = uniform(seed, epoch, ids, view_index, _TRIES if byol else _TRIES + 2 * (CROP_TRIES - 1))
    u = dict(zip(SLOTS, numbers, strict=False))
    sides = heights.astype(np.int64), widths.astype(np.int64)
    crop = _byol_crop(view, numbers, *sides) if byol else _torchvision_crop(view, numbers, *sides)
    top, left, height, width = (side.astype(np.int32) for side in crop)
    neutral = 0 if byol else 1  # of the brightness: an offset or a factor

    def between(name: str, low: float, high: float) -> npt.NDArray[np.float32]:
        return _between(u[name], low, high).astype(np.float32)

    return ViewParams(
        top=top,
        left=left,
        height=height,
        width=width,
        flip=u["flip"] < view.flip,
        jitter=u["jitter"] < view.jitter,
        order=JITTER_ORDERS[(u["order"] * len(JITTER_ORDERS)).astype(np.int64)],
        brightness=between("brightness", neutral - view.brightness, neutral + view.brightness),
        contrast=between("contrast", 1 - view.contrast, 1 + view.contrast),
        saturation=between("saturation", 1 - view.saturation, 1 + view.saturation),
        hue=between("hue", -view.hue, view.hue),
        gray=u["gray"] < view.gray,
        blur=u["blur"] < view.blur,
        sigma=between("sigma", *view.blur_sigma),
        solarize=u["solarize"] < view.solarize,
    )


def _byol_crop(view: ViewConfig, u: Uniform, heights: Sides, widths: Sides) -> list[npt.NDArray[np.float64]]:
    """The reference's window: sides rounded, clamped to the image (at least one pixel), placed uniformly.

    `u` are (SLOTS, N) random numbers: first area U(crop_area), ratio exp(U(log crop_ratio)), place. Returns top, left,
    height and width, each (N,); top and left are not yet rounded down.
    """
    height, width = _sides(view, u[0], u[1], heights, widths)
    height, width = np.clip(height, 1, heights), np.clip(width, 1, widths)
    return [u[2] * (heights - height + 1), u[3] * (widths - width + 1), height, width]


def _torchvision_crop(
    view: ViewConfig, u: Uniform, heights: Sides, widths: Sides
) -> list[npt.NDArray[np.float64]]:
    """torchvision's window (transforms.v2.RandomResizedCrop): the first of ten that fits into the image.

    If none fits, the largest centered window whose ratio is the allowed one nearest to the image's own. Arguments and
    result as in `_byol_crop`, but u is (_TRIES + 18, N): area and ratio of the other nine tries come last.
    """
    tries = np.concatenate([u[:2], u[_TRIES:]])
    height, width = _sides(view, tries[::2], tries[1::2], heights, widths)  # (10, N)
    fits = (height > 0) & (height <= heights) & (width > 0) & (width <= widths)
    first, row = fits.argmax(0), np.arange(len(heights))
    height, width = height[first, row], width[first, row]
    top, left = u[2] * (heights - height + 1), u[3] * (widths - width + 1)

    low, high = view.crop_ratio
    ratio = widths / heights
    all_rows = np.where(ratio < low, np.rint(widths / low), heights)
    all_columns = np.where(ratio > high, np.rint(heights * high), widths)
    centered = [(heights - all_rows) // 2, (widths - all_columns) // 2, all_rows, all_columns]
    drawn = fits.any(0)
    return [np.where(drawn, a, b) for a, b in zip((top, left, height, width), centered, strict=True)]


def _sides(
    view: ViewConfig, area: Uniform, ratio: Uniform, heights: Sides, widths: Sides
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Height and width of windows, rounded, of any size; area and ratio are random numbers (..., N)."""
    pixels = _between(area, *view.crop_area) * heights * widths
    aspect = np.exp(_between(ratio, *np.log(view.crop_ratio)))
    return np.rint(np.sqrt(pixels / aspect)), np.rint(np.sqrt(pixels * aspect))


def _between(u: npt.NDArray[np.float64], low: float, high: float) -> npt.NDArray[np.float64]:
    return low + (high - low) * u
