"""The four evaluation protocols: kNN, linear, fine-tuning, transfer.

Ranks share images and trials, never the arithmetic of one of them, and results are gathered in a fixed order: results
do not depend on the number of ranks. Those of fine-tuning agree to rounding, because gradients are averaged.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from byolt.files.console import say
from byolt.model import distributed
from byolt.model.quality.knn import knn_votes
from byolt.model.quality.linear import MOMENTUM, HeadSweep, fit_logistic
from byolt.model.quality.scores import topk_correct
from byolt.pipelines.sources import Source
from byolt.pipelines.subset import Subset, balanced_ids
from byolt.tools.evaluation import frozen
from byolt.tools.evaluation.finetuning import (
    batch_size_for,
    count_distinct,
    finetune_encoder,
    make_pipeline,
    shuffled_batches,
    training_batches,
)
from byolt.tools.evaluation.frozen import Setup, encode, gather_in_order, plain_features, share_of_rank

HELD_OUT = 10_009  # training images that select settings (paper, App. C.1); a tenth of a smaller data set


class Outcome(NamedTuple):
    """One classifier's answers for the test images."""

    name: str
    scores: Tensor  # (Q, C)
    settings: dict[str, Any]


def evaluate_knn(setup: Setup, ks: Sequence[int], temperature: float) -> tuple[list[Outcome], Tensor]:
    """Weighted vote of the k nearest training images by cosine similarity.

    Returns:
        One outcome per k, where k is at most the number of training images, and the labels (Q,) of the test images.
    """
    bank, bank_labels = plain_features(setup, setup.train, "training features")
    queries, labels = plain_features(setup, setup.test, "test features")
    outcomes = []
    if max(ks) > len(bank) and setup.world.is_main:
        say(f"note: k = {max(ks)} is more than the training images: k = {len(bank)} is used", sys.stderr)
    for k in dict.fromkeys(min(k, len(bank)) for k in ks):
        parts = [
            (i, knn_votes(bank, bank_labels, part, setup.classes, k, temperature))
            for i, part in share_of_rank(queries.split(frozen.BATCH), setup.world)
        ]
        votes = gather_in_order(parts, setup.world, queries.new_zeros(0, setup.classes))
        settings = {"k": k, "temperature": temperature, "train_images": len(bank)}
        outcomes.append(Outcome(f"k = {k}", votes, settings))
    return outcomes, labels


def evaluate_linear(
    setup: Setup, lrs: Sequence[float], epochs: float, batch_size: int | None, fast: bool
) -> tuple[list[Outcome], Tensor]:
    """A linear classifier on the frozen encoder, batch norm included; held-out images select the learning rate.

    All learning rates are trained side by side on the same features. The selected head has not seen the held-out
    images; the paper trains once more with them.

    Args:
        setup: encoder and data.
        lrs: learning rates at a batch of 256.
        epochs: passes over the images.
        batch_size: None for 1,024, or less if there are fewer images.
        fast: computes the features of the unaugmented images once, instead of those of a new crop and flip each epoch.

    Raises:
        ValueError: the batch does not fit the images.
        FloatingPointError: features are not finite, or every head diverged.
    """
    fit, held = _hold_out(setup)
    batch_size = batch_size_for(setup, batch_size, len(fit))
    images = len(fit)
    if fast:
        features, labels = plain_features(setup, fit, "training features")
        images = len(features)  # fewer if some do not decode
        batch_size = min(batch_size, images)
    steps = max(1, int(epochs * images / batch_size))
    device = setup.world.device
    sweep = HeadSweep(setup.width, setup.classes, lrs, batch_size, steps, device, setup.seed)
    if fast:
        batches = itertools.islice(shuffled_batches(images, batch_size, setup.seed), steps)
        for rows in setup.progress.track(batches, total=steps, description="heads"):
            sweep.step(features[rows], labels[rows])
    else:
        seen: set[int] = set()
        for batch in training_batches(setup, fit, make_pipeline(setup, batch_size), steps, "heads"):
            seen.update(batch.id.tolist())
            features = distributed.gather_rows(encode(setup, batch.view1), setup.world)
            sweep.step(features, distributed.gather_rows(batch.label.to(device), setup.world))
        images = count_distinct(seen, setup.world)
    held_features, held_labels = plain_features(setup, held, "held-out features")
    tried = [_top1(scores, held_labels) for scores in sweep.scores(held_features)]
    best = _best(tried, [-lr for lr in lrs])
    features, labels = plain_features(setup, setup.test, "test features")
    settings = {
        "epochs": epochs, "steps": steps, "batch_size": batch_size, "momentum": MOMENTUM, "lr": lrs[best],
        "features": "unaugmented, cached" if fast else "crop and flip, anew each epoch",
        "train_images": images, "held_out_images": len(held_labels),
        "held_out_top1": dict(zip(map(str, lrs), tried, strict=True)),
    }  # fmt: skip
    return [Outcome(f"lr = {lrs[best]:g}", sweep.scores(features)[best], settings)], labels


