"""Draws bar charts: the costs of `tools/bench.py` and the figures of `tools/gpu_report.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from byolt.model.run.pictures import save_png
from byolt.tools.benchmarks.stages import STAGES, Cost, rate
from byolt.tools.reporting.figures import MARKS, STYLE


def save_picture(
    path: Path,
    title: str,
    costs: Mapping[str, Cost],
    stalled: float,
    comparisons: Mapping[str, Mapping[str, float]],
    on_gpu: bool,
) -> None:
    """Draws the costs of STAGES, "loader", "step" and "both" as bars, one panel below another, into a PNG file.

    Args:
        stalled: result of `together.stall`.
        comparisons: by heading, the CPU ms per image of pipelines by name, ours first.
        on_gpu: shows the elapsed time of stages instead of their CPU time.
    """
    stages = {name: costs[name].wall_ms if on_gpu else costs[name].cpu_ms for name in (*STAGES, "loader")}
    together = {name: costs[name].wall_ms for name in ("loader", "step", "both")}
    panels: list[tuple[str, Mapping[str, float], list[str]]] = [
        (
            f"Each stage alone, and the whole loader: {'elapsed' if on_gpu else 'CPU'} ms per image",
            stages,
            [f"{round(value, 2) + 0.0:.2f}" for value in stages.values()],  # + 0.0: no -0.00
        ),
        (
            f"Alone and together, stall {100 * stalled:.1f} %: elapsed ms per image",
            together,
            [f"{value:.2f}   {rate(1000 / value)} images/s" for value in together.values()],
        ),
    ]
    for heading, compared in comparisons.items():
        ours, *_ = compared.values()
        labels = [f"{value:.2f}   {value / ours:.1f} x" for value in compared.values()]
        panels.append((f"{heading}: CPU ms per image", compared, labels))
    save_bars(path, title, panels)


def save_bars(path: Path, title: str, panels: Sequence[tuple[str, Mapping[str, float], list[str]]]) -> None:
    """Draws horizontal bars; each panel is a heading, the values by name, and their labels."""
    heights = [len(values) for _, values, _ in panels]
    with rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(8, 0.32 * sum(heights) + 0.75 * len(panels) + 0.5))
        figure.suptitle(title, fontsize=10)
        axes: Any = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axis, (heading, values, labels) in zip(axes, panels, strict=True):
            bars = axis.barh(list(values), list(values.values()), color=MARKS[0].color, height=0.7)
            axis.bar_label(bars, labels, padding=4, fontsize=8)
            axis.margins(x=0.25)  # for the labels
            axis.set_title(heading, loc="left", fontsize=9)
            axis.invert_yaxis()
        save_png(figure, path)
