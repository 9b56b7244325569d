"""One training step: autocast, loss, backward, finite check, LARS, EMA. Nothing waits for the device."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byolt.configs.schema import Config
from byolt.model.byol import BYOL, Predictions, byol_loss, l2_normalize, make_byol
from byolt.model.distributed import World, broadcast_module, no_sync, wrap
from byolt.model.optim import LARS, ema_update_
from byolt.model.sync_norm import convert_sync_batchnorm

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Gauges(NamedTuple):
    """Signs of collapse, 0-dim float32 each, of this rank's last micro-batch (first view)."""

    prediction_std: Tensor  # see `collapse_gauges`
    prediction_cosine: Tensor
    projection_std: Tensor  # of the target's projection
    projection_cosine: Tensor


class StepResult(NamedTuple):
    """What one step leaves on the device: 0-dim tensors, not yet read by the host."""

    loss: Tensor  # float32, mean over this rank's samples; average over ranks where it is shown
    finite: Tensor  # bool, the same on every rank; where False, nothing of model and momentum changed
    gradient_norm: Tensor  # float32, over all parameters, before LARS, the same on every rank
    gauges: Gauges | None
    features1: list[Tensor]  # (n, F) of each micro-batch's first view, detached: for a probe


class TrainStep:
    """Updates online network, momentum and target from the views of one global batch.

    It moves the model to the world's device, equalises it over ranks, synchronises its batch norm and wraps
    the online network; model, optimizer and their state_dicts stay the caller's to save and load, at any
    time. All parameter objects stay the same, so the optimizer may be built before.

    Args:
        model: online and target network.
        optimizer: LARS over `model.online.parameters()`.
        world: the processes that share each batch.
        precision: "fp32", "bf16" or "fp16" (autocast; fp16 with a gradient scaler); weights stay float32.
        accumulation: micro-batches per step, >= 1; gradients are averaged over them.
        channels_last: NHWC layout for images and convolutions.
        compile: run both networks through torch.compile.

    Raises:
        ValueError: precision or accumulation is out of its range.
    """

    def __init__(
        self,
        model: BYOL,
        optimizer: LARS,
        world: World,
        precision: str,
        accumulation: int = 1,
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}; set one of {', '.join(PRECISIONS)}")
        if accumulation < 1:
            raise ValueError(f"accumulation is {accumulation}; it must be 1 or more")
        self.model, self.optimizer = model, optimizer
        self.device, self.accumulation = world.device, accumulation
        self.dtype = PRECISIONS[precision]
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        model.to(world.device, memory_format=self.layout)  # type: ignore[call-overload]
        broadcast_module(model, world)
        convert_sync_batchnorm(model, world)
        model.train()
        if compile:
            model.online.compile()
            model.target.compile()
        self.online, self.target = wrap(model.online, world, static_graph=accumulation == 1), model.target
        self.target_parameters, self.online_parameters = model.ema_parameters()
        buffers = [*model.online.buffers(), *model.target.buffers()]
        by_kind = ([b for b in buffers if b.is_floating_point() is kind] for kind in (True, False))
        self.statistics = [group for group in by_kind if group]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")

    def __call__(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], lr: float, tau: float, gauges: bool = False
    ) -> StepResult:
        """One update.

        Args:
            micro_batches: as many pairs (view1, view2) as `accumulation`, each (n, 3, H, W) on the device.
            lr: learning rate of this update.
            tau: EMA coefficient of this update.
            gauges: also measure the signs of collapse (a product of (n, D) and (D, n) per network).

        Raises:
            ValueError: the number of micro-batches is not `accumulation`.
        """
        if len(micro_batches) != self.accumulation:
            raise ValueError(
                f"got {len(micro_batches)} micro-batches for train.accumulation = {self.accumulation}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        statistics = self._read_statistics()
        losses, features1 = [], []
        for index, (view1, view2) in enumerate(micro_batches):
            last = index == self.accumulation - 1
            with nullcontext() if last else no_sync(self.online):
                loss, online, projection1 = self._forward(view1, view2)
                self.scaler.scale(loss / self.accumulation).backward()
            losses.append(loss.detach())
            features1.append(online.features1)
        finite, gradient_norm = self._update(lr)
        self._keep_statistics(finite, statistics)
        ema_update_(self.target_parameters, self.online_parameters, tau, finite)
        measured = (
            Gauges(*collapse_gauges(online.prediction1), *collapse_gauges(projection1)) if gauges else None
        )
        return StepResult(torch.stack(losses).mean(), finite, gradient_norm, measured, features1)

    def _forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Predictions, Tensor]:
        """Loss, what the online network said, and the target's projection of the first view."""
        if view1.ndim == 4:
            view1, view2 = (view.contiguous(memory_format=self.layout) for view in (view1, view2))
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            projection1, projection2 = self.target(view1, view2)
            online = self.online(view1, view2)
        return byol_loss(online, projection1, projection2), online, projection1

    def _update(self, lr: float) -> tuple[Tensor, Tensor]:
        """LARS, without effect where a gradient is not finite; on averaged gradients all ranks agree."""
        self.scaler.unscale_(self.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        finite = gradient_norm.isfinite()
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        del self.optimizer.found_inf
        self.scaler.update()
        return finite, gradient_norm

    def _read_statistics(self) -> list[Tensor]:
        """Batch norm's running statistics and its counters, one flat copy each."""
        return [torch.cat([b.reshape(-1) for b in group]) for group in self.statistics]

    def _keep_statistics(self, finite: Tensor, before: list[Tensor]) -> None:
        """Takes a step's batch-norm statistics back where it was not finite: NaN would stay in them for ever."""
        for group, old, new in zip(self.statistics, before, self._read_statistics(), strict=True):
            kept = torch.where(finite, new, old).split([b.numel() for b in group])
            torch._foreach_copy_(group, [part.view_as(b) for part, b in zip(kept, group, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        """{"scaler": the gradient scaler's state}, which is empty unless precision is fp16."""
        return {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, for the same precision."""
        if state["scaler"]:  # empty where the run was not fp16 until now
            self.scaler.load_state_dict(state["scaler"])


def make_step(config: Config, world: World, precision: str) -> TrainStep:
    """Model, optimizer and step of a run; weights are drawn from torch's global generator.

    Args:
        config: of the run.
        world: the processes.
        precision: "fp32", "bf16" or "fp16".
    """
    settings, train = config.optimizer, config.train
    model = make_byol(config.model)
    optimizer = LARS(
        model.online.parameters(),
        lr=0.0,  # set at every step
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        trust_coefficient=settings.trust_coefficient,
        backend=settings.backend,
    )
    return TrainStep(
        model, optimizer, world, precision, train.accumulation, train.channels_last, train.compile
    )


@torch.no_grad()
def collapse_gauges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two signs that all samples are mapped to one point.

    Args:
        x: (N, D) floating point, N >= 2.

    Returns:
        The standard deviation over samples of each normalised dimension, averaged over dimensions: 0 if
        collapsed, about 1/sqrt(D) if spread over the sphere (arXiv 2011.10566, sec. 4.1). And the mean
        |cosine| between different samples: 1 if collapsed, about sqrt(2 / (pi D)) if spread.
    """
    x = l2_normalize(x.detach())
    n = len(x)
    cosine = (x @ x.T).abs()
    return x.std(dim=0).mean(), (cosine.sum() - cosine.diagonal().sum()) / (n * (n - 1))
