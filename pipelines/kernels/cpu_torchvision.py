"""Profile torchvision, compiled: its resize and color operations, as torch_backend.py defines them.

An axis that shrinks by a factor s is filtered by a kernel s times as wide: 4 s taps, where profile byol has 4.
"""

import math

import numpy as np
import numpy.typing as npt

from byolt.pipelines.kernels.cpu_rows import BLUE, GREEN, ONE, RED, clip, compiled, keys
from byolt.pipelines.kernels.cpu_walks import compile_view
from byolt.pipelines.kernels.inputs import Floats


@compiled
def _count(length: int, size: int) -> int:
    """At most; a multiple of 4."""
    return 4 * math.ceil((2 * math.ceil(2 * max(length / size, 1.0)) + 1) / 4)


@compiled
def _weigh(length: int, size: int, place: int, weights: npt.NDArray[np.float64]) -> int:
    """Keys' kernel, stretched where the axis shrinks."""
    stretch = max(length / size, 1.0)
    center = (place + 0.5) * (length / size)
    start = max(int(center - 2 * stretch + 0.5), 0)
    stop = min(int(center + 2 * stretch + 0.5), length)
    for tap in range(len(weights)):
        weights[tap] = keys(abs((start + tap + 0.5 - center) / stretch)) if start + tap < stop else 0.0
    return start


@compiled
def _brightness(r: Floats, g: Floats, b: Floats, value: np.float32) -> None:
    for x in range(len(r)):
        r[x] = clip(r[x] * value)
        g[x] = clip(g[x] * value)
        b[x] = clip(b[x] * value)


@compiled
def _saturation(r: Floats, g: Floats, b: Floats, value: np.float32) -> None:
    """Away from, or toward, the gray image."""
    for x in range(len(r)):
        gray = (RED * r[x] + GREEN * g[x] + BLUE * b[x]) * (ONE - value)
        r[x] = clip(r[x] * value + gray)
        g[x] = clip(g[x] * value + gray)
        b[x] = clip(b[x] * value + gray)


make_view = compile_view(_count, _weigh, _brightness, _saturation, margin=0, gray_mean=True, mirror=True)
