"""Draws the pictures of tools/show_views.py: a contact sheet, one strip per operation, two back ends side by side."""

import textwrap
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from byolt.configs.schema import Config
from byolt.model.run.pictures import save_png
from byolt.pipelines.backends import Backend
from byolt.pipelines.formats.decode import decode
from byolt.pipelines.torch_backend import TorchBackend
from byolt.pipelines.views import ViewParams
from byolt.tools.reporting.figures import MARKS, drawable
from byolt.tools.viewing.samples import DrawnSamples, make_views, neutral_jitter, operations, table, to_pixels

DPI = 200
CELL = 448  # pixels of an image's side: a multiple of views of 224, 112, 64 and 32 px
GAP, MARGIN = 36, 56  # pixels
TITLE, LINE = 50, 24  # heights in pixels
LETTER = 10  # width in pixels
TEXT = 5.8  # points, monospaced
COLORS = MARKS[0].color, MARKS[6].color  # view 1, view 2


class Cell(NamedTuple):
    """An image, its heading and the lines of text below it."""

    pixels: npt.NDArray[np.generic]  # (H, W, 3), uint8 or float in [0, 1]
    text: Sequence[str] = ()
    heading: str = ""
    color: str = "black"  # of the heading
    frame: str | None = None  # color
    windows: Sequence[tuple[int, int, int, int]] = ()  # left, top, width, height of view 1 and view 2


