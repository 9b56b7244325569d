"""The digest: equal for equal states on any device and in any memory format, different for every change that matters."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from byolt.model.run.digest import digest

KNOWN = "b723417445892114261e643d4238e67188fe6c217477648ca4863779bc90faa5"


def state() -> dict[str, Any]:
    return {
        "step": 3,
        "seconds": 1.5,
        "model": {
            "online.w": torch.arange(24.0).view(1, 2, 3, 4),
            "target.w": torch.ones(2, 2),
            "bn.running_mean": torch.zeros(2),
            "bn.num_batches_tracked": torch.tensor(3),
        },
        "momentum": {0: {"momentum": torch.ones(2)}, 1: {"momentum": torch.zeros(2)}},
        "train_step": {"scaler": {"scale": 65536.0}},
        "config": {"run": {"seed": 5}, "data": {"order": "full"}, "train": {"batch_size": 8}},
        "data": "abc",
        "knn_untrained": None,
    }


def _set(*keys: Any, value: Any) -> Callable[[dict], None]:
    def change(at: dict) -> None:
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value

    return change


CHANGES = {
    "step": _set("step", value=4),
    "weight": _set("model", "online.w", value=torch.arange(24.0).view(1, 2, 3, 4) + 1e-5),
    "sign of zero": _set("model", "bn.running_mean", value=-torch.zeros(2)),
    "dtype": _set("model", "target.w", value=torch.ones(2, 2, dtype=torch.float64)),
    "shape": _set("model", "target.w", value=torch.ones(4)),
    "counter": _set("model", "bn.num_batches_tracked", value=torch.tensor(4)),
    "name": _set("model", "new", value=torch.ones(0)),
    "momentum": _set("momentum", 1, "momentum", value=torch.ones(2)),
    "scaler": _set("train_step", "scaler", "scale", value=32768.0),
    "seed": _set("config", "run", "seed", value=6),
    "order": _set("config", "data", "order", value="block"),
    "batch": _set("config", "train", "batch_size", value=16),
    "data set": _set("data", value="abd"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_change_of_the_run_changes_it(change: Callable[[dict], None]) -> None:
    other = copy.deepcopy(state())
    change(other)
    assert digest(other) != digest(state())


def test_clock_layout_and_order_of_keys_do_not_matter() -> None:
    other = state()
    other["seconds"], other["knn_untrained"] = 99.0, 10.0
    other["model"] = dict(reversed(other["model"].items()))
    other["model"]["online.w"] = other["model"]["online.w"].to(memory_format=torch.channels_last)
    assert digest(other) == digest(state())


def test_it_is_frozen() -> None:
    """Digests of two releases can be compared."""
    assert digest(state()) == KNOWN
