"""Batch norm with statistics over all ranks, as arithmetic on the CPU and by torch's kernels on CUDA."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from byolt.model.distributed import World, all_reduce_sum_, gather_stacked


def convert_sync_batchnorm(module: nn.Module, world: World) -> nn.Module:
    """Let every batch norm inside take its statistics over all ranks; parameters and buffers stay."""
    if world.size == 1:
        return module
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return SyncBatchNorm(module)
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child, world))
    return module


class SyncBatchNorm(_BatchNorm):
    """A batch norm (1-d or 2-d) with statistics over all ranks, each of which has at least one image.

    Not torch's own: that one refuses CPU tensors, and on CUDA it looks which ranks have images, for which the host
    waits for the device about three times a norm.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.training = norm.training

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim not in (2, 4):
            raise ValueError(f"expected (N, C) or (N, C, H, W), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        # None, a cumulative average, is for calibration alone: the host waits for the counter, as in torch's own.
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        normalize = _FusedSyncNormalize if input.is_cuda else _SyncNormalize
        running = self.running_mean, self.running_var
        return normalize.apply(input, self.weight, self.bias, *running, momentum, self.eps)


class _SyncNormalize(torch.autograd.Function):
    """weight * (x - mean) / sqrt(variance + eps) + bias, mean and variance over the batches of all ranks.

    Running statistics move by momentum towards those of the batch; their variance is unbiased, as torch's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        axes, shape = _axes(x), _channel_shape(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        size = x.numel() // x.shape[1]
        # Sum and sum of squares are exchanged in float64, where their difference keeps float32's digits.
        variance, mean = (s.double() for s in torch.var_mean(wide, axes, correction=0))
        sums = torch.cat([size * mean, size * (variance + mean * mean), mean.new_tensor([size])])
        all_reduce_sum_(sums)
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        variance = (square - mean * mean).clamp_min(0)
        scale = (variance + eps).rsqrt()
        mean, variance, scale, count = (s.to(wide.dtype) for s in (mean, variance, scale, sums[-1]))
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * count / (count - 1), momentum)
        normalised = (wide - mean.view(shape)) * scale.view(shape)
        ctx.save_for_backward(normalised, weight, scale, count)
        return (normalised * weight.view(shape) + bias.view(shape)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normalised, weight, scale, count = ctx.saved_tensors
        axes, shape = _axes(normalised), _channel_shape(normalised)
        gradient = gradients[0].to(normalised.dtype)
        bias_gradient = gradient.sum(axes)
        weight_gradient = (gradient * normalised).sum(axes)
        means = torch.cat([bias_gradient, weight_gradient])
        all_reduce_sum_(means)
        gradient_mean, product_mean = (m.view(shape) for m in (means / count).chunk(2))
        input_gradient = (gradient - gradient_mean - normalised * product_mean) * (weight * scale).view(shape)
        return input_gradient.to(gradients[0].dtype), weight_gradient, bias_gradient, None, None, None, None


class _FusedSyncNormalize(torch.autograd.Function):
    """What _SyncNormalize computes, by torch's kernels for CUDA; the host waits for nothing.

    They take x of lower precision than weights and statistics, and know two layouts, contiguous and channels_last.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        x, channels = x.contiguous(memory_format=_layout(x)), x.shape[1]
        mean, scale = torch.batch_norm_stats(x, eps)  # scale: 1 / sqrt(variance + eps)
        mine = torch.cat([mean, scale, mean.new_full((1,), x.numel() // channels)])
        means, scales, counts = gather_stacked(mine).split([channels, channels, 1], dim=1)
        counts = counts.flatten()
        mean, scale = torch.batch_norm_gather_stats_with_counts(
            x, means, scales, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, scale, counts.int())
        return torch.batch_norm_elemt(x, weight, bias, mean, scale, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, counts = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=_layout(x))
        *sums, weight_gradient, bias_gradient = torch.batch_norm_backward_reduce(
            gradient, x, mean, scale, weight, True, True, True
        )
        total = torch.cat(sums)  # of the gradient, and of the gradient times (x - mean)
        all_reduce_sum_(total)
        of_gradient, of_product = total.chunk(2)
        input_gradient = torch.batch_norm_backward_elemt(
            gradient, x, mean, scale, weight, of_gradient, of_product, counts
        )
        return input_gradient, weight_gradient, bias_gradient, None, None, None, None


def _layout(x: Tensor) -> torch.memory_format:
    is_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


def _channel_shape(x: Tensor) -> list[int]:
    return [-1 if axis == 1 else 1 for axis in range(x.ndim)]
