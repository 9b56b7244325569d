"""What a measurement of tools/evaluate.py gives: a table on the screen, a JSON file and a picture of the confusions."""

import argparse
import json
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model import evaluate, metrics
from model.checkpoint import replacing
from model.trained import Trained
from tools.frozen import Bench
from tools.protocols import Outcome


def summary(outcome: Outcome, labels: Tensor, classes: int) -> dict[str, Any]:
    """Accuracies in per cent with their 95 % intervals, and the settings."""
    row: dict[str, Any] = {"name": outcome.name, "images": len(labels)}
    for k in (1, 5):
        if k < classes:  # among five of five classes the true one always is
            right = int(evaluate.topk_correct(outcome.scores, labels, k).sum())
            low, high = evaluate.wilson_interval(right, len(labels))
            row |= {f"top{k}": 100 * right / len(labels), f"top{k}_interval": [100 * low, 100 * high]}
    return row | {"settings": outcome.settings}


def report(
    args: argparse.Namespace,
    trained: Trained,
    bench: Bench,
    outcomes: list[Outcome],
    labels: Tensor,
    seconds: float,
) -> None:
    """The table, the JSON file and the picture."""
    rows = [summary(outcome, labels, bench.classes) for outcome in outcomes]
    model = trained.config.model
    state = "untrained" if args.untrained else f"step {trained.step}"
    title = f"{args.protocol}: {model.backbone} ({model.stem} stem), {state}"
    table = Table(
        "", "top-1 %", "95 % interval", "top-5 %", "95 % interval", title=title, title_justify="left"
    )
    for row in rows:
        cells = [
            cell
            for k in (1, 5)
            for cell in (
                (f"{row[f'top{k}']:.2f}", "{:.2f} - {:.2f}".format(*row[f"top{k}_interval"]))
                if f"top{k}" in row
                else ("-", "-")
            )
        ]
        table.add_row(row["name"], *cells)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    settings = {
        key: value
        for key, value in outcomes[0].settings.items()
        if not isinstance(value, dict | list) and all(value == other.settings[key] for other in outcomes)
    }
    console.print(", ".join(f"{key} {value}" for key, value in settings.items()), markup=False)
    console.print(
        f"{len(labels)} test images of {bench.classes} classes; {len(bench.train)} training images; "
        f"{seconds:.0f} s on {bench.world.size} x {bench.world.device.type}, {args.precision}"
    )
    protocol = args.protocol + "-fast" * bool(args.fast)
    name = f"evaluate-{protocol}"
    if args.protocol == "finetune":
        name += f"-{args.subset.stem if args.subset else format(args.labels, 'g')}"
    if args.untrained:
        name += "-untrained"
    out = args.out or trained.path.parent
    document = {
        "protocol": protocol,
        "checkpoint": trained.path.name,
        "untrained": args.untrained,
        "encoder_sha256": trained.digest or None,
        "step": trained.step,
        "results": rows,
        "test": {"path": args.data, "fingerprint": bench.test.fingerprint, "images": len(bench.test)},
        "train": {"path": args.train, "fingerprint": bench.train.fingerprint, "images": len(bench.train)},
        "classes": bench.classes,
        "seed": args.seed,
        "machine": {
            "ranks": bench.world.size, "device": bench.world.device.type, "precision": args.precision,
            "torch": torch.__version__, "seconds": round(seconds, 1),
        },
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")
    predicted = outcomes[0].scores.argmax(dim=1)
    counts = evaluate.confusion_matrix(predicted, labels, bench.classes)
    names = list(bench.test.classes or bench.train.classes or [])
    names += [str(label) for label in range(len(names), bench.classes)]
    caption = f"{title}, {rows[0]['name']}: top-1 {rows[0]['top1']:.1f} %" if "top1" in rows[0] else title
    picture = out / f"{name}.png"
    try:
        metrics.save_confusion(picture, counts, names, caption)
    except Exception as error:  # the numbers are written; what a library cannot draw ends nothing
        picture.unlink(missing_ok=True)  # an earlier one is of other numbers
        print(f"warning: {picture} cannot be drawn: {error}", file=sys.stderr)
    console.print(f"{out / name}.json, {name}.png", markup=False, soft_wrap=True)
