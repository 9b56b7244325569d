"""What the compiled kernels of both profiles share: operations on rows of pixels, and the three walks over a view.

Rows are planar float32, and inner loops are written for the compiler to vectorise: no float64 (hence the float32
constants), no index that could be negative (numba would test its sign), one simple body each. What the definitions
compute through HSV is computed without it, equal up to rounding: a new hue keeps the largest and the smallest channel
and moves the others between them.
"""

import math
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from byolt.pipelines.kernels.recipe import NEGLIGIBLE, Floats, Recipe
from byolt.pipelines.views import BRIGHTNESS, CONTRAST, HUE, SATURATION

ZERO, HALF, ONE, TWO, THREE, FOUR, SIX = (np.float32(x) for x in (0, 0.5, 1, 2, 3, 4, 6))
RED, GREEN, BLUE = np.float32(0.2989), np.float32(0.5870), np.float32(0.1140)  # torch_backend.GRAY_WEIGHTS
TINY = np.float32(1e-30)  # in place of a zero divisor whose dividend is zero

# Each function needs a name of its own, those that a function makes as well: of two with one name that different
# processes compiled, a third that loads both from numba's cache would call one for the other.
compiled = numba.njit(nogil=True, fastmath=True, error_model="numpy")


class Work(NamedTuple):
    """A thread's memory, and what is the same for all views. At every end there is a pad for the blur's border."""

    planes: Floats  # (3, (pad + size + pad) * size) rows of each channel
    line: Floats  # (3, pad + size + pad) one row of each channel
    blur_weights: Floats  # (pad + 1,)
    # 1 and size: as a constant, the 1 would tell the compiler that neighbours share taps; it then carries them from
    # pixel to pixel and does not vectorise, which is five times slower.
    steps: npt.NDArray[np.int64]
    scale: Floats  # (3,) normalisation: x scale + shift
    shift: Floats


@compiled
def work_of(size: int, taps: int, steps: Any, norm: Floats) -> Work:
    """Memory for views of a size and a blur of so many taps."""
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
def _contrast(row: Floats, value: np.float32, mean: np.float32, out: Floats) -> None:
    for x in range(len(out)):
        out[x] = clip((row[x] - mean) * value + mean)


@compiled
def blend_rows(a: Any, b: Any, c: Any, d: Any, weights: Floats, out: Floats) -> None:
    """Four rows of uint8 become one of float32."""
    wa, wb, wc, wd = weights[0], weights[1], weights[2], weights[3]
    for x in range(len(out)):
        out[x] = wa * np.float32(a[x]) + wb * np.float32(b[x]) + wc * np.float32(c[x]) + wd * np.float32(d[x])


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
def _hue(r: Floats, g: Floats, b: Floats, value: np.float32) -> None:
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
def _gray(r: Floats, g: Floats, b: Floats) -> None:
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
def _blur_taps(sigma: np.float32, taps: int, weights: Floats) -> int:
    """Weights of the taps at distances 0, 1, ..., and zeros; returns the largest distance that is not dropped.

    They are normalised over all `taps`, the dropped ones included, as the reference's are.
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
def _blur(source: Floats, at: int, step: int, weights: Floats, radius: int, out: Floats) -> None:
    """out[x] = sum over k of weights[|k|] * source[at + x + k step]: along a row or, with a row's length, a column.

    Two distances a walk halve the traffic to and from `out`. Loops of their own: with a branch around them the compiler
    does not vectorise.
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
def _deliver(
    r: Floats, g: Floats, b: Floats, solarize: bool, scale: Floats, shift: Floats, out: Floats
) -> None:
    """Clipped, solarized, normalised (x scale + shift), interleaved: (size,) three times to (3 * size,)."""
    s0, s1, s2, t0, t1, t2 = scale[0], scale[1], scale[2], shift[0], shift[1], shift[2]
    limit = HALF if solarize else TWO
    for x in range(len(r)):
        red, green, blue = clip(r[x]), clip(g[x]), clip(b[x])
        out[3 * x] = (red if red < limit else ONE - red) * s0 + t0
        out[3 * x + 1] = (green if green < limit else ONE - green) * s1 + t1
        out[3 * x + 2] = (blue if blue < limit else ONE - blue) * s2 + t2


