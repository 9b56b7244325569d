"""What a row of the log says of the steps since the last one."""

import contextlib
import time

import pytest
import torch

from model.distributed import World
from model.metrics import Window

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
