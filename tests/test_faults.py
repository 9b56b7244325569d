"""What a run of one process survives: kills, cut and hostile files, full disks, a second run in its folder.

Each test ends by comparing the digest with that of a run that nothing happened to, where there is one to compare.
"""

import random
import signal
from pathlib import Path

import pytest
from runs import STEPS, Process, Run, images  # noqa: F401

pytestmark = pytest.mark.faults


@pytest.fixture
def run(tmp_path: Path, images: Path) -> Run:  # noqa: F811
    return Run(tmp_path, images)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Process:  # noqa: F811
    """A run of 12 steps that nothing happens to."""
    process = Run(tmp_path_factory.mktemp("whole"), images)()
    assert process.wait() == 0, process.text
    return process


def finish(run: Run, *arguments: str) -> Process:
    process = run("--resume", "auto", *arguments)
    assert process.wait() == 0, process.text
    return process


def test_killed_at_five_random_steps(run: Run, whole: Process) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    for step in sorted(random.Random(seed).sample(range(1, STEPS), 5)):
        process = run.start("--resume", "auto")
        process.wait_for(rf"^step {step}/")
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert finish(run).digest == whole.digest
    assert [row["step"] for row in run.rows()] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    "where", ["checkpoint write:300:SIGKILL", "rename checkpoint-000000005.pt:0:SIGKILL"]
)
def test_killed_while_writing_a_checkpoint(where: str, run: Run, whole: Process) -> None:
    run("train.stop_at_step=4")
    size = run.newest()[0].stat().st_size
    assert run("--resume", "auto", BYOLT_FAIL=where).wait() == -signal.SIGKILL
    (half,) = run.out.glob(".checkpoint-*.tmp")
    assert (
        (0.99 if "rename" in where else 0.01)
        < half.stat().st_size / size
        < (1.01 if "rename" in where else 0.99)
    )
    process = finish(run)
    assert "checkpoint-000000004.pt: steps 4 to" in process.text
    assert process.digest == whole.digest
    assert run.leftovers() == []
