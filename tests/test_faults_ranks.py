"""Faults that a run of several ranks survives, on gloo: signals, a killed, a stopped and a failing rank, other numbers of ranks."""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import run as torchrun
from whole_runs import STEPS, Process, Run, digest_of, slow, write_images

from byolt.model.byol import Online
from byolt.model.quality import probe
from byolt.model.run import checkpoint
from byolt.model.step import TrainStep
from byolt.pipelines.formats.folder import FolderSource
from byolt.pipelines.loader import Loader
from byolt.pipelines.order import global_batch, position

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def run(tmp_path: Path, images: Path) -> Run:
    return Run(tmp_path, images)


def all_end(ranks: list[Process], seconds: float = 60) -> list[int]:
    codes = []
    for process in ranks:
        codes.append(process.wait(seconds))
    return codes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, images: Path) -> str:
    """Digest of a run of two ranks without faults."""
    ranks = Run(tmp_path_factory.mktemp("whole"), images).start_ranks(2)
    assert all_end(ranks) == [0, 0], ranks[0].text
    return ranks[0].digest


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """Folder of a run of two ranks that was stopped after 4 steps."""
    run = Run(tmp_path_factory.mktemp("half"), images)
    assert all_end(run.start_ranks(2, "train.stop_at_step=4")) == [0, 0]
    return run.out


@pytest.fixture
def halved(run: Run, half: Path) -> Run:
    shutil.copytree(half, run.out)
    return run


def become_torchrun(options: list[str], before: Callable[[], None] | None = None) -> None:
    """Runs torchrun instead of train.py in a process of `Run.start`, which calls it first.

    torchrun forks its ranks from this process, which has imported torch: eight imports take 40 s of a core.

    Args:
        options: of torchrun.
        before: called before, to change what the ranks do.
    """
    multiprocessing.current_process().daemon = False  # a daemon may not have children
    os.setsid()
    if before:
        before()
    torchrun.main([*options, "--run-path", "--start-method=fork", *sys.argv])
    raise SystemExit


def finish(run: Run) -> str:
    ranks = run.start_ranks(2, "--resume", "auto")
    assert all_end(ranks) == [0, 0], ranks[0].text + ranks[1].text
    assert run.leftovers() == []
    return ranks[0].digest


@pytest.mark.parametrize(
    ("number", "targets"),
    [
        (signal.SIGTERM, [1]),
        (signal.SIGTERM, [0, 1, 0, 1]),
        (signal.SIGINT, [0]),
        (signal.SIGUSR1, [0, 1]),
    ],
    ids=["one rank", "all ranks twice", "Ctrl-C", "Slurm"],
)
def test_signal_saves_one_checkpoint_on_all_ranks(
    number: int, targets: list[int], halved: Run, whole: str
) -> None:
    ranks = halved.start_ranks(2, "--resume", "auto", "run.checkpoint_minutes=9")
    ranks[0].wait_for("^step 6/")
    for target in targets:
        ranks[target].signal(number)
    start = time.monotonic()
    codes = all_end(ranks, 10)
    assert time.monotonic() - start < 10
    # A rank that got no signal of its own says SIGTERM.
    assert all(code in (128 + number, 128 + signal.SIGTERM) for code in codes)
    path, state = halved.newest()
    saved = sorted(int(p.name[11:20]) for p in halved.out.glob("checkpoint-*.pt"))
    assert saved == [4, state["step"]] and path.name.endswith(f"{state['step']}.pt")
    assert ranks[0].digest == digest_of(state)  # which both ranks have compared
    assert finish(halved) == whole


