"""The picture of a benchmark: where an image's time goes, what the parts reach together, and how others compare."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from byolt.tools.benchmarks.stages import STAGES, Cost, rate

BLUE, GREY, ORANGE = "#3b6ea8", "#9aa5b1", "#d98032"
_BAR = 0.32  # inches a row takes


def save_picture(
    path: Path,
    title: str,
    costs: dict[str, Cost],
    stalled: float,
    comparisons: dict[str, dict[str, float]],
    on_gpu: bool,
) -> None:
    """Writes a PNG.

    Args:
        path: the file.
        title: what was measured, on what.
        costs: of STAGES, "loader", "step" and "both".
        stalled: as `bench_together.stall` gives it.
        comparisons: by title, CPU ms an image of pipelines by name, of which the first is ours, all of one run.
        on_gpu: stages are shown in elapsed ms an image, else in CPU ms.
    """
    spent = {name: costs[name].wall_ms if on_gpu else costs[name].cpu_ms for name in (*STAGES, "loader")}
    together = {name: costs[name].wall_ms for name in ("loader", "step", "both")}
    rows = [len(spent), len(together), *map(len, comparisons.values())]
    figure = Figure(figsize=(8, _BAR * sum(rows) + 0.75 * len(rows) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes: Any = figure.subplots(len(rows), 1, height_ratios=rows, squeeze=False)[:, 0]

    starts, at = [], 0.0
    for name in STAGES:  # a staircase: each stage begins where the one before it ended
        starts.append(at)
        at += spent[name]
    unit = "ms an image" if on_gpu else "CPU ms an image"
    labels = [f"{round(value, 2) + 0.0:.2f}" for value in spent.values()]  # + 0.0: no -0.00
    _bars(axes[0], spent, labels, [BLUE] * len(STAGES) + [ORANGE], [*starts, 0.0])
    axes[0].set_title(f"Stages alone, and the whole loader: {unit}", **_LEFT)

    labels = [f"{value:.2f}   {rate(1000 / value)} images/s" for value in together.values()]
    _bars(axes[1], together, labels, [ORANGE, GREY, BLUE])
    axes[1].set_title(f"Alone and together, stall {100 * stalled:.1f} %: elapsed ms an image", **_LEFT)

    for axis, (heading, compared) in zip(axes[2:], comparisons.items(), strict=True):
        ours, *_ = compared.values()
        labels = [f"{value:.2f}   {value / ours:.1f} x" for value in compared.values()]
        _bars(axis, compared, labels, [ORANGE] + [GREY] * (len(compared) - 1))
        axis.set_title(f"{heading}: CPU ms an image", **_LEFT)
    figure.savefig(path, dpi=130)


_LEFT: dict[str, Any] = {"loc": "left", "fontsize": 9}


def _bars(
    axes: Axes,
    values: dict[str, float],
    labels: list[str],
    colors: list[str],
    starts: list[float] | None = None,
) -> None:
    """Horizontal bars from top to bottom, each with its label at its end."""
    left = starts or [0.0] * len(values)
    bars = axes.barh(list(values), list(values.values()), left=left, color=colors, height=0.7)
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.invert_yaxis()
    longest = max(start + value for start, value in zip(left, values.values(), strict=True))
    axes.set_xlim(0, 1.25 * longest)  # room for the labels
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
