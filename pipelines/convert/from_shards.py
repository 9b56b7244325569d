"""A data set as the input of a conversion: tars or .beton files, with the labels, keys and notes of their samples.

Tars made elsewhere have the samples that `--index` finds, and those whose images have to be converted.
The note of a sample is the JSON beside its image: the .json of a tar, the first JSON field of a .beton, which includes
the key.
"""

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from byolt.files.console import shown
from byolt.pipelines.convert.inputs import InputImage, Inputs, RefusedFile
from byolt.pipelines.formats.beton import BetonSource, split_path
from byolt.pipelines.formats.index import ALL_IMAGES, DOTTED, TarSample, tar_samples
from byolt.pipelines.formats.labels import UNLABELED, class_names, label_number, numbers_of
from byolt.pipelines.formats.tar import Tar
from byolt.pipelines.manifest import MANIFEST, Manifest
from byolt.pipelines.sources import TarSource, open_source

_MAX_KEY = 90  # bytes: with its extension it must go into a tar's header
Note = tuple[str, dict[str, Any]]  # key ("" for none) and everything else


def is_data_set(source: Path) -> bool:
    """Whether `source` is a folder with a manifest, or names .beton files.

    Tars with a manifest from --index do not count: it leaves out the images that have to be converted.
    """
    if (source / MANIFEST).is_file():
        return not Manifest.load(source).settings.get("indexed")
    return split_path(os.fspath(source))[0][0].endswith(".beton")


def list_data_set(source: Path) -> Inputs:
    """Lists the samples in their order.

    Keys are kept if all of them differ and can name the members of a tar. Otherwise samples are numbered, and the
    notes keep the keys as "original_key".

    Raises:
        ValueError: It cannot be opened, or a tar contradicts its manifest.
    """
    found = open_source(source)
    assert isinstance(found, TarSource | BetonSource)  # `is_data_set`
    if isinstance(found, BetonSource):
        notes, left_out = [parse_note(found.note(i)) for i in range(len(found))], found.unread_fields()
    else:
        notes, left_out = _tar_notes(source)
    notes = settle_keys(notes)
    modified = max(os.stat(path).st_mtime_ns for path in found.paths)
    images, refused = [], []
    for i, (key, info) in enumerate(notes):
        name = found.describe(i).rpartition("/")[2]
        label = int(found.labels[i])
        if UNLABELED <= label <= np.iinfo(np.int32).max:
            text = json.dumps(info) if info else ""
            images.append(InputImage(name, label, i, int(found.lengths[i]), modified, "", key, text))
        else:
            refused.append(RefusedFile(name, f"its label is {label}: it must be at least -1 and below 2^31"))
    if not images:
        raise ValueError(
            f"SRC {source} holds no usable sample, for example {refused[0].file}: {refused[0].reason}"
        )
    made_with = Manifest.load(source).settings if (source / MANIFEST).is_file() else {}
    return Inputs(
        source,
        images,
        found.classes,
        refused,
        is_data_set=True,
        notes=(f"left out: {shown(left_out)}",) if left_out else (),
        fingerprint=found.fingerprint,
        proven=bool(made_with.get("decode")),
    )


def settle_keys(notes: list[Note]) -> list[Note]:
    """Keeps the keys or drops them, as `list_data_set` says."""
    keys = {key for key, _ in notes}
    if len(keys) == len(notes) and all(map(_can_name_a_member, keys)):
        return notes
    return [("", {"original_key": key, **info} if key else info) for key, info in notes]


def _can_name_a_member(key: str) -> bool:
    """Whether a tar's reader would find the same key: it ends at the first dot of the last part."""
    parts = key.split("/")
    sound = key.isprintable() and not {"", ".", ".."} & set(parts) and not parts[-1].startswith("__")
    return sound and "." not in parts[-1] and len(key.encode()) <= _MAX_KEY


def parse_note(text: bytes, key: str | None = None) -> Note:
    """Splits a note into its key and the rest; in a tar the name of the member gives the key."""
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


def _tar_notes(folder: Path) -> tuple[list[Note], list[str]]:
    """The note of each sample of the manifest, and the extensions of their other members."""
    manifest = Manifest.load(folder)
    notes: list[Note] = []
    extensions: set[str] = set()
    for shard, _, records in manifest.by_shard():
        offsets = records["offset"].tolist()
        path = folder / shard.name
        found: dict[int, Note] = {}
        with Tar(path) as file:
            for sample in tar_samples(file):
                if sample.image:
                    found[sample.image.offset] = tar_note(file, sample)
                    extensions.update(sample.others)
        if not found.keys() >= set(offsets):
            raise ValueError(
                f"SRC {path} differs from its manifest: tools/verify_shards.py {folder} says where"
            )
        notes += [found[offset] for offset in offsets]
    return notes, [f"members .{extension}" for extension in sorted(extensions)]


