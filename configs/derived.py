"""Values that follow from the settings, the data and the machine: those of "auto" settings, and a run's estimates."""

from collections.abc import Callable, Mapping, Sized
from typing import Any

from byolt.configs import estimate, schema
from byolt.configs.fixed import flatten
from byolt.files.console import count
from byolt.files.machine import Device
from byolt.files.paths import without_secrets


def decide(
    config: schema.Config,
    images: int,
    device: Device,
    ranks: int,
    begun: Mapping[str, Any] | None = None,
) -> schema.Config:
    """The config with a value in the place of every "auto" (`OrAuto`).

    Args:
        config: the settings.
        images: number of images in the data set.
        device: of each rank.
        ranks: number of processes.
        begun: the settings with which the run began, whose values it keeps.

    Raises:
        ValueError: the settings do not fit together.
    """
    then = flatten(schema.complete(dict(begun or {})))
    for key, rule in _RULES.items():  # later rules use the values of earlier ones
        if key in config.undecided:
            section, name = key.split(".")
            value = then[key] if key in then else rule(config, images, device, ranks)
            changed = getattr(config, section).model_copy(update={name: value})
            config = config.model_copy(update={section: changed})
    return schema.from_settings(config.model_dump(mode="json"))


def _backbone(config: schema.Config, images: int, device: Device, ranks: int) -> str:
    return "resnet50" if device.kind == "cuda" else "resnet8"


def _size(config: schema.Config, images: int, device: Device, ranks: int) -> int:
    return 224 if device.kind == "cuda" else 96


def _batch_size(config: schema.Config, images: int, device: Device, ranks: int) -> int:
    """A power of two per rank: a quarter of the images, at most 256 on a GPU and 32 on a CPU."""
    largest = min(images // 4 // ranks, 256 if device.kind == "cuda" else 32)
    return max(2, 1 << largest.bit_length() - 1) * ranks


def _epochs(config: schema.Config, images: int, device: Device, ranks: int) -> int:
    """As many as fit an hour on one H200 or minutes on two CPU cores, but 10 to 400."""
    seen = 5_000_000 if device.kind == "cuda" else 40_000
    return min(max(round(seen / images), 10), 400)


def _accumulation(config: schema.Config, images: int, device: Device, ranks: int) -> int:
    """As few micro-batches as the GPU's memory allows."""
    return estimate.fitting_accumulation(config, device, ranks) if device.kind == "cuda" else 1


def _warmup_epochs(config: schema.Config, images: int, device: Device, ranks: int) -> float:
    return config.train.epochs / 10


def _base_lr(config: schema.Config, images: int, device: Device, ranks: int) -> float:
    """So that the peak is 1, or batch_size / 256 for larger batches."""
    return max(1.0, 256 / config.train.batch_size)


_RULES: dict[str, Callable[[schema.Config, int, Device, int], Any]] = {
    "model.backbone": _backbone,
    "augment.size": _size,
    "train.batch_size": _batch_size,
    "train.accumulation": _accumulation,
    "train.epochs": _epochs,
    "optimizer.warmup_epochs": _warmup_epochs,
    "optimizer.base_lr": _base_lr,
}


def describe(config: schema.Config, ranks: int, open_data: Callable[[str], Sized], device: Device) -> str:
    """The config as YAML, with the values derived from it as comments (`train.py --print-config`).

    Args:
        config: the settings.
        ranks: number of processes.
        open_data: opens data.path, whose length is the number of images; a ValueError says why it cannot.
        device: of each rank.
    """
    images, why = config.data.expected_images, f"data.path={config.data.path}"
    try:
        images = len(open_data(config.data.path))
    except ValueError as error:
        why = ("data.expected_images; " if images else "") + str(error).replace("\n", " ")
    automatic = config.undecided
    if automatic and images:
        config = decide(config, images, device, ranks)
        config.check_ranks(ranks)
    lines = [without_secrets(schema.to_yaml(config)).rstrip(), "", "# derived"]
    if automatic:
        lines.append(
            f"# auto{'' if images else ', decided when the images are known'}: {', '.join(automatic)}"
        )
    if not config.undecided:
        micro = config.images_per_rank(ranks)
        lines.append(f"# peak learning rate: {config.peak_lr:g}")
        lines.append(f"# images per rank and micro-batch: {micro} on {count(ranks, 'rank')}")
        lines.append(f"# device: {device}")
        lines.append(f"# memory: {estimate.memory_line(config, device, ranks)}")
    if not images:
        return "\n".join([*lines, f"# steps: unknown: {why}"])
    steps = config.total_steps(images)
    lines.append(f"# images: {images} ({why})")
    lines.append(f"# steps: {steps}, warm-up: {config.warmup_steps(images)}")
    last = min(steps, config.train.stop_at_step or steps)
    lines.append(f"# time: {estimate.time_line(config, device, ranks, last)}")
    return "\n".join(lines)
