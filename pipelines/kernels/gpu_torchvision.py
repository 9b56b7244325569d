"""Profile torchvision on the GPU: its resize and its colors, as torch_backend.py defines them.

An axis that shrinks by a factor s is filtered by a kernel s times as wide, of 4 s taps.
"""

import triton
import triton.language as tl

from byolt.pipelines.kernels.gpu_pixels import add_pixels, clip, keys, luma


@triton.jit
def taps(place, length, size: tl.constexpr):
    """The first tap of each place of an axis, and the largest number of taps."""
    longer = tl.maximum(length, size)
    # The first pixel whose center is inside the kernel, in units of 1 / (2 size): the kernel's center is at
    # (place + 0.5) length / size, its half width is 2 longer / size. Not negative, because // rounds toward zero here.
    first = tl.maximum((2 * place + 1) * length - 4 * longer + size, 0) // (2 * size)
    return first, (4 * longer + size - 1) // size


@triton.jit
def weight(place, tap, length, size: tl.constexpr):
    """Weight of a tap, not normalized; 0 outside the window. The distance is exact up to its division."""
    distance = tl.abs((2 * tap + 1) * size - (2 * place + 1) * length).to(tl.float32)
    return tl.where(tap < length, keys(distance * (0.5 / tl.maximum(length, size))), 0.0)


@triton.jit
def four_taps(place, length, size: tl.constexpr):
    """The first tap of a place of an axis that does not shrink, and the weights of all four, which sum to 1."""
    first, _ = taps(place, length, size)
    w0, w1 = weight(place, first, length, size), weight(place, first + 1, length, size)
    w2, w3 = weight(place, first + 2, length, size), weight(place, first + 3, length, size)
    total = w0 + w1 + w2 + w3
    return first, w0 / total, w1 / total, w2 / total, w3 / total


@triton.jit
def total_weight(place, length, size: tl.constexpr):
    """The sum of the weights of each place's taps."""
    first, count = taps(place, length, size)
    total = tl.zeros(place.shape, tl.float32)
    for i in range(count):
        total += weight(place, first + i, length, size)
    return total


@triton.jit
def filter_row(line, width, columns, total, size: tl.constexpr):
    """The row of a window that begins at `line`, resized; `total` is the columns' `total_weight`."""
    first, count = taps(columns, width, size)
    r = tl.zeros(columns.shape, tl.float32)
    g = tl.zeros(columns.shape, tl.float32)
    b = tl.zeros(columns.shape, tl.float32)
    for i in range(0, count, 4):  # taps from `count` on weigh 0
        for k in tl.static_range(4):
            tap = first + i + k
            r, g, b = add_pixels(r, g, b, weight(columns, tap, width, size), line, tap, width)
    return r / total, g / total, b / total


@triton.jit
def brightness(r, g, b, value):
    """A factor."""
    return clip(r * value), clip(g * value), clip(b * value)


@triton.jit
def saturation(r, g, b, value):
    """Away from, or toward, the gray image."""
    gray = luma(r, g, b) * (1 - value)
    return clip(r * value + gray), clip(g * value + gray), clip(b * value + gray)
