"""One line that says whether two runs are in the same state, to the bit."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from byolt.model import distributed
from byolt.model.distributed import World


def digest(state: dict[str, Any]) -> str:
    """sha256, in hex, over all that decides how a run goes on.

    That is: parameters, target and batch-norm statistics ("model"), momentum, the gradient scaler ("train_step"), the
    step, and what the sampler's position follows from: step, seed, order, batch size and data set. Not the clock, the
    paths or the number of ranks. Where tensors lie, on which device or in which memory format, does not matter.

    Args:
        state: what a checkpoint holds (`checkpoint.load`).
    """
    settings = state["config"]
    what = {name: state[name] for name in ("step", "model", "momentum", "train_step")}
    what["sampler"] = [
        state["data"],
        settings["run"]["seed"],
        settings["data"]["order"],
        settings["train"]["batch_size"],
    ]
    sha256 = hashlib.sha256()
    _feed(sha256, what)
    return sha256.hexdigest()


def agreed(state: dict[str, Any], world: World) -> str:
    """The digest, after all ranks have compared theirs.

    Raises:
        RuntimeError: the ranks are not in the same state.
    """
    mine = digest(state)
    if distributed.any_rank(mine != distributed.broadcast_object(mine, world), world):
        raise RuntimeError("the ranks are not in the same state; please report this with the settings")
    return mine


def _feed(sha256: Any, value: Any) -> None:
    """Every value is preceded by its kind and length, so that no two structures give the same bytes."""
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
