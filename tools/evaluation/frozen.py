"""A frozen encoder on all ranks, and its features of whole data sets in a fixed order.

Ranks share the images of a data set, never the arithmetic of one image: the features do not depend on their number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from byolt.configs.schema import Config
from byolt.model import distributed
from byolt.model.distributed import World
from byolt.model.quality import features, scores
from byolt.pipelines.plain import plain_images
from byolt.pipelines.sources import Source
from byolt.pipelines.subset import random_ids

T = TypeVar("T")
CHUNK = 64  # images of one forward pass: a fixed number, so that rounding does not depend on the ranks
BATCH = 256  # images that a rank decodes before it takes the next ones
CALIBRATION = 2048  # largest number of images over which batch norms of an untrained encoder are averaged


@dataclass
class Setup:
    """The encoder, the data and the ranks of one evaluation; every protocol works on a Setup."""

    config: Config  # the run's; size, mean, std and threads are used
    encoder: nn.Module  # (N, 3, H, W) -> (N, num_features), on world.device
    world: World
    train: Source
    test: Source
    seed: int
    precision: torch.dtype
    progress: Progress

    @property
    def classes(self) -> int:
        """Number of classes: the number of class names, or more if a label is larger."""
        named = self.test.classes or self.train.classes or []
        return max(len(named), scores.num_classes(self.train.labels, self.test.labels))

    @property
    def width(self) -> int:
        """Number of features."""
        return int(self.encoder.num_features)  # type: ignore[arg-type]

    def autocast(self) -> torch.autocast:
        """The context in which the encoder runs in the chosen precision."""
        enabled = self.precision != torch.float32
        return torch.autocast(self.world.device.type, self.precision, enabled=enabled)


def calibrate(setup: Setup) -> None:
    """Sets the batch-norm statistics of an untrained encoder from whole batches of plain training images.

    They would stay at mean 0 and variance 1, and the comparison would flatter the trained encoder. All ranks use the
    same images, so the statistics do not depend on the number of ranks.
    """
    count = min(CALIBRATION, len(setup.train))
    ids = random_ids(len(setup.train), count // BATCH * BATCH or count)
    with setup.autocast():
        features.calibrate_batch_norm(setup.encoder, plain_images(setup.train, ids, setup.config, BATCH))


def plain_features(setup: Setup, source: Source, description: str) -> tuple[Tensor, Tensor]:
    """Features (n, F) float32 of the unaugmented images and labels (n,), in the order of the source, on every rank.

    Images that do not decode are left out. `description` labels the progress bar and begins error messages.

    Raises:
        ValueError: no image decodes.
        FloatingPointError: a feature is not finite.
    """
    batches = np.split(np.arange(len(source)), range(BATCH, len(source), BATCH))
    task = setup.progress.add_task(description, total=len(source))
    parts, label_parts = [], []
    for i, ids in share_of_rank(batches, setup.world):
        for images, labels in plain_images(source, ids, setup.config, len(ids)):
            parts.append((i, encode(setup, images)))
            label_parts.append((i, labels.to(setup.world.device)))
        setup.progress.update(task, advance=len(ids) * setup.world.size)
    setup.progress.update(task, completed=len(source))
    empty = torch.zeros(0, setup.width, device=setup.world.device)
    features = gather_in_order(parts, setup.world, empty)
    labels = gather_in_order(label_parts, setup.world, empty.new_zeros(0, dtype=torch.int64))
    if not len(features):
        raise ValueError(f"{description}: no image decodes; run tools/verify_shards.py on the data set")
    if not features.isfinite().all():
        raise FloatingPointError(
            f"{description} are not finite: the encoder is not usable, or --precision fp32 is needed"
        )
    return features, labels


@torch.no_grad()
def encode(setup: Setup, images: Tensor) -> Tensor:
    """Features (n, F) float32 on the device, batch norm in eval mode."""
    setup.encoder.eval()
    with setup.autocast():
        chunks = [setup.encoder(chunk.to(setup.world.device)) for chunk in images.split(CHUNK)]
    return torch.cat(chunks).float()


def share_of_rank(items: Sequence[T], world: World) -> Iterator[tuple[int, T]]:
    """The items that this rank works on, every world.size-th, each with its index."""
    for i in range(world.rank, len(items), world.size):
        yield i, items[i]


def gather_in_order(parts: list[tuple[int, Tensor]], world: World, empty: Tensor) -> Tensor:
    """The rows of all ranks' parts, sorted by the index of the part, on every rank.

    A part is its index and rows (n, ...); `empty` has no rows, but the shape and dtype of the parts.
    """
    rows = torch.cat([empty, *(part for _, part in parts)])
    indices = [i for i, part in parts for _ in range(len(part))]
    order = distributed.gather_rows(torch.tensor(indices, dtype=torch.int64, device=rows.device), world)
    return distributed.gather_rows(rows, world)[order.argsort(stable=True)]
