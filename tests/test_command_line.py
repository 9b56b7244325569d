"""Mistakes on the command line and in the environment are answered with the right command, before torch is imported."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from byolt.configs import command_line
from byolt.configs.command_line import SettingsParser, check_resume, world_size
from byolt.tools.environment import rest_idle_threads

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ["train.py", *(f"tools/{path.name}" for path in sorted((ROOT / "tools").glob("*.py")))]
COMMANDS = [name for name in COMMANDS if not name.endswith(("__init__.py", "environment.py"))]
RANKS = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1",
}  # fmt: skip
QUICKSTART = str(ROOT / "configs/quickstart.yaml")


def start(
    program: str, *arguments: str, tmp_path: Path, python: tuple[str, ...] = (), **variables: str
) -> tuple[int, str]:
    """Runs a program where torch cannot be imported; returns the exit code and the standard error."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    done = subprocess.run(
        [sys.executable, *python, str(ROOT / program), *arguments],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr and "torch was imported" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("--batch_size 64", "--batch_size: settings are written without dashes: train.batch_size=64"),
        ("--batch-size=64", "--batch-size: settings are written without dashes: train.batch_size=64"),
        ("--train.epochs 3 --what", "--train.epochs: settings are written without dashes: train.epochs=3"),
        ("--lr data.path=x", "--lr: settings are written without dashes: optimizer.base_lr=VALUE"),
        ("--data=/x", "--data: settings are written without dashes: data.path=/x"),
        ("--resum auto --resumme auto", "--resumme: no such option; did you mean --resume?"),
        ("--zzzzzzzzz", "unrecognized arguments: --zzzzzzzzz"),
        ("--resume", "argument --resume: expected one argument"),
    ],
)
def test_a_setting_with_dashes(
    given: str, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = SettingsParser()
    parser.add_argument("--config")
    parser.add_argument("--resume")
    parser.add_argument("overrides", nargs="*")
    monkeypatch.setattr(sys, "argv", ["train.py", *given.split()])
    with pytest.raises(SystemExit) as exit:
        parser.parse_intermixed_args()
    assert exit.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {answer}")


def test_no_argument_at_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parser = SettingsParser()
    parser.add_argument("--config", required=True)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as exit:
        parser.parse_intermixed_args()
    assert exit.value.code == 2 and "are required: --config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        ({"SLURM_NTASKS": "2"}, "torchrun --nproc-per-node=2 train.py 'data.path=a b'"),
        ({"SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "4"}, "torchrun --nproc-per-node=4 train.py"),
        (
            {"SLURM_STEP_NUM_TASKS": "16", "SLURM_NNODES": "2"},
            "srun --nodes=2 --ntasks=2 torchrun --nnodes=2 --nproc-per-node=8 ",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "torchrun --nproc-per-node=2 train.py"),
    ],
)
def test_tasks_without_ranks_are_refused(
    variables: dict[str, str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_NNODES", "SLURM_STEP_NUM_NODES", *command_line._LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "data.path=a b"])
    assert world_size() == 1
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"there is no RANK|cannot join as ranks: SLURM_JOB_ID, ") as caught:
        world_size()
    assert command in str(caught.value)
    single = "without mpirun" if "OMPI_COMM_WORLD_SIZE" in variables else "with srun --ntasks=1"
    assert f"a single process {single}:\n" in str(caught.value)
    for name, value in RANKS.items():  # srun's tasks are torchrun's
        monkeypatch.setenv(name, value)
    assert world_size() == 8


@pytest.mark.parametrize("name", command_line._LAUNCHERS)
@pytest.mark.parametrize("tasks", ["0", "abc", "", "-1"])
def test_a_number_of_tasks_that_is_not_valid(name: str, tasks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("RANK", "WORLD_SIZE", *command_line._LAUNCHERS):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, tasks)
    with pytest.raises(
        ValueError, match=f"{name}={tasks} is not a valid number of tasks: .* unset {name} for a"
    ):
        world_size()
    for key, value in RANKS.items():
        monkeypatch.setenv(key, value)
    assert world_size() == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": None}, "environment variables RANK are not set though LOCAL_RANK is; start with torchrun"),
        ({"LOCAL_RANK": None, "MASTER_PORT": None}, "LOCAL_RANK, MASTER_PORT are not set though RANK is"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR are not set though RANK is"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT=abc is not a port from 1 to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is not a port from 1 to 65535"),
        ({"RANK": "8"}, "RANK=8 is not a number below WORLD_SIZE=8: use torchrun"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x is not a number below WORLD_SIZE=8: use torchrun"),
        (
            {"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"},
            "LOCAL_RANK=4 is not a number below LOCAL_WORLD_SIZE=4: use",
        ),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is not a valid number of ranks"),
    ],
)
def test_incomplete_variables_of_torchrun(change: dict[str, str | None], said: str) -> None:
    environment = {name: value for name, value in (RANKS | change).items() if value is not None}
    with pytest.raises(ValueError, match=said):
        command_line.torchrun_ranks(environment)


def test_one_task_of_a_larger_job_is_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert world_size() == 1


def test_train_refuses_tasks_without_ranks_before_torch(tmp_path: Path) -> None:
    began = time.monotonic()
    code, error = start("train.py", "--config", QUICKSTART, tmp_path=tmp_path, SLURM_NTASKS="2")
    assert code == 2 and f"torchrun --nproc-per-node=2 {ROOT / 'train.py'} --config" in error
    assert time.monotonic() - began < 30  # it takes half a second; the bound detects a hang


@pytest.mark.parametrize("program", COMMANDS)
def test_a_forgotten_environment_is_one_line(program: str, tmp_path: Path) -> None:
    code, error = start(program, "--help", tmp_path=tmp_path, python=("-S",), PYTHONPATH="")
    assert code == 1 and error.count("\n") == 1  # -S: without site-packages
    assert "error: No module named" in error and ". .venv/bin/activate" in error


def test_a_missing_module_of_our_own_has_its_traceback() -> None:
    code = "import byolt.tools.environment, byolt.files.nowhere"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "activate" not in done.stderr


@pytest.mark.parametrize(
    ("users", "found"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_how_idle_threads_wait_is_the_users_choice(users: dict[str, str], found: dict[str, str]) -> None:
    rest_idle_threads(users)
    assert users == found


@pytest.mark.parametrize(
    "command",
    [
        ["train.py", "--config", QUICKSTART, "data.path=synthetic:64:8x8", "eval.path=null", "run.out=run"],
        ["tools/bench.py"],
        ["-m", "byolt.tools.bench"],
    ],
    ids=lambda words: words[-1],
)
def test_idle_threads_rest_before_torch_reads_how(command: list[str], tmp_path: Path) -> None:
    """Each stops where it imports torch, which here shows the setting that OpenMP would read."""
    (tmp_path / "torch.py").write_text("import os\nos._exit(int(os.environ['GOMP_SPINCOUNT']) // 10)")
    variables = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    program = command if command[0] == "-m" else [str(ROOT / command[0]), *command[1:]]
    done = subprocess.run(
        [sys.executable, *program], env={**variables, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, cwd=tmp_path
    )
    assert done.returncode == 100


@pytest.mark.parametrize("key", ["data.path", "eval.path"])
def test_a_wrong_data_path_is_refused_before_torch(key: str, tmp_path: Path) -> None:
    code, error = start(
        "train.py", "--config", QUICKSTART, "data.path=synthetic:9:8x8", f"{key}=photos", tmp_path=tmp_path
    )
    assert (code, error.split(":")[:2]) == (2, ["error", f" {key}"])
    assert f"'photos' does not exist in {tmp_path}" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (
            "evaluate.py x.pt",
            "x.pt cannot be read: no such file; give a run's folder, or a checkpoint-*.pt or encoder.safetensors",
        ),
        ("evaluate.py .", ". has no encoder: it holds neither encoder.safetensors nor a checkpoint-*.pt"),
        ("evaluate.py torch.py --protocol knn --data photos", "--data: 'photos' does not exist in "),
        ("evaluate.py torch.py --protocol knn --lr 1", "--lr is an option of --protocol linear and finetune"),
        (
            "evaluate.py torch.py --train ./photos --data photos",
            "--train ./photos and --data photos hold the same images",
        ),
        ("report.py nowhere", "nowhere is not a folder; give the run.out of a run"),
        ("report.py .", ". holds neither metrics.jsonl nor a checkpoint; give the run.out of a run"),
    ],
)
def test_mistakes_of_the_tools_are_told_before_torch(command: str, answer: str, tmp_path: Path) -> None:
    code, error = start(f"tools/{command.split()[0]}", *command.split()[1:], tmp_path=tmp_path)
    assert code == 2 and answer in error.splitlines()[-1]


def test_resume_names_a_checkpoint(tmp_path: Path) -> None:
    for name in ("checkpoint-000000002.pt", "encoder.safetensors"):
        (tmp_path / name).touch()
    for accepted in (None, "auto", str(tmp_path / "checkpoint-000000002.pt")):
        check_resume(accepted)
    for path, problem in (
        (
            tmp_path,
            f"is a folder: use --resume auto with run.out={tmp_path}, or name a checkpoint-*.pt in it",
        ),
        (tmp_path / "encoder.safetensors", "is an exported encoder, not a checkpoint: name a checkpoint-"),
        (tmp_path / "nowhere.pt", "does not exist: name a checkpoint-"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"--resume {path} {problem}")):
            check_resume(str(path))


@pytest.mark.slow
def test_print_config_decides_and_estimates_without_torch(tmp_path: Path) -> None:
    own = str(ROOT / "configs/own_images.yaml")
    code, error = start(
        "train.py", "--config", own, "data.path=synthetic:250:32x32", "--print-config", tmp_path=tmp_path
    )
    assert (code, error) == (0, "")
