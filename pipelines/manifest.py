"""The manifest of a data set: its shards, and the offset, size and label of every sample.

A data set is a folder of shards (WebDataset tars or .beton files) with `samples.npy` (one SAMPLE record per sample,
opened by mmap) and `manifest.json`, which is written last and by rename: a data set with a manifest is complete. The
offset and length of every image make a shard as random-access as an array, so one global shuffle serves every source.
`convert` writes manifests; `sources` opens shards by them.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from byolt.files.atomic import writing
from byolt.files.regular import open_regular, read_regular
from byolt.pipelines.formats.index import SAMPLE, UNLABELED

FORMAT = "byolt-shards"
VERSION = 1
MANIFEST = "manifest.json"
SAMPLES = "samples.npy"
NAMED_LABELS = "named_labels"  # in the settings: the .cls files hold class names

BLOCK = 256  # consecutive samples, 28 MB of ImageNet: orders shuffle blocks, remote data is fetched by them
_PIECE = 1 << 15  # records checked together: 1 MB
_REMEDY = "make the data set again with tools/make_shards.py"
_INDEX = "for tars made elsewhere run tools/make_shards.py --index on the folder"


def parse(content: bytes, place: object) -> dict[str, Any]:
    """The object in a manifest.json; `place` names the file.

    Raises:
        ValueError: It is not JSON, or not a manifest.
    """
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip()[:1] == b"<":
            start = ascii(content.lstrip()[:20].decode(errors="replace"))
            raise ValueError(f"{place} is not a manifest: it begins with {start}: a login page?") from None
        raise ValueError(f"{place} cannot be read ({error}): {_REMEDY}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f"{place} is not a {FORMAT} manifest: {_REMEDY}; {_INDEX}")
    return raw


class Shard(NamedTuple):
    """One tar or .beton of the data set."""

    name: str
    size: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Manifest:
    """The contents of a data set."""

    shards: list[Shard]  # in the order of the samples
    samples: np.ndarray  # (num_samples,) SAMPLE records, sorted by (shard, offset)
    classes: list[str] | None = None  # name of each label
    # of the conversion, which reads them to resume
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Manifest":
        """Opens `manifest.json` and maps `samples.npy`, without opening the shards.

        Raises:
            ValueError: The manifest is missing, damaged or inconsistent; names file, value and remedy.
        """
        path = Path(folder) / MANIFEST
        try:
            raw = parse(read_regular(path), path)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{path} is missing: {_REMEDY}; {_INDEX}") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error}): {_REMEDY}") from None
        if raw.get("version") != VERSION:
            raise ValueError(
                f"{path} has version {raw.get('version')!r}, this code reads {VERSION}: {_REMEDY}"
            )
        sha256 = raw.pop("sha256", None)  # absent from older manifests
        _refuse(path, sha256 and sha256 != _sha256(raw), "its content does not match its sha256")
        try:
            shards = [Shard(s["name"], s["size"], s["sha256"], s["samples"]) for s in raw["shards"]]
            classes, settings = raw["classes"], raw["settings"]
            stated, sha256 = raw["num_samples"], raw["samples_sha256"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} lacks {error}: {_REMEDY}") from None
        refuse = partial(_refuse, path)
        for shard in shards:
            sound = all(isinstance(x, int) and 0 <= x < 2**62 for x in (shard.size, shard.samples))
            refuse(not sound, f"shard {shard.name!r} has an invalid size or count")
            refuse(not _is_file_name(shard.name), f"{shard.name!r} is not a plain file name")
        names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        refuse(classes is not None and not names, "classes are neither null nor a list of names")
        refuse(not isinstance(settings, dict), f"settings are {settings!r}, not an object")
        manifest = cls(shards, _map_samples(path.with_name(SAMPLES)), classes, settings)
        found = len(manifest.samples)
        with ThreadPoolExecutor(1) as pool:  # hashing and checking 100 M records take 1.6 s each
            content = np.ascontiguousarray(manifest.samples).data
            hashed = pool.submit(lambda: hashlib.sha256(content).hexdigest())
            try:
                refuse(found != stated, f"states {stated} samples, {SAMPLES} has {found}")
                manifest.validate(path)
            finally:
                other = f"does not have the sha256 that {MANIFEST} states"
                _refuse(path.with_name(SAMPLES), hashed.result() != sha256, other)
        return manifest

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `samples.npy`, then `manifest.json`, each through a temporary, fsync and rename.

        Raises:
            ValueError: The records contradict the shards.
            OSError: The disk is full, or the folder is not writable; no incomplete file has its final name.
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
        content["sha256"] = _sha256(content)
        with writing(folder / MANIFEST) as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")

    def by_shard(self) -> Iterator[tuple[Shard, int, np.ndarray]]:
        """Yields each shard with the number of its first sample and its records."""
        first = 0
        for shard in self.shards:
            yield shard, first, self.samples[first : first + shard.samples]
            first += shard.samples

    @property
    def proven(self) -> bool:
        """Whether make_shards decoded every image; not of tars made elsewhere and indexed."""
        return bool(self.settings.get("decode"))

    def fingerprint(self) -> str:
        """Identifies the data set, see `sources.Source`."""
        identity = [[shard.name, shard.sha256] for shard in self.shards], self.classes
        return hashlib.sha256(repr(identity).encode()).hexdigest()

    def validate(self, path: Path) -> None:
        """Raises ValueError, naming `path`, if records and shards do not match."""
        samples, refuse = np.asarray(self.samples), partial(_refuse, path)  # not a memmap: indexed faster
        shape = f"{samples.dtype}, shape {samples.shape}"
        refuse(samples.dtype != SAMPLE or samples.ndim != 1, f"records are {shape}")
        refuse(not len(samples), "the data set has no samples")
        names = [shard.name for shard in self.shards]
        refuse(len(set(names)) != len(names), "a shard is listed twice")
        largest = len(self.classes) if self.classes is not None else np.iinfo(np.int32).max
        room, counts = np.array([shard.size for shard in self.shards], np.uint64), np.zeros(len(names), int)
        for first in range(0, len(samples), _PIECE):
            piece = samples[first : first + _PIECE + 1]  # and the next record, for the order
            columns = (np.ascontiguousarray(piece[name]) for name in ("shard", "offset", "length"))
            shard, offset, length = columns
            refuse(shard.max() >= len(names), f"a sample is in shard {shard.max()} of {len(names)}")
            counts += np.bincount(shard[:_PIECE], minlength=len(names))
            outside = (length > room[shard]) | (offset > room[shard] - np.minimum(length, room[shard]))
            place = int(outside.argmax())
            refuse(outside.any(), f"sample {first + place} is outside {names[shard[place]]}")
            ahead = (shard[1:] > shard[:-1]) | (shard[1:] == shard[:-1]) & (offset[1:] > offset[:-1])
            wrong = first + int((~ahead).argmax()) + 1 if len(ahead) else 0
            refuse(not ahead.all(), f"sample {wrong} is out of order")
            sizes = piece["height"].all() and piece["width"].all() and length.all()
            refuse(not sizes, "a sample has zero length, height or width")
            inside = piece["label"].min() >= UNLABELED and piece["label"].max() < largest
            refuse(not inside, f"a label is outside the {largest} classes")
        for stated, count in zip(self.shards, counts.tolist(), strict=True):
            text = f"{stated.name} states {stated.samples} samples, but has {count} records"
            refuse(stated.samples != count, text)


def checksums(samples: np.ndarray) -> npt.NDArray[np.uint64]:
    """`encoded.checksum` of SAMPLE records."""
    return samples["length"].astype(np.uint64) << np.uint64(32) | samples["crc32"]


def labels(samples: np.ndarray) -> npt.NDArray[np.int64]:
    """The labels of SAMPLE records, which take no memory if all are UNLABELED."""
    if samples["label"].max() == UNLABELED:
        return np.broadcast_to(np.int64(UNLABELED), len(samples))
    return samples["label"].astype(np.int64)


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _refuse(path: Path, bad: object, problem: str) -> None:
    if bad:
        raise ValueError(f"{path}: {problem}: {_REMEDY}")


def _is_file_name(name: object) -> bool:
    """Whether `name` names a file directly in the manifest's folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\0"):
        return False
    try:
        os.fsencode(name)  # JSON can contain a lone surrogate
    except UnicodeEncodeError:
        return False
    return True


