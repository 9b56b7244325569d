"""TrainStep against the reference implementation's three steps, and its own rules."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from byolt.model.byol import BYOL, byol_loss
from byolt.model.distributed import World
from byolt.model.optim import LARS
from byolt.model.resnet import make_encoder
from byolt.model.step import TrainStep, collapse_gauges

ALONE = World(0, 0, 1, torch.device("cpu"), "none")
# Of the reference's names and the MLP's.
LAYERS = {"linear/w": "0.weight", "linear/b": "0.bias", "linear_1/w": "3.weight"}
LAYERS |= {"batch_norm/scale": "1.weight", "batch_norm/offset": "1.bias"}


class _Linear(nn.Linear):
    num_features = 16


def _reference_parameters(data: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """The arrays under a prefix, with our names: weights transposed to (out, in), batch norm flattened."""
    found = {}
    for key, value in data.items():
        head, _, rest = key.partition("/")
        if head == prefix:
            part, _, layer = rest.partition("/")
            name = "encoder.weight" if part == "encoder" else f"{part}.{LAYERS[layer]}"
            tensor = torch.from_numpy(value)
            found[name] = tensor.T if rest.endswith("/w") else tensor.flatten()
    return found


def _load(module: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(values[name])


def _relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest norm of a difference relative to the norm of the tensor, or to a thousandth of the largest one.

    (The gradient of a bias before a batch norm is rounding noise around 0.)
    """
    floor = 1e-3 * max(value.double().norm().item() for value in expected.values())
    return max(
        (found[name].detach().double() - value.double()).norm().item()
        / max(value.double().norm().item(), floor)
        for name, value in expected.items()
    )


@pytest.mark.parametrize("backend", ["foreach", "triton"])
def test_three_steps_of_the_reference(backend: str, fixtures: Path) -> None:
    if backend == "triton" and (torch.cuda.is_available() or find_spec("triton") is None):
        pytest.skip("needs Triton's interpreter")
    data = dict(np.load(fixtures / "byol_step.npz"))
    model = BYOL(_Linear(12, 16, bias=False), projector_hidden=32, projector_size=8, predictor_hidden=32)
    _load(model.online, _reference_parameters(data, "p0"))
    _load(model.target, _reference_parameters(data, "t0"))
    optimizer = LARS(
        model.online.parameters(), lr=0.0, weight_decay=1e-3, trust_coefficient=1e-2, backend=backend
    )
    step = TrainStep(model, optimizer, ALONE, "fp32")
    errors = []
    for k in range(3):
        views = tuple(torch.from_numpy(data[f"v{view}_{k}"]) for view in (1, 2))
        result = step([(views[0], views[1])], lr=float(data[f"lr{k}"]), tau=float(data[f"tau{k}"]))
        gradients = {name: p.grad for name, p in model.online.named_parameters() if p.grad is not None}
        reference = _reference_parameters(data, f"g{k}")
        assert gradients.keys() == reference.keys()
        errors.append(abs(result.loss.item() / float(data[f"loss{k}"]) - 1))
        # Exactly 0 but for rounding, in both: a batch norm follows.
        noise = [gradients.pop(f"{part}.0.bias").norm().item() for part in ("projector", "predictor")]
        assert max(noise) < 1e-6
        errors.append(
            max(_relative_error({name: g}, {name: reference[name]}) for name, g in gradients.items())
        )
        assert bool(result.finite)
    online, target = dict(model.online.named_parameters()), dict(model.target.named_parameters())
    expected_target = _reference_parameters(data, "t3")
    for network, expected in ((online, _reference_parameters(data, "p3")), (target, expected_target)):
        errors.append(max(_relative_error({name: p}, {name: expected[name]}) for name, p in network.items()))
    assert len(errors) == 8
    assert max(errors) <= 1e-6


def _setup(precision: str = "fp32", accumulation: int = 1, **settings: bool) -> tuple[BYOL, LARS, TrainStep]:
    torch.manual_seed(0)
    model = BYOL(
        make_encoder("resnet8", "cifar"), projector_hidden=32, projector_size=16, predictor_hidden=32
    )
    optimizer = LARS(model.online.parameters(), lr=0.0, weight_decay=1e-3, trust_coefficient=0.02)
    return model, optimizer, TrainStep(model, optimizer, ALONE, precision, accumulation, **settings)


def _views(seed: int, n: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 16, 16, generator=generator)
    return tuple(images + 0.3 * torch.randn(images.shape, generator=generator) for _ in range(2))  # type: ignore


def _values(model: BYOL) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_loss_is_about_four_at_the_start() -> None:
    torch.manual_seed(0)
    model = BYOL(
        make_encoder("resnet8", "cifar"), projector_hidden=64, projector_size=256, predictor_hidden=64
    )
    step = TrainStep(model, LARS(model.online.parameters(), lr=0.0), ALONE, "fp32")
    assert step([_views(1)], lr=0.0, tau=1.0).loss.item() == pytest.approx(4.0, abs=0.3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_learns_in_every_precision(precision: str) -> None:
    model, _, step = _setup(precision)
    losses = [step([_views(1, n=8)], lr=1.0, tau=0.99).loss.item() for _ in range(10)]
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in model.parameters())


def test_precisions_agree_on_the_first_loss_and_gradient_norm() -> None:
    results = [_setup(precision)[2]([_views(1)], lr=0.1, tau=0.99) for precision in ("fp32", "bf16", "fp16")]
    for result, tolerance in zip(results[1:], (0.1, 0.02), strict=True):
        assert result.loss.dtype == torch.float32
        assert result.loss.item() == pytest.approx(results[0].loss.item(), rel=tolerance / 5)
        assert result.gradient_norm.item() == pytest.approx(results[0].gradient_norm.item(), rel=tolerance)
    assert len({result.loss.item() for result in results}) == 3  # autocast was on


