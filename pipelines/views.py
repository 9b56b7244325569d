"""What is drawn for a view: crop window, flip, colour jitter, grey, blur, solarize. Pure numpy, nothing is applied.

The parameters of a sample depend on (seed, epoch, id, view) alone: not on the rank, the batch or the back end.
"""

import itertools
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from configs.schema import ViewConfig
from pipelines.philox import uniform

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
JITTER_ORDERS = np.array(list(itertools.permutations(range(4))), np.uint8)  # (24, 4)


@dataclass(frozen=True)
class ViewParams:
    """Parameters of one view of N samples; every field is an array whose first axis is the sample."""

    top: npt.NDArray[np.int32]  # (N,) crop window in pixels of the stored image
    left: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]
    width: npt.NDArray[np.int32]
    flip: npt.NDArray[np.bool_]
    jitter: npt.NDArray[np.bool_]  # whether the next five fields apply
    order: npt.NDArray[
        np.uint8
    ]  # (N, 4) which of BRIGHTNESS, CONTRAST, SATURATION, HUE comes first, second, ...
    brightness: npt.NDArray[np.float32]  # added, range [0, 1]
    contrast: npt.NDArray[np.float32]  # factor about the per-channel mean
    saturation: npt.NDArray[np.float32]  # factor in HSV
    hue: npt.NDArray[np.float32]  # turns in HSV
    gray: npt.NDArray[np.bool_]
    blur: npt.NDArray[np.bool_]
    sigma: npt.NDArray[np.float32]  # pixels of the view; applies where blur is set
    solarize: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.top)

    def __getitem__(self, rows: slice) -> "ViewParams":
        """The parameters of some of the samples."""
        return ViewParams(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def draw(
    view: ViewConfig,
    seed: int,
    epoch: int,
    ids: npt.NDArray[np.integer],
    view_index: int,
    heights: npt.NDArray[np.integer],
    widths: npt.NDArray[np.integer],
) -> ViewParams:
    """Draws one view of every sample, as the reference implementation (byol/utils) draws it.

    The crop is one draw: area U(crop_area), ratio exp(U(log crop_ratio)); sides are rounded, clamped to the image
    (at least one pixel) and placed uniformly.

    Args:
        view: the distribution.
        seed: 0 <= seed < 2**63.
        epoch: 0-based; each has its own draws.
        ids: (N,) sample ids.
        view_index: 0 or 1; the views' draws are independent.
        heights: (N,) stored heights in pixels.
        widths: (N,) stored widths in pixels.

    Returns:
        Parameters of N views.
    """
    u = iter(uniform(seed, epoch, ids, view_index, slots=16))
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)

    area = _between(next(u), *view.crop_area) * heights * widths
    ratio = np.exp(_between(next(u), *np.log(view.crop_ratio)))
    height = np.clip(np.rint(np.sqrt(area / ratio)), 1, heights).astype(np.int32)
    width = np.clip(np.rint(np.sqrt(area * ratio)), 1, widths).astype(np.int32)
    return ViewParams(
        top=(next(u) * (heights - height + 1)).astype(np.int32),
        left=(next(u) * (widths - width + 1)).astype(np.int32),
        height=height,
        width=width,
        flip=next(u) < view.flip,
        jitter=next(u) < view.jitter,
        order=JITTER_ORDERS[(next(u) * len(JITTER_ORDERS)).astype(np.int64)],
        brightness=_between(next(u), -view.brightness, view.brightness).astype(np.float32),
        contrast=_between(next(u), 1 - view.contrast, 1 + view.contrast).astype(np.float32),
        saturation=_between(next(u), 1 - view.saturation, 1 + view.saturation).astype(np.float32),
        hue=_between(next(u), -view.hue, view.hue).astype(np.float32),
        gray=next(u) < view.gray,
        blur=next(u) < view.blur,
        sigma=_between(next(u), *view.blur_sigma).astype(np.float32),
        solarize=next(u) < view.solarize,
    )


def _between(u: npt.NDArray[np.float64], low: float, high: float) -> npt.NDArray[np.float64]:
    return low + (high - low) * u
