"""Loads and exports a trained encoder: from a checkpoint, or as encoder.safetensors; initializes one from either."""

import hashlib
import zipfile
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from byolt.configs import schema
from byolt.files.atomic import sha256_of
from byolt.files.console import shown
from byolt.files.regular import open_regular
from byolt.files.weights import weights_kind
from byolt.model.resnet import make_encoder
from byolt.model.run import checkpoint
from byolt.model.timm_networks import fit_positions


class Trained(NamedTuple):
    """The online encoder of a run."""

    path: Path  # the file
    encoder: nn.Module  # on the CPU, in eval mode
    config: schema.Config  # of the run
    step: int  # optimizer steps done
    # sha256 of the encoder's weights: the same for a checkpoint and for the encoder exported from it. The digest that a
    # run prints covers its whole state and is another number.
    digest: str


def export_trained(path: Path, encoder: nn.Module, config: schema.Config, step: int) -> None:
    """Writes the online encoder after `step` steps as safetensors; its header has all that `load_trained` needs."""
    metadata = {
        "format": "pt",  # transformers refuses a file without it
        "backbone": config.model.backbone,
        "stem": config.model.stem,
        "steps": str(step),
        "config": schema.to_yaml(config),
    }
    state_dict = encoder.state_dict()
    checkpoint.export_encoder(path, state_dict, metadata | {"sha256": _seal(state_dict, metadata)})


def load_trained(path: str | Path) -> Trained:
    """Reads the online encoder.

    Args:
        path: a checkpoint-*.pt, an encoder.safetensors, or a run's folder, of which the newest encoder is read.

    Raises:
        CheckpointError: the file is neither, is damaged, or has settings that this version does not know; the folder
            holds no encoder that can be read.
    """
    path = Path(path)
    if path.is_dir():
        trained, problems = newest_trained(path)
        if trained is None:
            reason = "; ".join(problems) or "it holds neither encoder.safetensors nor a checkpoint-*.pt"
            raise checkpoint.CheckpointError(f"{path} has no encoder: {reason}")
        return trained
    state_dict, step, config = _read_exported(path) if _is_exported(path) else _read_checkpoint(path)
    if not 0 <= step < 2**63:
        raise checkpoint.CheckpointError(
            f"{path} claims to be of step {shorten(str(step), 30)}: it is damaged"
        )
    try:
        encoder = make_encoder(config.model.backbone, config.model.stem, config.augment.size)
    except ValueError as error:  # of a model of timm
        raise checkpoint.CheckpointError(f"{path} cannot be loaded: {error}") from None
    try:
        encoder.load_state_dict(state_dict)
    except RuntimeError as error:
        reason = shorten(str(error), 300)  # torch names every key, a line each
        raise checkpoint.CheckpointError(f"{path} does not fit its own config: {reason}") from None
    return Trained(path, encoder.eval(), config, step, weights_digest(encoder.state_dict()))


def _is_exported(path: Path) -> bool:
    """By its first bytes, if they are known; else by its name."""
    try:
        return weights_kind(path) == "safetensors"
    except ValueError:
        return path.suffix == ".safetensors"


def newest_trained(folder: Path) -> tuple[Trained | None, list[str]]:
    """Reads a run's exported encoder, or that of a later checkpoint, if the run was continued.

    Returns:
        The encoder, None if no file can be read; one sentence for each file that was skipped.
    """
    skipped: list[str] = []

    def read(path: Path) -> Trained | None:
        try:
            return load_trained(path)
        except checkpoint.CheckpointError as error:
            skipped.append(str(error))
            return None

    exported = folder / "encoder.safetensors"
    found = read(exported) if exported.exists() else None
    for path in checkpoint.newest_first(folder):
        if found and checkpoint.step_of(path) <= found.step:
            break
        if later := read(path):
            return later, skipped
    return found, skipped


_HEADS = ("fc", "classifier", "head")  # classifiers of torchvision and timm


