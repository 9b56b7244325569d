"""Faults that a run of one process survives: kills, cut files, full disks, signals, a second run in its folder.

A run that continues after a fault must end with the digest of a run without faults.
"""

import functools
import json
import os
import pty
import random
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from whole_runs import ROOT, STEPS, Process, Run, digest_of, slow, write_images

from byolt.files.rows import read_rows
from byolt.model.byol import Online
from byolt.model.run import provenance
from byolt.pipelines.convert import verify
from byolt.tools.make_shards import main as make_shards
from byolt.tools.verify_shards import main as verify_shards

pytestmark = pytest.mark.faults
HALF = 4  # steps of the interrupted run: one epoch


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "dst"
    assert make_shards([str(images), str(folder), "--workers", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Process:
    """A run of 12 steps without faults."""
    process = Run(tmp_path_factory.mktemp("whole"), images)()
    assert process.wait() == 0, process.text
    return process


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """Folder of a run that was stopped after its first epoch; checkpoints of steps 3 and 4."""
    run = Run(tmp_path_factory.mktemp("half"), images)
    assert run(f"train.stop_at_step={HALF}").wait() == 0
    return run.out


@pytest.fixture
def run(tmp_path: Path, images: Path) -> Run:
    return Run(tmp_path, images)


@pytest.fixture
def halved(run: Run, half: Path) -> Run:
    """A copy of the stopped run, to continue."""
    shutil.copytree(half, run.out)
    return run


def finish(run: Run, *arguments: str) -> Process:
    process = run("--resume", "auto", *arguments)
    assert process.wait() == 0, process.text
    assert run.leftovers() == []
    return process


def steps_logged(run: Run) -> list[int]:
    return [row["step"] for row in run.rows()]


def test_killed_at_five_random_steps(run: Run, whole: Process) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    for step in sorted(random.Random(seed).sample(range(1, STEPS), 5)):
        process = run.start("--resume", "auto")
        process.wait_for(rf"^step {step}/")
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert finish(run).digest == whole.digest
    assert steps_logged(run) == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("where", "written"),
    [
        ("checkpoint write:300:SIGKILL", (0.1, 0.9)),
        ("rename checkpoint-000000005.pt:0:SIGKILL", (0.99, 1.01)),
    ],
)
def test_killed_while_writing_a_checkpoint(
    where: str, written: tuple[float, float], halved: Run, whole: Process
) -> None:
    assert halved("--resume", "auto", BYOLT_FAIL=where).wait() == -signal.SIGKILL
    (half_written,) = halved.out.glob(".checkpoint-*.byolt-tmp")
    assert written[0] < half_written.stat().st_size / halved.newest()[0].stat().st_size < written[1]
    process = finish(halved)
    assert f"checkpoint-000000004.pt: steps {HALF} to" in process.text
    assert process.digest == whole.digest


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-1000],
    "flipped": lambda data: data[:2_000_000] + bytes([data[2_000_000] ^ 1]) + data[2_000_001:],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_checkpoint_is_named_and_the_one_before_used(
    damage: Callable[[bytes], bytes], halved: Run, whole: Process
) -> None:
    newest = halved.newest()[0]
    newest.write_bytes(damage(newest.read_bytes()))
    process = finish(halved)
    assert f"warning: checkpoint {newest} is " in process.text and "skipped" in process.text
    assert f"resumed from {halved.out}/checkpoint-000000003.pt: steps 3 to" in process.text
    assert process.digest == whole.digest


def test_stopped_between_epochs_nothing_is_repeated_or_skipped(halved: Run, whole: Process) -> None:
    assert finish(halved).digest == whole.digest
    assert steps_logged(halved) == list(range(1, STEPS + 1))


def test_signal_in_the_last_step_and_a_finished_run(halved: Run, whole: Process) -> None:
    process = halved("--resume", "auto", BYOLT_FAIL=f"step:{STEPS - 1}:SIGTERM")
    assert process.wait() == 0 and process.digest == whole.digest
    again = finish(halved)
    assert f"nothing left to train: step {STEPS} is the last" in again.text
    assert again.digest == whole.digest
    assert steps_logged(halved) == list(range(1, STEPS + 1))


