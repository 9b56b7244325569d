"""Linear heads, L-BFGS and the online probe on features whose answer is known."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from whole_runs import on_two_ranks

from byolt.configs import schema
from byolt.model import distributed
from byolt.model.distributed import World
from byolt.model.optim import LARS
from byolt.model.quality.linear import HeadSweep, fit_logistic, l2_values, make_head
from byolt.model.quality.probe import OnlineProbe, make_probe
from byolt.tools.benchmarks import probe as probe_benchmark

CONFIGS = Path(__file__).parent.parent / "configs"
CPU = torch.device("cpu")
ALONE = World(0, 0, 1, CPU, "none")


def _blobs(count: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Five classes of points about corners of a cube in 8 dimensions, away from the origin."""
    generator = torch.Generator().manual_seed(seed)
    centers = 3 + 2 * torch.eye(5, 8)
    labels = torch.arange(count) % 5
    return centers[labels] + spread * torch.randn(count, 8, generator=generator), labels


def test_every_head_of_the_sweep_separates_separable_blobs() -> None:
    features, labels = _blobs(1000, spread=0.1)
    sweep = HeadSweep(8, 5, [0.4, 0.3, 0.2, 0.1, 0.05], batch_size=100, total_steps=1000, device=CPU)
    for step in range(1000):
        rows = slice(step % 10 * 100, step % 10 * 100 + 100)
        sweep.step(features[rows], labels[rows])
    test, truth = _blobs(500, spread=0.1, seed=1)
    assert [(s.argmax(dim=1) == truth).float().mean().item() for s in sweep.scores(test)] == [1.0] * 5


