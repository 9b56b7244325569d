"""Plans a conversion: which input image becomes which sample of which shard, under which options.

Pure functions of the inputs and the options, so that a killed run can be continued and ends in the same bytes.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from byolt.files.console import shown
from byolt.pipelines.convert.inputs import InputImage, Inputs
from byolt.pipelines.formats.encoded import MAX_PIXELS
from byolt.pipelines.order import global_batch

WORK = ".make_shards"  # the folder in DST that holds the state of an unfinished conversion
SUFFIXES = {"webdataset": ".tar", "beton": ".beton"}  # by format


@dataclass(frozen=True)
class ConversionOptions:
    """The options of a conversion; `tools/make_shards.py --help` explains each."""

    src: Path
    dst: Path
    only: tuple[str, ...] = ()  # tars of the folder `src` to read; () for all of it
    format: str = "webdataset"  # or "beton"
    raw_fraction: float = 0.0
    engine: str = "own"  # or "ffcv"
    inside: str = ""
    labels: Path | None = None
    max_size: int = 0  # pixels of the longer side; 0 for no limit
    quality: int = 95
    max_pixels: int = MAX_PIXELS
    decode: bool = True
    split: str | None = None  # "NAME=SHARE,..."
    seed: int = 0
    shard_size: int = 256  # MB
    workers: int = 1
    strict: bool = False


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    source: tuple[Path, bool]  # the file or folder to read from, and whether it is a data set
    images: list[tuple[int, InputImage]]  # the images with their sample numbers
    digits: int  # width of a sample number in a key
    shard: Path  # the file to write
    note: Path  # the JSON file that is written after the shard and says that it is whole
    decode: bool  # as in the options, but False where the source's own conversion has decoded its images
    options: ConversionOptions


def parse_split(text: str | None) -> dict[str, float]:
    """Parses "train=.9,val=.1" to {"train": .9, "val": .1}; None gives one part without a name."""
    if text is None:
        return {"": 1.0}
    parts = [re.fullmatch(r"([A-Za-z0-9_-]+)=(\d*\.?\d+)", part.strip()) for part in text.split(",")]
    split = {part[1]: float(part[2]) for part in parts if part}
    if len(split) != len(parts) or abs(sum(split.values()) - 1) > 1e-6:
        raise ValueError(
            f"--split {text!r}: write distinct names with shares that sum to 1, as train=.9,val=.1"
        )
    return split


def plan(inputs: Inputs, options: ConversionOptions) -> dict[str, list[ShardTask]]:
    """Assigns every image to a shard of a part of the split.

    Files are shuffled. The samples of a data set keep their order; a split draws the samples of each part.

    Raises:
        ValueError: The split is malformed, or leaves a part without an image.
    """
    total = len(inputs.images)
    order = global_batch(options.seed, 0, 0, total, total)  # the same with every release of numpy
    split = parse_split(options.split)
    bounds = np.rint(np.cumsum([0.0, *split.values()]) * total).astype(int)
    bounds[-1] = total  # the shares may sum to 1 - 1e-6
    tasks: dict[str, list[ShardTask]] = {}
    for (name, share), start, stop in zip(split.items(), bounds[:-1], bounds[1:], strict=True):
        if start == stop:
            raise ValueError(f"--split {name}={share}: no image is left for it, SRC has {total} files")
        part = np.sort(order[start:stop]) if inputs.is_data_set else order[start:stop]
        tasks[name] = []
        chunks = _chunks([inputs.images[i] for i in part], options.shard_size * 1_000_000)
        for number, chunk in enumerate(chunks):
            stem = f"{name or 'shard'}-{number:06d}"
            task = ShardTask(
                (inputs.path, inputs.is_data_set),
                chunk,
                digits=max(6, len(str(len(part)))),
                shard=options.dst / name / f"{stem}{SUFFIXES[options.format]}",
                note=options.dst / WORK / f"{stem}.json",
                decode=options.decode and not inputs.proven,
                options=options,
            )
            tasks[name].append(task)
    return tasks


def _chunks(images: list[InputImage], shard_bytes: int) -> list[list[tuple[int, InputImage]]]:
    chunks: list[list[tuple[int, InputImage]]] = [[]]
    size = 0
    for numbered in enumerate(images):
        if size >= shard_bytes:
            chunks.append([])
            size = 0
        chunks[-1].append(numbered)
        size += numbered[1].length + 2048  # headers, .cls and .json
    return chunks


def recorded_settings(inputs: Inputs, options: ConversionOptions) -> dict[str, Any]:
    """Everything that the bytes of the result depend on, as the manifest records it."""
    return {
        "format": options.format,
        "engine": options.engine,
        "raw_fraction": options.raw_fraction,
        "decode": options.decode or inputs.proven,
        "source_files": len(inputs.images),
        "source_bytes": sum(image.length for image in inputs.images),
        "source_sha256": inputs.sha256(),
        "max_size": options.max_size,
        "quality": options.quality,
        "max_pixels": options.max_pixels,
        "seed": options.seed,
        "shard_size": options.shard_size,
        "split": options.split,
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Names the settings in which the two disagree, with both values; "" if there are none."""
    keys = [key for key in new if old.get(key) != new[key]]
    return shown(f"{key} was {old.get(key)!r}, now {new[key]!r}" for key in keys)
