"""Training on cropped and flipped images: batches of them, and fine-tuning an encoder."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byolt.configs.schema import Config, ViewConfig
from byolt.model import distributed, schedules
from byolt.model.quality import linear
from byolt.model.sync_norm import convert_sync_batchnorm
from byolt.pipelines.backends import Backend, make_backend
from byolt.pipelines.loader import Batch, Loader
from byolt.pipelines.sources import Source
from byolt.tools.evaluation.frozen import Bench


def crop_and_flip(config: Config) -> ViewConfig:
    """The run's own crop and flip and nothing else (of the ImageNet recipes: the paper's)."""
    return config.augment.view1.model_copy(update={"jitter": 0.0, "gray": 0.0, "blur": 0.0, "solarize": 0.0})


class Recipe(NamedTuple):
    """How batches are made; one for all trainings of a protocol."""

    config: Config
    backend: Backend


def make_recipe(bench: Bench, batch_size: int) -> Recipe:
    """The run's config with crop and flip alone, this batch and the seed of the bench, and a back end for it."""
    config, view = bench.config, crop_and_flip(bench.config)
    config = config.model_copy(
        update={
            "augment": config.augment.model_copy(update={"view1": view, "view2": view}),
            "train": config.train.model_copy(update={"batch_size": batch_size, "accumulation": 1}),
            "run": config.run.model_copy(update={"seed": bench.seed}),
        }
    )
    return Recipe(config, make_backend(config, bench.world.device, torch.float32)[0])


def augmented(bench: Bench, source: Source, recipe: Recipe, steps: int, what: str) -> Iterator[Batch]:
    """This rank's part of so many batches of cropped and flipped images, through the loader of the training.

    The loader makes two views of each image; the second is not used.
    """
    world = bench.world
    task = bench.progress.add_task(what, total=steps)
    config, backend = recipe
    with Loader(
        config, source, backend, rank=world.rank, world_size=world.size, device=world.device
    ) as loader:
        for [batch] in itertools.islice(loader, steps):
            yield batch
            bench.progress.update(task, advance=1)


def train_all(
    bench: Bench, source: Source, recipe: Recipe, lr: float, epochs: float
) -> tuple[Bench, nn.Linear, int]:
    """A trained copy of the encoder, in a bench of its own, its classifier, and how many images it has seen."""
    device, batch_size = bench.world.device, recipe.config.train.batch_size
    encoder = copy.deepcopy(bench.encoder)
    head = linear.make_head(bench.width, bench.classes, bench.seed).to(device)
    whole = convert_sync_batchnorm(nn.Sequential(encoder, head), bench.world).train()
    wrapped = distributed.wrap(whole, bench.world)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.0, momentum=linear.MOMENTUM, nesterov=True)
    steps = max(1, int(epochs * len(source) / batch_size))
    what = f"fine-tuning, lr {lr:g}, {epochs:g} epochs"
    seen: set[int] = set()
    for step, batch in enumerate(augmented(bench, source, recipe, steps, what)):
        seen.update(batch.id.tolist())
        schedule = {"base_lr": lr, "batch_size": batch_size, "warmup_steps": 0, "total_steps": steps}
        optimizer.param_groups[0]["lr"] = schedules.learning_rate(step, **schedule)  # type: ignore[arg-type]
        with bench.autocast():
            logits = wrapped(batch.view1)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), batch.label.to(device)).backward()
        optimizer.step()
    return replace(bench, encoder=encoder), head, distinct(seen, bench)


def distinct(seen: set[int], bench: Bench) -> int:
    """How many images the ranks have seen together; those that do not decode give way to others."""
    ids = torch.tensor(sorted(seen), dtype=torch.int64, device=bench.world.device)
    return len(distributed.gather_rows(ids, bench.world).unique())


def batch_size_for(bench: Bench, asked: int | None, images: int) -> int:
    """What was asked for; or 1,024, or what fits the images and most numbers of ranks.

    Raises:
        ValueError: the images or the ranks do not allow it.
    """
    size = asked or min(1024, images)
    if asked is None:
        size -= size % (64 if size >= 64 else 2)
        size -= size % bench.world.size
    if not 2 <= size <= images or size % bench.world.size or size // bench.world.size < 2:
        raise ValueError(
            f"a batch of {size} on {bench.world.size} ranks does not fit {images} training images: set --batch-size to "
            f"a multiple of {bench.world.size}, at least {2 * bench.world.size} and at most {images}"
        )
    return size


def orders(images: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Rows of one batch after another, a new permutation each epoch; its rest is left out, as the loader does."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(images, generator=generator)
        yield from order.split(batch_size)[: images // batch_size]
