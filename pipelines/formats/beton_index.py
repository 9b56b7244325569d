"""The index of a .beton: the checksum of each image, in FILE.index beside it.

    one line: byolt-beton-index 1, bytes of the file, sha256 of the rest | uint64 per image: `encoded.checksum`

`tools/verify_shards.py --index` writes it after it has decoded every image.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from byolt.files.atomic import writing
from byolt.files.regular import read_regular

_MAGIC = "byolt-beton-index 1"


def index_path(beton: str | os.PathLike[str]) -> Path:
    """Where the index of a .beton is."""
    return Path(f"{os.fspath(beton)}.index")


def write_index(beton: str | os.PathLike[str], checksums: npt.NDArray[np.uint64]) -> Path:
    """Writes the index of a .beton and returns its path. Raises OSError."""
    path, body = index_path(beton), checksums.astype("<u8").tobytes()
    with writing(path) as file:
        file.write(f"{_MAGIC} {os.path.getsize(beton)} {hashlib.sha256(body).hexdigest()}\n".encode() + body)
    return path


def read_indexes(
    betons: Sequence[str | os.PathLike[str]], counts: Sequence[int]
) -> npt.NDArray[np.uint64] | None:
    """The checksums of all images of .beton files that hold `counts` images; None unless each file has an index.

    Raises:
        ValueError: An index is damaged, or not of the file as it is now.
    """
    paths = [index_path(beton) for beton in betons]
    if not all(path.exists() for path in paths):
        return None
    parts = []
    for path, beton, count in zip(paths, betons, counts, strict=True):
        try:
            line, _, body = read_regular(path).partition(b"\n")
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        expected = f"{_MAGIC} {os.path.getsize(beton)} {hashlib.sha256(body).hexdigest()}"
        if line != expected.encode() or len(body) != 8 * count:
            raise stale_index(beton)
        parts.append(np.frombuffer(body, "<u8").astype(np.uint64))
    return np.concatenate(parts)


def stale_index(beton: str | os.PathLike[str]) -> ValueError:
    """The error for an index that is not of this file."""
    path = index_path(beton)
    return ValueError(
        f"{path} is damaged, or {beton} was written again after it: "
        f"run tools/verify_shards.py --index {beton}, or remove {path.name}"
    )
