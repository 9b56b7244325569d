"""Trains linear classifiers on features: heads side by side by SGD, or one by L-BFGS."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byolt.model import schedules
from byolt.model.resnet import initialize_

MOMENTUM = 0.9  # of linear evaluation and fine-tuning (paper, App. C.1 and C.2)


class HeadSweep:
    """One linear classifier per learning rate, all trained on the same features in one pass.

    SGD with Nesterov momentum, no weight decay, cosine from base_lr x batch / 256 to 0 without warm-up (paper,
    App. C.1; the scaling by the batch is the reference's, byol/utils/schedules.py).
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        base_lrs: Sequence[float],
        batch_size: int,
        total_steps: int,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        """
        Args:
            num_features: F.
            num_classes: C.
            base_lrs: learning rates at a batch of 256, each > 0.
            batch_size: samples per step.
            total_steps: length of the cosine, >= 1.
            device: of the features.
            seed: of the weights, which start equal in all heads.
        """
        self.base_lrs, self._batch_size, self._total_steps = list(base_lrs), batch_size, total_steps
        self.heads = [make_head(num_features, num_classes, seed).to(device) for _ in base_lrs]
        groups = [{"params": head.parameters(), "lr": 0.0} for head in self.heads]
        self._optimizer = torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True)
        self._step = 0

    def step(self, features: Tensor, labels: Tensor) -> None:
        """Updates every head once from features (N, F) float32 and labels (N,) int64 in [0, C)."""
        for group, base_lr in zip(self._optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = schedules.learning_rate(
                self._step,
                base_lr=base_lr,
                batch_size=self._batch_size,
                warmup_steps=0,
                total_steps=self._total_steps,
            )
        self._optimizer.zero_grad(set_to_none=True)
        for head in self.heads:
            F.cross_entropy(head(features), labels).backward()
        self._optimizer.step()
        self._step += 1

    @torch.no_grad()
    def scores(self, features: Tensor) -> list[Tensor]:
        """Logits (N, C) of every head, in the order of base_lrs."""
        return [head(features) for head in self.heads]


def make_head(num_features: int, num_classes: int, seed: int) -> nn.Linear:
    """A linear classifier with the reference's initialization; torch's global generator stays untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(num_features, num_classes)
        initialize_(head)
    return head


class Logistic(NamedTuple):
    """A fitted classifier with the scores features @ weight.T + bias."""

    weight: Tensor  # (C, F) float64
    bias: Tensor  # (C,) float64, mean 0
    gradient: float  # largest remaining entry of the mean loss's gradient, for the scaled features of the fit
    iterations: int

    def scores(self, features: Tensor) -> Tensor:
        """Logits (N, C) float64 of features (N, F)."""
        return features.double() @ self.weight.T + self.bias


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    l2: float,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> Logistic:
    """Multinomial logistic regression by L-BFGS: minimizes the SUM of cross entropies + l2 / 2 |weight|^2.

    Equals scikit-learn's LogisticRegression with C = 1 / l2. As the bias is not penalized, the fit centers the features
    and scales them by one number, which needs fewer iterations and leaves the optimum in place.

    Args:
        features: (N, F) floating point, N >= 1.
        labels: (N,) int64 in [0, num_classes).
        num_classes: C.
        l2: strength of the penalty, > 0.
        max_iterations: limit of L-BFGS, which stops earlier at the tolerance.
        tolerance: of the largest entry of the mean loss's gradient.

    Raises:
        ValueError: l2 is out of its range, or the numbers of features and labels are 0 or differ.
    """
    if not l2 > 0:
        raise ValueError(f"l2={l2} must be above 0")
    if len(features) != len(labels) or len(features) == 0:
        raise ValueError(
            f"{len(features)} features, {len(labels)} labels: give at least one, and one label for each"
        )
    mean = features.double().mean(dim=0)
    x = features.double() - mean
    scale = x.square().mean().sqrt().clamp_min(1e-12)
    x /= scale
    count = len(x)
    weight = x.new_zeros(num_classes, x.shape[1]).requires_grad_()
    bias = x.new_zeros(num_classes).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = l2 / (2 * count * scale.square()) * weight.square().sum()
        value = F.cross_entropy(x @ weight.T + bias, labels) + penalty
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
        loss()
    assert weight.grad is not None and bias.grad is not None
    left = max(weight.grad.abs().max().item(), bias.grad.abs().max().item())
    fitted, offset = weight.detach() / scale, bias.detach()
    offset = offset - fitted @ mean
    return Logistic(fitted, offset - offset.mean(), left, optimizer.state[weight]["n_iter"])


def l2_values(count: int = 45) -> list[float]:
    """Penalties spaced logarithmically from 1e-6 to 1e5; with 45 those of Kornblith et al. (arXiv 1805.08974)."""
    exponents = torch.linspace(math.log(1e-6), math.log(1e5), count, dtype=torch.float64)
    return [math.exp(exponent) for exponent in exponents]