@compiled
def _mirror(values: Floats, pad: int, size: int, step: int, radius: int) -> None:
    """Fills the pads of pad + size + pad items of `step` numbers each: item -k becomes item k, at both ends."""
    last = pad + size - 1
    for k in range(1, radius + 1):
        for x in range(step):
            values[(pad - k) * step + x] = values[(pad + k) * step + x]
            values[(last + k) * step + x] = values[(last - k) * step + x]


def compile_color(brightness: Any, saturation: Any) -> Any:
    """A profile's colour operations but contrast, in the order drawn, on a row: `color` of `compile_view`.

    Args:
        brightness: compiled: (r, g, b, value), in place.
        saturation: likewise.
    """

    def color(r: Floats, g: Floats, b: Floats, operations: Any, values: Floats) -> None:
        for operation in operations:
            if operation == BRIGHTNESS:
                brightness(r, g, b, values[BRIGHTNESS])
            elif operation == SATURATION:
                saturation(r, g, b, values[SATURATION])
            elif operation == HUE:
                _hue(r, g, b, values[HUE])

    color.__qualname__ = f"color of {brightness.__module__}"
    return compiled(color)


def compile_view(resize: Any, color: Any, mirror: bool) -> Any:
    """The three walks of a profile.

    Args:
        resize: the first walk, compiled: (image, window, flip, operations, values, work) -> float64 (3,). Rows of the
            view, after the operations drawn before contrast, to work.planes; returns what contrast turns about.
        color: compiled: (r, g, b, operations, values); the operations but contrast, in that order, on a row.
        mirror: whether the blur sees the mirrored image beyond its border, or zeros.

    Returns:
        A compiled function: view i of `recipe`: image uint8 (height, 3 * width), out float32 (size, 3 * size).
    """

    def view(image: Any, recipe: Recipe, i: int, taps: int, work: Work, out: Floats) -> None:
        size, pad = len(out), len(work.blur_weights) - 1
        order, values, solarize = recipe.order[i], recipe.value[i], recipe.solarize[i]
        place = 0
        while place < 4 and order[place] != CONTRAST:
            place += 1
        factor = values[CONTRAST] if place < 4 else ONE
        means = resize(image, recipe.window[i], recipe.flip[i], order[:place], values, work)

        radius = _blur_taps(recipe.sigma[i], taps, work.blur_weights)
        channels = 1 if recipe.gray[i] else 3
        red, green, blue = planar(work.line, pad, size)
        second, third = (red, red) if channels == 1 else (green, blue)
        for y in range(size):
            rows = planar(work.planes, (pad + y) * size, size)
            _contrast(rows[0], factor, np.float32(means[0]), red)
            _contrast(rows[1], factor, np.float32(means[1]), green)
            _contrast(rows[2], factor, np.float32(means[2]), blue)
            color(red, green, blue, order[place + 1 :], values)
            if channels == 1:
                _gray(red, green, blue)
            if radius:
                for c in range(channels):
                    if mirror:
                        _mirror(work.line[c], pad, size, 1, radius)
                    _blur(work.line[c], pad, work.steps[0], work.blur_weights, radius, rows[c])
            else:
                _deliver(red, second, third, solarize, work.scale, work.shift, out[y])
        if radius:
            if mirror:
                for c in range(channels):
                    _mirror(work.planes[c], pad, size, size, radius)
            lines = (red, green, blue)
            for y in range(size):
                for c in range(channels):
                    _blur(
                        work.planes[c], (pad + y) * size, work.steps[1], work.blur_weights, radius, lines[c]
                    )
                _deliver(red, second, third, solarize, work.scale, work.shift, out[y])

    view.__qualname__ = f"view of {resize.__module__}"
    return compiled(view)
