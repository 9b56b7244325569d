"""Tells the formats of files of weights apart by their first bytes, without torch."""

from pathlib import Path

from byolt.files.paths import copy_first, is_url, without_secrets
from byolt.files.regular import open_regular

CHECKPOINT = b"byolt-checkpoint "
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80\x02"  # torch.save's format, and that before torch 1.6


def weights_kind(path: str | Path) -> str:
    """Returns "checkpoint" (of a run), "safetensors" or "pickle" (by torch.save) for a file of model.init_from.

    Raises:
        ValueError: the file does not exist, is not a regular file, cannot be read, or has another format.
    """
    named = f"model.init_from={without_secrets(str(path))}"
    if is_url(str(path)):
        raise ValueError(f"{named}: only local files are read: {copy_first(str(path))}")
    try:
        with open(path, "rb", opener=open_regular) as file:
            start = file.read(max(9, len(CHECKPOINT)))
    except IsADirectoryError:
        raise ValueError(
            f"{named} is a folder: name the encoder.safetensors or a checkpoint-*.pt in it"
        ) from None
    except OSError as error:
        raise ValueError(f"{named} cannot be read: {error.strerror}") from None
    if start.startswith(CHECKPOINT):
        return "checkpoint"
    if start[8:9] == b"{":
        return "safetensors"
    if start.startswith((_ZIP, _PICKLE)):
        return "pickle"
    raise ValueError(
        f"{named} is not a file of weights: name an encoder.safetensors or checkpoint-*.pt of a run, or a "
        "state_dict in safetensors or torch.save's format"
    )
