"""WebDataset tars made elsewhere as the input of a conversion: their samples are those that `--index` would find."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from byolt.pipelines.convert.from_shards import Note, settle_keys, tar_note
from byolt.pipelines.convert.inputs import InputImage, Inputs, RefusedFile
from byolt.pipelines.formats import tar
from byolt.pipelines.formats.index import (
    ALL_IMAGES,
    DOTTED,
    class_names,
    label_number,
    numbers_of,
    tar_samples,
)


class InputTar(NamedTuple):
    """One tar.

    Attributes:
        archive: Relative to `Inputs.path`; "" for `Inputs.path` itself.
        name: Begins the names of its samples; "" for a lone tar.
        modified: Nanoseconds since 1970.
    """

    archive: str
    name: str
    modified: int


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
    """Lists the samples; keys and notes as `list_data_set` does.

    Args:
        source: SRC, named in errors.
        path: The tar, or the folder of the tars.
        tars: In their order.
        inside: Folder of the keys to take, "" for all; it is dropped from them.

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
        file = path / part.archive
        with tar.opened(file) as descriptor:
            for sample in tar_samples(file, descriptor, tar.walk(source / part.name, descriptor)):
                if not sample.key.startswith(prefix):
                    continue
                name = f"{part.name}/{sample.key}" if part.name else sample.key
                if sample.reason:
                    refused.append(RefusedFile(name, f"offset {sample.at}: {sample.reason}"))
                elif sample.image is None:
                    imageless += 1
                else:
                    key, info = tar_note(file, descriptor, sample)
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
    number = sum(image.label >= 0 for image in listed)
    labels = (
        f"{number:,} with a label, {'a class name' if classes else 'an integer'}" if number else "no labels"
    )
    said = [f"read as WebDataset: {len(listed):,} samples, {labels}"]
    if dotted:
        said.append(
            f"{DOTTED.format(dotted)}; samples are numbered, and original_key in the .json is their key"
        )
    left_out = [f"{imageless} names without an image"] if imageless else []
    left_out += [f"members .{extension}" for extension in sorted(others)]
    if left_out:
        said.append(f"left out: {', '.join(left_out)}")
    return Inputs(path, listed, classes, refused, notes=tuple(said), fingerprint=digest.hexdigest())
