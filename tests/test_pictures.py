"""The pictures of a run: what one row, or none, looks like, and what titles and legends say."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from byolt.configs.schema import AugmentConfig, ViewConfig
from byolt.model.run import pictures


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, and not written."""
    saved: list[Figure] = []
    monkeypatch.setattr(pictures, "save_png", lambda figure, path: saved.append(figure))
    return saved


def pixels_of(figure: Figure, color: str) -> int:
    """Number of pixels of a color outside the labels of the axes."""
    for axis in figure.axes:
        axis.set_axis_off()
    for legend in figure.legends:
        legend.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pixels = np.asarray(Image.open(buffer).convert("RGB")).astype(int)
    return int((abs(pixels - np.array(to_rgb(color)) * 255).max(axis=2) < 8).sum())


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_every_number_of_rows_can_be_seen(rows: int, figures: list[Figure]) -> None:
    losses = [{"step": 10 * i, "loss": 4.0 - i / rows} for i in range(1, rows + 1)]
    pictures.save_loss_curve(Path("loss.png"), [{"step": 0, "knn_top1": 20.0}, *losses])
    (figure,) = figures
    loss, accuracy = figure.axes
    assert loss.get_title() == "Loss and kNN accuracy" and loss.get_xlabel() == "step"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["BYOL loss", "kNN top-1"]
    assert loss.lines[0].get_xdata().tolist() == [row["step"] for row in losses]  # type: ignore[union-attr]
    assert accuracy.lines[0].get_ydata().tolist() == [20.0]  # type: ignore[union-attr]
    assert pixels_of(figure, pictures.LOSS) > 15 and pixels_of(figure, pictures.ACCURACY) > 15


def test_a_run_without_rows_has_an_empty_curve(figures: list[Figure]) -> None:
    pictures.save_loss_curve(Path("loss.png"), [])
    assert figures[0].axes[0].get_title() == "Loss" and pixels_of(figures[0], pictures.LOSS) == 0


@pytest.mark.parametrize(
    ("profile", "blur", "explained"), [("byol", 0.1, True), ("byol", 0.0, False), ("torchvision", 1.0, False)]
)
def test_views_explain_their_dark_frame(
    profile: str, blur: float, explained: bool, figures: list[Figure]
) -> None:
    view = ViewConfig(blur=blur, solarize=0.0)
    augment = AugmentConfig.model_validate({"profile": profile, "size": 8, "view1": view, "view2": view})
    views = torch.zeros(2, 3, 8, 8)
    pictures.save_view_pairs(Path("views.png"), views, views + 1, augment)
    (figure,) = figures
    assert [axis.get_title("left") for axis in figure.axes] == ["view 1", "", "view 2", ""]
    assert figure.get_suptitle() == "What the network sees: 2 images of the first batch, each as two views"
    assert ("zero padding of the blur" in figure.get_supxlabel()) == explained
    first, second = (axis.images[0].get_array() for axis in figure.axes[::2])
    assert first is not None and second is not None
    np.testing.assert_allclose(first[0, 0], augment.mean, rtol=1e-6)
    np.testing.assert_allclose(second[0, 0], np.add(augment.mean, augment.std), rtol=1e-6)
