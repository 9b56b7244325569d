"""The compiled operations on rows of pixels that both profiles share.

Rows are planar float32. The inner loops are written for the compiler to vectorize: no float64 (hence the float32
constants), no index that could be negative (numba would test its sign), one simple body each. Hue and saturation are
computed without HSV, equal up to rounding: a new hue keeps the largest and the smallest channel and moves the others
between them.
"""

import math
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from byolt.pipelines.kernels.inputs import NEGLIGIBLE, Floats
from byolt.pipelines.views import GRAY_WEIGHTS

ZERO, HALF, ONE, TWO, THREE, FOUR, SIX = (np.float32(x) for x in (0, 0.5, 1, 2, 3, 4, 6))
RED, GREEN, BLUE = (np.float32(x) for x in GRAY_WEIGHTS)
TINY = np.float32(1e-30)  # in place of a zero divisor whose dividend is zero

# Each function needs a unique name, also those that a function makes: a process that loads two of one name, compiled by
# different processes, from numba's cache would call one for the other.
compiled = numba.njit(nogil=True, fastmath=True, error_model="numpy")


class Work(NamedTuple):
    """A thread's memory, and the constants of all views. Every end has a pad for the blur's border."""

    planes: Floats  # (3, (pad + size + pad) * size) rows of each channel
    line: Floats  # (3, pad + size + pad) one row of each channel
    blur_weights: Floats  # (pad + 1,)
    # 1 and size: from a constant 1 the compiler would learn that neighbors share taps, carry them from pixel to pixel
    # and not vectorize, which is five times slower.
    steps: npt.NDArray[np.int64]
    scale: Floats  # (3,) normalization: x scale + shift
    shift: Floats


@compiled
def work_of(size: int, taps: int, steps: Any, norm: Floats) -> Work:
    """Memory for views of a size and a blur of `taps` taps."""
    pad = taps // 2 + 1
    return Work(
        planes=np.zeros((3, (size + 2 * pad) * size), np.float32),
        line=np.zeros((3, size + 2 * pad), np.float32),
        blur_weights=np.empty(pad + 1, np.float32),
        steps=steps,
        scale=norm[0],
        shift=norm[1],
    )


@compiled
def clip(x: np.float32) -> np.float32:
    """To [0, 1]."""
    return min(max(x, ZERO), ONE)


@compiled
def contrast(row: Floats, value: np.float32, mean: np.float32, out: Floats) -> None:
    for x in range(len(out)):
        out[x] = clip((row[x] - mean) * value + mean)


@compiled
def keys(distance: float) -> float:
    """Keys' cubic kernel (a = -0.5) at a distance >= 0."""
    if distance <= 1:
        return (1.5 * distance - 2.5) * distance * distance + 1
    if distance < 2:
        return ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return 0.0


@compiled
def blend_rows(a: Any, b: Any, c: Any, d: Any, weights: Floats, out: Floats) -> None:
    """Four rows of uint8 become one of float32."""
    wa, wb, wc, wd = weights[0], weights[1], weights[2], weights[3]
    for x in range(len(out)):
        out[x] = wa * np.float32(a[x]) + wb * np.float32(b[x]) + wc * np.float32(c[x]) + wd * np.float32(d[x])


@compiled
def add_rows(a: Any, b: Any, c: Any, d: Any, weights: Floats, out: Floats) -> None:
    """Adds four more rows to the result of `blend_rows`."""
    wa, wb, wc, wd = weights[0], weights[1], weights[2], weights[3]
    for x in range(len(out)):
        out[x] += (
            wa * np.float32(a[x]) + wb * np.float32(b[x]) + wc * np.float32(c[x]) + wd * np.float32(d[x])
        )


@compiled
def blend_columns(
    line: Floats, columns: Any, weights: Floats, taps: int, r: Floats, g: Floats, b: Floats
) -> None:
    """A row of interleaved pixels, margins included, becomes one of the view's width, planar and clipped.

    Unsigned positions: numba would test the sign of others.
    """
    for x in range(len(r)):
        at = np.uint64(3 * columns[x])
        red, green, blue = ZERO, ZERO, ZERO
        for k in range(taps):
            weight, pixel = weights[x, k], at + np.uint64(3 * k)
            red += weight * line[pixel]
            green += weight * line[pixel + np.uint64(1)]
            blue += weight * line[pixel + np.uint64(2)]
        r[x], g[x], b[x] = clip(red), clip(green), clip(blue)


