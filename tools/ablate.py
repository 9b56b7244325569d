"""Trains a list of the paper's ablations with one recipe, and draws the table beside the paper's figures.

    python tools/ablate.py --config configs/r18_cifar10.yaml --out runs/ablation [--only baseline tau_0 ...] \
        [section.key=value ...]

Each is a run of train.py with one or two settings changed, in OUT/NAME, and is continued where it was stopped: start
the same command again. The table goes to OUT/ablation.json and OUT/ablation.md too.
"""

import argparse
import difflib
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from configs import schema
from model.metrics import read_rows

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


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


def result_of(out: Path) -> dict[str, float | None]:
    """What a finished run's metrics.jsonl says last: kNN top-1 in per cent, loss, spread of the predictions."""
    last: dict[str, float | None] = {
        "knn_top1": None,
        "loss": None,
        "prediction_std": None,
        "projection_std": None,
    }
    for row in read_rows(out / "metrics.jsonl"):
        last |= {key: row[key] for key in last if key in row}
    return last


def table_of(results: dict[str, dict[str, float | None]]) -> tuple[Table, str]:
    """The table for a terminal, and the same in Markdown."""
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
    for name, result in results.items():
        ablation = ABLATIONS[name]
        cells = [name]
        formats = zip(("knn_top1", "loss", "prediction_std", "projection_std"), (1, 3, 4, 4), strict=True)
        for key, digits in formats:
            value = result[key]
            cells.append("not measured" if value is None else f"{value:.{digits}f}")
        cells += ["-" if ablation.paper is None else f"{ablation.paper:.1f}", ablation.source]
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    return table, "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 a mistake in what was asked for, else that of the run that failed."""
    parser = argparse.ArgumentParser(prog="ablate", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", required=True, help="the recipe; see configs/")
    parser.add_argument("--out", type=Path, required=True, help="folder of all the runs")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(ABLATIONS)}; all that fit"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="of the recipe, for all runs"
    )
    args = parser.parse_intermixed_args(argv)
    common = [*args.overrides, *(word for word in args.only if "=" in word)]
    try:
        batch_size = schema.load(args.config, common).train.batch_size
        names = [word for word in args.only if "=" not in word] or fitting(batch_size)
        runs = {name: overrides_of(name, batch_size) for name in names}
        for overrides in runs.values():
            schema.load(args.config, [*common, *overrides])
    except (ValueError, OSError) as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 2
    for name, overrides in runs.items():
        out = args.out / name
        command = [sys.executable, str(TRAIN), "--config", args.config, "--resume", "auto"]
        print(f"── {name}: {' '.join(overrides) or 'the recipe as it is'}", flush=True)
        code = subprocess.run([*command, *common, *overrides, f"run.out={out}"]).returncode
        if code:
            print(f"ablate: {name} ended with code {code}; the same command continues", file=sys.stderr)
            return code
    results = {name: result_of(args.out / name) for name in runs}
    table, markdown = table_of(results)
    Console().print(table)
    (args.out / "ablation.md").write_text(markdown)
    report = {"config": args.config, "overrides": common, "results": results}
    (args.out / "ablation.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
