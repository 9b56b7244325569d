"""Both views of decoded images on the GPU, in Triton: what pipelines/kernels.py does, by the same algebra, in float32.

A view is a job, a row of a table (pipelines/jobs.py); jobs of all views and all image sizes go together:

    1  _resize        window ─► bicubic, flip, clip ─► colour operations drawn before contrast ─► scratch, sums of tiles
    2  _color         contrast about the mean ─► the operations after it ─► grey ─► scratch, or without blur the output
    3  _blur_rows     along the rows, of the jobs that drew it ─► second scratch
    4  _blur_columns  along the columns ─► solarize ─► normalise ─► output

The table reaches the GPU in one copy, the host waits for nothing, and results are the same in every run: sums of
tiles are stored and added up by whoever needs the mean, nothing is added atomically. The positions of the bicubic taps
are computed in integers, because float32 would now and then round the position in the kernel table the other way.
Adding up what is read and written at 224 pixels, both views are about 6 MB an image, hence 2 µs at the 3.35 TB/s of an
H100, arithmetic not counted: an estimate, not yet measured.

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1 before triton is first imported): that is how
the tests hold them to pipelines/torch_backend.py. They have not yet run on a GPU.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from configs.schema import AugmentConfig
from pipelines.jobs import JOB, fill, list_blurred
from pipelines.recipe import Pixels, normalisation, write
from pipelines.torch_backend import GRAY_WEIGHTS
from pipelines.views import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams

_SCRATCH = 64 << 20  # bytes of float32 pixels that are in work at a time: 111 views of 224 pixels
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _column(name: str) -> tl.constexpr:
    return tl.constexpr(JOB.fields[name][1] // 4)  # type: ignore[index]


# What a kernel takes from outside must be a constexpr. _COLUMNS is a multiple of 4, so that any row is aligned to 16
# bytes: Triton compiles anew for pointers that are not.
_COLUMNS = tl.constexpr(JOB.itemsize // 4)
_SOURCE, _TARGET, _STRIDE, _HEIGHT, _WIDTH, _FLIP = map(
    _column, ("source", "target", "stride", "height", "width", "flip")
)
_BEFORE, _AFTER, _VALUE, _GRAY, _SOLARIZE = map(_column, ("before", "after", "value", "gray", "solarize"))
_RADIUS, _EXPONENT, _CENTRE, _BLURRED = map(_column, ("radius", "exponent", "centre", "blurred"))
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = map(tl.constexpr, (BRIGHTNESS, CONTRAST, SATURATION, HUE))
_LUMA_R, _LUMA_G, _LUMA_B = map(tl.constexpr, GRAY_WEIGHTS)
_TINY = tl.constexpr(1e-30)  # in place of a zero divisor whose dividend is zero
_TILE = tl.constexpr(32)  # _resize: side of the square that a program makes
_BLOCK = tl.constexpr(1024)  # the others: pixels, or numbers, of a program


@triton.jit
def _float(job, column):
    return tl.load(job + column).to(tl.float32, bitcast=True)


@triton.jit
def _pointer(job, column, kind: tl.constexpr):
    return tl.load((job + column).to(tl.pointer_type(tl.int64))).to(tl.pointer_type(kind))


@triton.jit
def _clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _position(place, length, size: tl.constexpr):
    """(place + 0.5) * length / size - 0.5 as its floor and the rest, that to the nearest 1/1024, ties to even."""
    # 2 size times (that + 1): not negative, because // rounds towards zero here.
    twice = (2 * place + 1) * length + size
    floor = twice // (2 * size) - 1
    rest = twice % (2 * size) * 512
    step, left = rest // size, 2 * (rest % size)
    step += ((left > size) | ((left == size) & (step % 2 == 1))).to(tl.int32)
    return floor, step.to(tl.float32) / 1024


@triton.jit
def _weight(floor, rest, tap: tl.constexpr, length):
    """Keys' kernel (a = -0.5) for the tap at floor + tap; 0 outside the window."""
    d = tl.abs(rest - tap)
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    inside = (floor + tap >= 0) & (floor + tap < length)
    return tl.where(inside & (d < 2), tl.where(d <= 1, near, far), 0.0)