def tar_note(file: Tar, sample: TarSample) -> Note:
    """The note of a sample of a tar."""
    note = sample.note
    return parse_note(file.read(note.length, note.offset) if note else b"", sample.key)


class DataSetReader:
    """Reads the samples that `list_data_set` listed; one for each worker."""

    def __init__(self, path: Path) -> None:
        self._source = open_source(path)

    def read(self, image: InputImage) -> bytes:
        """The encoded image. Raises ValueError where it cannot be read, or its bytes are not those of the index."""
        assert isinstance(image.place, int)  # its number
        try:
            return self._source.read(image.place)
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror or error}") from None


class InputTar(NamedTuple):
    """One tar."""

    archive: str  # the file, relative to `Inputs.path`; "" for `Inputs.path` itself
    name: str  # begins the names of its samples; "" for SRC itself
    start: int  # offset in the file; more than 0 in a tar of tars
    end: int  # offset of the byte behind it
    modified: int  # nanoseconds since 1970


def is_image(name: str) -> bool:
    """Whether the name has the extension of an image."""
    return name.rpartition(".")[2].lower() in ALL_IMAGES


def are_samples(names: Collection[str]) -> bool:
    """Whether the members of a tar are samples of a WebDataset rather than files in class folders.

    They are if an image has a .cls beside it; or a .json or .txt, unless the images are in several folders.
    """
    stems: dict[str, set[str]] = {}
    for name in names:
        stem, _, extension = name.rpartition(".")
        stems.setdefault("image" if is_image(name) else extension.lower(), set()).add(stem)
    images = stems.get("image", set())
    if images & stems.get("cls", set()):
        return True
    folders = {stem.rpartition("/")[0] for stem in images}
    return len(folders) == 1 and bool(images & (stems.get("json", set()) | stems.get("txt", set())))


def list_samples(source: Path, path: Path, tars: list[InputTar], inside: str) -> Inputs:
    """Lists the samples in tars at `path`, which errors name as SRC; keys and notes as `list_data_set` does.

    Only keys in the folder `inside` are taken, and its name is dropped from them; "" takes all.

    Raises:
        ValueError: A damaged tar, or none of the samples can be used.
    """
    images: list[tuple[InputImage, int, str | None]] = []  # with offset and label
    notes: list[Note] = []
    refused = []
    imageless = dotted = 0
    others: set[str] = set()
    prefix = f"{inside}/" if inside else ""
    for part in tars:
        with Tar(path / part.archive, source / part.name) as file:
            for sample in tar_samples(file, part.start, part.end):
                if not sample.key.startswith(prefix):
                    continue
                name = f"{part.name}/{sample.key}" if part.name else sample.key
                if sample.reason:
                    refused.append(RefusedFile(name, f"offset {sample.at}: {sample.reason}"))
                elif sample.image is None:
                    imageless += 1
                else:
                    key, info = tar_note(file, sample)
                    notes.append((key[len(prefix) :], info))
                    others.update(sample.others)
                    dotted += sample.has_dot
                    place = sample.image.offset, sample.image.length, part.modified, part.archive
                    images.append((InputImage(name, -1, *place), sample.at, sample.label))
    classes = class_names(label for _, _, label in images)
    numbers = numbers_of(classes)
    listed = []
    digest = hashlib.sha256()
    for (image, at, text), (key, info) in zip(images, settle_keys(notes), strict=True):
        try:
            label = label_number(text, numbers)
        except ValueError as error:
            refused.append(RefusedFile(image.name, f"offset {at}: {error}"))
            continue
        note = json.dumps(info) if info else ""
        digest.update(f"{key}\0{note}\n".encode("utf-8", "surrogateescape"))
        listed.append(image._replace(label=label, key=key, info=note))
    if not listed:
        example = f", for example {refused[0].file}: {refused[0].reason}" if refused else ""
        raise ValueError(f"SRC {source} holds WebDataset tars without a sample that can be used{example}")
    number, kind = sum(image.label >= 0 for image in listed), "a class name" if classes else "an integer"
    labels = f"{number:,} with a label, {kind}" if number else "no labels"
    said = [f"read as WebDataset: {len(listed):,} samples, {labels}"]
    if dotted:
        said += [f"{DOTTED.format(dotted)}; samples are numbered, and original_key in the .json is their key"]
    left_out = [f"{imageless} names without an image"] if imageless else []
    left_out += [f"members .{extension}" for extension in sorted(others)]
    if left_out:
        said.append(f"left out: {shown(left_out)}")
    return Inputs(path, listed, classes, refused, notes=tuple(said), fingerprint=digest.hexdigest())
