"""Writes and reads checkpoints, and writes the exported encoder.

A checkpoint is one file: a header line with the sha256 of the rest, then torch's own format. It is written to a
temporary file, fsynced and renamed, so every checkpoint-*.pt was finished; the hash detects later damage (torch.load
alone accepted 300 of 300 single-bit flips).
"""

import hashlib
import io
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from byolt.files import failpoint
from byolt.files.atomic import remove_leftovers, replacing
from byolt.files.regular import open_regular
from byolt.files.weights import CHECKPOINT

VERSION = 1
_MAGIC = CHECKPOINT + b"%d sha256 " % VERSION
_NAME = re.compile(r"checkpoint-(\d{9})\.pt")
_HEADER_BYTES = len(_MAGIC) + 64 + 1


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message names the file and says why."""


class _Hashing:
    """A file for torch.save that hashes the data written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256, self._writes = file, hashlib.sha256(), 0
        self.failed: OSError | None = None  # torch.save raises a RuntimeError instead

    def write(self, data: bytes) -> int:
        try:
            failpoint.reach("checkpoint write", self._writes)
            self._writes += 1
            self.sha256.update(data)
            return self._file.write(data)
        except OSError as error:
            self.failed = error
            raise

    def flush(self) -> None:
        self._file.flush()


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes a checkpoint; removes all but the newest `keep`, and the temporary files of a killed run.

    Args:
        folder: of the checkpoints.
        step: optimizer steps done, part of the name.
        state: tensors, numbers, strings and containers of them.
        keep: number of checkpoints to keep, >= 1.

    Raises:
        OSError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    path = folder / f"checkpoint-{step:09d}.pt"
    remove_leftovers(folder, "checkpoint-*")
    write(path, state)
    for old in newest_first(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def write(path: Path, state: dict[str, Any]) -> None:
    """Writes one checkpoint completely or not at all; see `save`."""
    with replacing(path) as temporary:
        body: _Hashing | None = None
        try:
            with temporary.open("wb") as file:
                file.write(b"\0" * _HEADER_BYTES)
                body = _Hashing(file)
                torch.save(state, cast(BinaryIO, body))
                file.seek(0)
                file.write(_MAGIC + body.sha256.hexdigest().encode() + b"\n")
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else body and body.failed
            if not cause:  # an error of the device, for example: not the disk's
                raise
            free = shutil.disk_usage(path.parent).free / 1e6 if path.parent.is_dir() else 0
            raise OSError(
                f"checkpoint {path} cannot be written, {free:.0f} MB are free; free some space, or lower "
                f"run.keep_checkpoints ({cause})"
            ) from cause


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU. It executes nothing from the file.

    Raises:
        CheckpointError: the file does not exist, is not a checkpoint, has another version, is damaged, or has the
            name of another step.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            header = file.read(_HEADER_BYTES)
            version = re.match(re.escape(CHECKPOINT) + rb"(\d{1,9}) ", header)
            if version and int(version[1]) != VERSION:
                raise CheckpointError(
                    f"checkpoint {path} has version {int(version[1])}, this release reads {VERSION}: continue it with "
                    "the release that wrote it"
                )
            if not header.startswith(_MAGIC) or len(header) < _HEADER_BYTES:
                raise CheckpointError(
                    f"checkpoint {path} is not a byolt checkpoint (checkpoint-*.pt of a run), or its header is damaged"
                )
            data = file.read()
            if hashlib.sha256(data).hexdigest().encode() != header[len(_MAGIC) : -1]:
                raise CheckpointError(f"checkpoint {path} is damaged: its bytes do not match its sha256")
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or error or "not enough memory"
        raise CheckpointError(f"checkpoint {path} cannot be read: {reason}") from None
    try:
        body = io.BytesIO(data)
        check_entries(body)
        state = torch.load(body, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises many kinds on foreign bytes with a valid sha256
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {path} is malformed: a {type(state).__name__} instead of a dict")
    named, step = _NAME.fullmatch(path.name), state.get("step")
    if named and isinstance(step, int) and step != int(named[1]):
        raise CheckpointError(f"checkpoint {path} was renamed: it is of step {step}, give it that name again")
    return state


def check_entries(body: BinaryIO) -> None:
    """Refuses an archive that unpacks to more than its size: torch stores entries without compression."""
    with zipfile.ZipFile(body) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > body.seek(0, os.SEEK_END):
        raise ValueError(f"its entries claim {size:,} bytes, more than the file has")
    body.seek(0)


def load_newest(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Loads the newest checkpoint that is not damaged.

    Returns:
        Its path (None if there is none), its state, and one sentence for each damaged checkpoint skipped.
    """
    damaged: list[str] = []
    for path in newest_first(folder):
        try:
            return path, load(path), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, {}, damaged


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder, those of later steps first."""
    return sorted((p for p in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(p.name)), reverse=True)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint; -1 for another file."""
    named = _NAME.fullmatch(path.name)
    return int(named[1]) if named else -1


def export_encoder(path: Path, state_dict: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes an encoder as safetensors, completely or not at all.

    Args:
        path: the file.
        state_dict: tensors by torchvision's keys, without the classifier.
        metadata: strings for the file's header.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(to_safetensors(tensors, metadata))
