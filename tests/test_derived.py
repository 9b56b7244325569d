"""Settings that are auto: their values for a data set and a device, and for a run that continues."""

import re
from pathlib import Path
from typing import Any

import pytest

from byolt.configs import schema
from byolt.configs.derived import decide, describe
from byolt.files.machine import Device
from byolt.pipelines.order import check_batch_size
from byolt.pipelines.sources import open_source

ROOT = Path(__file__).resolve().parent.parent
CPU = Device("cpu", "AMD EPYC", 16 * 2**30, 2)
GPU = Device("cuda", "NVIDIA H200", 140 * 2**30, 12)


def own(*overrides: str) -> schema.Config:
    return schema.load(ROOT / "configs" / "own_images.yaml", [*overrides])


def values(config: schema.Config) -> tuple[Any, ...]:
    return (
        config.model.backbone, config.augment.size, config.train.batch_size, config.train.accumulation,
        config.train.epochs,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("images", "device", "ranks", "expected"),
    [
        (250, CPU, 1, ("resnet8", 96, 32, 1, 160)),
        (10, CPU, 1, ("resnet8", 96, 2, 1, 400)),
        (100_000, CPU, 1, ("resnet8", 96, 32, 1, 10)),
        (250, GPU, 1, ("resnet50", 224, 32, 1, 400)),
        (100_000, GPU, 1, ("resnet50", 224, 256, 1, 50)),
        (100_000, GPU, 8, ("resnet50", 224, 2048, 1, 50)),
        (100_000, GPU, 3, ("resnet50", 224, 768, 1, 50)),
        (100_000, GPU._replace(memory=16 * 2**30), 1, ("resnet50", 224, 256, 2, 50)),
        (1_281_167, GPU, 1, ("resnet50", 224, 256, 1, 10)),
    ],
)
def test_settings_follow_from_images_and_device(
    images: int, device: Device, ranks: int, expected: tuple[Any, ...]
) -> None:
    config = decide(own(), images, device, ranks)
    assert values(config) == expected and not config.undecided
    assert config.optimizer.warmup_epochs == pytest.approx(config.train.epochs / 10)
    config.check_ranks(ranks)
    assert config.total_steps(images) >= 1 and config.train.batch_size <= images


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_few_images_are_a_batch_or_are_refused(device: Device) -> None:
    assert [decide(own(), n, device, 1).train.batch_size for n in range(2, 8)] == [2] * 6
    assert [decide(own(), n, device, 8).train.batch_size for n in (16, 63, 64, 128)] == [16, 16, 16, 32]
    refused = (
        "1 image is too few for 1 rank",
        "3 images are too few for 2 ranks",
        "15 images are too few for 8 ranks",
    )
    for said, images, ranks in zip(refused, (1, 3, 15), (1, 2, 8), strict=True):
        with pytest.raises(ValueError, match=f"^{said}: batch norm needs at least 2 images on each"):
            decide(own(), images, device, ranks)


def shown(config: schema.Config) -> str:
    return describe(config, 1, open_source, check_batch_size, CPU)


def test_print_config_refuses_what_training_refuses(tmp_path: Path) -> None:
    images = "data.path=synthetic:60:32x32"
    assert "a batch of all 60 images fits\n# images: 60 (data.path=synthetic:60:32x32)" in shown(own(images))
    expected = "data.expected_images=100"
    (tmp_path / "photos").mkdir()
    (tmp_path / "cut.beton").write_bytes(b"x")
    for overrides, said in (
        ([images, "train.batch_size=64"], "train.batch_size=64 is larger than the data set (60 images)"),
        (
            [images, "train.epochs=0.01", "optimizer.warmup_epochs=0"],
            "train.epochs=0.01 is less than one step",
        ),
        (["data.path=synthetic:1:32x32"], "1 image is too few"),
        ([f"data.path={tmp_path}/photos", expected], f"{tmp_path}/photos"),
        ([f"data.path={tmp_path}/cut.beton", expected], "cut.beton"),
        (["data.path=ftp://host/photos", expected], "ftp"),
        ([f"data.path={tmp_path}/none"], "none' does not exist"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            shown(own(*overrides))


@pytest.mark.parametrize("path", ["none", "none.beton", "none-*.beton", "{a,b}"])
def test_missing_data_may_have_a_stated_number_of_images(path: str, tmp_path: Path) -> None:
    said = shown(own(f"data.path={tmp_path}/{path}", "data.expected_images=100"))
    assert "# images: 100 (data.expected_images; data path '" in said and "\n# steps: 2500, " in said


def test_the_peak_learning_rate_is_one_up_to_a_batch_of_256() -> None:
    assert [decide(own(), 100_000, GPU, n).peak_lr for n in (1, 4)] == [1, 4]
    assert decide(own(), 250, CPU, 1).peak_lr == 1


def test_a_stated_value_stays_and_others_follow_it() -> None:
    config = decide(own("train.batch_size=64", "augment.size=128"), 250, CPU, 1)
    assert (config.train.batch_size, config.augment.size, config.optimizer.base_lr) == (64, 128, 4.0)
    reference = schema.load(ROOT / "configs" / "r50_100ep.yaml")
    assert decide(reference, 250, CPU, 1) == reference


def test_a_run_keeps_its_values_on_another_device() -> None:
    begun = decide(own(), 250, CPU, 1)
    state = begun.model_dump(mode="json")
    assert decide(own(), 250, GPU, 1, state) == begun
    del state["train"]["accumulation"]  # as an older version may have written it
    assert decide(own(), 250, GPU, 1, state).train.accumulation == 1


def test_values_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.warmup_epochs=200 leaves nothing of train\.epochs=160"):
        decide(own("optimizer.warmup_epochs=200"), 250, CPU, 1)
    with pytest.raises(
        ValueError, match=r"train\.batch_size, train\.accumulation: auto is for config files only"
    ):
        schema.from_settings(own().model_dump())


def test_auto_only_where_a_setting_allows_it() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.momentum='auto' must be a number"):
        own("optimizer.momentum=auto")
    with pytest.raises(ValueError, match="not divisible by"):
        own("train.batch_size=10", "train.accumulation=3")
