"""Classifies by the nearest neighbors of frozen features."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def knn_votes(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
    chunk: int = 256,
) -> Tensor:
    """Each query's k nearest bank rows vote for their classes with the weight exp(cosine / temperature).

    The protocol of Wu et al. (arXiv 1805.01978, sec. 3.4). The result is the logarithm of the votes relative to the
    nearest neighbor's: exp(cosine / temperature) overflows float32 below a temperature of 0.0113.

    Args:
        bank: (M, D) floating point, M >= 1.
        bank_labels: (M,) int64 in [0, num_classes).
        queries: (Q, D) floating point.
        num_classes: number of classes.
        k: number of neighbors, clamped to M.
        temperature: > 0.
        chunk: queries per matrix product; memory is chunk x M floats.

    Returns:
        (Q, num_classes) float32: log of the sum of exp((cosine - largest cosine) / temperature) over a class's
        neighbors; -inf for a class without a neighbor.

    Raises:
        ValueError: sizes do not match, the bank is empty, or a label, k or temperature is out of its range.
    """
    _check_labels("bank", bank, bank_labels, num_classes)
    if len(bank) == 0:
        raise ValueError("the bank has no samples; kNN needs at least one labeled sample to vote")
    if k < 1 or not temperature > 0:
        raise ValueError(f"k={k} must be at least 1, and temperature={temperature} above 0")
    bank = F.normalize(bank.float(), dim=1)
    votes = torch.full((len(queries), num_classes), -math.inf, device=bank.device)
    for part, peak in zip(queries.split(chunk), votes.split(chunk), strict=True):
        similarity, neighbors = (F.normalize(part.float(), dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        classes = bank_labels[neighbors]
        # float64: float32 would round a small temperature to 0.
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
    """Fraction of queries, 0 .. 1, whose class gets most votes; other arguments and errors as in `knn_votes`.

    Args:
        query_labels: (Q,) int64 in [0, num_classes), Q >= 1.
    """
    _check_labels("queries", queries, query_labels, num_classes)
    if len(queries) == 0:
        raise ValueError("there are no queries; kNN accuracy needs at least one labeled sample to test")
    predicted = knn_votes(bank, bank_labels, queries, num_classes, k, temperature).argmax(dim=1)
    return (predicted == query_labels).double().mean().item()


def _check_labels(name: str, features: Tensor, labels: Tensor, num_classes: int) -> None:
    if len(features) != len(labels):
        raise ValueError(
            f"{name}: {len(features)} features but {len(labels)} labels; each feature needs one label"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"{name}: labels span {labels.min()} .. {labels.max()}, outside 0 .. {num_classes - 1}"
        )
