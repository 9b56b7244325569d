"""Figures: the curves of several runs, and names that matplotlib would not take."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from byolt.model.run import pictures
from byolt.model.run.pictures import save_comparison


def test_comparison_draws_each_run_where_it_has_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []

    def save(figure: Any, path: Path, plain: Any = pictures._save_figure) -> None:
        figures.append(figure)
        plain(figure, path)

    monkeypatch.setattr(pictures, "_save_figure", save)
    first = [
        {"step": 0, "knn_top1": 20.0},
        {"step": 1, "loss": 3.5},
        {"step": 2, "loss": 3.0, "knn_top1": 25.0},
    ]
    second = [{"step": step, "loss": 4.0 - step / 10} for step in range(1, 12)]
    third = [{"step": 2, "loss": 2.5}]
    runs = {"baseline": [first, second], "tau_0": [third]}
    save_comparison(tmp_path / "a.png", runs, {"loss": "BYOL loss", "knn_top1": "kNN top-1 (%)"})
    loss, knn = figures[0].axes
    assert (loss.get_ylabel(), knn.get_ylabel()) == ("BYOL loss", "kNN top-1 (%)")
    drawn = [[line.get_xydata().tolist() for line in axis.lines] for axis in (loss, knn)]
    assert drawn[0] == [[[1, 3.5], [2, 3.0]], [[row["step"], row["loss"]] for row in second], [[2, 2.5]]]
    assert drawn[1] == [[[0, 20.0], [2, 25.0]], [], []]
    assert [line.get_color() for line in loss.lines] == ["C0", "C0", "C1"]
    assert [line.get_marker() for line in loss.lines] == ["o", "None", "o"]  # few points are marked
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["baseline", "tau_0"]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > picture.height > 300


@pytest.mark.parametrize("name", ["$x^$", "$\\frac$", "caf\udce9"])
def test_any_folder_name_can_stand_at_the_confusions(name: str, tmp_path: Path) -> None:
    pictures.save_confusion(tmp_path / "c.png", torch.eye(2, dtype=torch.int64), [name, "b"], f"title {name}")
    assert Image.open(tmp_path / "c.png").width > 300
