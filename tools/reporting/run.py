"""Reads the files of a run, finished or not, and computes features of images for its report."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from byolt.configs import schema
from byolt.files.console import shown
from byolt.files.rows import read_metrics, read_rows, unread_lines
from byolt.model.quality.features import extract_features
from byolt.model.run import provenance
from byolt.model.run.trained import Trained, newest_trained
from byolt.pipelines.plain import plain_images
from byolt.pipelines.sources import Source
from byolt.pipelines.subset import file_names, spaced

_METRICS, _CORRUPT = "metrics.jsonl", "corrupt.jsonl"
_THUMBNAIL = 96  # pixels; larger images are shrunk: 2,000 thumbnails take 55 MB of memory


class RunFiles(NamedTuple):
    """The files of a run; those that are missing are empty or None."""

    folder: Path
    rows: list[dict[str, float]]  # of metrics.jsonl, by step
    starts: list[dict[str, Any]]
    corrupt: list[dict[str, Any]]  # of corrupt.jsonl, one row per image
    config: schema.Config | None
    trained: Trained | None  # the newest encoder
    problems: list[str]  # sentences about damaged files

    @property
    def step(self) -> int:
        """Last logged step."""
        return int(max((row["step"] for row in self.rows), default=0))

    @property
    def encoder_origin(self) -> str:
        """File name and step of the encoder."""
        return f"{self.trained.path.name}, step {self.trained.step}" if self.trained else ""

    @property
    def images(self) -> int | None:
        """Number of training images; None if unknown."""
        return training_images(self.rows, self.config.train.batch_size) if self.config else None

    @property
    def total_steps(self) -> int | None:
        """Number of steps of the whole schedule."""
        return self.config.total_steps(self.images) if self.config and self.images else None

    @property
    def progress(self) -> str:
        """The last step, that of the whole schedule, and whether the run is finished."""
        total, config = self.total_steps, self.config
        if not total or not config:
            return f"step {self.step:,}"
        stopped = self.step == config.train.stop_at_step
        state = "stopped there by train.stop_at_step" if stopped else "not finished"
        return f"step {self.step:,} of {total:,}, {'finished' if self.step >= total else state}"

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) pairs of one key of the rows."""
        return [(row["step"], row[key]) for row in self.rows if key in row]

    def last(self, key: str) -> float | None:
        """Newest value of one key of the rows."""
        return next((value for _, value in reversed(self.series(key))), None)


def training_images(rows: list[dict[str, float]], batch_size: int) -> int | None:
    """Number of training images, by epoch = step * batch_size / images; None if no row has an epoch."""
    found = (row["step"] * batch_size / row["epoch"] for row in reversed(rows) if row.get("epoch"))
    return next((round(images) for images in found if 1 <= images < 2**63), None)


class ImageFeatures(NamedTuple):
    """Features, labels and thumbnails of some images of a data set."""

    features: Tensor  # (N, F) float32 on the CPU
    labels: np.ndarray  # (N,) int64, -1 where unknown
    thumbnails: list[np.ndarray]  # (h, w, 3) uint8 each, as the encoder saw the images, but smaller
    classes: list[str] | None
    tried: int  # number of images; N is smaller if some do not decode
    file: Callable[[int], str]  # name of the file of the i-th image

    def name(self, label: int) -> str:
        """The name of a class."""
        return self.classes[label] if self.classes and label < len(self.classes) else str(label)


def read_run(folder: Path) -> RunFiles:
    """Reads the files of a run.

    Raises:
        ValueError: the folder does not exist, or nothing in it that train.py wrote can be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the run.out of a run")
    rows = sorted(read_metrics(folder / _METRICS), key=lambda row: row["step"])
    starts = read_rows(folder / provenance.FILE)
    trained, skipped = newest_trained(folder)
    problems = [f"{sentence}; it is skipped." for sentence in skipped]
    for name, fields in ((_METRICS, {}), (provenance.FILE, {}), (_CORRUPT, {"id": int})):
        if unread := unread_lines(folder / name, **fields):
            which = f"line{'s' * (len(unread) > 1)} {shown(unread)}"
            problems.append(f"{name}: {which}: not as train.py writes them; skipped.")
    if not (rows or starts or trained):
        why = " ".join(problems) or f"{_METRICS} has no rows, and there is no checkpoint."
        raise ValueError(f"{folder}: nothing is left to report: {why} Give the run.out of another run")
    config = trained.config if trained else None
    if not config and starts and (settings := starts[-1].get("config")):
        try:
            config = schema.from_settings(settings)
        except ValueError as error:
            problems.append(f"The run's settings do not fit this version: {error}")
    corrupt = list({row["id"]: row for row in read_rows(folder / _CORRUPT, id=int)}.values())
    return RunFiles(folder, rows, starts, corrupt, config, trained, problems)


class _Numbered:
    """The images of a data set with their ids as labels, which then say which of the images decode."""

    def __init__(self, source: Source) -> None:
        self.read, self.labels = source.read, np.arange(len(source))


def compute_features(run: RunFiles, source: Source, images: int) -> ImageFeatures:
    """Features of at most `images` evenly spaced images, labeled or not, on the GPU if there is one.

    Raises:
        ValueError: none of the images can be decoded.
    """
    assert run.trained
    config = run.trained.config
    ids = spaced(len(source), images)
    thumbnails: list[np.ndarray] = []
    numbered = cast(Source, _Numbered(source))
    batches = _keeping_thumbnails(plain_images(numbered, ids, config), config, thumbnails)
    encoder = run.trained.encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    features, kept = extract_features(encoder, batches)
    if not len(features):
        raise ValueError(f"none of {len(ids)} images decodes; run tools/verify_shards.py on the data set")
    decoded, name_of = kept.cpu().numpy(), file_names(source)
    return ImageFeatures(
        features.cpu(), source.labels[decoded], thumbnails, source.classes, len(ids),
        lambda i: name_of(int(decoded[i])),
    )  # fmt: skip


def _keeping_thumbnails(
    batches: Iterator[tuple[Tensor, Tensor]], config: schema.Config, thumbnails: list[np.ndarray]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the batches and appends a thumbnail of each image."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.augment.mean, config.augment.std))
    for images, labels in batches:
        pixels = (images * std + mean).clamp(0, 1)
        if config.augment.size > _THUMBNAIL:
            pixels = F.interpolate(pixels, size=_THUMBNAIL, mode="area")
        thumbnails += list((pixels * 255).round().byte().permute(0, 2, 3, 1).numpy())
        yield images, labels
