"""Computes the digest of a run's state: two runs with one digest are in the same state, to the bit."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from byolt.model import distributed
from byolt.model.distributed import World


def digest(state: dict[str, Any]) -> str:
    """sha256, in hex, of everything that decides how a run continues.

    These are the parameters, target and batch-norm statistics ("model"), momentum, the gradient scaler ("train_step"),
    the step, and the sampler's position: step, seed, order, batch size and data set. Paths, number of ranks, and the
    device and memory format of tensors do not matter.

    Args:
        state: the content of a checkpoint (`checkpoint.load`).
    """
    settings = state["config"]
    content = {name: state[name] for name in ("step", "model", "momentum", "train_step")}
    content["sampler"] = [
        state["data"],
        settings["run"]["seed"],
        settings["data"]["order"],
        settings["train"]["batch_size"],
    ]
    sha256 = hashlib.sha256()
    _feed(sha256, content)
    return sha256.hexdigest()


def agreed(state: dict[str, Any], world: World) -> str:
    """Returns the digest, which must be the same on all ranks.

    Raises:
        RuntimeError: the ranks are not in the same state.
    """
    mine = digest(state)
    if distributed.any_rank(mine != distributed.broadcast_object(mine, world), world):
        raise RuntimeError("the ranks are not in the same state; please report this bug with your settings")
    return mine


def _feed(sha256: Any, value: Any) -> None:
    """Hashes a value after its type and length, so that different structures give different bytes."""
    if isinstance(value, dict):
        sha256.update(b"dict %d " % len(value))
        for key in sorted(value, key=repr):
            _feed(sha256, key)
            _feed(sha256, value[key])
    elif isinstance(value, list | tuple):
        sha256.update(b"list %d " % len(value))
        for item in value:
            _feed(sha256, item)
    elif isinstance(value, Tensor):
        sha256.update(f"tensor {value.dtype} {list(value.shape)} ".encode())
        sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        text = repr(value).encode()
        sha256.update(f"{type(value).__name__} {len(text)} ".encode() + text)