def _map_samples(path: Path) -> np.ndarray:
    try:
        with open(path, opener=open_regular):
            samples = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {_REMEDY}") from None
    except Exception as error:  # numpy raises many kinds of errors on damaged bytes
        raise ValueError(f"{path} cannot be read ({error}): {_REMEDY}") from None
    if not isinstance(samples, np.ndarray) or samples.dtype != SAMPLE:
        raise ValueError(f"{path} is not an array of sample records: {_REMEDY}")
    return samples


def join(records: Iterable[np.ndarray]) -> np.ndarray:
    """Concatenates the records of consecutive shards and numbers `shard` from 0."""
    parts = [part.copy() for part in records]
    for number, part in enumerate(parts):
        part["shard"] = number
    return np.concatenate(parts) if parts else np.empty(0, SAMPLE)


class DescribedSource:
    """The part of a `sources.Source` that a manifest states; subclasses read the bytes."""

    def __init__(self, manifest: Manifest) -> None:
        self._shards, self._samples = manifest.shards, manifest.samples
        self.classes, self.proven = manifest.classes, manifest.proven
        # Mapped: all ranks share the pages.
        self.heights, self.widths = manifest.samples["height"], manifest.samples["width"]
        self.labels = labels(manifest.samples)
        self.fingerprint = manifest.fingerprint()
        self.former_fingerprints: list[str] = []

    @property
    def checksums(self) -> npt.NDArray[np.uint64]:
        return checksums(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def describe(self, i: int) -> str:
        record = self._samples[i]
        return f"{self._shards[record['shard']].name} offset {record['offset']} (sample {i})"
