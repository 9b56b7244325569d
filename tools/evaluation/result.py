"""What a measurement of tools/evaluate.py gives: a table on the screen, a JSON file and a picture of the confusions."""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from byolt.files.atomic import replacing
from byolt.model.quality import scores
from byolt.model.run import log as metrics
from byolt.model.run.trained import Trained
from byolt.pipelines.sources import Source
from byolt.tools.evaluation.frozen import Bench
from byolt.tools.evaluation.protocols import Outcome


def summary(outcome: Outcome, labels: Tensor, classes: int) -> dict[str, Any]:
    """Accuracies in per cent, top-1 and top-5 with their 95 % intervals, and the settings."""
    row: dict[str, Any] = {"name": outcome.name, "images": len(labels)}
    for k in (1, 5):
        if k < classes:  # among five of five classes the true one always is
            right = int(scores.topk_correct(outcome.scores, labels, k).sum())
            low, high = scores.wilson_interval(right, len(labels))
            row |= {f"top{k}": 100 * right / len(labels), f"top{k}_interval": [100 * low, 100 * high]}
    if classes > 1:
        row["mean_per_class"] = 100 * scores.mean_per_class(confusions(outcome, labels, classes))
    return row | {"settings": outcome.settings}


def folder(args: argparse.Namespace, trained: Trained) -> Path:
    """Where the files go."""
    return args.out or trained.path.parent


def check_writable(path: Path) -> None:
    """Makes the folder and a file in it, before hours of work.

    Raises:
        ValueError: it cannot be.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"nothing can be written to {path} ({error.strerror}): give another folder by --out"
        ) from None


def file_name(args: argparse.Namespace, trained: Trained) -> str:
    """Of JSON and picture, without ending; it tells apart what else would overwrite one another.

    evaluate-PROTOCOL-STEP, and what is not as the run has it: data sets, --max-images, --seed.
    """
    config = trained.config
    parts = ["evaluate", args.protocol + "-fast" * bool(args.fast)]
    if args.protocol == "finetune":
        parts.append(args.subset.stem if args.subset else format(args.labels, "g"))
    parts.append("untrained" if args.untrained else f"step{trained.step}")
    if args.data != config.eval.path:
        parts.append(_short(args.data))
    if args.train != config.data.path:
        parts.append("from-" + _short(args.train))
    if args.max_images:
        parts.append(f"max{args.max_images}")
    if args.seed:
        parts.append(f"seed{args.seed}")
    return "-".join(parts)


def _short(path: str) -> str:
    """A data set's name: the last two parts of its path, 'val' alone says little."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(Path(path).parts[-2:])).strip("-.")[-40:]


def describe(path: str, source: Source, used: int) -> dict[str, Any]:
    """A data set, and how many of its images were used: the others do not decode, or were not chosen."""
    return {"path": path, "fingerprint": source.fingerprint, "images": used, "of": len(source)}


def confusions(outcome: Outcome, labels: Tensor, classes: int) -> Tensor:
    """How many images of each class (row) were taken for each class (column): (C, C) int64."""
    return scores.confusion_matrix(outcome.scores.argmax(dim=1), labels, classes)


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
    columns = ("", "top-1 %", "95 % interval", "mean per class %", "top-5 %", "95 % interval")
    table = Table(*columns, title=title, title_justify="left")
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
        mean = f"{row['mean_per_class']:.2f}" if "mean_per_class" in row else "-"
        table.add_row(row["name"], *cells[:2], mean, *cells[2:])
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    settings = {
        key: value
        for key, value in outcomes[0].settings.items()
        if not isinstance(value, dict | list) and all(value == other.settings[key] for other in outcomes)
    }
    console.print(", ".join(f"{key} {value}" for key, value in settings.items()), markup=False)
    used = sum(outcomes[0].settings.get(key, 0) for key in ("train_images", "held_out_images"))
    lost = len(bench.test) - len(labels)
    left_out = f" ({lost} of {len(bench.test)} do not decode and are left out)" if lost else ""
    console.print(
        f"{len(labels)} test images{left_out} of {bench.classes} classes; {used} training images; "
        f"{seconds:.0f} s on {bench.world.size} x {bench.world.device.type}, {args.precision}"
    )
    name, out = file_name(args, trained), folder(args, trained)
    document = {
        "protocol": args.protocol + "-fast" * bool(args.fast),
        "checkpoint": trained.path.name,
        "untrained": args.untrained,
        "encoder_sha256": trained.digest or None,
        "step": trained.step,
        "results": rows,
        "test": describe(args.data, bench.test, len(labels)),
        "train": describe(args.train, bench.train, used),
        "classes": bench.classes,
        "seed": args.seed,
        "machine": {
            "ranks": bench.world.size, "device": bench.world.device.type, "precision": args.precision,
            "torch": torch.__version__, "seconds": round(seconds, 1),
        },
    }  # fmt: skip
    with replacing(out / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")
    counts = confusions(outcomes[0], labels, bench.classes)
    names = list(bench.test.classes or bench.train.classes or [])
    names += [str(label) for label in range(len(names), bench.classes)]
    caption = f"{title}, {rows[0]['name']}: top-1 {rows[0]['top1']:.1f} %" if "top1" in rows[0] else title
    picture = out / f"{name}.png"
    try:
        metrics.save_confusion(picture, counts, names, caption)
    except Exception as error:  # the numbers are written; what a library cannot draw ends nothing
        picture.unlink(missing_ok=True)  # an earlier one is of other numbers
        print(f"warning: {picture} cannot be drawn: {error}", file=sys.stderr)
    where = f"{out / name}.json, {name}.png".encode(errors="replace").decode()  # a folder need not be UTF-8
    console.print(where, markup=False, soft_wrap=True)
