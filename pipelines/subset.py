"""Parts of a labeled data set, for evaluation: class-balanced by seed, or from a list of ids or names."""

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from byolt.files.console import shown
from byolt.pipelines.formats.beton import BetonSource
from byolt.pipelines.formats.folder import FolderSource, label_names, list_folder
from byolt.pipelines.formats.index import tar_samples
from byolt.pipelines.formats.tar import BLOCK, Tar
from byolt.pipelines.manifest import Manifest
from byolt.pipelines.order import global_batch
from byolt.pipelines.sources import Source, TarSource


class Subset:
    """A source of some samples of another, under new ids 0 to n - 1; see `sources.Source`."""

    def __init__(self, source: Source, ids: npt.NDArray[np.int64]) -> None:
        """`ids` (n,) are the chosen samples, in order; at least one."""
        self._source, self._ids = source, ids
        self.labels, self.heights, self.widths = source.labels[ids], source.heights[ids], source.widths[ids]
        self.classes, self.proven = source.classes, source.proven
        self.former_fingerprints: list[str] = []
        chosen = np.asarray(ids, "<i8").tobytes()
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + chosen).hexdigest()

    @property
    def checksums(self) -> npt.NDArray[np.uint64] | None:
        known = self._source.checksums
        return None if known is None else known[self._ids]

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, i: int) -> bytes:
        return self._source.read(int(self._ids[i]))

    def describe(self, i: int) -> str:
        return self._source.describe(int(self._ids[i]))


def spaced(total: int, count: int) -> npt.NDArray[np.int64]:
    """At most `count` ids, evenly spaced over 0 to total - 1."""
    return np.linspace(0, total, min(count, total), endpoint=False).astype(np.int64)


def random_ids(total: int, count: int) -> npt.NDArray[np.int64]:
    """At most `count` ids, sampled from 0 to total - 1, always the same ones, sorted.

    Evenly spaced ids can miss classes: at a stride that is a multiple of the labels' period, all have one label.
    """
    return np.sort(global_batch(0, 0, 0, total, min(count, total)))


