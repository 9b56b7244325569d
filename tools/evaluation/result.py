"""Writes the output of tools/evaluate.py: a table on the screen, a JSON file and a picture of the confusion matrix."""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from byolt.files.atomic import replacing
from byolt.files.console import say, say_table
from byolt.model.quality import scores
from byolt.model.run.trained import Trained
from byolt.pipelines.sources import Source
from byolt.tools.evaluation.confusion import save_confusion
from byolt.tools.evaluation.frozen import Setup
from byolt.tools.evaluation.protocols import Outcome


def check_writable(folder: Path) -> None:
    """Creates the folder, if needed; raises ValueError before hours of work if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror}): give another folder by --out"
        ) from None


def report(
    args: argparse.Namespace,
    trained: Trained,
    setup: Setup,
    outcomes: list[Outcome],
    labels: Tensor,
    seconds: float,
) -> None:
    """Writes the JSON file and the picture, then prints the table."""
    rows = [_summary(outcome, labels, setup.classes) for outcome in outcomes]
    # The picture shows the k of the accuracy that the run quotes.
    k = min(trained.config.eval.k, outcomes[0].settings["train_images"])
    drawn, row = max(zip(outcomes, rows, strict=True), key=lambda pair: pair[0].settings.get("k") == k)
    model = trained.config.model
    state = "untrained" if args.untrained else f"step {trained.step}"
    title = f"{args.protocol}: {model.backbone} ({model.stem} stem), {state}"
    used = sum(outcomes[0].settings.get(key, 0) for key in ("train_images", "held_out_images"))
    lost = len(setup.test) - len(labels)
    left_out = f" ({lost} of {len(setup.test)} do not decode and are left out)" if lost else ""
    document = {
        "protocol": _protocol(args),
        "checkpoint": trained.path.name,
        "untrained": args.untrained,
        "encoder_sha256": trained.digest or None,
        "step": trained.step,
        "results": rows,
        "drawn": drawn.name,  # the one of the picture
        "test": _about(args.data, setup.test, len(labels)),
        "train": _about(args.train, setup.train, used),
        "classes": setup.classes,
        "seed": args.seed,
        "machine": {
            "ranks": setup.world.size, "device": setup.world.device.type, "precision": args.precision,
            "torch": torch.__version__, "seconds": round(seconds, 1),
        },
    }  # fmt: skip
    path = args.out / (_file_name(args, trained) + ".json")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")
    names = list(setup.test.classes or setup.train.classes or [])
    names += [str(label) for label in range(len(names), setup.classes)]
    caption = f"{title}\n{drawn.name}" + (f": top-1 {row['top1']:.1f} %" if "top1" in row else "")
    picture = path.with_name(path.name[: -len(".json")] + ".png")
    try:
        save_confusion(picture, _confusions(drawn, labels, setup.classes), names, caption)
    except Exception as error:  # the numbers are written already
        picture.unlink(missing_ok=True)  # an earlier one shows other numbers
        say(f"warning: {picture} could not be drawn: {error}", file=sys.stderr)
    _print(title, rows, outcomes)
    say(
        f"{len(labels)} test images{left_out} of {setup.classes} classes; {used} training images; "
        f"{seconds:.0f} s on {setup.world.size} x {setup.world.device.type}, {args.precision}"
    )
    say(path)
    if picture.exists():
        say(picture)


def _about(path: str, source: Source, used: int) -> dict[str, Any]:
    """A data set and how many of its images were used; the others were not chosen or do not decode."""
    return {"path": path, "fingerprint": source.fingerprint, "images": used, "of": len(source)}


def _summary(outcome: Outcome, labels: Tensor, classes: int) -> dict[str, Any]:
    """Accuracies in percent, top-1 and top-5 with their 95 % intervals, and the settings."""
    row: dict[str, Any] = {"name": outcome.name, "images": len(labels)}
    for k in (1, 5):
        if k < classes:  # among five of five classes the true one always is
            right = int(scores.topk_correct(outcome.scores, labels, k).sum())
            low, high = scores.wilson_interval(right, len(labels))
            row |= {f"top{k}": 100 * right / len(labels), f"top{k}_interval": [100 * low, 100 * high]}
    if classes > 1:
        row["mean_per_class"] = 100 * scores.mean_per_class(_confusions(outcome, labels, classes))
    return row | {"settings": outcome.settings}


def _confusions(outcome: Outcome, labels: Tensor, classes: int) -> Tensor:
    """Number of images by true class (row) and predicted class (column): (C, C) int64."""
    return scores.confusion_matrix(outcome.scores.argmax(dim=1), labels, classes)


def _print(title: str, rows: list[dict[str, Any]], outcomes: list[Outcome]) -> None:
    """The table of all outcomes, and the settings that they share."""
    columns = ("", "top-1 %", "95 % interval", "mean per class %", "top-5 %", "95 % interval")
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        top1, top5 = (
            (f"{row[f'top{k}']:.2f}", "{:.2f} - {:.2f}".format(*row[f"top{k}_interval"]))
            if f"top{k}" in row
            else ("-", "-")
            for k in (1, 5)
        )
        mean = f"{row['mean_per_class']:.2f}" if "mean_per_class" in row else "-"
        table.add_row(row["name"], *top1, mean, *top5)
    say_table(table)
    shared = [
        f"{key.replace('_', ' ')} {_shown(value)}"
        for key, value in outcomes[0].settings.items()
        if not isinstance(value, dict | list) and all(value == other.settings[key] for other in outcomes)
    ]
    say(", ".join(shared))


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _file_name(args: argparse.Namespace, trained: Trained) -> str:
    """evaluate-PROTOCOL-STEP, and what differs from the run's own settings: data sets, --max-images, --seed."""
    config = trained.config
    parts = ["evaluate", _protocol(args)]
    if args.protocol == "finetune":
        parts.append(args.subset.stem if args.subset else format(args.labels, "g"))
    parts.append("untrained" if args.untrained else f"step{trained.step}")
    if args.data != config.eval.path:
        parts.append(_short_name(args.data))
    if args.train != config.data.path:
        parts.append("from-" + _short_name(args.train))
    if args.max_images:
        parts.append(f"max{args.max_images}")
    if args.seed:
        parts.append(f"seed{args.seed}")
    return "-".join(parts)


def _protocol(args: argparse.Namespace) -> str:
    return args.protocol + "-fast" * bool(args.fast) + "-lbfgs" * bool(args.lbfgs)


def _short_name(path: str) -> str:
    """The last two parts of a data set's path, as part of a file name: 'val' alone is ambiguous."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(Path(path).parts[-2:])).strip("-.")[-40:]
