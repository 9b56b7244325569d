"""Stops a run whose loss or gradient is not finite, or whose projections collapse.

The flags of the steps stay on the device until the host waits for it anyway. A step that is not finite changes no
weight or statistic (`step.TrainStep`), so the run's state is finite whenever it is saved.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byolt.configs.schema import Config
from byolt.model import distributed
from byolt.model.distributed import World
from byolt.model.run import checkpoint
from byolt.model.step import StepResult


class FiniteCheck:
    """Collects the flags of steps; `check` reads them."""

    def __init__(self, world: World, overflow_allowed: bool) -> None:
        """
        Args:
            world: the processes.
            overflow_allowed: accept an infinite gradient of a finite loss (fp16: the scaler then lowers its scale).
        """
        self._world, self._overflow_allowed = world, overflow_allowed
        self._flags: list[Tensor] = []
        self._samples: list[tuple[int, Tensor]] = []

    def add(self, step: int, result: StepResult, ids: Tensor) -> None:
        """Adds a step of this rank: its number, its result, and its sample ids, (n,) int64 on the CPU."""
        bad_loss = ~result.loss.isfinite()
        bad = bad_loss if self._overflow_allowed else bad_loss | ~result.finite
        self._flags.append(torch.stack([bad, bad_loss]))
        self._samples.append((step, ids))

    def look(self) -> list[dict[str, Any]]:
        """Reads the flags since the last look. All ranks call it at the same step; it waits for the device.

        Returns:
            Step, rank and sample ids of every rank whose loss was not finite in a step; of all ranks if only the
            gradient was not.
        """
        flags = torch.stack(self._flags).tolist() if self._flags else []
        samples, self._flags, self._samples = self._samples, [], []
        bad = any(here for here, _ in flags)
        if not distributed.any_rank(bad, self._world):
            return []
        mine = [
            torch.tensor([[step, self._world.rank, loss, number] for number in ids.tolist()])
            for (here, loss), (step, ids) in zip(flags, samples, strict=True)
            if here
        ]
        rows = torch.cat(mine) if mine else torch.empty(0, 4, dtype=torch.int64)
        rows = distributed.gather_rows(rows.to(self._world.device), self._world).cpu()
        report: list[dict[str, Any]] = []
        for step in rows[:, 0].unique().tolist():
            of_step = rows[rows[:, 0] == step]
            guilty = of_step[of_step[:, 2] == 1] if of_step[:, 2].any() else of_step
            for rank in guilty[:, 1].unique().tolist():
                numbers = guilty[guilty[:, 1] == rank][:, 3].tolist()
                report.append({"step": step, "rank": rank, "samples": numbers})
        return report

    def check(self, out: Path, state: Callable[[], dict[str, Any]]) -> int | None:
        """Stops every rank if a step since the last check was not finite, and saves the run's state, which is finite.

        Returns:
            The first step, if a rank had no batch for it (the sample ids -1), otherwise None.

        Args:
            out: folder of the run, for not-finite.json (the result of `look`) and the checkpoint aside-STEP.pt.
            state: returns the content of a checkpoint.

        Raises:
            FloatingPointError: on every rank.
        """
        bad = self.look()
        if not bad:
            return None
        first = bad[0]["step"]
        if any(-1 in row["samples"] for row in bad if row["step"] == first):
            return first
        report, now = out / "not-finite.json", state()
        aside = out / f"aside-{now['step']:09d}.pt"
        if self._world.is_main:
            report.write_text(json.dumps(bad, indent=1) + "\n")
            checkpoint.write(aside, now)
        distributed.barrier(self._world)
        samples = ", ".join(map(str, bad[0]["samples"][:8]))
        raise FloatingPointError(
            f"loss or gradient not finite in step {first}, rank {bad[0]['rank']}, samples {samples} ... "
            f"(all in {report}). Such a step changes no weight; the state after it is in {aside}. Look at the images, "
            f"then continue with --resume {aside}, or from an earlier checkpoint with a lower optimizer.base_lr or "
            "train.precision=fp32"
        )


class CollapseError(Exception):
    """The projections have collapsed, and train.on_collapse=stop."""


def collapse_warning(projection_std: float, config: Config) -> str:
    """Returns a warning if the projections spread less than train.collapse_std; else, or with on_collapse=ignore, "".

    Args:
        projection_std: of the target's projections, averaged over dimensions and ranks (`step.collapse_gauges`).
        config: its projector_size D gives the spread over the whole sphere, 1/sqrt(D).
    """
    spread = projection_std * config.model.projector_size**0.5
    if config.train.on_collapse == "ignore" or spread >= config.train.collapse_std:
        return ""
    return (
        f"collapse: the projections' standard deviation is {spread:.2g} times that of a uniform sphere, below "
        f"train.collapse_std={config.train.collapse_std:g}"
    )
