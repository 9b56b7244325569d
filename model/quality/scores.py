"""Scores of predictions: top-k accuracy, confidence intervals, confusion matrices."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MAX_CLASSES = 100_000  # a larger label is an id or a time; ImageNet-22k has 21,841 classes
_Z = 1.959964  # 95 % of a normal distribution is within _Z standard deviations


def num_classes(*splits: npt.NDArray[np.int64]) -> int:
    """Number of classes of data sets that share them: the largest label + 1; unlabeled images have negative labels.

    Raises:
        ValueError: a label is too large to be a class.
    """
    largest = max(int(labels.max()) for labels in splits)
    if largest >= MAX_CLASSES:
        raise ValueError(
            f"the largest label is {largest:,}, too large for a class (limit {MAX_CLASSES:,}): it may be an id or a "
            "time; name the field of the classes (for .beton files data.path=FILE?label=FIELD), or do without labels "
            "(eval.path=null and eval.online_probe=false)"
        )
    return largest + 1


def topk_correct(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the true class is among the k highest scores; of equal scores the lower class comes first.

    Args:
        scores: (N, C); -inf means no answer and never counts as correct.
        labels: (N,) int64 in [0, C).
        k: 1 .. C.

    Returns:
        (N,) bool.
    """
    own = scores.gather(1, labels[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & before)).sum(dim=1)
    return (rank < k) & (own[:, 0] > -math.inf)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of the rate correct / total, within 0 .. 1 (Wilson, JASA 22, 1927).

    Unlike p +- z sqrt(p (1 - p) / n) it stays within 0 .. 1 and has a width at 0 and at 1. It covers the choice of test
    images only, not the training's seed.

    Raises:
        ValueError: correct is not in 0 .. total, or total is less than 1.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} of {total} answers are right: there must be at least one answer")
    rate, share = correct / total, _Z * _Z / total
    center = rate + share / 2
    half = _Z * math.sqrt(rate * (1 - rate) / total + share / (4 * total))
    low, high = (center - half) / (1 + share), (center + half) / (1 + share)
    # At 0 and 1 the rate itself is a bound, apart from rounding.
    return min(max(0.0, low), rate), max(rate, min(1.0, high))


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts the images of each true class (row) by predicted class (column): (C, C) int64.

    `predicted` and `labels` are (N,) int64 in [0, num_classes).
    """
    pairs = labels * num_classes + predicted
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def mean_per_class(counts: Tensor) -> float:
    """Accuracy within each class, averaged over the classes that have images: 0 .. 1.

    The paper's measure for Aircraft, Caltech-101, Flowers and Pets (table 3), whose classes differ in size. `counts`
    is a `confusion_matrix` of at least one image.
    """
    images = counts.sum(dim=1)
    present = images > 0
    return (counts.diagonal()[present].double() / images[present]).mean().item()
