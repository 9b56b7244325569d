"""The recipes for CIFAR-10, STL-10 and ImageNet-100: their numbers are those of the sources, and they train."""

from pathlib import Path

import pytest

from byolt import train
from byolt.configs import schema
from byolt.files.rows import read_metrics

SOLO_CIFAR = {"projector_hidden": 4096, "projector_size": 256, "predictor_hidden": 4096}
SOLO_100 = SOLO_CIFAR | {"predictor_hidden": 8192}


@pytest.mark.parametrize(
    ("name", "heads", "lr", "decay", "trust", "views", "steps"),
    [
        ("r18_cifar10", SOLO_CIFAR, 1.0, 1e-5, ("scale", 5e-3), (0, 0, 0, 0), 23437),
        ("r18_stl10", SOLO_100, 0.5, 1e-6, ("clip", 0.02), (1, 0, 0.1, 0.2), 82031),
        ("r18_imagenet100", SOLO_100, 0.5, 1e-6, ("clip", 0.02), (1, 0, 0.1, 0.2), 197951),
        ("r50_imagenet100", SOLO_100, 0.5, 1e-6, ("clip", 0.02), (1, 0, 0.1, 0.2), 197951),
    ],
)
def test_numbers_are_those_of_the_source(
    name: str, heads: dict[str, int], lr: float, decay: float, trust: tuple, views: tuple, steps: int
) -> None:
    config = schema.load(name)
    optimizer, view1, view2 = config.optimizer, config.augment.view1, config.augment.view2
    assert config.model.model_dump().items() >= heads.items()
    assert (config.peak_lr, optimizer.weight_decay, optimizer.base_tau) == (lr, decay, 0.99)
    assert (optimizer.trust, optimizer.trust_coefficient) == trust
    assert (view1.blur, view1.solarize, view2.blur, view2.solarize) == views
    assert config.augment.profile == "torchvision"
    assert config.data.expected_images and config.total_steps(config.data.expected_images) == steps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r18_cifar10", "r18_stl10", "r18_imagenet100", "r50_imagenet100"])
def test_three_steps(name: str, tmp_path: Path) -> None:
    size = schema.load(name).augment.size
    changes = [f"data.path=synthetic:16:{size}x{size + 8}", "eval.path=null", f"run.out={tmp_path}"]
    changes += ["train.batch_size=2", "train.stop_at_step=3", "data.backend=torch", "run.log_every=1"]
    assert train.main(["--config", name, *changes]) == 0
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and all(0 < row["loss"] < 8 for row in rows)
