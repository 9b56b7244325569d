"""Memory layouts of paired tensors, for kernels that read memory from first to last element and ignore strides."""

import torch
from torch import Tensor


def like(x: Tensor, p: Tensor) -> Tensor:
    """Returns x if its elements have p's type and order in memory, else a copy that has."""
    same = x.dtype == p.dtype and (x.stride() == p.stride() or _order(x) == _order(p))
    return x if same else torch.empty_like(p).copy_(x)


def _order(x: Tensor) -> list[int]:
    """Strides of the dimensions that have any."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order."""
    # torch keeps the strides of dense tensors only
    return torch.empty_like(x, device="meta").stride() == x.stride()
