"""Linear classifiers on features: heads trained side by side, L-BFGS, and the probe of a running training."""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import Config
from model import schedules
from model.byol import initialise_
from model.distributed import World, all_reduce_mean
from model.evaluate import num_classes
from model.optim import LARS

MOMENTUM = 0.9  # of classifiers and fine-tuning (paper, App. C.1 and C.2)


class HeadSweep:
    """One linear classifier per learning rate; all see the same features in one pass.

    SGD with Nesterov momentum, no decay, cosine from base_lr x batch / 256 to 0 without warm-up (paper, App. C.1;
    the scaling by the batch is the reference's, byol/utils/schedules.py).
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
            batch_size: samples of a step.
            total_steps: length of the cosine, >= 1.
            device: where the features will be.
            seed: of the weights, which are the same for all heads.
        """
        self.base_lrs, self._batch_size, self._total_steps = list(base_lrs), batch_size, total_steps
        self.heads = [make_head(num_features, num_classes, seed).to(device) for _ in base_lrs]
        groups = [{"params": head.parameters(), "lr": 0.0} for head in self.heads]
        self._optimizer = torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True)
        self._step = 0

    def step(self, features: Tensor, labels: Tensor) -> None:
        """One update of every head.

        Args:
            features: (N, F) float32.
            labels: (N,) int64 in [0, C).
        """
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
        """The logits (N, C) of every head, in the order of base_lrs."""
        return [head(features) for head in self.heads]


def make_head(num_features: int, num_classes: int, seed: int) -> nn.Linear:
    """A linear classifier initialised as the reference's, by a seed of its own: torch's global one is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(num_features, num_classes)
        initialise_(head)
    return head


class Logistic(NamedTuple):
    """A fitted classifier: scores are features @ weight.T + bias."""

    weight: Tensor  # (C, F) float64
    bias: Tensor  # (C,) float64, of mean 0
    gradient: float  # largest entry of the gradient that is left, of the mean loss in the fit's own units
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
    """Multinomial logistic regression by L-BFGS: minimises the SUM of cross entropies + l2 / 2 |weight|^2.

    scikit-learn's LogisticRegression with C = 1 / l2. The bias is not penalised, so features may be centred and
    scaled by one number before the fit without moving the optimum: it is reached in fewer iterations.

    Args:
        features: (N, F) floating point, N >= 1.
        labels: (N,) int64 in [0, num_classes).
        num_classes: C.
        l2: strength of the penalty, > 0.
        max_iterations: of L-BFGS, which stops earlier at the tolerance.
        tolerance: on the largest entry of the gradient of the mean loss.

    Raises:
        ValueError: l2 is not more than 0, there is no feature, or not one label for each.
    """
    if not l2 > 0:
        raise ValueError(f"l2 is {l2}: it must be more than 0")
    if len(features) != len(labels) or len(features) == 0:
        raise ValueError(f"{len(features)} features, {len(labels)} labels: there must be one of each or more")
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
    """Penalties, logarithmically spaced from 1e-6 to 1e5; 45 are those of Kornblith et al. (arXiv 1805.08974)."""
    exponents = torch.linspace(math.log(1e-6), math.log(1e5), count, dtype=torch.float64)
    return [math.exp(exponent) for exponent in exponents]


class OnlineProbe:
    """A linear classifier that follows a training on the detached features of view 1; a gauge, never a loss of it.

    The reference trains its classifier in one loss with BYOL's. LARS works tensor by tensor and the features are
    detached, so an optimizer of its own with the same settings makes the same updates.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        world: World,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float,
    ) -> None:
        """
        Args:
            num_features: F.
            num_classes: C.
            world: the processes that share each batch.
            momentum: of LARS, as weight_decay and trust_coefficient.
        """
        self._world = world
        self.head = make_head(num_features, num_classes, seed=0).to(world.device)
        self._optimizer = LARS(self.head.parameters(), 0.0, momentum, weight_decay, trust_coefficient)

    def __call__(self, features: Tensor, labels: Tensor, lr: float, finite: Tensor) -> Tensor:
        """One update.

        Args:
            features: (n, F) of this rank, detached.
            labels: (n,) int64 in [0, C), on the CPU or the device.
            lr: learning rate of this update.
            finite: 0-dim bool on the device, the same on every rank; where False nothing changes.

        Returns:
            The share, 0 .. 1, of this rank's images that were classified rightly before the update: 0-dim float32
            on the device.
        """
        labels = labels.to(features.device, non_blocking=True)
        logits = self.head(features.float())
        gradients = list(torch.autograd.grad(F.cross_entropy(logits, labels), list(self.head.parameters())))
        if self._world.size > 1:
            flat = all_reduce_mean(torch.cat([g.flatten() for g in gradients]), self._world)
            gradients = [
                part.view_as(g)
                for part, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)
            ]
        for parameter, gradient in zip(self.head.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.found_inf = (~finite).float()
        self._optimizer.step()
        return (logits.detach().argmax(dim=1) == labels).float().mean()

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and, after the first update, their momentum."""
        state = dict(self.head.state_dict())
        momenta = self._optimizer.state_dict()["state"]
        names = [name for name, _ in self.head.named_parameters()]
        return state | {f"momentum.{names[i]}": momenta[i]["momentum"] for i in momenta}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave."""
        names = [name for name, _ in self.head.named_parameters()]
        self.head.load_state_dict({name: state[name] for name in names})
        momenta = {
            i: {"momentum": state[f"momentum.{name}"]}
            for i, name in enumerate(names)
            if len(state) > len(names)
        }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": momenta, "param_groups": groups})


def make_probe(
    config: Config, num_features: int, labels: npt.NDArray[np.int64], world: World
) -> OnlineProbe | None:
    """The probe of a run with the settings of its optimizer; None without labels, or where it is switched off.

    Labels that can be no classes end no training: it goes without a probe, and rank 0 says so.

    Args:
        config: of the run.
        num_features: F of the encoder.
        labels: of all training images; below 0 where there is none.
        world: the processes.
    """
    if not config.eval.online_probe or (labels < 0).any():
        return None
    try:
        classes = num_classes(labels)
    except ValueError as error:
        if world.is_main:
            print(f"warning: no online probe: {error}", file=sys.stderr)
        return None
    if classes < 2:
        return None
    settings = config.optimizer
    return OnlineProbe(
        num_features, classes, world, settings.momentum, settings.weight_decay, settings.trust_coefficient
    )
