"""What predictions are worth: top-k, intervals, confusions."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MAX_CLASSES = 100_000  # a larger label is an id or a time; ImageNet-22k has 21,841 classes


_Z = 1.959964  # standard deviations on both sides that hold 95 % of a normal distribution


def num_classes(*splits: npt.NDArray[np.int64]) -> int:
    """Number of classes: the largest label + 1.

    Args:
        splits: labels of data sets that share their classes, at least one label in all; below 0 where there is none.

    Raises:
        ValueError: a label is so large that it can be no class.
    """
    largest = max(int(labels.max()) for labels in splits)
    if largest >= MAX_CLASSES:
        raise ValueError(
            f"the largest label is {largest:,}, more than any of {MAX_CLASSES:,} classes: it is an id, perhaps, or a "
            "time; name the field of the classes (of .beton files data.path=FILE?label=FIELD), or do without labels "
            "(eval.path=null and eval.online_probe=false)"
        )
    return largest + 1


def topk_correct(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the true class is among the k of highest score; of equal scores the lower class comes first.

    Args:
        scores: (N, C); -inf is no answer and never right.
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
    """95 % bounds of the true rate behind correct / total, each 0 .. 1 (Wilson, JASA 22, 1927).

    Unlike the textbook's p +- z sqrt(p (1 - p) / n) it stays inside 0 .. 1 and has a width at 0 and at 1. It is
    about the choice of test images alone, not about another seed of training.

    Args:
        correct: 0 .. total.
        total: at least 1.

    Raises:
        ValueError: correct is not 0 .. total, or there is no answer.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} of {total} answers are right: there must be at least one answer")
    rate, share = correct / total, _Z * _Z / total
    centre = rate + share / 2
    half = _Z * math.sqrt(rate * (1 - rate) / total + share / (4 * total))
    low, high = (centre - half) / (1 + share), (centre + half) / (1 + share)
    # At 0 and 1 the rate itself is a bound, but for rounding.
    return min(max(0.0, low), rate), max(rate, min(1.0, high))


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """How many images of each class (row) were taken for each class (column).

    Args:
        predicted: (N,) int64 in [0, num_classes).
        labels: (N,) int64 in [0, num_classes).
        num_classes: C.

    Returns:
        (C, C) int64.
    """
    pairs = labels * num_classes + predicted
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def mean_per_class(counts: Tensor) -> float:
    """Accuracy within each class, averaged over the classes that have images: 0 .. 1.

    What the paper gives for Aircraft, Caltech-101, Flowers and Pets (table 3), whose classes are of unequal sizes.

    Args:
        counts: (C, C) of `confusion_matrix`, at least one image.
    """
    images = counts.sum(dim=1)
    present = images > 0
    return (counts.diagonal()[present].double() / images[present]).mean().item()