def evaluate_finetuning(
    setup: Setup,
    labeled: npt.NDArray[np.int64] | float,
    lrs: Sequence[float],
    epochs: Sequence[float],
    batch_size: int | None,
) -> tuple[list[Outcome], Tensor]:
    """Trains the encoder and a new classifier on labeled images; held-out images select the settings.

    SGD with Nesterov momentum 0.9, crop and flip, no weight decay, no warm-up, cosine (paper, App. C.2).

    Args:
        setup: encoder and data.
        labeled: share of every class of train, or sample ids. Held-out images are other images of train; with a share
            of 1 they are taken from it.
        lrs: learning rates at a batch of 256.
        epochs: lengths of training; every pair of a learning rate and a length is tried.
        batch_size: None for 1,024, or less if there are fewer images.

    Raises:
        ValueError: no image is left to hold out, or the batch does not fit the images.
        FloatingPointError: every trial diverged. A trial that diverges is never selected.
    """
    if isinstance(labeled, float) and labeled == 1:
        fit, held = _hold_out(setup)
    else:
        ids = balanced_ids(setup.train.labels, labeled, setup.seed) if isinstance(labeled, float) else labeled
        others = np.setdiff1d(np.arange(len(setup.train)), ids)
        if not len(others):
            raise ValueError("every training image is listed: leave some out, which then select the settings")
        fit = Subset(setup.train, ids)
        held = Subset(setup.train, others[_held_ids(setup.train.labels[others], setup.seed)])
    batch_size = batch_size_for(setup, batch_size, len(fit))
    pipeline = make_pipeline(setup, batch_size)
    trials = list(itertools.product(lrs, epochs))
    gentleness = [(-lr, -length) for lr, length in trials]
    tried: list[float | None] = []
    best: tuple[Setup, nn.Linear, int, int] | None = None
    for lr, length in trials:
        tuned, head, images = finetune_encoder(setup, fit, pipeline, lr, length)
        top1, count = _held_out_top1(tuned, head, held)
        tried.append(top1)
        if top1 is not None and _best(tried, gentleness) == len(tried) - 1:
            best = tuned, head, images, count
    lr, length = trials[_best(tried, gentleness)]
    assert best is not None
    tuned, head, images, count = best
    with torch.no_grad():
        features, labels = plain_features(tuned, setup.test, "test features")
        scores = head(features)
    settings = {
        "lr": lr, "epochs": length, "batch_size": batch_size, "momentum": MOMENTUM,
        "train_images": images, "held_out_images": count,
        "held_out_top1": {f"lr {lr:g}, {n:g} epochs": top1 for (lr, n), top1 in zip(trials, tried, strict=True)},
    }  # fmt: skip
    return [Outcome(f"{images} labels, lr = {lr:g}, {length:g} epochs", scores, settings)], labels


