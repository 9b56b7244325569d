"""Finds the checkpoint from which a run continues, and restores its state."""

import importlib.util
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from byolt.configs import derived, fixed
from byolt.configs.schema import Config
from byolt.files.console import say, shown
from byolt.files.lock import Lock
from byolt.files.rows import read_rows
from byolt.files.storage.mirror import Mirror
from byolt.files.storage.retry import OutageError, RemoteError
from byolt.model import distributed
from byolt.model.distributed import World
from byolt.model.quality.probe import OnlineProbe
from byolt.model.run import checkpoint, provenance
from byolt.model.run.checkpoint import CheckpointError
from byolt.model.run.trained import initialize
from byolt.model.step import TrainStep

_PATIENCE = 0.5  # minutes to wait for a mirror from which the run need not continue
STATE: dict[str, tuple[type, ...]] = {  # keys of a checkpoint and the types of their values
    "step": (int,),
    "model": (dict, OrderedDict),
    "momentum": (dict,),
    "train_step": (dict,),
    "probe": (dict, type(None)),
    "config": (dict,),
    "data": (str,),
    "knn_untrained": (float, type(None)),
    "rounding": (dict,),
    "init_from": (dict, type(None)),
}


class DataSet(Protocol):
    """What identifies the images and labels: see `pipelines.sources.Source`."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def former_fingerprints(self) -> Sequence[str]: ...


class Start(NamedTuple):
    """The point from which a run continues."""

    path: Path | None  # the checkpoint; None for a new run
    step: int  # steps done
    knn_untrained: float | None  # kNN top-1 of the encoder before its first step, in percent
    changed: list[str]  # what rounds otherwise than before: the digest will differ from that of one whole run
    origin: str = "new run"  # for a message
    init_from: dict[str, str] | None = None  # path and sha256 of the file with which the encoder began


def begin(
    resume: str | None,
    config: Config,
    source: DataSet,
    allowed: list[str],
    train_step: TrainStep,
    probe: OnlineProbe | None,
    world: World,
    rounding: dict[str, str | int | bool],
) -> Start:
    """Finds the checkpoint to continue from, checks that it is of this run, and restores its state.

    Args:
        resume: None for a new run, "auto" for the newest checkpoint in run.out, or the path of one.
        config: the settings now.
        source: the data set now.
        allowed: dotted keys of settings that may differ from the checkpoint's.
        train_step: built with the config; its model and optimizer are restored too.
        probe: the online probe, if the run has one.
        world: the processes; rank 0 chooses for all.
        rounding: what decides how sums are rounded now (`provenance.rounding_of`).

    Raises:
        ValueError: a new run would overwrite checkpoints, all of them are damaged, or settings differ from the
            checkpoint's or from rank 0's.
        CheckpointError: the checkpoint cannot be used.
    """
    facts = fixed.facts(config.model_dump(mode="json"), source.fingerprint)
    fixed.check_same_ranks(world.rank, facts, distributed.broadcast_object(facts, world))
    path, state = find_checkpoint(Path(config.run.out), resume, world)
    if path is None:
        places = " or ".join(filter(None, (config.run.out, config.run.mirror)))
        origin = f"new run (no checkpoint in {places})" if resume else "new run"
        return Start(None, 0, None, [], origin, _initialize(config.model.init_from, train_step, world))
    fingerprint, origin = source.fingerprint, f"resumed from {path}"
    if state["data"] != fingerprint and state["data"] in source.former_fingerprints:
        fingerprint = state["data"]
        origin += (
            " (its fingerprint of the data does not cover every image, so not all of them were compared)"
        )
    fixed.check_same_run(config, fingerprint, path, state, allowed)
    restore(path, state, train_step, probe)
    then = state["rounding"]
    changed = [f"{key}: {then[key]} -> {now}" for key, now in rounding.items() if then.get(key, now) != now]
    return Start(path, state["step"], state["knn_untrained"], changed, origin, state["init_from"])


def _initialize(path: str | None, train_step: TrainStep, world: World) -> dict[str, str] | None:
    """Loads model.init_from into the encoders of both networks, on all ranks; returns `Start.init_from`."""
    if path is None:
        return None
    online, target = train_step.model.online.encoder, train_step.model.target.encoder
    found, note = distributed.on_main(lambda: initialize(online, path), world)
    distributed.broadcast_module(online, world)
    target.load_state_dict(online.state_dict())
    if note and world.is_main:
        say(note)
    return found


def open_mirror(
    config: Config, resume: str | None, allowed: list[str], source: DataSet, lock: Lock, world: World
) -> Mirror | None:
    """Opens run.mirror on rank 0. With --resume auto, fetches its newest whole checkpoint if run.out has none as new.

    Settings may be "auto"; `lock` is that of run.out, to which files are fetched. See `begin` for the others.

    Returns:
        None without run.mirror, and on other ranks.

    Raises:
        ValueError: obstore is not installed; the store refuses requests; it does not answer, and run.out has no
            checkpoint; or the mirror is of another run, or holds later checkpoints than the one to continue from, or
            only damaged ones; or run.out cannot be written.
    """
    url = config.run.mirror
    if url is None:
        return None
    warn = partial(say, file=sys.stderr)
    minutes, keep = config.data.remote_minutes, config.run.keep_checkpoints
    mirror = Mirror(Path(config.run.out), url, minutes, keep, warn)
    distributed.on_main(lambda: _fetch(mirror, config, resume, allowed, source, lock), world)
    return mirror if world.is_main else None


def _fetch(
    mirror: Mirror, config: Config, resume: str | None, allowed: list[str], source: DataSet, lock: Lock
) -> None:
    out = Path(config.run.out)
    if importlib.util.find_spec("obstore") is None:
        raise ValueError(f"run.mirror={mirror.url} needs the library obstore: pip install -e '.[remote]'")
    local = checkpoint.load_newest(out)[0] if resume == "auto" else Path(resume) if resume else None
    is_needed = resume == "auto" and local is None
    try:
        names = mirror.checkpoints(math.inf if is_needed else _PATIENCE)
        if resume and names:
            _check_same_run(mirror, config, allowed, source)
        for name in names if resume == "auto" else ():
            if local and name <= local.name:
                return
            if note := lock.take():
                say(f"warning: {note}", file=sys.stderr)
            try:
                mirror.fetch(name, checkpoint.load)
            except CheckpointError as error:
                reason = re.sub(r"^checkpoint \S+", f"{mirror.url}/{name}", str(error))
                say(f"warning: {reason}; skipped", file=sys.stderr)
            else:
                say(f"run.mirror={mirror.url}: fetched {name}", file=sys.stderr)
                return
    except OutageError as error:
        if is_needed:
            raise ValueError(
                f"run.mirror={mirror.url} may hold checkpoints of this run, and run.out={out} has none: {error}; "
                "without run.mirror a new run begins"
            ) from None
        say(
            f"warning: run.mirror={mirror.url}: {error}; tried again after the next checkpoint",
            file=sys.stderr,
        )
        return
    except InterruptedError:
        raise
    except RemoteError as error:
        raise ValueError(f"run.mirror={mirror.url}: {error}") from None
    except OSError as error:
        raise ValueError(
            f"run.mirror={mirror.url} cannot be copied to run.out={out}: {error.strerror or error}"
        ) from None
    if is_needed and names:
        raise ValueError(f"run.mirror={mirror.url} holds only damaged checkpoints: choose another run.mirror")
    latest = _load(local)["step"] if local and resume != "auto" else -1
    if resume != "auto" and names and checkpoint.step_of(Path(names[0])) > latest:
        raise ValueError(
            f"run.mirror={mirror.url} holds {'later' if resume else 'the'} checkpoints of an earlier run, up to "
            f"{names[0]}: add --resume auto to continue it, or choose another run.mirror"
        )


def _check_same_run(mirror: Mirror, config: Config, allowed: list[str], source: DataSet) -> None:
    """Refuses the mirror of another run: its files would replace those of this one, or would be replaced.

    One start of this run is enough: settings may have been changed since, or tried in vain.
    """
    refused: ValueError | None = None
    for row in reversed(read_rows(mirror.read(provenance.FILE), config=dict)):
        data = row.get("data", source.fingerprint)
        now = data if data in source.former_fingerprints else source.fingerprint
        state, free = {"config": row["config"], "data": data}, [*allowed, *config.undecided]
        try:
            fixed.check_same_run(config, now, f"run.mirror={mirror.url}", state, free)
        except ValueError as error:
            refused = refused or error
        else:
            return
    if refused:
        raise refused


def settle(config: Config, resume: str | None, num_images: int, world: World) -> Config:
    """Puts values in the place of "auto", the same on every rank, and checks that an epoch has enough steps.

    A run that continues keeps the values of its checkpoint, on any machine.

    Raises:
        ValueError: the settings do not fit together, or the run would have no step.
        CheckpointError: the checkpoint named by `resume` cannot be used.
    """
    device = provenance.device_of(world.device)

    def decide() -> dict[str, Any]:
        path, state = None if resume in (None, "auto") else Path(resume), {}
        if path:
            state = _load(path)
        elif resume == "auto":
            path, state, _ = checkpoint.load_newest(Path(config.run.out))
            if path:
                _check_state(path, state)
        decided = derived.decide(config, num_images, device, world.size, state.get("config"))
        values = fixed.flatten(decided.model_dump())
        chosen = " ".join(f"{key}={values[key]}" for key in config.undecided)
        say(f"auto, {f'as in {path}' if path else 'for these images and this device'}: {chosen}", sys.stderr)
        return decided.model_dump(mode="json")

    if config.undecided:
        values = distributed.on_main(decide, world)
        config = derived.decide(config, num_images, device, world.size, values)
        config.check_ranks(world.size)
    config.check_steps(num_images)
    return config


def find_checkpoint(out: Path, resume: str | None, world: World) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to continue from, with the keys of `STATE`; (None, {}) for a new run. Errors: see `begin`."""
    state: dict[str, Any] = {}

    def choose() -> Path | None:
        path, found = _choose(out, resume)
        state.update(found)
        return path

    path = distributed.on_main(choose, world)
    if path and not world.is_main:
        state = _load(path)  # fails with the file's name if the ranks do not share run.out
    return path, state


