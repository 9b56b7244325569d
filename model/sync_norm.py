"""Batch norm with statistics over all ranks: plain torch operations on the CPU, torch's fused kernels on CUDA."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from byolt.model.distributed import World, all_reduce_sum_, gather_stacked


def convert_sync_batchnorm(module: nn.Module, world: World) -> nn.Module:
    """Replaces every batch norm of the module by a `SyncBatchNorm` with the same parameters and buffers.

    Returns:
        The module itself, or a `SyncBatchNorm` if it is a batch norm; unchanged for a single rank.
    """
    if world.size == 1:
        return module
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return SyncBatchNorm(module)
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child, world))
    return module


class SyncBatchNorm(_BatchNorm):
    """A batch norm (1-d or 2-d) with statistics over all ranks, each of which has at least one image.

    torch's own refuses CPU tensors; on CUDA it checks which ranks have images, for which the host waits for the device
    about three times per layer.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(self, name, getattr(norm, name))
        self.training = norm.training

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim not in (2, 4):
            raise ValueError(f"expected (N, C) or (N, C, H, W), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        self.num_batches_tracked += 1
        normalize = _FusedSyncNormalize if input.is_cuda else _SyncNormalize
        return normalize.apply(input, self.weight, self.bias, self)

    @property
    def batch_weight(self) -> float:
        """Weight of the newest batch in the running statistics."""
        if self.momentum is not None:
            return self.momentum
        return 1.0 / float(self.num_batches_tracked)  # cumulative average, for calibration: the host waits


class _SyncNormalize(torch.autograd.Function):
    """Computes weight * (x - mean) / sqrt(variance + eps) + bias; mean and variance are those of all ranks' batches.

    The running statistics move towards the batch's by `batch_weight`; their variance is unbiased, as in torch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: SyncBatchNorm) -> Tensor:
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


class _FusedSyncNormalize(torch.autograd.Function):
    """Computes the same as `_SyncNormalize` with torch's CUDA kernels; the host does not wait for the device.

    The kernels accept x in lower precision than the weights, and two layouts: contiguous and channels_last.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: SyncBatchNorm) -> Tensor:
        x, channels = x.contiguous(memory_format=_layout(x)), x.shape[1]
        mean, scale = torch.batch_norm_stats(x, norm.eps)  # scale: 1 / sqrt(variance + eps)
        mine = torch.cat([mean, scale, mean.new_full((1,), x.numel() // channels)])
        means, scales, counts = gather_stacked(mine).split([channels, channels, 1], dim=1)
        counts = counts.flatten()
        mean, scale = torch.batch_norm_gather_stats_with_counts(
            x, means, scales, norm.running_mean, norm.running_var, norm.batch_weight, norm.eps, counts
        )
        ctx.save_for_backward(x, weight, mean, scale, counts.int())
        return torch.batch_norm_elemt(x, weight, bias, mean, scale, norm.eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, counts = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=_layout(x))
        *sums, weight_gradient, bias_gradient = torch.batch_norm_backward_reduce(
            gradient, x, mean, scale, weight, True, True, True
        )
        total = torch.cat(sums)  # sums of the gradient and of the gradient * (x - mean)
        all_reduce_sum_(total)
        of_gradient, of_product = total.chunk(2)
        input_gradient = torch.batch_norm_backward_elemt(
            gradient, x, mean, scale, weight, of_gradient, of_product, counts
        )
        return input_gradient, weight_gradient, bias_gradient, None


def _layout(x: Tensor) -> torch.memory_format:
    is_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


def _channel_shape(x: Tensor) -> list[int]:
    return [-1 if axis == 1 else 1 for axis in range(x.ndim)]