def test_signal_during_import_ends_before_any_work(run: Run, whole: Process) -> None:
    command = [sys.executable, *run.arguments()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        env={**environment, "BYOLT_FAIL": "import:0:SIGTERM"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stderr.startswith("stopped by SIGTERM before the first step: nothing was trained")
    assert done.stdout == "" and not run.out.exists()
    assert finish(run).digest == whole.digest


@pytest.mark.parametrize(
    ("number", "place", "settings"),
    [
        (signal.SIGTERM, "byolt.pipelines.formats.folder.inspect", []),  # opening: 16 s
        (
            signal.SIGUSR1,
            "byolt.pipelines.resident.decode",
            ["data.backend=auto", "data.resident=always"],
        ),  # 16 s
        (signal.SIGINT, "byolt.pipelines.plain._stack", ["eval.path=IMAGES"]),  # kNN: three batches
    ],
    ids=["opening", "decoding", "kNN"],
)
def test_signal_before_the_first_step(
    number: int, place: str, settings: list[str], run: Run, images: Path
) -> None:
    settings = [text.replace("IMAGES", str(images)) for text in settings]
    process = run.start(*settings, before=functools.partial(slow, place))
    process.wait_for("^slow$")
    process.signal(number)
    assert process.wait(8) == 128 + number
    name = signal.Signals(number).name
    assert f"stopped by {name} before the first step: nothing was trained; the same command" in process.text
    assert not re.search("error|digest|kNN top-1", process.text)
    assert not list(run.out.glob("checkpoint-*")) and not list(run.folder.rglob("*.byolt-tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_once_and_ends(number: int, halved: Run, whole: Process) -> None:
    process = halved.start("--resume", "auto", "run.checkpoint_minutes=9")
    process.wait_for(f"^step {HALF + 2}/")
    process.signal(number)
    assert process.wait(10) == 128 + number
    path, state = halved.newest()
    assert state["step"] >= HALF + 2
    assert process.digest == digest_of(state)
    assert f"stopped by {signal.Signals(number).name} at step {state['step']}" in process.text
    assert len(list(halved.out.glob("checkpoint-*.pt"))) == 2  # the one it began with, and one more
    assert path.name == f"checkpoint-{state['step']:09d}.pt"
    assert finish(halved).digest == whole.digest


def _print_to(path: str) -> None:
    """Output goes to a named pipe, or to a terminal, which is then that of the process."""
    os.setsid()
    output = os.open(path, os.O_RDWR if path.startswith("/dev/") else os.O_WRONLY)
    for number in (1, 2):
        os.dup2(output, number)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGPIPE], ids=["terminal", "pipe"])
def test_run_whose_terminal_or_reader_has_gone_saves_once(number: int, halved: Run, whole: Process) -> None:
    if number == signal.SIGHUP:
        reader, terminal = pty.openpty()
        path = os.ttyname(terminal)
    else:
        os.mkfifo(path := str(halved.folder / "pipe"))
        reader = os.open(path, os.O_RDWR)
    process = halved.start(
        "--resume", "auto", "run.checkpoint_minutes=9", before=functools.partial(_print_to, path)
    )
    said = b""
    while b"loss" not in said:
        assert select.select([reader], [], [], 60)[0], said
        said += os.read(reader, 4096)
    if number == signal.SIGHUP:
        os.close(terminal)
    os.close(reader)
    assert process.wait(10) == 128 + number
    _, state = halved.newest()
    assert HALF < state["step"] < STEPS
    assert len(list(halved.out.glob("checkpoint-*.pt"))) == 2
    assert finish(halved).digest == whole.digest


def test_changed_settings_are_refused_with_their_difference(halved: Run, tmp_path: Path) -> None:
    other = write_images(tmp_path / "other", 30)
    changes = (
        "train.batch_size=4",
        "run.seed=1",
        f"data.path={other}",
        "augment.view1.blur=0.5",
        "model.backbone=resnet18",
    )
    process = halved("--resume", "auto", *changes)
    assert process.wait() == 2
    for line in (
        "augment.view1.blur: 1.0 in the checkpoint, 0.5 now",
        "data.fingerprint: ",
        "model.backbone: resnet8 in the checkpoint, resnet18 now",
        "run.seed: 0 in the checkpoint, 1 now",
        "train.batch_size: 8 in the checkpoint, 4 now",
    ):
        assert f"\n  {line}" in process.text
    assert "begin a new run (another network cannot continue it)" in process.text
    assert halved.newest()[1]["step"] == HALF
    insisted = halved("--resume", "auto", "run.seed=1", "--allow-change", "run.seed", "train.stop_at_step=5")
    assert insisted.wait() == 0


def test_overwritten_images_are_refused_on_resume(halved: Run, images: Path, tmp_path: Path) -> None:
    """By others of equal length, header and time."""
    copied = shutil.copytree(images, tmp_path / "copied")
    assert halved("--resume", "auto", f"data.path={copied}", f"train.stop_at_step={HALF + 1}").wait() == 0
    for path in copied.rglob("*.jpg"):
        data, before = path.read_bytes(), path.stat()
        path.write_bytes(data[:-50] + bytes(48) + data[-2:])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    process = halved("--resume", "auto", f"data.path={copied}")
    assert process.wait() == 2
    assert f"(data.path={copied} holds other images or labels than the run was trained on)" in process.text
    assert halved.newest()[1]["step"] == HALF + 1


def _nan_from_step_6() -> None:
    """Poisons one pixel of the first view from the sixth step on."""
    calls = [HALF]

    def forward(
        self: Online, view1: torch.Tensor, view2: torch.Tensor, plain: Callable = Online.forward
    ) -> object:
        calls[0] += 1
        if calls[0] == HALF + 2:
            view1[2, 0, 3, 3] = float("nan")
        return plain(self, view1, view2)

    Online.forward = forward  # type: ignore[method-assign,assignment]


def test_nan_sets_a_finite_state_aside_and_names_the_samples(halved: Run) -> None:
    process = halved("--resume", "auto", "run.log_every=50", before=_nan_from_step_6)
    assert process.wait() == 1
    (bad,) = json.loads((halved.out / "not-finite.json").read_text())
    assert (bad["step"], bad["rank"], len(bad["samples"])) == (6, 0, 8)
    assert f"not finite in step 6, rank 0, samples {', '.join(map(str, bad['samples']))} ..." in process.text
    aside = halved.out / "aside-000000006.pt"
    again = halved("--resume", str(aside))
    assert again.wait() == 0, again.text
    assert "steps 6 to 12" in again.text


def test_collapse_warns_or_stops_the_run(run: Run) -> None:
    """Only projections spread over the whole sphere reach the threshold of 1."""
    process = run("train.stop_at_step=2", "train.collapse_std=1")
    assert process.wait() == 0
    assert "warning: step 1: collapse: the projections' standard deviation is 0." in process.text
    process = run("--resume", "auto", "train.collapse_std=1", "train.on_collapse=stop")
    assert process.wait() == 1
    assert "step 3: collapse: " in process.text and run.newest()[1]["step"] == 3
    process = run(
        "--resume", "auto", "train.stop_at_step=4", "train.collapse_std=1", "train.on_collapse=ignore"
    )
    assert process.wait() == 0 and "collapse: " not in process.text
    process = run("--resume", "auto", "train.stop_at_step=5")
    assert process.wait() == 0 and "collapse: " not in process.text


@pytest.mark.parametrize(
    ("arguments", "threads", "changed"),
    [
        ((), 1, []),
        ((), 2, ["OMP_NUM_THREADS: 1 -> 2"]),
        (("train.channels_last=false",), 1, ["train.channels_last: True -> False"]),
        (("train.precision=bf16",), 1, ["train.precision: fp32 -> bf16"]),
        (("data.backend=auto", "data.resident=never"), 1, ["data.backend: TorchBackend -> DaliBackend"]),
        (
            ("optimizer.backend=foreach", "train.precision=fp32", "train.device=auto"),
            1,
            [],
        ),  # the same as auto
    ],
)
def test_resumed_run_says_why_it_is_no_longer_the_same_to_the_bit(
    arguments: tuple[str, ...], threads: int, changed: list[str], halved: Run
) -> None:
    if "data.backend=auto" in arguments:
        pytest.importorskip("nvidia.dali")
    before = functools.partial(torch.set_num_threads, threads)
    process = halved(
        "--resume", "auto", "train.stop_at_step=5", *arguments, before=before, OMP_NUM_THREADS=str(threads)
    )
    assert process.wait() == 0, process.text
    warnings = [line for line in process.text.splitlines() if line.startswith("warning: ")]
    warning = f"warning: the run continues, but no longer to the bit: {'; '.join(changed)}"
    assert warnings == ([warning] if changed else [])
    assert [start["changed"] for start in read_rows(halved.out / provenance.FILE)] == [[], changed]
    assert halved.newest()[1]["rounding"]["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize("what", ["truncated", "replaced", "deleted"])
def test_shard_damaged_during_a_run(what: str, tmp_path: Path, images: Path) -> None:
    assert make_shards([str(images), str(tmp_path / "shards"), "--workers", "1"]) == 0
    run = Run(tmp_path, tmp_path / "shards")
    process = run.start("data.resident=never", "train.epochs=1000")
    process.wait_for("^step 2/")
    shard = tmp_path / "shards/shard-000000.tar"
    if what == "truncated":
        os.truncate(shard, 600)
        assert process.wait() == 1
        assert f"error: rank 0, step {run.newest()[1]['step']}: {shard} offset " in process.text
        assert "bytes: the shard was cut since it was opened" in process.text
        return
    if what == "replaced":
        (tmp_path / "other.tar").write_bytes(bytes(shard.stat().st_size))
        (tmp_path / "other.tar").replace(shard)
    else:
        shard.unlink()
    process.wait_for("^step 12/")  # it reads on from the file that it opened
    process.signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    assert not (run.out / "corrupt.jsonl").exists()


def test_make_shards_while_a_run_reads_dst(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused or harmless, even where DST is removed and made of other images; resuming on those is refused."""
    dst = tmp_path / "shards"
    again = [str(images), str(dst), "--workers", "1"]
    assert make_shards(again) == 0
    (tmp_path / "whole").mkdir()
    undisturbed = Run(tmp_path / "whole", dst)()
    run = Run(tmp_path, dst)
    process = run.start("run.checkpoint_minutes=9")
    process.wait_for("^step 2/")
    process.signal(signal.SIGSTOP)
    assert make_shards(again) == 0 and "already done" in capsys.readouterr().out
    assert make_shards([*again, "--quality", "50"]) == 2
    assert "holds a finished data set: quality was 95, now 50" in capsys.readouterr().err
    assert make_shards([str(dst), "--index"]) == 2
    (dst / "manifest.json").rename(tmp_path / "manifest.json")
    assert make_shards(again) == 2
    assert "already holds shard-000000.tar without a manifest" in capsys.readouterr().err
    shutil.rmtree(dst)
    others = write_images(tmp_path / "others", 40)
    assert make_shards([str(others), str(dst), "--workers", "1"]) == 0
    process.signal(signal.SIGCONT)
    assert process.wait() == 0, process.text
    assert process.digest == undisturbed.digest
    assert not (run.out / "corrupt.jsonl").exists()
    assert run("--resume", "auto").wait() == 2


MOMENTS = ("sha256_of", "index_tar", "_check_sample")
REPLACED: dict[str, Callable[[Path], object]] = {
    "by another": lambda shard: (shard.parent.parent / "other.tar").replace(shard),
    "by a folder": lambda shard: (shard.unlink(), shard.mkdir()),
    "removed": Path.unlink,
    "cut": lambda shard: os.truncate(shard, 600),
    "emptied": lambda shard: os.truncate(shard, 0),
    "overwritten": lambda shard: shard.write_bytes(bytes(shard.stat().st_size)),
}


@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_verify_names_a_shard_that_is_replaced_meanwhile(
    moment: str,
    when: str,
    how: str,
    tmp_path: Path,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shard = shutil.copytree(shards, tmp_path / "dst") / "shard-000000.tar"
    shutil.copy(shard, tmp_path / "other.tar")  # the same content in another file
    plain, replaced = getattr(verify, moment), []

    def replace() -> None:
        if not replaced:
            replaced.append(REPLACED[how](shard))

    def disturbed(*arguments: object) -> object:
        if when == "before":
            replace()
        try:
            return plain(*arguments)
        finally:
            replace()

    monkeypatch.setattr(verify, moment, disturbed)
    assert verify_shards([str(tmp_path / "dst"), "--workers", "1"]) == 1
    assert replaced and str(shard) in capsys.readouterr().err


@pytest.mark.parametrize("where", ["checkpoint write:300:ENOSPC", "rename checkpoint-000000006.pt:0:ENOSPC"])
def test_full_disk_while_saving_stops_the_run(where: str, halved: Run, whole: Process) -> None:
    process = halved("--resume", "auto", BYOLT_FAIL=where)
    assert process.wait() == 1
    assert "No space left on device" in process.text and "Traceback" not in process.text
    assert halved.leftovers() == []
    assert halved.newest()[1]["step"] == (5 if "rename" in where else HALF)
    assert finish(halved).digest == whole.digest


@pytest.mark.parametrize("where", ["rename checkpoint-000000006.pt:0:ENOSPC", "log:6:ENOSPC"])
def test_run_may_continue_on_a_full_disk(where: str, halved: Run, whole: Process) -> None:
    process = halved("--resume", "auto", "run.on_write_error=continue", BYOLT_FAIL=where)
    assert process.wait() == 0 and process.digest == whole.digest
    assert "warning: step 6: " in process.text
    assert "No space left on device; continuing" in process.text
    assert halved.leftovers() == []
    logged = [step for step in range(1, STEPS + 1) if "log" not in where or step != 6]
    assert steps_logged(halved) == logged


def test_full_disk_while_logging_stops_the_run(halved: Run, whole: Process) -> None:
    process = halved("--resume", "auto", BYOLT_FAIL="log:6:ENOSPC")
    assert process.wait() == 1
    assert "error: rank 0, step 6: [Errno 28] No space left on device" in process.text
    assert finish(halved).digest == whole.digest


def mounted(*commands: str) -> subprocess.CompletedProcess[str]:
    """Runs the first command, a mount, and the others in a mount namespace of their own."""
    if subprocess.run(
        ["unshare", "-rm", "sh", "-c", commands[0]], capture_output=True, check=False
    ).returncode:
        pytest.skip("no file system can be mounted here")
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", "; ".join(commands)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_disk_that_is_really_full(run: Run) -> None:
    """A file system of 9 MB: two checkpoints fit, the temporary of a third does not."""
    run.out.mkdir()
    train = shlex.join([sys.executable, *run.arguments()])
    mount = f"mount -t tmpfs -o size=9m none {run.out}"
    done = mounted(mount, train, "echo code $?", f"cd {run.out}", "ls -A")
    assert "code 1\n" in done.stdout, done.stderr
    assert "checkpoint-000000003.pt cannot be written, " in done.stderr
    left = done.stdout.splitlines()
    assert [name for name in left if "checkpoint" in name] == [f"checkpoint-00000000{k}.pt" for k in (1, 2)]


def test_shared_memory_of_1_mb(run: Run, images: Path, whole: Process) -> None:
    """A container's /dev/shm may be that small: no process of ours needs more."""
    convert = [ROOT / "tools/make_shards.py", images, run.folder / "shards", "--workers", "2"]
    programs = ([*map(str, convert), "--split", "a=.5,b=.5"], run.arguments())
    commands = [shlex.join([sys.executable, *program]) for program in programs]
    done = mounted("mount -t tmpfs -o size=1m none /dev/shm", *commands)
    assert done.stdout.startswith(f"{run.folder}/shards: 16 + 16 samples in 2 shards"), done.stderr
    assert done.stdout.endswith(f"digest: step {whole.digest.replace(' ', ' sha256 ')}\n"), done.stderr


@pytest.mark.parametrize("place", ["/proc/byolt", "FILE", "FILE/run"])
def test_folder_that_cannot_be_written_is_named_before_the_first_step(place: str, run: Run) -> None:
    (run.folder / "file").write_text("")
    place = place.replace("FILE", str(run.folder / "file"))
    process = run(f"run.out={place}")
    assert process.wait() == 2
    assert process.text.startswith(f"error: run.out={place} cannot be written: ")
    assert "Traceback" not in process.text


def test_folder_moved_during_a_run(run: Run) -> None:
    process = run.start()
    process.wait_for("^step 2/")
    run.out.rename(run.folder / "moved")
    assert process.wait() == 1
    assert re.search(rf"^error: rank 0, step \d+: .*{run.out}/", process.text, re.M)
    assert "Traceback" not in process.text


def test_second_run_in_a_folder_is_refused(run: Run, whole: Process) -> None:
    first = run.start()
    first.wait_for("^step 2/")
    first.signal(signal.SIGSTOP)
    second = run("--resume", "auto")
    assert second.wait() == 2
    assert f"run.out={run.out} is in use by pid {first.pid} on {socket.gethostname()}" in second.text
    first.signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    process = finish(run)
    assert f"took over {run.out}/run.lock from pid {first.pid}" in process.text
    assert process.digest == whole.digest
