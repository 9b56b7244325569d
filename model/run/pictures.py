"""Figures of a run as PNG files: view pairs and the loss curve; `save_png` for all figures of the project."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from byolt.files.atomic import replacing


def save_view_pairs(
    path: Path, view1: Tensor, view2: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """Draws the first 8 pairs of views as the network gets them.

    Args:
        path: PNG file.
        view1: (N, 3, H, W), normalized by `mean` and `std` of each channel.
        view2: likewise.
    """
    pairs = min(8, len(view1))
    figure = Figure(figsize=(1.6 * pairs, 3.6), layout="tight")
    axes = figure.subplots(2, pairs, squeeze=False)
    for row, views in enumerate((view1, view2)):
        for column in range(pairs):
            pixels = views[column].detach().float().cpu().permute(1, 2, 0)
            pixels = (pixels * torch.tensor(std) + torch.tensor(mean)).clamp(0, 1)
            axes[row, column].imshow(pixels.numpy())
            axes[row, column].set_axis_off()
    axes[0, 0].set_title("view 1", loc="left")
    axes[1, 0].set_title("view 2", loc="left")
    save_png(figure, path)


def save_loss_curve(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draws the loss and, if it was measured, the kNN accuracy over the steps."""
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    accuracies = [(row["step"], row["knn_top1"]) for row in rows if "knn_top1" in row]
    figure = Figure(figsize=(7, 4), layout="tight")
    axis = figure.add_subplot()
    if losses:
        axis.plot(*zip(*losses, strict=True), color="tab:blue")
    axis.set_xlabel("step")
    axis.set_ylabel("BYOL loss", color="tab:blue")
    axis.grid(alpha=0.3)
    if accuracies:
        other = axis.twinx()
        other.plot(*zip(*accuracies, strict=True), color="tab:orange", marker="o")
        other.set_ylabel("kNN top-1 (%)", color="tab:orange")
    save_png(figure, path)


def save_png(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Writes a PNG file, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
