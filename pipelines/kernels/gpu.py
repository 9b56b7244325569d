"""Both views of decoded images on the GPU, in Triton: the operations of cpu.py, by the same algebra, in float32.

A view is a job, a row of a table (jobs.py). One launch serves the jobs of all views and all image sizes:

    1  _resize        window ─► resized, flipped ─► color operations that precede contrast ─► scratch, sums of strips
    2  _color         contrast about the mean ─► those that follow it ─► gray ─► scratch, or without blur the output
    3  _blur_rows     along the rows, of the jobs that have a blur ─► second scratch
    4  _blur_columns  along the columns ─► solarize ─► normalize ─► output

gpu_pixels.py has all that the profiles share; gpu_byol.py and gpu_torchvision.py have the rest.

The table reaches the GPU in one copy, and the host never waits. Results are the same in every run: the sums of strips
are stored and added by each program that needs the mean, never atomically.

Measured at 224 px on one H200 (2026-11-26), µs an image, both views: color 1.0, blur 0.7 + 0.5. The resize took 9.6
when each pixel read its own 16 taps. It now resizes each row of a window once, which is not yet measured: of images of
375 x 500 it reads 18 bytes a pixel of a view, not 48 (torchvision: 31, not 95), in about 150 instructions, not 400.

Without a GPU the tests run the kernels in Triton's interpreter (TRITON_INTERPRET=1 before triton is first imported).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from byolt.configs.schema import AugmentConfig
from byolt.pipelines.kernels import gpu_byol, gpu_torchvision
from byolt.pipelines.kernels.gpu_pixels import clip, field, hue, luma, read_float, read_pointer
from byolt.pipelines.kernels.inputs import Pixels, kernel_params, normalization
from byolt.pipelines.kernels.jobs import JOB, fill, list_blurred
from byolt.pipelines.views import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams

_SCRATCH = 64 << 20  # bytes of float32 pixels per launch: 111 views of 224 px
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# Globals that a kernel reads must be constexpr. _COLUMNS is a multiple of 4, so that any row is aligned to 16
# bytes: Triton compiles anew for pointers that are not.
_COLUMNS = tl.constexpr(JOB.itemsize // 4)
_SOURCE, _TARGET, _STRIDE, _HEIGHT, _WIDTH, _FLIP = map(
    field, ("source", "target", "stride", "height", "width", "flip")
)
_BEFORE, _AFTER, _VALUE, _GRAY, _SOLARIZE = map(field, ("before", "after", "value", "gray", "solarize"))
_RADIUS, _EXPONENT, _CENTER, _BLURRED = map(field, ("radius", "exponent", "center", "blurred"))
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = map(tl.constexpr, (BRIGHTNESS, CONTRAST, SATURATION, HUE))
_BLOCK = tl.constexpr(1024)  # pixels, or numbers, of a program; _resize makes whole rows
_ROWS = tl.constexpr(16)  # of the view that a program of _resize makes


@triton.jit
def _operation(job, which, r, g, b, profile: tl.constexpr):
    """Any color operation but contrast."""
    if which == _BRIGHTNESS:
        value = read_float(job, _VALUE + _BRIGHTNESS)
        if profile == "byol":
            r, g, b = gpu_byol.brightness(r, g, b, value)
        else:
            r, g, b = gpu_torchvision.brightness(r, g, b, value)
    elif which == _SATURATION:
        value = read_float(job, _VALUE + _SATURATION)
        if profile == "byol":
            r, g, b = gpu_byol.saturation(r, g, b, value)
        else:
            r, g, b = gpu_torchvision.saturation(r, g, b, value)
    elif which == _HUE:
        r, g, b = hue(r, g, b, read_float(job, _VALUE + _HUE))
    return r, g, b


@triton.jit
def _finish(x, job, scale, shift):
    """Clipped, solarized, normalized."""
    x = clip(x)
    solarize = tl.load(job + _SOLARIZE) != 0
    return tl.where(solarize & (x >= 0.5), 1 - x, x) * scale + shift


@triton.jit
def _filter_row(source, stride, row, height, width, columns, taps, size: tl.constexpr, profile: tl.constexpr):
    """A row of the window, resized. Below the window it weighs 0: any other will do, and is safe to read."""
    line = source + tl.minimum(row, height - 1).to(tl.int64) * stride
    if profile == "byol":
        r, g, b = gpu_byol.filter_row(line, width, columns, taps, size)
    else:
        r, g, b = gpu_torchvision.filter_row(line, width, columns, taps, size)
    return r, g, b


@triton.jit
def _put(r, g, b, job, operations, to, inside, profile: tl.constexpr):
    """Stores a row of levels 0 to 255 as pixels in [0, 1], after the operations; returns them, 0 outside the view."""
    r, g, b = clip(r * (1 / 255)), clip(g * (1 / 255)), clip(b * (1 / 255))
    for place in tl.static_range(3):
        r, g, b = _operation(job, operations[place], r, g, b, profile)
    tl.store(to, r, inside)
    tl.store(to + 1, g, inside)
    tl.store(to + 2, b, inside)
    return tl.where(inside, r, 0.0), tl.where(inside, g, 0.0), tl.where(inside, b, 0.0)


@triton.jit
def _gather_rows(
    job, operations, source, stride, height, width, columns, taps, top, bottom, to, inside,
    size: tl.constexpr, profile: tl.constexpr,
):  # fmt: skip
    """Rows top to bottom - 1 of the view, each a sum of the last four rows of the window, 0 to 3; returns their sum."""
    zero = tl.zeros(columns.shape, tl.float32)
    r0, r1, r2, r3, sum_r = zero, zero, zero, zero, zero
    g0, g1, g2, g3, sum_g = zero, zero, zero, zero, zero
    b0, b1, b2, b3, sum_b = zero, zero, zero, zero, zero
    end = 0
    for y in range(top, bottom):
        if profile == "byol":
            first, w0, w1, w2, w3 = gpu_byol.four_taps(y, height, size)
        else:
            first, w0, w1, w2, w3 = gpu_torchvision.four_taps(y, height, size)
        for row in range(tl.maximum(end, first), first + 4):
            r, g, b = _filter_row(source, stride, row, height, width, columns, taps, size, profile)
            r0, r1, r2, r3 = r1, r2, r3, r
            g0, g1, g2, g3 = g1, g2, g3, g
            b0, b1, b2, b3 = b1, b2, b3, b
        end = first + 4
        r = w0 * r0 + w1 * r1 + w2 * r2 + w3 * r3
        g = w0 * g0 + w1 * g1 + w2 * g2 + w3 * g3
        b = w0 * b0 + w1 * b1 + w2 * b2 + w3 * b3
        r, g, b = _put(r, g, b, job, operations, to + y * (3 * size), inside, profile)
        sum_r, sum_g, sum_b = sum_r + r, sum_g + g, sum_b + b
    return sum_r, sum_g, sum_b


@triton.jit
def _scatter_rows(
    job, operations, source, stride, height, width, columns, taps, top, bottom, to, inside,
    size: tl.constexpr, profile: tl.constexpr,
):  # fmt: skip
    """As _gather_rows, for a window taller than the view in profile torchvision.

    Adds each row of the window to the rows of the view that it is a tap of: at most four, y to y + 3.
    """
    zero = tl.zeros(columns.shape, tl.float32)
    r0, r1, r2, r3, sum_r = zero, zero, zero, zero, zero
    g0, g1, g2, g3, sum_g = zero, zero, zero, zero, zero
    b0, b1, b2, b3, sum_b = zero, zero, zero, zero, zero
    t0, t1, t2, t3 = 0.0, 0.0, 0.0, 0.0  # totals of the weights
    begin, _ = gpu_torchvision.taps(top, height, size)
    for y in range(top, bottom):
        end, _ = gpu_torchvision.taps(y + 4, height, size)
        end = tl.minimum(end, height)
        for row in range(begin, end):
            r, g, b = _filter_row(source, stride, row, height, width, columns, taps, size, profile)
            w0 = gpu_torchvision.weight(y, row, height, size)
            w1 = gpu_torchvision.weight(y + 1, row, height, size)
            w2 = gpu_torchvision.weight(y + 2, row, height, size)
            w3 = gpu_torchvision.weight(y + 3, row, height, size)
            t0, t1, t2, t3 = t0 + w0, t1 + w1, t2 + w2, t3 + w3
            r0, r1, r2, r3 = r0 + w0 * r, r1 + w1 * r, r2 + w2 * r, r3 + w3 * r
            g0, g1, g2, g3 = g0 + w0 * g, g1 + w1 * g, g2 + w2 * g, g3 + w3 * g
            b0, b1, b2, b3 = b0 + w0 * b, b1 + w1 * b, b2 + w2 * b, b3 + w3 * b
        begin = end
        r, g, b = _put(r0 / t0, g0 / t0, b0 / t0, job, operations, to + y * (3 * size), inside, profile)
        sum_r, sum_g, sum_b = sum_r + r, sum_g + g, sum_b + b
        t0, t1, t2, t3 = t1, t2, t3, 0.0
        r0, r1, r2, r3 = r1, r2, r3, zero
        g0, g1, g2, g3 = g1, g2, g3, zero
        b0, b1, b2, b3 = b1, b2, b3, zero
    return sum_r, sum_g, sum_b


@triton.jit
def _resize(
    table, scratch, sums, size: tl.constexpr, block: tl.constexpr, strips: tl.constexpr, profile: tl.constexpr
):
    """`block` columns of _ROWS rows of one job: scratch (jobs, size, size, 3) and sums (jobs, strips, 3), float32.

    Walks down the window, so that each of its rows is read and resized once for all rows of the view.
    """
    across: tl.constexpr = (size + block - 1) // block
    number, strip = tl.program_id(0) // strips, tl.program_id(0) % strips
    job = table + number * _COLUMNS
    height, width = tl.load(job + _HEIGHT), tl.load(job + _WIDTH)
    source, stride = read_pointer(job, _SOURCE, tl.uint8), tl.load(job + _STRIDE)
    operations = tl.load(job + _BEFORE), tl.load(job + _BEFORE + 1), tl.load(job + _BEFORE + 2)
    top = strip // across * _ROWS
    bottom = tl.minimum(top + _ROWS, size)
    x = strip % across * block + tl.arange(0, block)
    inside, columns = x < size, tl.minimum(x, size - 1)
    to = scratch + number.to(tl.int64) * (3 * size * size) + x * 3
    columns = tl.where(tl.load(job + _FLIP) != 0, size - 1 - columns, columns)
    if profile == "byol":
        taps = gpu_byol.four_taps(columns, width, size)
        r, g, b = _gather_rows(
            job, operations, source, stride, height, width, columns, taps, top, bottom, to, inside, size, profile
        )  # fmt: skip
    else:
        taps = gpu_torchvision.total_weight(columns, width, size)
        if height > size:
            r, g, b = _scatter_rows(
                job, operations, source, stride, height, width, columns, taps, top, bottom, to, inside, size, profile
            )  # fmt: skip
        else:
            r, g, b = _gather_rows(
                job, operations, source, stride, height, width, columns, taps, top, bottom, to, inside, size, profile
            )  # fmt: skip
    total = sums + tl.program_id(0) * 3
    tl.store(total, tl.sum(r, 0))
    tl.store(total + 1, tl.sum(g, 0))
    tl.store(total + 2, tl.sum(b, 0))


@triton.jit
def _mean(total, inside, pixels: tl.constexpr):
    return tl.sum(tl.load(total, inside, 0.0), 0) / pixels


@triton.jit
def _contrast(x, mean, factor):
    return clip((x - mean) * factor + mean)


@triton.jit
def _color(
    table, scratch, sums, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    size: tl.constexpr, strips: tl.constexpr, power: tl.constexpr, kind: tl.constexpr, profile: tl.constexpr,
):  # fmt: skip
    """_BLOCK pixels of one job, whose sums are in `strips`; power is a power of two, at least their number."""
    blocks: tl.constexpr = (size * size + _BLOCK - 1) // _BLOCK
    number, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    job = table + number * _COLUMNS
    pixel = block * _BLOCK + tl.arange(0, _BLOCK)
    inside = pixel < size * size
    at = scratch + number.to(tl.int64) * (3 * size * size) + 3 * pixel
    strip = tl.arange(0, power)
    total, of_job = sums + 3 * (number * strips + strip), strip < strips
    factor = read_float(job, _VALUE + _CONTRAST)
    mean_r = _mean(total, of_job, size * size)
    mean_g = _mean(total + 1, of_job, size * size)
    mean_b = _mean(total + 2, of_job, size * size)
    if profile == "torchvision":  # the mean of the gray image
        mean_r = luma(mean_r, mean_g, mean_b)
        mean_g = mean_r
        mean_b = mean_r
    r = _contrast(tl.load(at, inside, 0.0), mean_r, factor)
    g = _contrast(tl.load(at + 1, inside, 0.0), mean_g, factor)
    b = _contrast(tl.load(at + 2, inside, 0.0), mean_b, factor)
    for place in tl.static_range(3):
        r, g, b = _operation(job, tl.load(job + _AFTER + place), r, g, b, profile)
    if tl.load(job + _GRAY) != 0:
        r = luma(r, g, b)
        g = r
        b = r
    if tl.load(job + _RADIUS) != 0:
        tl.store(at, r, inside)
        tl.store(at + 1, g, inside)
        tl.store(at + 2, b, inside)
    else:
        to = read_pointer(job, _TARGET, kind) + 3 * pixel
        tl.store(to, _finish(r, job, scale_r, shift_r).to(kind), inside)
        tl.store(to + 1, _finish(g, job, scale_g, shift_g).to(kind), inside)
        tl.store(to + 2, _finish(b, job, scale_b, shift_b).to(kind), inside)


@triton.jit
def _both(at, x, distance, step: tl.constexpr, length: tl.constexpr, inside, profile: tl.constexpr):
    """The sum of the two numbers at a distance, a multiple of `step`, on either side of x in a line of `length`.

    Outside the border are zeros or, in profile torchvision, the mirrored image.
    """
    if profile == "byol":
        before = tl.load(at - distance, inside & (x >= distance), 0.0)
        after = tl.load(at + distance, inside & (x + distance < length), 0.0)
    else:
        first = x - x % step  # numbers from the border to this one's pixel, or line
        last = length - step - first
        before = tl.load(at + (tl.abs(first - distance) - first), inside, 0.0)
        after = tl.load(at + (last - tl.abs(last - distance)), inside, 0.0)
    return before + after


# For aligned pointers the compiler would give each thread four neighbors to read at once. At the taps that is
# impossible, and a warp would touch four cache lines instead of one.
@triton.jit(do_not_specialize_on_alignment=["scratch", "blurred"])
def _blur_rows(table, scratch, blurred, size: tl.constexpr, profile: tl.constexpr):
    """_BLOCK numbers of one of the jobs that have a blur; blurred (those jobs, size, size, 3) float32."""
    line: tl.constexpr = 3 * size
    blocks: tl.constexpr = (size * line + _BLOCK - 1) // _BLOCK
    which, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    number = tl.load(table + which * _COLUMNS + _BLURRED)
    job = table + number * _COLUMNS
    i = block * _BLOCK + tl.arange(0, _BLOCK)
    x, inside = i % line, i < size * line
    at = scratch + number.to(tl.int64) * (size * line) + i
    exponent = read_float(job, _EXPONENT)
    total = tl.load(at, inside, 0.0)
    for k in range(1, tl.load(job + _RADIUS) + 1):
        total += tl.exp(exponent * k * k) * _both(at, x, 3 * k, 3, line, inside, profile)
    tl.store(blurred + which.to(tl.int64) * (size * line) + i, total * read_float(job, _CENTER), inside)


@triton.jit
def _blur_columns(
    table, blurred, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    size: tl.constexpr, kind: tl.constexpr, profile: tl.constexpr,
):  # fmt: skip
    """_BLOCK numbers of one of the jobs that have a blur, from the result of _blur_rows."""
    line: tl.constexpr = 3 * size
    blocks: tl.constexpr = (size * line + _BLOCK - 1) // _BLOCK
    which, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    job = table + tl.load(table + which * _COLUMNS + _BLURRED) * _COLUMNS
    i = block * _BLOCK + tl.arange(0, _BLOCK)
    inside = i < size * line
    at = blurred + which.to(tl.int64) * (size * line) + i
    exponent = read_float(job, _EXPONENT)
    total = tl.load(at, inside, 0.0)
    for k in range(1, tl.load(job + _RADIUS) + 1):
        total += tl.exp(exponent * k * k) * _both(at, i, k * line, line, size * line, inside, profile)
    channel = i % 3
    scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
    shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))
    out = _finish(total * read_float(job, _CENTER), job, scale, shift)
    tl.store(read_pointer(job, _TARGET, kind) + i, out.to(kind), inside)


def make_views(
    pixels: Pixels, params: Sequence[ViewParams], augment: AugmentConfig, outs: Sequence[Tensor]
) -> None:
    """Queues the views of N images on the current stream; the host does not wait.

    Args:
        pixels: the decoded images in the GPU's memory, with sides of at most a million pixels. The caller keeps them
            alive until the stream has finished the kernels.
        params: for each view the parameters of N samples, whose windows are inside the images' boxes.
        augment: profile, size, mean and std.
        outs: for each view a contiguous (N, size, size, 3) on the GPU that receives the normalized pixels, all of one
            dtype: float32, float16 or bfloat16.

    Raises:
        ValueError: a window is not inside its image's box, or an output is not as described. (The kernels read and
            write memory without checks.)
    """
    n, size, device, dtype = len(pixels.address), augment.size, outs[0].device, outs[0].dtype
    for out in outs:
        if out.shape != (n, size, size, 3) or not out.is_contiguous() or out.dtype != dtype:
            raise ValueError(
                f"an output is {tuple(out.shape)} {out.dtype}, not contiguous {(n, size, size, 3)} {dtype}"
            )
    views = kernel_params(pixels, params)
    together = max(1, _SCRATCH // (12 * size * size))
    jobs = torch.empty((n * len(outs), JOB.itemsize), dtype=torch.uint8, pin_memory=device.type == "cuda")
    rows = jobs.numpy().view(JOB).reshape(len(outs), n)
    for row, view, out in zip(rows, views, outs, strict=True):
        fill(row, pixels, view, augment.blur_taps, out.data_ptr(), out.stride(0) * out.element_size())
    parts = [rows.reshape(-1)[start : start + together] for start in range(0, rows.size, together)]
    blurs = [list_blurred(part) for part in parts]

    norm = normalization(augment).reshape(-1).tolist()
    block = min(256, triton.next_power_of_2(size))  # columns of a program of _resize
    warps = max(1, block // 64)  # two columns a thread
    strips = triton.cdiv(size, block) * triton.cdiv(size, _ROWS.value)
    blocks, numbers = triton.cdiv(size * size, _BLOCK.value), triton.cdiv(3 * size * size, _BLOCK.value)
    kind, profile = _DTYPES[dtype], augment.profile
    with torch.cuda.device_of(outs[0]):
        table = jobs.to(device, non_blocking=True).view(torch.int32)
        most, blurred_most = max(map(len, parts), default=0), max(blurs, default=0)
        scratch = torch.empty(most * 3 * size * size, dtype=torch.float32, device=device)
        blurred = torch.empty(blurred_most * 3 * size * size, dtype=torch.float32, device=device)
        sums = torch.empty(most * strips * 3, dtype=torch.float32, device=device)
        for k, (part, blur) in enumerate(zip(parts, blurs, strict=True)):
            some = table[k * together :]
            _resize[(len(part) * strips,)](some, scratch, sums, size, block, strips, profile, num_warps=warps)
            _color[(len(part) * blocks,)](
                some, scratch, sums, *norm, size, strips, triton.next_power_of_2(strips), kind, profile
            )
            if blur:
                _blur_rows[(blur * numbers,)](some, scratch, blurred, size, profile)
                _blur_columns[(blur * numbers,)](some, blurred, *norm, size, kind, profile)
