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


_CONSTANT = "optimizer.tau_schedule=constant"
_NO_COLOR = ("jitter=0", "gray=0")
_NO_BLUR = ("blur=0", "solarize=0")
ABLATIONS = {
    "baseline": Ablation((), 72.5, "table 5a"),
    "tau_1": Ablation(("optimizer.base_tau=1",), 18.8, "table 5a, fixed random target"),
    "tau_0.999": Ablation(("optimizer.base_tau=0.999",), 69.8, "table 5a"),
    "tau_0.99": Ablation(("optimizer.base_tau=0.99",), 72.5, "table 5a"),
    "tau_0.9": Ablation(("optimizer.base_tau=0.9",), 68.4, "table 5a"),
    "tau_0": Ablation(("optimizer.base_tau=0", _CONSTANT), 0.3, "table 5a"),
    **{
        f"tau_{tau}_constant": Ablation((f"optimizer.base_tau={tau}", _CONSTANT), None, "not in the paper")
        for tau in (0.999, 0.99, 0.9)
    },
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
    """Reads a list of ablations, "NAME: [section.key=value, ...]" in YAML; names and overrides stay as written.

    Raises:
        ValueError: the file cannot be read or has another form, a name occurs twice, or an override is not a variant's.
    """
    try:
        with open(path, encoding="utf-8", opener=open_regular) as file:
            root = yaml.compose(file, yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--list {path} cannot be read: {' '.join(str(error).split())}") from None
    form = "must be NAME: [section.key=value, ...]"
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise ValueError(f"--list {path} {form}")
    found: dict[str, Ablation] = {}
    for key, given in root.value:
        place = f"--list {path}, line {key.start_mark.line + 1}"
        words = given.value if isinstance(given, yaml.SequenceNode) else [given]
        overrides = [word.value for word in words if isinstance(word, yaml.ScalarNode) and "=" in word.value]
        if not isinstance(key.value, str) or not re.fullmatch(r"\w[\w.+-]{0,99}", key.value):
            name = f"name {key.value:.99}" if isinstance(key.value, str) else "a name"
            raise ValueError(
                f"{place}: {name} must have 100 letters, digits and . + - _ at most; a line {form}"
            )
        if len(overrides) < len(words) or not isinstance(given, yaml.SequenceNode):
            raise ValueError(f"{place}: {key.value} {form}")
        if key.value in found:
            raise ValueError(f"{place}: {key.value} is there twice: give one of them another name")
        for word in overrides:
            _check_override(f"{place}: {key.value}: {word}", *word.split("=", 1))
        found[key.value] = Ablation(tuple(overrides))
    return found


def _check_override(place: str, key: str, value: str) -> None:
    """Refuses what a variant cannot change, and a batch that is not a number."""
    if key in ("run.out", "run.seed"):
        raise ValueError(f"{place}: every run has a folder in --out, and its seed by --seeds: remove it")
    if key == "batch" and not re.fullmatch("[1-9][0-9]{0,8}", value):
        raise ValueError(f"{place} must be a number of images")


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


class Request(NamedTuple):
    """The ablations of a recipe that a command asks for."""

    config: str
    common: list[str]  # overrides of the recipe for all runs
    out: Path  # folder of all runs
    batch_size: int  # of the recipe
    ablations: Mapping[str, Ablation]

    def settings(self, name: str, seed: int) -> list[str]:
        """All overrides of one run but its folder; errors as `overrides_of`."""
        own = overrides_of(name, self.batch_size, self.ablations)
        return [*self.common, *own, f"run.seed={seed}"]
