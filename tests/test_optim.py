"""LARS and EMA against formulas written out in float64, parameter by parameter."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from byolt.model.optim import LARS, ema_update_

SHAPES = [(8, 3, 3, 3), (16, 8), (16,), (5, 4), (1,), ()]


# Triton's interpreter works on the CPU; tests/test_lars_kernels.py tests the kernels on a GPU too.
INTERPRETED = not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
both_back_ends = pytest.mark.parametrize(
    "backend",
    ["foreach", pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="no interpreter"))],
)


def _parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def _set_gradients(parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def _reference(
    p: Tensor, g: Any, m: Tensor, lr: float, decay: float, eta: float, trust: str, decay_all: bool
) -> tuple[Tensor, Tensor]:
    """One step of one parameter in float64, straight from the class's docstring."""
    p, g, m = p.double(), g.double(), m.double()
    u = g + decay * p if p.ndim > 1 or decay_all else g
    if p.ndim > 1 and trust == "scale" and p.norm() > 0 and u.norm() > 0:
        u = u * (eta * p.norm() / u.norm())
    elif p.ndim > 1 and trust == "clip" and lr > 0:
        u = u * min(eta * p.norm() / (g.norm() + decay * p.norm()) / lr, 1)
    m = 0.9 * m + u
    return p - lr * m, m


@both_back_ends
@pytest.mark.parametrize(("trust", "decay_all"), [("scale", False), ("clip", False), ("clip", True)])
def test_five_steps_equal_the_formula(trust: str, decay_all: bool, backend: str) -> None:
    """The learning rate rises from 0, so that the caps of `clip` bind in later steps only."""
    parameters = _parameters()
    options = {"trust": trust, "decay_all": decay_all, "backend": backend}
    optimizer = LARS(parameters, lr=0.0, weight_decay=0.05, trust_coefficient=0.02, **options)
    expected = [(p.detach().double(), torch.zeros_like(p).double()) for p in parameters]
    for step, lr in enumerate((0.0, 0.01, 0.03, 0.1, 0.2)):
        _set_gradients(parameters, seed=step)
        optimizer.param_groups[0]["lr"] = lr
        expected = [
            _reference(p, q.grad, m, lr, 0.05, 0.02, trust, decay_all)
            for (p, m), q in zip(expected, parameters, strict=True)
        ]
        optimizer.step()
    for p, (value, momentum) in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.double(), value, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(optimizer.state[p]["momentum"].double(), momentum, rtol=2e-6, atol=1e-7)


@both_back_ends
def test_hand_computed_step(backend: str) -> None:
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))  # norm 5
    bias = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    weight.grad, bias.grad = torch.tensor([[0.0, 2.0]]), torch.tensor([0.0, 2.0])
    LARS([weight, bias], lr=1.0, trust_coefficient=0.1, backend=backend).step()
    assert weight.tolist() == [[3.0, pytest.approx(3.5, rel=1e-7)]]  # 4 - 0.1 * 5/2 * 2
    assert bias.tolist() == [3.0, 2.0]


@both_back_ends
@pytest.mark.parametrize(
    ("lr", "moved"),
    [
        (1.0, (3 - 0.6 * 0.5 / 6, 4 - 5.8 * 0.5 / 6)),  # capped: the factor is 0.1 * 5 / (5 + 0.2 * 5)
        (0.05, (3 - 0.05 * 0.6, 4 - 0.05 * 5.8)),  # plain SGD: that factor / 0.05 is above 1
    ],
)
def test_clip_caps_large_steps_only(lr: float, moved: tuple[float, float], backend: str) -> None:
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))  # norm 5
    weight.grad = torch.tensor([[0.0, 5.0]])
    LARS([weight], lr, weight_decay=0.2, trust_coefficient=0.1, trust="clip", backend=backend).step()
    assert weight.tolist() == [pytest.approx(moved, rel=1e-7)]


@both_back_ends
def test_decay_all_reaches_biases(backend: str) -> None:
    bias = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    bias.grad = torch.zeros(2)
    LARS([bias], lr=0.5, weight_decay=0.2, decay_all=True, backend=backend).step()
    assert bias.tolist() == pytest.approx([2.7, 3.6])


@both_back_ends
@pytest.mark.parametrize(("weight", "gradient"), [([[0.0, 0.0]], [[1.0, 2.0]]), ([[1.0, 2.0]], [[0.0, 0.0]])])
@pytest.mark.parametrize("trust", ["scale", "clip"])
def test_factor_is_one_where_a_norm_is_zero(
    weight: list[list[float]], gradient: list[list[float]], trust: str, backend: str
) -> None:
    p = torch.nn.Parameter(torch.tensor(weight))
    p.grad = torch.tensor(gradient)
    LARS([p], lr=0.5, trust=trust, backend=backend).step()
    torch.testing.assert_close(
        p.detach(), torch.tensor(weight) - 0.5 * torch.tensor(gradient), rtol=0, atol=0
    )


