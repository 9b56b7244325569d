"""Both views of decoded images in compiled loops: window, bicubic resize, flip, colour, blur, solarize, normalise.

The definitions are those of pipelines/torch_backend.py, in float32 throughout; tests/test_kernels.py holds the two to
1e-5 of each other. A view is made in three walks over its rows, so that a row stays in the first-level cache while
everything that needs no other row happens to it:

    1  rows of the window ─► resized row, flipped ─► colour operations drawn before contrast ─► its sum
    2  contrast about the mean ─► colour operations drawn after it ─► grey ─► blur along the row
    3  blur along the columns ─► solarize ─► normalise ─► interleaved output

Rows are planar float32, and inner loops are written for the compiler to vectorise: no float64 (hence the float32
constants), no index that could be negative (numba would test its sign), one simple body each. What the reference
computes through HSV is computed here without it, equal up to rounding: with V the largest channel, m the smallest and
x any of them, a new saturation scales V - x, and a new hue keeps V and m and moves the channels between them.

numba compiles on the first call (seconds) and keeps the code in __pycache__ beside this file, or in the user's cache
folder where that cannot be written (NUMBA_CACHE_DIR moves it). The compiled code runs without the GIL.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types

from configs.schema import AugmentConfig
from pipelines.recipe import NEGLIGIBLE, Floats, Pixels, Recipe, normalisation, write
from pipelines.views import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams

_ZERO, _HALF, _ONE, _TWO, _THREE, _FOUR, _SIX = (np.float32(x) for x in (0, 0.5, 1, 2, 3, 4, 6))
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.5870), np.float32(0.1140)  # torch_backend.GRAY_WEIGHTS
_TINY = np.float32(1e-30)  # in place of a zero divisor whose dividend is zero
_TABLE = 1024  # the reference tabulates the cubic kernel in so many steps between two pixels
_MARGIN = 2  # pixels beside a window that taps of weight 0 can reach
_CHUNK = 16  # images that a thread takes at a time

_compiled = numba.njit(nogil=True, fastmath=True, error_model="numpy")


@numba.extending.intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@numba.extending.intrinsic
def _four_pixels(_context: Any, line: Any, columns: Any, weights: Any, x: Any, r: Any, g: Any, b: Any) -> Any:
    """r, g, b[x : x + 4] = the sums over k of weights[x, k] * line[3 * (columns[x] + k) + channel], clipped to [0, 1].

    Written in LLVM's terms, the channels of a pixel (and a fourth number that is ignored) side by side in a register:
    of plain loops the compiler makes gathers, which took 2.5 times as long.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        four, integer = ir.VectorType(ir.FloatType(), 4), arguments[3].type
        arrays = [
            context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        ]

        def at(base: Any, factor: int, offset: int) -> Any:
            scaled = builder.mul(base, ir.Constant(integer, factor))
            return builder.add(scaled, ir.Constant(integer, offset))

        def place(pointer: Any, position: Any) -> Any:
            return builder.bitcast(builder.gep(pointer, [position]), four.as_pointer())

        def shuffle(first: Any, second: Any, lanes: list[int]) -> Any:
            return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), 4), lanes))

        def limit(value: Any, comparison: str, bound: float) -> Any:
            constant = ir.Constant(four, [bound] * 4)
            return builder.select(
                builder.fcmp_ordered(comparison, value, constant, flags=["fast"]), value, constant
            )

        pixels = []
        for i in range(4):
            column = builder.load(builder.gep(arrays[1], [at(arrays[3], 1, i)]))
            row = builder.load(place(arrays[2], at(arrays[3], 4, 4 * i)), align=4)
            total = None
            for k in range(4):
                pixel = builder.load(place(arrays[0], at(column, 3, 3 * k)), align=4)
                product = builder.fmul(shuffle(row, row, [k] * 4), pixel, flags=["fast"])
                total = product if total is None else builder.fadd(total, product, flags=["fast"])
            pixels.append(limit(limit(total, ">", 0.0), "<", 1.0))
        low = [shuffle(pixels[i], pixels[i + 1], [0, 4, 1, 5]) for i in (0, 2)]
        high = [shuffle(pixels[i], pixels[i + 1], [2, 6, 2, 6]) for i in (0, 2)]
        channels = (
            shuffle(low[0], low[1], [0, 1, 4, 5]),
            shuffle(low[0], low[1], [2, 3, 6, 7]),
            shuffle(high[0], high[1], [0, 1, 4, 5]),
        )
        for target, channel in zip(arrays[4:], channels, strict=True):
            builder.store(channel, place(target, arrays[3]), align=4)
        return context.get_dummy_value()

    return types.void(line, columns, weights, x, r, g, b), generate


