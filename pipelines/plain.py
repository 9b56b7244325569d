"""Makes batches of images without augmentation, for evaluation."""

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from byolt.configs.schema import Config
from byolt.files import stop
from byolt.pipelines.formats.decode import decode
from byolt.pipelines.formats.encoded import inspect
from byolt.pipelines.resident import Resident
from byolt.pipelines.sources import Source
from byolt.pipelines.torch_backend import resize_bicubic, resize_squares


def plain_images(
    source: Source, ids: npt.NDArray[np.int64], config: Config, batch_size: int = 256
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the center square of each image, resized and normalized.

    The square is the central 7/8 of the short side, rounded and placed as in the reference (byol/utils/dataset.py); of
    an image no larger than a view it is the whole short side. Images that do not decode are left out.

    Yields:
        Images (n, 3, size, size) float32, channels_last, and labels (n,) int64 on the CPU. The images are on the CPU,
        or on the device that keeps the decoded data set (`resident`).
    """
    size, resident = config.augment.size, Resident.of(source)

    def load(number: int) -> Tensor | None:
        try:
            data = source.read(number)
            inspect(data)  # refuses images that would take gigabytes
            return _sized(_center(decode(data), size), size)
        except ValueError:
            return None

    def start(part: npt.NDArray[np.int64]) -> Iterable[Tensor | None]:
        if resident is None:
            return pool.map(load, part.tolist())  # begins now
        return [image if image is None else _center(image, size) for image in resident.decoded(part.tolist())]

    with ThreadPoolExecutor(config.data.threads) as pool:
        parts = [ids[first : first + batch_size] for first in range(0, len(ids), batch_size)]
        ahead = start(parts[0]) if parts else ()
        for part, following in itertools.zip_longest(parts, parts[1:]):
            stop.check()
            loaded = list(ahead)
            ahead = () if following is None else start(following)
            images = [image for image in loaded if image is not None]
            kept = [image is not None for image in loaded]
            if images:
                batch = _stack(images, size)
                mean, std = batch.new_tensor(config.augment.mean), batch.new_tensor(config.augment.std)
                yield ((batch - mean) / std).permute(0, 3, 1, 2), torch.from_numpy(source.labels[part[kept]])


def _center(image: Tensor, size: int) -> Tensor:
    """The square of an image that is resized to `size`."""
    height, width = image.shape[:2]
    side = min(height, width)
    if side > size:
        side = int(side * 7 / 8)
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    return image[top : top + side, left : left + side]


def _sized(square: Tensor, size: int) -> Tensor:
    """Resized to float32 in [0, 1], or as it is, uint8, where the resize would only divide by 255."""
    side = len(square)
    return square if side == size else resize_bicubic(square, 0, 0, side, side, size)


def _stack(squares: list[Tensor], size: int) -> Tensor:
    """Images (n, size, size, 3) float32 in [0, 1] from squares: resized float32 ones, or uint8 ones of any size."""
    alike = len({(square.shape, square.dtype) for square in squares}) == 1
    if alike and squares[0].dtype == torch.uint8:
        stacked = torch.stack(squares)
        # 0-dim, on the device: CUDA multiplies by the rounded reciprocal of a number of the host.
        return (
            stacked / torch.tensor(255.0, device=stacked.device)
            if len(squares[0]) == size
            else resize_squares(stacked, size)
        )
    return torch.stack([_stack([x], size)[0] if x.dtype == torch.uint8 else x for x in squares])
