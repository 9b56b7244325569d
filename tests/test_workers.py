"""Workers: each task is done once, and they end with the process that started them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from byolt.pipelines.convert.workers import spread

ROOT = Path(__file__).resolve().parent.parent
PARENT = """
import os, sys, time
from byolt.pipelines.convert.workers import spread

if __name__ == "__main__":
    with spread(time.sleep, [0.0, 600.0, 0.0], 2) as pending:
        pending[0].result()
        pending[2].result()  # one worker is busy now and one idle
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_in_the_order_of_the_tasks(workers: int) -> None:
    with spread(abs, [-3, -1, -2], workers) as pending:
        assert [future.result() for future in pending] == [3, 1, 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_one_worker_is_a_thread_more_are_processes(workers: int) -> None:
    with spread(_process, [0, 1], workers) as pending:
        assert {future.result() == os.getpid() for future in pending} == {workers == 1}


def _process(_: int) -> int:
    return os.getpid()


def test_busy_and_idle_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    process.communicate(timeout=30)  # returns when the last process that could write to stderr has ended
    assert process.returncode == -9
