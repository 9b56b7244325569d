"""The manifest of a data set: what is in which shard.

A data set is a folder: shards (tars in WebDataset form, or .beton files), `samples.npy` (a SAMPLE record for each,
opened by mmap) and `manifest.json`, which is written last and by rename: where it is, the data set is complete. With
offset and length of every image a shard is as random-access as an array, so one global shuffle serves every source.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from byolt.files.atomic import writing
from byolt.pipelines.formats.index import SAMPLE, UNLABELLED

FORMAT = "byolt-shards"
VERSION = 1
MANIFEST = "manifest.json"
SAMPLES = "samples.npy"

_REMEDY = "make the data set again with tools/make_shards.py"
_INDEX = "for tars made elsewhere run tools/make_shards.py --index on the folder"


class Shard(NamedTuple):
    """One tar or .beton of the data set."""

    name: str
    size: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Manifest:
    """What is in a data set.

    Attributes:
        shards: In the order of the samples.
        samples: SAMPLE records, shape (num_samples,), sorted by (shard, offset).
        classes: Name of each label, or None where there are none.
        settings: What the data set was made with; free-form, for people and for resuming.
    """

    shards: list[Shard]
    samples: np.ndarray
    classes: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Manifest":
        """Opens `manifest.json` and maps `samples.npy`; the shards themselves are not touched.

        Raises:
            ValueError: Missing, not a manifest, or contradicting itself; names file, value and remedy.
        """
        path = Path(folder) / MANIFEST
        try:
            raw = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{path} is missing: {_REMEDY}; {_INDEX}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read ({error}): {_REMEDY}") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(f"{path} is not a {FORMAT} manifest: {_REMEDY}; {_INDEX}")
        if raw.get("version") != VERSION:
            raise ValueError(
                f"{path} has version {raw.get('version')!r}, this code reads {VERSION}: {_REMEDY}"
            )
        try:
            shards = [Shard(s["name"], s["size"], s["sha256"], s["samples"]) for s in raw["shards"]]
            classes, settings = raw["classes"], raw["settings"]
            stated, sha256 = raw["num_samples"], raw["samples_sha256"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} lacks {error}: {_REMEDY}") from None
        for shard in shards:
            if not all(isinstance(x, int) and 0 <= x < 2**62 for x in (shard.size, shard.samples)):
                raise ValueError(f"{path}: shard {shard.name!r} has no sound size or count: {_REMEDY}")
            if not _is_file_name(shard.name):
                raise ValueError(f"{path}: {shard.name!r} is no plain file name: {_REMEDY}")
        if classes is not None and not (
            isinstance(classes, list) and all(isinstance(c, str) for c in classes)
        ):
            raise ValueError(f"{path}: classes are neither null nor a list of names: {_REMEDY}")
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: settings are {settings!r}, not an object: {_REMEDY}")
        manifest = cls(shards, _map_samples(path.with_name(SAMPLES), sha256), classes, settings)
        if len(manifest.samples) != stated:
            raise ValueError(
                f"{path} states {stated} samples, {SAMPLES} has {len(manifest.samples)}: {_REMEDY}"
            )
        manifest.validate(path)
        return manifest

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `samples.npy`, then `manifest.json`, each through a temporary, fsync and rename.

        Raises:
            ValueError: The records contradict the shards.
            OSError: The disk is full, or the folder is not writable; nothing half-written has a final name.
        """
        folder = Path(folder)
        self.validate(folder / MANIFEST)
        samples = np.ascontiguousarray(self.samples)
        with writing(folder / SAMPLES) as file:
            np.save(file, samples)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "num_samples": len(samples),
            "samples_sha256": hashlib.sha256(samples.data).hexdigest(),
            "settings": self.settings,
            "classes": self.classes,
            "shards": [shard._asdict() for shard in self.shards],
        }
        with writing(folder / MANIFEST) as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")

    def by_shard(self) -> Iterator[tuple[Shard, int, np.ndarray]]:
        """Each shard with the number of its first sample and its records, in the order of the samples."""
        first = 0
        for shard in self.shards:
            yield shard, first, self.samples[first : first + shard.samples]
            first += shard.samples

    def validate(self, path: Path) -> None:
        """Raises ValueError, naming `path`, where records and shards do not fit together."""
        samples = self.samples
        if samples.dtype != SAMPLE or samples.ndim != 1:
            raise ValueError(f"{path}: records are {samples.dtype}, shape {samples.shape}: {_REMEDY}")
        if not len(samples):
            raise ValueError(f"{path}: the data set has no samples: {_REMEDY}")
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError(f"{path}: a shard is named twice: {_REMEDY}")
        if samples["shard"].max() >= len(names):
            raise ValueError(
                f"{path}: a sample lies in shard {samples['shard'].max()} of {len(names)}: {_REMEDY}"
            )
        counts = np.bincount(samples["shard"], minlength=len(names))
        sizes = np.array([shard.size for shard in self.shards], np.uint64)
        for stated, count in zip(self.shards, counts, strict=True):
            if stated.samples != count:
                raise ValueError(
                    f"{path}: {stated.name} states {stated.samples} samples, records say {count}: {_REMEDY}"
                )
        room = sizes[samples["shard"]]
        outside = np.flatnonzero(
            (samples["length"] > room) | (samples["offset"] > room - np.minimum(samples["length"], room))
        )
        if len(outside):
            name = names[samples["shard"][outside[0]]]
            raise ValueError(f"{path}: sample {outside[0]} lies outside {name}: {_REMEDY}")
        shard, offset = samples["shard"], samples["offset"]
        ahead = (shard[1:] > shard[:-1]) | (shard[1:] == shard[:-1]) & (offset[1:] > offset[:-1])
        if not ahead.all():
            raise ValueError(f"{path}: sample {np.argmin(ahead) + 1} is out of order: {_REMEDY}")
        if not (samples["height"].all() and samples["width"].all() and samples["length"].all()):
            raise ValueError(f"{path}: a sample has zero length, height or width: {_REMEDY}")
        labels = len(self.classes) if self.classes is not None else np.iinfo(np.int32).max
        if samples["label"].min() < UNLABELLED or samples["label"].max() >= labels:
            raise ValueError(f"{path}: a label lies outside the {labels} classes: {_REMEDY}")


def _is_file_name(name: object) -> bool:
    """Whether it names a file inside the folder of the manifest, and nothing else."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\0"):
        return False
    try:
        os.fsencode(name)  # JSON may hold half a character (a lone surrogate)
    except UnicodeEncodeError:
        return False
    return True


def _map_samples(path: Path, sha256: str) -> np.ndarray:
    try:
        samples = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {_REMEDY}") from None
    except Exception as error:  # whatever numpy's reader makes of foreign bytes
        raise ValueError(f"{path} cannot be read ({error}): {_REMEDY}") from None
    if not isinstance(samples, np.ndarray) or samples.dtype != SAMPLE:
        raise ValueError(f"{path} is no array of sample records: {_REMEDY}")
    if hashlib.sha256(np.ascontiguousarray(samples).data).hexdigest() != sha256:
        raise ValueError(f"{path} does not have the sha256 that {MANIFEST} states: {_REMEDY}")
    return samples


def join(records: Iterable[np.ndarray]) -> np.ndarray:
    """Joins the records of consecutive shards, numbering `shard` from 0."""
    parts = [part.copy() for part in records]
    for number, part in enumerate(parts):
        part["shard"] = number
    return np.concatenate(parts) if parts else np.empty(0, SAMPLE)
