"""Trains a list of the paper's ablations with one recipe, and draws the table beside the paper's figures.

    python tools/ablate.py --config configs/r18_cifar10.yaml --out runs/ablation [--only baseline tau_0 ...] \
        [--seeds 0 1 2] [section.key=value ...]

Each is a run of train.py with one or two settings changed, in OUT/NAME-SEED, and is continued where it was stopped:
start the same command again. Table and curves go to OUT/ablation.json, .md and .png; they show all finished runs in OUT
of the same recipe, those of earlier commands, too.
"""

import argparse
import difflib
import itertools
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from byolt.configs import schema
from byolt.files.rows import read_metrics, read_rows

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
PANELS = {
    "knn_top1": "kNN top-1 (%)",
    "loss": "BYOL loss",
    "projection_std": "spread of the target's projections",  # 0: all images are mapped to one point
}


class Ablation(NamedTuple):
    """Settings that differ from the recipe, and what they did in the paper."""

    overrides: tuple[str, ...]
    paper: float | None  # top-1 in per cent, ImageNet, ResNet-50, 300 epochs, linear evaluation
    source: str


def _views(*settings: str) -> tuple[str, ...]:
    return tuple(f"augment.{view}.{setting}" for view in ("view1", "view2") for setting in settings)


_NO_COLOR = ("jitter=0", "gray=0")
_NO_BLUR = ("blur=0", "solarize=0")
ABLATIONS = {
    "baseline": Ablation((), 72.5, "table 5a"),
    "tau_1": Ablation(("optimizer.base_tau=1",), 18.8, "table 5a, fixed random target"),
    "tau_0.999": Ablation(("optimizer.base_tau=0.999",), 69.8, "table 5a"),
    "tau_0.99": Ablation(("optimizer.base_tau=0.99",), 72.5, "table 5a"),
    "tau_0.9": Ablation(("optimizer.base_tau=0.9",), 68.4, "table 5a"),
    "tau_0": Ablation(("optimizer.base_tau=0", "optimizer.tau_schedule=constant"), 0.3, "table 5a"),
    "tau_0.999_constant": Ablation(
        ("optimizer.base_tau=0.999", "optimizer.tau_schedule=constant"), None, "not in the paper"
    ),
    "tau_0.99_constant": Ablation(
        ("optimizer.base_tau=0.99", "optimizer.tau_schedule=constant"), None, "not in the paper"
    ),
    "tau_0.9_constant": Ablation(
        ("optimizer.base_tau=0.9", "optimizer.tau_schedule=constant"), None, "not in the paper"
    ),
    "no_predictor": Ablation(("model.predictor=false",), 0.2, "table 19"),
    "no_flip": Ablation(_views("flip=0"), 71.9, "table 17"),
    "no_blur": Ablation(_views("blur=0"), 71.2, "table 17"),
    "no_gray": Ablation(_views("gray=0"), 70.3, "table 17"),
    "no_jitter": Ablation(_views("jitter=0"), 71.8, "table 17"),
    "no_color": Ablation(_views(*_NO_COLOR), 63.4, "table 17"),
    "crop_only": Ablation(_views("flip=0", *_NO_COLOR, *_NO_BLUR), 59.4, "table 17"),
    "crop_and_flip": Ablation(_views(*_NO_COLOR, *_NO_BLUR), 60.1, "table 17"),
    "crop_and_color": Ablation(_views("flip=0", *_NO_BLUR), 70.7, "table 17"),
    "crop_and_blur": Ablation(_views("flip=0", *_NO_COLOR, "solarize=0"), 61.1, "table 17"),
    # As in the paper gradients are averaged over as many batches as make the recipe's own (4096 there).
    **{
        f"batch_{size}": Ablation((f"batch={size}",), top1, "table 16")
        for size, top1 in ((2048, 72.4), (1024, 72.2), (512, 72.2), (256, 71.8), (128, 69.6), (64, 59.7))
    },
}


