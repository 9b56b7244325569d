"""Values that follow from the settings, the data and the machine: those of "auto" settings, and a run's estimates."""

from collections.abc import Callable, Mapping, Sized
from typing import Any

from byolt.configs import estimate, schema
from byolt.configs.fixed import flatten
from byolt.files.console import count
from byolt.files.machine import Device
from byolt.files.paths import MissingDataError, without_secrets


def decide(
    config: schema.Config, images: int, device: Device, ranks: int, begun: Mapping[str, Any] | None = None
) -> schema.Config:
    """The config with a value in the place of every "auto" (`OrAuto`); a run that has begun keeps its values.

    Raises:
        ValueError: the settings do not fit together.
    """
    then = flatten(schema.complete(dict(begun or {})))
    for key in _CHOSEN:
        if key in config.undecided:
            section, name = key.split(".")
            value = then[key] if key in then else _choose(key, config, images, device, ranks)
            changed = getattr(config, section).model_copy(update={name: value})
            config = config.model_copy(update={section: changed})
    return schema.from_settings(config.model_dump(mode="json"))


# The settings that `_choose` chooses, in this order: later ones follow from earlier ones.
_CHOSEN = (
    "model.backbone", "augment.size", "train.batch_size", "train.accumulation", "train.epochs",
    "optimizer.warmup_epochs", "optimizer.base_lr",
)  # fmt: skip


def _choose(key: str, config: schema.Config, images: int, device: Device, ranks: int) -> Any:
    """The value of an automatic setting; arguments as in `decide`.

    Epochs: with resnet8 at 96 px 7 min on two cores (estimated) up to 4,000 images, above them 17 min for each 10,000;
    with ResNet-50 an hour on one H200 up to 500,000 images, above them 2 h for each million.
    """
    on_gpu = device.kind == "cuda"
    match key:
        case "model.backbone":
            return "resnet50" if on_gpu else "resnet8"
        case "augment.size":
            return 224 if on_gpu else 96
        case "train.batch_size":
            if images < 2 * ranks:
                few = f"{count(images, 'image')} {'is' if images == 1 else 'are'} too few for {count(ranks, 'rank')}"
                cure = "use more images, or fewer ranks" if ranks > 1 else "use more images"
                raise ValueError(f"{few}: batch norm needs at least 2 images on each: {cure}")
            # a rank's share is a power of two, at most a quarter of the images, but at least 2
            largest = max(2, min(images // 4 // ranks, 256 if on_gpu else 32))
            return (1 << largest.bit_length() - 1) * ranks
        case "train.accumulation":  # as few micro-batches as the GPU's memory allows
            return estimate.fitting_accumulation(config, device, ranks) if on_gpu else 1
        case "train.epochs":  # as many as see 5 million images, or 40,000 on a CPU
            return min(max(round((5_000_000 if on_gpu else 40_000) / images), 10), 400)
        case "optimizer.warmup_epochs":
            return config.train.epochs / 10
        case "optimizer.base_lr":  # so that the peak is 1, or batch_size / 256 for larger batches
            return max(1.0, 256 / config.train.batch_size)
    raise AssertionError(key)


def describe(
    config: schema.Config,
    ranks: int,
    open_data: Callable[[str, schema.DataConfig], Sized],
    check_batch_size: Callable[[int, int], None],
    device: Device,
) -> str:
    """The config as YAML, with the values derived from it as comments (`train.py --print-config`).

    The two functions are the pipeline's `open_source` and `check_batch_size`.

    Raises:
        ValueError: the run would be refused too: settings, images and ranks do not fit together, or the data cannot be
            opened. Data that are missing may have data.expected_images instead.
    """
    try:
        images = len(open_data(config.data.path, config.data.on_demand))
        why = f"data.path={config.data.path}"
    except MissingDataError as error:
        if config.data.expected_images is None:
            raise
        images, why = config.data.expected_images, f"data.expected_images; {error}".replace("\n", " ")
    automatic = config.undecided
    if automatic:
        config = decide(config, images, device, ranks)
        config.check_ranks(ranks)
    check_batch_size(images, config.train.batch_size)
    config.check_steps(images)
    steps = config.total_steps(images)
    last = min(steps, config.train.stop_at_step or steps)
    lines = [schema.to_yaml(config, secrets=False).rstrip(), "", "# derived"]
    if automatic:
        lines.append(f"# auto: {', '.join(automatic)}")
    micro = config.images_per_rank(ranks)
    lines.append(f"# peak learning rate: {config.peak_lr:g}")
    lines.append(f"# images per rank and micro-batch: {micro} on {count(ranks, 'rank')}")
    lines.append(f"# device: {device}")
    lines.append(f"# memory: {estimate.memory_line(config, device, ranks, images)}")
    lines.append(f"# images: {images} ({without_secrets(why)})")
    lines.append(f"# steps: {steps}, warm-up: {config.warmup_steps(images)}")
    lines.append(f"# time: {estimate.time_line(config, device, ranks, last)}")
    return "\n".join(lines)
