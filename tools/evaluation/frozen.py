"""A frozen encoder on the ranks: its features of whole data sets, in a fixed order, for tools/evaluation/protocols.py.

Ranks share images, never the arithmetic of one: the features are the same for any number of ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
from byolt.pipelines.subset import drawn

# Images of one forward pass of a frozen encoder: so that its rounding does not depend on the ranks.
CHUNK = 64
AT_A_TIME = 256  # images that a rank takes
CALIBRATION = 2048  # images over which the batch norms of an untrained encoder average, at most


@dataclass
class Bench:
    """What every protocol works with."""

    config: Config  # of the run: size, mean, std and threads are used
    encoder: nn.Module  # (N, 3, H, W) -> (N, num_features), on world.device
    world: World
    train: Source
    test: Source
    seed: int
    precision: torch.dtype
    progress: Progress

    @property
    def classes(self) -> int:
        """Number of classes: those that have a name, or more if there are larger labels."""
        named = self.test.classes or self.train.classes or []
        return max(len(named), scores.num_classes(self.train.labels, self.test.labels))

    @property
    def width(self) -> int:
        """Number of features."""
        return int(self.encoder.num_features)  # type: ignore[arg-type]

    def autocast(self) -> torch.autocast:
        """Where the encoder runs in the chosen precision."""
        enabled = self.precision != torch.float32
        return torch.autocast(self.world.device.type, self.precision, enabled=enabled)


def calibrate(bench: Bench) -> None:
    """Gives an untrained encoder's batch norms the statistics of whole batches of plain training images.

    They are still 0 and 1 otherwise, and the comparison would flatter the trained encoder. Every rank takes the same
    images, so that the statistics do not depend on the ranks.
    """
    count = min(CALIBRATION, len(bench.train))
    ids = drawn(len(bench.train), count // AT_A_TIME * AT_A_TIME or count)
    with bench.autocast():
        features.calibrate_batch_norm(bench.encoder, plain_images(bench.train, ids, bench.config, AT_A_TIME))


def plain_features(bench: Bench, source: Source, what: str) -> tuple[Tensor, Tensor]:
    """Features (n, F) float32 of the unaugmented images and labels (n,), in the order of the source, on every rank.

    Each rank takes whole batches, the same whatever the number of ranks. What does not decode is left out.

    Raises:
        FloatingPointError: a feature is not finite.
    """
    batches = np.split(np.arange(len(source)), range(AT_A_TIME, len(source), AT_A_TIME))
    task = bench.progress.add_task(what, total=len(source))
    parts, label_parts = [], []
    for i, ids in mine(batches, bench.world):
        for images, labels in plain_images(source, ids, bench.config, len(ids)):
            parts.append((i, encode(bench, images)))
            label_parts.append((i, labels.to(bench.world.device)))
        bench.progress.update(task, advance=len(ids) * bench.world.size)
    bench.progress.update(task, completed=len(source))
    nothing = torch.zeros(0, bench.width, device=bench.world.device)
    features = in_order(parts, bench.world, nothing)
    labels = in_order(label_parts, bench.world, nothing.new_zeros(0, dtype=torch.int64))
    if not len(features):
        raise ValueError(f"{what}: no image decodes; run tools/verify_shards.py on the data set")
    if not features.isfinite().all():
        raise FloatingPointError(
            f"{what} are not finite: the encoder is not usable, or --precision fp32 is needed"
        )
    return features, labels


@torch.no_grad()
def encode(bench: Bench, images: Tensor) -> Tensor:
    """Features (n, F) float32 on the device, batch norm in eval mode."""
    bench.encoder.eval()
    with bench.autocast():
        chunks = [bench.encoder(chunk.to(bench.world.device)) for chunk in images.split(CHUNK)]
    return torch.cat(chunks).float()


def mine(items: Sequence[Any], world: World) -> Iterator[tuple[int, Any]]:
    """This rank's part of the items, with their numbers."""
    for i in range(world.rank, len(items), world.size):
        yield i, items[i]


def in_order(parts: list[tuple[int, Tensor]], world: World, nothing: Tensor) -> Tensor:
    """The rows of all ranks' numbered parts, by number; `nothing` has no rows and the right shape and type."""
    rows = torch.cat([nothing, *(part for _, part in parts)])
    numbers = torch.cat([torch.full((len(part),), i, device=rows.device) for i, part in parts] or
                        [torch.zeros(0, dtype=torch.int64, device=rows.device)])  # fmt: skip
    order = distributed.gather_rows(numbers, world).argsort(stable=True)
    return distributed.gather_rows(rows, world)[order]
