"""Learning rate and EMA coefficient of each update: pure functions of the step (source: DeepMind `byol/`)."""

import math

from byolt.configs.schema import Config


def learning_rate(
    step: int, *, base_lr: float, batch_size: int, warmup_steps: int, total_steps: int
) -> float:
    """Linear warm-up from 0 at step 0 to base_lr * batch_size / 256, then a cosine to 0 at total_steps.

    Args:
        step: 0-based index of the update, 0 .. total_steps.
        base_lr: learning rate for a batch of 256, >= 0.
        batch_size: global batch: over all ranks and accumulated micro-batches.
        warmup_steps: updates of the warm-up, 0 .. total_steps.
        total_steps: updates of the whole run, >= 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check_step(step, total_steps)
    if not base_lr >= 0:
        raise ValueError(f"base_lr is {base_lr}; it must be 0 or more")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps is {warmup_steps}; it must lie in 0 .. total_steps = {total_steps}")
    peak = base_lr * batch_size / 256
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step == total_steps:
        return 0.0
    return peak * _half_cosine((step - warmup_steps) / (total_steps - warmup_steps))


def tau(step: int, *, base_tau: float, total_steps: int, schedule: str = "cosine") -> float:
    """1 - (1 - base_tau) (1 + cos(pi step / total_steps)) / 2: from base_tau to 1 (paper, sec. 3.3).

    With schedule "constant" it stays base_tau, as where the paper's table 5a has tau 0.

    Args:
        step: 0-based index of the update, 0 .. total_steps.
        base_tau: coefficient of the first update, 0 .. 1.
        total_steps: updates of the whole run, >= 1.
        schedule: "cosine" or "constant".

    Raises:
        ValueError: an argument is out of its range.
    """
    _check_step(step, total_steps)
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"schedule is {schedule!r}; it must be cosine or constant")
    if not 0 <= base_tau <= 1:
        raise ValueError(f"base_tau is {base_tau}; it must lie in 0 .. 1")
    if schedule == "constant":
        return base_tau
    return 1 - (1 - base_tau) * _half_cosine(step / total_steps)


def _half_cosine(progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1."""
    return (1 + math.cos(math.pi * progress)) / 2


def _check_step(step: int, total_steps: int) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}; it must be 1 or more")
    if not 0 <= step <= total_steps:
        raise ValueError(f"step is {step}; it must lie in 0 .. total_steps = {total_steps}")


def of_run(step: int, config: Config, warmup_steps: int, total_steps: int) -> tuple[float, float]:
    """Learning rate and tau of the update after `step` steps, as the run's settings have them."""
    settings = config.optimizer
    lr = learning_rate(
        step,
        base_lr=settings.base_lr,
        batch_size=config.train.batch_size,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
    )
    return lr, tau(step, base_tau=settings.base_tau, total_steps=total_steps, schedule=settings.tau_schedule)
