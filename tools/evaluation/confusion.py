"""Draws a confusion matrix."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from byolt.model.run.pictures import save_png
from byolt.tools.reporting.figures import drawable


def save_confusion(path: Path, counts: Tensor, names: list[str], title: str) -> None:
    """Draws `counts`, (C, C) int64 by true and predicted class, in percent of each true class, as a PNG file.

    The names of the classes are on the axes if C <= 50.
    """
    classes = len(counts)
    percent = (100 * counts.double() / counts.sum(dim=1, keepdim=True).clamp_min(1)).cpu().numpy()
    side = min(3 + 0.45 * classes, 16)
    # A class name may contain a $.
    with rc_context({"text.parse_math": False, "figure.constrained_layout.use": True}):
        figure = Figure(figsize=(side + 1, side))
        axis = figure.add_subplot()
        image = axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(image, label="% of the true class", fraction=0.046)
        axis.set_xlabel("predicted")
        axis.set_ylabel("true")
        axis.set_title(drawable(title), fontsize=10)
        if classes <= 50:
            shown = [drawable(name) for name in names]
            axis.set_xticks(range(classes), shown, rotation=90)
            axis.set_yticks(range(classes), shown)
        if classes <= 20:
            for row, column in zip(*(percent >= 0.5).nonzero(), strict=True):
                value = percent[row, column]
                color = "white" if value > 50 else "black"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
        save_png(figure, path)
