"""The table that the GPU's kernels work through: one row, a job, for each view of each image. Filled by numpy."""

import numpy as np
import numpy.typing as npt

from byolt.pipelines.kernels.inputs import NEGLIGIBLE, NOTHING, KernelParams, Pixels
from byolt.pipelines.views import CONTRAST, HUE

JOB = np.dtype(
    [
        ("source", "i8"),  # address of the window's first pixel
        ("target", "i8"),  # address of the view
        ("stride", "i4"),  # bytes from one row of the image to the next
        ("height", "i4"),  # of the window
        ("width", "i4"),
        ("flip", "i4"),
        ("before", "i4", 3),  # color operations before contrast, then NOTHING
        ("after", "i4", 3),  # those after it
        ("value", "f4", 4),  # by operation; of hue the turn in sixths, in [0, 6)
        ("gray", "i4"),
        ("solarize", "i4"),
        ("radius", "i4"),  # of the blur; 0 without one
        ("exponent", "f4"),  # the tap at distance k weighs center * exp(exponent * k * k)
        ("center", "f4"),
        ("blurred", "i4"),  # in row i: the number of the i-th job that has a blur
    ]
)


def fill(
    jobs: npt.NDArray[np.void], pixels: Pixels, view: KernelParams, taps: int, target: int, step: int
) -> None:
    """Writes the jobs (N,) of one view of N images, all but `blurred`.

    The blur kernel has an odd number of taps. The views lie at `target`, `target + step`, ..., in bytes.
    """
    top, left, height, width = view.window.T
    stride = 3 * pixels.box[:, 3]
    jobs["source"] = pixels.address + top * stride + 3 * left
    jobs["target"] = target + np.arange(len(jobs)) * step
    jobs["stride"], jobs["height"], jobs["width"], jobs["flip"] = stride, height, width, view.flip
    jitter = view.order[:, 0] != NOTHING
    contrast = np.where(jitter, np.argmax(view.order == CONTRAST, 1), 4)[:, None]
    jobs["before"] = np.where(np.arange(3) < contrast, view.order[:, :3], NOTHING)
    jobs["after"] = np.where(np.arange(1, 4) > contrast, view.order[:, 1:], NOTHING)
    jobs["value"] = view.value
    jobs["value"][:, CONTRAST] = np.where(jitter, view.value[:, CONTRAST], 1)
    jobs["value"][:, HUE] = 6 * (view.value[:, HUE] - np.floor(view.value[:, HUE]))
    jobs["gray"], jobs["solarize"] = view.gray, view.solarize
    drawn = view.sigma > 0
    jobs["exponent"] = exponent = -0.5 / np.where(drawn, view.sigma, 1).astype(float) ** 2
    weights = np.exp(exponent[:, None] * np.arange(1, taps // 2 + 1) ** 2)
    # Normalized over all taps, including the dropped ones, as the reference does.
    jobs["center"] = 1 / (1 + 2 * weights.sum(1))
    jobs["radius"] = np.where(drawn, (weights > NEGLIGIBLE).sum(1), 0)


def list_blurred(jobs: npt.NDArray[np.void]) -> int:
    """Lists the jobs that have a blur in the column `blurred`, from the first row on; returns their number."""
    which = np.flatnonzero(jobs["radius"])
    jobs["blurred"][: len(which)] = which
    return len(which)