@triton.jit
def _all_weights(floor, rest, length):
    first = _weight(floor, rest, -1, length) + _weight(floor, rest, 0, length)
    return first + _weight(floor, rest, 1, length) + _weight(floor, rest, 2, length)


@triton.jit
def _operation(job, which, r, g, b):
    """A colour operation other than contrast; the formulas are those of pipelines/kernels.py."""
    if which == _BRIGHTNESS:
        value = _float(job, _VALUE + _BRIGHTNESS)
        r, g, b = _clip(r + value), _clip(g + value), _clip(b + value)
    elif which == _SATURATION:
        top = tl.maximum(tl.maximum(r, g), b)
        spread = top - tl.minimum(tl.minimum(r, g), b)
        factor = tl.minimum(_float(job, _VALUE + _SATURATION), top / tl.maximum(spread, _TINY))
        r, g, b = top - (top - r) * factor, top - (top - g) * factor, top - (top - b) * factor
    elif which == _HUE:
        top = tl.maximum(tl.maximum(r, g), b)
        low = tl.minimum(tl.minimum(r, g), b)
        spread = top - low
        safe = tl.maximum(spread, _TINY)
        h = tl.where(top == r, (g - b) / safe, tl.where(top == g, 2.0 + (b - r) / safe, 4.0 + (r - g) / safe))
        h += _float(job, _VALUE + _HUE)
        h = tl.where(h < 0, h + 6, h)
        h = tl.where(h >= 6, h - 6, h)
        r = low + spread * _clip(tl.abs(h - 3) - 1)
        g = low + spread * _clip(2 - tl.abs(h - 2))
        b = low + spread * _clip(2 - tl.abs(h - 4))
    return r, g, b


@triton.jit
def _finish(x, job, scale, shift):
    """Clipped, solarized, normalised."""
    x = _clip(x)
    solarize = tl.load(job + _SOLARIZE) != 0
    return tl.where(solarize & (x >= 0.5), 1 - x, x) * scale + shift


@triton.jit
def _resize(table, scratch, sums, size: tl.constexpr):
    """A tile of one job: scratch (jobs, size, size, 3) and sums (jobs, tiles, 3), float32."""
    across: tl.constexpr = (size + _TILE - 1) // _TILE
    number, tile = tl.program_id(0) // (across * across), tl.program_id(0) % (across * across)
    job = table + number * _COLUMNS
    height, width = tl.load(job + _HEIGHT), tl.load(job + _WIDTH)
    y = tile // across * _TILE + tl.arange(0, _TILE)
    x = tile % across * _TILE + tl.arange(0, _TILE)
    inside = (y < size)[:, None] & (x < size)[None, :]
    y, x = tl.minimum(y, size - 1), tl.minimum(x, size - 1)
    row, row_rest = _position(y, height, size)
    column, column_rest = _position(tl.where(tl.load(job + _FLIP) != 0, size - 1 - x, x), width, size)
    row_total = 255 * _all_weights(row, row_rest, height)
    column_total = _all_weights(column, column_rest, width)
    source, stride = _pointer(job, _SOURCE, tl.uint8), tl.load(job + _STRIDE)
    r = tl.zeros((_TILE, _TILE), tl.float32)
    g = tl.zeros((_TILE, _TILE), tl.float32)
    b = tl.zeros((_TILE, _TILE), tl.float32)
    for j in tl.static_range(-1, 3):
        # A tap outside the window weighs 0: any pixel of the window is as good, and safe to read.
        line = tl.minimum(tl.maximum(row + j, 0), height - 1).to(tl.int64) * stride
        row_weight = (_weight(row, row_rest, j, height) / row_total)[:, None]
        for i in tl.static_range(-1, 3):
            pixel = tl.minimum(tl.maximum(column + i, 0), width - 1) * 3
            weight = row_weight * (_weight(column, column_rest, i, width) / column_total)[None, :]
            at = source + line[:, None] + pixel[None, :]
            r += weight * tl.load(at).to(tl.float32)
            g += weight * tl.load(at + 1).to(tl.float32)
            b += weight * tl.load(at + 2).to(tl.float32)
    r, g, b = _clip(r), _clip(g), _clip(b)
    for place in tl.static_range(3):
        r, g, b = _operation(job, tl.load(job + _BEFORE + place), r, g, b)
    to = scratch + number.to(tl.int64) * (3 * size * size) + (y * (3 * size))[:, None] + (x * 3)[None, :]
    tl.store(to, r, inside)
    tl.store(to + 1, g, inside)
    tl.store(to + 2, b, inside)
    total = sums + tl.program_id(0) * 3
    tl.store(total, tl.sum(tl.sum(tl.where(inside, r, 0.0), 1), 0))
    tl.store(total + 1, tl.sum(tl.sum(tl.where(inside, g, 0.0), 1), 0))
    tl.store(total + 2, tl.sum(tl.sum(tl.where(inside, b, 0.0), 1), 0))


