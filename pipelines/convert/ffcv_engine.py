"""Writes a .beton with ffcv itself, for whoever wants its encoder, its raw mode or its exact behaviour. Optional.

ffcv is imported only when it is asked for. Its DatasetWriter starts processes that wait forever when one of them fails
on an image or a full disk; here its parts run one after the other in this process, so that errors come out.
"""

import queue
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def require() -> None:
    """Raises ValueError, with how to get it, where ffcv cannot be imported."""
    try:
        import ffcv.writer  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--engine ffcv needs the library ffcv ({error}): install it by tools/install_ffcv.sh FOLDER and put "
            "FOLDER on PYTHONPATH, or by pip install 'byolt[ffcv]' where OpenCV's and libjpeg-turbo's headers are; "
            "without --engine .beton files are written without it"
        ) from None


class _Images:
    """What ffcv's writer takes as a data set: (pixels, label, note) by number."""

    def __init__(
        self, pixels: Callable[[int], npt.NDArray[np.uint8]], rows: list[tuple[int, dict[str, Any]]]
    ) -> None:
        self._pixels, self._rows = pixels, rows

    def __getitem__(self, i: int) -> tuple[npt.NDArray[np.uint8], int, dict[str, Any]]:
        return self._pixels(i), *self._rows[i]


def write(
    path: Path,
    pixels: Callable[[int], npt.NDArray[np.uint8]],
    rows: list[tuple[int, dict[str, Any]]],
    *,
    page_size: int,
    raw_fraction: float,
    max_size: int,
    quality: int,
    seed: int,
) -> None:
    """Writes fields image, label and key.

    Args:
        path: The file; what it holds is overwritten.
        pixels: Image `i`, (height, width, 3) uint8 RGB.
        rows: Label of each image, and what its JSON holds.
        page_size: Bytes, a power of two from 2 MiB on; the largest image must fit.
        raw_fraction: Probability of an image to be stored raw; the others become JPEGs (ffcv's mode "proportion").
        max_size: ffcv's max_resolution; 0 for none.
        quality: ffcv's jpeg_quality.
        seed: Of which images become raw.
    """
    from ffcv.fields import IntField, JSONField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, worker_job_indexed_dataset

    image = RGBImageField(
        write_mode="proportion",
        compress_probability=1 - raw_fraction,
        max_resolution=max_size or None,
        jpeg_quality=quality,
    )
    fields = {"image": image, "label": IntField(), "key": JSONField()}
    writer = DatasetWriter(str(path), fields, page_size=page_size, num_workers=1)
    writer.num_samples = len(rows)
    writer.prepare()
    try:
        numbers: queue.SimpleQueue = queue.SimpleQueue()
        numbers.put([(i, i) for i in range(len(rows))])
        numbers.put(None)  # the end
        allocations: queue.SimpleQueue = queue.SimpleQueue()
        allocator = MemoryAllocator(writer.fname, writer.data_region_start, page_size)
        done = get_context("spawn").Value("q", 0)
        state = np.random.get_state()  # ffcv draws from numpy's global generator
        np.random.seed(seed % 2**32)
        try:
            worker_job_indexed_dataset(
                numbers,
                writer.metadata_sm,
                writer.metadata_type,
                fields,
                allocator,
                done,
                allocations,
                _Images(pixels, rows),
            )
        finally:
            np.random.set_state(state)
        writer.finalize(allocations.get())
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
