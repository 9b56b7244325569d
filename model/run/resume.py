"""Where a run goes on: the checkpoint to continue from, and putting its state back."""

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byolt.configs import fixed
from byolt.configs.schema import Config
from byolt.model import distributed
from byolt.model.distributed import World
from byolt.model.quality.probe import OnlineProbe
from byolt.model.run import checkpoint
from byolt.model.run.checkpoint import CheckpointError
from byolt.model.step import TrainStep

STATE: dict[str, tuple[type, ...]] = {  # what a checkpoint holds, and of which types
    "step": (int,),
    "model": (dict, OrderedDict),
    "momentum": (dict,),
    "train_step": (dict,),
    "probe": (dict, type(None)),
    "config": (dict,),
    "data": (str,),
    "knn_untrained": (float, type(None)),
}


class Start(NamedTuple):
    """Where a run begins."""

    path: Path | None  # the checkpoint that it continues; None for a new run
    step: int  # steps done
    knn_untrained: float | None  # kNN top-1 of the encoder before its first step, in per cent


def begin(
    resume: str | None,
    config: Config,
    fingerprint: str,
    allowed: list[str],
    train_step: TrainStep,
    probe: OnlineProbe | None,
    world: World,
) -> Start:
    """Finds the checkpoint to continue from, sees that it is of this run, and puts its state back.

    Args:
        resume: None for a new run, "auto" for the newest checkpoint in run.out, or the path of one.
        config: the settings now.
        fingerprint: of the data set now.
        allowed: dotted keys of settings that may differ from the checkpoint's.
        train_step: built with the config; its model and optimizer are changed too.
        probe: the online probe, if the run has one.
        world: the processes; rank 0 chooses for all.

    Raises:
        ValueError: run.out holds what a new run would overwrite, or only damaged checkpoints; or settings differ.
        CheckpointError: the checkpoint cannot be used.
    """
    path, state = find_checkpoint(Path(config.run.out), resume, world)
    if path is None:
        return Start(None, 0, None)
    fixed.check_same_run(config, fingerprint, path, state, allowed)
    restore(path, state, train_step, probe)
    return Start(path, state["step"], state["knn_untrained"])


def find_checkpoint(out: Path, resume: str | None, world: World) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to continue from, with the keys of `STATE`; (None, {}) for a new run. Errors: see `begin`."""
    state: dict[str, Any] = {}

    def choose() -> Path | None:
        nonlocal state
        path, state = _choose(out, resume)
        return path

    path = distributed.on_main(choose, world)
    if path and not world.is_main:
        state = _load(path)  # fails by name where the ranks do not share run.out
    return path, state


def _choose(out: Path, resume: str | None) -> tuple[Path | None, dict[str, Any]]:
    newest, state, damaged = checkpoint.load_newest(out)
    if resume is None and (newest or damaged):
        raise ValueError(
            f"run.out={out} holds checkpoints of an earlier run: add --resume auto to continue it, "
            "or choose another run.out"
        )
    if newest:
        _check_state(newest, state)
    if resume not in (None, "auto"):
        chosen = _load(Path(resume))
        if newest and state["step"] > chosen["step"]:
            raise ValueError(
                f"--resume {resume} is of step {chosen['step']}, but run.out={out} holds later ones, up to "
                f"{newest.name}: move those away, or choose another run.out"
            )
        return Path(resume), chosen
    for sentence in damaged:
        print(f"warning: {sentence}; passed over", file=sys.stderr)
    if damaged and newest is None:
        raise ValueError(f"run.out={out} holds damaged checkpoints only: restore one, or use another run.out")
    return newest, state


def _load(path: Path) -> dict[str, Any]:
    state = checkpoint.load(path)
    _check_state(path, state)
    return state


def _check_state(path: Path, state: dict[str, Any]) -> None:
    """Refuses what is no run's state; makes an older release's today's."""
    state.setdefault("probe", None)
    state.pop("seconds", None)  # that the run had taken
    odd = [k for k in state.keys() | STATE.keys() if type(state.get(k, ...)) not in STATE.get(k, ())]
    if not odd and state["step"] < 0:
        odd = ["step"]
    if odd:
        names = ", ".join(sorted(map(str, odd)))
        raise CheckpointError(f"checkpoint {path} holds no run's state; missing, unknown or odd: {names}")


def restore(path: Path, state: dict[str, Any], train_step: TrainStep, probe: OnlineProbe | None) -> None:
    """Puts a checkpoint's tensors into model, optimizer, scaler and probe; settings stay the config's.

    Args:
        path: the checkpoint, for messages.
        state: what it holds, with the keys of `STATE`.
        train_step: built with the config that the checkpoint names.
        probe: the online probe, if the run has one; it begins anew where the checkpoint holds none.

    Raises:
        CheckpointError: a tensor or a value of the scaler is missing, unknown, or of another shape or kind. Nothing
            was changed then.
    """
    model, optimizer = train_step.model, train_step.optimizer
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        found = {f"momentum of parameter {i}": state["momentum"][i]["momentum"] for i in state["momentum"]}
        scaler = dict(state["train_step"]["scaler"])
    except (LookupError, TypeError, ValueError):
        raise CheckpointError(
            f"checkpoint {path} holds no run's state: its momentum or scaler is none"
        ) from None
    largest = torch.finfo(torch.float32).max
    if not all(type(value) in (int, float) and 0 <= value <= largest for value in scaler.values()):
        raise CheckpointError(f"checkpoint {path} holds no run's state: its scaler is {scaler}")
    found |= {f"model.{name}": tensor for name, tensor in state["model"].items()}
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    now = train_step.state_dict()["scaler"]
    if now and scaler:  # empty where the run is not fp16, or was not until now
        found |= {f"scaler.{name}": value for name, value in scaler.items()}
        expected |= {f"scaler.{name}": value for name, value in now.items()}
    if state["momentum"]:  # none before the first step
        expected |= {f"momentum of parameter {i}": parameter for i, parameter in enumerate(parameters)}
    if probe and state["probe"]:
        found |= {f"probe.{name}": tensor for name, tensor in state["probe"].items()}
        for name, parameter in probe.head.named_parameters():
            expected[f"probe.{name}"] = parameter
            if state["momentum"]:
                expected[f"probe.momentum.{name}"] = parameter
    for name in sorted(found.keys() | expected.keys()):
        is_, should = _kind(found.get(name)), _kind(expected.get(name))
        if is_ != should:
            raise CheckpointError(
                f"checkpoint {path} does not fit this network: {name} is {is_}, it should be {should}"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict({"state": state["momentum"], "param_groups": groups})
    train_step.load_state_dict(state["train_step"])
    if probe and state["probe"]:
        probe.load_state_dict(state["probe"])


def _kind(value: object) -> str:
    """Shape and dtype of a tensor, type of another value; for comparing and for people."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided and not value.is_meta else "sparse or empty "
        return layout + f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
    return "not there" if value is None else f"of type {type(value).__name__}"
