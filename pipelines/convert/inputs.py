"""The inputs of a conversion: images, from any kind of SRC, and the files that are left out."""

import hashlib
import zipfile
from pathlib import Path
from typing import NamedTuple


class InputImage(NamedTuple):
    """One image to convert: a file, a member of an archive, or a sample of a data set.

    Attributes:
        name: Relative to the folder that was asked for.
        label: Index of its class, -1 for none.
        place: Offset of its bytes in a tar, its directory entry in a zip, its number in a data set; 0 in a folder.
        length: Bytes.
        modified: Of the file, or of its archive: nanoseconds since 1970.
        archive: The tar that holds it, relative to `Inputs.path`; "" for `Inputs.path` itself, or a plain file.
        key: Key of the sample; "" for its number.
        info: JSON to store with the sample; "" for {"file": name}.
    """

    name: str
    label: int
    place: int | zipfile.ZipInfo
    length: int
    modified: int
    archive: str = ""
    key: str = ""
    info: str = ""


class RefusedFile(NamedTuple):
    """An input that cannot be used, with the reason: a row of the quarantine list."""

    file: str
    reason: str


class Inputs(NamedTuple):
    """Everything that a conversion reads.

    Attributes:
        path: The folder or file to read from: the source, its folder --inside, or the decompressed tar.
        images: Files sorted by name, samples of a data set in their order.
        classes: Name of each label, or None.
        refused: Files that are left out.
        is_data_set: Whether `path` is a data set that was made before.
        notes: Say what a user would not expect: parts of SRC that are left out, rules that were applied.
        fingerprint: Identity of what `images` does not state: a data set's own fingerprint, keys and notes.
        proven: Whether every image was decoded when it was made, and need not be decoded again.
    """

    path: Path
    images: list[InputImage]
    classes: list[str] | None
    refused: list[RefusedFile]
    is_data_set: bool = False
    notes: tuple[str, ...] = ()
    fingerprint: str = ""
    proven: bool = False

    def sha256(self) -> str:
        """Identity of the source: names, labels and sizes."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for image in self.images:
            digest.update(f"{image.name}\0{image.label}\0{image.length}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def modified(self) -> str:
        """Changes when a file is rewritten at the same size: such a source does not continue a conversion."""
        times = [(image.name, image.modified) for image in self.images]
        return hashlib.sha256(ascii(times).encode()).hexdigest()[:16]
