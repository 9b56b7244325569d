"""Figures of a run as PNG files: view pairs, the loss curve, curves of several runs, confusions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from byolt.files.atomic import replacing

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def save_view_pairs(
    path: Path, view1: Tensor, view2: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """Draws the first 8 pairs of views as the network gets them.

    Args:
        path: PNG file.
        view1: (N, 3, H, W) normalized.
        view2: (N, 3, H, W) normalized.
        mean: per channel, of the normalization.
        std: per channel, of the normalization.
    """
    pairs = min(8, len(view1))
    figure, axes = plt.subplots(2, pairs, figsize=(1.6 * pairs, 3.6), squeeze=False)
    for row, views in enumerate((view1, view2)):
        for column in range(pairs):
            pixels = views[column].detach().float().cpu().permute(1, 2, 0)
            pixels = (pixels * torch.tensor(std) + torch.tensor(mean)).clamp(0, 1)
            axes[row, column].imshow(pixels.numpy())
            axes[row, column].set_axis_off()
    axes[0, 0].set_title("view 1", loc="left")
    axes[1, 0].set_title("view 2", loc="left")
    _save_figure(figure, path)


def save_loss_curve(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draws the loss and, if it was measured, the kNN accuracy over the steps."""
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    accuracies = [(row["step"], row["knn_top1"]) for row in rows if "knn_top1" in row]
    figure, axis = plt.subplots(figsize=(7, 4))
    if losses:
        axis.plot(*zip(*losses, strict=True), color="tab:blue")
    axis.set_xlabel("step")
    axis.set_ylabel("BYOL loss", color="tab:blue")
    axis.grid(alpha=0.3)
    if accuracies:
        other = axis.twinx()
        other.plot(*zip(*accuracies, strict=True), color="tab:orange", marker="o")
        other.set_ylabel("kNN top-1 (%)", color="tab:orange")
    _save_figure(figure, path)


def save_comparison(
    path: Path, runs: Mapping[str, list[list[dict[str, Any]]]], panels: Mapping[str, str]
) -> None:
    """Draws curves of several runs over their steps: one panel per number, one color per name.

    Args:
        path: PNG file.
        runs: name -> rows of metrics of one or more runs.
        panels: key in the rows -> label of its axis.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.8), squeeze=False)
    for axis, (key, label) in zip(axes[0], panels.items(), strict=True):
        for number, (name, repeats) in enumerate(runs.items()):
            for repeat, rows in enumerate(repeats):
                points = [(row["step"], row[key]) for row in rows if key in row]
                steps, values = zip(*points, strict=True) if points else ((), ())
                marker = "o" if len(points) < 10 else None
                legend = name if repeat == 0 else None
                axis.plot(steps, values, color=f"C{number % 10}", marker=marker, markersize=3.5, label=legend)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    _save_figure(figure, path)


def save_confusion(path: Path, counts: Tensor, names: list[str], title: str) -> None:
    """Draws which classes are taken for which: each row in percent of its class.

    Args:
        path: PNG file.
        counts: (C, C) int64, true class by predicted class.
        names: of the C classes; written on the axes if C <= 50.
        title: above the figure.
    """
    classes = len(counts)
    percent = (100 * counts.double() / counts.sum(dim=1, keepdim=True).clamp_min(1)).cpu().numpy()
    side = min(3 + 0.45 * classes, 16)
    figure, axis = plt.subplots(figsize=(side + 1, side))
    image = axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="% of the true class", fraction=0.046)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    # Class names come from folders: a $ does not begin a formula, and bytes need not be UTF-8.
    axis.set_title(_drawable(title), fontsize=10, parse_math=False)
    if classes <= 50:
        drawable = [_drawable(name) for name in names]
        axis.set_xticks(range(classes), drawable, rotation=90, parse_math=False)
        axis.set_yticks(range(classes), drawable, parse_math=False)
    if classes <= 20:
        for row in range(classes):
            for column in range(classes):
                if percent[row, column] >= 0.5:
                    color = "white" if percent[row, column] > 50 else "black"
                    text = f"{percent[row, column]:.0f}"
                    axis.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    _save_figure(figure, path)


def _drawable(text: str) -> str:
    return text.encode(errors="replace").decode()


def _save_figure(figure: Any, path: Path) -> None:
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
