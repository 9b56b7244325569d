"""Profile torchvision, compiled: its resize and colour operations, as torch_backend.py defines them.

An axis that shrinks by a factor s is filtered by a kernel s times as wide: 4 s taps, where the other profile has 4.
"""

import math
from typing import Any

import numpy as np

from byolt.pipelines.kernels.cpu_rows import (
    BLUE,
    GREEN,
    ONE,
    RED,
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


@compiled
def _tap_count(length: int, size: int) -> int:
    """Taps of an axis, at most; a multiple of 4."""
    return 4 * math.ceil((2 * math.ceil(2 * max(length / size, 1.0)) + 1) / 4)


@compiled
def _antialias_taps(length: int, size: int, flip: bool, unit: float, first: Any, weights: Floats) -> None:
    """Keys' kernel (a = -0.5), stretched where the axis shrinks: first taps (size,), weights (size, taps)."""
    scale = length / size
    stretch = max(scale, 1.0)
    for place in range(size):
        centre = (place + 0.5) * scale
        start = max(int(centre - 2 * stretch + 0.5), 0)
        stop = min(int(centre + 2 * stretch + 0.5), length)
        to = size - 1 - place if flip else place
        weights[to] = 0
        total = 0.0
        for tap in range(stop - start):
            distance = abs((start + tap + 0.5 - centre) / stretch)
            weight = 0.0
            if distance < 1:
                weight = (1.5 * distance - 2.5) * distance * distance + 1
            elif distance < 2:
                weight = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
            weights[to, tap] = weight
            total += weight
        for tap in range(stop - start):
            weights[to, tap] = weights[to, tap] / total * unit
        first[to] = start


@compiled
def _add_rows(a: Any, b: Any, c: Any, d: Any, weights: Floats, out: Floats) -> None:
    """Four more rows of uint8, on top of what `blend_rows` made."""
    wa, wb, wc, wd = weights[0], weights[1], weights[2], weights[3]
    for x in range(len(out)):
        out[x] += (
            wa * np.float32(a[x]) + wb * np.float32(b[x]) + wc * np.float32(c[x]) + wd * np.float32(d[x])
        )


@compiled
def _brightness(r: Floats, g: Floats, b: Floats, value: np.float32) -> None:
    for x in range(len(r)):
        r[x] = clip(r[x] * value)
        g[x] = clip(g[x] * value)
        b[x] = clip(b[x] * value)


@compiled
def _saturation(r: Floats, g: Floats, b: Floats, value: np.float32) -> None:
    """Away from, or towards, the grey image."""
    for x in range(len(r)):
        gray = (RED * r[x] + GREEN * g[x] + BLUE * b[x]) * (ONE - value)
        r[x] = clip(r[x] * value + gray)
        g[x] = clip(g[x] * value + gray)
        b[x] = clip(b[x] * value + gray)


_color = compile_color(_brightness, _saturation)


@compiled
def _resize(image: Any, window: Any, flip: bool, operations: Any, values: Floats, work: Work) -> Any:
    """First walk: the window, resized, with the operations drawn before contrast; the mean of its grey image (3,)."""
    top, left, height, width = window[0], window[1], window[2], window[3]
    pad = len(work.blur_weights) - 1
    size = work.line.shape[1] - 2 * pad
    row_taps, column_taps = _tap_count(height, size), _tap_count(width, size)
    rows, row_weights = np.empty(size, np.int64), np.empty((size, row_taps), np.float32)
    columns, column_weights = np.empty(size, np.int64), np.empty((size, column_taps), np.float32)
    _antialias_taps(height, size, False, 1 / 255, rows, row_weights)
    _antialias_taps(width, size, flip, 1.0, columns, column_weights)
    line = np.zeros(3 * (width + column_taps), np.float32)  # taps of weight 0 reach beyond the window
    inside = line[: 3 * width]
    start, stop = 3 * left, 3 * (left + width)
    sums = np.zeros(3)
    for y in range(size):
        for k in range(0, row_taps, 4):
            first = rows[y] + k  # a row below the window weighs 0: any other is as good
            a = image[top + min(first, height - 1), start:stop]
            b = image[top + min(first + 1, height - 1), start:stop]
            c = image[top + min(first + 2, height - 1), start:stop]
            d = image[top + min(first + 3, height - 1), start:stop]
            if k == 0:
                blend_rows(a, b, c, d, row_weights[y], inside)
            else:
                _add_rows(a, b, c, d, row_weights[y, k:], inside)
        red, green, blue = planar(work.planes, (pad + y) * size, size)
        blend_columns(line, columns, column_weights, column_taps, red, green, blue)
        _color(red, green, blue, operations, values)
        sums[0] += total(red)
        sums[1] += total(green)
        sums[2] += total(blue)
    sums[:] = (RED * sums[0] + GREEN * sums[1] + BLUE * sums[2]) / (size * size)
    return sums


make_view = compile_view(_resize, _color, mirror=True)
