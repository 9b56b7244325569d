"""Spectrum, effective rank, projection and neighbors with known answers."""

import math

import pytest
import torch

from byolt.model.quality.spectrum import effective_rank, nearest, neighbor_precision, principal_axes, project


def _with_covariance(variances: list[float]) -> torch.Tensor:
    """+-sqrt(v (2D - 1) / 2) along each axis: 2D points whose covariance is exactly diag(variances)."""
    scale = (torch.tensor(variances, dtype=torch.float64) * (2 * len(variances) - 1) / 2).sqrt()
    return torch.cat([scale.diag(), -scale.diag()])


def test_spectrum_of_a_known_covariance_whatever_the_rotation_and_the_mean() -> None:
    variances = [4.0, 9.0, 0.0, 1.0]
    rotation, _ = torch.linalg.qr(
        torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    features = _with_covariance(variances) @ rotation + 5
    principal = principal_axes(features)
    torch.testing.assert_close(principal.eigenvalues, torch.tensor([9.0, 4, 1, 0], dtype=torch.float64))
    assert principal.eigenvalues[3] == 0
    expected = rotation[[1, 0, 3, 2]]  # each up to its sign
    cosines = (principal.axes * expected).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(4, dtype=torch.float64))
    largest = principal.axes.gather(1, principal.axes.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()


def test_projection_keeps_the_largest_variances() -> None:
    features = _with_covariance([1.0, 25.0, 16.0]).float() + 3
    points = project(features, principal_axes(features))
    torch.testing.assert_close(points.var(dim=0), torch.tensor([25.0, 16.0], dtype=torch.float64))
    torch.testing.assert_close(points.mean(dim=0), torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)


def test_one_dimension_is_a_spectrum_too() -> None:
    features = torch.tensor([[1.0], [3.0]])
    assert principal_axes(features).eigenvalues.tolist() == [2.0]


@pytest.mark.parametrize("k", [1, 2, 7, 64])
def test_effective_rank_of_k_equal_eigenvalues_is_k(k: int) -> None:
    assert effective_rank(torch.cat([torch.full((k,), 0.3), torch.zeros(10)])) == pytest.approx(k, rel=1e-6)


def test_effective_rank_by_hand_and_of_a_point() -> None:
    # Shares 3/4 and 1/4: entropy ln 4 - (3/4) ln 3.
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(4 / 3**0.75)
    assert effective_rank(torch.tensor([6.0, 2.0])) == pytest.approx(4 / 3**0.75)
    assert effective_rank(torch.zeros(5)) == 0.0


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_neighbors_by_angle_without_oneself(chunk: int) -> None:
    angles = torch.tensor([0.0, 10.0, 30.0, 90.0, 100.0]) * math.pi / 180
    features = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([1.0, 9, 2, 0.1, 5])[:, None]
    indices, cosines = nearest(features, k=2, chunk=chunk)
    assert indices.tolist() == [[1, 2], [0, 2], [1, 0], [4, 2], [3, 2]]
    expected = torch.tensor([[10.0, 30], [10, 20], [20, 30], [10, 60], [10, 70]]) * math.pi / 180
    torch.testing.assert_close(cosines, expected.cos(), rtol=1e-5, atol=1e-6)
    assert nearest(features, k=99)[0].shape == (5, 4)


def test_one_point_with_rounding_errors_has_rank_0() -> None:
    noise = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    features = 3 + 2e-7 * noise
    assert effective_rank(principal_axes(features).eigenvalues) == 0.0
    assert effective_rank(principal_axes(3 + 1e-3 * noise).eigenvalues) > 3


def test_neighbors_of_the_same_class_and_chance() -> None:
    labels = torch.tensor([0, 0, 0, 1, -1])
    indices = torch.tensor([[1, 3], [2, 4], [0, 1], [4, 0], [0, 1]])
    # Known pairs: 0-1, 1-2, 2-0, 2-1 right; 0-3, 3-0 wrong. Two samples of 3 + 1: 3 * 2 of 4 * 3 pairs.
    right, chance = neighbor_precision(labels, indices)
    assert right == pytest.approx(4 / 6)
    assert chance == pytest.approx(1 / 2)
    assert all(math.isnan(x) for x in neighbor_precision(torch.full((2,), -1), torch.tensor([[1], [0]])))


def test_what_has_no_spectrum_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3\)"):
        principal_axes(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="not finite"):
        principal_axes(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))