def balanced_ids(
    labels: npt.NDArray[np.int64], share: float, seed: int, leave: int = 0
) -> npt.NDArray[np.int64]:
    """Samples a share of every class: its count times `share`, rounded, but at least one.

    With the same seed, a smaller share is part of a larger one.

    Args:
        labels: (N,) class of each sample.
        share: above 0, up to 1.
        seed: 0 <= seed < 2**63.
        leave: samples of every class that are never chosen; takes precedence over `share`.

    Returns:
        Sorted ids, int64.

    Raises:
        ValueError: share is out of its range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of {share:g} of the labels must be above 0 and at most 1")
    shuffled = global_batch(seed, 0, 0, len(labels), len(labels))
    chosen = []
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        chosen.append(members[: max(0, min(max(1, round(share * len(members))), len(members) - leave))])
    return np.sort(np.concatenate(chosen))


def listed_ids(source: Source, path: Path) -> npt.NDArray[np.int64]:
    """The samples that a text file lists, one per line: either all ids or all names.

    A name is that of the original file, with or without its folder, the key of the sample in its shard, or the name of
    its image there; .beton files have the first two if make_shards wrote them. The lines are ids if each is a number
    below the number of samples without leading zeros. The keys of make_shards have leading zeros, and gaps where a file
    was unusable, so '000009' may name another sample than 9. An id that is also the name of another sample is refused
    as ambiguous.

    Returns:
        Sorted ids, int64.

    Raises:
        ValueError: the file cannot be read or is empty; an entry is unknown, ambiguous or listed twice, perhaps by two
            names; or the source has no names.
    """
    try:
        entries = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"list of samples {path} cannot be read: {error}") from None
    if not entries:
        raise ValueError(f"list of samples {path} is empty: write one sample id or name per line")
    number = re.compile("0|[1-9][0-9]{0,17}")
    as_ids = all(number.fullmatch(entry) and int(entry) < len(source) for entry in entries)
    known = _names(source)
    if known is None and not as_ids:
        raise ValueError(
            f"list of samples {path}: this data set has no names of its samples: list ids, 0 to {len(source) - 1}"
        )
    known = known or {}
    if as_ids:
        found = [int(entry) for entry in entries]
        wrong = [entry for entry, i in zip(entries, found, strict=True) if known.get(entry, i) != i]
        problem = "are the id of one sample and the name of another"
        remedy = "write names of files, with their endings"
    else:
        found = [known.get(entry, -1) for entry in entries]
        wrong = [entry for entry, i in zip(entries, found, strict=True) if i < 0]
        problem = "name no sample, or several"
        remedy = f"write sample ids below {len(source)}, or names of original files"
    if wrong:
        raise ValueError(
            f"list of samples {path}: {len(wrong)} of {len(entries)} entries {problem}: {shown(wrong)}; {remedy}"
        )
    ids = np.unique(np.array(found, np.int64))
    if len(ids) < len(found):
        raise ValueError(f"list of samples {path} holds {len(found) - len(ids)} entries twice: remove them")
    return ids


def _names(source: Source) -> dict[str, int] | None:
    """The id for each name of a sample, -1 for a name that several share; None if the source has no names."""
    if isinstance(source, FolderSource):
        names = [{name} for name in label_names(list_folder(source.folder))[0]]
    elif isinstance(source, TarSource):
        names = _names_in_shards(source.folder)
    elif isinstance(source, BetonSource):
        names = [_original(source.note(i), "key", "file") for i in range(len(source))]
        if not any(names):
            return None
    else:
        return None
    known: dict[str, int] = {}
    for number, aliases in enumerate(names):
        for alias in aliases | {name.rpartition("/")[2] for name in aliases}:
            known[alias] = number if known.get(alias, number) == number else -1
    return known


def _names_in_shards(folder: Path) -> list[set[str]]:
    """The names of each sample: its key, its image in the tar, and the original file that its .json states."""
    manifest = Manifest.load(folder)
    names: list[set[str]] = [set() for _ in manifest.samples]
    for shard, first, records in manifest.by_shard():
        number = {offset: i for i, offset in enumerate(records["offset"].tolist(), first)}
        with Tar(folder / shard.name) as file:
            for sample in tar_samples(file):
                if sample.image and sample.image.offset in number:
                    aliases = {sample.key, sample.key.rpartition("/")[2], sample.image.name}
                    if sample.note:
                        aliases |= _original(file.read(sample.note.length, sample.note.offset), "file")
                    names[number[sample.image.offset]] = aliases
    return names


def file_names(source: Source) -> Callable[[int], str]:
    """A function that names the file of a sample, for captions.

    The name is that of the original file, if make_shards recorded it; or else of the image in its shard; or else
    `source.describe`.
    """

    def name(i: int) -> str:
        with suppress(OSError, ValueError):
            if isinstance(source, FolderSource):
                return source.describe(i).rpartition(" (sample ")[0]
            if isinstance(source, BetonSource):
                note = source.note(i)
                return next(iter(_original(note, "file") or _original(note, "key")), source.describe(i))
            if isinstance(source, TarSource):
                return _name_in_tar(*source.place(i))
        return source.describe(i)

    return name


def _name_in_tar(path: Path, offset: int) -> str:
    """The original file's name in the .json behind the image at `offset`, or else the image's own."""
    with Tar(path) as file:
        image, *others = islice(file.walk(offset - BLOCK), 5)
        folder, slash, base = image.name.rpartition("/")
        key = folder + slash + base.partition(".")[0]
        for member in others:
            if member.name == f"{key}.json":
                text = file.read(member.length, member.offset)
                return next(iter(_original(text, "file")), image.name)
    return image.name


def _original(text: bytes, *entries: str) -> set[str]:
    """The original file's names, from these entries of the .json that make_shards writes for a sample."""
    try:
        note = json.loads(text)
    except ValueError:
        return set()
    values = [note.get(entry) for entry in entries] if isinstance(note, dict) else []
    return {value for value in values if isinstance(value, str)}
