"""What a report reads: the files that a run left, finished or not, and the features of a sample of images."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from yaml import YAMLError, safe_load

from configs import schema
from model import checkpoint, provenance
from model.byol import make_encoder
from model.evaluate import extract_features
from model.metrics import read_rows
from pipelines.plain import plain_images
from pipelines.sources import Source

_THUMBNAIL = 96  # pixels; larger images are shrunk, so that 2,000 take 55 MB
_ENCODER = "online.encoder."


class Run(NamedTuple):
    """A run's files, as far as they are there."""

    folder: Path
    rows: list[dict[str, Any]]  # of metrics.jsonl, by step
    starts: list[dict[str, Any]]
    corrupt: list[dict[str, Any]]  # of corrupt.jsonl, one an image
    config: schema.Config | None
    encoder: nn.Module | None
    encoder_origin: str  # file and step
    problems: list[str]  # sentences about files that are damaged

    @property
    def step(self) -> int:
        """Last logged step."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def images(self) -> int | None:
        """Training images, from the rows: epoch = step * batch / images."""
        row = next((row for row in reversed(self.rows) if row.get("epoch")), None)
        if row is None or self.config is None:
            return None
        return round(row["step"] * self.config.train.batch_size / row["epoch"])

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole schedule."""
        return self.config.total_steps(self.images) if self.config and self.images else None

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of one column."""
        return [(row["step"], row[key]) for row in self.rows if isinstance(row.get(key), (int, float))]

    def last(self, key: str) -> float | None:
        """Newest value of one column."""
        return next((value for _, value in reversed(self.series(key))), None)


class Sample(NamedTuple):
    """Images through the encoder."""

    features: Tensor  # (N, F) float32 on the CPU
    labels: np.ndarray  # (N,) int64, -1 where unknown
    thumbnails: list[np.ndarray]  # (h, w, 3) uint8 each, as the encoder saw them but for shrinking
    classes: list[str] | None
    asked: int  # images tried; N is less where some do not decode

    def name(self, label: int) -> str:
        """Of a class."""
        if label < 0:
            return "no label"
        return self.classes[label] if self.classes and label < len(self.classes) else str(label)


def read_run(folder: Path) -> Run:
    """Collects a run's files.

    Raises:
        ValueError: the folder is not there, or no run of train.py has left anything in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name the run.out of a run")
    problems: list[str] = []
    rows = [row for row in read_rows(folder / "metrics.jsonl") if isinstance(row["step"], int)]
    rows.sort(key=lambda row: row["step"])
    starts = provenance.read_starts(folder)
    settings, weights, backbone, origin = _newest_encoder(folder, problems)
    if not (rows or starts or origin or problems):
        raise ValueError(f"{folder} holds neither metrics.jsonl nor a checkpoint; name the run.out of a run")
    if not settings and starts:
        settings = starts[-1].get("config") or {}
    config = None
    if settings:
        try:
            config = schema.Config.model_validate(settings)
        except ValueError as error:
            problems.append(f"The run's settings are not those of this version: {error}")
    encoder = None
    if weights:
        encoder = make_encoder(*backbone)
        encoder.load_state_dict(weights)
    corrupt = list({row["id"]: row for row in _json_lines(folder / "corrupt.jsonl") if "id" in row}.values())
    return Run(folder, rows, starts, corrupt, config, encoder, origin, problems)


def _newest_encoder(
    folder: Path, problems: list[str]
) -> tuple[dict[str, Any], dict[str, Tensor], tuple[str, str], str]:
    """Settings, weights, (backbone, stem) and where they are from; all empty if there is no encoder.

    The exported one, unless a checkpoint of a later step is there: the run was continued.
    """
    exported = folder / "encoder.safetensors"
    steps = [int(path.stem.rpartition("-")[2]) for path in folder.glob("checkpoint-*[0-9].pt")]
    if exported.exists():
        try:
            with safe_open(exported, framework="pt") as file:
                about = file.metadata() or {}
                step = int(about["steps"])
                if step >= max(steps, default=0):
                    weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                    origin = f"{exported.name}, step {step}"
                    return safe_load(about["config"]), weights, (about["backbone"], about["stem"]), origin
        except (SafetensorError, OSError, KeyError, ValueError, YAMLError) as error:
            problems.append(
                f"{exported.name} cannot be read ({error}); a checkpoint is used if there is one."
            )
    path, state, damaged = checkpoint.load_newest(folder)
    problems += [f"{sentence}; passed over." for sentence in damaged]
    if path is None:
        return {}, {}, ("", ""), ""
    weights = {k.removeprefix(_ENCODER): v for k, v in state["model"].items() if k.startswith(_ENCODER)}
    model = state["config"]["model"]
    return state["config"], weights, (model["backbone"], model["stem"]), f"{path.name}, step {state['step']}"


def take_sample(run: Run, source: Source, images: int) -> Sample:
    """Features of evenly spaced images of a data set, on the GPU if there is one.

    Args:
        run: with config and encoder.
        source: labelled or not.
        images: at most so many.

    Raises:
        ValueError: none of the images can be decoded.
    """
    assert run.config and run.encoder
    ids = np.linspace(0, len(source), min(images, len(source)), endpoint=False).astype(np.int64)
    thumbnails: list[np.ndarray] = []
    batches = _keeping_thumbnails(plain_images(source, ids, run.config), run.config, thumbnails)
    encoder = run.encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    features, labels = extract_features(encoder, batches)
    return Sample(features.cpu(), labels.cpu().numpy(), thumbnails, source.classes, len(ids))


def _keeping_thumbnails(
    batches: Iterator[tuple[Tensor, Tensor]], config: schema.Config, thumbnails: list[np.ndarray]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Passes the batches through and appends a small picture of each image."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.augment.mean, config.augment.std))
    for images, labels in batches:
        pixels = (images * std + mean).clamp(0, 1)
        if config.augment.size > _THUMBNAIL:
            pixels = F.interpolate(pixels, size=_THUMBNAIL, mode="area")
        thumbnails += list((pixels * 255).round().byte().permute(0, 2, 3, 1).numpy())
        yield images, labels


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; what is none, such as a last line that was cut short, is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found
