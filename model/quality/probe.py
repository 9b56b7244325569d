"""Trains a linear classifier beside the network, without influence on it: the online probe."""

import sys

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from byolt.configs.schema import Config, OptimizerConfig
from byolt.files.console import say
from byolt.model.distributed import World, all_reduce_mean
from byolt.model.optim import LARS
from byolt.model.quality.linear import make_head
from byolt.model.quality.scores import num_classes


class OnlineProbe:
    """A linear classifier from F detached features of view 1 to C classes, with an optimizer of its own.

    The reference adds the classifier's loss to BYOL's. As the features are detached and LARS works tensor by tensor, a
    separate LARS with the same settings makes the same updates.
    """

    def __init__(self, num_features: int, num_classes: int, world: World, settings: OptimizerConfig) -> None:
        self._world = world
        self.head = make_head(num_features, num_classes, seed=0).to(world.device)
        self._optimizer = LARS(
            self.head.parameters(), 0.0, settings.momentum, settings.weight_decay, settings.trust_coefficient,
            trust=settings.trust, decay_all=settings.decay_all,
        )  # fmt: skip

    def __call__(self, features: Tensor, labels: Tensor, lr: float, finite: Tensor) -> Tensor:
        """Updates the classifier once.

        Args:
            features: (n, F) of this rank, detached.
            labels: (n,) int64 in [0, C), on the CPU or the device.
            lr: learning rate of this update.
            finite: 0-dim bool on the device, the same on every rank; where False nothing changes.

        Returns:
            This rank's accuracy, 0 .. 1, before the update: 0-dim float32 on the device.
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
        """Weights and, after the first update, their momenta."""
        state = dict(self.head.state_dict())
        momenta = self._optimizer.state_dict()["state"]
        names = [name for name, _ in self.head.named_parameters()]
        return state | {f"momentum.{names[i]}": momenta[i]["momentum"] for i in momenta}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the result of `state_dict`."""
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
    """The probe of a run; None if it is switched off, or unless `labels`, of all training images, are classes.

    An unlabeled image has a negative label. For labels too large to be classes, rank 0 prints a warning.
    """
    if not config.eval.online_probe or (labels < 0).any():
        return None
    try:
        classes = num_classes(labels)
    except ValueError as error:
        if world.is_main:
            say(f"warning: no online probe: {error}", file=sys.stderr)
        return None
    return OnlineProbe(num_features, classes, world, config.optimizer) if classes > 1 else None
