"""What a run shows: metrics.jsonl, TensorBoard, a console line or bar, and pictures."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from byolt.files.atomic import replacing
from byolt.files.rows import read_rows
from byolt.model.distributed import World, all_reduce_mean

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class MetricLog:
    """Rows of numbers by step: appended to metrics.jsonl and to TensorBoard. A context manager around the loop."""

    def __init__(self, out: Path, first_step: int) -> None:
        """
        Args:
            out: folder of the run.
            first_step: steps done. Later rows, left by a run that went on past its last checkpoint, are dropped;
                with 0 all are.
        """
        self.path = out / "metrics.jsonl"
        self._rows = [row for row in read_rows(self.path) if 0 < first_step >= row["step"]]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        self._file = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row; the names become TensorBoard's tags. A row that a resumed run takes again is left out."""
        if any(row["step"] == step and row.keys() >= values.keys() for row in self._rows):
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> "MetricLog":
        self._hook = threading.excepthook
        threading.excepthook = self._on_thread_error
        return self

    def __exit__(self, *_: object) -> None:
        """Closes what an error in the block has left open; that error is the one to tell."""
        with suppress(OSError):
            self.close()
        threading.excepthook = self._hook

    def close(self) -> None:
        """Writes what TensorBoard's thread still holds.

        Raises:
            OSError: that, or something before, could not be written.
        """
        try:
            self._file.close()
        finally:
            self._board.close()

    def _on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        """Without a traceback where TensorBoard's thread cannot write: `add` or `close` raises that error."""
        if not (
            isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")
        ):
            self._hook(args)


class Window:
    """The steps since the last row: sums that stay on the device, and rates of the training alone."""

    def __init__(self, world: World, batch_size: int, step: int) -> None:
        """
        Args:
            world: the processes, whose means a row shows.
            batch_size: images of a step.
            step: steps done.
        """
        self._world, self._batch_size = world, batch_size
        self._loss, self._right = (torch.zeros((), device=world.device) for _ in range(2))
        self.begin(step, 0.0)

    def begin(self, step: int, waited: float) -> None:
        """A row begins after so many steps, and so many seconds waited for the loader in all."""
        self._loss.zero_()
        self._right.zero_()
        self._step, self._waited, self._began = step, waited, time.monotonic()

    def add(self, loss: Tensor, right: Tensor | None) -> None:
        """Adds a step: this rank's loss, and the share, 0 .. 1, that its probe classified rightly."""
        self._loss += loss
        if right is not None:
            self._right += right

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within counts for no rate."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._began += time.monotonic() - start

    def row(
        self, step: int, waited: float, corrupt: int, gauges: Mapping[str, Tensor], probed: bool
    ) -> dict[str, float]:
        """Ends the row, and begins the next. Every rank must call it at the same step, and waits for its device.

        Args:
            step: steps done.
            waited: seconds that this rank has waited for the loader, in all.
            corrupt: images that this rank could not decode, in all.
            gauges: 0-dim tensors, averaged over ranks by their names.
            probed: whether `add` got `right`.
        """
        steps, seconds = step - self._step, time.monotonic() - self._began
        local = [self._loss / steps, (waited - self._waited) / seconds, corrupt, self._right / steps]
        means = torch.tensor([*local, *gauges.values()], dtype=torch.float64, device=self._world.device)
        loss, waiting, unread, right, *others = all_reduce_mean(means, self._world).tolist()
        self.begin(step, waited)
        row = {
            "loss": loss,
            "images_per_second": steps * self._batch_size / seconds,
            "data_wait_percent": 100 * waiting,
            "corrupt_images": unread * self._world.size,
            **dict(zip(gauges, others, strict=True)),
        }
        return row | ({"probe_top1": 100 * right} if probed else {})


def save_view_pairs(
    path: Path, view1: Tensor, view2: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """A picture of the first 8 pairs of views: what the network will see.

    Args:
        path: PNG file.
        view1: (N, 3, H, W) normalised.
        view2: (N, 3, H, W) normalised.
        mean: of the normalisation.
        std: of the normalisation.
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
    """Loss and, where it was measured, kNN accuracy over the steps, as a PNG file."""
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
    """Curves of several runs over their steps, as a PNG file: a panel for each number, a colour for each name.

    Args:
        path: the file.
        runs: rows of metrics, of one or more runs by each name.
        panels: what is drawn: keys of the rows, and the labels of their axes.
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
    """Which classes are taken for which, as a PNG file: each row in per cent of its class.

    Args:
        path: the file.
        counts: (C, C) int64, true class by predicted class.
        names: of the C classes; written at the axes of up to 50.
        title: above the picture.
    """
    classes = len(counts)
    percent = (100 * counts.double() / counts.sum(dim=1, keepdim=True).clamp_min(1)).cpu().numpy()
    side = min(3 + 0.45 * classes, 16)
    figure, axis = plt.subplots(figsize=(side + 1, side))
    image = axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="% of the true class", fraction=0.046)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    # A name is a folder's: its $ are no mathematics, and it need not be UTF-8.
    axis.set_title(_drawable(title), fontsize=10, parse_math=False)
    if classes <= 50:
        drawable = [_drawable(name) for name in names]
        axis.set_xticks(range(classes), drawable, rotation=90, parse_math=False)
        axis.set_yticks(range(classes), drawable, parse_math=False)
    if classes <= 20:
        for row in range(classes):
            for column in range(classes):
                if percent[row, column] >= 0.5:
                    colour = "white" if percent[row, column] > 50 else "black"
                    text = f"{percent[row, column]:.0f}"
                    axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    _save_figure(figure, path)


def _drawable(text: str) -> str:
    return text.encode(errors="replace").decode()


def _save_figure(figure: Any, path: Path) -> None:
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
