"""One training step: target, online network, loss, backward, LARS, EMA. The host never waits for the device."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from byolt.configs.schema import Config
from byolt.model.byol import BYOL, byol_loss, l2_normalize, make_byol
from byolt.model.distributed import World, broadcast_module, no_sync, own_time, wrap
from byolt.model.graph import Graph, choose_graph
from byolt.model.kernels.norm import convert_sync_batchnorm
from byolt.model.optim import LARS
from byolt.model.update import make_update

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Gauges(NamedTuple):
    """Signs of collapse, 0-dim float32 each, of this rank's last micro-batch (first view)."""

    prediction_std: Tensor  # see `collapse_gauges`
    prediction_cosine: Tensor
    projection_std: Tensor  # of the target's projection
    projection_cosine: Tensor


class StepResult(NamedTuple):
    """The outcome of one step: 0-dim tensors on the device, not yet read by the host."""

    loss: Tensor  # float32, mean over this rank's samples
    finite: Tensor  # bool, the same on every rank; if False, the step changed nothing
    gradient_norm: Tensor  # float32, over all parameters, before LARS, the same on every rank
    gauges: Gauges | None
    # (n, F) of each micro-batch's first view, detached, valid until the next step: for a probe.
    features1: list[Tensor]


class TrainStep:
    """Updates online network, momentum and target from the views of one global batch.

    It moves the model to the world's device, broadcasts rank 0's weights, synchronizes batch norm, and wraps the online
    network. The parameter objects stay the same, so the optimizer may be built before, and the state_dicts of model
    and optimizer may be saved and loaded at any time.

    Args:
        model: online and target network.
        optimizer: LARS over `model.online.parameters()`.
        world: the processes; they share each batch.
        precision: of autocast: "fp32", "bf16" or "fp16" (with a gradient scaler); weights stay float32.
        accumulation: micro-batches per step, >= 1; gradients are averaged over them.
        channels_last: NHWC layout for images and convolutions.
        compile: run both networks through torch.compile.
        cuda_graph: capture the step in a CUDA graph; `choose_graph` says where that is possible. Not yet run on a GPU.

    Raises:
        ValueError: precision or accumulation is not valid, or the optimizer's back end cannot update the model.
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
        cuda_graph: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"train.precision={precision} is unknown; set one of {', '.join(PRECISIONS)}")
        if accumulation < 1:
            raise ValueError(f"train.accumulation={accumulation} must be at least 1")
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
        buffers = [*model.online.buffers(), *model.target.buffers()]
        self.update = make_update(optimizer, *model.ema_parameters(), buffers)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.graph: Graph | None = None
        self.note = ""  # for the console
        if cuda_graph:
            self.graph = Graph(self._run, self.update.refresh, world.device)  # type: ignore[union-attr]

    def __call__(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], lr: float, tau: float, gauges: bool = False
    ) -> StepResult:
        """Updates the online network by LARS, and the target by EMA.

        A gradient that is not finite on any rank changes nothing: no weight, momentum or batch-norm statistic.

        Args:
            micro_batches: `accumulation` pairs (view1, view2), each (n, 3, H, W) on the device.
            lr: learning rate of this update.
            tau: EMA coefficient of this update.
            gauges: also measure the signs of collapse (a product of (n, D) and (D, n) per network).

        Raises:
            ValueError: the number of micro-batches is not `accumulation`.
        """
        if len(micro_batches) != self.accumulation:
            raise ValueError(
                f"got {len(micro_batches)} micro-batches, train.accumulation={self.accumulation}"
            )
        own_time.start(self.device)
        self.update.set_rates(lr, tau)
        views = [view for pair in micro_batches for view in pair]
        views = [x.contiguous(memory_format=self.layout) if x.ndim == 4 else x for x in views]
        done = self.graph(views) if self.graph else self._run(views)
        loss, finite, norm, features1, prediction1, projection1 = done
        signs = None
        if gauges:
            signs = Gauges(*collapse_gauges(prediction1), *collapse_gauges(projection1))
        if self.graph:  # the next replay overwrites its results
            loss, finite, norm = loss.clone(), finite.clone(), norm.clone()
        return StepResult(loss, finite, norm, signs, features1)

    def _run(self, views: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor]:
        """All of a step's work on the device; the rates are set before. A CUDA graph can capture it.

        Returns:
            loss, finite, gradient_norm and features1 of StepResult; of the last micro-batch's view 1 the predictions
            and the target's projections.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.update.keep_buffers()
        losses, features1 = [], []
        for index in range(self.accumulation):
            view1, view2 = views[2 * index : 2 * index + 2]
            last = index == self.accumulation - 1  # its backward averages the sum of gradients over ranks
            with nullcontext() if last else no_sync(self.online):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    projection1, projection2 = self.target(view1, view2)
                    online = self.online(view1, view2)
                loss = byol_loss(online, projection1, projection2)
                self.scaler.scale(loss / self.accumulation).backward()
            losses.append(loss.detach())
            features1.append(online.features1)
        self.scaler.unscale_(self.optimizer)
        finite, gradient_norm = self.update()  # the same on every rank: the gradients are averages over ranks
        self.scaler.update()
        loss = torch.stack(losses).mean()
        return loss, finite, gradient_norm, features1, online.prediction1.detach(), projection1

    def state_dict(self) -> dict[str, Any]:
        """Returns {"scaler": the gradient scaler's state}, empty unless precision is fp16."""
        return {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the result of `state_dict`."""
        if state["scaler"]:  # empty if the run was not fp16 until now
            self.scaler.load_state_dict(state["scaler"])


def make_step(config: Config, world: World, precision: str) -> TrainStep:
    """Builds model, optimizer and step of a run, its precision resolved; torch's global generator makes the weights."""
    settings, train = config.optimizer, config.train
    model = make_byol(config.model, config.augment.size)
    optimizer = LARS(
        model.online.parameters(),
        lr=0.0,  # set at every step
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        trust_coefficient=settings.trust_coefficient,
        backend=settings.backend,
        trust=settings.trust,
        decay_all=settings.decay_all,
    )
    cuda_graph, note = choose_graph(config, world, precision)
    options = train.accumulation, train.channels_last, train.compile, cuda_graph
    step = TrainStep(model, optimizer, world, precision, *options)
    step.note = note
    return step


@torch.no_grad()
def collapse_gauges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two signs that the network maps all samples to one point.

    Args:
        x: (N, D) floating point, N >= 2.

    Returns:
        The standard deviation over samples of each normalized dimension, averaged over dimensions: 0 if
        collapsed, about 1/sqrt(D) if spread over the sphere (arXiv 2011.10566, sec. 4.1). And the mean
        |cosine| between different samples: 1 if collapsed, about sqrt(2 / (pi D)) if spread.
    """
    x = l2_normalize(x.detach())
    n = len(x)
    cosine = (x @ x.T).abs()
    return x.std(dim=0).mean(), (cosine.sum() - cosine.diagonal().sum()) / (n * (n - 1))
