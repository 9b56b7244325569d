"""Computes learning rate and tau of each update, as pure functions of the step (source: DeepMind `byol/`)."""

import math


def learning_rate(
    step: int, *, base_lr: float, batch_size: int, warmup_steps: int, total_steps: int
) -> float:
    """Linear warm-up from 0 at step 0 to base_lr * batch_size / 256, then a cosine to 0 at total_steps.

    Args:
        step: 0-based index of the update, 0 .. total_steps.
        base_lr: learning rate for a batch of 256, >= 0.
        batch_size: images per update, over all ranks and accumulated micro-batches, >= 1.
        warmup_steps: updates of the warm-up, 0 .. total_steps.
        total_steps: updates of the whole run, >= 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check_step(step, total_steps)
    if not base_lr >= 0:
        raise ValueError(f"base_lr={base_lr} must be at least 0")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps={warmup_steps} must be in 0 .. total_steps={total_steps}")
    peak = base_lr * batch_size / 256
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step == total_steps:
        return 0.0
    return peak * _half_cosine((step - warmup_steps) / (total_steps - warmup_steps))


def tau(step: int, *, base_tau: float, total_steps: int, schedule: str = "cosine") -> float:
    """Rises from base_tau to 1: 1 - (1 - base_tau) (1 + cos(pi step / total_steps)) / 2 (paper, sec. 3.3).

    With schedule "constant" it stays base_tau, as in the ablations of the paper's table 5a.

    Args:
        step: 0-based index of the update, 0 .. total_steps.
        base_tau: tau of the first update, 0 .. 1.
        total_steps: updates of the whole run, >= 1.
        schedule: "cosine" or "constant".

    Raises:
        ValueError: an argument is out of its range.
    """
    _check_step(step, total_steps)
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"schedule={schedule!r} must be 'cosine' or 'constant'")
    if not 0 <= base_tau <= 1:
        raise ValueError(f"base_tau={base_tau} must be in 0 .. 1")
    if schedule == "constant":
        return base_tau
    return 1 - (1 - base_tau) * _half_cosine(step / total_steps)


def _half_cosine(progress: float) -> float:
    """Falls from 1 at progress 0 to 0 at progress 1."""
    return (1 + math.cos(math.pi * progress)) / 2


def _check_step(step: int, total_steps: int) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps={total_steps} must be at least 1")
    if not 0 <= step <= total_steps:
        raise ValueError(f"step={step} must be in 0 .. total_steps={total_steps}")
