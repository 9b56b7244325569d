"""The inputs of a conversion: images, from any kind of SRC, and the files that are left out."""

import hashlib
import zipfile
from pathlib import Path
from typing import NamedTuple


class InputImage(NamedTuple):
    """One image to convert: a file, a member of an archive, or a sample of a data set."""

    name: str  # relative to the folder that was asked for
    label: int  # index of its class, -1 for none
    # Offset of its bytes in a tar, its directory entry in a zip, its number in a data set; 0 for a file.
    place: int | zipfile.ZipInfo
    length: int  # bytes
    modified: int  # of the file, or of its archive: nanoseconds since 1970
    archive: str = ""  # the tar that holds it, relative to `Inputs.path`; "" for that path or a plain file
    key: str = ""  # key of the sample; "" for its number
    info: str = ""  # JSON to store with the sample; "" for {"file": name}


class RefusedFile(NamedTuple):
    """An input that cannot be used, with the reason: a row of the quarantine list."""

    file: str
    reason: str


class Inputs(NamedTuple):
    """Everything that a conversion reads."""

    path: Path  # the folder or file to read from: the source, its folder --inside, or the decompressed tar
    images: list[InputImage]  # files sorted by name, samples of a data set in their order
    classes: list[str] | None  # name of each label, or None
    refused: list[RefusedFile]  # files that are left out
    is_data_set: bool = False  # whether `path` is a data set that was made before
    notes: tuple[str, ...] = ()  # what a user would not expect: parts left out, rules applied
    fingerprint: str = ""  # of what `images` does not state: a data set's own fingerprint, keys and notes
    proven: bool = False  # whether every image was decoded when the data set was made

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
