"""Figures of a run as PNG files: view pairs and the loss curve; `save_png` for all figures of the project."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from byolt.configs.schema import AugmentConfig
from byolt.files.atomic import replacing

# Two of Petroff's ten colors, made to differ under all color-vision deficiencies (arXiv 2107.02270, table 1).
LOSS, ACCURACY = "#3f90da", "#bd1f01"


def dark_frame(augment: AugmentConfig) -> str:
    """A sentence that explains the dark frame of blurred views; "" if no view has one."""
    if augment.profile != "byol" or max(augment.view1.blur, augment.view2.blur) == 0:
        return ""
    return "A dark frame is the zero padding of the blur, as in the reference implementation."


def save_view_pairs(path: Path, view1: Tensor, view2: Tensor, augment: AugmentConfig) -> None:
    """Draws the first 8 pairs of views as the network gets them.

    Args:
        path: PNG file.
        view1: (N, 3, H, W), normalized by the mean and std of each channel.
        view2: likewise.
        augment: the settings of the views.
    """
    pairs = min(8, len(view1))
    figure = Figure(figsize=(max(1.6 * pairs, 4.8), 4.2), layout="constrained")
    title = f"What the network sees: {pairs} images of the first batch, each as two views"
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(2, pairs, squeeze=False)
    for row, views in enumerate((view1, view2)):
        for column in range(pairs):
            pixels = views[column].detach().float().cpu().permute(1, 2, 0)
            pixels = (pixels * torch.tensor(augment.std) + torch.tensor(augment.mean)).clamp(0, 1)
            axes[row, column].imshow(pixels.numpy())
            axes[row, column].set_axis_off()
    axes[0, 0].set_title("view 1", loc="left")
    axes[1, 0].set_title("view 2", loc="left")
    figure.supxlabel(dark_frame(augment), fontsize=8)
    save_png(figure, path)


def save_loss_curve(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draws the loss and, if it was measured, the kNN accuracy over the steps."""
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    accuracies = [(row["step"], row["knn_top1"]) for row in rows if "knn_top1" in row]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.add_subplot()
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("BYOL loss", color=LOSS)
    axis.grid(alpha=0.3)
    drawn = []
    if losses:
        marker = "o" if len(losses) <= 20 else None  # a line through one point would not be seen
        drawn += axis.plot(*zip(*losses, strict=True), color=LOSS, marker=marker, label="BYOL loss")
    if accuracies:
        other = axis.twinx()
        other.set_ylabel("kNN top-1 (%)", color=ACCURACY)
        style: dict[str, Any] = {"color": ACCURACY, "marker": "s", "linestyle": "--", "label": "kNN top-1"}
        drawn += other.plot(*zip(*accuracies, strict=True), **style)
    axis.set_title("Loss and kNN accuracy" if accuracies else "Loss")
    figure.legend(handles=drawn, loc="outside lower center", ncols=2)
    save_png(figure, path)


def save_png(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Writes a PNG file, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
