"""The two updates of all weights: LARS (arXiv 1708.03888) and the target's moving average.

Both use multi-tensor operations; the host never waits for the device.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled per tensor by |p| / |u|, as in the reference.

        u = g + weight_decay p;   u *= trust_coefficient |p| / |u|   (factor 1 if either norm is 0)
        m = momentum m + u;       p -= lr m

    Parameters with ndim <= 1 (biases, batch norm) use u = g: no decay, no scaling. `step` reads `lr` from
    param_groups. All parameters with a gradient are float32 tensors on one device.

    Set the attribute `found_inf` (torch.amp's name), a 0-dim float32 tensor on that device, to gate a step: where it
    is not 0, parameters and momentum keep their values even if gradients are NaN. The host does not read it.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, >= 0.
        momentum: 0 .. 1, heavy ball.
        weight_decay: >= 0.
        trust_coefficient: > 0.
        backend: "auto" or "foreach"; both are torch's multi-tensor operations.

    Raises:
        ValueError: an argument is out of its range, or the backend is not available.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        backend: str = "auto",
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr={lr} must be at least 0")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum} must be in 0 .. 1")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay={weight_decay} must be at least 0")
        if not trust_coefficient > 0:
            raise ValueError(f"trust_coefficient={trust_coefficient} must be above 0")
        if backend == "apex":
            raise ValueError(
                "optimizer.backend is 'apex': this version has no path through apex's amp_C, which is built "
                "only from NVIDIA's source repository (`pip install apex` is an unrelated package); "
                "set 'auto' or 'foreach'"
            )
        if backend not in ("auto", "foreach"):
            raise ValueError(f"optimizer.backend is {backend!r}; set 'auto' or 'foreach'")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Returns:
            The result of `closure`, which recomputes the loss; None without it.
        """
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, self._directions(params, group), group)
        return loss

    def _directions(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Returns u of each parameter in new tensors."""
        gradients = [p.grad for p in params if p.grad is not None]
        u = list(torch._foreach_mul(gradients, 1.0))  # a copy: the gradients stay unchanged
        adapted = [i for i, p in enumerate(params) if p.ndim > 1]
        if adapted:
            weights, scaled = [params[i] for i in adapted], [u[i] for i in adapted]
            torch._foreach_add_(scaled, weights, alpha=group["weight_decay"])
            torch._foreach_mul_(scaled, trust_ratios(weights, scaled, group["trust_coefficient"]))
        return u

    def _update(self, params: list[Tensor], u: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in params]
        if self.found_inf is None:
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, u)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])
            return
        # 0 * NaN is NaN, so the gate multiplies the bits of u by 0, then momentum by 1 and lr by 0.
        keep = self.found_inf == 0
        torch._foreach_mul_([x.view(torch.int32) for x in u], keep.to(torch.int32))
        torch._foreach_mul_(momenta, torch.where(keep, group["momentum"], 1.0).to(torch.float32))
        torch._foreach_add_(momenta, u)
        torch._foreach_add_(params, torch._foreach_mul(momenta, keep.to(torch.float32) * -group["lr"]))


def trust_ratios(weights: list[Tensor], updates: list[Tensor], trust_coefficient: float) -> list[Tensor]:
    """Returns trust_coefficient |w| / |u| per pair, 0-dim; 1 where either norm is 0. No epsilon, no clipping."""
    weight_norms = torch.stack(torch._foreach_norm(weights))
    update_norms = torch.stack(torch._foreach_norm(updates))
    nonzero = (weight_norms > 0) & (update_norms > 0)
    return list(torch.where(nonzero, trust_coefficient * weight_norms / update_norms, 1.0).unbind())


@torch.no_grad()
def ema_update_(target: list[Tensor], online: list[Tensor], tau: float, finite: Tensor | None = None) -> None:
    """Moves the target in place: t <- tau t + (1 - tau) p for every pair (paper, eq. 1).

    Args:
        target: floating-point tensors; float32 if `finite` is given.
        online: tensors of the same shapes, in the same order.
        tau: 0 .. 1; 1 leaves the target unchanged, 0 copies the online network.
        finite: 0-dim bool on their device, not read by the host; where False the target keeps its bits.

    Raises:
        ValueError: the lists differ in length, or tau is out of its range.
    """
    if len(target) != len(online):
        raise ValueError(f"target has {len(target)} tensors and online {len(online)}; they must be paired")
    if not 0 <= tau <= 1:
        raise ValueError(f"tau={tau} must be in 0 .. 1")
    if finite is None:
        torch._foreach_lerp_(target, online, 1 - tau)
        return
    # A multi-tensor lerp takes its weight from the host (it would wait for a 0-dim tensor), so the gate selects old or
    # new by their bits, as in LARS: exact for every value, NaN included.
    moved = [t.view(torch.int32) for t in torch._foreach_lerp(target, online, 1 - tau)]
    kept = [t.view(torch.int32) for t in target]
    torch._foreach_mul_(moved, finite.to(torch.int32))
    torch._foreach_mul_(kept, (~finite).to(torch.int32))
    torch._foreach_add_(kept, moved)
