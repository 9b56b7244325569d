"""The protocols by which tools/evaluate.py measures a frozen or fine-tuned encoder: kNN, linear, fine-tune, transfer.

Ranks share images and trials, never the arithmetic of one: what each computes is gathered in a fixed order, so that
the answer is the same for any number of ranks (fine-tuning: to rounding, its gradients are averaged over ranks).
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import Config, ViewConfig
from model import distributed, evaluate, probe, schedules
from model.distributed import World
from pipelines.backends import make_backend
from pipelines.loader import Batch, Loader
from pipelines.plain import plain_images
from pipelines.sources import Source
from pipelines.subset import Subset, balanced_ids

HELD_OUT = 10_009  # images of train on which settings are picked (paper, App. C.1); of a small set a tenth
CHUNK = (
    64  # images of one forward pass of a frozen encoder, so that its rounding does not depend on the ranks
)
_FEATURES = 256  # images that a rank takes at a time


class Outcome(NamedTuple):
    """What one classifier says of the test images."""

    name: str
    scores: Tensor  # (Q, C)
    settings: dict[str, Any]


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
        """Number of classes."""
        return int(max(self.train.labels.max(), self.test.labels.max())) + 1

    @property
    def width(self) -> int:
        """Number of features."""
        return int(self.encoder.num_features)  # type: ignore[arg-type]

    def autocast(self) -> torch.autocast:
        """Where the encoder runs in the chosen precision."""
        enabled = self.precision != torch.float32
        return torch.autocast(self.world.device.type, self.precision, enabled=enabled)


# ---------------------------------------------------------------------------------------------------- protocols


def knn(
    bench: Bench, ks: Sequence[int] = (200, 20), temperature: float = 0.1
) -> tuple[list[Outcome], Tensor]:
    """Weighted vote of the k nearest training images by cosine.

    Returns:
        One outcome per k, and the labels (Q,) of the test images.
    """
    bank, bank_labels = plain_features(bench, bench.train, "training features")
    queries, labels = plain_features(bench, bench.test, "test features")
    outcomes = []
    for k in ks:
        parts = [
            (i, evaluate.knn_votes(bank, bank_labels, part, bench.classes, k, temperature))
            for i, part in _mine(queries.split(_FEATURES), bench.world)
        ]
        votes = _in_order(parts, bench.world, queries.new_zeros(0, bench.classes))
        votes[votes == 0] = -torch.inf  # a class without a neighbour is no answer
        outcomes.append(Outcome(f"k = {k}", votes, {"k": min(k, len(bank)), "temperature": temperature}))
    return outcomes, labels


def linear(
    bench: Bench, lrs: Sequence[float], epochs: float, batch_size: int | None, fast: bool
) -> tuple[list[Outcome], Tensor]:
    """A linear classifier on the frozen encoder, batch norm frozen too; the learning rate is picked on held-out images.

    All learning rates are trained side by side on the same features, once; the chosen head has not seen the held-out
    part (the paper trains again with it).

    Args:
        bench: encoder and data.
        lrs: learning rates at a batch of 256.
        epochs: passes over the images.
        batch_size: None for 1,024, or less where there are fewer images.
        fast: take the features of the unaugmented images once, instead of those of a new crop and flip each epoch.
    """
    fit, held = _hold_out(bench)
    batch_size = _batch_size(bench, batch_size, len(fit))
    steps = max(1, int(epochs * len(fit) / batch_size))
    device = bench.world.device
    sweep = probe.HeadSweep(bench.width, bench.classes, lrs, batch_size, steps, device, bench.seed)
    if fast:
        features, labels = plain_features(bench, fit, "training features")
        order = _orders(len(features), batch_size, bench.seed)
        for rows in bench.progress.track(itertools.islice(order, steps), total=steps, description="heads"):
            sweep.step(features[rows], labels[rows])
    else:
        for batch in _augmented(bench, fit, batch_size, steps, "heads"):
            mine = _encode(bench, batch.view1)
            features = distributed.gather_rows(mine, bench.world)
            sweep.step(features, distributed.gather_rows(batch.label.to(device), bench.world))
    held_features, held_labels = plain_features(bench, held, "held-out features")
    tried = [_top1(scores, held_labels) for scores in sweep.scores(held_features)]
    best = max(range(len(lrs)), key=tried.__getitem__)
    features, labels = plain_features(bench, bench.test, "test features")
    settings = {
        "epochs": epochs, "steps": steps, "batch_size": batch_size, "momentum": 0.9, "lr": lrs[best],
        "features": "unaugmented, cached" if fast else "crop and flip, anew each epoch",
        "train_images": len(fit), "held_out_images": len(held),
        "held_out_top1": dict(zip(map(str, lrs), tried, strict=True)),
    }  # fmt: skip
    return [Outcome(f"lr = {lrs[best]:g}", sweep.scores(features)[best], settings)], labels


def finetune(
    bench: Bench,
    chosen: npt.NDArray[np.int64] | float,
    lrs: Sequence[float],
    epochs: Sequence[float],
    batch_size: int | None,
) -> tuple[list[Outcome], Tensor]:
    """Encoder and a new classifier trained on the labelled part of the images; settings are picked on held-out ones.

    SGD with Nesterov momentum .9, crop and flip, no decay, no warm-up, cosine (paper, App. C.2).

    Args:
        bench: encoder and data.
        chosen: share of every class of train, or ids; the held-out images are others, but for a share of 1.
        lrs: learning rates at a batch of 256.
        epochs: lengths of training; every pair of a rate and a length is tried.
        batch_size: None for 1,024, or less where there are fewer images.
    """
    if isinstance(chosen, float) and chosen == 1:
        fit, held = _hold_out(bench)
    else:
        ids = balanced_ids(bench.train.labels, chosen, bench.seed) if isinstance(chosen, float) else chosen
        others = np.setdiff1d(np.arange(len(bench.train)), ids)
        if not len(others):
            raise ValueError("all training images are taken: leave some out, on which settings are picked")
        fit = Subset(bench.train, ids)
        held = Subset(bench.train, others[_held(bench.train.labels[others], bench.seed)])
    batch_size = _batch_size(bench, batch_size, len(fit))
    tried: dict[str, float] = {}
    best: tuple[float, float, float, Bench, nn.Linear] | None = None
    for lr, length in itertools.product(lrs, epochs):
        tuned, head = _train_all(bench, fit, lr, length, batch_size)
        with torch.no_grad():
            features, labels = plain_features(tuned, held, "held-out features")
            accuracy = _top1(head(features), labels)
        tried[f"lr {lr:g}, {length:g} epochs"] = accuracy
        if best is None or accuracy > best[0]:
            best = (accuracy, lr, length, tuned, head)
    assert best is not None
    _, lr, length, tuned, head = best
    with torch.no_grad():
        features, labels = plain_features(tuned, bench.test, "test features")
        scores = head(features)
    settings = {
        "lr": lr, "epochs": length, "batch_size": batch_size, "momentum": 0.9,
        "labelled_images": len(fit), "held_out_images": len(held), "held_out_top1": tried,
    }  # fmt: skip
    return [Outcome(f"{len(fit)} labels, lr = {lr:g}, {length:g} epochs", scores, settings)], labels


def transfer(bench: Bench, l2_values: Sequence[float], max_iterations: int) -> tuple[list[Outcome], Tensor]:
    """Logistic regression on features of another data set; the penalty is picked on a held-out part, then all is fit.

    Ranks share the penalties; every fit starts from zero, so that none depends on another.
    """
    fit, held = _hold_out(bench)
    features, labels = plain_features(bench, fit, "training features")
    held_features, held_labels = plain_features(bench, held, "held-out features")
    task = bench.progress.add_task("l2 values", total=len(l2_values))
    parts = []
    for i, l2 in _mine(l2_values, bench.world):
        fitted = probe.fit_logistic(features, labels, bench.classes, l2, max_iterations)
        row = (_top1(fitted.scores(held_features), held_labels), fitted.gradient, fitted.iterations)
        parts.append((i, torch.tensor([row], dtype=torch.float64, device=features.device)))
        bench.progress.update(task, advance=bench.world.size)
    table = _in_order(parts, bench.world, features.new_zeros(0, 3, dtype=torch.float64)).tolist()
    best = max(range(len(table)), key=lambda i: table[i][0])
    everything, all_labels = torch.cat([features, held_features]), torch.cat([labels, held_labels])
    final = probe.fit_logistic(everything, all_labels, bench.classes, l2_values[best], max_iterations)
    test, test_labels = plain_features(bench, bench.test, "test features")
    settings = {
        "l2": l2_values[best], "train_images": len(fit), "held_out_images": len(held),
        "iterations": final.iterations, "gradient_left": final.gradient,
        "l2_values": list(l2_values), "held_out_top1": [row[0] for row in table],
        "stopped_at_max_iterations": sum(row[2] >= max_iterations for row in table),
    }  # fmt: skip
    return [Outcome(f"l2 = {l2_values[best]:.3g}", final.scores(test), settings)], test_labels


# ------------------------------------------------------------------------------------------------------ features


def plain_features(bench: Bench, source: Source, what: str) -> tuple[Tensor, Tensor]:
    """Features (n, F) float32 of the unaugmented images and labels (n,), in the order of the source, on every rank.

    Each rank takes whole batches, the same whatever the number of ranks. What does not decode is left out.

    Raises:
        FloatingPointError: a feature is not finite.
    """
    batches = np.split(np.arange(len(source)), range(_FEATURES, len(source), _FEATURES))
    task = bench.progress.add_task(what, total=len(source))
    parts, label_parts = [], []
    for i, ids in _mine(batches, bench.world):
        for images, labels in plain_images(source, ids, bench.config, len(ids)):
            parts.append((i, _encode(bench, images)))
            label_parts.append((i, labels.to(bench.world.device)))
        bench.progress.update(task, advance=len(ids) * bench.world.size)
    bench.progress.update(task, completed=len(source))
    nothing = torch.zeros(0, bench.width, device=bench.world.device)
    features = _in_order(parts, bench.world, nothing)
    labels = _in_order(label_parts, bench.world, nothing.new_zeros(0, dtype=torch.int64))
    if not len(features):
        raise ValueError(f"{what}: no image decodes; run tools/verify_shards.py on the data set")
    if not features.isfinite().all():
        raise FloatingPointError(
            f"{what} are not finite: the encoder is not usable, or --precision fp32 is needed"
        )
    return features, labels


@torch.no_grad()
def _encode(bench: Bench, images: Tensor) -> Tensor:
    """Features (n, F) float32 on the device, batch norm in eval mode."""
    bench.encoder.eval()
    with bench.autocast():
        chunks = [bench.encoder(chunk.to(bench.world.device)) for chunk in images.split(CHUNK)]
    return torch.cat(chunks).float()


def _mine(items: Sequence[Any], world: World) -> Iterator[tuple[int, Any]]:
    """This rank's part of the items, with their numbers."""
    for i in range(world.rank, len(items), world.size):
        yield i, items[i]


