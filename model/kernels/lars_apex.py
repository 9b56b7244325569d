"""LARS's operations by NVIDIA's amp_C, the CUDA kernels of apex.

The signatures are those of csrc/amp_C_frontend.cpp and apex/multi_tensor_apply in github.com/NVIDIA/apex. The tests
on a CPU use a stand-in with these signatures; the real module has not yet run here.
"""

import torch
from torch import Tensor

from byolt.model.kernels.layout import like

_REMEDY = (
    "optimizer.backend=apex needs NVIDIA's amp_C, which cannot be imported ({error}). Build it from source: `git clone "
    "https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v "
    "--no-build-isolation .` (`pip install apex` is an unrelated package), or set optimizer.backend=auto"
)


class Apex:
    """The operations of `byolt.model.optim.Foreach` by amp_C's kernels.

    The kernels ignore strides, so a tensor of another memory layout than its partner's is copied first. They set a flag
    if a number is not finite and write it all the same; LARS has its own gate and does not read the flag.

    Raises:
        ValueError: amp_C or apex cannot be imported.
    """

    def __init__(self) -> None:
        try:
            import amp_C
            from apex.multi_tensor_apply import multi_tensor_applier
        except ImportError as error:
            raise ValueError(_REMEDY.format(error=error)) from None
        self._kernels, self._apply = amp_C, multi_tensor_applier

    def copy(self, xs: list[Tensor]) -> list[Tensor]:
        """Returns new tensors."""
        out = [torch.empty_like(x) for x in xs]
        self._apply(self._kernels.multi_tensor_scale, _flag(xs), [[*map(like, xs, out)], out], 1.0)
        return out

    def add_(self, xs: list[Tensor], ys: list[Tensor], alpha: float = 1.0) -> None:
        """x += alpha y for every pair."""
        lists, both = [xs, [*map(like, ys, xs)], xs], -1  # the arguments that it checks
        self._apply(self._kernels.multi_tensor_axpby, _flag(xs), lists, 1.0, alpha, both)

    def norms(self, xs: list[Tensor]) -> Tensor:
        """Returns the Euclidean norms, (len(xs),)."""
        return self._apply(self._kernels.multi_tensor_l2norm, _flag(xs), [xs], True)[1]  # True: per tensor


def _flag(xs: list[Tensor]) -> Tensor:
    """The kernels' flag, int32 on the device, which they set if a number is not finite."""
    return torch.zeros(1, dtype=torch.int32, device=xs[0].device)
