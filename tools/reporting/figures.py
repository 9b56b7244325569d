"""The report's drawings: matplotlib figures as inline SVG whose inks follow the page's theme.

Text stays text, so a phone scales it; names of classes never enter a drawing (the page's legend holds them), for
matplotlib would read a $ in them as mathematics.
"""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Drawn in these colours, then written as the page's variables of the same names.
_INKS = {
    "#010101": "var(--ink)",
    "#020202": "var(--rule)",
    "#030303": "var(--accent)",
    "#040404": "var(--second)",
}
INK, RULE, ACCENT, SECOND = _INKS
_LINE_COLORS = (ACCENT, SECOND, "#2ca02c", "#9467bd")
LINE_INKS = tuple(_INKS.get(color, color) for color in _LINE_COLORS)  # as a legend of the page names them
# Ten hues that stay apart on white and on near-black (matplotlib's tab10).
CLASS_COLORS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)
OTHER_COLOR = "#999999"
_RASTER_ABOVE = 4000  # points; one is about 100 bytes of SVG
_STYLE: Any = {  # its type in matplotlib's stubs is a literal of every key
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.alpha": 0.5,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}


class Line(NamedTuple):
    """One curve: (step, value) pairs, and whether they are few and drawn as points too."""

    points: Sequence[tuple[float, float]]
    markers: bool = False


def curves(title: str, lines: Sequence[Line], last: int, unit: str, hint: float | None = None) -> str:
    """Curves over the steps, in the order of LINE_INKS.

    Args:
        title: for readers who cannot see it.
        lines: at least one, each with at least one point.
        last: step at which the axis ends, so that all curves of a page have the same.
        unit: label of the vertical axis.
        hint: value of a dashed horizontal line, if any.
    """
    with rc_context(_STYLE):
        figure, axis = _figure(height=2.1, width=3.6)
        for line, color in zip(lines, cycle(_LINE_COLORS), strict=False):
            steps, values = zip(*line.points, strict=True)
            marker = "o" if line.markers or len(steps) == 1 else None
            axis.plot(steps, values, color=color, marker=marker, markersize=3.5)
        if hint is not None:
            axis.axhline(hint, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.set_xlim(-0.02 * last, 1.02 * last)
        axis.set_xlabel("step")
        axis.set_ylabel(unit)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.yaxis.get_major_formatter().set_useOffset(False)
        return _svg(figure, title)


def spectrum(title: str, eigenvalues: np.ndarray, rank: float) -> str:
    """Eigenvalues as shares of their sum, on a log scale, with the effective rank as a dashed line.

    Args:
        title: for readers who cannot see it.
        eigenvalues: (D,) largest first, >= 0, the first > 0.
        rank: effective rank.
    """
    shares = eigenvalues / eigenvalues.sum()
    shares = np.where(shares > 0, shares, np.nan)
    with rc_context(_STYLE):
        figure, axis = _figure(height=3.6)
        axis.semilogy(np.arange(1, len(shares) + 1), shares, color=ACCENT)
        axis.axvline(rank, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.annotate(
            f"effective rank {rank:.1f}",
            (rank, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0) if rank < 0.6 * len(shares) else (-5, 0),
            textcoords="offset points",
            ha="left" if rank < 0.6 * len(shares) else "right",
            va="top",
            color=INK,
        )
        axis.set_xlabel("eigenvalue, largest first")
        axis.set_ylabel("share of the variance")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return _svg(figure, title)


def scatter(
    title: str, points: np.ndarray, colors: Sequence[str], labels: tuple[str, str] | None = None
) -> str:
    """A map of points.

    Args:
        title: for readers who cannot see it.
        points: (N, 2).
        colors: N matplotlib colours.
        labels: of the two axes; None where their numbers mean nothing.
    """
    with rc_context(_STYLE):
        figure, axis = _figure(height=3.9)
        rasterized = len(points) > _RASTER_ABOVE
        order = np.random.default_rng(0).permutation(len(points))  # no class is drawn over the others
        shuffled = [colors[i] for i in order]
        axis.scatter(*points[order].T, c=shuffled, s=9, alpha=0.75, linewidths=0, rasterized=rasterized)
        if labels:
            axis.set_xlabel(labels[0])
            axis.set_ylabel(labels[1])
        else:
            axis.tick_params(length=0, labelbottom=False, labelleft=False)
        axis.set_aspect("equal", adjustable="datalim")
        return _svg(figure, title)


def colors_of(labels: np.ndarray) -> tuple[list[str], Mapping[int, str]]:
    """A colour for each sample, and the colour of each class that has one of its own.

    The ten most frequent classes have; the others share a grey. All samples have the accent without labels.

    Args:
        labels: (N,) int64, -1 where unknown.
    """
    known = labels[labels >= 0]
    if not len(known):
        return [ACCENT] * len(labels), {}
    classes, counts = np.unique(known, return_counts=True)
    frequent = np.sort(classes[np.argsort(-counts, kind="stable")][: len(CLASS_COLORS)])
    chosen = {int(label): color for label, color in zip(frequent, CLASS_COLORS, strict=False)}
    return [chosen.get(int(label), OTHER_COLOR) for label in labels], chosen


def _figure(height: float, width: float = 4.6) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height))
    figure.patch.set_alpha(0)
    axis = figure.add_subplot()
    axis.patch.set_alpha(0)
    return figure, axis


def _svg(figure: Figure, title: str) -> str:
    """The figure as an svg element without prolog, metadata, fixed size or fixed inks."""
    text = io.StringIO()
    with rc_context({"svg.hashsalt": title}):  # ids differ between the drawings of one page
        figure.savefig(text, format="svg")
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every drawing, and nothing refers to them
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view  # matplotlib always writes it
    svg = f'<svg {view[0]} role="img" aria-label="{escape(title)}">' + svg[svg.index(">") + 1 :]
    svg = svg.replace("xlink:href", "href")
    for color, variable in _INKS.items():
        svg = svg.replace(color, variable)
    return svg
