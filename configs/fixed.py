"""What may not change within a run, and how a change is told."""

from pathlib import Path
from typing import Any

from byolt.configs.schema import Config, complete

# Everything else (paths, threads, logging, precision) may, and how LARS is computed.
FIXED = ("run.seed", "data.order", "augment.", "model.", "optimizer.", "train.epochs", "train.batch_size",
         "train.accumulation", "data.fingerprint")  # fmt: skip
FREE = ("optimizer.backend",)


def check_allowed(config: Config, allowed: list[str]) -> None:
    """Refuses an --allow-change that cannot be meant.

    Raises:
        ValueError: a key is none that may be insisted on.
    """
    known = [key for key in [*_flatten(config.model_dump()), "data.fingerprint"] if _is_fixed(key)]
    for key in allowed:
        if key.startswith("model."):
            raise ValueError(
                f"--allow-change {key}: the weights of another network do not fit; begin a new run"
            )
        if key not in known:
            raise ValueError(f"--allow-change {key}: not one of {', '.join(known)}")


def check_same_run(
    config: Config, fingerprint: str, path: Path, state: dict[str, Any], allowed: list[str]
) -> None:
    """Refuses to continue a run with other settings than it was begun with.

    Args:
        config: the settings now.
        fingerprint: of the data set now.
        path: the checkpoint, for the message.
        state: what it holds.
        allowed: dotted keys that may differ.

    Raises:
        ValueError: settings differ; lists each with both values.
    """
    then = _flatten(complete(state["config"])) | {"data.fingerprint": state["data"]}
    now = _flatten(config.model_dump(mode="json")) | {"data.fingerprint": fingerprint}
    changed = [
        key
        for key in sorted(then.keys() | now.keys())
        if _is_fixed(key) and then.get(key) != now.get(key) and key not in allowed
    ]
    if changed:
        lines = [f"{key}: {then.get(key)} in the checkpoint, {now.get(key)} now" for key in changed]
        raise ValueError(
            f"{path} is from a run with other settings; restore them, or insist with --allow-change KEY:\n  "
            + "\n  ".join(lines)
        )


def _is_fixed(key: str) -> bool:
    return key.startswith(FIXED) and key not in FREE


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
