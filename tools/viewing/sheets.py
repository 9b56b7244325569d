"""The three pictures of tools/show_views.py: a contact sheet, one strip per operation, two back ends side by side."""

import textwrap
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from byolt.configs.schema import Config
from byolt.pipelines.backends import Backend
from byolt.pipelines.formats.decode import decode
from byolt.pipelines.torch_backend import TorchBackend
from byolt.pipelines.views import ViewParams
from byolt.tools.reporting.figures import MARKS, save_png
from byolt.tools.viewing.samples import (
    DrawnSamples,
    Row,
    make_views,
    neutral_jitter,
    operations,
    table,
    to_pixels,
)

DPI = 200
CELL = 448  # pixels of a picture's side: a multiple of views of 224, 112, 64 and 32 px
GAP = 36
MARGIN = 56
TITLE = 46  # pixels from the title to the line below
LINE = 28  # from one line of text to the next
COLUMNS = (82, 276)  # left edges of the values in a table of parameters, in pixels
TEXT = 6.6  # points
INK, FAINT = "#212529", "#868e96"
COLORS = MARKS[0].color, MARKS[6].color  # view 1, view 2


class Page:
    """A figure that is laid out in pixels from its top left corner."""

    def __init__(self, width: int, height: int, title: str, notes: list[str]) -> None:
        """
        Args:
            width: pixels.
            height: pixels below the heading.
            title: first line of the heading.
            notes: its further lines; long ones are wrapped.
        """
        letters = (width - 2 * MARGIN) // 11
        wrapped = [line for note in notes for line in textwrap.wrap(note, letters)]
        self.top = MARGIN + TITLE + LINE * len(wrapped) + GAP  # height of the heading in pixels
        self.width, self.height = width, self.top + height + MARGIN
        self.figure = Figure(figsize=(width / DPI, self.height / DPI), dpi=DPI, facecolor="white")
        self.text(MARGIN, MARGIN, title, size=11, weight="bold")
        for number, line in enumerate(wrapped):
            self.text(MARGIN, MARGIN + TITLE + LINE * number, line, color=FAINT)

    def text(
        self, x: float, y: float, text: str, *, size: float = TEXT, color: str = INK, weight: str = "normal"
    ) -> None:
        """Writes a text whose first line begins at y."""
        place = x / self.width, 1 - y / self.height
        self.figure.text(*place, text, fontsize=size, color=color, weight=weight, va="top", parse_math=False)

    def picture(
        self, x: int, y: int, pixels: npt.NDArray[np.generic], side: int = CELL, frame: str | None = None
    ) -> Axes:
        """Draws an image at the left and the bottom of a square cell; the axes count the image's own pixels."""
        height, width = pixels.shape[:2]
        scale = side / max(height, width)
        box_height, box_width = max(1, round(height * scale)), max(1, round(width * scale))
        place = x / self.width, 1 - (y + side) / self.height
        axes = self.figure.add_axes((*place, box_width / self.width, box_height / self.height))
        axes.imshow(pixels, extent=(0, width, height, 0), aspect="auto")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(visible=frame is not None, edgecolor=frame, linewidth=1.2)
        return axes

    def table(self, x: int, y: int, rows: list[Row]) -> None:
        """Writes names and, beside each, one or two values; operations that are not applied are faint."""
        for number, (name, values, is_on) in enumerate(rows):
            self.text(x, y + number * LINE, name, color=FAINT)
            for offset, value in zip(COLUMNS, values, strict=False):
                self.text(x + offset, y + number * LINE, value, color=INK if is_on else FAINT)

    def save(self, path: Path) -> None:
        """Writes a PNG file, whole or not at all."""
        save_png(self.figure, path, DPI)


