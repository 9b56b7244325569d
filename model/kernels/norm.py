"""Batch norm, a block's shortcut and ReLU as one operation, with statistics of each view apart and over all ranks."""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from byolt.model.distributed import World, all_reduce_sum_

FUSED_DEVICES = {"cuda"} if importlib.util.find_spec("triton") else set[str]()


def is_fused(x: Tensor) -> bool:
    """Whether norm_triton.py's kernels take x: on a GPU, channels last, outside of torch.compile, which has its own."""
    dense = x.is_contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.is_contiguous()
    return x.device.type in FUSED_DEVICES and dense and not torch.compiler.is_compiling()


class BatchNorm(nn.BatchNorm2d):
    """A batch norm (1-d or 2-d) that can add a shortcut and apply ReLU in the same call.

    This file defines the numbers; on CUDA the kernels of norm_triton.py compute them.

    Attributes:
        synchronized: statistics are those of all ranks' batches, each of which has at least one image. torch's
            SyncBatchNorm refuses CPU tensors; on CUDA the host waits for the device about three times per layer.
        views: equal parts of a batch that have statistics of their own, for all batch norms; see `each_view`.
    """

    synchronized = False
    views = 1

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim not in (2, 4):
            raise ValueError(f"expected (N, C) or (N, C, H, W), got {tuple(input.shape)}")

    def forward(
        self,
        input: Tensor,
        shortcut: Tensor | None = None,
        shortcut_norm: "BatchNorm | None" = None,
        relu: bool = False,
        pool: nn.Module | None = None,
    ) -> Tensor:
        """Normalizes the input, adds the shortcut, normalized by its own norm if there is one, applies ReLU and pools.

        Input and shortcut are (N, C) or (N, C, H, W). On CUDA an activation before max-pool is never written to memory.
        """
        norms = [self] if shortcut_norm is None else [self, shortcut_norm]
        if not is_fused(input) or not all(norm.training and norm.momentum is not None for norm in norms):
            return self.define(input, shortcut, shortcut_norm, relu, pool)
        from byolt.model.kernels import norm_triton  # triton comes with torch for CUDA only

        self._check_input_dim(input)
        shortcut = getattr(shortcut, "second", shortcut)
        pools = shortcut is None and input.ndim == 4 and _is_stem_pool(pool)
        output, second = norm_triton.normalize(input, self, shortcut, shortcut_norm, self.views, relu, pools)
        # The output has two uses, the next block's convolution and its shortcut. As two tensors of the same memory,
        # their gradients arrive apart, and the backward kernel adds them: autograd would in a pass of its own.
        if second is not None:
            output.second = second  # type: ignore[attr-defined]
        return output if pool is None or pools else pool(output)

    def define(
        self,
        input: Tensor,
        shortcut: Tensor | None = None,
        shortcut_norm: "BatchNorm | None" = None,
        relu: bool = False,
        pool: nn.Module | None = None,
    ) -> Tensor:
        """Computes `forward` with torch's operations, on any device."""
        output = self._normalize(input)
        if shortcut is not None:
            output += shortcut if shortcut_norm is None else shortcut_norm._normalize(shortcut)
        if relu:
            output = F.relu(output, inplace=True)
        return output if pool is None else pool(output)

    def _normalize(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        normalize = self._normalize_over_ranks if self.synchronized else super().forward
        if self.views == 1:
            return normalize(x)
        return torch.cat([normalize(view) for view in x.unflatten(0, (self.views, -1))])

    def _normalize_over_ranks(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        self.num_batches_tracked += 1
        return _NormalizeOverRanks.apply(x, self.weight, self.bias, self)

    @property
    def batch_weight(self) -> float:
        """Weight of the newest batch in the running statistics."""
        if self.momentum is not None:
            return self.momentum
        return 1.0 / float(self.num_batches_tracked)  # cumulative average, for calibration: the host waits


def _is_stem_pool(pool: nn.Module | None) -> bool:
    """Whether it is the max-pool of a ResNet's stem, which a kernel computes."""
    return isinstance(pool, nn.MaxPool2d) and (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)


def each_view(network: nn.Module, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
    """Computes (network(view1), network(view2)), each with its own batch statistics; they move by view 1, then 2.

    Where the batch norms are fused, both views are one batch, which is faster: half as many launches, each of twice the
    size. The numbers are the same to rounding. A network with norms of another kind, as timm's, gets one view after the
    other.
    """

    def keeps_apart() -> bool:
        return all(isinstance(m, BatchNorm) for m in network.modules() if _has_statistics(m))

    if not is_fused(view1) or view1.shape != view2.shape or not keeps_apart():
        return network(view1), network(view2)
    BatchNorm.views = 2  # of all layers during this call: torchvision's forward methods cannot pass it on
    try:
        output1, output2 = network(torch.cat([view1, view2])).chunk(2)
    finally:
        BatchNorm.views = 1
    return output1, output2


def convert_sync_batchnorm(module: nn.Module, world: World) -> nn.Module:
    """Makes every batch norm of the module take its statistics over all ranks.

    Returns:
        The module itself, or a `BatchNorm` with its parameters and buffers if it is torch's or timm's batch norm;
        unchanged for a single rank, and torch's SyncBatchNorm always.

    Raises:
        ValueError: a layer keeps statistics of the batch in another way.
    """
    if world.size == 1 or isinstance(module, nn.SyncBatchNorm):
        return module
    if _has_statistics(module):
        if not isinstance(module, BatchNorm):
            module = _of_others(module)
        module.synchronized = True
        return module
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child, world))
    return module


def _has_statistics(module: nn.Module) -> bool:
    """Whether its output depends on the whole batch: batch norms, and evo norms of timm."""
    return isinstance(module, _BatchNorm) or getattr(module, "running_var", None) is not None


class _BatchNormAct(BatchNorm):
    """timm's BatchNormAct2d: a batch norm whose forward also applies the activation that follows."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return self.act(self.drop(super().forward(input)))


def _of_others(norm: Any) -> BatchNorm:
    """A `BatchNorm` with the parameters and buffers of torch's or timm's."""
    plain = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d)
    if not plain and not (isinstance(norm, nn.BatchNorm2d) and hasattr(norm, "act")):
        raise ValueError(
            f"the network's {type(norm).__name__} cannot take its statistics over several ranks: start one process, or "
            "choose another model.backbone"
        )
    if not (norm.affine and norm.track_running_stats):
        raise ValueError(
            "a batch norm without weights or running statistics cannot be used with several ranks"
        )
    ours = (BatchNorm if plain else _BatchNormAct)(norm.num_features, norm.eps, norm.momentum)
    if isinstance(ours, _BatchNormAct):
        ours.drop, ours.act = norm.drop, norm.act
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training"):
        setattr(ours, name, getattr(norm, name))
    return ours


class _NormalizeOverRanks(torch.autograd.Function):
    """Computes weight * (x - mean) / sqrt(variance + eps) + bias; mean and variance are those of all ranks' batches.

    The running statistics move towards the batch's by `batch_weight`; their variance is unbiased, as in torch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: BatchNorm) -> Tensor:
        axes, shape = _axes(x), _channel_shape(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        size = x.numel() // x.shape[1]
        # float64: the difference of the exchanged sums keeps float32's digits.
        variance, mean = (s.double() for s in torch.var_mean(wide, axes, correction=0))
        sums = torch.cat([size * mean, size * (variance + mean * mean), mean.new_tensor([size])])
        all_reduce_sum_(sums)
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        variance = (square - mean * mean).clamp_min(0)
        scale = (variance + norm.eps).rsqrt()
        mean, variance, scale, count = (s.to(wide.dtype) for s in (mean, variance, scale, sums[-1]))
        norm.running_mean.lerp_(mean, norm.batch_weight)
        norm.running_var.lerp_(variance * count / (count - 1), norm.batch_weight)
        normalized = (wide - mean.view(shape)) * scale.view(shape)
        ctx.save_for_backward(normalized, weight, scale, count)
        return (normalized * weight.view(shape) + bias.view(shape)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normalized, weight, scale, count = ctx.saved_tensors
        axes, shape = _axes(normalized), _channel_shape(normalized)
        gradient = gradients[0].to(normalized.dtype)
        bias_gradient = gradient.sum(axes)
        weight_gradient = (gradient * normalized).sum(axes)
        means = torch.cat([bias_gradient, weight_gradient])
        all_reduce_sum_(means)
        gradient_mean, product_mean = (m.view(shape) for m in (means / count).chunk(2))
        input_gradient = (gradient - gradient_mean - normalized * product_mean) * (weight * scale).view(shape)
        return input_gradient.to(gradients[0].dtype), weight_gradient, bias_gradient, None


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


def _channel_shape(x: Tensor) -> list[int]:
    return [-1 if axis == 1 else 1 for axis in range(x.ndim)]
