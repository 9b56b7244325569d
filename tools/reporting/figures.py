"""Draws the figures of reports as PNG; defines the colors and markers that all pictures of the tools share.

A figure has a white background, so it is readable on a light and on a dark page. Classes differ by marker and by color.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


class Mark(NamedTuple):
    """Color and marker of a class or a curve."""

    color: str
    marker: str  # as matplotlib names it
    glyph: str  # the same shape as a character


# Petroff's ten colors, made to differ under all color-vision deficiencies (arXiv 2107.02270, table 1).
_COLORS = ["3f90da", "ffa90e", "bd1f01", "94a4a2", "832db6", "a96b59", "e76300", "b9ac70", "717581", "92dadd"]
MARKS = tuple(Mark(f"#{color}", *shape) for color, shape in zip(
    _COLORS, ("o●", "s■", "^▲", "D◆", "v▼", "P✚", "X✖", "*★", "<◀", ">▶"), strict=True))  # fmt: skip
OTHERS = Mark("#b0b0b0", ".", "•")  # classes without a color of their own
STYLE: Any = {  # in matplotlib's stubs its type is a literal of every key
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "lines.markersize": 3.5,
    "figure.constrained_layout.use": True,
}


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    last: int,
    unit: str,
    hint: tuple[float, str] | None = None,
    marks: Sequence[Mark] = MARKS,
) -> bytes:
    """Curves over the steps.

    Args:
        series: at least one (step, value) pair of each curve, by the name of the curve.
        last: step at which the axis ends; the same for all figures of a page.
        unit: label of the vertical axis.
        hint: value and name of a dashed horizontal line.
        marks: of the curves, in their order.
    """
    with rc_context(STYLE | {"text.parse_math": False}):  # a run's name may contain a $
        figure, axis = _figure(3.6, 2.2)
        for (name, points), mark in zip(series.items(), marks, strict=False):
            marked = len(series) > 1 or len(points) <= 20
            axis.plot(
                *zip(*points, strict=True),
                color=mark.color,
                marker=mark.marker if marked else None,
                markevery=max(1, len(points) // 10),
                label=drawable(name),
            )
        if hint:
            axis.axhline(hint[0], color="black", linewidth=0.9, linestyle="--", label=hint[1])
        axis.legend()
        axis.set_xlim(-0.02 * last, 1.02 * last)
        axis.set_xlabel("step")
        axis.set_ylabel(unit)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.yaxis.get_major_formatter().set_useOffset(False)
        return _png(figure)


def spectrum(eigenvalues: np.ndarray, rank: float) -> bytes:
    """Eigenvalues (D,), largest first, >= 0, as shares of their positive sum on a log scale, and the effective rank."""
    shares = eigenvalues / eigenvalues.sum()
    with rc_context(STYLE):
        figure, axis = _figure(4.6, 3.7)
        axis.semilogy(np.arange(1, len(shares) + 1), np.where(shares > 0, shares, np.nan), color=MARKS[0].color,
                      label="share of each eigenvalue")  # fmt: skip
        axis.axvline(rank, color="black", linewidth=0.9, linestyle="--", label=f"effective rank {rank:.1f}")
        axis.legend()
        axis.set_xlabel("eigenvalue, largest first")
        axis.set_ylabel("share of the variance")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return _png(figure)


def scatter(points: np.ndarray, marks: Sequence[Mark], labels: Sequence[str] | None = None) -> bytes:
    """A map of points (N, 2) with N marks; without labels of the two axes, it has no numbers on them."""
    with rc_context(STYLE):
        figure, axis = _figure(4.6, 4.0)
        order = np.random.default_rng(0).permutation(len(points))
        for part in np.array_split(order, 10):  # in turns, so that no class covers the others
            for mark in set(marks):
                chosen = [i for i in part if marks[i] == mark]
                axis.scatter(
                    *points[chosen].T, c=mark.color, marker=mark.marker, s=14, alpha=0.75, linewidths=0
                )
        if labels:
            axis.set_xlabel(labels[0])
            axis.set_ylabel(labels[1])
        else:
            axis.tick_params(length=0, labelbottom=False, labelleft=False)
        axis.set_aspect("equal", adjustable="datalim")
        return _png(figure)


def marks_of_classes(labels: np.ndarray) -> dict[int, Mark]:
    """A mark of its own for each of the ten most frequent classes; unknown labels are -1."""
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    frequent = np.sort(classes[np.argsort(-counts, kind="stable")][: len(MARKS)])
    return dict(zip(frequent.tolist(), MARKS, strict=False))


def drawable(text: str) -> str:
    """The text without what a font cannot draw: names of folders need not be UTF-8."""
    return text.encode(errors="replace").decode()


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=180)
    return file.getvalue()
