"""Profile byol on the GPU: its resize and its color operations, as torch_backend.py defines them.

The positions of the bicubic taps are computed in integers, because float32 sometimes rounds the position in the
kernel's table the other way.
"""

import triton
import triton.language as tl

from byolt.pipelines.kernels.gpu_pixels import TINY, add_pixels, clip, far, near


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
def four_taps(place, length, size: tl.constexpr):
    """The first of the four taps of each place of an axis, and their weights, which sum to 1; 0 outside the window."""
    floor, rest = position(place, length, size)
    w0 = tl.where(floor >= 1, far(rest + 1), 0.0)
    w1 = tl.where(floor >= 0, near(rest), 0.0)
    w2 = tl.where(floor < length - 1, near(1 - rest), 0.0)
    w3 = tl.where(floor < length - 2, far(2 - rest), 0.0)
    total = w0 + w1 + w2 + w3
    return floor - 1, w0 / total, w1 / total, w2 / total, w3 / total


@triton.jit
def filter_row(line, width, columns, taps, size: tl.constexpr):
    """The row of a window that begins at `line`, resized; `taps` are the columns' four."""
    first, w0, w1, w2, w3 = taps
    zero = tl.zeros(w0.shape, tl.float32)
    r, g, b = add_pixels(zero, zero, zero, w0, line, first, width)
    r, g, b = add_pixels(r, g, b, w1, line, first + 1, width)
    r, g, b = add_pixels(r, g, b, w2, line, first + 2, width)
    return add_pixels(r, g, b, w3, line, first + 3, width)


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