@torch.no_grad()
def initialize(encoder: nn.Module, path: str) -> tuple[dict[str, str], str]:
    """Overwrites an encoder's parameters and buffers in place by those of a file. It executes nothing from the file.

    Args:
        encoder: on any device.
        path: model.init_from: an encoder.safetensors, a checkpoint, or a state_dict of torchvision or timm, in
            safetensors or torch.save's format, maybe under the key "state_dict" or "model".

    Returns:
        {"path": path, "sha256": of the file, in hex}, and one sentence about tensors that were left out, or "".

    Raises:
        ValueError: the file is not one of weights.
        CheckpointError: it is damaged or of another network; lists the names that do not fit. Nothing was changed then.
    """
    kind = weights_kind(path)
    origin = {"path": path, "sha256": sha256_of(Path(path))}
    try:
        found, of = (_read_pickle(path), "") if kind == "pickle" else _read_weights(Path(path), kind)
    except checkpoint.CheckpointError as error:
        problem = str(error).removeprefix("checkpoint ")  # begins with the path
        raise checkpoint.CheckpointError(f"model.init_from={problem}") from None
    expected = encoder.state_dict()
    found = fit_positions(encoder, found)
    heads = {name for name in found.keys() - expected.keys() if name.split(".")[0] in _HEADS}
    modules = {name.split(".")[0] for name in expected}
    counters = {name for name in expected if name.endswith(".num_batches_tracked")}  # old files have none
    wrong = [f"{name} is missing" for name in expected if name not in found.keys() | counters]
    others = [name for name in found if name not in expected.keys() | heads]
    wrong += [f"{name} is unexpected" for name in others if name.split(".")[0] in modules]
    both = {name: value.to(expected[name].dtype) for name, value in found.items() if name in expected}
    for name, value in both.items():
        if value.shape != expected[name].shape:
            wrong.append(f"{name} is {tuple(value.shape)} instead of {tuple(expected[name].shape)}")
        elif expected[name].is_floating_point() and not found[name].is_floating_point():
            wrong.append(
                f"{name} is {str(found[name].dtype).removeprefix('torch.')} instead of floating point"
            )
        elif name.endswith(".running_var") and (value < 0).any():
            wrong.append(f"{name} is negative")
        elif not value.isfinite().all():
            wrong.append(f"{name} is not finite")
    if wrong:
        named = "" if both else f"; its names: {shown(list(found)[:2]) or 'none'}"  # perhaps with a prefix
        raise checkpoint.CheckpointError(
            f"model.init_from={path}{of} does not fit model.backbone and model.stem: {shown(wrong)}{named}"
        )
    for name, value in both.items():
        expected[name].copy_(value)  # shares the encoder's memory
    left = [*sorted(heads), *(name for name in others if name.split(".")[0] not in modules)]
    return origin, f"model.init_from={path}: left out {shown(left)}" if left else ""


def _read_weights(path: Path, kind: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of the encoder in a checkpoint or a safetensors file, and its network if a run wrote them."""
    if kind == "safetensors":
        tensors, metadata = _read_safetensors(path)
        if "config" not in metadata:
            return tensors, ""
    trained = load_trained(path)
    model = trained.config.model
    return trained.encoder.state_dict(), f" (model.backbone={model.backbone} model.stem={model.stem})"


def _read_pickle(path: str) -> dict[str, Tensor]:
    """The state_dict in a file of torch.save."""
    with open(path, "rb", opener=open_regular) as file:
        try:
            if zipfile.is_zipfile(file):
                checkpoint.check_entries(file)
            file.seek(0)
            found: Any = torch.load(file, map_location="cpu", weights_only=True)
        except (
            Exception
        ) as error:  # torch's reader raises many kinds; its advice is to execute what the file says
            reason = (
                shorten(str(error), 80)
                if isinstance(error, OSError)
                else "it is damaged or holds more than tensors"
            )
            raise checkpoint.CheckpointError(
                f"{path} cannot be loaded: {reason}; save the network's state_dict() as safetensors"
            ) from None
    for key in ("state_dict", "model"):
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    if not isinstance(found, dict) or not all(map(_is_plain, found.values())):
        raise checkpoint.CheckpointError(f"{path} is not a state_dict: it holds more than tensors")
    return {str(name): value for name, value in found.items()}


def _is_plain(value: object) -> bool:
    """Whether it is a tensor of real numbers that has a memory of its own."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_meta or value.is_complex() or value.is_quantized)


def weights_digest(state_dict: dict[str, Tensor]) -> str:
    """sha256, in hex, of names, types, shapes and values in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().tobytes())  # NumPy has no bfloat16 and no float8
    return digest.hexdigest()


def _seal(state_dict: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """sha256, in hex, of the tensors and of the header's strings; safetensors itself notices no flipped bit."""
    return hashlib.sha256(repr((weights_digest(state_dict), sorted(metadata.items()))).encode()).hexdigest()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and the header's strings, which match the sha256 among them, if there is one."""
    try:
        with open(path, opener=open_regular), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise checkpoint.CheckpointError(f"{path} cannot be read: {error}") from None
    sha256 = metadata.pop("sha256", None)  # absent from files of others
    if sha256 and sha256 != _seal(state_dict, metadata):
        raise checkpoint.CheckpointError(f"{path} is damaged: its content does not match its sha256")
    return state_dict, metadata


def _read_exported(path: Path) -> tuple[dict[str, Tensor], int, schema.Config]:
    state_dict, metadata = _read_safetensors(path)
    try:
        return state_dict, int(metadata["steps"]), schema.from_yaml(metadata["config"])
    except KeyError as error:
        raise checkpoint.CheckpointError(
            f"{path} has no {error} in its header: use the encoder.safetensors that train.py wrote, or a checkpoint"
        ) from None
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{path}: its config cannot be used: {error}") from None


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], int, schema.Config]:
    state = checkpoint.load(path)
    prefix = "online.encoder."
    try:
        encoder = {k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)}
        return encoder, int(state["step"]), schema.from_settings(state["config"])
    except KeyError as error:
        raise checkpoint.CheckpointError(f"{path} holds no {error}: it is not a run's checkpoint") from None
    except (AttributeError, OverflowError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{path} is not a run's checkpoint: {error}") from None
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{path}: its config cannot be used: {error}") from None
