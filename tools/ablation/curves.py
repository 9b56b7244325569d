"""The curves of several runs as a PNG file."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from byolt.tools.ablation.results import Rows
from byolt.tools.reporting.figures import MARKS, STYLE, save_png


def save_curves(path: Path, runs: Mapping[str, list[Rows]], panels: Mapping[str, str]) -> None:
    """Draws curves over the steps: one panel per number, one color and marker per ablation, one line per seed.

    Args:
        path: PNG file.
        runs: rows of metrics of each seed, by ablation.
        panels: labels of the vertical axes, by the keys in the rows.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(panels), 4))
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        figure.suptitle("One color and marker per ablation, one line per seed")
        for axis, (key, label) in zip(axes, panels.items(), strict=True):
            for (name, seeds), mark in zip(runs.items(), cycle(MARKS)):
                for number, rows in enumerate(seeds):
                    points = [(row["step"], row[key]) for row in rows if key in row]
                    steps, values = zip(*points, strict=True) if points else ((), ())
                    every = max(1, len(points) // 10)
                    legend = name if number == 0 else None
                    axis.plot(
                        steps, values, color=mark.color, marker=mark.marker, markevery=every, label=legend
                    )
            axis.set_xlabel("step")
            axis.set_ylabel(label)
        axes[0].legend()
        save_png(figure, path)