@triton.jit
def _contrast(x, total, inside, factor, pixels: tl.constexpr):
    mean = tl.sum(tl.load(total, inside, 0.0), 0) / pixels
    return _clip((x - mean) * factor + mean)


@triton.jit
def _color(
    table, scratch, sums, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    size: tl.constexpr, power: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """_BLOCK pixels of one job; power is a power of two that is not below the number of tiles."""
    blocks: tl.constexpr = (size * size + _BLOCK - 1) // _BLOCK
    tiles: tl.constexpr = ((size + _TILE - 1) // _TILE) * ((size + _TILE - 1) // _TILE)
    number, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    job = table + number * _COLUMNS
    pixel = block * _BLOCK + tl.arange(0, _BLOCK)
    inside = pixel < size * size
    at = scratch + number.to(tl.int64) * (3 * size * size) + 3 * pixel
    tile = tl.arange(0, power)
    total, of_job = sums + 3 * (number * tiles + tile), tile < tiles
    factor = _float(job, _VALUE + _CONTRAST)
    r = _contrast(tl.load(at, inside, 0.0), total, of_job, factor, size * size)
    g = _contrast(tl.load(at + 1, inside, 0.0), total + 1, of_job, factor, size * size)
    b = _contrast(tl.load(at + 2, inside, 0.0), total + 2, of_job, factor, size * size)
    for place in tl.static_range(3):
        r, g, b = _operation(job, tl.load(job + _AFTER + place), r, g, b)
    if tl.load(job + _GRAY) != 0:
        r = _LUMA_R * r + _LUMA_G * g + _LUMA_B * b
        g = r
        b = r
    if tl.load(job + _RADIUS) != 0:
        tl.store(at, r, inside)
        tl.store(at + 1, g, inside)
        tl.store(at + 2, b, inside)
    else:
        to = _pointer(job, _TARGET, kind) + 3 * pixel
        tl.store(to, _finish(r, job, scale_r, shift_r).to(kind), inside)
        tl.store(to + 1, _finish(g, job, scale_g, shift_g).to(kind), inside)
        tl.store(to + 2, _finish(b, job, scale_b, shift_b).to(kind), inside)


# Told that its pointers are aligned, the compiler would give each thread four neighbours, to be read at once; at the
# taps they cannot be, and a warp would then touch four lines of the cache where one holds all that it reads.
@triton.jit(do_not_specialize_on_alignment=["scratch", "blurred"])
def _blur_rows(table, scratch, blurred, size: tl.constexpr):
    """_BLOCK numbers of one of the jobs that have a blur; blurred (those jobs, size, size, 3) float32."""
    line: tl.constexpr = 3 * size
    blocks: tl.constexpr = (size * line + _BLOCK - 1) // _BLOCK
    which, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    number = tl.load(table + which * _COLUMNS + _BLURRED)
    job = table + number * _COLUMNS
    i = block * _BLOCK + tl.arange(0, _BLOCK)
    x, inside = i % line, i < size * line
    at = scratch + number.to(tl.int64) * (size * line) + i
    exponent = _float(job, _EXPONENT)
    total = tl.load(at, inside, 0.0)
    for k in range(1, tl.load(job + _RADIUS) + 1):
        near = tl.load(at - 3 * k, inside & (x >= 3 * k), 0.0)
        far = tl.load(at + 3 * k, inside & (x + 3 * k < line), 0.0)
        total += tl.exp(exponent * k * k) * (near + far)
    tl.store(blurred + which.to(tl.int64) * (size * line) + i, total * _float(job, _CENTRE), inside)


@triton.jit
def _blur_columns(
    table, blurred, scale_r, scale_g, scale_b, shift_r, shift_g, shift_b, size: tl.constexpr, kind: tl.constexpr
):  # fmt: skip
    """_BLOCK numbers of one of the jobs that have a blur, from what _blur_rows left."""
    line: tl.constexpr = 3 * size
    blocks: tl.constexpr = (size * line + _BLOCK - 1) // _BLOCK
    which, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    job = table + tl.load(table + which * _COLUMNS + _BLURRED) * _COLUMNS
    i = block * _BLOCK + tl.arange(0, _BLOCK)
    inside = i < size * line
    at = blurred + which.to(tl.int64) * (size * line) + i
    exponent = _float(job, _EXPONENT)
    total = tl.load(at, inside, 0.0)
    for k in range(1, tl.load(job + _RADIUS) + 1):
        above = tl.load(at - k * line, inside & (i >= k * line), 0.0)
        below = tl.load(at + k * line, i + k * line < size * line, 0.0)
        total += tl.exp(exponent * k * k) * (above + below)
    channel = i % 3
    scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
    shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))
    out = _finish(total * _float(job, _CENTRE), job, scale, shift)
    tl.store(_pointer(job, _TARGET, kind) + i, out.to(kind), inside)


