"""Schedules against the reference's rows and closed forms."""

import json
import math
from pathlib import Path

import pytest

from byolt.model.schedules import learning_rate, tau

BASE_LR = {"40": 0.45, "100": 0.45, "300": 0.3, "1000": 0.2}
BASE_TAU = {"40": 0.97, "100": 0.99, "300": 0.99, "1000": 0.996}


@pytest.mark.parametrize("preset", BASE_LR)
def test_rows_of_the_reference(fixtures: Path, preset: str) -> None:
    run = json.loads((fixtures / "schedules.json").read_text())[preset]
    total, warmup = run["max_steps"], run["warmup_steps"]
    assert len(run["rows"]) == 7
    for step, reference_lr, reference_tau in run["rows"]:
        lr = learning_rate(
            step, base_lr=BASE_LR[preset], batch_size=4096, warmup_steps=warmup, total_steps=total
        )
        # The reference computes in float32: near the end, 1 + cos(x) keeps only multiples of 6e-8.
        assert lr == pytest.approx(reference_lr, rel=1e-6, abs=1e-6 * run["peak_lr"])
        assert tau(step, base_tau=BASE_TAU[preset], total_steps=total) == pytest.approx(
            reference_tau, abs=1e-6
        )


def test_learning_rate_at_its_corners() -> None:
    lr = [learning_rate(k, base_lr=0.5, batch_size=512, warmup_steps=4, total_steps=12) for k in range(13)]
    assert lr[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert lr[8] == pytest.approx(0.5, abs=1e-15)
    assert lr[6] == pytest.approx((1 + math.sqrt(0.5)) / 2, abs=1e-15)
    assert lr[12] == 0.0


def test_a_run_without_warmup_and_one_of_warmup_only() -> None:
    assert learning_rate(0, base_lr=0.5, batch_size=256, warmup_steps=0, total_steps=2) == 0.5
    lr = [learning_rate(k, base_lr=0.5, batch_size=256, warmup_steps=2, total_steps=2) for k in range(3)]
    assert lr == [0.0, 0.25, 0.0]


def test_tau_goes_from_base_to_one() -> None:
    values = [tau(k, base_tau=0.9, total_steps=100) for k in range(101)]
    assert values[0] == pytest.approx(0.9, abs=1e-15)
    assert values[50] == pytest.approx(0.95)
    assert values[100] == 1
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"step": -1}, "step=-1"),
        ({"step": 11}, "step=11"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"warmup_steps": 11}, "warmup_steps=11"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"base_lr": -0.1}, "base_lr=-0.1"),
        ({"base_lr": math.nan}, "base_lr=nan"),
    ],
)
def test_learning_rate_refuses(wrong: dict[str, float], message: str) -> None:
    right = {"step": 1, "base_lr": 0.1, "batch_size": 256, "warmup_steps": 2, "total_steps": 10}
    with pytest.raises(ValueError, match=message):
        learning_rate(**{**right, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("base_tau", [0.0, 0.99, 1.0])
def test_constant_tau(base_tau: float) -> None:
    values = {tau(k, base_tau=base_tau, total_steps=10, schedule="constant") for k in range(11)}
    assert values == {base_tau}
    with pytest.raises(ValueError, match="schedule"):
        tau(0, base_tau=base_tau, total_steps=10, schedule="linear")


@pytest.mark.parametrize("base_tau", [-0.1, 1.1, math.nan])
def test_tau_refuses(base_tau: float) -> None:
    with pytest.raises(ValueError, match="base_tau"):
        tau(0, base_tau=base_tau, total_steps=10)
