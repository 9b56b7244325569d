"""Profile byol, compiled: its resize and its colour operations, as torch_backend.py defines them.

A new saturation scales V - x, V the largest channel and x any of them: HSV's definition without HSV.
"""

import math
from typing import Any

import numpy as np

from byolt.pipelines.kernels.cpu_rows import (
    TINY,
    Work,
    blend_columns,
    blend_rows,
    clip,
    compile_color,
    compile_view,
    compiled,
    planar,
    total,
)
from byolt.pipelines.kernels.recipe import Floats

_TABLE = 1024  # the reference tabulates the cubic kernel in so many steps between two pixels
_MARGIN = 2  # pixels beside a window that taps of weight 0 can reach


@compiled
def _cubic_taps(length: int, size: int, flip: bool, unit: float, first: Any, weights: Floats) -> None:
    """Keys' kernel (a = -0.5): first of 4 taps (size,), from -_MARGIN on counted as 0, and weights (size, 4)."""
    scale = length / size
    for place in range(size):
        centre = (place + 0.5) * scale - 0.5
        floor = math.floor(centre)
        fraction = np.rint((centre - floor) * _TABLE) / _TABLE
        to = size - 1 - place if flip else place
        total = 0.0
        for tap in range(4):
            distance = abs(fraction - (tap - 1))
            weight = 0.0
            if 0 <= floor + tap - 1 < length and distance < 2:
                if distance <= 1:
                    weight = (1.5 * distance - 2.5) * distance * distance + 1
                else:
                    weight = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
            weights[to, tap] = weight
            total += weight
        for tap in range(4):
            weights[to, tap] = weights[to, tap] / total * unit
        first[to] = floor - 1 + _MARGIN


@compiled
def _brightness(r: Floats, g: Floats, b: Floats, value: np.float32) -> None:
    for x in range(len(r)):
        r[x] = clip(r[x] + value)
        g[x] = clip(g[x] + value)
        b[x] = clip(b[x] + value)


@compiled
def _saturation(r: Floats, g: Floats, b: Floats, value: np.float32) -> None:
    """S = (V - m) / V becomes min(1, S value)."""
    for x in range(len(r)):
        top = max(max(r[x], g[x]), b[x])
        spread = top - min(min(r[x], g[x]), b[x])
        factor = min(value, top / max(spread, TINY))
        r[x] = top - (top - r[x]) * factor
        g[x] = top - (top - g[x]) * factor
        b[x] = top - (top - b[x]) * factor


_color = compile_color(_brightness, _saturation)


@compiled
def _resize(image: Any, window: Any, flip: bool, operations: Any, values: Floats, work: Work) -> Any:
    """First walk: the window, resized, with the operations drawn before contrast; the means of its channels (3,)."""
    top, left, height, width = window[0], window[1], window[2], window[3]
    pad = len(work.blur_weights) - 1
    size = work.line.shape[1] - 2 * pad
    rows, row_weights = np.empty(size, np.int64), np.empty((size, 4), np.float32)
    columns, column_weights = np.empty(size, np.int64), np.empty((size, 4), np.float32)
    _cubic_taps(height, size, False, 1 / 255, rows, row_weights)
    _cubic_taps(width, size, flip, 1.0, columns, column_weights)
    line = np.zeros(3 * (width + 2 * _MARGIN), np.float32)
    inside = line[3 * _MARGIN : 3 * (_MARGIN + width)]
    start, stop = 3 * left, 3 * (left + width)
    sums = np.zeros(3)
    for y in range(size):
        first = rows[y] - _MARGIN  # a row outside the window weighs 0: any other is as good
        a = image[top + min(max(first, 0), height - 1), start:stop]
        b = image[top + min(max(first + 1, 0), height - 1), start:stop]
        c = image[top + min(max(first + 2, 0), height - 1), start:stop]
        d = image[top + min(max(first + 3, 0), height - 1), start:stop]
        blend_rows(a, b, c, d, row_weights[y], inside)
        red, green, blue = planar(work.planes, (pad + y) * size, size)
        blend_columns(line, columns, column_weights, 4, red, green, blue)
        _color(red, green, blue, operations, values)
        sums[0] += total(red)
        sums[1] += total(green)
        sums[2] += total(blue)
    return sums / (size * size)


make_view = compile_view(_resize, _color, mirror=False)
