"""The table from which the GPU's kernels work: one row, a job, for each view of each image. Pure numpy, no loops."""

import numpy as np
import numpy.typing as npt

from byolt.pipelines.kernels.recipe import NEGLIGIBLE, NOTHING, Pixels, Recipe
from byolt.pipelines.views import CONTRAST, HUE

JOB = np.dtype(
    [
        ("source", "i8"),  # address of the window's first pixel
        ("target", "i8"),  # address of the view
        ("stride", "i4"),  # bytes from a row of the image to the next
        ("height", "i4"),  # of the window
        ("width", "i4"),
        ("flip", "i4"),
        ("before", "i4", 3),  # colour operations before contrast, then NOTHING
        ("after", "i4", 3),  # and after it
        ("value", "f4", 4),  # by operation; of hue the turn in sixths, in [0, 6)
        ("gray", "i4"),
        ("solarize", "i4"),
        ("radius", "i4"),  # of the blur; 0 without
        ("exponent", "f4"),  # the tap at distance k weighs centre * exp(exponent * k * k)
        ("centre", "f4"),
        ("blurred", "i4"),  # of row i: which job is the i-th that has a blur
    ]
)


def fill(
    jobs: npt.NDArray[np.void], pixels: Pixels, recipe: Recipe, taps: int, target: int, step: int
) -> None:
    """Writes the jobs of one view of N images, all but `blurred`.

    Args:
        jobs: (N,) of JOB.
        pixels: the decoded images.
        recipe: what was drawn.
        taps: odd length of the blur kernel.
        target: address of the first view.
        step: bytes from a view to the next.
    """
    top, left, height, width = recipe.window.T
    stride = 3 * pixels.box[:, 3]
    jobs["source"] = pixels.address + top * stride + 3 * left
    jobs["target"] = target + np.arange(len(jobs)) * step
    jobs["stride"], jobs["height"], jobs["width"], jobs["flip"] = stride, height, width, recipe.flip
    jitter = recipe.order[:, 0] != NOTHING
    contrast = np.where(jitter, np.argmax(recipe.order == CONTRAST, 1), 4)[:, None]
    jobs["before"] = np.where(np.arange(3) < contrast, recipe.order[:, :3], NOTHING)
    jobs["after"] = np.where(np.arange(1, 4) > contrast, recipe.order[:, 1:], NOTHING)
    jobs["value"] = recipe.value
    jobs["value"][:, CONTRAST] = np.where(jitter, recipe.value[:, CONTRAST], 1)
    jobs["value"][:, HUE] = 6 * (recipe.value[:, HUE] - np.floor(recipe.value[:, HUE]))
    jobs["gray"], jobs["solarize"] = recipe.gray, recipe.solarize
    drawn = recipe.sigma > 0
    jobs["exponent"] = exponent = -0.5 / np.where(drawn, recipe.sigma, 1).astype(float) ** 2
    weights = np.exp(exponent[:, None] * np.arange(1, taps // 2 + 1) ** 2)
    # Normalised over all taps, those that are dropped included, as the reference's are.
    jobs["centre"] = 1 / (1 + 2 * weights.sum(1))
    jobs["radius"] = np.where(drawn, (weights > NEGLIGIBLE).sum(1), 0)


def list_blurred(jobs: npt.NDArray[np.void]) -> int:
    """Writes to `blurred` of the first jobs which of the jobs have a blur; returns how many."""
    which = np.flatnonzero(jobs["radius"])
    jobs["blurred"][: len(which)] = which
    return len(which)
