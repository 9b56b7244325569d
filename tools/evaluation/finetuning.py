"""Training on cropped and flipped images: their batches, and fine-tuning an encoder."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byolt.configs.schema import Config
from byolt.model import distributed, schedules
from byolt.model.kernels.norm import convert_sync_batchnorm
from byolt.model.quality import linear
from byolt.pipelines.backends import Backend, make_backend
from byolt.pipelines.loader import Batch, Loader
from byolt.pipelines.sources import Source
from byolt.tools.evaluation.frozen import Setup


class Pipeline(NamedTuple):
    """Settings and back end that make training batches; one serves all trainings of a protocol."""

    config: Config
    backend: Backend


def make_pipeline(setup: Setup, batch_size: int) -> Pipeline:
    """The run's crop and flip without its other augmentations; the recipes for ImageNet crop as the paper does."""
    config = setup.config
    view = config.augment.view1.model_copy(update={"jitter": 0.0, "gray": 0.0, "blur": 0.0, "solarize": 0.0})
    config = config.model_copy(
        update={
            "augment": config.augment.model_copy(update={"view1": view, "view2": view}),
            "train": config.train.model_copy(update={"batch_size": batch_size, "accumulation": 1}),
            "run": config.run.model_copy(update={"seed": setup.seed}),
        }
    )
    return Pipeline(config, make_backend(config, setup.world.device, torch.float32)[0])


def training_batches(
    setup: Setup, source: Source, pipeline: Pipeline, steps: int, description: str
) -> Iterator[Batch]:
    """This rank's part of each batch, made by the loader that pre-training uses. Only view 1 is meant to be used."""
    world = setup.world
    task = setup.progress.add_task(description, total=steps)
    config, backend = pipeline
    with Loader(
        config, source, backend, rank=world.rank, world_size=world.size, device=world.device
    ) as loader:
        for [batch] in itertools.islice(loader, steps):
            yield batch
            setup.progress.update(task, advance=1)


def finetune_encoder(
    setup: Setup, source: Source, pipeline: Pipeline, lr: float, epochs: float
) -> tuple[Setup, nn.Linear, int]:
    """Trains a copy of the encoder together with a new classifier.

    Returns:
        The setup with the trained copy, the classifier, and the number of different images that were used.
    """
    device, batch_size = setup.world.device, pipeline.config.train.batch_size
    encoder = copy.deepcopy(setup.encoder)
    head = linear.make_head(setup.width, setup.classes, setup.seed).to(device)
    network = convert_sync_batchnorm(nn.Sequential(encoder, head), setup.world).train()
    wrapped = distributed.wrap(network, setup.world)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=linear.MOMENTUM, nesterov=True)
    steps = max(1, int(epochs * len(source) / batch_size))
    description = f"fine-tuning, lr {lr:g}, {epochs:g} epochs"
    seen: set[int] = set()
    for step, batch in enumerate(training_batches(setup, source, pipeline, steps, description)):
        seen.update(batch.id.tolist())
        optimizer.param_groups[0]["lr"] = schedules.learning_rate(
            step, base_lr=lr, batch_size=batch_size, warmup_steps=0, total_steps=steps
        )
        with setup.autocast():
            logits = wrapped(batch.view1)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), batch.label.to(device)).backward()
        optimizer.step()
    return replace(setup, encoder=encoder), head, count_distinct(seen, setup.world)


def count_distinct(ids: set[int], world: distributed.World) -> int:
    """Number of different sample ids over all ranks; the loader replaces samples that do not decode."""
    mine = torch.tensor(sorted(ids), dtype=torch.int64, device=world.device)
    return len(distributed.gather_rows(mine, world).unique())


def batch_size_for(setup: Setup, asked: int | None, images: int) -> int:
    """The requested batch size; by default 1,024, less if there are fewer images, divisible by the number of ranks.

    Raises:
        ValueError: the batch does not fit the images or the ranks.
    """
    ranks = setup.world.size
    size = asked or min(1024, images)
    if asked is None:
        size -= size % (64 if size >= 64 else 2)
        size -= size % ranks
    if not 2 <= size <= images or size % ranks or size // ranks < 2:
        raise ValueError(
            f"a batch of {size} on {ranks} ranks does not fit {images} training images: set --batch-size to a multiple "
            f"of {ranks}, at least {2 * ranks} and at most {images}"
        )
    return size


def shuffled_batches(images: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Row numbers (batch_size,) of one batch after another, without end.

    Each epoch is a new permutation; its last, incomplete batch is dropped, as the loader does.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(images, generator=generator)
        yield from order.split(batch_size)[: images // batch_size]
