"""The resolved config for people (`train.py --print-config`)."""

from collections.abc import Callable, Sized

from byolt.configs import schema
from byolt.files.console import count


def describe(config: schema.Config, ranks: int, open_data: Callable[[str], Sized]) -> str:
    """The config as YAML, with the values derived from it as comments.

    Args:
        config: the settings.
        ranks: number of processes.
        open_data: opens data.path, whose length is the number of images; a ValueError says why it cannot.
    """
    lines = [schema.to_yaml(config).rstrip(), "", "# derived"]
    lines.append(f"# peak learning rate: {config.peak_lr:g}")
    lines.append(
        f"# images per rank and micro-batch: {config.images_per_rank(ranks)} on {count(ranks, 'rank')}"
    )
    images, why = config.data.expected_images, f"data.path={config.data.path}"
    try:
        images = len(open_data(config.data.path))
    except ValueError as error:
        why = ("data.expected_images; " if images else "") + str(error).replace("\n", " ")
    if images:
        lines.append(f"# images: {images} ({why})")
        lines.append(f"# steps: {config.total_steps(images)}, warm-up: {config.warmup_steps(images)}")
    else:
        lines.append(f"# steps: unknown: {why}")
    return "\n".join(lines)
