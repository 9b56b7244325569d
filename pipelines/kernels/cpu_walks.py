"""The three walks over a view's rows, compiled for a profile from its own operations; see cpu.py."""

from typing import Any

import numpy as np

from byolt.pipelines.kernels import cpu_rows as rows
from byolt.pipelines.kernels.cpu_rows import BLUE, GREEN, ONE, RED, Work, compiled
from byolt.pipelines.kernels.inputs import Floats, KernelParams
from byolt.pipelines.views import BRIGHTNESS, CONTRAST, HUE, SATURATION


def compile_view(
    count: Any, weigh: Any, brightness: Any, saturation: Any, *, margin: int, gray_mean: bool, mirror: bool
) -> Any:
    """Compiles the three walks of a profile; the functions are compiled, too.

    Args:
        count: (length, size) -> number of taps of an axis, a multiple of 4.
        weigh: (length, size, place, weights) -> first tap of a place; writes the weights of its taps, not normalized.
            Taps outside 0 to length - 1 weigh 0.
        brightness: (r, g, b, value), on a row, in place.
        saturation: likewise.
        margin: pixels before a window that taps of weight 0 reach.
        gray_mean: whether contrast is about the mean of gray, or of each channel.
        mirror: whether the image is mirrored at its border for the blur, or padded with zeros.

    Returns:
        A compiled function that makes view i of `params`: image uint8 (height, 3 * width), out float32 (size, 3 *
        size).
    """

    def axis(length: int, size: int, flip: bool, unit: float) -> Any:
        """First taps (size,) and weights (size, taps) of an axis; the weights of a place sum to `unit`."""
        taps = count(length, size)
        first, weights = np.empty(size, np.int64), np.zeros((size, taps), np.float32)
        of_place = np.empty(taps)
        for place in range(size):
            to = size - 1 - place if flip else place
            first[to] = weigh(length, size, place, of_place)
            total = 0.0
            for tap in range(taps):
                total += of_place[tap]
            for tap in range(taps):  # rounded first, as in earlier versions: the digests of their runs hold
                weights[to, tap] = np.float32(of_place[tap]) / total * unit
        return first, weights

    def color(r: Floats, g: Floats, b: Floats, operations: Any, values: Floats) -> None:
        """The operations but contrast, in the sampled order, on a row."""
        for operation in operations:
            if operation == BRIGHTNESS:
                brightness(r, g, b, values[BRIGHTNESS])
            elif operation == SATURATION:
                saturation(r, g, b, values[SATURATION])
            elif operation == HUE:
                rows.hue(r, g, b, values[HUE])

    def resize(image: Any, window: Any, flip: bool, operations: Any, values: Floats, work: Work) -> Any:
        """First walk: the window, resized, and the operations that precede contrast; returns its means (3,)."""
        top, left, height, width = window[0], window[1], window[2], window[3]
        pad = len(work.blur_weights) - 1
        size = work.line.shape[1] - 2 * pad
        row_taps, column_taps = count(height, size), count(width, size)
        first_rows, row_weights = axis(height, size, False, 1 / 255)
        columns, column_weights = axis(width, size, flip, 1.0)
        columns += margin
        line = np.zeros(3 * (margin + width + column_taps), np.float32)
        inside = line[3 * margin : 3 * (margin + width)]
        start, stop = 3 * left, 3 * (left + width)
        sums = np.zeros(3)
        for y in range(size):
            for k in range(0, row_taps, 4):
                first = first_rows[y] + k  # a row outside the window weighs 0: any other will do
                a = image[top + min(max(first, 0), height - 1), start:stop]
                b = image[top + min(max(first + 1, 0), height - 1), start:stop]
                c = image[top + min(max(first + 2, 0), height - 1), start:stop]
                d = image[top + min(max(first + 3, 0), height - 1), start:stop]
                if k == 0:
                    rows.blend_rows(a, b, c, d, row_weights[y], inside)
                else:
                    rows.add_rows(a, b, c, d, row_weights[y, k:], inside)
            red, green, blue = rows.planar(work.planes, (pad + y) * size, size)
            rows.blend_columns(line, columns, column_weights, column_taps, red, green, blue)
            color(red, green, blue, operations, values)
            sums[0] += rows.total(red)
            sums[1] += rows.total(green)
            sums[2] += rows.total(blue)
        if gray_mean:
            sums[:] = RED * sums[0] + GREEN * sums[1] + BLUE * sums[2]
        return sums / (size * size)

    def view(image: Any, params: KernelParams, i: int, taps: int, work: Work, out: Floats) -> None:
        size, pad = len(out), len(work.blur_weights) - 1
        order, values, solarize = params.order[i], params.value[i], params.solarize[i]
        place = 0
        while place < 4 and order[place] != CONTRAST:
            place += 1
        factor = values[CONTRAST] if place < 4 else ONE
        means = resize(image, params.window[i], params.flip[i], order[:place], values, work)

        radius = rows.blur_taps(params.sigma[i], taps, work.blur_weights)
        channels = 1 if params.gray[i] else 3
        red, green, blue = rows.planar(work.line, pad, size)
        second, third = (red, red) if channels == 1 else (green, blue)
        for y in range(size):
            planes = rows.planar(work.planes, (pad + y) * size, size)
            rows.contrast(planes[0], factor, np.float32(means[0]), red)
            rows.contrast(planes[1], factor, np.float32(means[1]), green)
            rows.contrast(planes[2], factor, np.float32(means[2]), blue)
            color(red, green, blue, order[place + 1 :], values)
            if channels == 1:
                rows.gray(red, green, blue)
            if radius:
                for c in range(channels):
                    if mirror:
                        rows.mirror(work.line[c], pad, size, 1, radius)
                    rows.blur(work.line[c], pad, work.steps[0], work.blur_weights, radius, planes[c])
            else:
                rows.deliver(red, second, third, solarize, work.scale, work.shift, out[y])
        if radius:
            if mirror:
                for c in range(channels):
                    rows.mirror(work.planes[c], pad, size, size, radius)
            lines = (red, green, blue)
            for y in range(size):
                for c in range(channels):
                    at = (pad + y) * size
                    rows.blur(work.planes[c], at, work.steps[1], work.blur_weights, radius, lines[c])
                rows.deliver(red, second, third, solarize, work.scale, work.shift, out[y])

    for function in axis, color, resize, view:  # see cpu_rows.compiled
        function.__qualname__ = f"{function.__name__} of {weigh.__module__}"
    axis, color, resize = compiled(axis), compiled(color), compiled(resize)
    return compiled(view)
