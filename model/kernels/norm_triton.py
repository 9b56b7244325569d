"""Batch norm + shortcut + ReLU in Triton, forward and backward, as norm.py defines it, at the speed of the memory.

A batch (N, C, H, W) in channels_last, or (N, C), is a matrix of rows by channels. Its views, equal parts of the rows,
have statistics of their own. They are computed in float32 (in float64 for float64), whatever the batch's dtype:

    forward   1  _moments    a slice of rows ─► its count, mean and sum of squared deviations, per channel
              2  _merge      slices, or ranks ─► mean and scale of each view; running statistics, view after view
              3  _normalize  normalize ─► (+ shortcut, or its norm) ─► (ReLU) ─► output
                 _pool       normalize ─► (ReLU) ─► max-pool ─► output, and which pixel it was
    backward  1  _reduce     gradient behind the ReLU ─► per slice its sum and its sum times (x - mean)
              2  _add        slices ─► sums of each view, gradients of weight and bias
              3  _propagate  gradient of the input (and of the shortcut in front of its norm)

Over ranks, moments are gathered before a second _merge, sums are added up after _add; nothing else differs.

ReLU's mask is computed again from x, or read from the output, so that backward keeps x, and the output where a shortcut
was added; with max-pool x and the place of each maximum, a byte. Nothing is added atomically and the slices do not
depend on the card: the same batch gives the same bits in every run.

Per element of a batch, memory is read or written 3 times forward and 5 backward; with a shortcut 4 and 7, with its
norm 5 and 8; a second gradient of the output adds 1, or 2 with the shortcut's norm. With max-pool 2.4 and 3.75 (of
16 bits).

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1 before triton is first imported), as the tests
do. Their speed on a GPU is not yet measured. A prototype of the same design, without max-pool, took ResNet-50's step
(batch 256, bf16) on an H200 from 1,595 to 2,818 images/s: it read at 3.3 to 3.8 TB/s where torch's kernels reach 1.1.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from byolt.model.distributed import all_reduce_sum_, gather_stacked

_TILE = 4096  # elements that a program has in registers at once
_PROGRAMS = 132 * 8  # programs that reduce: 8 for each multiprocessor of an H100, on any card
_WARPS = 8


@triton.jit
def _place(channels, width: tl.constexpr):
    """This program's channels, whether each exists, and which of the tiles or slices of a view it has."""
    blocks = tl.cdiv(channels, width)
    column = tl.program_id(0) % blocks * width + tl.arange(0, width)
    return column, column < channels, tl.program_id(0) // blocks


@triton.jit
def _load(pointer, inside, whole: tl.constexpr, kind: tl.constexpr):
    """A tile; 0 outside of the matrix, which no tile leaves where all are whole."""
    return (tl.load(pointer) if whole else tl.load(pointer, mask=inside, other=0.0)).to(kind)