class Page:
    """A figure with a title, notes and rows of cells, laid out in pixels from its top left corner."""

    def __init__(
        self, title: str, notes: Sequence[str], rows: Sequence[Sequence[Cell]], side: int = CELL
    ) -> None:
        """`side` is that of a cell in pixels; long notes are wrapped."""
        self.width = 2 * MARGIN + max(map(len, rows)) * (side + GAP) - GAP
        lines = [line for note in notes for line in textwrap.wrap(note, (self.width - 2 * MARGIN) // LETTER)]
        y = MARGIN + TITLE + LINE * len(lines)
        tops = []
        for row in rows:
            tops.append(y + GAP + (LINE + GAP // 2) * any(cell.heading for cell in row))
            y = tops[-1] + side + GAP // 2 + LINE * max(len(cell.text) for cell in row)
        self.height = y + MARGIN
        self.figure = Figure(figsize=(self.width / DPI, self.height / DPI), dpi=DPI, facecolor="white")
        self._write(MARGIN, MARGIN, title, size=11, weight="bold")
        for number, line in enumerate(lines):
            self._write(MARGIN, MARGIN + TITLE + LINE * number, line, color="gray")
        for row, top in zip(rows, tops, strict=True):
            for column, cell in enumerate(row):
                self._draw(MARGIN + column * (side + GAP), top, cell, side)

    def _write(self, x: float, y: float, text: str, size: float = TEXT, **style: Any) -> None:
        place = x / self.width, 1 - y / self.height
        style |= {"va": "top", "parse_math": False, "family": "monospace", "fontsize": size}
        self.figure.text(*place, drawable(text), **style)

    def _draw(self, x: int, y: int, cell: Cell, side: int) -> None:
        """Draws the image at the left and the bottom of its square; its axes count its own pixels."""
        height, width = cell.pixels.shape[:2]
        scale = side / max(height, width)
        size = max(1, round(width * scale)) / self.width, max(1, round(height * scale)) / self.height
        axes = self.figure.add_axes((x / self.width, 1 - (y + side) / self.height, *size))
        axes.imshow(cell.pixels, extent=(0, width, height, 0), aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=cell.frame is not None, edgecolor=cell.frame, linewidth=1.2)
        for (left, top, *extent), color, line in zip(cell.windows, COLORS, ("-", (0, (4, 3))), strict=False):
            stroke = [withStroke(linewidth=2.6, foreground="white")]
            style: dict[str, Any] = {"edgecolor": color, "linestyle": line, "path_effects": stroke}
            axes.add_patch(Rectangle((left, top), *extent, fill=False, clip_on=False, linewidth=1.4, **style))
        if cell.heading:
            self._write(x, y - LINE - GAP // 2, cell.heading, color=cell.color, weight="bold")
        for number, text in enumerate(cell.text):
            self._write(x, y + side + GAP // 2 + LINE * number, text)

    def save(self, path: Path) -> None:
        """Writes a PNG file, whole or not at all."""
        save_png(self.figure, path, DPI)


def _in_rows(cells: list[Cell], columns: int) -> list[list[Cell]]:
    return [cells[start : start + columns] for start in range(0, len(cells), columns)]


def contact_sheet(config: Config, samples: DrawnSamples, backend: Backend, notes: list[str]) -> Page:
    """Original with crop windows, view 1 and view 2 of every image; two images per row if there are six or more."""
    views = [to_pixels(config, view).clip(0, 1) for view in make_views(config, backend, samples)]
    neutral, images, cells = neutral_jitter(config), 1 if len(samples.ids) < 6 else 2, []
    for i, encoded in enumerate(samples.encoded):
        original = decode(encoded).numpy()
        height, width = original.shape[:2]
        about = [f"id {samples.ids[i]}", f"{width} × {height} px", samples.classes[i], samples.files[i]]
        lines = [line for text in about for line in textwrap.wrap(text, CELL // LETTER)[:3]]
        windows = [(int(p.left[i]), int(p.top[i]), int(p.width[i]), int(p.height[i])) for p in samples.params]
        heading = "original, window of each view" * (i < images)
        cells.append(Cell(original, lines, heading, windows=windows))
        for params, pixels, color, name in zip(
            samples.params, views, COLORS, ("view 1 ━━━", "view 2 ╍╍╍"), strict=True
        ):
            rows = table(params, i, height, width, neutral)
            lines = [f"{name:9}{' '.join(f'{value:18}' for value in values)}" for name, values in rows]
            cells.append(Cell(pixels[i], lines, name * (i < images), color, frame=color))
    return Page("What the network sees", notes, _in_rows(cells, 3 * images))


def operation_strips(config: Config, samples: DrawnSamples, backend: Backend, notes: list[str]) -> Page:
    """Each operation alone on the first sample, with the lowest, middle and highest value that the views can draw."""
    height, width = decode(samples.encoded[0]).shape[:2]
    strips = operations(config, samples, height, width)
    flat = [params for _, strip in strips for _, params in strip]
    names = [field.name for field in fields(ViewParams)]
    joined = ViewParams(**{name: np.concatenate([getattr(p, name) for p in flat]) for name in names})
    many = replace(samples, places=samples.places[:1] * len(flat), encoded=samples.encoded[:1] * len(flat))
    views, _ = make_views(config, backend, many, (joined, joined))
    headed = [(name * (n == 0), label) for name, strip in strips for n, (label, _) in enumerate(strip)]
    cells = [
        Cell(pixels, [label], heading)
        for pixels, (heading, label) in zip(to_pixels(config, views).clip(0, 1), headed, strict=True)
    ]
    return Page(f"Each operation alone, on sample {samples.ids[0]}", notes, _in_rows(cells, 6))


def comparison(
    config: Config, samples: DrawnSamples, backend: Backend, name: str, notes: list[str]
) -> tuple[Page, list[str]]:
    """Both views of every image by the back end and by torch, and their difference.

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
    overall = f"all views: max {short(largest)}, mean {short(mean)}"
    legend = f"difference: |{name} − torch| × {factor:,}; black is equal; max and mean in levels of 255"
    cells: list[Cell] = []
    lines: list[str] = []
    for i, number in enumerate(samples.ids.tolist()):
        for view, color in enumerate(COLORS):
            difference = apart[view][i]
            numbers = f"max {short(difference.max())}", f"mean {short(difference.mean())}"
            shown = [
                (ours[view][i], [f"id {number}"], f"view {view + 1}: {name}"),
                (theirs[view][i], [], "torch"),
                (difference * factor / 255, numbers, f"difference × {factor:,}"),
            ]
            cells += [Cell(p.clip(0, 1), text, heading * (i == 0), color) for p, text, heading in shown]
            lines.append(f"id {number} view {view + 1}: {', '.join(numbers)}")
    page = Page(f"{name} and torch", [*notes, legend, overall], _in_rows(cells, 6), CELL // 2)
    return page, [f"|{name} - torch| in levels of 255", *lines, overall]


def short(value: float) -> str:
    """Two significant digits without an exponent."""
    return np.format_float_positional(float(value), precision=2, fractional=False, trim="-")