def _in_order(parts: list[tuple[int, Tensor]], world: World, nothing: Tensor) -> Tensor:
    """The rows of all ranks' numbered parts, by number; `nothing` has no rows and the right shape and type."""
    rows = torch.cat([nothing, *(part for _, part in parts)])
    numbers = torch.cat([torch.full((len(part),), i, device=rows.device) for i, part in parts] or
                        [torch.zeros(0, dtype=torch.int64, device=rows.device)])  # fmt: skip
    order = distributed.gather_rows(numbers, world).argsort(stable=True)
    return distributed.gather_rows(rows, world)[order]


# ------------------------------------------------------------------------------------------------------- training


def crop_and_flip(config: Config) -> ViewConfig:
    """The run's own crop and flip and nothing else (of the ImageNet recipes: the paper's)."""
    return config.augment.view1.model_copy(update={"jitter": 0.0, "gray": 0.0, "blur": 0.0, "solarize": 0.0})


def _augmented(bench: Bench, source: Source, batch_size: int, steps: int, what: str) -> Iterator[Batch]:
    """This rank's part of so many batches of cropped and flipped images, through the loader of the training.

    The loader makes two views of each image; the second is not used.
    """
    config, view = bench.config, crop_and_flip(bench.config)
    config = config.model_copy(
        update={
            "augment": config.augment.model_copy(update={"view1": view, "view2": view}),
            "train": config.train.model_copy(update={"batch_size": batch_size, "accumulation": 1}),
            "run": config.run.model_copy(update={"seed": bench.seed}),
        }
    )
    backend, _ = make_backend(config, bench.world.device, torch.float32)
    rank, size = bench.world.rank, bench.world.size
    task = bench.progress.add_task(what, total=steps)
    device = bench.world.device
    with Loader(config, source, backend, rank=rank, world_size=size, device=device) as loader:
        for [batch] in itertools.islice(loader, steps):
            yield batch
            bench.progress.update(task, advance=1)


