"""The two updates of all weights: LARS (arXiv 1708.03888) and the target's moving average.

The back end "foreach", torch's multi-tensor operations, is the definition. "triton" (model/kernels/lars.py) fuses both
updates and the finite gate; "apex" uses the kernels of NVIDIA's amp_C. The host never waits for the device.
"""

import importlib.util
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from byolt.configs.schema import Trust, UpdateBackend

if TYPE_CHECKING:
    from byolt.model.kernels.lars import FusedUpdate
    from byolt.model.kernels.lars_apex import Apex

BACKENDS: tuple[str, ...] = get_args(UpdateBackend)
TRUSTS: tuple[str, ...] = get_args(Trust)


class Foreach:
    """The operations on lists of tensors of which LARS consists, by torch's multi-tensor functions."""

    def copy(self, xs: list[Tensor]) -> list[Tensor]:
        """Returns new tensors."""
        return list(torch._foreach_mul(xs, 1.0))

    def add_(self, xs: list[Tensor], ys: list[Tensor], alpha: float = 1.0) -> None:
        """x += alpha y for every pair."""
        torch._foreach_add_(xs, ys, alpha=alpha)

    def norms(self, xs: list[Tensor]) -> Tensor:
        """Returns the Euclidean norms, (len(xs),)."""
        return torch.stack(torch._foreach_norm(xs))


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled per tensor by its norm, as in the reference, or capped.

        u = g + weight_decay p;   u *= factor
        m = momentum m + u;       p -= lr m

    The factor of trust "scale" is trust_coefficient |p| / |u| (1 if either norm is 0). That of trust "clip" is
    min(trust_coefficient |p| / (|g| + weight_decay |p|) / lr, 1): a small gradient gives a step of plain SGD
    (clip_lr in github.com/vturrisi/solo-learn, solo/utils/lars.py; 1 if |p| or the denominator is 0).

    Parameters with ndim <= 1 (biases, batch norm) use u = g: no decay unless decay_all is set, no factor. `step` reads
    `lr` from param_groups. All parameters with a gradient are float32 tensors on one device.

    Set the attribute `found_inf` (torch.amp's name), a 0-dim float32 tensor on that device, to gate a step: where it
    is not 0, parameters and momentum keep their values even if gradients are NaN. The host does not read it.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, >= 0.
        momentum: 0 .. 1, heavy ball.
        weight_decay: >= 0.
        trust_coefficient: > 0.
        backend: "triton", "foreach", "apex", or "auto" (`resolve_backend`). All give the same numbers up to rounding.
        trust: "scale" or "clip".
        decay_all: the decay also acts on parameters with ndim <= 1.

    Raises:
        ValueError: an argument is out of its range, or the backend is not available.
    """

    found_inf: Tensor | None = None
    backend = "auto"
    _fused: "FusedUpdate | None" = None
    _operations: "Foreach | Apex" = Foreach()

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        backend: str = "auto",
        trust: str = "scale",
        decay_all: bool = False,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr={lr} must be at least 0")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum} must be in 0 .. 1")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay={weight_decay} must be at least 0")
        if not trust_coefficient > 0:
            raise ValueError(f"trust_coefficient={trust_coefficient} must be above 0")
        if backend not in BACKENDS:
            raise ValueError(f"optimizer.backend={backend!r} must be one of {', '.join(BACKENDS)}")
        if trust not in TRUSTS:
            raise ValueError(f"optimizer.trust={trust!r} must be one of {', '.join(TRUSTS)}")
        self.backend = backend
        if backend == "apex":
            from byolt.model.kernels.lars_apex import Apex

            self._operations = Apex()
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "trust": trust,
            "decay_all": decay_all,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)
        self._fused = None

    # torch wraps these methods to keep its compiler out; the first call of a wrapper imports the compiler, 1.2 CPU s.
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Returns:
            The result of `closure`, which recomputes the loss; None without it.
        """
        with torch.enable_grad():
            loss = closure() if closure else None
        if not any(p.grad is not None for group in self.param_groups for p in group["params"]):
            return loss
        if self.backend in ("auto", "triton"):
            self._fused = self._fused or fused_update(self)
        if self._fused:
            self._fused.set_rates()
            self._fused(self._fused.always if self.found_inf is None else self.found_inf == 0)
            return loss
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, self._directions(params, group), group)
        return loss

    def _directions(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Returns u of each parameter in new tensors."""
        u = self._operations.copy([p.grad for p in params if p.grad is not None])
        adapted = [i for i, p in enumerate(params) if p.ndim > 1]
        others = [i for i, p in enumerate(params) if p.ndim <= 1]
        decay, eta, norms = group["weight_decay"], group["trust_coefficient"], self._operations.norms
        if others and group["decay_all"]:
            self._operations.add_([u[i] for i in others], [params[i] for i in others], decay)
        if adapted:
            weights, scaled = [params[i] for i in adapted], [u[i] for i in adapted]
            if group["trust"] == "clip":
                factors = clipped_ratios(norms(weights), norms(scaled), eta, decay, group["lr"])
                self._operations.add_(scaled, weights, decay)
            else:
                self._operations.add_(scaled, weights, decay)
                factors = trust_ratios(norms(weights), norms(scaled), eta)
            torch._foreach_mul_(scaled, list(factors.unbind()))
        return u

    def _update(self, params: list[Tensor], u: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in params]
        if self.found_inf is None:
            torch._foreach_mul_(momenta, group["momentum"])
            self._operations.add_(momenta, u)
            self._operations.add_(params, momenta, -group["lr"])
            return
        # 0 * NaN is NaN, so the gate multiplies the bits of u by 0, then momentum by 1 and lr by 0.
        keep = self.found_inf == 0
        torch._foreach_mul_([x.view(torch.int32) for x in u], keep.to(torch.int32))
        torch._foreach_mul_(momenta, torch.where(keep, group["momentum"], 1.0).to(torch.float32))
        self._operations.add_(momenta, u)
        steps = torch._foreach_mul(momenta, keep.to(torch.float32) * -group["lr"])
        self._operations.add_(params, list(steps))


def trust_ratios(weight_norms: Tensor, update_norms: Tensor, trust_coefficient: float) -> Tensor:
    """Returns trust_coefficient |w| / |u| per pair; 1 where either norm is 0. No epsilon, no clipping."""
    nonzero = (weight_norms > 0) & (update_norms > 0)
    return torch.where(nonzero, trust_coefficient * weight_norms / update_norms, 1.0)


def clipped_ratios(
    weight_norms: Tensor, gradient_norms: Tensor, trust_coefficient: float, weight_decay: float, lr: float
) -> Tensor:
    """Returns min(trust_coefficient |w| / (|g| + weight_decay |w|) / lr, 1) per pair; 1 for a zero |w| or divisor."""
    longest, steps = trust_coefficient * weight_norms, lr * (gradient_norms + weight_decay * weight_norms)
    return torch.where((longest > 0) & (steps > longest), longest / steps, 1.0)


def resolve_backend(backend: str, device: torch.device) -> str:
    """Returns the back end that updates tensors on a device: "triton", "foreach" or "apex".

    "auto" is "triton" on CUDA, if Triton is installed, else "foreach".

    Raises:
        ValueError: the back end cannot run on this device.
    """
    if backend == "auto":
        return "triton" if device.type == "cuda" and importlib.util.find_spec("triton") else "foreach"
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend in ("triton", "apex") and device.type != "cuda" and not interpreted:
        raise ValueError(
            f"optimizer.backend={backend} needs a CUDA device, not {device}; set 'auto' or 'foreach'"
        )
    return backend


def fused_update(
    optimizer: LARS,
    target: Sequence[Tensor] = (),
    online: Sequence[Tensor] = (),
    buffers: Sequence[Tensor] = (),
) -> "FusedUpdate | None":
    """Returns the `FusedUpdate` of these tensors, or None if the optimizer's back end has none for its parameters.

    Raises:
        ValueError: the back end was set to "triton", which cannot update these tensors.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if resolve_backend(optimizer.backend, parameters[0].device) != "triton":
        return None
    from byolt.model.kernels.lars import FusedUpdate, unfit  # imports Triton, which a CPU need not have

    if optimizer.backend == "auto" and unfit([*parameters, *target], buffers):
        return None
    return FusedUpdate(optimizer, target, online, buffers)


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
