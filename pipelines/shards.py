"""The manifest of a data set, and the index of one shard.

A data set is a folder: tars in WebDataset form, `samples.npy` (a SAMPLE record for each, opened by mmap) and
`manifest.json`, which is written last and by rename: where it is, the data set is complete. With offset and
length of every image a tar is as random-access as an array, so one global shuffle serves every source.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines import tar
from pipelines.encoded import inspect

FORMAT = "byolt-shards"
VERSION = 1
MANIFEST = "manifest.json"
SAMPLES = "samples.npy"
UNLABELLED = -1
IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png"))
SAMPLE = np.dtype(
    [
        ("shard", "<u4"),  # index into Manifest.shards
        ("label", "<i4"),  # index into Manifest.classes, or UNLABELLED
        ("offset", "<u8"),  # bytes from the start of the shard to the encoded image
        ("length", "<u4"),  # bytes
        ("height", "<u4"),  # pixels as stored, EXIF orientation ignored
        ("width", "<u4"),
        ("crc32", "<u4"),  # of the encoded image: damage is found by sample, not only by shard
    ]
)  # 32 bytes

_REMEDY = "make the data set again with tools/make_shards.py"
_INDEX = "for tars made elsewhere run tools/make_shards.py --index on the folder"
MAX_BYTES = 1 << 30  # of one encoded image
TEMPORARY = ".byolt-tmp"  # suffix of files that are not whole yet


class Shard(NamedTuple):
    """One tar of the data set."""

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
            if (
                not isinstance(shard.name, str)
                or shard.name in ("", ".", "..")
                or set(shard.name) & set("/\0")
            ):
                raise ValueError(f"{path}: {shard.name!r} is no plain file name: {_REMEDY}")
        if classes is not None and not (
            isinstance(classes, list) and all(isinstance(c, str) for c in classes)
        ):
            raise ValueError(f"{path}: classes are neither null nor a list of names: {_REMEDY}")
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
        with Temporary(folder / SAMPLES) as file:
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
        with Temporary(folder / MANIFEST) as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")

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


def _map_samples(path: Path, sha256: str) -> np.ndarray:
    try:
        samples = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {_REMEDY}") from None
    except Exception as error:  # whatever numpy's reader makes of foreign bytes
        raise ValueError(f"{path} cannot be read ({error}): {_REMEDY}") from None
    if not isinstance(samples, np.ndarray):
        raise ValueError(f"{path} is no array: {_REMEDY}")
    if hashlib.sha256(np.ascontiguousarray(samples).data).hexdigest() != sha256:
        raise ValueError(f"{path} does not have the sha256 that {MANIFEST} states: {_REMEDY}")
    return samples


class Temporary:
    """A file that gets its name only when it is whole: temporary, fsync, rename; removed on failure.

    The temporary's name is one that no user gives a file: leftovers of a killed run may be deleted by it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")

    def __enter__(self) -> Any:
        self.file = open(self.temporary, "wb")
        return self.file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
            self.file.close()
            if kind is None:
                os.replace(self.temporary, self.path)
                sync_folder(self.path.parent)
        finally:
            self.temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def index_tar(path: str | os.PathLike[str]) -> np.ndarray:
    """Records of one WebDataset tar: consecutive members of one key (name up to a dot) are a sample.

    A sample is one image (.jpg, .jpeg or .png) and, where it is labelled, a .cls with an integer. Its other
    members are stepped over, as are folders, hidden files and names in double underscores.

    Returns:
        SAMPLE records in the order of the tar, shape (samples,), with `shard` 0.

    Raises:
        ValueError: Damaged or cut tar (see `tar.walk`), a link or device, an absolute name or one with `..`,
            a key that occurs twice, a sample without exactly one image, an image whose header is not sound, a
            .cls that is no integer. Names shard and offset.
    """
    path = Path(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        records = []
        seen: set[str] = set()
        key: str | None = None
        members: dict[str, tar.Member] = {}
        for member in tar.walk(path, descriptor):
            next_key, extension = _key_and_extension(path, member)
            if next_key is None:
                continue
            if next_key != key:
                if key is not None:
                    records.append(_record(path, descriptor, key, members))
                if next_key in seen:
                    raise ValueError(f"{path}: offset {member.header}: the key {next_key!r} occurs twice")
                seen.add(next_key)
                key, members = next_key, {}
            if extension in members:
                raise ValueError(f"{path}: offset {member.header}: the member {member.name!r} occurs twice")
            members[extension] = member
        if key is not None:
            records.append(_record(path, descriptor, key, members))
        return np.array(records, SAMPLE)
    finally:
        os.close(descriptor)


def _key_and_extension(path: Path, member: tar.Member) -> tuple[str | None, str]:
    """Key (with its folder) and lower-case extension; key None for what belongs to no sample."""
    folder, _, base = member.name.rpartition("/")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise ValueError(f"{path}: offset {member.header}: unsafe member name {member.name!r}")
    if member.kind == "folder":
        return None, ""
    if member.kind != "file":
        raise ValueError(f"{path}: offset {member.header}: {member.name!r} is a {member.kind}, not a file")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or base.startswith("__"):
        return None, ""
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _record(path: Path, descriptor: int, key: str, members: dict[str, tar.Member]) -> tuple[int, ...]:
    images = [member for extension, member in members.items() if extension in IMAGE_EXTENSIONS]
    first = next(iter(members.values()))
    if len(images) != 1:
        found = ", ".join(sorted(members))
        raise ValueError(f"{path}: offset {first.header}: sample {key!r} needs one image, it has: {found}")
    image = images[0]
    if image.length > MAX_BYTES:
        raise ValueError(
            f"{path}: offset {image.offset}: sample {key!r} has {image.length:,} bytes: more than an image has"
        )
    data = os.pread(descriptor, image.length, image.offset)
    try:
        header = inspect(data)
    except ValueError as error:
        raise ValueError(f"{path}: offset {image.offset}: image of sample {key!r}: {error}") from None
    label = UNLABELLED
    if "cls" in members:
        member = members["cls"]
        text = os.pread(descriptor, min(member.length, 64), member.offset)
        if text.strip() == b"-1":
            text = b""
        elif not text.strip().isdigit() or int(text) > np.iinfo(np.int32).max:
            raise ValueError(
                f"{path}: offset {member.offset}: label of sample {key!r} is {text!r}, not an integer"
            )
        label = int(text) if text else UNLABELLED
    return 0, label, image.offset, image.length, header.height, header.width, zlib.crc32(data)


def join(records: Iterable[np.ndarray]) -> np.ndarray:
    """Joins the records of consecutive shards, numbering `shard` from 0."""
    parts = [part.copy() for part in records]
    for number, part in enumerate(parts):
        part["shard"] = number
    return np.concatenate(parts) if parts else np.empty(0, SAMPLE)