@triton.jit
def _store(pointer, value, inside, whole: tl.constexpr):
    if whole:
        tl.store(pointer, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _row(pointer, at, known):
    """Numbers of this program's channels, to broadcast over rows."""
    return tl.load(pointer + at, mask=known, other=0.0)[None, :]


@triton.jit
def _moments(
    x, parts, rows, channels, slice_rows, height: tl.constexpr, width: tl.constexpr, whole: tl.constexpr
):
    """Parts (slices, 3, views, channels): count, mean, sum of squared deviations from it.

    Sums are taken of differences from the slice's first row, so that they keep their digits far from 0 too.
    """
    kind: tl.constexpr = parts.dtype.element_ty
    column, known, part = _place(channels, width)
    view, views = tl.program_id(1), tl.num_programs(1)
    begin = part * slice_rows
    end = tl.minimum(begin + slice_rows, rows)
    first_row = view.to(tl.int64) * rows
    pivot = _row(x + (first_row + begin) * channels, column, known).to(kind)
    row = tl.arange(0, height)[:, None]
    offset = row * channels + column[None, :]
    sums = tl.zeros((height, width), kind)
    squares = tl.zeros((height, width), kind)
    for top in range(begin, end, height):
        inside = (top + row < end) & known[None, :]
        difference = _load(x + (first_row + top) * channels + offset, inside, whole, kind) - pivot
        if not whole:
            difference = tl.where(inside, difference, 0.0)
        sums += difference
        squares += difference * difference
    count = (end - begin).to(kind)
    shift = tl.sum(sums, 0, keep_dims=True) / count
    squares_about_mean = tl.sum(squares, 0, keep_dims=True) - count * shift * shift
    plane = views * channels
    out = parts + part * 3 * plane + view * channels + column[None, :]
    tl.store(out, count + 0 * pivot, mask=known[None, :])
    tl.store(out + plane, pivot + shift, mask=known[None, :])
    # Rounding may take it below 0; NaN stays.
    tl.store(out + 2 * plane, tl.where(squares_about_mean < 0, 0.0, squares_about_mean), mask=known[None, :])


@triton.jit
def _merge(
    parts, out, weight, running_mean, running_var, tracked, count_parts, channels,
    eps: tl.constexpr, momentum: tl.constexpr, views: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Parts of any number as one; without a weight again as a part, else out (4, views, channels).

    Of each view the mean, the scale (weight / deviation), 1 / deviation and the count; the running statistics take
    view after view.
    """
    kind: tl.constexpr = parts.dtype.element_ty
    column = tl.program_id(0) * width + tl.arange(0, width)
    known = column < channels
    plane = views * channels
    if weight is not None:
        gain = tl.load(weight + column, mask=known, other=0.0).to(kind)
        average = tl.load(running_mean + column, mask=known, other=0.0).to(kind)
        spread = tl.load(running_var + column, mask=known, other=0.0).to(kind)
        if tl.program_id(0) == 0:
            tl.store(tracked, tl.load(tracked) + views)
    for view in tl.static_range(views):
        at = view * channels + column
        count = tl.zeros((width,), kind)
        total = tl.zeros((width,), kind)
        for top in range(0, count_parts, height):
            part = top + tl.arange(0, height)
            inside = (part < count_parts)[:, None] & known[None, :]
            place = parts + part[:, None] * (3 * plane) + at[None, :]
            size = tl.load(place, mask=inside, other=0.0)
            count += tl.sum(size, 0)
            total += tl.sum(size * tl.load(place + plane, mask=inside, other=0.0), 0)
        count = tl.where(known, count, 2.0)  # where there is no channel: divides by no 0
        mean = total / count
        squares = tl.zeros((width,), kind)
        for top in range(0, count_parts, height):
            part = top + tl.arange(0, height)
            inside = (part < count_parts)[:, None] & known[None, :]
            place = parts + part[:, None] * (3 * plane) + at[None, :]
            size = tl.load(place, mask=inside, other=0.0)
            away = tl.load(place + plane, mask=inside, other=0.0) - mean[None, :]
            squares += tl.sum(tl.load(place + 2 * plane, mask=inside, other=0.0) + size * away * away, 0)
        if weight is None:
            tl.store(out + at, count, mask=known)
            tl.store(out + plane + at, mean, mask=known)
            tl.store(out + 2 * plane + at, squares, mask=known)
        else:
            variance = squares / count
            inverse = 1 / tl.sqrt(variance + eps)
            tl.store(out + at, mean, mask=known)
            tl.store(out + plane + at, gain * inverse, mask=known)
            tl.store(out + 2 * plane + at, inverse, mask=known)
            tl.store(out + 3 * plane + at, count, mask=known)
            average += momentum * (mean - average)
            spread += momentum * (squares / (count - 1) - spread)
    if weight is not None:
        tl.store(running_mean + column, average, mask=known)
        tl.store(running_var + column, spread, mask=known)


@triton.jit
def _normalize(
    x, shortcut, y, moments, bias, moments2, bias2, rows, channels,
    relu: tl.constexpr, height: tl.constexpr, width: tl.constexpr, whole: tl.constexpr,
):  # fmt: skip
    """scale (x - mean) + bias, plus the shortcut or the same of the shortcut, then ReLU."""
    kind: tl.constexpr = moments.dtype.element_ty
    column, known, tile = _place(channels, width)
    view, plane = tl.program_id(1), tl.num_programs(1) * channels
    at = view * channels + column
    row = tl.arange(0, height)[:, None]
    inside = (tile * height + row < rows) & known[None, :]
    place = (view.to(tl.int64) * rows + tile * height) * channels + row * channels + column[None, :]
    value = _load(x + place, inside, whole, kind) - _row(moments, at, known)
    value = value * _row(moments + plane, at, known) + _row(bias, column, known)
    if shortcut is not None:
        other = _load(shortcut + place, inside, whole, kind)
        if moments2 is not None:
            other = (other - _row(moments2, at, known)) * _row(moments2 + plane, at, known)
            other += _row(bias2, column, known)
        value += other
    if relu:
        value = tl.where(value <= 0, 0.0, value)  # NaN stays
    _store(y + place, value, inside, whole)


@triton.jit
def _pool(
    x, y, index, moments, bias, rows, channels, side_y, side_x,
    relu: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """scale (x - mean) + bias, ReLU, then the maximum of 3 x 3 pixels around every second one (padding 1).

    `rows` are the output's. The index is which of the 9 it is; the first of equal ones, a NaN before all, as in torch.
    """
    kind: tl.constexpr = moments.dtype.element_ty
    column, known, tile = _place(channels, width)
    view, plane = tl.program_id(1), tl.num_programs(1) * channels
    at = view * channels + column
    mean, scale, shift = _row(moments, at, known), _row(moments + plane, at, known), _row(bias, column, known)
    row = tile * height + tl.arange(0, height)[:, None]
    inside = (row < rows) & known[None, :]
    pooled_y, pooled_x = (side_y + 1) // 2, (side_x + 1) // 2
    row += view * rows
    pixel = row % (pooled_y * pooled_x)
    image = (row // (pooled_y * pooled_x)).to(tl.int64) * (side_y * side_x)
    best = tl.full((height, width), float("-inf"), kind)
    which = tl.zeros((height, width), tl.int32)
    for tap in tl.static_range(9):
        place_y, place_x = pixel // pooled_x * 2 - 1 + tap // 3, pixel % pooled_x * 2 - 1 + tap % 3
        valid = inside & (place_y >= 0) & (place_y < side_y) & (place_x >= 0) & (place_x < side_x)
        place = (image + place_y * side_x + place_x) * channels + column[None, :]
        value = (tl.load(x + place, mask=valid, other=0.0).to(kind) - mean) * scale + shift
        if relu:
            value = tl.where(value <= 0, 0.0, value)
        better = valid & ((value > best) | (value != value))
        best = tl.where(better, value, best)
        which = tl.where(better, tap, which)
    place = row.to(tl.int64) * channels + column[None, :]
    _store(y + place, best, inside, False)
    _store(index + place, which, inside, False)


@triton.jit
def _unpool(slopes, index, row, column, inside, channels, side_y, side_x, kind: tl.constexpr):
    """The gradient of max-pool's input at rows (height, 1): of at most 4 windows, where it was the maximum."""
    pooled_y, pooled_x = (side_y + 1) // 2, (side_x + 1) // 2
    pixel = row % (side_y * side_x)
    image = (row // (side_y * side_x)).to(tl.int64) * (pooled_y * pooled_x)
    place_y, place_x = pixel // side_x, pixel % side_x
    g = tl.zeros(inside.shape, kind)
    for window in tl.static_range(4):
        window_y, window_x = (place_y + 1) // 2 - window // 2, (place_x + 1) // 2 - window % 2
        tap_y, tap_x = place_y + 1 - 2 * window_y, place_x + 1 - 2 * window_x
        valid = inside & (window_y < pooled_y) & (window_x < pooled_x) & (tap_y < 3) & (tap_x < 3)
        place = (image + window_y * pooled_x + window_x) * channels + column[None, :]
        hit = tl.load(index + place, mask=valid, other=9) == tap_y * 3 + tap_x
        g += tl.where(hit, tl.load(slopes + place, mask=valid, other=0.0).to(kind), 0.0)
    return g


@triton.jit
def _reduce(
    slopes, slopes2, index, x, y, shortcut, passed, moments, bias, moments2, bias2, parts,
    rows, channels, side_y, side_x, slice_rows,
    relu: tl.constexpr, height: tl.constexpr, width: tl.constexpr, whole: tl.constexpr,
):  # fmt: skip
    """Parts (slices, 2 or 3, views, channels): sums of g, of g (x - mean) and, with the shortcut's norm, of
    g (shortcut - its mean). g is the sum of both gradients of the output where ReLU let it pass, written to `passed`.
    """
    kind: tl.constexpr = parts.dtype.element_ty
    column, known, part = _place(channels, width)
    view, plane = tl.program_id(1), tl.num_programs(1) * channels
    at = view * channels + column
    mean, scale, shift = _row(moments, at, known), _row(moments + plane, at, known), _row(bias, column, known)
    if moments2 is not None:
        mean2, scale2 = _row(moments2, at, known), _row(moments2 + plane, at, known)
        shift2 = _row(bias2, column, known)
        products2 = tl.zeros((height, width), kind)
    begin = part * slice_rows
    end = tl.minimum(begin + slice_rows, rows)
    row = tl.arange(0, height)[:, None]
    offset = row * channels + column[None, :]
    sums = tl.zeros((height, width), kind)
    products = tl.zeros((height, width), kind)
    for top in range(begin, end, height):
        inside = (top + row < end) & known[None, :]
        place = (view.to(tl.int64) * rows + top) * channels + offset
        if index is not None:
            g = _unpool(
                slopes, index, view * rows + top + row, column, inside, channels, side_y, side_x, kind
            )
        else:
            g = _load(slopes + place, inside, whole, kind)
        if slopes2 is not None:
            g += _load(slopes2 + place, inside, whole, kind)
        centered = _load(x + place, inside, whole, kind) - mean
        if moments2 is not None:
            centered2 = _load(shortcut + place, inside, whole, kind) - mean2
        if relu:
            if y is not None:
                output = _load(y + place, inside, whole, kind)
            else:
                output = centered * scale + shift
                if moments2 is not None:
                    output += centered2 * scale2 + shift2
            g = tl.where(output <= 0, 0.0, g)
        if passed is not None:
            _store(passed + place, g, inside, whole)
        if not whole:
            g = tl.where(inside, g, 0.0)
        sums += g
        products += g * centered
        if moments2 is not None:
            products2 += g * centered2
    terms: tl.constexpr = 2 if moments2 is None else 3
    out = parts + part * terms * plane + at
    tl.store(out, tl.sum(sums, 0), mask=known)
    tl.store(out + plane, tl.sum(products, 0), mask=known)
    if moments2 is not None:
        tl.store(out + 2 * plane, tl.sum(products2, 0), mask=known)


@triton.jit
def _add(
    parts, sums, gradients, moments, moments2, count_parts, channels,
    views: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Sums (2 or 3, views, channels) over the parts; gradients (2 or 4, channels) of weight and bias of the norms."""
    kind: tl.constexpr = parts.dtype.element_ty
    column = tl.program_id(0) * width + tl.arange(0, width)
    known = column < channels
    plane = views * channels
    terms: tl.constexpr = 2 if moments2 is None else 3
    for term in tl.static_range(terms):
        gradient = tl.zeros((width,), kind)
        for view in tl.static_range(views):
            at = view * channels + column
            total = tl.zeros((width,), kind)
            for top in range(0, count_parts, height):
                part = top + tl.arange(0, height)
                inside = (part < count_parts)[:, None] & known[None, :]
                place = parts + part[:, None] * (terms * plane) + term * plane + at[None, :]
                total += tl.sum(tl.load(place, mask=inside, other=0.0), 0)
            tl.store(sums + term * plane + at, total, mask=known)
            if term == 1:
                total *= tl.load(moments + 2 * plane + at, mask=known, other=0.0)
            if term == 2:
                total *= tl.load(moments2 + 2 * plane + at, mask=known, other=0.0)
            gradient += total
        if term == 0:
            tl.store(gradients + channels + column, gradient, mask=known)
            if moments2 is not None:
                tl.store(gradients + 3 * channels + column, gradient, mask=known)
        elif term == 1:
            tl.store(gradients + column, gradient, mask=known)
        else:
            tl.store(gradients + 2 * channels + column, gradient, mask=known)


@triton.jit
def _propagate(
    slopes, slopes2, index, x, shortcut, dx, dshortcut, moments, bias, moments2, bias2, sums,
    rows, channels, side_y, side_x,
    relu: tl.constexpr, height: tl.constexpr, width: tl.constexpr, whole: tl.constexpr,
):  # fmt: skip
    """scale (g - mean of g - (x - mean) mean of g (x - mean) / variance), for x and for the shortcut's norm."""
    kind: tl.constexpr = moments.dtype.element_ty
    column, known, tile = _place(channels, width)
    view, plane = tl.program_id(1), tl.num_programs(1) * channels
    at = view * channels + column
    row = tl.arange(0, height)[:, None]
    inside = (tile * height + row < rows) & known[None, :]
    place = (view.to(tl.int64) * rows + tile * height) * channels + row * channels + column[None, :]
    count = tl.load(moments + 3 * plane + view * channels)
    if index is not None:
        row += view * rows + tile * height
        g = _unpool(slopes, index, row, column, inside, channels, side_y, side_x, kind)
    else:
        g = _load(slopes + place, inside, whole, kind)
    if slopes2 is not None:
        g += _load(slopes2 + place, inside, whole, kind)
    centered = _load(x + place, inside, whole, kind) - _row(moments, at, known)
    scale, inverse = _row(moments + plane, at, known), _row(moments + 2 * plane, at, known)
    output = centered * scale + _row(bias, column, known)
    if moments2 is not None:
        centered2 = _load(shortcut + place, inside, whole, kind) - _row(moments2, at, known)
        scale2, inverse2 = _row(moments2 + plane, at, known), _row(moments2 + 2 * plane, at, known)
        output += centered2 * scale2 + _row(bias2, column, known)
    if relu:
        g = tl.where(output <= 0, 0.0, g)
    deviation = g - _row(sums, at, known) / count
    slope = inverse * inverse * _row(sums + plane, at, known) / count
    _store(dx + place, scale * (deviation - centered * slope), inside, whole)
    if moments2 is not None:
        slope2 = inverse2 * inverse2 * _row(sums + 2 * plane, at, known) / count
        _store(dshortcut + place, scale2 * (deviation - centered2 * slope2), inside, whole)


class _Cut(NamedTuple):
    """How a matrix of rows by channels is cut into programs."""

    views: int
    rows: int  # of a view
    channels: int
    height: int  # of a tile
    width: int
    tiles: tuple[int, int]  # grid: tiles of a view, side by side first; views
    slice_rows: int  # a multiple of height
    slices: int
    slice_grid: tuple[int, int]
    whole: bool  # no tile leaves the matrix


@lru_cache(maxsize=1024)
def _cut(elements: int, channels: int, views: int) -> _Cut:
    rows = elements // channels // views
    width = min(128, triton.next_power_of_2(channels))
    height = _TILE // width
    blocks, tiles = triton.cdiv(channels, width), triton.cdiv(rows, height)
    slices = max(1, min(_PROGRAMS // (blocks * views), triton.cdiv(tiles, 2)))
    slice_rows = triton.cdiv(tiles, slices) * height
    slices = triton.cdiv(rows, slice_rows)
    whole = channels % width == 0 and rows % height == 0
    grids = (blocks * tiles, views), (blocks * slices, views)
    return _Cut(views, rows, channels, height, width, grids[0], slice_rows, slices, grids[1], whole)


_MERGE_WIDTH = 16  # channels that a program of _merge or _add has


def _merge_shape(parts: int) -> dict[str, int]:
    return {"height": min(128, triton.next_power_of_2(parts)), "width": _MERGE_WIDTH}


def _statistics(x: Tensor, cut: _Cut, norm: _BatchNorm) -> Tensor:
    """Of x over all ranks, as _merge leaves them; the norm's running statistics move."""
    kind = torch.promote_types(x.dtype, torch.float32)
    parts = torch.empty(cut.slices, 3, cut.views, cut.channels, dtype=kind, device=x.device)
    shape = cut.height, cut.width, cut.whole
    _moments[cut.slice_grid](x, parts, cut.rows, cut.channels, cut.slice_rows, *shape, num_warps=_WARPS)
    grid = (triton.cdiv(cut.channels, _MERGE_WIDTH),)

    def merge(parts: Tensor, out: Tensor, *state: Tensor | None) -> None:
        settings = norm.eps, norm.momentum, cut.views
        _merge[grid](parts, out, *state, len(parts), cut.channels, *settings, **_merge_shape(len(parts)))

    if norm.synchronized:
        mine = parts.new_empty(parts[0].numel())
        merge(parts, mine, None, None, None, None)
        parts = gather_stacked(mine)
    moments = parts.new_empty(4, cut.views, cut.channels)
    merge(parts, moments, norm.weight, norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return moments


class _Normalize(torch.autograd.Function):
    """The output, and with a shortcut a second name for it: the gradients of a block's two uses of the block before
    then arrive apart and are added in _reduce, instead of by a kernel of their own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shortcut: Tensor | None,
        weight2: Tensor | None,
        bias2: Tensor | None,
        norms: tuple[_BatchNorm, _BatchNorm | None],
        views: int,
        relu: bool,
        pool: bool,
    ) -> tuple[Tensor, Tensor | None]:
        cut, (norm, norm2) = _cut(x.numel(), x.shape[1], views), norms
        moments = _statistics(x, cut, norm)
        moments2 = None if norm2 is None or shortcut is None else _statistics(shortcut, cut, norm2)
        adds = shortcut is not None and norm2 is None
        index = None
        if pool:
            y = torch.empty_like(x[:, :, ::2, ::2], memory_format=torch.channels_last)
            index = torch.empty_like(y, dtype=torch.uint8)
            out = _cut(y.numel(), y.shape[1], views)
            matrix = out.rows, out.channels, *x.shape[2:], relu, out.height, out.width
            _pool[out.tiles](x, y, index, moments, bias, *matrix, num_warps=_WARPS)
        else:
            y = torch.empty_like(x)
            matrix = cut.rows, cut.channels, relu, cut.height, cut.width, cut.whole
            _normalize[cut.tiles](x, shortcut, y, moments, bias, moments2, bias2, *matrix, num_warps=_WARPS)
        kept = shortcut if norm2 is not None else y if adds and relu else None
        ctx.save_for_backward(x, kept, index, bias, bias2, moments, moments2)
        ctx.cut, ctx.relu, ctx.adds, ctx.synchronized = cut, relu, adds, norm.synchronized
        ctx.set_materialize_grads(False)
        return y, None if shortcut is None else y.detach()

    @staticmethod
    def backward(ctx: Any, slopes: Tensor | None, slopes2: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, kept, index, bias, bias2, moments, moments2 = ctx.saved_tensors
        cut, relu, adds = ctx.cut, ctx.relu, ctx.adds
        y, shortcut = (None, kept) if moments2 is not None else (kept, None)
        g, g2 = ([_dense(s) for s in (slopes, slopes2) if s is not None] + [None])[:2]
        passed = torch.empty_like(x) if adds and (relu or g2 is not None) else None
        terms = 2 if moments2 is None else 3
        parts = moments.new_empty(cut.slices, terms, cut.views, cut.channels)
        shape = relu, cut.height, cut.width, cut.whole
        norm = moments, bias, moments2, bias2
        size = cut.rows, cut.channels, *((None, None) if index is None else x.shape[2:])
        tensors = g, g2, index, x, y, shortcut, passed, *norm, parts
        _reduce[cut.slice_grid](*tensors, *size, cut.slice_rows, *shape, num_warps=_WARPS)
        sums = moments.new_empty(terms, cut.views, cut.channels)
        gradients = bias.new_empty(2 * terms - 2, cut.channels)
        numbers = cut.slices, cut.channels, cut.views
        grid = (triton.cdiv(cut.channels, _MERGE_WIDTH),)
        _add[grid](parts, sums, gradients, moments, moments2, *numbers, **_merge_shape(cut.slices))
        if ctx.synchronized:
            all_reduce_sum_(sums)
        if passed is not None:
            g, g2 = passed, None
        dx = torch.empty_like(x)
        dshortcut = torch.empty_like(x) if moments2 is not None else g if adds else None
        shape = relu and not adds, *shape[1:]
        _propagate[cut.tiles](
            g, g2, index, x, shortcut, dx, dshortcut if moments2 is not None else None, *norm, sums, *size, *shape,
            num_warps=_WARPS,
        )  # fmt: skip
        dweight, dbias, dweight2, dbias2 = [*gradients.unbind(), None, None][:4]
        return dx, dweight, dbias, dshortcut, dweight2, dbias2, None, None, None, None


def _dense(x: Tensor) -> Tensor:
    """Rows by channels in memory."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()


def normalize(
    x: Tensor,
    norm: _BatchNorm,
    shortcut: Tensor | None,
    shortcut_norm: _BatchNorm | None,
    views: int,
    relu: bool,
    pool: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Computes `BatchNorm.forward` of norm.py in train mode.

    Args:
        x: (N, C, H, W) in channels_last or (N, C).
        norm: of x, with weight, bias and running statistics; `synchronized` tells whether over all ranks.
        shortcut: like x, to be added.
        shortcut_norm: of the shortcut.
        views: equal parts of the batch that have statistics of their own.
        relu: whether ReLU follows.
        pool: whether max-pool of 3 x 3 pixels, stride 2, padding 1, follows; then without a shortcut.

    Returns:
        The output, and with a shortcut a second name for it, to be used instead in one of two places: its gradient is
        then added to that of the first by the kernels.

    Raises:
        ValueError: the batch cannot be cut into the views, or a view has a single value per channel.
    """
    if len(x) % views:
        raise ValueError(f"a batch of {len(x)} cannot be cut into {views} views")
    if x.numel() <= views * x.shape[1] and not norm.synchronized:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    shortcut = None if shortcut is None else _dense(shortcut)
    second = (None, None) if shortcut_norm is None else (shortcut_norm.weight, shortcut_norm.bias)
    norms = norm, shortcut_norm
    return _Normalize.apply(x, norm.weight, norm.bias, shortcut, *second, norms, views, relu, pool)
