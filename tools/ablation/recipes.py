"""The paper's ablations, or a list of one's own: which settings each changes, and the accuracy in the paper."""

import contextlib
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from byolt.files.regular import open_regular


class Ablation(NamedTuple):
    """Settings that differ from the recipe, and their accuracy in the paper."""

    overrides: tuple[str, ...]
    paper: float | None = None  # top-1 in percent: ImageNet, ResNet-50, 300 epochs, linear evaluation
    source: str = ""


def _both_views(*settings: str) -> tuple[str, ...]:
    return tuple(f"augment.{view}.{setting}" for view in ("view1", "view2") for setting in settings)


_NO_COLOR = ("jitter=0", "gray=0")
_NO_BLUR = ("blur=0", "solarize=0")
ABLATIONS = {
    "baseline": Ablation((), 72.5, "table 5a"),
    "tau_1": Ablation(("optimizer.base_tau=1",), 18.8, "table 5a, fixed random target"),
    "tau_0.999": Ablation(("optimizer.base_tau=0.999",), 69.8, "table 5a"),
    "tau_0.99": Ablation(("optimizer.base_tau=0.99",), 72.5, "table 5a"),
    "tau_0.9": Ablation(("optimizer.base_tau=0.9",), 68.4, "table 5a"),
    "tau_0": Ablation(("optimizer.base_tau=0", "optimizer.tau_schedule=constant"), 0.3, "table 5a"),
    "tau_0.999_constant": Ablation(
        ("optimizer.base_tau=0.999", "optimizer.tau_schedule=constant"), None, "not in the paper"
    ),
    "tau_0.99_constant": Ablation(
        ("optimizer.base_tau=0.99", "optimizer.tau_schedule=constant"), None, "not in the paper"
    ),
    "tau_0.9_constant": Ablation(
        ("optimizer.base_tau=0.9", "optimizer.tau_schedule=constant"), None, "not in the paper"
    ),
    "no_predictor": Ablation(("model.predictor=false",), 0.2, "table 19"),
    "no_flip": Ablation(_both_views("flip=0"), 71.9, "table 17"),
    "no_blur": Ablation(_both_views("blur=0"), 71.2, "table 17"),
    "no_gray": Ablation(_both_views("gray=0"), 70.3, "table 17"),
    "no_jitter": Ablation(_both_views("jitter=0"), 71.8, "table 17"),
    "no_color": Ablation(_both_views(*_NO_COLOR), 63.4, "table 17"),
    "crop_only": Ablation(_both_views("flip=0", *_NO_COLOR, *_NO_BLUR), 59.4, "table 17"),
    "crop_and_flip": Ablation(_both_views(*_NO_COLOR, *_NO_BLUR), 60.1, "table 17"),
    "crop_and_color": Ablation(_both_views("flip=0", *_NO_BLUR), 70.7, "table 17"),
    "crop_and_blur": Ablation(_both_views("flip=0", *_NO_COLOR, "solarize=0"), 61.1, "table 17"),
    # As in the paper, gradients are averaged over several batches that add up to the recipe's own (there 4096).
    **{
        f"batch_{size}": Ablation((f"batch={size}",), top1, "table 16")
        for size, top1 in ((2048, 72.4), (1024, 72.2), (512, 72.2), (256, 71.8), (128, 69.6), (64, 59.7))
    },
}


def read_list(path: Path) -> dict[str, Ablation]:
    """Reads a list of ablations, "NAME: [section.key=value, ...]" in YAML.

    Raises:
        ValueError: the file cannot be read or has another form.
    """
    try:
        with open(path, encoding="utf-8", opener=open_regular) as file:
            named = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--list {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(named, dict) or not named:
        raise ValueError(f"--list {path} must hold NAME: [section.key=value, ...]")
    for name, overrides in named.items():
        texts = isinstance(overrides, list) and all(
            isinstance(word, str) and "=" in word for word in overrides
        )
        if not texts or not re.fullmatch(r"\w[\w.+-]*", str(name)):
            raise ValueError(f"--list {path}: {name}: {overrides!r} must be NAME: [section.key=value, ...]")
    return {str(name): Ablation(tuple(overrides)) for name, overrides in named.items()}


def overrides_of(name: str, batch_size: int, ablations: Mapping[str, Ablation] = ABLATIONS) -> list[str]:
    """The overrides of one ablation of a recipe with this batch size, for train.py.

    Raises:
        ValueError: the ablation is unknown, or the recipe's batch is not two or more times the ablation's.
    """
    if name not in ablations:
        near = difflib.get_close_matches(name, ablations, n=1)
        hint = f"did you mean {near[0]}?" if near else f"not one of {', '.join(ablations)}"
        raise ValueError(f"--only {name}: {hint}")
    overrides = []
    for override in ablations[name].overrides:
        key, _, value = override.partition("=")
        if key == "batch":
            parts, rest = divmod(batch_size, int(value))
            if rest or parts < 2:
                raise ValueError(f"{name}: the recipe's batch of {batch_size} is not a multiple of {value}")
            override = f"train.accumulation={parts}"
        overrides.append(override)
    return overrides


def fitting(batch_size: int, ablations: Mapping[str, Ablation] = ABLATIONS) -> list[str]:
    """The names of all ablations that a recipe with this batch size allows; see `overrides_of`."""
    names = []
    for name in ablations:
        with contextlib.suppress(ValueError):
            overrides_of(name, batch_size, ablations)
            names.append(name)
    return names
