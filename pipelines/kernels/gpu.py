"""Both views of decoded images on the GPU, in Triton: the operations of cpu.py, by the same algebra, in float32.

A view is a job, a row of a table (jobs.py). One launch serves the jobs of all views and all image sizes:

    1  _resize        window ─► resized, flipped ─► color operations that precede contrast ─► scratch, sums of tiles
    2  _color         contrast about the mean ─► those that follow it ─► gray ─► scratch, or without blur the output
    3  _blur_rows     along the rows, of the jobs that have a blur ─► second scratch
    4  _blur_columns  along the columns ─► solarize ─► normalize ─► output

gpu_pixels.py has all that the profiles share; gpu_byol.py and gpu_torchvision.py have the rest.

The table reaches the GPU in one copy, and the host never waits. Results are the same in every run: the sums of tiles
are stored and added by each program that needs the mean, never atomically.

Measured at 224 px on one H200 (2026-11-26), µs an image, both views: resize 9.6, color 1.0, blur 0.7 + 0.5. Without a
GPU the tests run the kernels in Triton's interpreter (TRITON_INTERPRET=1 before triton is first imported).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from byolt.configs.schema import AugmentConfig
from byolt.pipelines.kernels import gpu_byol, gpu_torchvision
from byolt.pipelines.kernels.gpu_pixels import TILE, clip, field, hue, luma, read_float, read_pointer
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
_BLOCK = tl.constexpr(1024)  # pixels, or numbers, of a program; _resize makes TILE squared


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
def _resize(table, scratch, sums, size: tl.constexpr, profile: tl.constexpr):
    """A tile of one job: scratch (jobs, size, size, 3) and sums (jobs, tiles, 3), float32."""
    across: tl.constexpr = (size + TILE - 1) // TILE
    number, tile = tl.program_id(0) // (across * across), tl.program_id(0) % (across * across)
    job = table + number * _COLUMNS
    height, width = tl.load(job + _HEIGHT), tl.load(job + _WIDTH)
    y = tile // across * TILE + tl.arange(0, TILE)
    x = tile % across * TILE + tl.arange(0, TILE)
    inside = (y < size)[:, None] & (x < size)[None, :]
    y, x = tl.minimum(y, size - 1), tl.minimum(x, size - 1)
    column = tl.where(tl.load(job + _FLIP) != 0, size - 1 - x, x)
    source, stride = read_pointer(job, _SOURCE, tl.uint8), tl.load(job + _STRIDE)
    if profile == "byol":
        r, g, b = gpu_byol.resize(source, stride, height, width, y, column, size)
    else:
        r, g, b = gpu_torchvision.resize(source, stride, height, width, y, column, size)
    r, g, b = clip(r), clip(g), clip(b)
    for place in tl.static_range(3):
        r, g, b = _operation(job, tl.load(job + _BEFORE + place), r, g, b, profile)
    to = scratch + number.to(tl.int64) * (3 * size * size) + (y * (3 * size))[:, None] + (x * 3)[None, :]
    tl.store(to, r, inside)
    tl.store(to + 1, g, inside)
    tl.store(to + 2, b, inside)
    total = sums + tl.program_id(0) * 3
    tl.store(total, tl.sum(tl.sum(tl.where(inside, r, 0.0), 1), 0))
    tl.store(total + 1, tl.sum(tl.sum(tl.where(inside, g, 0.0), 1), 0))
    tl.store(total + 2, tl.sum(tl.sum(tl.where(inside, b, 0.0), 1), 0))


@triton.jit
def _mean(total, inside, pixels: tl.constexpr):
    return tl.sum(tl.load(total, inside, 0.0), 0) / pixels


@triton.jit
def _contrast(x, mean, factor):
    return clip((x - mean) * factor + mean)


@triton.jit
def _color(
    table, scratch, sums, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    size: tl.constexpr, power: tl.constexpr, kind: tl.constexpr, profile: tl.constexpr,
):  # fmt: skip
    """_BLOCK pixels of one job; power is a power of two, at least the number of tiles."""
    blocks: tl.constexpr = (size * size + _BLOCK - 1) // _BLOCK
    tiles: tl.constexpr = ((size + TILE - 1) // TILE) * ((size + TILE - 1) // TILE)
    number, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    job = table + number * _COLUMNS
    pixel = block * _BLOCK + tl.arange(0, _BLOCK)
    inside = pixel < size * size
    at = scratch + number.to(tl.int64) * (3 * size * size) + 3 * pixel
    tile = tl.arange(0, power)
    total, of_job = sums + 3 * (number * tiles + tile), tile < tiles
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
    tiles, blocks = triton.cdiv(size, TILE.value) ** 2, triton.cdiv(size * size, _BLOCK.value)
    numbers = triton.cdiv(3 * size * size, _BLOCK.value)
    kind, profile = _DTYPES[dtype], augment.profile
    with torch.cuda.device_of(outs[0]):
        table = jobs.to(device, non_blocking=True).view(torch.int32)
        most, blurred_most = max(map(len, parts), default=0), max(blurs, default=0)
        scratch = torch.empty(most * 3 * size * size, dtype=torch.float32, device=device)
        blurred = torch.empty(blurred_most * 3 * size * size, dtype=torch.float32, device=device)
        sums = torch.empty(most * tiles * 3, dtype=torch.float32, device=device)
        for k, (part, blur) in enumerate(zip(parts, blurs, strict=True)):
            some = table[k * together :]
            _resize[(len(part) * tiles,)](some, scratch, sums, size, profile, num_warps=8)
            _color[(len(part) * blocks,)](
                some, scratch, sums, *norm, size, triton.next_power_of_2(tiles), kind, profile
            )
            if blur:
                _blur_rows[(blur * numbers,)](some, scratch, blurred, size, profile)
                _blur_columns[(blur * numbers,)](some, blurred, *norm, size, kind, profile)