@compiled
def hue(r: Floats, g: Floats, b: Floats, value: np.float32) -> None:
    """The channels are m + (V - m) times a trapezoid of the hue: |h - 3| - 1 for red, 2 - |h - 2|, 2 - |h - 4|."""
    turn = SIX * (value - np.float32(math.floor(value)))  # [0, 6): hues are counted in sixths here
    for x in range(len(r)):
        red, green, blue = r[x], g[x], b[x]
        top = max(max(red, green), blue)
        low = min(min(red, green), blue)
        spread = top - low
        h = FOUR + (red - green) / max(spread, TINY)
        h = TWO + (blue - red) / max(spread, TINY) if top == green else h
        h = (green - blue) / max(spread, TINY) if top == red else h
        h += turn
        h = h + SIX if h < ZERO else h
        h = h - SIX if h >= SIX else h
        r[x] = low + spread * clip(abs(h - THREE) - ONE)
        g[x] = low + spread * clip(TWO - abs(h - TWO))
        b[x] = low + spread * clip(TWO - abs(h - FOUR))


@compiled
def gray(r: Floats, g: Floats, b: Floats) -> None:
    """Luma, left in r."""
    for x in range(len(r)):
        r[x] = RED * r[x] + GREEN * g[x] + BLUE * b[x]


@compiled
def total(row: Floats) -> np.float32:
    """The sum of a row."""
    result = ZERO
    for x in range(len(row)):
        result += row[x]
    return result


@compiled
def planar(planes: Floats, at: int, size: int) -> Any:
    """A row of the three channels."""
    return planes[0, at : at + size], planes[1, at : at + size], planes[2, at : at + size]


@compiled
def blur_taps(sigma: np.float32, taps: int, weights: Floats) -> int:
    """Weights of the taps at distances 0, 1, ..., and zeros; returns the largest distance that is not dropped.

    They are normalized over all `taps`, including the dropped ones, as the reference does.
    """
    weights[:] = ZERO
    weights[0] = ONE
    if sigma <= 0:
        return 0
    radius, total = 0, 1.0
    for k in range(1, taps // 2 + 1):
        weight = math.exp(-0.5 * (k / float(sigma)) ** 2)
        total += 2 * weight
        if weight > NEGLIGIBLE:
            weights[k] = weight
            radius = k
    for k in range(radius + 1):
        weights[k] = weights[k] / total
    return radius


@compiled
def _first_taps(
    s: Floats, i: Any, w0: Any, a: Any, b: Any, w1: Any, c: Any, d: Any, w2: Any, out: Floats
) -> None:
    for x in range(len(out)):
        k = np.uint64(x)
        out[x] = w0 * s[i + k] + w1 * (s[a + k] + s[b + k]) + w2 * (s[c + k] + s[d + k])


@compiled
def _more_taps(s: Floats, a: Any, b: Any, w1: Any, c: Any, d: Any, w2: Any, out: Floats) -> None:
    for x in range(len(out)):
        k = np.uint64(x)
        out[x] += w1 * (s[a + k] + s[b + k]) + w2 * (s[c + k] + s[d + k])


@compiled
def blur(source: Floats, at: int, step: int, weights: Floats, radius: int, out: Floats) -> None:
    """out[x] = sum over k of weights[|k|] * source[at + x + k step]: along a row or, with a row's length, a column.

    Two distances a walk halve the traffic to and from `out`. The loops are functions of their own, because the compiler
    does not vectorize them inside a branch.
    """
    i = np.uint64(at)
    for k in range(1, radius + 1, 2):
        near, far = np.uint64(k * step), np.uint64((k + 1) * step)
        a, b, c, d = i - near, i + near, i - far, i + far
        if k == 1:
            _first_taps(source, i, weights[0], a, b, weights[1], c, d, weights[2], out)
        else:
            _more_taps(source, a, b, weights[k], c, d, weights[k + 1], out)


@compiled
def deliver(
    r: Floats, g: Floats, b: Floats, solarize: bool, scale: Floats, shift: Floats, out: Floats
) -> None:
    """Clipped, solarized, normalized (x scale + shift), interleaved: (size,) three times to (3 * size,)."""
    s0, s1, s2, t0, t1, t2 = scale[0], scale[1], scale[2], shift[0], shift[1], shift[2]
    limit = HALF if solarize else TWO
    for x in range(len(r)):
        red, green, blue = clip(r[x]), clip(g[x]), clip(b[x])
        out[3 * x] = (red if red < limit else ONE - red) * s0 + t0
        out[3 * x + 1] = (green if green < limit else ONE - green) * s1 + t1
        out[3 * x + 2] = (blue if blue < limit else ONE - blue) * s2 + t2


@compiled
def mirror(values: Floats, pad: int, size: int, step: int, radius: int) -> None:
    """Fills the pads of pad + size + pad items of `step` numbers each: item -k becomes item k, at both ends."""
    last = pad + size - 1
    for k in range(1, radius + 1):
        for x in range(step):
            values[(pad - k) * step + x] = values[(pad + k) * step + x]
            values[(last + k) * step + x] = values[(last - k) * step + x]