def contact_sheet(config: Config, samples: DrawnSamples, backend: Backend, notes: list[str]) -> Page:
    """One row per image: original with crop windows, view 1, view 2. Six images or more make two columns of rows."""
    pixels = [to_pixels(config, view).clip(0, 1) for view in make_views(config, backend, samples)]
    neutral, count = neutral_jitter(config), len(samples.ids)
    blocks = 1 if count < 6 else 2
    block, step = 3 * CELL + 2 * GAP, CELL + 8 * LINE + 2 * GAP
    head = LINE + GAP // 2
    width = 2 * MARGIN + blocks * block + (blocks - 1) * 2 * MARGIN
    page = Page(width, head + -(-count // blocks) * step - GAP, "What the network sees", notes)
    for column in range(blocks):
        left = MARGIN + column * (block + 2 * MARGIN)
        page.text(left, page.top, "original, with the window of each view", weight="bold")
        for index, color in enumerate(COLORS):
            label = f"view {index + 1} " + ("━━━" if index == 0 else "╍╍╍")
            page.text(left + (index + 1) * (CELL + GAP), page.top, label, color=color, weight="bold")
    for i in range(count):
        row, column = divmod(i, blocks)
        x, y = MARGIN + column * (block + 2 * MARGIN), page.top + head + row * step
        original = decode(samples.encoded[i]).numpy()
        height, width = original.shape[:2]
        axes = page.picture(x, y, original)
        for index, (params, color) in enumerate(zip(samples.params, COLORS, strict=True)):
            window(axes, params, i, color, dashed=index == 1)
            left = x + (index + 1) * (CELL + GAP)
            page.picture(left, y, pixels[index][i], frame=color)
            page.table(left, y + CELL + GAP // 2, table(params, i, height, width, neutral))
        about = [f"id {samples.ids[i]}", f"{width} × {height} px", samples.classes[i], samples.places[i]]
        lines = [line for text in about for line in textwrap.wrap(text, 36)[:3]]
        for number, line in enumerate(lines):
            page.text(x, y + CELL + GAP // 2 + number * LINE, line, weight="normal" if number else "bold")
    return page


def window(axes: Axes, view: ViewParams, i: int, color: str, dashed: bool) -> None:
    """Draws the crop window of sample i into its image; below dashes another window's line stays visible."""
    axes.add_patch(
        Rectangle(
            (int(view.left[i]), int(view.top[i])),
            int(view.width[i]),
            int(view.height[i]),
            fill=False,
            edgecolor=color,
            linewidth=1.4,
            linestyle=(0, (4, 3)) if dashed else "solid",
            clip_on=False,
            path_effects=[withStroke(linewidth=2.6, foreground="white")],
        )
    )


def operation_strips(config: Config, samples: DrawnSamples, backend: Backend, notes: list[str]) -> Page:
    """Each operation alone on the first sample, with the lowest, middle and highest value that the views can draw."""
    height, width = decode(samples.encoded[0]).shape[:2]
    strips = operations(config, samples, height, width)
    flat = [params for _, strip in strips for _, params in strip]
    joined = ViewParams(
        **{f.name: np.concatenate([getattr(p, f.name) for p in flat]) for f in fields(ViewParams)}
    )
    many = replace(samples, places=samples.places[:1] * len(flat), encoded=samples.encoded[:1] * len(flat))
    views, _ = make_views(config, backend, many, (joined, joined))
    pixels = iter(to_pixels(config, views).clip(0, 1))
    strip_width, step = 3 * CELL + GAP, CELL + 2 * LINE + 2 * GAP
    rows = -(-len(strips) // 2)
    page = Page(
        3 * MARGIN + 2 * strip_width,
        rows * step - GAP,
        f"Each operation alone, on sample {samples.ids[0]}",
        notes,
    )
    for number, (name, strip) in enumerate(strips):
        x = MARGIN + number % 2 * (strip_width + MARGIN)
        y = page.top + number // 2 * step
        page.text(x, y, name, weight="bold", size=8)
        for place, (label, _) in enumerate(strip):
            left = x + place * (CELL + GAP // 2)
            page.picture(left, y + LINE + 6, next(pixels))
            page.text(left, y + LINE + CELL + 14, label, size=8)
    return page


def comparison(
    config: Config, samples: DrawnSamples, backend: Backend, name: str, notes: list[str]
) -> tuple[Page, list[str]]:
    """One row per image: both views by the back end and by torch, and their difference.

    Returns:
        The page, and one line of numbers for each view of each sample.
    """
    plain = TorchBackend(config.augment, torch.device("cpu"), torch.float32, config.data.threads)
    ours, theirs = (
        [to_pixels(config, view) for view in make_views(config, each, samples)] for each in (backend, plain)
    )
    apart = [np.abs(a - b) * 255 for a, b in zip(ours, theirs, strict=True)]
    largest, mean = max(float(difference.max()) for difference in apart), float(np.mean(apart))
    factor = 10 ** int(np.floor(np.log10(255 / largest))) if 0 < largest < 255 else 1
    side, gap = CELL // 2, GAP // 2
    block, head, step = 3 * side + 2 * gap, 2 * LINE + gap, side + 2 * LINE + GAP
    overall = f"all views: max {short(largest)}, mean {short(mean)}"
    what = f"difference: |{name} − torch| × {factor:,}; black is equal; max and mean in levels of 255"
    page = Page(
        3 * MARGIN + 2 * block,
        head + len(samples.ids) * step - GAP,
        f"{name} beside torch",
        [*notes, what, overall],
    )
    lines = []
    for index, color in enumerate(COLORS):
        left = MARGIN + index * (block + MARGIN)
        page.text(left, page.top, f"view {index + 1}", color=color, weight="bold")
        for place, heading in enumerate((name, "torch", f"difference × {factor:,}")):
            page.text(left + place * (side + gap), page.top + LINE, heading, size=6)
        for i, number in enumerate(samples.ids.tolist()):
            y, difference = page.top + head + i * step, apart[index][i]
            shown = ours[index][i].clip(0, 1), theirs[index][i].clip(0, 1), difference * factor / 255
            for place, pixels in enumerate(shown):
                page.picture(left + place * (side + gap), y, pixels.clip(0, 1), side)
            numbers = f"max {short(difference.max())}", f"mean {short(difference.mean())}"
            page.text(left, y + side + 8, f"id {number}", size=6)
            for place, text in enumerate(numbers):
                page.text(left + 2 * (side + gap), y + side + 8 + place * (LINE - 4), text, size=6)
            lines.append(f"id {number} view {index + 1}: {', '.join(numbers)}")
    return page, [f"|{name} - torch| in levels of 255", *lines, overall]


def short(value: float) -> str:
    """Two significant digits without an exponent."""
    return np.format_float_positional(float(value), precision=2, fractional=False, trim="-")
