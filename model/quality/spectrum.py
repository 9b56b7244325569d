"""Geometry of features: principal axes, spectrum, effective rank and nearest neighbors."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Principal(NamedTuple):
    """Eigenvalues (D,) of a covariance matrix, largest first, and their unit axes (D, D) as rows."""

    eigenvalues: Tensor
    axes: Tensor


def principal_axes(features: Tensor) -> Principal:
    """Eigenvalues and eigenvectors of the covariance of the features (divided by N - 1).

    Args:
        features: (N, D) finite floating point, N >= 2.

    Returns:
        float64. Eigenvalues below 1e-12 of the features' mean squared length are set to 0: rounding of equal float32
        features makes such values. The component of largest magnitude of each axis is positive, so that two
        computations give the same picture.

    Raises:
        ValueError: there are fewer than two samples, or features are not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features have the shape {tuple(features.shape)}; they must be (N, D) with N >= 2")
    if not features.isfinite().all():
        raise ValueError("the features are not finite; the encoder is broken")
    eigenvalues, columns = torch.linalg.eigh(torch.cov(features.double().T).reshape(features.shape[1], -1))
    eigenvalues = eigenvalues.flip(0)
    eigenvalues[eigenvalues <= 1e-12 * features.double().square().sum(dim=1).mean()] = 0
    axes = columns.T.flip(0)
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return Principal(eigenvalues, axes * largest.sign())


def project(features: Tensor, principal: Principal) -> Tensor:
    """Coordinates (N, 2) float64 of the centered features along the two largest principal axes."""
    centered = features.double() - features.double().mean(dim=0)
    return centered @ principal.axes[:2].T


def effective_rank(eigenvalues: Tensor) -> float:
    """exp of the entropy of the normalized eigenvalues: k if k of them are equal and the others 0.

    Roy & Vetterli, The effective rank: a measure of effective dimensionality (EUSIPCO 2007), definition 1, applied to
    the covariance matrix. RankMe (arXiv 2210.02885) uses the features' singular values, which gives larger numbers.
    The rank of (D,) eigenvalues >= 0 is in 1 .. D; it is 0.0 if all of them are 0 (all features are one point).
    """
    total = eigenvalues.sum()
    if total <= 0:
        return 0.0
    return math.exp(torch.special.entr(eigenvalues.double() / total).sum().item())


def nearest(features: Tensor, k: int, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """The k most similar other samples of every sample.

    Args:
        features: (N, D) floating point.
        k: number of neighbors, clamped to N - 1.
        chunk: rows per matrix product; memory is chunk x N floats.

    Returns:
        Indices (N, k) int64, most similar first, and cosines (N, k) float32.
    """
    unit = F.normalize(features.float(), dim=1)
    k = min(k, len(unit) - 1)
    cosines, indices = [], []
    for start in range(0, len(unit), chunk):
        similarity = unit[start : start + chunk] @ unit.T
        rows = torch.arange(len(similarity))
        similarity[rows, start + rows] = -math.inf  # exclude the sample itself
        values, others = similarity.topk(k, dim=1)
        cosines.append(values)
        indices.append(others)
    return torch.cat(indices), torch.cat(cosines)


def neighbor_precision(labels: Tensor, indices: Tensor) -> tuple[float, float]:
    """Fraction of neighbors with their query's label, and its expectation for random neighbors.

    Args:
        labels: (N,) int64, -1 if unknown.
        indices: (N, k) int64, from `nearest`.

    Returns:
        Two numbers in 0 .. 1, over the pairs of samples whose labels are both known; NaN without such a pair.
    """
    known = labels >= 0
    pairs = known[:, None] & known[indices]
    right = (labels[:, None] == labels[indices]) & pairs
    counts = labels[known].unique(return_counts=True)[1].double()
    total = counts.sum()
    chance = (counts * (counts - 1)).sum() / (total * (total - 1))
    return (right.sum() / pairs.sum()).item(), chance.item()