def evaluate_transfer(
    setup: Setup, l2_values: Sequence[float], max_iterations: int, standardize: bool = False
) -> tuple[list[Outcome], Tensor]:
    """Logistic regression on features of another data set. Held-out images select the penalty; then all are fitted.

    Ranks share the penalties; every fit starts from zero, so none depends on another. `standardize` divides each
    feature by its standard deviation over the training images (a constant one by 1).

    Raises:
        FloatingPointError: features are not finite, or every fit diverged.
    """
    fit, held = _hold_out(setup)
    features, labels = plain_features(setup, fit, "training features")
    held_features, held_labels = plain_features(setup, held, "held-out features")
    scale = features.new_ones(setup.width)
    if standardize:
        spread = features.std(dim=0)
        scale = torch.where(spread > 0, spread, 1.0)
    features, held_features = features / scale, held_features / scale
    task = setup.progress.add_task("l2 values", total=len(l2_values))
    parts = []
    for i, l2 in share_of_rank(l2_values, setup.world):
        fitted = fit_logistic(features, labels, setup.classes, l2, max_iterations)
        top1 = _top1(fitted.scores(held_features), held_labels)
        row = (math.nan if top1 is None else top1, fitted.iterations)
        parts.append((i, torch.tensor([row], dtype=torch.float64, device=features.device)))
        setup.progress.update(task, advance=setup.world.size)
    table = gather_in_order(parts, setup.world, features.new_zeros(0, 2, dtype=torch.float64)).tolist()
    tried = [None if math.isnan(top1) else top1 for top1, _ in table]
    best = _best(tried, l2_values)
    all_features, all_labels = torch.cat([features, held_features]), torch.cat([labels, held_labels])
    final = fit_logistic(all_features, all_labels, setup.classes, l2_values[best], max_iterations)
    test_features, test_labels = plain_features(setup, setup.test, "test features")
    settings = {
        "l2": l2_values[best], "standardized": standardize,
        "train_images": len(labels), "held_out_images": len(held_labels),
        "iterations": final.iterations, "gradient_left": final.gradient,
        "l2_values": list(l2_values), "held_out_top1": tried,
        "stopped_at_max_iterations": sum(iterations >= max_iterations for _, iterations in table),
    }  # fmt: skip
    scores = final.scores(test_features / scale)
    return [Outcome(f"l2 = {l2_values[best]:.3g}", scores, settings)], test_labels


# ---------------------------------------------------------------------------------------------- selecting settings


def _held_ids(labels: npt.NDArray[np.int64], seed: int, leave: int = 0) -> npt.NDArray[np.int64]:
    return balanced_ids(labels, min(0.1, HELD_OUT / len(labels)), seed, leave)


def _hold_out(setup: Setup) -> tuple[Subset, Subset]:
    """Splits the training images: one part to fit, with an image of every class, and one to select settings."""
    held = _held_ids(setup.train.labels, setup.seed, leave=1)
    fit = np.setdiff1d(np.arange(len(setup.train)), held)
    if not len(held):
        raise ValueError(
            f"{len(setup.train)} training images are too few to hold some out: at least one class needs 2 images"
        )
    return Subset(setup.train, fit), Subset(setup.train, held)


@torch.no_grad()
def _held_out_top1(setup: Setup, head: nn.Linear, held: Source) -> tuple[float | None, int]:
    """Accuracy in percent and number of images; (None, 0) if the training diverged."""
    try:
        features, labels = plain_features(setup, held, "held-out features")
    except FloatingPointError:
        return None, 0
    return _top1(head(features), labels), len(labels)


def _top1(scores: Tensor, labels: Tensor) -> float | None:
    """Accuracy in percent; None if a score is not finite, because its classifier diverged."""
    if not scores.isfinite().all():
        return None
    return 100 * topk_correct(scores, labels, 1).double().mean().item()


def _best(accuracies: Sequence[float | None], gentleness: Sequence[Any]) -> int:
    """The index of the highest accuracy; of equal ones, that of the gentlest setting.

    On few held-out images many settings are equally accurate. Of those, the setting that follows the training images
    least is expected to generalize best: the largest penalty, the smallest learning rate, the shortest training.

    Raises:
        FloatingPointError: every setting diverged: all accuracies are None.
    """
    ranked = [-math.inf if top1 is None else top1 for top1 in accuracies]
    if max(ranked) == -math.inf:
        raise FloatingPointError(
            f"all {len(ranked)} settings diverged (scores of held-out images are not finite): set a lower --lr"
        )
    return max(range(len(ranked)), key=lambda i: (ranked[i], gentleness[i]))
