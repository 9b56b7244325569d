"""Makes the report's section about accuracy: what was measured in training and by `tools/evaluate.py`, side by side."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from byolt.files.regular import read_regular
from byolt.tools.reporting.page import Figure, ReportSection
from byolt.tools.reporting.run import RunFiles

_LIMIT = 1 << 20  # bytes of a result
_SHOWN = 40  # rows of the table
_PNG = b"\x89PNG\r\n\x1a\n"
MEANINGS = {
    "knn": "the nearest training images vote, weighted by similarity; nothing is trained, so it shows whether "
    "images of one class are near each other",
    "probe": "a linear classifier that learns beside the network, tested on each batch of augmented training images "
    "before it learns from it: it follows the training closely, but is not an accuracy on new images",
    "linear": "a linear classifier, trained to the end on the frozen features and tested on held-out images: the usual "
    "figure of papers, mostly above kNN",
    "finetune": "the encoder is trained further together with a classifier, here on a part of the labels",
    "transfer": "logistic regression on the frozen features of another data set",
}


class Evaluation(NamedTuple):
    """One classifier's result in an evaluate-*.json."""

    path: Path
    protocol: str
    name: str
    encoder: str  # "step 100", or "untrained"
    step: int
    top1: float  # percent
    interval: tuple[float, float] | None  # of 95 %, percent
    per_class: float | None  # percent
    tested: str
    drawn: bool  # whether the picture beside the file shows it


def read_evaluations(folder: Path) -> tuple[list[Evaluation], list[str]]:
    """The results of tools/evaluate.py in a run's folder, by step, and a sentence for each file that is skipped."""
    found: list[Evaluation] = []
    problems: list[str] = []
    for path in sorted(folder.glob("evaluate-*.json")):
        try:
            if path.stat().st_size > _LIMIT:
                raise ValueError(f"it has more than {_LIMIT:,} bytes")
            document = json.loads(read_regular(path))
            found += [_evaluation(path, document, row) for row in document["results"] if "top1" in row]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            problems.append(f"{path.name} is not a result of tools/evaluate.py ({error}); it is skipped.")
    return sorted(found, key=lambda each: (each.step, each.protocol)), problems


def _evaluation(path: Path, document: dict[str, Any], row: dict[str, Any]) -> Evaluation:
    interval, test = row.get("top1_interval"), document["test"]
    step = 0 if document["untrained"] else int(document["step"])
    return Evaluation(
        path,
        str(document["protocol"]),
        str(row["name"]),
        f"step {step:,}" if step else "untrained",
        step,
        _percent(row["top1"]),
        (_percent(interval[0]), _percent(interval[1])) if interval else None,
        _percent(row["mean_per_class"]) if "mean_per_class" in row else None,
        f"{int(row['images']):,} images of {test['path']}",
        document.get("drawn", document["results"][0]["name"]) == row["name"],
    )


def _percent(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and 0 <= number <= 100):
        raise ValueError(f"{value} is not between 0 and 100")
    return number


def accuracy_section(run: RunFiles) -> ReportSection:
    """Every accuracy of the run in one table, with what each means, and the confusions of its newest encoder."""
    section = ReportSection("Accuracy, side by side")
    evaluations, problems = read_evaluations(run.folder)
    section.notes += problems
    rows = [*_of_training(run), *map(_row, evaluations[-_SHOWN:])]
    if rows:
        section.table = [
            ("classifier", "encoder", "top-1 %", "95 % interval", "mean per class %", "tested on"),
            *rows,
        ]
        kinds = ["knn"] * bool(run.series("knn_top1")) + ["probe"] * bool(run.series("probe_top1"))
        kinds += [each.protocol.removesuffix("-fast") for each in evaluations]
        section.facts = [(name, MEANINGS[name]) for name in dict.fromkeys(kinds) if name in MEANINGS]
    if len(evaluations) > _SHOWN:
        section.notes.append(f"{len(evaluations) - _SHOWN} earlier results are left out.")
    if not evaluations:
        section.intro = (
            "tools/evaluate.py RUN measures kNN and, with --protocol linear, the linear accuracy of papers; its "
            "results then appear here."
        )
        return section
    section.intro = (
        "Compare only rows that are tested on the same images. The interval covers the choice of test images, not the "
        "seed of the training."
    )
    newest = max(each.step for each in evaluations)
    for each in evaluations:
        picture = each.path.with_suffix(".png")
        if each.drawn and each.step == newest and picture.is_file():
            png = picture.read_bytes()
            if png.startswith(_PNG):
                title = f"Confusion: {each.protocol}, {each.name}"
                section.figures.append(Figure(title, png, _caption(each)))
    return section


def _of_training(run: RunFiles) -> list[list[str]]:
    """The rows of the accuracies that the run itself measured."""
    rows = []
    k = f", k = {run.config.eval.k}" if run.config else ""
    held_out = run.config.eval.path if run.config and run.config.eval.path else "held-out images"
    for key, name, tested in (
        ("knn_top1", f"in training: kNN{k}", str(held_out)),
        ("probe_top1", "in training: online probe", "augmented training images"),
    ):
        if points := run.series(key):
            step, value = points[-1]
            rows.append([name, f"step {step:,}" if step else "untrained", f"{value:.1f}", "-", "-", tested])
    return rows


def _row(each: Evaluation) -> list[str]:
    interval = "-" if each.interval is None else "{:.1f} to {:.1f}".format(*each.interval)
    per_class = "-" if each.per_class is None else f"{each.per_class:.1f}"
    name = f"{each.protocol}: {each.name}"
    return [name, each.encoder, f"{each.top1:.1f}", interval, per_class, each.tested]


def _caption(each: Evaluation) -> str:
    return (
        "Of the images of each true class (row), the share that was taken for each class (column): on the diagonal "
        f"they are right. Encoder: {each.encoder}, top-1 {each.top1:.1f} %."
    )
