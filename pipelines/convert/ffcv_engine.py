"""Writes a .beton with the library ffcv (optional): its encoder, its raw mode, its exact behavior.

ffcv is imported only on request. Its DatasetWriter starts processes that wait forever when one of them fails on an
image or a full disk; here its parts run in turn in this process, so that errors are raised.
"""

import queue
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from byolt.pipelines.convert.plan import ConversionOptions


def require() -> None:
    """Raises ValueError, with how to install it, if ffcv cannot be imported."""
    try:
        import ffcv.writer  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--engine ffcv needs the library ffcv ({error}): run tools/install_ffcv.sh FOLDER and put FOLDER on "
            "PYTHONPATH, or with OpenCV's and libjpeg-turbo's headers installed run pip install -e '.[ffcv]'; "
            "or leave out --engine, which needs no library"
        ) from None


class _Images:
    """A data set for ffcv's writer: (pixels, label, note) by number."""

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
    options: ConversionOptions,
    page_size: int,
    seed: int,
) -> None:
    """Writes fields image, label and key.

    Args:
        path: The file; it is overwritten.
        pixels: Image `i`, (height, width, 3) uint8 RGB.
        rows: Label and note of each image.
        options: raw_fraction is the probability that an image is stored raw; the others become JPEGs (ffcv's mode
            "proportion"). max_size and quality are ffcv's max_resolution and jpeg_quality.
        page_size: Bytes, a power of two from 2 MiB; the largest image must fit.
        seed: Decides which images are stored raw.
    """
    from ffcv.fields import IntField, JSONField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, worker_job_indexed_dataset

    image = RGBImageField(
        write_mode="proportion",
        compress_probability=1 - options.raw_fraction,
        max_resolution=options.max_size or None,
        jpeg_quality=options.quality,
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
            metadata = writer.metadata_sm, writer.metadata_type
            images = _Images(pixels, rows)
            worker_job_indexed_dataset(numbers, *metadata, fields, allocator, done, allocations, images)
        finally:
            np.random.set_state(state)
        writer.finalize(allocations.get())
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