def make_views(
    pixels: Pixels, params: Sequence[ViewParams], augment: AugmentConfig, outs: Sequence[Tensor]
) -> None:
    """Queues the views of N images on the current stream; the host does not wait.

    Args:
        pixels: the decoded images, in the GPU's memory; the caller keeps it alive until the stream has come so far.
            Sides of at most a million pixels.
        params: for each view, N drawn ones; their windows lie inside the images' boxes.
        augment: size, mean and std.
        outs: for each view a contiguous (N, size, size, 3) on the GPU, all of one dtype: float32, float16 or bfloat16;
            the normalised pixels go there.

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
    recipes = write(pixels, params)
    together = max(1, _SCRATCH // (12 * size * size))
    jobs = torch.empty((n * len(outs), JOB.itemsize), dtype=torch.uint8, pin_memory=device.type == "cuda")
    rows = jobs.numpy().view(JOB).reshape(len(outs), n)
    for row, recipe, out in zip(rows, recipes, outs, strict=True):
        fill(row, pixels, recipe, augment.blur_taps, out.data_ptr(), out.stride(0) * out.element_size())
    parts = [rows.reshape(-1)[start : start + together] for start in range(0, rows.size, together)]
    blurs = [list_blurred(part) for part in parts]

    norm = normalisation(augment).reshape(-1).tolist()
    tiles, blocks = triton.cdiv(size, _TILE.value) ** 2, triton.cdiv(size * size, _BLOCK.value)
    numbers = triton.cdiv(3 * size * size, _BLOCK.value)
    kind = _DTYPES[dtype]
    with torch.cuda.device_of(outs[0]):
        table = jobs.to(device, non_blocking=True).view(torch.int32)
        most, blurred_most = max(map(len, parts), default=0), max(blurs, default=0)
        scratch = torch.empty(most * 3 * size * size, dtype=torch.float32, device=device)
        blurred = torch.empty(blurred_most * 3 * size * size, dtype=torch.float32, device=device)
        sums = torch.empty(most * tiles * 3, dtype=torch.float32, device=device)
        for k, (part, blur) in enumerate(zip(parts, blurs, strict=True)):
            some = table[k * together :]
            _resize[(len(part) * tiles,)](some, scratch, sums, size, num_warps=8)
            _color[(len(part) * blocks,)](
                some, scratch, sums, *norm, size, triton.next_power_of_2(tiles), kind
            )
            if blur:
                _blur_rows[(blur * numbers,)](some, scratch, blurred, size)
                _blur_columns[(blur * numbers,)](some, blurred, *norm, size, kind)
