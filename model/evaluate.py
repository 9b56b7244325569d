"""How good the frozen encoder is: features, batch-norm calibration, nearest neighbours, and what scores say."""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from model import distributed
from model.distributed import World

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


def knn_votes(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
    chunk: int = 256,
) -> Tensor:
    """Votes of each query's k most similar bank rows for their classes, with weights exp(cosine / temperature).

    The protocol of Wu et al. (arXiv 1805.01978, sec. 3.4). Logarithms of the votes, less that of the nearest
    neighbour's: exp(cosine / temperature) itself is beyond float32 from a temperature of 0.0113 down.

    Args:
        bank: (M, D) floating point, M >= 1.
        bank_labels: (M,) int64 in [0, num_classes).
        queries: (Q, D) floating point.
        num_classes: number of classes.
        k: neighbours, clamped to M.
        temperature: > 0.
        chunk: queries compared at once; memory is chunk x M floats.

    Returns:
        (Q, num_classes) float32: log of the sum of exp((cosine - largest cosine) / temperature) over a class's
        neighbours; -inf for a class without a neighbour.

    Raises:
        ValueError: sizes do not fit together, the bank is empty, or a label is out of range.
    """
    _check_labels("bank", bank, bank_labels, num_classes)
    if len(bank) == 0:
        raise ValueError("the bank has no samples; kNN needs at least one labelled sample to vote")
    if k < 1 or not temperature > 0:
        raise ValueError(f"k is {k} and temperature {temperature}; k must be 1 or more, temperature above 0")
    bank = F.normalize(bank.float(), dim=1)
    votes = torch.full((len(queries), num_classes), -math.inf, device=bank.device)
    for part, peak in zip(queries.split(chunk), votes.split(chunk), strict=True):
        similarity, neighbours = (F.normalize(part.float(), dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        classes = bank_labels[neighbours]
        # In double: float32 would round a small temperature to 0.
        weights = (similarity - similarity[:, :1]).double() / temperature
        weights = weights.clamp_min(torch.finfo(torch.float32).min).float()
        peak.scatter_reduce_(1, classes, weights, "amax")
        weights = (weights - peak.gather(1, classes)).exp()
        peak += torch.zeros_like(peak).scatter_add_(1, classes, weights).log()
    return votes


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """Share of queries, 0 .. 1, whose class has most votes; other arguments and errors as for `knn_votes`.

    Args:
        query_labels: (Q,) int64 in [0, num_classes), Q >= 1.
    """
    _check_labels("queries", queries, query_labels, num_classes)
    if len(queries) == 0:
        raise ValueError("there are no queries; kNN accuracy needs at least one labelled sample to test")
    predicted = knn_votes(bank, bank_labels, queries, num_classes, k, temperature).argmax(dim=1)
    return (predicted == query_labels).double().mean().item()


def knn_of_run(
    encoder: nn.Module,
    bank: Iterable[tuple[Tensor, Tensor]],
    queries: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    k: int,
    temperature: float,
    world: World,
) -> float:
    """kNN top-1 in per cent, of images that the ranks share; NaN if a feature is not finite.

    Args:
        encoder: as for `extract_features`; the same on every rank.
        bank: this rank's batches of labelled images; perhaps none, if other ranks have some.
        queries: this rank's batches of the images to classify; likewise.
        num_classes: number of classes.
        k: neighbours.
        temperature: > 0.
        world: the processes; each gets the same result.
    """

    def features(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        mine, labels = extract_features(encoder, batches)
        return distributed.gather_rows(mine, world), distributed.gather_rows(labels, world)

    known, known_labels = features(bank)
    tested, tested_labels = features(queries)
    if not (known.isfinite().all() and tested.isfinite().all()):
        return math.nan
    return 100 * knn_accuracy(known, known_labels, tested, tested_labels, num_classes, k, temperature)


def share(total: int, count: int, world: World) -> npt.NDArray[np.int64]:
    """This rank's part of `count` numbers evenly spaced over 0 .. total - 1; of all where there are fewer."""
    spaced = np.linspace(0, total, min(count, total), endpoint=False).astype(np.int64)
    return spaced[world.rank :: world.size]


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


@torch.no_grad()
def extract_features(encoder: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Features of every image in eval mode; the encoder's mode is restored.

    Args:
        encoder: images (N, 3, H, W) -> (N, F).
        batches: pairs of images and labels (N,).

    Returns:
        features (M, F) float32 and labels (M,) int64, on the encoder's device, in the order of the batches. Without a
        batch M is 0 and F the encoder's num_features: a rank that has no image goes on with the others.
    """
    device = next(encoder.parameters()).device
    modes = _modes(encoder)
    encoder.eval()
    try:
        pairs = [(encoder(images.to(device)).float(), labels.to(device)) for images, labels in batches]
    finally:
        _restore_modes(modes)
    if not pairs:
        width = int(encoder.num_features)  # type: ignore[arg-type]
        return torch.zeros(0, width, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    features, labels = zip(*pairs, strict=True)
    return torch.cat(features), torch.cat(labels).long()


@torch.no_grad()
def calibrate_batch_norm(encoder: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Replace the running statistics of every batch norm by their plain average over the batches.

    Parameters, modes and momenta stay as they are. It makes an untrained encoder, whose running statistics
    are still 0 and 1, comparable with a trained one.

    Args:
        encoder: a module with batch-norm layers.
        batches: pairs of images (N, 3, H, W) and labels, as for `extract_features`; labels are not used.
    """
    device = next(encoder.parameters()).device
    norms = [layer for layer in encoder.modules() if isinstance(layer, _BatchNorm)]
    modes, momenta = _modes(encoder), [norm.momentum for norm in norms]
    encoder.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's cumulative average
        norm.train()
    try:
        for images, _ in batches:
            encoder(images.to(device))
    finally:
        _restore_modes(modes)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _modes(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(layer, layer.training) for layer in module.modules()]


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for layer, training in modes:
        layer.training = training


def _check_labels(name: str, features: Tensor, labels: Tensor, num_classes: int) -> None:
    if len(features) != len(labels):
        raise ValueError(
            f"{name}: {len(features)} features but {len(labels)} labels; each feature needs one label"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"{name}: labels span {labels.min()} .. {labels.max()}, outside 0 .. {num_classes - 1}"
        )