@pytest.mark.parametrize("targets", [[0, 1], [1]], ids=["all ranks", "one rank"])
def test_signal_before_the_first_step_ends_all_ranks(targets: list[int], run: Run) -> None:
    before = functools.partial(slow, "byolt.pipelines.resident.decode")  # 16 s, or 4 s of 8 images
    images = write_images(run.folder / "images", 32 if len(targets) == 2 else 8)
    settings = ["data.backend=auto", "data.resident=always", f"data.path={images}"]
    ranks = run.start_ranks(2, *settings, before=before)
    for rank in ranks:
        rank.wait_for("^slow$")
    for target in targets:
        ranks[target].signal(signal.SIGTERM)
    assert [rank.wait(12) for rank in ranks] == [143 if rank in targets else 1 for rank in range(2)]
    said = "rank 1: stopped by SIGTERM before the first step: nothing was trained"
    assert all(said in rank.text for rank in ranks[len(targets) - 1 :]), ranks[0].text + ranks[1].text
    assert not list(run.out.glob("checkpoint-*"))


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_ranks_killed_at_random_are_restarted_by_torchrun(run: Run, whole: str) -> None:
    """Two machines of a rank each: one kill while the ranks start, one in training, of any rank, in any order."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    start = ["--nnodes=2", "--max-restarts=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    agents = [
        run.start(
            "--resume",
            "auto",
            before=functools.partial(become_torchrun, [*start, f"--rdzv-conf=is_host={is_host}"]),
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )
        for is_host in (True, False)
    ]
    seen: set[int] = set()
    try:
        for step in chance.sample([None, chance.randrange(2, STEPS - 1)], 2):
            end = time.monotonic() + 180
            while True:
                ranks = _children(agents[0].pid) + _children(agents[1].pid)
                text = agents[0].text + agents[1].text
                reached = step is None or re.search(rf"^step {step}/", text, re.MULTILINE)
                if reached and len(ranks) == 2 and not seen & {*ranks}:
                    break
                assert time.monotonic() < end, text
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 1 if step is None else 0.1))
            os.kill(chance.choice(ranks), signal.SIGKILL)
            seen |= {*ranks}
        assert all_end(agents, 180) == [0, 0], agents[0].text + agents[1].text
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
    text = agents[0].text + agents[1].text
    assert f"digest: step {whole.replace(' ', ' sha256 ')}\n" in text
    assert f"resumed from {run.out}/checkpoint-0000000" in text and run.leftovers() == []


def test_tasks_of_srun_train_as_the_ranks_of_torchrun_do(run: Run, whole: str) -> None:
    """Two tasks on two nodes, both of them this machine."""
    step = {"SLURM_JOB_ID": str(random.randrange(10**6)), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_NODELIST": "localhost,node[2-9]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    tasks = [
        run.start(**step, SLURM_NODEID=str(task), SLURM_PROCID=str(task), SLURM_LOCALID="0")
        for task in (1, 0)
    ]
    assert all_end(tasks) == [0, 0], tasks[0].text + tasks[1].text
    assert tasks[1].digest == whole and "2 x cpu" in tasks[1].text and tasks[0].text == ""


def test_killed_rank_is_named(halved: Run, whole: str) -> None:
    ranks = halved.start_ranks(2, "--resume", "auto", BYOLT_FAIL="step:6:SIGKILL:1")
    assert all_end(ranks) == [1, -signal.SIGKILL]
    assert "error: rank 0, step 6: rank 1 did not reach this step: it was killed" in ranks[0].text
    assert finish(halved) == whole


def test_stopped_rank_is_named_within_the_timeout(run: Run) -> None:
    """With three ranks, the stopped rank must be distinguished from one that waits."""
    start = time.monotonic()
    ranks = run.start_ranks(
        3, "train.batch_size=6", "train.timeout_minutes=0.2", BYOLT_FAIL="step:3:SIGSTOP:1"
    )
    assert [ranks[0].wait(), ranks[2].wait()] == [1, 1]
    waited = time.monotonic() - start
    ranks[1].signal(signal.SIGKILL)
    assert ranks[1].wait() == -signal.SIGKILL
    for rank in (0, 2):
        last = ranks[rank].text.splitlines()[-1]
        assert last.startswith(f"error: rank {rank}, step 3: rank 1 did not reach this step: "), ranks[
            rank
        ].text
    assert waited < 60


def test_first_error_is_the_last_line_of_every_rank(halved: Run, whole: str) -> None:
    ranks = halved.start_ranks(2, "--resume", "auto", BYOLT_FAIL="step:6:raise:1")
    assert all_end(ranks) == [1, 1]
    for process in ranks:
        assert process.text.splitlines()[-1] == "error: rank 1, step 6: fail-point step at 6"
    assert "Traceback" in ranks[1].text and "Traceback" not in ranks[0].text
    assert halved.leftovers() == [] and halved.newest()[1]["step"] == 6
    assert finish(halved) == whole


def test_torchrun_prints_the_first_error_last(run: Run) -> None:
    options = ["--standalone", "--nproc-per-node=2"]
    agent = run.start(before=functools.partial(become_torchrun, options), BYOLT_FAIL="step:2:raise:1")
    assert agent.wait() == 1
    end = agent.text[agent.text.rindex("Root Cause") :]
    assert "rank      : 1 " in end and "RuntimeError: fail-point step at 2" in end, agent.text
    assert run.leftovers() == []


def _no_data_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        sys.argv.append("data.path=/nowhere")


def _no_probe_on_rank_1() -> None:
    def make(*_: object) -> None:
        raise RuntimeError("broken on rank 1")

    if os.environ["RANK"] == "1":
        probe.make_probe = make  # type: ignore[assignment]


def _other_settings_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        sys.argv += ["train.epochs=4", "data.threads=2"]


def _other_data_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        copy = Path(shutil.copytree(os.environ["IMAGES"], f"{os.environ['IMAGES']}-older"))
        (copy / "a" / "00.jpg").unlink()
        sys.argv.append(f"data.path={copy}")


@pytest.mark.parametrize(
    ("before", "different"),
    [
        (_other_settings_on_rank_1, ["train.epochs: 3.0 on rank 0, 4.0 here"]),
        (_other_data_on_rank_1, ["data.fingerprint: "]),
    ],
)
def test_ranks_of_other_settings_or_data_are_refused(
    before: Callable[[], None], different: list[str], run: Run, images: Path
) -> None:
    ranks = run.start_ranks(2, before=before, IMAGES=str(images))
    assert all_end(ranks) == [1, 2]
    for process in ranks:
        first, *lines = process.text[process.text.index("error: ") :].splitlines()
        assert "rank 1 on " in first and first.endswith(
            "has other settings or images than rank 0; start all alike:"
        )
        assert [line[2 : 2 + len(text)] for line, text in zip(lines, different, strict=True)] == different
        assert "Traceback" not in process.text


@pytest.mark.parametrize(
    ("before", "said", "codes"),
    [
        (_no_data_on_rank_1, "error: rank 1: data.path: '/nowhere' does not exist", [1, 2]),
        (_no_probe_on_rank_1, "error: rank 1: broken on rank 1", [1, 1]),
    ],
)
def test_failure_before_the_loop_is_the_last_line_of_every_rank(
    before: Callable[[], None], said: str, codes: list[int], run: Run
) -> None:
    ranks = run.start_ranks(2, before=before)
    assert all_end(ranks) == codes
    for process in ranks:
        assert process.text.splitlines()[-1].startswith(said), process.text
        assert "gloo" not in process.text
    assert "Traceback" not in ranks[0].text


def test_a_run_of_several_ranks_is_not_written_among_its_images(run: Run, images: Path) -> None:
    ranks = run.start_ranks(2, f"run.out={images}/run")
    assert all_end(ranks) == [2, 2]
    for rank, process in enumerate(ranks):
        assert process.text.startswith(
            f"error: rank {rank}: run.out={images}/run is in data.path={images}, a folder"
        )
    assert not (images / "run").exists()


def test_rank_0_s_mistake_is_every_rank_s(halved: Run) -> None:
    ranks = halved.start_ranks(2)
    assert all_end(ranks) == [2, 2]
    for rank, process in enumerate(ranks):
        assert process.text.startswith(f"error: rank {rank}: run.out={halved.out} holds checkpoints"), (
            process.text
        )
        assert "Traceback" not in process.text


def _slow_data_on_rank_1() -> None:
    def take(self: Loader, plain: Callable = Loader._take) -> object:
        if os.environ["RANK"] == "1":
            time.sleep(0.3)
            self.waited += 0.3
        return plain(self)

    Loader._take = take  # type: ignore[method-assign,assignment]


def _slow_steps_on_rank_1() -> None:
    def run(self: TrainStep, views: list[torch.Tensor], plain: Callable = TrainStep._run) -> object:
        time.sleep(0.3 if os.environ["RANK"] == "1" else 0)
        return plain(self, views)

    TrainStep._run = run  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("before", [_slow_data_on_rank_1, _slow_steps_on_rank_1])
def test_straggler_is_named(before: Callable[[], None], run: Run) -> None:
    ranks = run.start_ranks(2, "train.stop_at_step=4", before=before)
    assert all_end(ranks) == [0, 0], ranks[0].text
    said = re.findall(
        r"^warning: step \d: the others wait for rank (\d) on (\S+): (.*)$", ranks[0].text, re.MULTILINE
    )
    assert said and {row[:2] for row in said} == {("1", socket.gethostname())}
    behind, data = map(float, re.findall(r"([0-9.]+) s ", said[-1][2]))
    assert behind > 0.1 and (data > 0.1) == (before is _slow_data_on_rank_1)


def _nan_on_rank_1() -> None:
    calls = [0]

    def forward(
        self: Online, view1: torch.Tensor, view2: torch.Tensor, plain: Callable = Online.forward
    ) -> object:
        calls[0] += 1
        if calls[0] == 3 and os.environ["RANK"] == "1":
            view1[2, 0, 3, 3] = float("nan")
        return plain(self, view1, view2)

    Online.forward = forward  # type: ignore[method-assign,assignment]


def test_nan_on_one_rank_stops_all_before_the_update(run: Run) -> None:
    ranks = run.start_ranks(2, before=_nan_on_rank_1)
    assert all_end(ranks) == [1, 1]
    # Synchronised statistics carry the NaN to both ranks' losses, so both shares of the batch are reported.
    bad = json.loads((run.out / "not-finite.json").read_text())
    assert [(row["step"], row["rank"]) for row in bad] == [(3, 0), (3, 1)]
    expected = global_batch(0, 0, 2, 32, 8).tolist()
    assert bad[0]["samples"] + bad[1]["samples"] == expected
    for process in ranks:
        assert "error: rank" in process.text and "not finite in step 3, rank 0, samples" in process.text
    path, before = run.newest()
    assert path.name == "checkpoint-000000002.pt"
    aside = checkpoint.load(run.out / "aside-000000003.pt")
    assert all(tensor.isfinite().all() for tensor in aside["model"].values())
    assert aside["model"].keys() == before["model"].keys()
    assert all(torch.equal(aside["model"][key], tensor) for key, tensor in before["model"].items())


def _list_ids() -> None:
    """Appends the sample ids of each micro-batch of this rank to a file of its own."""

    def take(self: Loader, plain: Callable = Loader._take) -> object:
        batch = plain(self)
        path = Path("{IDS}/ids-{RANK}-of-{WORLD_SIZE}.jsonl".format_map(os.environ))
        with path.open("a") as file:
            file.write(json.dumps(batch.id.tolist()) + "\n")
        return batch

    Loader._take = take  # type: ignore[method-assign,assignment]


def _break_an_image_and_unlink_late() -> None:
    """An image of rank 1's first batch reads as empty; corrupt.jsonl goes three seconds late."""
    number = int(global_batch(0, 0, 0, 32, 8)[4])

    def read(self: FolderSource, i: int, plain: Callable = FolderSource.read) -> bytes:
        return b"" if i == number else plain(self, i)

    def unlink(self: Path, missing_ok: bool = False, plain: Callable = Path.unlink) -> None:
        if self.name == "corrupt.jsonl":
            time.sleep(3)
        plain(self, missing_ok)

    FolderSource.read = read  # type: ignore[method-assign,assignment]
    Path.unlink = unlink  # type: ignore[method-assign,assignment]


