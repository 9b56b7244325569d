"""Profile byol on the GPU: its resize and its color operations, as torch_backend.py defines them.

The positions of the bicubic taps are computed in integers, because float32 sometimes rounds the position in the
kernel's table the other way.
"""

import triton
import triton.language as tl

from byolt.pipelines.kernels.gpu_pixels import TILE, TINY, clip, keys


@triton.jit
def position(place, length, size: tl.constexpr):
    """(place + 0.5) * length / size - 0.5 as its floor and the rest, rounded to 1/1024, ties to even."""
    # 2 size times (that + 1): not negative, because // rounds towards zero here.
    twice = (2 * place + 1) * length + size
    floor = twice // (2 * size) - 1
    rest = twice % (2 * size) * 512
    step, left = rest // size, 2 * (rest % size)
    step += ((left > size) | ((left == size) & (step % 2 == 1))).to(tl.int32)
    return floor, step.to(tl.float32) / 1024


@triton.jit
def _weight(floor, rest, tap: tl.constexpr, length):
    """Weight of the tap at floor + tap; 0 outside the window."""
    inside = (floor + tap >= 0) & (floor + tap < length)
    return tl.where(inside, keys(tl.abs(rest - tap)), 0.0)


@triton.jit
def _all_weights(floor, rest, length):
    first = _weight(floor, rest, -1, length) + _weight(floor, rest, 0, length)
    return first + _weight(floor, rest, 1, length) + _weight(floor, rest, 2, length)


@triton.jit
def resize(source, stride, height, width, y, x, size: tl.constexpr):
    """The pixels at rows y and columns x (TILE,) of a window's view; not clipped."""
    row, row_rest = position(y, height, size)
    column, column_rest = position(x, width, size)
    row_total = 255 * _all_weights(row, row_rest, height)
    column_total = _all_weights(column, column_rest, width)
    r = tl.zeros((TILE, TILE), tl.float32)
    g = tl.zeros((TILE, TILE), tl.float32)
    b = tl.zeros((TILE, TILE), tl.float32)
    for j in tl.static_range(-1, 3):
        # A tap outside the window weighs 0: any pixel of the window will do, and is safe to read.
        line = tl.minimum(tl.maximum(row + j, 0), height - 1).to(tl.int64) * stride
        row_weight = (_weight(row, row_rest, j, height) / row_total)[:, None]
        for i in tl.static_range(-1, 3):
            pixel = tl.minimum(tl.maximum(column + i, 0), width - 1) * 3
            weight = row_weight * (_weight(column, column_rest, i, width) / column_total)[None, :]
            at = source + line[:, None] + pixel[None, :]
            r += weight * tl.load(at).to(tl.float32)
            g += weight * tl.load(at + 1).to(tl.float32)
            b += weight * tl.load(at + 2).to(tl.float32)
    return r, g, b


@triton.jit
def brightness(r, g, b, value):
    """An offset."""
    return clip(r + value), clip(g + value), clip(b + value)


@triton.jit
def saturation(r, g, b, value):
    """S = (V - m) / V becomes min(1, S value)."""
    top = tl.maximum(tl.maximum(r, g), b)
    spread = top - tl.minimum(tl.minimum(r, g), b)
    factor = tl.minimum(value, top / tl.maximum(spread, TINY))
    return top - (top - r) * factor, top - (top - g) * factor, top - (top - b) * factor
