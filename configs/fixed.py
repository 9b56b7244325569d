"""Decides which settings a resumed run may change, and names those that it may not."""

import socket
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from byolt.configs.schema import Config, complete

# Everything else (paths, threads, logging, precision) may change, and so may the kernels of LARS.
FIXED = ("run.seed", "data.order", "augment.", "model.", "optimizer.", "train.epochs", "train.batch_size",
         "train.accumulation", "data.fingerprint")  # fmt: skip
FREE = ("optimizer.backend",)


def check_allowed(config: Config, allowed: list[str]) -> None:
    """Refuses --allow-change for a key that is unknown, needs no permission, or changes the network.

    Raises:
        ValueError: names the key and the valid ones.
    """
    known = [key for key in [*flatten(config.model_dump()), "data.fingerprint"] if _is_fixed(key)]
    known = [key for key in known if not key.startswith("model.")]
    for key in allowed:
        if key.startswith("model."):
            raise ValueError(
                f"--allow-change {key}: the weights of another network do not fit; begin a new run"
            )
        if key not in known:
            near = [name for name in known if name.endswith(f".{key}")] or get_close_matches(key, known, 1)
            meant = f"did you mean {near[0]}?" if near else f"not one of {', '.join(known)}"
            raise ValueError(f"--allow-change {key}: {meant}")


def check_same_run(
    config: Config, fingerprint: str, path: Path | str, state: dict[str, Any], allowed: list[str]
) -> None:
    """Refuses to continue a run with other settings or data than those in the state of its checkpoint.

    Raises:
        ValueError: settings differ whose dotted keys are not `allowed`; lists each with both values.
    """
    then = facts(complete(state["config"]), state["data"])
    now = facts(config.model_dump(mode="json"), fingerprint)
    changed = [key for key in _different(then, now) if _is_fixed(key) and key not in allowed]
    if changed:
        differences = [f"{key}: {then.get(key)} in the checkpoint, {now.get(key)} now" for key in changed]
        if "data.fingerprint" in changed:
            place = f"data.path={config.data.path} holds other images or labels than the run was trained on"
            differences[changed.index("data.fingerprint")] += f" ({place})"
        remedy = "restore them, or insist with --allow-change KEY"
        if any(key.startswith("model.") for key in changed):
            remedy = "restore them, or begin a new run (another network cannot continue it)"
        raise ValueError("\n  ".join([f"{path} is from a run with other settings; {remedy}:", *differences]))


def check_same_ranks(rank: int, here: dict[str, Any], main: dict[str, Any]) -> None:
    """Refuses a rank whose `facts` are not those of rank 0, as on a machine with an older copy.

    Raises:
        ValueError: they differ in more than paths and settings of this rank's own loader; lists each with both values.
    """
    own = {key for key in here if key.startswith("data.") and not _is_fixed(key)} | {"run.out", "eval.path"}
    differences = [
        f"{key}: {main.get(key)} on rank 0, {here.get(key)} here"
        for key in _different(here, main)
        if key not in own
    ]
    if differences:
        host = f"rank {rank} on {socket.gethostname()}"
        raise ValueError(
            "\n  ".join([f"{host} has other settings or images than rank 0; start all alike:", *differences])
        )


def facts(settings: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """The settings and the data set's fingerprint, by dotted key."""
    return flatten(settings) | {"data.fingerprint": fingerprint}


def _different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]


def _is_fixed(key: str) -> bool:
    return key.startswith(FIXED) and key not in FREE


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