@_compiled
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


@_compiled
def _blend_rows(a: Any, b: Any, c: Any, d: Any, weights: Floats, out: Floats) -> None:
    """Four rows of uint8 become one of float32."""
    wa, wb, wc, wd = weights[0], weights[1], weights[2], weights[3]
    for x in range(len(out)):
        out[x] = wa * np.float32(a[x]) + wb * np.float32(b[x]) + wc * np.float32(c[x]) + wd * np.float32(d[x])


@_compiled
def _clip(x: np.float32) -> np.float32:
    return min(max(x, _ZERO), _ONE)


@_compiled
def _blend_columns(line: Floats, columns: Any, weights: Floats, r: Floats, g: Floats, b: Floats) -> None:
    """A row of interleaved pixels, margins included, becomes one of the view's width, planar and clipped."""
    last = len(r) - 4
    for x in range(0, last, 4):
        _four_pixels(line, columns, weights, x, r, g, b)
    _four_pixels(line, columns, weights, last, r, g, b)


@_compiled
def _brightness(r: Floats, g: Floats, b: Floats, value: np.float32) -> None:
    for x in range(len(r)):
        r[x] = _clip(r[x] + value)
        g[x] = _clip(g[x] + value)
        b[x] = _clip(b[x] + value)


@_compiled
def _contrast(row: Floats, value: np.float32, mean: np.float32, out: Floats) -> None:
    for x in range(len(out)):
        out[x] = _clip((row[x] - mean) * value + mean)


@_compiled
def _saturation(r: Floats, g: Floats, b: Floats, value: np.float32) -> None:
    """S = (V - m) / V becomes min(1, S value)."""
    for x in range(len(r)):
        top = max(max(r[x], g[x]), b[x])
        spread = top - min(min(r[x], g[x]), b[x])
        factor = min(value, top / max(spread, _TINY))
        r[x] = top - (top - r[x]) * factor
        g[x] = top - (top - g[x]) * factor
        b[x] = top - (top - b[x]) * factor


@_compiled
def _hue(r: Floats, g: Floats, b: Floats, value: np.float32) -> None:
    """The channels are m + (V - m) times a trapezoid of the hue: |h - 3| - 1 for red, 2 - |h - 2|, 2 - |h - 4|."""
    turn = _SIX * (value - np.float32(math.floor(value)))  # [0, 6): hues are counted in sixths here
    for x in range(len(r)):
        red, green, blue = r[x], g[x], b[x]
        top = max(max(red, green), blue)
        low = min(min(red, green), blue)
        spread = top - low
        h = _FOUR + (red - green) / max(spread, _TINY)
        h = _TWO + (blue - red) / max(spread, _TINY) if top == green else h
        h = (green - blue) / max(spread, _TINY) if top == red else h
        h += turn
        h = h + _SIX if h < _ZERO else h
        h = h - _SIX if h >= _SIX else h
        r[x] = low + spread * _clip(abs(h - _THREE) - _ONE)
        g[x] = low + spread * _clip(_TWO - abs(h - _TWO))
        b[x] = low + spread * _clip(_TWO - abs(h - _FOUR))


@_compiled
def _gray(r: Floats, g: Floats, b: Floats) -> None:
    """Luma, left in r."""
    for x in range(len(r)):
        r[x] = _RED * r[x] + _GREEN * g[x] + _BLUE * b[x]


@_compiled
def _sum(row: Floats) -> np.float32:
    total = _ZERO
    for x in range(len(row)):
        total += row[x]
    return total


@_compiled
def _color(r: Floats, g: Floats, b: Floats, operations: Any, values: Floats) -> None:
    for operation in operations:
        if operation == BRIGHTNESS:
            _brightness(r, g, b, values[BRIGHTNESS])
        elif operation == SATURATION:
            _saturation(r, g, b, values[SATURATION])
        elif operation == HUE:
            _hue(r, g, b, values[HUE])