def test_no_rank_lists_a_bad_image_before_the_old_list_is_gone(run: Run) -> None:
    run.out.mkdir()
    (run.out / "corrupt.jsonl").write_text('{"id": 7, "where": "an earlier attempt", "rank": 0}\n')
    options = ("data.resident=never", "train.stop_at_step=1")
    ranks = run.start_ranks(2, *options, before=_break_an_image_and_unlink_late)
    assert all_end(ranks) == [0, 0], ranks[0].text + ranks[1].text
    (row,) = (json.loads(line) for line in (run.out / "corrupt.jsonl").read_text().splitlines())
    assert (row["rank"], row["id"], row["reason"]) == (1, int(global_batch(0, 0, 0, 32, 8)[4]), "empty")
    assert ranks[0].text.count(f"1 corrupt image so far, replaced and listed in {run.out}/corrupt.jsonl") == 1


# 20 steps. Rounding stays rounding at this learning rate; at three times as much some ReLU's input, within rounding of 0,
# comes to lie on the other side after some steps, and the losses part by up to 4e-4 (measured).
SMOOTH = ("train.epochs=5", "train.batch_size=16", "optimizer.base_lr=0.1", "run.checkpoint_minutes=9")


def test_other_numbers_of_ranks_see_the_same_samples_and_the_same_loss(tmp_path: Path) -> None:
    """2, then 1, then 2 ranks, compared with 1 rank: the same order for 5 epochs, losses equal to rounding."""
    images = write_images(tmp_path / "images", 64)
    losses = []
    for name, segments in (("changing", ((2, 7), (1, 13), (2, 20))), ("alone", ((1, 20),))):
        (tmp_path / name).mkdir()
        run = Run(tmp_path / name, images)
        seen: list[list[int]] = []
        for ranks, stop in segments:
            ids = run.folder / f"ids-{stop}"
            ids.mkdir()
            options = ("--resume", "auto", *SMOOTH, f"train.stop_at_step={stop}")
            processes = run.start_ranks(ranks, *options, before=_list_ids, IDS=str(ids))
            assert all_end(processes) == [0] * ranks, processes[0].text
            files = [ids / f"ids-{rank}-of-{ranks}.jsonl" for rank in range(ranks)]
            parts = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
            seen += [list(chain.from_iterable(step)) for step in zip(*parts, strict=True)]
        assert seen == [global_batch(0, *position(step, 64, 16), 64, 16).tolist() for step in range(20)]
        losses.append(np.array([row["loss"] for row in run.rows()]))
    assert len(losses[0]) == len(losses[1]) == 20
    assert np.ptp(losses[1]) > 0.3  # it is a curve
    difference = np.abs(losses[0] / losses[1] - 1)
    print(f"largest relative difference {difference.max():.1e}, at step {difference.argmax() + 1}")
    assert difference.max() <= 1e-5