def overrides_of(name: str, batch_size: int) -> list[str]:
    """The settings of one ablation as train.py takes them.

    Args:
        name: a key of ABLATIONS.
        batch_size: the recipe's.

    Raises:
        ValueError: there is no such ablation, or its batch does not divide the recipe's into two or more.
    """
    if name not in ABLATIONS:
        near = difflib.get_close_matches(name, ABLATIONS, n=1)
        raise ValueError(
            f"--only {name}: "
            + (f"did you mean {near[0]}?" if near else f"not one of {', '.join(ABLATIONS)}")
        )
    overrides = []
    for override in ABLATIONS[name].overrides:
        key, _, value = override.partition("=")
        if key == "batch":
            parts, rest = divmod(batch_size, int(value))
            if rest or parts < 2:
                raise ValueError(f"{name}: the recipe's batch of {batch_size} is not several of {value}")
            override = f"train.accumulation={parts}"
        overrides.append(override)
    return overrides


def fitting(batch_size: int) -> list[str]:
    """The names of all ablations but those whose batch does not divide the recipe's into two or more."""
    names = []
    for name in ABLATIONS:
        try:
            overrides_of(name, batch_size)
        except ValueError:
            continue
        names.append(name)
    return names


def result_of(rows: list[dict[str, float]]) -> dict[str, float | None]:
    """What a run's rows of metrics say last: kNN top-1 in per cent, loss, spread of predictions and projections."""
    last: dict[str, float | None] = {
        "knn_top1": None,
        "loss": None,
        "prediction_std": None,
        "projection_std": None,
    }
    for row in rows:
        last |= {key: row[key] for key in last if key in row}
    return last


def table_of(results: dict[str, list[dict[str, float | None]]]) -> tuple[Table, str]:
    """The table for a terminal, and the same in Markdown.

    Args:
        results: what `result_of` gave of each seed, by ablation.
    """
    columns = (
        "ablation",
        "kNN top-1 %",
        "loss",
        "prediction std",
        "projection std",
        "paper top-1 %",
        "where",
    )
    table = Table(*columns)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, repeats in results.items():
        ablation = ABLATIONS[name]
        cells = [name]
        formats = zip(("knn_top1", "loss", "prediction_std", "projection_std"), (1, 3, 4, 4), strict=True)
        for key, digits in formats:
            cells.append(_mean([result[key] for result in repeats], digits))
        cells += ["-" if ablation.paper is None else f"{ablation.paper:.1f}", ablation.source]
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    return table, "\n".join(lines) + "\n"


def _mean(values: list[float | None], digits: int) -> str:
    """Mean over seeds and, of two or more, their standard deviation (n - 1)."""
    measured = [value for value in values if value is not None]
    if len(measured) < len(values):
        return "not measured"
    mean = f"{statistics.mean(measured):.{digits}f}"
    return mean if len(measured) == 1 else f"{mean} ± {statistics.stdev(measured):.{digits}f}"


def finished_runs(
    config: str, common: list[str], out: Path, batch_size: int
) -> tuple[dict[tuple[str, int], Path], list[str]]:
    """The ablations in OUT/NAME-SEED that ran to their end.

    Args:
        config: the recipe's file.
        common: its overrides for all runs.
        out: folder of all the runs; it need not be there.
        batch_size: the recipe's.

    Returns:
        Folders of those of the same recipe by name and seed, and names of the folders of others.
    """
    same: dict[tuple[str, int], Path] = {}
    others = []
    names = fitting(batch_size)
    for folder in sorted(out.glob("*-*")):
        name, _, seed = folder.name.rpartition("-")
        if name not in names or not re.fullmatch("[0-9]+", seed):
            continue
        if not (folder / "encoder.safetensors").is_file():  # what a run leaves last
            continue
        starts = read_rows(folder / "starts.jsonl")
        try:
            made = schema.from_settings(starts[-1].get("config") if starts else None)
            recipe = schema.load(config, [*common, *overrides_of(name, batch_size), f"run.seed={seed}"])
        except ValueError:
            others.append(folder.name)
            continue
        if made == recipe.model_copy(update={"run": recipe.run.model_copy(update={"out": made.run.out})}):
            same[name, int(seed)] = folder
        else:
            others.append(folder.name)
    return same, others


