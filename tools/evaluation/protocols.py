"""The protocols by which tools/evaluate.py measures a frozen or fine-tuned encoder: kNN, linear, fine-tune, transfer.

Ranks share images and trials, never the arithmetic of one: what each computes is gathered in a fixed order, so that
the answer is the same for any number of ranks (fine-tuning: to rounding, its gradients are averaged over ranks).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from byolt.model import distributed
from byolt.model.quality import scores as metrics
from byolt.model.quality.knn import knn_votes
from byolt.model.quality.linear import MOMENTUM, HeadSweep, fit_logistic
from byolt.pipelines.sources import Source
from byolt.pipelines.subset import Subset, balanced_ids
from byolt.tools.evaluation import frozen
from byolt.tools.evaluation.finetuning import (
    augmented,
    batch_size_for,
    distinct,
    make_recipe,
    orders,
    train_all,
)
from byolt.tools.evaluation.frozen import Bench, encode, in_order, mine, plain_features

HELD_OUT = 10_009  # images of train on which settings are picked (paper, App. C.1); of a small set a tenth


class Outcome(NamedTuple):
    """What one classifier says of the test images."""

    name: str
    scores: Tensor  # (Q, C)
    settings: dict[str, Any]


# ---------------------------------------------------------------------------------------------------- protocols


def knn(
    bench: Bench, ks: Sequence[int] = (200, 20), temperature: float = 0.1
) -> tuple[list[Outcome], Tensor]:
    """Weighted vote of the k nearest training images by cosine.

    Returns:
        One outcome per k (no more than there are training images), and the labels (Q,) of the test images.
    """
    bank, bank_labels = plain_features(bench, bench.train, "training features")
    queries, labels = plain_features(bench, bench.test, "test features")
    outcomes = []
    for k in dict.fromkeys(min(k, len(bank)) for k in ks):
        parts = [
            (i, knn_votes(bank, bank_labels, part, bench.classes, k, temperature))
            for i, part in mine(queries.split(frozen.AT_A_TIME), bench.world)
        ]
        votes = in_order(parts, bench.world, queries.new_zeros(0, bench.classes))
        outcomes.append(
            Outcome(f"k = {k}", votes, {"k": k, "temperature": temperature, "train_images": len(bank)})
        )
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

    Raises:
        ValueError: the batch does not fit the images.
        FloatingPointError: features are not finite, or every head diverged.
    """
    fit, held = _hold_out(bench)
    batch_size = batch_size_for(bench, batch_size, len(fit))
    images = len(fit)
    if fast:
        features, labels = plain_features(bench, fit, "training features")
        images = len(features)  # fewer where some do not decode
        batch_size = min(batch_size, images)
    steps = max(1, int(epochs * images / batch_size))
    device = bench.world.device
    sweep = HeadSweep(bench.width, bench.classes, lrs, batch_size, steps, device, bench.seed)
    if fast:
        order = orders(images, batch_size, bench.seed)
        for rows in bench.progress.track(itertools.islice(order, steps), total=steps, description="heads"):
            sweep.step(features[rows], labels[rows])
    else:
        seen: set[int] = set()
        for batch in augmented(bench, fit, make_recipe(bench, batch_size), steps, "heads"):
            seen.update(batch.id.tolist())
            features = distributed.gather_rows(encode(bench, batch.view1), bench.world)
            sweep.step(features, distributed.gather_rows(batch.label.to(device), bench.world))
        images = distinct(seen, bench)
    held_features, held_labels = plain_features(bench, held, "held-out features")
    tried = [_top1(scores, held_labels) for scores in sweep.scores(held_features)]
    best = _best(tried, [-lr for lr in lrs])
    features, labels = plain_features(bench, bench.test, "test features")
    settings = {
        "epochs": epochs, "steps": steps, "batch_size": batch_size, "momentum": MOMENTUM, "lr": lrs[best],
        "features": "unaugmented, cached" if fast else "crop and flip, anew each epoch",
        "train_images": images, "held_out_images": len(held_labels),
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

    Raises:
        ValueError: no image is left to hold out, or the batch does not fit the images.
        FloatingPointError: every trial diverged; what one says is not counted.
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
    batch_size = batch_size_for(bench, batch_size, len(fit))
    recipe = make_recipe(bench, batch_size)
    trials = list(itertools.product(lrs, epochs))
    gentle = [(-lr, -length) for lr, length in trials]
    tried: list[float | None] = []
    best: tuple[Bench, nn.Linear, int, int] | None = None
    for lr, length in trials:
        tuned, head, images = train_all(bench, fit, recipe, lr, length)
        top1, count = _held_out_top1(tuned, head, held)
        tried.append(top1)
        if tried[-1] is not None and _best(tried, gentle) == len(tried) - 1:
            best = tuned, head, images, count
    lr, length = trials[_best(tried, gentle)]
    assert best is not None
    tuned, head, images, count = best
    with torch.no_grad():
        features, labels = plain_features(tuned, bench.test, "test features")
        scores = head(features)
    settings = {
        "lr": lr, "epochs": length, "batch_size": batch_size, "momentum": MOMENTUM,
        "train_images": images, "held_out_images": count,
        "held_out_top1": {f"lr {lr:g}, {n:g} epochs": top1 for (lr, n), top1 in zip(trials, tried, strict=True)},
    }  # fmt: skip
    return [Outcome(f"{images} labels, lr = {lr:g}, {length:g} epochs", scores, settings)], labels


def transfer(bench: Bench, l2_values: Sequence[float], max_iterations: int) -> tuple[list[Outcome], Tensor]:
    """Logistic regression on features of another data set; the penalty is picked on a held-out part, then all is fit.

    Ranks share the penalties; every fit starts from zero, so that none depends on another.

    Raises:
        FloatingPointError: features, or all fits, are not finite.
    """
    fit, held = _hold_out(bench)
    features, labels = plain_features(bench, fit, "training features")
    held_features, held_labels = plain_features(bench, held, "held-out features")
    task = bench.progress.add_task("l2 values", total=len(l2_values))
    parts = []
    for i, l2 in mine(l2_values, bench.world):
        fitted = fit_logistic(features, labels, bench.classes, l2, max_iterations)
        top1 = _top1(fitted.scores(held_features), held_labels)
        row = (math.nan if top1 is None else top1, fitted.gradient, fitted.iterations)
        parts.append((i, torch.tensor([row], dtype=torch.float64, device=features.device)))
        bench.progress.update(task, advance=bench.world.size)
    table = in_order(parts, bench.world, features.new_zeros(0, 3, dtype=torch.float64)).tolist()
    tried = [None if math.isnan(row[0]) else row[0] for row in table]
    best = _best(tried, l2_values)
    everything, all_labels = torch.cat([features, held_features]), torch.cat([labels, held_labels])
    final = fit_logistic(everything, all_labels, bench.classes, l2_values[best], max_iterations)
    test, test_labels = plain_features(bench, bench.test, "test features")
    settings = {
        "l2": l2_values[best], "train_images": len(labels), "held_out_images": len(held_labels),
        "iterations": final.iterations, "gradient_left": final.gradient,
        "l2_values": list(l2_values), "held_out_top1": tried,
        "stopped_at_max_iterations": sum(row[2] >= max_iterations for row in table),
    }  # fmt: skip
    return [Outcome(f"l2 = {l2_values[best]:.3g}", final.scores(test), settings)], test_labels


# --------------------------------------------------------------------------------------------- held-out images


def _held(labels: npt.NDArray[np.int64], seed: int, leave: int = 0) -> npt.NDArray[np.int64]:
    return balanced_ids(labels, min(0.1, HELD_OUT / len(labels)), seed, leave)


def _hold_out(bench: Bench) -> tuple[Subset, Subset]:
    """The training images in two parts: to fit, with an image of every class at least, and to pick settings on."""
    held = _held(bench.train.labels, bench.seed, leave=1)
    fit = np.setdiff1d(np.arange(len(bench.train)), held)
    if not len(held):
        raise ValueError(
            f"{len(bench.train)} training images are too few to hold some out, one of each class: use more"
        )
    return Subset(bench.train, fit), Subset(bench.train, held)


@torch.no_grad()
def _held_out_top1(bench: Bench, head: nn.Linear, held: Source) -> tuple[float | None, int]:
    """Per cent, of how many images; None of 0 where the training diverged."""
    try:
        features, labels = plain_features(bench, held, "held-out features")
    except FloatingPointError:
        return None, 0
    return _top1(head(features), labels), len(labels)


def _top1(scores: Tensor, labels: Tensor) -> float | None:
    """Per cent; None where a score is not finite: what gave it has diverged."""
    if not scores.isfinite().all():
        return None
    return 100 * metrics.topk_correct(scores, labels, 1).double().mean().item()


def _best(tried: Sequence[float | None], gentle: Sequence[Any]) -> int:
    """The place of the highest accuracy; among equal ones, of the gentlest setting.

    Of few held-out images many settings are equally right, and of those the one that follows the training images least
    is expected to do best on others: the largest penalty, the smallest learning rate, the shortest training.

    Args:
        tried: accuracy of each setting, None where it diverged.
        gentle: how gentle each is, in any order that compares.

    Raises:
        FloatingPointError: all diverged.
    """
    accuracies = [-math.inf if top1 is None else top1 for top1 in tried]
    if max(accuracies) == -math.inf:
        raise FloatingPointError(
            f"all {len(tried)} settings diverged (scores of held-out images are not finite): give others, of --lr lower"
        )
    return max(range(len(tried)), key=lambda i: (accuracies[i], gentle[i]))
