"""How good the frozen encoder is: features, batch-norm calibration, nearest neighbours, and what scores say."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byolt.model import distributed
from byolt.model.distributed import World
from byolt.model.quality.features import extract_features


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


def _check_labels(name: str, features: Tensor, labels: Tensor, num_classes: int) -> None:
    if len(features) != len(labels):
        raise ValueError(
            f"{name}: {len(features)} features but {len(labels)} labels; each feature needs one label"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"{name}: labels span {labels.min()} .. {labels.max()}, outside 0 .. {num_classes - 1}"
        )
