"""The numbers of a row, and a log whose disk fails."""

import contextlib
import errno
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter

from byolt.model.distributed import World
from byolt.model.run import log
from byolt.model.run.log import MetricLog, Window, slowest

ALONE = World(0, 0, 1, torch.device("cpu"), "none")


def test_row_is_the_mean_of_its_steps_and_the_next_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    window = Window(ALONE, batch_size=8, step=10)
    for loss, right in ((1.0, 0.25), (2.0, 0.75), (6.0, 0.5)):
        window.add(torch.tensor(loss), torch.tensor(right))
    clock[0] += 7
    with contextlib.suppress(OSError), window.paused():
        clock[0] += 5  # counts for no rate, whatever comes of it
        raise OSError
    with window.paused():
        clock[0] += 1
    row = window.row(13, waited=0.7, corrupt=2, gauges={"spread": torch.tensor(0.5)}, probed=True)
    assert row == pytest.approx(
        {
            "loss": 3.0,
            "images_per_second": 3 * 8 / 7,
            "data_wait_percent": 10.0,
            "corrupt_images": 2,
            "spread": 0.5,
            "probe_top1": 50.0,
        }
    )
    window.add(torch.tensor(4.0), None)
    clock[0] += 2
    assert window.row(14, waited=1.7, corrupt=2, gauges={}, probed=False) == pytest.approx(
        {"loss": 4.0, "images_per_second": 4.0, "data_wait_percent": 50.0, "corrupt_images": 2}
    )


def test_images_of_several_ranks_are_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    window = Window(replace(ALONE, size=7), batch_size=7, step=0)
    monkeypatch.setattr(log, "all_reduce_mean", lambda means, world: 29 / 7 * torch.ones_like(means))
    monkeypatch.setattr(window, "_straggler", lambda *_: "")
    assert window.row(1, waited=0.0, corrupt=4, gauges={}, probed=False)["corrupt_images"] == 29


@pytest.mark.parametrize("error", [None, FloatingPointError("not finite")])
def test_disk_failure_in_tensorboard_is_reported_once_and_hides_no_other_error(
    error: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def log_one() -> None:
        with monkeypatch.context() as disk, MetricLog(tmp_path, 0) as rows:
            disk.setattr(RecordWriter, "write", fail)
            with contextlib.suppress(OSError):
                rows.add(1, {"loss": 1.0})
            if error:
                raise error
            rows.close()

    printed: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    expected, said = (type(error), "not finite") if error else (OSError, "No space left")
    with pytest.raises(expected, match=said):
        log_one()
    assert printed == [] and threading.excepthook == printed.append
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
    with MetricLog(tmp_path, 0):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert [args.thread for args in printed] == [thread]  # another thread's error is printed


def test_slowest_rank_is_half_as_slow_again_as_the_median_of_the_others() -> None:
    assert slowest([0.1, 0.1, 0.16], step=0.5) == 2
    assert slowest([0.1, 0.1, 0.14], step=0.5) is None
    assert slowest([0.16, 0.1, 0.1], step=2.0) is None  # a thirtieth of the step
    assert slowest([0.9, 0.1], step=1.0) == 0
    assert slowest([0.9, 0.1, 0.9, 0.9], step=1.0) is None  # no single rank
    assert slowest([0.0, 0.0], step=1.0) is None