def train(arguments: list[str]) -> int:
    """Runs train.py to its end; returns its exit code.

    Raises:
        KeyboardInterrupt: Ctrl-C; train.py has saved and ended then.
    """
    process = subprocess.Popen([sys.executable, str(TRAIN), *arguments])
    try:
        return process.wait()
    except KeyboardInterrupt:
        # Usually the terminal has told it too. A second SIGINT would end it before it has saved; SIGTERM does not.
        process.terminate()
        process.wait()
        raise


def save_results(out: Path, curves: dict[str, list[list[dict[str, float]]]], asked: dict[str, Any]) -> None:
    """Prints the table; writes it and the curves to OUT/ablation.json, .md and .png.

    Args:
        out: the folder.
        curves: rows of metrics of each seed, by ablation.
        asked: what to keep beside the results in the JSON file.
    """
    from byolt.model.run.pictures import save_comparison  # imports torch and matplotlib, which take seconds

    save_comparison(out / "ablation.png", curves, PANELS)
    results = {name: [result_of(rows) for rows in repeats] for name, repeats in curves.items()}
    table, markdown = table_of(results)
    Console().print(table)
    (out / "ablation.md").write_text(markdown)
    (out / "ablation.json").write_text(json.dumps(asked | {"results": results}, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 a mistake in what was asked for, 130 Ctrl-C, else that of the run that failed."""
    parser = argparse.ArgumentParser(
        prog="ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="the recipe; see configs/")
    parser.add_argument("--out", type=Path, required=True, help="folder of all the runs")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(ABLATIONS)}; all that fit"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED", help="each ablation with each of them; the recipe's"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="of the recipe, for all runs"
    )
    args = parser.parse_intermixed_args(argv)
    common = [*args.overrides, *(word for word in args.only if "=" in word)]
    try:
        recipe = schema.load(args.config, common)
        names = [word for word in args.only if "=" not in word] or fitting(recipe.train.batch_size)
        seeds = args.seeds or [recipe.run.seed]
        runs = {}
        for name, seed in itertools.product(dict.fromkeys(names), dict.fromkeys(seeds)):
            out = args.out / f"{name}-{seed}"
            overrides = [*overrides_of(name, recipe.train.batch_size), f"run.seed={seed}", f"run.out={out}"]
            schema.load(args.config, [*common, *overrides])
            runs[name, seed] = (out, overrides)
    except (ValueError, OSError) as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 2
    try:
        finished, _ = finished_runs(args.config, common, args.out, recipe.train.batch_size)
        for (name, seed), (_, overrides) in runs.items():
            if (name, seed) in finished:
                continue
            print(f"── {name}, seed {seed}: {' '.join(overrides)}", flush=True)
            code = train(["--config", args.config, "--resume", "auto", *common, *overrides])
            if code:
                print(f"ablate: {name} ended with code {code}; the same command continues", file=sys.stderr)
                return code
        same, others = finished_runs(args.config, common, args.out, recipe.train.batch_size)
        same |= {key: out for key, (out, _) in runs.items()}
        curves: dict[str, list[list[dict[str, float]]]] = {}
        seeds_of: dict[str, list[int]] = {}
        for name, seed in sorted(same, key=lambda key: (list(ABLATIONS).index(key[0]), key[1])):
            curves.setdefault(name, []).append(read_metrics(same[name, seed] / "metrics.jsonl"))
            seeds_of.setdefault(name, []).append(seed)
        save_results(args.out, curves, {"config": args.config, "overrides": common, "seeds": seeds_of})
        if left_out := sorted(set(others) - {out.name for out, _ in runs.values()}):
            print(f"not in the table, for they were made with other settings: {', '.join(left_out)}")
    except KeyboardInterrupt:
        print("ablate: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
