"""The kNN monitor: images for calibration, ranks without images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from whole_runs import on_two_ranks

from byolt.configs import schema
from byolt.model import distributed
from byolt.model.distributed import World
from byolt.model.quality.monitor import KnnMonitor
from byolt.pipelines.plain import plain_images
from byolt.pipelines.sources import open_source
from byolt.pipelines.subset import spaced

CONFIG = Path(__file__).resolve().parent.parent / "configs/quickstart.yaml"


def calibration(images: int, rank: int, ranks: int) -> list[int]:
    """Sizes of this rank's batches."""
    sizes: list[int] = []
    source = open_source(f"synthetic:{images}:8x8")
    world = World(rank, 0, ranks, torch.device("cpu"), "gloo")
    monitor = KnnMonitor(schema.load(CONFIG), source, source, world, plain_images, spaced)
    with (
        patch(
            "byolt.model.quality.features.calibrate_batch_norm",
            lambda _, batches: sizes.extend(len(labels) for _, labels in batches),
        ),
        patch.object(
            KnnMonitor, "_features", return_value=(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
        ),
    ):
        assert monitor(torch.nn.Linear(1, 1), calibrate=True) == 100
    return sizes


@pytest.mark.parametrize(("ranks", "expected"), [(8, 32), (128, 2), (200, 2), (512, 2)])
def test_batches_have_two_images_on_however_many_ranks(ranks: int, expected: int) -> None:
    """Batch norm in training mode refuses one image, and 256 // 512 is 0."""
    assert set(calibration(1024, 0, ranks)) == {expected}


@pytest.mark.parametrize(
    ("images", "ranks", "expected"),
    [(257, 1, [256]), (300, 1, [256]), (513, 1, [256, 256]), (5000, 1, [256] * 8), (40, 1, [40]), (41, 2, [20]),
     (259, 2, [128]), (5000, 3, [85] * 8)],
)  # fmt: skip
def test_batches_are_whole(images: int, ranks: int, expected: list[int]) -> None:
    """Of a last batch of one image batch norm has no variance, and of few it would count as much as 256."""
    assert calibration(images, ranks - 1, ranks) == expected


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (
            [3] * 30,
            None,
            "all 30 images are of one class, so kNN top-1 would be 100 % for any encoder: set eval.path=null",
        ),
        (list(range(30)), [f"n{i}" for i in range(1, 31)], "only in eval.path: n0; only in data.path: n30$"),
    ],
)
def test_sets_that_knn_cannot_compare(labels: list[int], classes: list[str] | None, message: str) -> None:
    bank, queries = open_source("synthetic:30:8x8"), open_source("synthetic:40:8x8")
    bank.labels, bank.classes = np.array(labels), classes
    queries.classes = [f"n{i}" for i in range(30)]
    world = World(0, 0, 1, torch.device("cpu"), "none")
    with pytest.raises(ValueError, match=message) as caught:
        KnnMonitor(schema.load(CONFIG), bank, queries, world, plain_images, spaced)
    assert len(str(caught.value)) < 300


class _Labels:
    """Equal images with these labels."""

    classes = None

    def __init__(self, *labels: int) -> None:
        self.labels = np.array(labels)

    def __len__(self) -> int:
        return len(self.labels)


def _worker(rank: int, folder: str) -> None:
    world = distributed.init("cpu", timeout=20)
    encoder: Any = nn.Flatten()
    encoder.weight, encoder.num_features = nn.Parameter(torch.ones(1)), 3

    def images(
        split: _Labels, ids: np.ndarray, config: schema.Config, size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for i in ids:
            yield torch.ones(1, 3, 1, 1), torch.from_numpy(split.labels[i : i + 1])

    config = schema.load(CONFIG, ["eval.max_images=1"])  # the first of each data set, on rank 0
    monitor = KnnMonitor(config, _Labels(1, 0), _Labels(1, 1), world, images, spaced)
    (Path(folder) / str(rank)).write_text(str(monitor(encoder, calibrate=False)))
    encoder.forward = lambda images: images.flatten(1) * torch.nan
    (Path(folder) / f"nan{rank}").write_text(str(monitor(encoder, calibrate=False)))
    distributed.shutdown(world)


@pytest.mark.slow
def test_one_image_on_two_ranks_is_no_deadlock(tmp_path: Path) -> None:
    on_two_ranks(_worker, str(tmp_path))
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["100.0", "100.0"]
    assert [(tmp_path / f"nan{rank}").read_text() for rank in range(2)] == ["nan", "nan"]
