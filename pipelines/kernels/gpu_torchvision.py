"""Profile torchvision on the GPU: its resize and its colors, as torch_backend.py defines them.

An axis that shrinks by a factor s is filtered by a kernel s times as wide, of 4 s taps. Both axes are filtered at once:
each pixel of the window contributes to 16 pixels of the view however much it shrinks, so the work grows with the
decoded pixels, as the decoder's does. One axis after the other would need less arithmetic and one more pass through
memory; that is not yet measured.
"""

import triton
import triton.language as tl

from byolt.pipelines.kernels.gpu_pixels import TILE, clip, keys, luma


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
def resize(source, stride, height, width, y, x, size: tl.constexpr):
    """The pixels at rows y and columns x (TILE,) of a window's view; not clipped."""
    row, rows = taps(y, height, size)
    column, columns = taps(x, width, size)
    r = tl.zeros((TILE, TILE), tl.float32)
    g = tl.zeros((TILE, TILE), tl.float32)
    b = tl.zeros((TILE, TILE), tl.float32)
    row_total = tl.zeros((TILE,), tl.float32)
    column_total = tl.zeros((TILE,), tl.float32)
    for i in range(columns):
        column_total += weight(x, column + i, width, size)
    for j in range(rows):
        # A tap outside the window weighs 0: any pixel of the window will do, and is safe to read.
        line = source + tl.minimum(row + j, height - 1).to(tl.int64) * stride
        line_r = tl.zeros((TILE, TILE), tl.float32)
        line_g = tl.zeros((TILE, TILE), tl.float32)
        line_b = tl.zeros((TILE, TILE), tl.float32)
        for i in range(columns):
            at = line[:, None] + (tl.minimum(column + i, width - 1) * 3)[None, :]
            column_weight = weight(x, column + i, width, size)[None, :]
            line_r += column_weight * tl.load(at).to(tl.float32)
            line_g += column_weight * tl.load(at + 1).to(tl.float32)
            line_b += column_weight * tl.load(at + 2).to(tl.float32)
        row_weight = weight(y, row + j, height, size)
        row_total += row_weight
        r += row_weight[:, None] * line_r
        g += row_weight[:, None] * line_g
        b += row_weight[:, None] * line_b
    total = 255 * row_total[:, None] * column_total[None, :]
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
