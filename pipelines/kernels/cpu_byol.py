"""Profile byol, compiled: its resize and its color operations, as torch_backend.py defines them."""

import math

import numpy as np
import numpy.typing as npt

from byolt.pipelines.kernels.cpu_rows import TINY, clip, compiled, keys
from byolt.pipelines.kernels.cpu_walks import compile_view
from byolt.pipelines.kernels.inputs import Floats

_TABLE = 1024  # steps between two pixels in the reference's table of the cubic kernel


@compiled
def _count(length: int, size: int) -> int:
    return 4


@compiled
def _weigh(length: int, size: int, place: int, weights: npt.NDArray[np.float64]) -> int:
    """Keys' kernel, not antialiased."""
    center = (place + 0.5) * (length / size) - 0.5
    floor = math.floor(center)
    fraction = np.rint((center - floor) * _TABLE) / _TABLE
    for tap in range(4):
        weights[tap] = keys(abs(fraction - (tap - 1))) if 0 <= floor + tap - 1 < length else 0.0
    return floor - 1


@compiled
def _brightness(r: Floats, g: Floats, b: Floats, value: np.float32) -> None:
    for x in range(len(r)):
        r[x] = clip(r[x] + value)
        g[x] = clip(g[x] + value)
        b[x] = clip(b[x] + value)


@compiled
def _saturation(r: Floats, g: Floats, b: Floats, value: np.float32) -> None:
    """S = (V - m) / V becomes min(1, S value): V - x of each channel x is scaled alike."""
    for x in range(len(r)):
        top = max(max(r[x], g[x]), b[x])
        spread = top - min(min(r[x], g[x]), b[x])
        factor = min(value, top / max(spread, TINY))
        r[x] = top - (top - r[x]) * factor
        g[x] = top - (top - g[x]) * factor
        b[x] = top - (top - b[x]) * factor


make_view = compile_view(_count, _weigh, _brightness, _saturation, margin=2, gray_mean=False, mirror=False)
