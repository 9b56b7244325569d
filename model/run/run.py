"""Holds the state of a run; decides when it is logged, checked, evaluated, saved and stopped."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from byolt.configs import estimate
from byolt.configs.schema import Config
from byolt.files import failpoint, stop
from byolt.files.console import count, duration, say
from byolt.files.progress import Meter
from byolt.files.storage.mirror import Mirror
from byolt.model import distributed, schedules
from byolt.model.distributed import World
from byolt.model.quality.monitor import KnnMonitor
from byolt.model.quality.probe import OnlineProbe
from byolt.model.run import checkpoint, guard, provenance
from byolt.model.run.log import MetricLog, Window
from byolt.model.run.resume import Start
from byolt.model.run.wandb_log import WandbLog
from byolt.model.step import StepResult, TrainStep

T = TypeVar("T")
_EARLY_ROWS = (1, 2, 5, 10)  # steps with a row before run.log_every, so that a slow run shows signs of life


@dataclass
class Run:
    """One start of a run on one rank. All ranks make the same calls in the same order."""

    config: Config
    world: World
    train_step: TrainStep
    probe: OnlineProbe | None
    knn: KnnMonitor | None
    num_images: int  # of the data set
    fingerprint: str  # of the data set
    rounding: dict[str, str | int | bool]  # `provenance.rounding_of`
    start: InitVar[Start]
    last_step: int  # of this start
    mirror: Mirror | None = None  # on rank 0, if run.mirror is set

    def __post_init__(self, start: Start) -> None:
        self.step = start.step  # optimizer steps done
        self.init_from = start.init_from
        self.knn_untrained = start.knn_untrained  # kNN top-1 in percent, before the first step
        self.knn_trained: float | None = None  # at the end
        self.out = Path(self.config.run.out)
        self.meter = Meter("step", self.last_step, self.step, enabled=self.world.is_main)
        self.on_gpu = self.world.device.type == "cuda"
        self._first_step, self._duration_said = start.step, False
        self._without_data = False  # on this rank, after a signal during an outage
        self.stopping = False  # a rank got a signal; the same on every rank
        self.metrics: MetricLog | None = None
        if self.world.is_main:
            wandb = WandbLog(self.config, self.step, self.meter.say) if self.config.run.wandb else None
            self.metrics = MetricLog(self.out, self.step, wandb)
        self._window = Window(self.world, self.config.train.batch_size, self.step)
        self._finite = guard.FiniteCheck(self.world, overflow_allowed=self.train_step.scaler.is_enabled())
        self._saved, self._replaced = time.monotonic(), 0

    # ── before the loop ─────────────────────────────────────────────────────────────────────────────────────

    def introduce(self, start: Start, precision: str, reason: str) -> None:
        """Records this start, and says how it runs: its back end (`reason`), its steps and what rounds otherwise."""
        if self.world.is_main:
            facts = {
                "ranks": self.world.size, "precision": precision, "backend": reason,
                "rounding": self.rounding, "changed": start.changed, "init_from": start.init_from,
                "config": self.config.model_dump(mode="json"), "data": self.fingerprint,
            }  # fmt: skip
            provenance.record_start(self.out, start.step, self.world.device, facts)
        changed = f"warning: the run continues, but no longer to the bit: {'; '.join(start.changed)}"
        for note in filter(None, (reason, self.train_step.note, changed if start.changed else "")):
            self.meter.say(note)
        total_steps = self.config.total_steps(self.num_images)
        self.meter.say(
            f"{start.origin}: steps {start.step} to {max(start.step, self.last_step)} of {total_steps}, "
            f"{self.num_images} images, {self.world.size} x {self.world.device.type}, {precision}"
        )

    def begin(self) -> None:
        """Evaluates the encoder of a new run before training; starts to measure the speed.

        Raises:
            Stopped: a rank got a signal.
        """
        expected, path = self.config.data.expected_images, self.config.data.path
        if self.step >= self.last_step:
            key = "stop_at_step" if self.config.train.stop_at_step else "epochs"
            past = f"past step {self.last_step}, at which train.{key} ends the run"
            last = "the last" if self.step == self.last_step else past
            self.meter.say(f"nothing left to train: step {self.step} is {last}")
        if expected not in (None, self.num_images):
            self.meter.say(
                f"the schedules are computed for the {self.num_images:,} images of {path}; the recipe expects "
                f"{expected:,}"
            )
        if self.step < self.last_step:
            device, steps = provenance.device_of(self.world.device), self.last_step - self.step
            for line in estimate.expect(self.config, device, self.world.size, steps):
                self.meter.say(line)
        if self.step == 0:
            self.knn_untrained = self.evaluate(before_training=True)
        if distributed.any_rank(bool(stop.asked()), self.world):
            stop.end()
        stop.training_begins()
        self._window.begin(self.step, 0.0)

    def draw_views(self, view1: Tensor, view2: Tensor) -> None:
        """Writes views.png: the first pairs of views, (n, 3, size, size) each, normalized."""
        if self.world.is_main:
            from byolt.model.run.pictures import save_view_pairs  # matplotlib

            with self.writing("views.png"):
                save_view_pairs(self.out / "views.png", view1, view2, self.config.augment)

    # ── a step ──────────────────────────────────────────────────────────────────────────────────────────────

    def lr_and_tau(self) -> tuple[float, float]:
        """Learning rate and EMA coefficient of the next update."""
        optimizer, total_steps = self.config.optimizer, self.config.total_steps(self.num_images)
        lr = schedules.learning_rate(
            self.step,
            base_lr=optimizer.base_lr,
            batch_size=self.config.train.batch_size,
            warmup_steps=self.config.warmup_steps(self.num_images),
            total_steps=total_steps,
        )
        return lr, schedules.tau(
            self.step,
            base_tau=optimizer.base_tau,
            total_steps=total_steps,
            schedule=optimizer.tau_schedule,
        )

    def next_batch(self, batches: Iterator[T], stand_in: Callable[[], T]) -> T:
        """Returns the next batch, or a stand-in after a signal during an outage of the data's server.

        The others are inside the step already. NaN on one rank makes it change nothing, on any rank; `check_finite`
        then returns all of them to the step before.

        Raises:
            InterruptedError: there is nothing to save, a single rank need not wait for others, or fp16's scaler would
                change.
        """
        if not self._without_data:
            try:
                return next(batches)
            except InterruptedError as error:
                trained = self.step > self._first_step
                if self.world.size == 1 or not trained or self.train_step.scaler.is_enabled():
                    raise
                say(f"warning: rank {self.world.rank}, step {self.step}: {error}", file=sys.stderr)
                self._without_data = True
        return stand_in()

    def is_logged(self, step: int) -> bool:
        """Whether a row of metrics is written after `step` steps."""
        every = self.config.run.log_every
        return step % every == 0 or step == self.last_step or (step in _EARLY_ROWS and step < every)

    def count(self, result: StepResult, right: Tensor | None, ids: Tensor) -> None:
        """Counts a step; stops every rank after one that is not finite.

        Args:
            result: of the step.
            right: the probe's accuracy on this rank's images, 0 .. 1, 0-dim; None without a probe.
            ids: this rank's sample ids, (n,) int64 on the CPU.
        """
        self._window.add(result.loss, right)
        self._finite.add(self.step + 1, result, ids)
        self.step += 1
        self.meter.update(self.step)
        if self.is_logged(self.step) or not self.on_gpu:  # a GPU's flags are read when the host waits anyway
            self.check_finite()

    def check_finite(self) -> None:
        """Stops every rank if a step since the last check was not finite; see `FiniteCheck.check`."""
        if step := self._finite.check(self.out, self.state):
            self.step, self.stopping = step - 1, True
            raise InterruptedError("a rank had no batch; see its warning")

    def log(self, lr: float, tau: float, result: StepResult, waited: float, corrupt: int) -> None:
        """Prints and writes a row about the steps since the last row; warns of collapse, or stops.

        Args:
            lr: learning rate of the last step.
            tau: its EMA coefficient.
            result: of the last step, with gauges.
            waited: seconds that this rank has waited for the loader in total.
            corrupt: number of undecodable images on this rank in total.

        Raises:
            CollapseError: the projections have collapsed and train.on_collapse=stop; a checkpoint is saved.
        """
        assert result.gauges
        gauges, probed = result.gauges._asdict(), self.probe is not None
        row = {
            "epoch": self.step * self.config.train.batch_size / self.num_images,
            "lr": lr,
            "tau": tau,
            "gradient_norm": result.gradient_norm.item(),
            **self._window.row(self.step, waited, corrupt, gauges, probed),
        }
        self.meter.update(
            self.step,
            f"epoch {row['epoch']:.2f}  loss {row['loss']:.4f}  lr {lr:.3g}  "
            f"{row['images_per_second']:.0f} images/s  wait {row['data_wait_percent']:.1f} %",  # fits 80 columns
        )
        self._say_duration(row["images_per_second"])
        if self._window.straggler:
            self.meter.say(f"warning: step {self.step}: {self._window.straggler}")
        if row["corrupt_images"] > self._replaced:
            self._replaced = round(row["corrupt_images"])
            images = count(self._replaced, "corrupt image")
            self.meter.say(
                f"warning: step {self.step}: {images} so far, replaced and listed in {self.out}/corrupt.jsonl"
            )
        self._write(row)
        if warning := guard.collapse_warning(row["projection_std"], self.config):
            if self.config.train.on_collapse == "stop":
                self.save()
                raise guard.CollapseError(f"{warning}; stopped after a checkpoint (train.on_collapse=stop)")
            self.meter.say(f"warning: step {self.step}: {warning}")

    def _say_duration(self, images_per_second: float) -> None:
        """Says once how long the steps of this start take; not by its first step alone, which is the slowest."""
        if not self._duration_said and self._first_step + 1 < self.step < self.last_step:
            self._duration_said = True
            steps = self.last_step - self._first_step
            seconds = steps * self.config.train.batch_size / images_per_second
            self.meter.say(f"at this speed {steps} steps take {duration(seconds)}")

    def _write(self, values: dict[str, float]) -> None:
        if self.metrics:
            with self.writing("the row of metrics"):
                failpoint.reach("log", self.step)
                self.metrics.add(self.step, values)

    # ── evaluating, saving, stopping ────────────────────────────────────────────────────────────────────────

    def evaluate_if_due(self) -> None:
        """Evaluates every eval.every_epochs epochs, except shortly before the end, which is evaluated anyway."""
        epochs = self.config.eval.every_epochs
        every = max(1, round(epochs * self.num_images / self.config.train.batch_size))
        if self.step % every == 0 and self.last_step - self.step > every // 2:
            self.evaluate()

    def evaluate(self, before_training: bool = False) -> float | None:
        """Prints, logs and returns kNN top-1 in percent; returns None without a labeled split."""
        if self.knn is None:
            return None
        with self._window.paused():
            encoder = self.train_step.model.online.encoder
            accuracy = self.knn(encoder, calibrate=before_training and not self.init_from)
            if not math.isfinite(accuracy):
                raise FloatingPointError("the encoder's features are not finite; the encoder is not exported")
            when = " (before training)" * before_training
            self.meter.say(f"step {self.step}  kNN top-1 {accuracy:.1f} %{when}")
            self._write({"knn_top1": accuracy})
        return accuracy

    def save_or_stop_if_due(self) -> None:
        """Saves every run.checkpoint_minutes minutes, and notices a signal; the ranks vote on both.

        A vote makes a GPU's host wait for the device, so several GPUs vote every 10 steps only.
        """
        if self.step == self.last_step or (self.on_gpu and self.world.size > 1 and self.step % 10):
            return
        late = time.monotonic() - self._saved > self.config.run.checkpoint_minutes * 60
        if distributed.any_rank(late, self.world):
            self.check_finite()  # the checkpoint does not contain the flags
            with self.writing():
                self.save()
        self._vote_on_stopping()

    def _vote_on_stopping(self) -> None:
        self.stopping = distributed.any_rank(bool(stop.asked()), self.world)

    @contextmanager
    def stopped_by_outage(self) -> Iterator[None]:
        """A signal during an outage of the data's server stops the run after the last step in the block.

        Several ranks must have agreed on the step (`next_batch`); otherwise the last checkpoint stands.
        """
        try:
            yield
        except InterruptedError as error:
            if self.world.size > 1 and not self.stopping:
                raise
            self.stopping = True
            self.meter.say(f"warning: step {self.step}: {error}")

    def save(self) -> None:
        """Writes a checkpoint on rank 0; the others wait at their next reduction."""
        self._saved = time.monotonic()
        if self.world.is_main:
            with self._window.paused():
                checkpoint.save(self.out, self.step, self.state(), self.config.run.keep_checkpoints)
        if self.mirror:
            self.mirror.update()

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint (`resume.STATE`); the same on every rank."""
        return {
            "step": self.step,
            "model": self.train_step.model.state_dict(),
            "momentum": self.train_step.optimizer.state_dict()["state"],
            "train_step": self.train_step.state_dict(),
            "probe": self.probe.state_dict() if self.probe else None,
            "config": self.config.model_dump(mode="json"),
            "data": self.fingerprint,
            "knn_untrained": self.knn_untrained,
            "rounding": self.rounding,
            **({"init_from": self.init_from} if self.init_from else {}),  # unknown to earlier releases
        }

    @contextmanager
    def writing(self, name: str = "", may_stop: bool = True) -> Iterator[None]:
        """An OSError in the block stops the run or only prints a warning, by run.on_write_error.

        Args:
            name: of the file, for an error that does not name it.
            may_stop: False: an error only prints a warning.
        """
        try:
            yield
        except OSError as error:
            if may_stop and self.config.run.on_write_error == "stop":
                raise
            what = f"{name} could not be written: " if name else ""
            self.meter.say(f"warning: step {self.step}: {what}{error}; continuing")
