"""kNN, feature extraction and batch-norm calibration with known answers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from byolt.model.quality.features import calibrate_batch_norm, extract_features
from byolt.model.quality.knn import knn_accuracy, knn_votes
from byolt.model.quality.scores import (
    confusion_matrix,
    mean_per_class,
    num_classes,
    topk_correct,
    wilson_interval,
)


def _at(*degrees: float) -> torch.Tensor:
    """Vectors of the plane at these angles, of various lengths."""
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1, len(degrees) + 1)[:, None]


def test_one_neighbor_is_the_most_similar_by_angle() -> None:
    labels = torch.tensor([0, 1, 2])
    votes = knn_votes(_at(0, 90, 180), labels, _at(10, 50, 130, 170, 91), 3, k=1)
    assert votes.argmax(dim=1).tolist() == [0, 1, 1, 2, 1]


def test_votes_are_weighted_by_similarity() -> None:
    bank, labels = _at(0, 60, 60), torch.tensor([0, 1, 1])
    # One at cosine 1 against two at cosine 1/2: exp(1/T) > 2 exp(1/2T) exactly when T < 1 / (2 ln 2) = .7213.
    assert knn_votes(bank, labels, _at(0), 2, k=3, temperature=0.71).argmax().item() == 0
    assert knn_votes(bank, labels, _at(0), 2, k=3, temperature=0.73).argmax().item() == 1
    assert knn_votes(bank, labels, _at(0), 2, k=1, temperature=0.73).argmax().item() == 0


def test_votes_are_logarithms_of_sums_of_exponentials() -> None:
    votes = knn_votes(_at(0, 60, 60, 90, 180), torch.tensor([0, 0, 2, 2, 3]), _at(0), 5, k=4, temperature=0.5)
    sums = torch.tensor([[1 + math.exp(-1), 0, math.exp(-1) + math.exp(-2), 0, 0]])
    torch.testing.assert_close(votes, sums.log(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.0113, 0.01, 1e-3, 1e-6, 1e-40, 1e-320])
def test_no_temperature_is_too_low(temperature: float) -> None:
    """exp(1 / .0113) is beyond float32, and 1e-320 is 0 in it: the nearest must still win, and then the second."""
    bank, labels = _at(0, 40, 70, 120, 179), torch.tensor([3, 2, 1, 0, 4])
    votes = knn_votes(bank, labels, _at(10, 63, 100), 6, k=4, temperature=temperature)
    assert votes.argmax(dim=1).tolist() == [3, 1, 0]
    assert votes.isneginf().tolist() == [[c in miss for c in range(6)] for miss in ({4, 5}, {4, 5}, {3, 5})]
    if temperature >= 1e-6:  # one neighbor per class by angle; below, all are equal to rounding
        assert votes.argsort(dim=1, descending=True)[:, :4].tolist() == [
            [3, 2, 1, 0],
            [1, 2, 0, 3],
            [0, 1, 2, 4],
        ]


def test_mean_per_class_weighs_classes_alike() -> None:
    counts = torch.tensor([[8, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 3]])
    assert mean_per_class(counts) == pytest.approx((0.8 + 0 + 0.75) / 3)  # the third has no image


def test_topk_counts_the_true_class_among_the_highest() -> None:
    scores = torch.tensor(
        [[0.1, 0.5, 0.3, 0.2], [0.4, 0.4, 0.4, 0.0], [-math.inf, 1.0, -math.inf, -math.inf]]
    )
    labels = torch.tensor([2, 1, 0])
    assert topk_correct(scores, labels, 1).tolist() == [False, False, False]
    assert topk_correct(scores, labels, 2).tolist() == [True, True, False]  # of equals the lower class first
    assert topk_correct(scores, labels, 4).tolist() == [True, True, False]  # -inf means no answer
    many = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    truth = torch.arange(200) % 10
    for k in (1, 3, 5, 10):
        expected = (many.topk(k, dim=1).indices == truth[:, None]).any(dim=1)
        assert torch.equal(topk_correct(many, truth, k), expected)


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (81, 263), (15, 148), (765, 1000)])
def test_wilson_bounds_are_the_roots_of_the_score_equation(correct: int, total: int) -> None:
    """(rate - p)^2 = z^2 p (1 - p) / n at both bounds, which enclose the rate."""
    low, high = wilson_interval(correct, total)
    rate = correct / total
    assert 0 <= low <= rate <= high <= 1
    for p in (low, high):
        assert (rate - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / total, abs=1e-12)


def test_wilson_published_values() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    for correct, total, low, high in (
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)
    ):  # fmt: skip
        assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
    with pytest.raises(ValueError, match="at least one answer"):
        wilson_interval(0, 0)


def test_confusion_matrix_counts_pairs() -> None:
    matrix = confusion_matrix(torch.tensor([0, 2, 2, 1]), torch.tensor([0, 1, 1, 2]), 3)
    assert matrix.tolist() == [[1, 0, 0], [0, 0, 2], [0, 1, 0]]


def test_chunks_do_not_change_the_answer_and_k_is_clamped() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(150, 8, generator=generator), torch.randn(70, 8, generator=generator)
    labels = torch.randint(5, (150,), generator=generator)
    whole = knn_votes(bank, labels, queries, 5, k=20, temperature=1, chunk=70)
    torch.testing.assert_close(knn_votes(bank, labels, queries, 5, k=20, temperature=1, chunk=9), whole)
    everyone = knn_votes(bank, labels, queries, 5, k=150, temperature=1)
    assert torch.equal(everyone, knn_votes(bank, labels, queries, 5, k=200, temperature=1))
    assert not torch.allclose(everyone, whole)


def test_accuracy_is_the_share_of_right_answers() -> None:
    bank, labels = _at(0, 90), torch.tensor([0, 1])
    queries, truth = _at(5, 10, 80, 85), torch.tensor([0, 1, 1, 1])
    assert knn_accuracy(bank, labels, queries, truth, num_classes=2, k=1) == 0.75
    assert knn_accuracy(bank, labels, bank, labels, num_classes=2) == 1.0


def test_knn_refuses_what_cannot_be_right() -> None:
    bank, labels = _at(0, 90), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="bank: 2 features but 1 labels"):
        knn_votes(bank, labels[:1], bank, 2)
    with pytest.raises(ValueError, match=r"bank: labels span 0 .. 1, outside 0 .. 0"):
        knn_votes(bank, labels, bank, 1)
    with pytest.raises(ValueError, match="bank has no samples"):
        knn_votes(bank[:0], labels[:0], bank, 2)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        knn_votes(bank, labels, bank, 2, k=0)
    with pytest.raises(ValueError, match="no queries"):
        knn_accuracy(bank, labels, bank[:0], labels[:0], 2)


def _encoder() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def test_features_come_in_order_in_eval_mode_and_the_mode_is_restored() -> None:
    encoder = _encoder()
    encoder[1].running_mean.fill_(0.5)
    encoder[2].eval()  # a mixture of modes, to be found again
    images = torch.randn(5, 3, 8, 8)
    batches = [(images[:3], torch.tensor([4, 3, 2])), (images[3:], torch.tensor([1, 0]))]
    features, labels = extract_features(encoder, batches)
    assert [m.training for m in encoder.modules()] == [True, True, True, False, True, True]
    assert encoder[1].running_mean.tolist() == [0.5] * 4
    assert not features.requires_grad
    torch.testing.assert_close(features, encoder.eval()(images).detach(), rtol=1e-6, atol=1e-6)
    assert labels.tolist() == [4, 3, 2, 1, 0]
    assert features.shape == (5, 4)


def test_a_rank_without_images_has_no_features() -> None:
    encoder = _encoder()
    encoder.num_features = 4
    features, labels = extract_features(encoder, [])
    assert features.shape == (0, 4) and features.dtype == torch.float32
    assert labels.shape == (0,) and labels.dtype == torch.int64


def test_labels_that_are_ids_are_no_classes() -> None:
    assert num_classes(np.array([0, 3]), np.array([5, -1])) == 6
    assert num_classes(np.array([99_999])) == 100_000
    for label in (100_000, 10**12, 2**63 - 1):
        with pytest.raises(
            ValueError, match=rf"largest label is {label:,}.*\?label=FIELD.*online_probe=false"
        ):
            num_classes(np.array([0, 1]), np.array([label]))


def test_calibration_averages_the_statistics_of_the_batches() -> None:
    encoder = _encoder().eval()
    norm = encoder[1]
    norm.running_mean.fill_(99.0)
    norm.num_batches_tracked.fill_(7)  # as after training
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    batches = [(i + torch.randn(6, 3, 8, 8), torch.zeros(6)) for i in range(3)]
    calibrate_batch_norm(encoder, iter(batches))
    activations = [encoder[0](images).detach() for images, _ in batches]
    mean = torch.stack([a.mean((0, 2, 3)) for a in activations]).mean(0)
    variance = torch.stack([a.var((0, 2, 3)) for a in activations]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-5, atol=1e-5)
    assert norm.momentum == 0.1
    assert not any(m.training for m in encoder.modules())
    assert all(torch.equal(p, before[name]) for name, p in encoder.named_parameters())
