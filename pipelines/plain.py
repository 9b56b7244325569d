"""Makes batches of images without augmentation, for evaluation."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from byolt.configs.schema import Config
from byolt.pipelines.formats.decode import decode
from byolt.pipelines.formats.encoded import inspect
from byolt.pipelines.sources import Source
from byolt.pipelines.torch_backend import resize_bicubic


def plain_images(
    source: Source, ids: npt.NDArray[np.int64], config: Config, batch_size: int = 256
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the center square of each image, resized and normalized.

    The square is the central 7/8 of the short side, rounded and placed as in the reference (byol/utils/dataset.py); of
    an image no larger than a view it is the whole short side.

    Args:
        source: labeled images; undecodable ones are left out.
        ids: the samples.
        config: size, mean and std of the run; data.threads threads decode.
        batch_size: images per batch.

    Yields:
        Images (n, 3, size, size) float32 on the CPU, channels_last, and labels (n,) int64.
    """
    mean, std = torch.tensor(config.augment.mean), torch.tensor(config.augment.std)

    def load(number: int) -> Tensor | None:
        try:
            data = source.read(number)
            inspect(data)  # refuses images that would take gigabytes
            return _center(decode(data), config.augment.size)
        except ValueError:
            return None

    with ThreadPoolExecutor(config.data.threads) as pool:
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            loaded = list(pool.map(load, part.tolist()))
            images = [image for image in loaded if image is not None]
            kept = [image is not None for image in loaded]
            if images:
                batch = (torch.stack(images) - mean) / std
                yield batch.permute(0, 3, 1, 2), torch.from_numpy(source.labels[part[kept]])


def _center(image: Tensor, size: int) -> Tensor:
    height, width = image.shape[:2]
    side = min(height, width)
    if side > size:
        side = int(side * 7 / 8)
    return resize_bicubic(image, (height - side + 1) // 2, (width - side + 1) // 2, side, side, size)