def _choose(out: Path, resume: str | None) -> tuple[Path | None, dict[str, Any]]:
    newest, state, damaged = checkpoint.load_newest(out)
    if resume is None and (newest or damaged):
        raise ValueError(
            f"run.out={out} holds checkpoints of an earlier run: add --resume auto to continue it, or choose "
            "another run.out"
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
        say(f"warning: {sentence}; skipped", file=sys.stderr)
    if damaged and newest is None:
        raise ValueError(
            f"run.out={out} holds only damaged checkpoints: restore one, or choose another run.out"
        )
    return newest, state


def _load(path: Path) -> dict[str, Any]:
    state = checkpoint.load(path)
    _check_state(path, state)
    return state


def _check_state(path: Path, state: dict[str, Any]) -> None:
    """Refuses a malformed state; converts one of an older release."""
    state.setdefault("probe", None)
    state.setdefault("rounding", {})
    state.setdefault("init_from", None)
    state.pop("seconds", None)  # the run's duration
    wrong = [k for k in state.keys() | STATE.keys() if type(state.get(k, ...)) not in STATE.get(k, ())]
    if not wrong and state["step"] < 0:
        wrong = ["step"]
    if not wrong and not all(isinstance(x, str | int) for item in state["rounding"].items() for x in item):
        wrong = ["rounding"]
    origin = state["init_from"]
    sound = not origin or (origin.keys() == {"path", "sha256"} and {*map(type, origin.values())} == {str})
    if not wrong and not sound:
        wrong = ["init_from"]
    if wrong:
        names = shown(sorted(map(str, wrong)))
        raise CheckpointError(
            f"checkpoint {path} is malformed: missing, unexpected or wrongly typed keys: {names}"
        )


def restore(path: Path, state: dict[str, Any], train_step: TrainStep, probe: OnlineProbe | None) -> None:
    """Loads a checkpoint's tensors into model, optimizer, scaler and probe; settings stay the config's.

    Args:
        path: the checkpoint, for messages.
        state: its content, with the keys of `STATE`.
        train_step: built with the config that the checkpoint names.
        probe: the online probe, if the run has one; it begins anew if the checkpoint has none.

    Raises:
        CheckpointError: a tensor or a value of the scaler is absent, unexpected, or of another shape or type. Nothing
            was changed then.
    """
    model, optimizer = train_step.model, train_step.optimizer
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        momenta = {i: entry["momentum"] for i, entry in state["momentum"].items()}
        scaler = dict(state["train_step"]["scaler"])
    except (LookupError, TypeError, ValueError):
        raise CheckpointError(f"checkpoint {path} is malformed: its momentum or scaler") from None
    largest = torch.finfo(torch.float32).max
    if not all(type(value) in (int, float) and 0 <= value <= largest for value in scaler.values()):
        raise CheckpointError(f"checkpoint {path} is malformed: its scaler is {scaler}")
    expected_momenta = dict(enumerate(parameters)) if momenta else {}  # none before the first step
    _check_fit(path, "momentum of parameter ", momenta, expected_momenta)
    _check_fit(path, "model.", state["model"], model.state_dict())
    expected_scaler = train_step.state_dict()["scaler"]
    if expected_scaler and scaler:  # empty unless the run is, and was, fp16
        _check_fit(path, "scaler.", scaler, expected_scaler)
    if probe and state["probe"]:
        head = dict(probe.head.named_parameters())
        with_momentum = head | {f"momentum.{name}": parameter for name, parameter in head.items()}
        _check_fit(path, "probe.", state["probe"], with_momentum if momenta else head)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict({"state": state["momentum"], "param_groups": groups})
    train_step.load_state_dict(state["train_step"])
    if probe and state["probe"]:
        probe.load_state_dict(state["probe"])


def _check_fit(path: Path, prefix: str, found: dict[Any, Any], expected: dict[Any, Any]) -> None:
    """Refuses entries that are absent, unexpected, or of another shape or type."""
    for key in sorted(found.keys() | expected.keys(), key=str):
        actual, required = _kind(found.get(key)), _kind(expected.get(key))
        if actual != required:
            raise CheckpointError(
                f"checkpoint {path} does not fit this network: {prefix}{key} is {actual}, but must be {required}"
            )


def _kind(value: object) -> str:
    """Dtype and shape of a tensor, or the type of another value."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided and not value.is_meta else "sparse or empty "
        return layout + f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
    return "absent" if value is None else f"of type {type(value).__name__}"
