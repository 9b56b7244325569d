"""The Triton functions that both profiles share: reading a job, and operations on pixels.

A job is a row of the table (jobs.py), int32 on the GPU.
"""

import triton
import triton.language as tl

from byolt.pipelines.kernels.jobs import JOB
from byolt.pipelines.views import GRAY_WEIGHTS


def field(name: str) -> tl.constexpr:
    """The column at which a field of a job begins."""
    return tl.constexpr(JOB.fields[name][1] // 4)  # type: ignore[index]


# Globals that a kernel reads must be constexpr.
TINY = tl.constexpr(1e-30)  # in place of a zero divisor whose dividend is zero
_LUMA_R, _LUMA_G, _LUMA_B = map(tl.constexpr, GRAY_WEIGHTS)


@triton.jit
def read_float(job, column):
    """A float field of a job."""
    return tl.load(job + column).to(tl.float32, bitcast=True)


@triton.jit
def read_pointer(job, column, kind: tl.constexpr):
    """An address field of a job, as a pointer to `kind`."""
    return tl.load((job + column).to(tl.pointer_type(tl.int64))).to(tl.pointer_type(kind))


@triton.jit
def near(d):
    """Keys' kernel (a = -0.5) at a distance 0 <= d <= 1."""
    return (1.5 * d - 2.5) * d * d + 1


@triton.jit
def far(d):
    """Keys' kernel (a = -0.5) at a distance 1 <= d <= 2."""
    return ((-0.5 * d + 2.5) * d - 4) * d + 2


@triton.jit
def keys(d):
    """Keys' kernel (a = -0.5) at a distance d >= 0."""
    return tl.where(d <= 1, near(d), tl.where(d < 2, far(d), 0.0))


@triton.jit
def add_pixels(r, g, b, weight, line, column, width):
    """Adds weighted pixels of a row of uint8 to r, g and b.

    A pixel outside the window weighs 0: any pixel of the window will do, and is safe to read.
    """
    at = line + tl.minimum(tl.maximum(column, 0), width - 1) * 3
    r += weight * tl.load(at).to(tl.float32)
    g += weight * tl.load(at + 1).to(tl.float32)
    b += weight * tl.load(at + 2).to(tl.float32)
    return r, g, b


@triton.jit
def clip(x):
    """To [0, 1]."""
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def luma(r, g, b):
    """Gray of pixels, or of a mean."""
    return _LUMA_R * r + _LUMA_G * g + _LUMA_B * b


@triton.jit
def hue(r, g, b, turn):
    """Adds `turn`, in sixths, 0 <= turn < 6, to the hue; cpu_rows.py has the formula."""
    top = tl.maximum(tl.maximum(r, g), b)
    low = tl.minimum(tl.minimum(r, g), b)
    spread = top - low
    safe = tl.maximum(spread, TINY)
    h = tl.where(top == r, (g - b) / safe, tl.where(top == g, 2.0 + (b - r) / safe, 4.0 + (r - g) / safe))
    h += turn
    h = tl.where(h < 0, h + 6, h)
    h = tl.where(h >= 6, h - 6, h)
    r = low + spread * clip(tl.abs(h - 3) - 1)
    g = low + spread * clip(2 - tl.abs(h - 2))
    b = low + spread * clip(2 - tl.abs(h - 4))
    return r, g, b
