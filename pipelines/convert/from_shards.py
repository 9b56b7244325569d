"""A data set as what a conversion begins with: tars or .beton files, with the labels, keys and notes of their samples.

A sample's note is the JSON beside its image: the .json of a tar, the first JSON field of a .beton, where the key is
part of it.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from byolt.pipelines.convert.from_files import Entry, Listing, Refused
from byolt.pipelines.formats import tar
from byolt.pipelines.formats.beton import BetonSource, split_path
from byolt.pipelines.formats.index import IMAGE_EXTENSIONS, UNLABELLED, keyed_members
from byolt.pipelines.manifest import MANIFEST, Manifest
from byolt.pipelines.sources import TarSource, open_source

KIND = "data set"  # of a Listing
_MAX_KEY = 90  # bytes: with its extension it must go into a tar's header
_Note = tuple[str, dict[str, Any]]  # key ("" for none) and all else


def is_data_set(source: Path) -> bool:
    """Whether it is a folder with a manifest, or .beton files."""
    return (source / MANIFEST).is_file() or split_path(os.fspath(source))[0][0].endswith(".beton")


def list_data_set(source: Path) -> Listing:
    """Lists the samples in their order.

    Keys are kept where all of them differ and can name the members of a tar; else samples are numbered, and the
    notes keep the keys as "original_key".

    Raises:
        ValueError: It cannot be opened, or a tar contradicts its manifest.
    """
    found = open_source(source)
    if isinstance(found, TarSource):
        notes, left_out = _tar_notes(source)
    elif isinstance(found, BetonSource):
        notes = [_parse(found.note(i)) for i in range(len(found))]
        left_out = found.unread_fields()
    else:
        raise ValueError(f"SRC {source} is no data set")
    keys = {key for key, _ in notes}
    if len(keys) < len(notes) or not all(map(_can_name_a_member, keys)):
        notes = [("", {"original_key": key, **info} if key else info) for key, info in notes]
    modified = max(os.stat(path).st_mtime_ns for path in found.paths)
    entries, refused = [], []
    for i, (key, info) in enumerate(notes):
        name = found.describe(i).rpartition("/")[2]
        label = int(found.labels[i])
        if UNLABELLED <= label <= np.iinfo(np.int32).max:
            text = json.dumps(info) if info else ""
            entries.append(Entry(name, label, i, int(found.lengths[i]), modified, key, text))
        else:
            refused.append(Refused(name, f"its label is {label}: at least -1, and of 32 bits, is possible"))
    if not entries:
        raise ValueError(
            f"SRC {source} holds no sample that can be used, as {refused[0].file}: {refused[0].reason}"
        )
    made_with = Manifest.load(source).settings if (source / MANIFEST).is_file() else {}
    return Listing(
        source,
        KIND,
        "",
        entries,
        found.classes,
        refused,
        left_out=tuple(left_out),
        fingerprint=found.fingerprint,
        proven=bool(made_with.get("decode")),
    )


def _can_name_a_member(key: str) -> bool:
    """Whether a tar's reader would find the same key again: it ends at the first dot of the last part."""
    parts = key.split("/")
    sound = key.isprintable() and not {"", ".", ".."} & set(parts) and not parts[-1].startswith("__")
    return sound and "." not in parts[-1] and len(key.encode()) <= _MAX_KEY


def _parse(text: bytes, key: str | None = None) -> _Note:
    """A note's key, taken out of it, and the rest; a tar has given the key."""
    try:
        info = json.loads(text) if text else {}
    except ValueError:
        info = {"text": text.decode("utf-8", "replace")}
    if not isinstance(info, dict):
        info = {"value": info}
    own = info.pop("key", key)
    if key is not None and own != key:
        info["original_key"] = own
    return key if key is not None else "" if own is None else str(own), info


def _tar_notes(folder: Path) -> tuple[list[_Note], list[str]]:
    """The note of each sample of the manifest, and what else the samples have, by extension."""
    manifest = Manifest.load(folder)
    notes: list[_Note] = []
    extensions: set[str] = set()
    for shard, _, records in manifest.by_shard():
        offsets = records["offset"].tolist()
        path = folder / shard.name
        with tar.opened(path) as descriptor:
            found = dict(_notes_by_offset(path, descriptor, extensions))
        if not found.keys() >= set(offsets):
            raise ValueError(
                f"SRC {path} is not as its manifest says: tools/verify_shards.py {folder} tells where"
            )
        notes += [found[offset] for offset in offsets]
    return notes, [f"members .{extension}" for extension in sorted(extensions)]


def _notes_by_offset(path: Path, descriptor: int, extensions: set[str]) -> Iterator[tuple[int, _Note]]:
    for key, group in groupby(keyed_members(path, descriptor), lambda item: item[0]):
        members = {extension: member for _, extension, member in group}
        images: Iterable[str] = IMAGE_EXTENSIONS & members.keys()
        note = members.get("json")
        text = tar.read_at(path, descriptor, note.length, note.offset) if note else b""
        for extension in images:
            yield members[extension].offset, _parse(text, key)
        extensions |= members.keys() - IMAGE_EXTENSIONS - {"json", "cls"}


class DataSetReader:
    """Reads the samples that `list_data_set` listed; one for each worker."""

    def __init__(self, path: Path) -> None:
        self._source = open_source(path)
        self._crcs = Manifest.load(path).samples["crc32"] if (path / MANIFEST).is_file() else None

    def read(self, entry: Entry) -> bytes:
        """The encoded image. Raises ValueError where it cannot be read, or is not what the manifest describes."""
        try:
            data = self._source.read(entry.offset)
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror or error}") from None
        if self._crcs is not None and zlib.crc32(data[-entry.length :]) != self._crcs[entry.offset]:
            raise ValueError("its bytes are not those that the manifest describes (crc32)")
        return data