def _train_all(
    bench: Bench, source: Source, lr: float, epochs: float, batch_size: int
) -> tuple[Bench, nn.Linear]:
    """A trained copy of the encoder, in a bench of its own, and its classifier."""
    device = bench.world.device
    encoder = copy.deepcopy(bench.encoder)
    head = probe.make_head(bench.width, bench.classes, bench.seed).to(device)
    whole = distributed.convert_sync_batchnorm(nn.Sequential(encoder, head), bench.world).train()
    wrapped = distributed.wrap(whole, bench.world)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.0, momentum=0.9, nesterov=True)
    steps = max(1, int(epochs * len(source) / batch_size))
    what = f"fine-tuning, lr {lr:g}, {epochs:g} epochs"
    for step, batch in enumerate(_augmented(bench, source, batch_size, steps, what)):
        schedule = {"base_lr": lr, "batch_size": batch_size, "warmup_steps": 0, "total_steps": steps}
        optimizer.param_groups[0]["lr"] = schedules.learning_rate(step, **schedule)  # type: ignore[arg-type]
        with bench.autocast():
            logits = wrapped(batch.view1)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), batch.label.to(device)).backward()
        optimizer.step()
    return replace(bench, encoder=encoder), head


def _held(labels: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    return balanced_ids(labels, min(0.1, HELD_OUT / len(labels)), seed)


def _hold_out(bench: Bench) -> tuple[Subset, Subset]:
    """The training images in two parts: to fit, and to pick settings on."""
    held = _held(bench.train.labels, bench.seed)
    fit = np.setdiff1d(np.arange(len(bench.train)), held)
    if len(fit) < 2:
        raise ValueError(f"{len(bench.train)} training images are too few to hold some out: use more")
    return Subset(bench.train, fit), Subset(bench.train, held)


def _batch_size(bench: Bench, asked: int | None, images: int) -> int:
    """What was asked for; or 1,024, or what fits the images and most numbers of ranks.

    Raises:
        ValueError: the images or the ranks do not allow it.
    """
    size = asked or min(1024, images)
    if asked is None:
        size -= size % (64 if size >= 64 else 2)
    if not 2 <= size <= images or size % bench.world.size or size // bench.world.size < 2:
        raise ValueError(
            f"a batch of {size} on {bench.world.size} ranks does not fit {images} training images: set --batch-size to "
            f"a multiple of {bench.world.size}, at least {2 * bench.world.size} and at most {images}"
        )
    return size


def _orders(images: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Rows of one batch after another, a new permutation each epoch; its rest is left out, as the loader does."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(images, generator=generator)
        yield from order.split(batch_size)[: images // batch_size]


def _top1(scores: Tensor, labels: Tensor) -> float:
    """Per cent."""
    return 100 * evaluate.topk_correct(scores, labels, 1).double().mean().item()