@_compiled
def _blur_taps(sigma: np.float32, taps: int, weights: Floats) -> int:
    """Weights of the taps at distances 0, 1, ..., and zeros; returns the largest distance that is not dropped.

    They are normalised over all `taps`, the dropped ones included, as the reference's are.
    """
    weights[:] = _ZERO
    weights[0] = _ONE
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


@_compiled
def _first_taps(
    s: Floats, i: Any, w0: Any, a: Any, b: Any, w1: Any, c: Any, d: Any, w2: Any, out: Floats
) -> None:
    for x in range(len(out)):
        k = np.uint64(x)
        out[x] = w0 * s[i + k] + w1 * (s[a + k] + s[b + k]) + w2 * (s[c + k] + s[d + k])


@_compiled
def _more_taps(s: Floats, a: Any, b: Any, w1: Any, c: Any, d: Any, w2: Any, out: Floats) -> None:
    for x in range(len(out)):
        k = np.uint64(x)
        out[x] += w1 * (s[a + k] + s[b + k]) + w2 * (s[c + k] + s[d + k])


@_compiled
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


@_compiled
def _deliver(
    r: Floats, g: Floats, b: Floats, solarize: bool, scale: Floats, shift: Floats, out: Floats
) -> None:
    """Clipped, solarized, normalised (x scale + shift), interleaved: (size,) three times to (3 * size,)."""
    s0, s1, s2, t0, t1, t2 = scale[0], scale[1], scale[2], shift[0], shift[1], shift[2]
    limit = _HALF if solarize else _TWO
    for x in range(len(r)):
        red, green, blue = _clip(r[x]), _clip(g[x]), _clip(b[x])
        out[3 * x] = (red if red < limit else _ONE - red) * s0 + t0
        out[3 * x + 1] = (green if green < limit else _ONE - green) * s1 + t1
        out[3 * x + 2] = (blue if blue < limit else _ONE - blue) * s2 + t2


class Work(NamedTuple):
    """A thread's memory, and what is the same for all views. The pad at every end stays zero: the blur's border."""

    planes: Floats  # (3, (pad + size + pad) * size) rows of each channel
    line: Floats  # (3, pad + size + pad) one row of each channel
    rows: npt.NDArray[np.int64]  # (size,) first taps along the height
    row_weights: Floats  # (size, 4)
    columns: npt.NDArray[np.int64]  # the same along the width
    column_weights: Floats
    blur_weights: Floats  # (pad + 1,)
    # 1 and size: as a constant, the 1 would tell the compiler that neighbours share taps; it then carries them from
    # pixel to pixel and does not vectorise, which is five times slower.
    steps: npt.NDArray[np.int64]
    scale: Floats  # (3,) normalisation: x scale + shift
    shift: Floats


@_compiled
def _channels(planes: Floats, at: int, size: int) -> Any:
    return planes[0, at : at + size], planes[1, at : at + size], planes[2, at : at + size]


@_compiled
def _resize(image: Any, window: Any, flip: bool, operations: Any, values: Floats, work: Work) -> Any:
    """First walk: the window, resized, with the operations drawn before contrast, to work.planes; its means (3,)."""
    top, left, height, width = window[0], window[1], window[2], window[3]
    size, pad = len(work.rows), len(work.blur_weights) - 1
    _cubic_taps(height, size, False, 1 / 255, work.rows, work.row_weights)
    _cubic_taps(width, size, flip, 1.0, work.columns, work.column_weights)
    line = np.zeros(3 * (width + 2 * _MARGIN) + 1, np.float32)
    inside = line[3 * _MARGIN : 3 * (_MARGIN + width)]
    start, stop = 3 * left, 3 * (left + width)
    sums = np.zeros(3)
    for y in range(size):
        first = work.rows[y] - _MARGIN  # a row outside the window weighs 0: any other is as good
        a = image[top + min(max(first, 0), height - 1), start:stop]
        b = image[top + min(max(first + 1, 0), height - 1), start:stop]
        c = image[top + min(max(first + 2, 0), height - 1), start:stop]
        d = image[top + min(max(first + 3, 0), height - 1), start:stop]
        _blend_rows(a, b, c, d, work.row_weights[y], inside)
        red, green, blue = _channels(work.planes, (pad + y) * size, size)
        _blend_columns(line, work.columns, work.column_weights, red, green, blue)
        _color(red, green, blue, operations, values)
        sums[0] += _sum(red)
        sums[1] += _sum(green)
        sums[2] += _sum(blue)
    return sums / (size * size)