@both_back_ends
def test_tiny_and_huge_gradients_take_the_same_step(backend: str) -> None:
    moved = []
    for scale in (1e-12, 1e12):
        p = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        p.grad = torch.tensor([[0.6, 0.8]]) * scale
        LARS([p], lr=1.0, trust_coefficient=1e-3, backend=backend).step()
        moved.append(p.detach() - torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(moved[0], torch.tensor([[-0.003, -0.004]]), rtol=1e-4, atol=0)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-4, atol=0)


@both_back_ends
def test_parameters_without_a_gradient_stay_and_groups_keep_their_own_settings(backend: str) -> None:
    first, second, idle = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    groups: list[dict[str, Any]] = [{"params": [first, idle]}, {"params": [second], "lr": 0.5}]
    optimizer = LARS(groups, lr=0.1, backend=backend)
    first.grad = second.grad = torch.ones(2)
    optimizer.step()
    assert first.tolist() == pytest.approx([0.9, 0.9])
    assert second.tolist() == [0.5, 0.5]
    assert idle.tolist() == [1.0, 1.0]
    assert idle not in optimizer.state


@both_back_ends
@pytest.mark.parametrize("how", ["channels_last", "transposed", "strided"])
def test_layout_does_not_change_the_result(how: str, backend: str) -> None:
    if (how, backend) == ("strided", "triton"):
        pytest.skip("tensors with gaps are refused (tests/test_lars_kernels.py)")

    def laid_out(x: Tensor) -> Tensor:
        if how == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if how == "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        return torch.stack([x, x], dim=-1)[..., 0]

    results = []
    for layout in (torch.clone, laid_out):
        generator = torch.Generator().manual_seed(1)
        p = torch.nn.Parameter(layout(torch.randn(6, 4, 3, 3, generator=generator)))
        optimizer = LARS([p], lr=0.7, weight_decay=0.1, trust_coefficient=0.1, backend=backend)
        for found in (None, 0.0):
            p.grad = torch.randn(p.shape, generator=generator)  # the gradient stays contiguous: layouts mix
            if found is not None:
                optimizer.found_inf = torch.tensor(found)
            optimizer.step()
        results.append(p.detach().contiguous())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


@both_back_ends
def test_state_dict_round_trip_continues_bit_for_bit(backend: str) -> None:
    straight, resumed = _parameters(), _parameters()
    optimizers = [LARS(p, lr=0.2, weight_decay=0.01, backend=backend) for p in (straight, resumed)]
    for p, optimizer in zip((straight, resumed), optimizers, strict=True):
        _set_gradients(p, seed=1)
        optimizer.step()
    fresh = LARS(resumed, lr=99.0, backend=backend)
    fresh.load_state_dict(optimizers[1].state_dict())
    for p, optimizer in zip((straight, resumed), (optimizers[0], fresh), strict=True):
        _set_gradients(p, seed=2)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def _bits(optimizer: LARS, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    tensors = [*parameters, *(optimizer.state[p]["momentum"] for p in parameters)]
    return [t.detach().clone().view(torch.int32) for t in tensors]


@both_back_ends
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_found_inf_leaves_every_bit(bad: float, backend: str) -> None:
    parameters = _parameters()
    optimizer = LARS(parameters, lr=0.3, weight_decay=0.1, backend=backend)
    _set_gradients(parameters, seed=1)
    optimizer.step()
    before = _bits(optimizer, parameters)
    for p in parameters:
        p.grad = torch.full_like(p, bad)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, _bits(optimizer, parameters), strict=True))
    assert all(p.grad is not None and not p.grad.isfinite().any() for p in parameters)


@both_back_ends
def test_found_inf_on_the_first_step_leaves_parameters_and_zero_momentum(backend: str) -> None:
    parameters = _parameters()
    before = [p.detach().clone() for p in parameters]
    optimizer = LARS(parameters, lr=0.3, backend=backend)
    for p in parameters:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert all(optimizer.state[p]["momentum"].count_nonzero() == 0 for p in parameters)


def test_an_open_gate_changes_nothing() -> None:
    plain, gated = _parameters(), _parameters()
    for parameters, found_inf in ((plain, None), (gated, torch.tensor(0.0))):
        optimizer = LARS(parameters, lr=0.3, weight_decay=0.1)
        optimizer.found_inf = found_inf
        for step in range(2):
            _set_gradients(parameters, seed=step)
            optimizer.step()
    for a, b in zip(plain, gated, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-7, atol=1e-7)