def test_a_head_of_the_sweep_is_trained_as_if_alone() -> None:
    """Nesterov: v <- mu v + g, w <- w - lr (g + mu v); cosine from lr x batch / 256."""
    features, labels = _blobs(64, spread=1.0)
    sweep = HeadSweep(8, 5, [0.4, 0.05], batch_size=64, total_steps=4, device=CPU, seed=7)
    head = make_head(8, 5, seed=7)
    weight, velocity = head.weight.detach().clone(), torch.zeros(5, 8)
    bias, bias_velocity = head.bias.detach().clone(), torch.zeros(5)
    for step in range(3):
        sweep.step(features, labels)
        error = ((features @ weight.T + bias).softmax(dim=1) - torch.eye(5)[labels]) / 64
        lr = 0.05 * 64 / 256 * (1 + math.cos(math.pi * step / 4)) / 2
        gradient, bias_gradient = error.T @ features, error.sum(dim=0)
        velocity, bias_velocity = 0.9 * velocity + gradient, 0.9 * bias_velocity + bias_gradient
        weight -= lr * (gradient + 0.9 * velocity)
        bias -= lr * (bias_gradient + 0.9 * bias_velocity)
    torch.testing.assert_close(sweep.heads[1].weight.detach(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sweep.heads[1].bias.detach(), bias, rtol=1e-5, atol=1e-6)


def test_making_a_head_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = make_head(64, 10, seed=1), make_head(64, 10, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.weight, second.weight)
    # of a normal cut at two sigma, 1 / sqrt(64)
    assert first.weight.std().item() == pytest.approx(0.88 / 8, rel=0.1)


@pytest.mark.parametrize("w", [0.1, 0.5, 2.0])
def test_logistic_of_two_points_has_a_closed_form(w: float) -> None:
    """x = -1, 1 of class 0, 1: weights -w and w, where 2 = l2 w (1 + exp(2 w)); a shift goes to the bias."""
    l2 = 2 / (w * (1 + math.exp(2 * w)))
    fit = fit_logistic(torch.tensor([[9.0], [11.0]]), torch.tensor([0, 1]), 2, l2, tolerance=1e-10)
    assert fit.weight.flatten().tolist() == pytest.approx([-w, w], rel=1e-6)
    assert fit.bias.tolist() == pytest.approx([10 * w, -10 * w], rel=1e-6)
    assert fit.gradient <= 1e-10


@pytest.mark.parametrize(
    "l2", [pytest.param(1e-2, marks=pytest.mark.slow), pytest.param(1.0, marks=pytest.mark.slow), 100.0]
)
def test_logistic_equals_scikit_learn(l2: float) -> None:
    """Weights to 1e-4 of the largest, probabilities to 1e-5."""
    sklearn = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    features, labels = _blobs(600, spread=2.0)
    features *= torch.tensor([1.0, 1, 1, 1, 1, 5, 0.2, 1])
    fit = fit_logistic(features, labels, 5, l2, tolerance=1e-8)
    other = sklearn.LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000)
    other.fit(features.double().numpy(), labels.numpy())
    expected = torch.from_numpy(other.coef_)
    torch.testing.assert_close(fit.weight, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    probabilities = torch.from_numpy(other.predict_proba(features.double().numpy()))
    torch.testing.assert_close(fit.scores(features).softmax(dim=1), probabilities, rtol=0, atol=1e-5)


def test_logistic_leaves_no_gradient() -> None:
    """l2 W = sum of (truth - probability) x features at the optimum, and the residuals of a class sum to 0."""
    features, labels = _blobs(300, spread=2.0)
    fit = fit_logistic(features, labels, 5, l2=3.0, tolerance=1e-9)
    residual = torch.eye(5, dtype=torch.float64)[labels] - fit.scores(features).softmax(dim=1)
    torch.testing.assert_close(3 * fit.weight, residual.T @ features.double(), rtol=0, atol=1e-5)
    assert residual.sum(dim=0).abs().max() < 1e-5
    with pytest.raises(ValueError, match="l2=0 must be above 0"):
        fit_logistic(features, labels, 5, l2=0)
    with pytest.raises(ValueError, match="300 features, 299 labels"):
        fit_logistic(features, labels[1:], 5, l2=1)


def test_l2_values() -> None:
    values = l2_values()
    assert len(values) == 45
    assert values[0] == pytest.approx(1e-6) and values[-1] == pytest.approx(1e5)
    assert all(b / a == pytest.approx(10 ** (11 / 44)) for a, b in itertools.pairwise(values))


YES = torch.tensor(True)
SETTINGS = schema.OptimizerConfig(base_lr=1, base_tau=1, weight_decay=1e-4, trust_coefficient=0.1)


def _probe(world: World, steps: int = 5) -> OnlineProbe:
    probe = OnlineProbe(8, 5, world, SETTINGS)
    for k in range(steps):
        features, labels = (x.chunk(world.size)[world.rank] for x in _blobs(40, spread=1.0, seed=k))
        probe(features, labels, lr=0.5, finite=YES)
    return probe


@pytest.mark.parametrize("label", [10**12, 1_281_166])
def test_labels_that_are_ids_end_no_training(label: int, capsys: pytest.CaptureFixture) -> None:
    """A head with that many classes would need 512 TB, or 10 GB."""
    config = schema.load(CONFIGS / "quickstart.yaml")
    assert make_probe(config, 128, np.array([0, label]), ALONE) is None
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: no online probe: the largest label is {label:,}")
    assert make_probe(config, 128, np.array([0, label]), World(1, 1, 2, CPU, "gloo")) is None
    assert capsys.readouterr().err == ""  # one rank says it
    probe = make_probe(config, 128, np.array([0, 9]), ALONE)
    assert probe and probe.head.weight.shape == (10, 128)


def test_probe_is_the_references_classifier() -> None:
    """One LARS over another tensor and the classifier, on the sum of two losses, makes the same updates."""
    probe = _probe(ALONE)
    head, other = make_head(8, 5, seed=0), torch.nn.Parameter(torch.ones(3, 3))
    joint = LARS([*head.parameters(), other], 0.5, 0.9, 1e-4, 0.1)
    for k in range(5):
        features, labels = _blobs(40, spread=1.0, seed=k)
        joint.zero_grad()
        (torch.nn.functional.cross_entropy(head(features), labels) + other.square().sum()).backward()
        joint.step()
    assert torch.equal(probe.head.weight, head.weight) and torch.equal(probe.head.bias, head.bias)


def test_probe_reports_the_share_before_its_update_and_learns() -> None:
    probe = OnlineProbe(8, 5, ALONE, SETTINGS.model_copy(update={"weight_decay": 0.0}))
    features, labels = _blobs(200, spread=0.1)
    shares = []
    for _ in range(60):
        expected = (probe.head(features).argmax(dim=1) == labels).float().mean()
        shares.append(probe(features, labels, lr=0.5, finite=YES))
        assert torch.equal(shares[-1], expected)
    assert shares[-1] == 1.0 > shares[0]


def test_probe_goes_on_from_its_state() -> None:
    whole, first = _probe(ALONE), _probe(ALONE, steps=3)
    resumed = OnlineProbe(8, 5, ALONE, SETTINGS)
    resumed.load_state_dict(first.state_dict())
    for k in (3, 4):
        resumed(*_blobs(40, spread=1.0, seed=k), lr=0.5, finite=YES)
    assert torch.equal(resumed.head.weight, whole.head.weight)


def _worker(rank: int, folder: str) -> None:
    world = distributed.init("cpu", timeout=30)
    state: dict[str, Any] = _probe(world).head.state_dict()
    torch.save(state, Path(folder) / f"{rank}.pt")
    distributed.shutdown(world)


@pytest.mark.slow
def test_probe_on_two_ranks_equals_one(tmp_path: Path) -> None:
    on_two_ranks(_worker, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    whole = _probe(ALONE).head.state_dict()
    for name, value in whole.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-5, atol=1e-6)


def test_a_step_that_is_not_finite_changes_no_weight() -> None:
    probe = _probe(ALONE)
    before = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
    probe(torch.full((4, 8), torch.nan), torch.zeros(4, dtype=torch.int64), lr=0.5, finite=~YES)
    assert before.keys() == {"weight", "bias", "momentum.weight", "momentum.bias"}
    for name, tensor in probe.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("option", ["--rounds", "--batch", "--classes", "--size"])
def test_the_benchmark_s_mistakes_are_one_line(option: str, capsys: pytest.CaptureFixture) -> None:
    assert probe_benchmark.main(["--backbone", "resnet8", option, "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"benchmarks/probe: {option} 0 must be at least") and error.count("\n") == 1


def test_the_benchmark_runs_on_the_least_it_takes(capsys: pytest.CaptureFixture) -> None:
    least = ["--size", "8", "--batch", "2", "--classes", "2", "--rounds", "1"]
    assert probe_benchmark.main(["--backbone", "resnet8", *least]) == 0
    assert "resnet8 (cifar stem), 8 px, batch 2, 2 classes, cpu: step" in capsys.readouterr().out