@_compiled
def _view(image: Any, recipe: Recipe, i: int, taps: int, work: Work, out: Floats) -> None:
    """View i of `recipe`: image uint8 (height, 3 * width), out float32 (size, 3 * size)."""
    size, pad = len(out), len(work.blur_weights) - 1
    order, values, solarize = recipe.order[i], recipe.value[i], recipe.solarize[i]
    place = 0
    while place < 4 and order[place] != CONTRAST:
        place += 1
    factor = values[CONTRAST] if place < 4 else _ONE
    means = _resize(image, recipe.window[i], recipe.flip[i], order[:place], values, work)

    radius = _blur_taps(recipe.sigma[i], taps, work.blur_weights)
    channels = 1 if recipe.gray[i] else 3
    red, green, blue = _channels(work.line, pad, size)
    second, third = (red, red) if channels == 1 else (green, blue)
    for y in range(size):
        rows = _channels(work.planes, (pad + y) * size, size)
        _contrast(rows[0], factor, np.float32(means[0]), red)
        _contrast(rows[1], factor, np.float32(means[1]), green)
        _contrast(rows[2], factor, np.float32(means[2]), blue)
        _color(red, green, blue, order[place + 1 :], values)
        if channels == 1:
            _gray(red, green, blue)
        if radius:
            for c in range(channels):
                _blur(work.line[c], pad, work.steps[0], work.blur_weights, radius, rows[c])
        else:
            _deliver(red, second, third, solarize, work.scale, work.shift, out[y])
    if radius:
        lines = (red, green, blue)
        for y in range(size):
            for c in range(channels):
                _blur(work.planes[c], (pad + y) * size, work.steps[1], work.blur_weights, radius, lines[c])
            _deliver(red, second, third, solarize, work.scale, work.shift, out[y])


def _views(
    start: int, stop: int, pixels: Pixels, recipes: Any, taps: int, steps: Any, norm: Floats, outs: Any
) -> None:
    """All views of images start to stop; compiled below."""
    size, pad = outs[0].shape[1], taps // 2 + 1
    work = Work(
        planes=np.zeros((3, (size + 2 * pad) * size), np.float32),
        line=np.zeros((3, size + 2 * pad), np.float32),
        rows=np.empty(size, np.int64),
        row_weights=np.empty((size, 4), np.float32),
        columns=np.empty(size, np.int64),
        column_weights=np.empty((size, 4), np.float32),
        blur_weights=np.empty(pad + 1, np.float32),
        steps=steps,
        scale=norm[0],
        shift=norm[1],
    )
    for i in range(start, stop):
        height, width = pixels.box[i, 2], pixels.box[i, 3]
        image = numba.carray(_pointer(pixels.address[i]), (height, 3 * width), np.uint8)
        for k in range(len(outs)):
            _view(image, recipes[k], i, taps, work, outs[k][i])


try:
    _views = numba.njit(nogil=True, fastmath=True, error_model="numpy", cache=True)(_views)
except RuntimeError:  # "cannot cache function: no locator available": each process compiles anew
    _views = _compiled(_views)


def make_views(
    pixels: Pixels,
    params: Sequence[ViewParams],
    augment: AugmentConfig,
    outs: Sequence[Floats],
    pool: Executor | None = None,
) -> None:
    """Makes the views of N images.

    Args:
        pixels: the decoded images; the caller keeps their memory alive.
        params: for each view, N drawn ones; their windows lie inside the images' boxes.
        augment: size, mean and std.
        outs: for each view a C-contiguous float32 (N, size, size, 3); the normalised pixels go there.
        pool: threads to share the work; None for the caller's own.

    Raises:
        ValueError: a window is not inside its image's box. (The kernels read memory without checks.)
    """
    n, size = len(pixels.address), augment.size
    recipes, norm = write(pixels, params), normalisation(augment)
    steps, rows = np.array([1, size]), tuple(out.reshape(n, size, 3 * size) for out in outs)

    def work(start: int, stop: int) -> None:
        _views(start, stop, pixels, recipes, augment.blur_taps, steps, norm, rows)

    if pool is None:
        work(0, n)
    else:
        starts = range(0, n, _CHUNK)
        list(pool.map(work, starts, [min(start + _CHUNK, n) for start in starts]))