def test_grad_scaler_drives_the_optimizer() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = LARS([p], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    for factor, expected in ((1.0, [0.5, 1.5]), (float("inf"), [0.5, 1.5])):
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert p.tolist() == expected
    assert scaler.get_scale() == 4.0


def test_ema_formula_and_its_ends() -> None:
    target, online = ([t.detach() for t in _parameters(seed)] for seed in (0, 1))
    for tau in (0.0, 0.3, 0.996, 1.0):
        moved = [t.clone() for t in target]
        assert ema_update_(moved, online, tau) is None
        for new, old, p in zip(moved, target, online, strict=True):
            expected = tau * old.double() + (1 - tau) * p.double()
            torch.testing.assert_close(new.double(), expected, rtol=1e-6, atol=1e-7)
            assert tau not in (0.0, 1.0) or torch.equal(new, p if tau == 0 else old)


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.996, 1.0])
def test_ema_with_its_gate_is_the_same_to_the_bit_or_nothing(tau: float) -> None:
    """Signs of zero, NaN and the memory format included."""
    generator = torch.Generator().manual_seed(0)
    target, online = (
        [
            torch.randn(1000, generator=generator),
            torch.randn(4, 3, 5, 5, generator=generator).contiguous(memory_format=torch.channels_last),
            torch.tensor([-0.0, 0.0, odd, 1e-40, 3.0]),
        ]
        for odd in (2.0, float("nan"))
    )
    plain, gated, kept = ([t.clone() for t in target] for _ in range(3))
    ema_update_(plain, online, tau)
    ema_update_(gated, online, tau, torch.tensor(True))
    ema_update_(kept, online, tau, torch.tensor(False))
    for ours, theirs in ((gated, plain), (kept, target)):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.view(torch.int32), b.view(torch.int32)) and a.stride() == b.stride()


def test_ema_works_on_parameters_that_require_gradients() -> None:
    target, online = _parameters(0), _parameters(1)
    ema_update_(list(target), list(online), 0.5)
    assert all(p.requires_grad and p.grad_fn is None for p in target)


@pytest.mark.parametrize("tau", [-0.1, 1.1, float("nan")])
def test_ema_refuses_tau(tau: float) -> None:
    with pytest.raises(ValueError, match="tau="):
        ema_update_([torch.zeros(1)], [torch.zeros(1)], tau)


def test_ema_refuses_unpaired_lists() -> None:
    with pytest.raises(ValueError, match="1 tensors and online 2"):
        ema_update_([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)], 0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1.0}, "lr=-1"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"momentum": 1.5}, "momentum=1.5"),
        ({"weight_decay": -1e-6}, "weight_decay=-1e-06"),
        ({"trust_coefficient": 0.0}, "trust_coefficient=0"),
        ({"backend": "apex"}, "optimizer.backend=apex needs.*unrelated package.*set optimizer.backend=auto"),
        ({"trust": "cap"}, "optimizer.trust='cap' must be one of scale, clip"),
        ({"backend": "fused"}, "optimizer.backend='fused' must be one of auto, triton"),
    ],
)
def test_lars_refuses(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LARS(_parameters(), **{"lr": 0.1, **wrong})


@pytest.mark.slow
def test_equilibrium_of_a_scale_invariant_weight_is_that_of_the_docs() -> None:
    """Plain SGD (a cap that never binds) on gradients at a right angle to p, inversely proportional to its length."""
    generator, lr, decay = torch.Generator().manual_seed(0), 0.1, 0.005
    p = torch.nn.Parameter(torch.randn(1, 2000, generator=generator))
    optimizer = LARS([p], lr, momentum=0.9, weight_decay=decay, trust_coefficient=10.0, trust="clip")
    moved, turned = [], []
    for _ in range(800):
        before = p.detach().clone()
        noise = torch.randn(1, 2000, generator=generator)
        p.grad = noise - (noise * before).sum() / before.square().sum() * before
        p.grad *= 5 / (p.grad.norm() * before.norm())
        optimizer.step()
        moved.append(lr * p.grad.norm() / before.norm())
        turned.append((p.detach() - before).norm() / before.norm())
    rate, seen = torch.stack(moved[-300:]).mean().item(), torch.stack(turned[-300:]).mean().item()
    assert rate == pytest.approx((2 * lr * decay * (1 - 0.9)) ** 0.5, rel=0.03)
    assert seen == pytest.approx((2 * lr * decay / (1 + 0.9)) ** 0.5, rel=0.03)