def test_channels_last_changes_the_layout_only() -> None:
    results = []
    for channels_last in (True, False):
        model, _, step = _setup(channels_last=channels_last)
        networks: Any = model
        for encoder in (networks.online.encoder, networks.target.encoder):
            weight = encoder.layer2[0].conv1.weight
            assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
            assert weight.is_contiguous() != channels_last
        results.append([step([_views(k)], lr=0.1, tau=0.9).loss.item() for k in range(2)])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_ema_follows_the_updated_online_network() -> None:
    model, _, step = _setup()
    before = [t.clone() for t in model.ema_parameters()[0]]
    step([_views(1)], lr=0.5, tau=0.75)
    for old, t, p in zip(before, *model.ema_parameters(), strict=True):
        torch.testing.assert_close(t, 0.75 * old + 0.25 * p.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(before[0], model.ema_parameters()[0][0])


def test_accumulation_averages_gradients_and_moves_the_target_once() -> None:
    model, _, step = _setup(accumulation=2)
    start = [t.clone() for t in model.ema_parameters()[0]]
    micro_batches = [_views(1), _views(2)]
    expected = []
    for views in micro_batches:
        alone, _, _ = _setup()
        loss = byol_loss(alone.online(*views), *alone.target(*views))
        loss.backward()
        expected.append((loss.item(), [p.grad for p in alone.online.parameters() if p.grad is not None]))
    result = step(micro_batches, lr=0.3, tau=0.5)
    assert result.loss.item() == pytest.approx((expected[0][0] + expected[1][0]) / 2, rel=1e-5)
    found = {str(i): p.grad for i, p in enumerate(model.online.parameters()) if p.grad is not None}
    mean = {str(i): (a + b) / 2 for i, (a, b) in enumerate(zip(expected[0][1], expected[1][1], strict=True))}
    assert found.keys() == mean.keys()
    assert _relative_error(found, mean) < 1e-4
    for old, t, p in zip(start, *model.ema_parameters(), strict=True):
        torch.testing.assert_close(t, (old + p.detach()) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gradient_that_is_not_finite_changes_nothing(precision: str) -> None:
    model, optimizer, step = _setup(precision)
    assert bool(step([_views(1)], lr=0.2, tau=1.0).finite)

    def values() -> list[Tensor]:
        momenta = [optimizer.state[p]["momentum"] for p in model.online.parameters()]
        return [t.clone() for t in (*model.state_dict().values(), *momenta)]

    before = values()
    view1, view2 = _views(2)
    view1[3, 0, 0, 0] = float("nan")
    result = step([(view1, view2)], lr=0.2, tau=0.5)
    assert not bool(result.finite)
    assert not bool(result.gradient_norm.isfinite())
    assert all(torch.equal(a, b) for a, b in zip(before, values(), strict=True))
    assert bool(step([_views(3)], lr=0.2, tau=0.9).finite)
    assert not any(torch.equal(a, b) for a, b in zip(before[:3], values(), strict=False))


def test_fp16_overflow_halves_the_scale_and_its_state_round_trips() -> None:
    model, _, step = _setup("fp16")
    state = {**step.state_dict()["scaler"], "scale": 2.0**40}
    step.load_state_dict({"scaler": state})
    before = _values(model)
    assert not bool(step([_views(1)], lr=0.2, tau=0.9).finite)
    assert step.state_dict()["scaler"]["scale"] == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert _setup("bf16")[2].state_dict() == {"scaler": {}}


def test_gauges_are_measured_on_demand() -> None:
    _, _, step = _setup()
    assert step([_views(1)], lr=0.1, tau=0.9).gauges is None
    gauges = step([_views(1)], lr=0.1, tau=0.9, gauges=True).gauges
    assert gauges is not None
    assert all(0 < value.item() < 1 for value in gauges)


def test_collapse_gauges_of_known_batches() -> None:
    std, cosine = collapse_gauges(torch.tensor([[3.0, 4.0]]) * torch.arange(1, 5)[:, None])
    assert (std.item(), cosine.item()) == pytest.approx((0.0, 1.0), abs=1e-6)
    std, cosine = collapse_gauges(torch.eye(4))
    assert (std.item(), cosine.item()) == pytest.approx((0.5, 0.0), abs=1e-6)
    std, cosine = collapse_gauges(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))
    assert (std.item(), cosine.item()) == pytest.approx((2**0.5 / 2, 1.0), abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    std, cosine = collapse_gauges(torch.randn(400, 256, generator=generator))
    assert std.item() == pytest.approx(1 / 16, rel=0.02)
    assert cosine.item() == pytest.approx((2 / (torch.pi * 256)) ** 0.5, rel=0.02)


def test_it_refuses_wrong_settings() -> None:
    with pytest.raises(ValueError, match=r"train.precision=fp8 is unknown"):
        _setup("fp8")
    with pytest.raises(ValueError, match=r"train.accumulation=0 must be at least 1"):
        _setup(accumulation=0)
    with pytest.raises(ValueError, match=r"got 1 micro-batches, train.accumulation=2"):
        _setup(accumulation=2)[2]([_views(1)], lr=0.1, tau=0.9)


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    losses = [
        [step([_views(k)], lr=0.2, tau=0.9).loss.item() for k in range(3)]
        for step in (_setup(compile=flag)[2] for flag in (False, True))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
