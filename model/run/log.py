"""Writes the numbers of a run to metrics.jsonl and the loggers; averages them over steps and ranks."""

import json
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from byolt.files.atomic import replacing
from byolt.files.rows import append_row, read_rows
from byolt.model import distributed
from byolt.model.distributed import World, all_reduce_mean, gather_stacked
from byolt.model.run.wandb_log import WandbLog


class MetricLog:
    """Appends rows of numbers to metrics.jsonl and sends them to the loggers. A context manager around the loop."""

    def __init__(self, out: Path, first_step: int, wandb: WandbLog | None = None) -> None:
        """
        Args:
            out: folder of the run.
            first_step: steps done. Rows of later steps, which a run wrote after its last checkpoint, are dropped;
                with 0 all rows are.
            wandb: also gets the rows, earlier ones too if it is new.
        """
        self.path = out / "metrics.jsonl"
        self._rows = [row for row in read_rows(self.path) if 0 < first_step >= row["step"]]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)
        self._wandb = wandb
        if wandb and wandb.is_new:
            for row in self._rows:
                wandb.add(row["step"], {key: value for key, value in row.items() if key != "step"})

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row; the names become TensorBoard's tags. A row that is in the file already is skipped."""
        if any(row["step"] == step and row.keys() >= values.keys() for row in self._rows):
            return
        append_row(self.path, {"step": step, **values})
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.add(step, values)

    def __enter__(self) -> "MetricLog":
        self._hook = threading.excepthook
        threading.excepthook = self._on_thread_error
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Closes the files if the block has not; an error while closing must not hide the block's own."""
        if self._wandb:
            self._wandb.close(failed=kind is not None)
        with suppress(OSError):
            self.close()
        threading.excepthook = self._hook

    def close(self) -> None:
        """Writes the rows that the loggers have not yet written.

        Raises:
            OSError: these or earlier rows could not be written by TensorBoard's thread.
        """
        if self._wandb:
            self._wandb.close()
        self._board.close()

    def _on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        """Prints no traceback if TensorBoard's thread cannot write: `add` or `close` raises that error."""
        of_board = type(args.thread).__module__.startswith("tensorboard.")
        if not (of_board and isinstance(args.exc_value, OSError)):
            self._hook(args)


class Window:
    """The steps since the last row: sums that stay on the device, speed and share of waiting, averaged over ranks."""

    def __init__(self, world: World, batch_size: int, step: int) -> None:
        self._world, self._batch_size = world, batch_size
        self._loss, self._right = (torch.zeros((), device=world.device) for _ in range(2))
        self.straggler = ""  # a sentence about the slowest rank of the newest row
        self._slow: int | None = None  # that rank
        self.begin(step, 0.0)

    def begin(self, step: int, waited: float) -> None:
        """Begins a row after `step` steps, when this rank has waited `waited` seconds for the loader in total."""
        self._loss.zero_()
        self._right.zero_()
        self._step, self._waited, self._began = step, waited, time.monotonic()

    def add(self, loss: Tensor, right: Tensor | None) -> None:
        """Adds a step: this rank's loss, and the probe's accuracy, 0 .. 1, on its images."""
        self._loss += loss
        if right is not None:
            self._right += right

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of the block from the rates."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._began += time.monotonic() - start

    def row(
        self, step: int, waited: float, corrupt: int, gauges: Mapping[str, Tensor], probed: bool
    ) -> dict[str, float]:
        """Ends the row and begins the next. All ranks call it at the same step; it waits for the device.

        Args:
            step: steps done.
            waited: seconds that this rank has waited for the loader in total.
            corrupt: number of undecodable images on this rank in total.
            gauges: 0-dim tensors by name, averaged over ranks.
            probed: whether `add` got `right`.
        """
        steps, seconds = step - self._step, time.monotonic() - self._began
        waiting_here = (waited - self._waited) / steps
        self.straggler = self._straggler(waiting_here, distributed.own_time.per_step(), seconds / steps)
        local = [self._loss / steps, (waited - self._waited) / seconds, corrupt, self._right / steps]
        means = torch.tensor([*local, *gauges.values()], dtype=torch.float64, device=self._world.device)
        loss, waiting, unread, right, *others = all_reduce_mean(means, self._world).tolist()
        self.begin(step, waited)
        row = {
            "loss": loss,
            "images_per_second": steps * self._batch_size / seconds,
            "data_wait_percent": 100 * waiting,
            "corrupt_images": float(round(unread * self._world.size)),  # 29 / 7 * 7 > 29
            **dict(zip(gauges, others, strict=True)),
        }
        return row | ({"probe_top1": 100 * right} if probed else {})

    def _straggler(self, waiting: float, working: float, step: float) -> str:
        """Names the rank for which the others wait if it is slow in this row and in the one before; else "".

        Args:
            waiting: seconds a step for which this rank waited for its data.
            working: seconds a step that it worked before its first collective.
            step: seconds a step.
        """
        if self._world.size == 1:
            return ""
        here = torch.tensor([waiting, working], dtype=torch.float64, device=self._world.device)
        table = gather_stacked(here).tolist()
        before, self._slow = self._slow, slowest([sum(row) for row in table], step)
        if self._slow is None or self._slow != before:
            return ""
        waiting, working = table[self._slow]
        host = distributed.host_of(self._slow, self._world)
        others = statistics.median(sum(row) for rank, row in enumerate(table) if rank != self._slow)
        return (
            f"the others wait for rank {self._slow} on {host}: it is {waiting + working - others:.3f} s a step behind "
            f"them (it waits {waiting:.3f} s for its data)"
        )


def slowest(seconds: Sequence[float], step: float) -> int | None:
    """The rank that delays the others, or None.

    Args:
        seconds: of each rank, for waiting and working a step by itself.
        step: seconds of a whole step.
    """
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    others = statistics.median(value for other, value in enumerate(seconds) if other != rank)
    return rank if seconds[rank] > 1.5 * others and seconds[rank] - others > 0.1 * step else None
