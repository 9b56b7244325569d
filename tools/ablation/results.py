"""Finds finished ablation runs; makes their table and their curves."""

import json
import re
import statistics
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

from rich.table import Table

from byolt.configs import schema
from byolt.files.console import say_table
from byolt.files.rows import read_rows
from byolt.tools.ablation.recipes import ABLATIONS, Ablation, Request, fitting

Rows = list[dict[str, float]]  # of a metrics.jsonl
_COLUMNS = {"knn_top1": ("kNN top-1 %", 1), "loss": ("loss", 3),
            "prediction_std": ("prediction std", 4), "projection_std": ("projection std", 4)}  # fmt: skip
_STYLES = ("-", "--", ":", "-.")  # of the lines of several seeds
_PANELS = {
    "knn_top1": "kNN top-1 (%)",
    "loss": "BYOL loss",
    "projection_std": "spread of the target's projections",  # 0: all images are mapped to one point
}


def finished_runs(request: Request) -> tuple[dict[tuple[str, int], Path], list[str]]:
    """The ablation runs in OUT/NAME-SEED that reached their end.

    Returns:
        Folders of the runs of this recipe by name and seed, and names of the folders of runs of other settings.
    """
    same: dict[tuple[str, int], Path] = {}
    others = []
    names = fitting(request.batch_size, request.ablations)
    for folder in sorted(request.out.glob("*-*")):
        name, _, seed = folder.name.rpartition("-")
        if name not in names or not re.fullmatch("[0-9]+", seed):
            continue
        if not (folder / "encoder.safetensors").is_file():  # train.py writes it last
            continue
        starts = read_rows(folder / "starts.jsonl")
        try:
            made = schema.from_settings(starts[-1].get("config") if starts else None)
            recipe = schema.load(request.config, request.settings(name, int(seed)))
        except ValueError:
            others.append(folder.name)
            continue
        # These do not change a run's numbers.
        run = recipe.run.model_copy(update={"out": made.run.out})
        data = recipe.data.model_copy(update={"threads": made.data.threads})
        if made == recipe.model_copy(update={"run": run, "data": data}):
            same[name, int(seed)] = folder
        else:
            others.append(folder.name)
    return same, others


def last_values(rows: Rows) -> dict[str, float | None]:
    """The last value of each number of the table in a run's rows of metrics; None if it was never measured."""
    last: dict[str, float | None] = dict.fromkeys(_COLUMNS)
    for row in rows:
        last |= {key: row[key] for key in last if key in row}
    return last


def table_of(
    results: Mapping[str, list[dict[str, float | None]]], ablations: Mapping[str, Ablation] = ABLATIONS
) -> tuple[Table, str]:
    """The table for a terminal, and the same in Markdown, from the `last_values` of each seed, by ablation.

    The terminal's has no settings, which are wide and were printed above each run.
    """
    of_paper = any(ablation.source for ablation in ablations.values())
    columns = ["ablation", *(name for name, _ in _COLUMNS.values())]
    columns += ["paper top-1 %", "source"] if of_paper else ["settings"]
    table = Table(*(name for name in columns if name != "settings"))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, seeds in results.items():
        ablation = ablations[name]
        cells = [name, *(_mean([seed[key] for seed in seeds], d) for key, (_, d) in _COLUMNS.items())]
        if of_paper:
            cells += ["-" if ablation.paper is None else f"{ablation.paper:.1f}", ablation.source]
        else:
            cells.append(", ".join(ablation.overrides) or "the recipe's")
        table.add_row(*cells[: len(table.columns)])
        lines.append("| " + " | ".join(cells) + " |")
    return table, "\n".join(lines) + "\n"


def _mean(values: list[float | None], digits: int) -> str:
    """Mean over seeds; of two or more also their standard deviation (n - 1)."""
    measured = [value for value in values if value is not None]
    if len(measured) < len(values):
        return "not measured"
    mean = f"{statistics.mean(measured):.{digits}f}"
    return mean if len(measured) == 1 else f"{mean} ± {statistics.stdev(measured):.{digits}f}"


def save_results(request: Request, seeds: dict[str, list[int]], curves: Mapping[str, list[Rows]]) -> None:
    """Writes the table, the request and the curves to OUT/ablation.json, .md and .png; prints the table.

    `curves` are rows of metrics of each of the `seeds`, by ablation.
    """
    save_curves(request.out / "ablation.png", curves, _PANELS)
    results = {name: [last_values(rows) for rows in runs] for name, runs in curves.items()}
    table, markdown = table_of(results, request.ablations)
    (request.out / "ablation.md").write_text(markdown)
    document = {"config": request.config, "overrides": request.common, "seeds": seeds, "results": results}
    (request.out / "ablation.json").write_text(json.dumps(document, indent=2) + "\n")
    say_table(table)


def _epochs_per_step(rows: Rows) -> float | None:
    return next((row["epoch"] / row["step"] for row in rows if row.get("step") and "epoch" in row), None)


def save_curves(
    path: Path,
    runs: Mapping[str, list[Rows]],
    panels: Mapping[str, str],
    title: str = "One color and marker per ablation; its seeds: solid, dashed, dotted, dash-dotted",
) -> None:
    """Draws curves over the epochs: one panel per number, one color and marker per ablation, one line style per seed.

    Where the rows of a run have no epoch, the axis is the step. `runs` are rows of metrics of each seed, by ablation;
    `panels` are labels of vertical axes, by keys of the rows.
    """
    # Imported here: a finished ablation is read, and a mistake refused, without matplotlib and torch.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from byolt.model.run.pictures import save_png
    from byolt.tools.reporting.figures import MARKS, STYLE

    scales = [[_epochs_per_step(rows) for rows in seeds] for seeds in runs.values()]
    in_epochs = all(scale for seeds in scales for scale in seeds)
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(panels), 4))
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        figure.suptitle(title)
        for axis, (key, label) in zip(axes, panels.items(), strict=True):
            for (name, seeds), mark, units in zip(runs.items(), cycle(MARKS), scales):
                for number, (rows, scale, style) in enumerate(
                    zip(seeds, units, cycle(_STYLES), strict=False)
                ):
                    unit = scale if in_epochs and scale else 1
                    points = [(row["step"] * unit, row[key]) for row in rows if key in row]
                    steps, values = zip(*points, strict=True) if points else ((), ())
                    every = max(1, len(points) // 10)
                    legend = name if number == 0 else None
                    look = {"color": mark.color, "marker": mark.marker, "linestyle": style}
                    axis.plot(steps, values, markevery=every, label=legend, **look)
            axis.set_xlabel("epoch" if in_epochs else "step")
            axis.set_ylabel(label)
        axes[0].legend()
        save_png(figure, path)
