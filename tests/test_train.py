"""train.py as its users run it: whole runs on a few tiny images."""

import contextlib
import errno
import gc
import io
import json
import os
import re
import shutil
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call, patch

import numpy as np
import pytest
import torch
import whole_runs
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from byolt import train
from byolt.files.machine import Device
from byolt.files.stop import SIGNALS
from byolt.model.byol import Online
from byolt.model.quality.features import calibrate_batch_norm
from byolt.model.resnet import make_encoder
from byolt.model.run import checkpoint, provenance
from byolt.model.run.guard import FiniteCheck
from byolt.model.run.run import Run as TrainingRun
from byolt.model.step import TrainStep
from byolt.pipelines.loader import Loader
from byolt.pipelines.order import global_batch
from byolt.pipelines.sources import Source, open_source
from byolt.tools.make_shards import main as make_shards

ROOT = Path(__file__).resolve().parent.parent
TINY = """
run: {out: OUT, log_every: 2, keep_checkpoints: 2}
data: {path: DATA/train, backend: BACKEND, threads: 1, resident: never}
augment:
  size: 16
  view1: {blur: 1.0, solarize: 0.0}
  view2: {blur: 0.1, solarize: 0.2}
model: {backbone: resnet8, stem: cifar, projector_hidden: 16, projector_size: 8, predictor_hidden: 16}
optimizer: {base_lr: 1.0, warmup_epochs: 0.5, weight_decay: 1.0e-6, base_tau: 0.9}
train: {epochs: 2, batch_size: 8, device: cpu}
eval: {path: DATA/val, every_epochs: 1, k: 5}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 16 training and 4 validation JPEGs."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for label in ("a", "b"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{i}.jpg")
    return root


class Run:
    """A config in a folder of its own, and how to start train.py on it."""

    def __init__(self, folder: Path, images: Path, backend: str = "torch") -> None:
        self.out, self.config = folder / "run", folder / "tiny.yaml"
        text = TINY.replace("OUT", str(self.out)).replace("DATA", str(images)).replace("BACKEND", backend)
        self.config.write_text(text)

    def arguments(self, *arguments: str) -> list[str]:
        return [str(ROOT / "train.py"), "--config", str(self.config), *arguments]

    def __call__(self, *arguments: str, drawn: bool = False) -> SimpleNamespace:
        """train.main() within this process: it spares the seconds that importing torch takes."""
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        stdout, stderr = io.StringIO(), io.StringIO()
        try:
            with (
                redirect_stdout(stdout),
                redirect_stderr(stderr),
                patch.object(sys, "argv", self.arguments(*arguments)),
                contextlib.nullcontext() if drawn else whole_runs.not_drawn(),
            ):
                code = train.main()
        finally:
            torch.set_num_threads(1)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    def weights(self) -> dict[str, torch.Tensor]:
        return checkpoint.load_newest(self.out)[1]["model"]


@pytest.fixture
def run(tmp_path: Path, images: Path) -> Run:
    return Run(tmp_path, images)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, images: Path) -> tuple[Run, SimpleNamespace]:
    """One whole run of 8 steps, on DALI if it is installed."""
    run = Run(tmp_path_factory.mktemp("finished"), images, backend="auto")
    return run, run(drawn=True)


def test_whole_run_leaves_what_it_promises(finished: tuple[Run, SimpleNamespace]) -> None:
    run, done = finished
    assert done.returncode == 0, done.stderr
    assert re.search(r"^kNN top-1: \d+\.\d % before training, \d+\.\d % after$", done.stdout, re.M)
    assert re.search(r"^step 0  kNN top-1 \d+\.\d % \(before training\)$", done.stderr, re.M)
    assert "data.backend=auto" in done.stderr and "step 8/8" in done.stderr
    assert len(re.findall(r"at this speed 8 steps take \d+ s", done.stderr)) == 1
    assert done.stderr.index("step 2/8") < done.stderr.index("at this speed") < done.stderr.index("step 4/8")
    rows = re.findall(r"^step \d/8  (epoch .*)  ETA", done.stderr, re.M)
    assert len(rows) == 5 and all(len(f"step 312784  {row}") <= 80 for row in rows)
    for name in ("views.png", "loss.png"):
        assert Image.open(run.out / name).width > 300
    steps = [row for row in run.rows() if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 4, 6, 8]
    assert all(0 < row["loss"] < 4.5 and row["images_per_second"] > 0 for row in steps)
    assert all(0 <= row["prediction_cosine"] <= 1 and row["prediction_std"] > 0 for row in steps)
    assert [row["step"] for row in run.rows() if "knn_top1" in row] == [0, 4, 8]
    assert list((run.out / "tensorboard").iterdir())


def test_untrained_encoder_is_calibrated_once_and_in_a_copy(run: Run) -> None:
    """Of all evaluations the first only: the others' batch norm has statistics of its own."""
    calls = []

    def calibrate(encoder: torch.nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        seen = list(batches)
        calibrate_batch_norm(encoder, seen)
        changed = [
            name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, before[name])
        ]
        calls.append(
            (before["bn1.num_batches_tracked"].item(), sum(len(labels) for _, labels in seen), changed)
        )

    with patch("byolt.model.quality.features.calibrate_batch_norm", calibrate):
        assert run("train.stop_at_step=4").returncode == 0
    ((tracked, images, changed),) = calls
    assert (tracked, images) == (0, 32) and "bn1.running_mean" in changed
    # One step tracks two views; the calibration's batch is not among them.
    assert run.weights()["online.encoder.bn1.num_batches_tracked"].item() == 8


@pytest.mark.parametrize("given", [None, "1"])
def test_threads_that_the_user_chose_are_kept(
    given: str | None, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    with patch.object(torch, "set_num_threads") as chosen:
        assert run("train.stop_at_step=1").returncode == 0
    by_train = [] if given else [call(len(os.sched_getaffinity(0)))]
    assert chosen.mock_calls == [*by_train, call(1)]  # the last is this file's own, after each run


def test_labels_that_are_ids_end_knn_but_not_training(run: Run, images: Path) -> None:
    """A run that did not ask for labels survives 10^12 classes; kNN is refused before the first step."""

    def stamped(path: str, *_: object) -> Source:
        source = open_source(path)
        source.labels, source.classes = source.labels + 10**12, None
        return source

    with patch("byolt.pipelines.sources.open_source", stamped):
        done = run("eval.path=null", "train.stop_at_step=2")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("no online probe: the largest label is 1,000,000,000,001") == 1
        assert not any("probe_top1" in row for row in run.rows())
        shutil.rmtree(run.out)
        refused = run("train.stop_at_step=2")
        assert refused.returncode == 2
        assert "error: " in refused.stderr and "the largest label is 1,000,000,000,001" in refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_neither_checkpoint_nor_first_batch_stays_alive_in_the_loop(run: Run) -> None:
    assert run("train.stop_at_step=2", "eval.path=null").returncode == 0
    kept: dict[str, weakref.ref] = {}
    alive: list[dict[str, bool]] = []

    def load(path: Path, plain: Callable = checkpoint.load) -> dict:
        state = plain(path)
        kept["checkpoint"] = weakref.ref(next(iter(state["model"].values())))
        return state

    def take(self: Loader, plain: Callable = Loader._take) -> Any:
        batch = plain(self)
        kept.setdefault("first view", weakref.ref(batch.view1))
        return batch

    def step(self: TrainStep, *arguments: Any, plain: Callable = TrainStep.__call__, **more: Any) -> Any:
        gc.collect()
        alive.append({name: tensor() is not None for name, tensor in kept.items()})
        return plain(self, *arguments, **more)

    with (
        patch("byolt.model.run.checkpoint.load", load),
        patch.object(Loader, "_take", take),
        patch.object(TrainStep, "__call__", step),
    ):
        assert run("--resume", "auto", "eval.path=null").returncode == 0
        assert alive[0] == {"checkpoint": False, "first view": True}
        assert alive[-1] == {"checkpoint": False, "first view": False} and len(alive) == 6
        shutil.rmtree(run.out)
        kept.clear()
        alive.clear()
        assert run("eval.path=null").returncode == 0
        assert alive[0] == {"first view": True} and alive[-1] == {"first view": False}


def test_timed_save_looks_for_flags_first(run: Run) -> None:
    """On a GPU flags are read at the next row only; a checkpoint in between must read them first."""
    nan = torch.full((1, 3, 1, 1), torch.nan)
    looks: list[int] = []

    def check(self: FiniteCheck, *arguments: Any, plain: Callable = FiniteCheck.check) -> None:
        looks.append(len(self._flags))
        if len(looks) % 2 == 0:  # the loop's own look, after each step on the CPU, is left out
            plain(self, *arguments)

    with (
        patch("byolt.model.byol.Online.forward", lambda self, a, b, f=Online.forward: f(self, a * nan, b)),
        patch.object(FiniteCheck, "check", check),
    ):
        done = run("run.checkpoint_minutes=0", "eval.path=null", "run.log_every=50")
    assert done.returncode == 1 and looks == [1, 1]
    assert "not finite in step 1, rank 0" in done.stderr
    assert not list(run.out.glob("checkpoint-*"))


def test_the_last_save_looks_for_flags_first() -> None:
    """The loop looks every few steps on a GPU; an outage of the data's server may end it in between."""
    run = Mock(stopping=True, metrics=None)
    train.finish(run)
    assert run.method_calls == [call.check_finite(), call.save()]


def test_exported_encoder_is_the_online_encoder(finished: tuple[Run, SimpleNamespace]) -> None:
    run, _ = finished
    exported = load_file(run.out / "encoder.safetensors")
    make_encoder("resnet8", "cifar").load_state_dict(exported)
    online = {
        k.removeprefix("online.encoder."): v
        for k, v in run.weights().items()
        if k.startswith("online.encoder.")
    }
    assert exported.keys() == online.keys()
    assert all(torch.equal(exported[key], online[key]) for key in online)


def test_interrupted_run_continues_to_the_bit(run: Run, images: Path, tmp_path: Path) -> None:
    assert run("train.stop_at_step=3").returncode == 0
    again = run("--resume", "auto")
    assert again.returncode == 0 and "resumed from" in again.stderr, again.stderr
    (tmp_path / "b").mkdir()
    whole = Run(tmp_path / "b", images)
    assert whole().returncode == 0
    ours, theirs = run.weights(), whole.weights()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name in ("loss", "probe_top1"):
        curves = [{r["step"]: r[name] for r in x.rows() if name in r and r["step"] > 4} for x in (run, whole)]
        assert curves[0] == curves[1] and len(curves[0]) == 2


def test_online_probe_changes_nothing_but_its_own_numbers(run: Run, images: Path, tmp_path: Path) -> None:
    assert run("train.stop_at_step=6").returncode == 0
    (tmp_path / "b").mkdir()
    without = Run(tmp_path / "b", images)
    assert without("train.stop_at_step=6", "eval.online_probe=false").returncode == 0
    ours, theirs = run.weights(), without.weights()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    rows = [row for row in run.rows() if "loss" in row]
    assert all(0 <= row["probe_top1"] <= 100 for row in rows)
    assert [row["probe_top1"] * 16 / 100 % 1 for row in rows] == pytest.approx([0] * 4)  # of 1 or 2 x 8
    assert not any("probe_top1" in row for row in without.rows())
    state = checkpoint.load_newest(run.out)[1]["probe"]
    assert state["weight"].shape == (2, 128) and state["momentum.weight"].abs().max() > 0
    assert checkpoint.load_newest(without.out)[1]["probe"] is None
    assert without("--resume", "auto").returncode == 0  # begins anew where the checkpoint has none
    assert "probe_top1" in without.rows()[-2]


def test_online_probe_needs_labels(run: Run, images: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (images / "train").rglob("*.jpg"):
        shutil.copy(file, flat / f"{file.parent.name}{file.name}")
    assert run(f"data.path={flat}", "eval.path=null", "train.stop_at_step=2").returncode == 0
    assert [row for row in run.rows() if "loss" in row] and not any("probe_top1" in r for r in run.rows())


@pytest.mark.parametrize(
    ("log_every", "logged"),
    [(50, [1, 2, 5, 10, 50, 100, 117]), (10, [1, 2, 5, *range(10, 120, 10), 117]), (1, list(range(1, 118)))],
)
def test_the_first_rows_come_early(log_every: int, logged: list[int]) -> None:
    config = SimpleNamespace(run=SimpleNamespace(log_every=log_every))
    run: Any = SimpleNamespace(config=config, last_step=117)
    assert [step for step in range(1, 118) if TrainingRun.is_logged(run, step)] == sorted(logged)


@pytest.mark.parametrize(
    ("steps", "said"), [(390, "1 h 5 min"), (100_000, "12 days"), (30, "5 min"), (11, "110 s")]
)
def test_the_duration_of_the_run_is_said_once(steps: int, said: str) -> None:
    lines: list[str] = []
    config = SimpleNamespace(train=SimpleNamespace(batch_size=100))
    run: Any = SimpleNamespace(
        config=config,
        last_step=steps,
        _first_step=0,
        _duration_said=False,
        meter=SimpleNamespace(say=lines.append),
    )
    for run.step in (1, 2, 5):
        TrainingRun._say_duration(run, 10.0)
    assert lines == [f"at this speed {steps} steps take {said}"]


def test_resume_keeps_the_rows_of_finished_steps(run: Run) -> None:
    assert run("train.stop_at_step=4").returncode == 0
    assert run("--resume", "auto").returncode == 0
    assert [row["step"] for row in run.rows() if "loss" in row] == [1, 2, 4, 6, 8]
    assert [row["step"] for row in run.rows() if "knn_top1" in row] == [0, 4, 8]


def test_killed_before_its_first_checkpoint_it_begins_anew(run: Run) -> None:
    run.out.mkdir()
    (run.out / "metrics.jsonl").write_text('{"step": 0, "knn_top1": 1}\n{"step": 2, "loss": 4}\nnull\n{"step')
    assert run("--resume", "auto", "train.stop_at_step=2").returncode == 0
    assert [row["step"] for row in run.rows() if "loss" in row] == [1, 2]


@pytest.mark.parametrize(("fault", "code"), [("step:3:SIGTERM", 143), ("log:6:EIO", 1)])
def test_tensorboard_has_every_row_however_the_run_ends(
    fault: str, code: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's thread is slow here: a run that does not wait for it loses rows."""

    def write(self: RecordWriter, data: bytes, plain: Callable = RecordWriter.write) -> None:
        time.sleep(0.06)
        plain(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    monkeypatch.setenv("BYOLT_FAIL", fault)
    assert run("eval.path=null").returncode == code
    events = EventAccumulator(str(run.out / "tensorboard")).Reload()
    assert (
        [event.step for event in events.Scalars("loss")] == [1, 2, 4] == [row["step"] for row in run.rows()]
    )


def test_loss_curve_that_cannot_be_written_does_not_undo_a_finished_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BYOLT_FAIL", "rename loss.png:0:ENOSPC")
    done = run("eval.path=null", "train.stop_at_step=2")
    assert done.returncode == 0, done.stderr
    assert (
        "warning: step 2: loss.png could not be written: [Errno 28] No space left on device; continuing"
        in done.stderr
    )
    assert (
        f"finished at step 2 of 8, as train.stop_at_step asks: {run.out}/encoder.safetensors" in done.stderr
    )
    assert (run.out / "encoder.safetensors").exists() and not (run.out / "loss.png").exists()


def test_run_may_continue_without_tensorboard(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: RecordWriter, data: bytes, plain: Callable = RecordWriter.write) -> None:
        if b"gradient_norm" in data:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    done = run("eval.path=null", "train.stop_at_step=4", "run.on_write_error=continue")
    assert done.returncode == 0 and "digest: step 4" in done.stdout
    assert re.search(
        "warning: step 4: .* could not be written: .*No space left on device; continuing", done.stderr
    )
    assert [row["step"] for row in run.rows()] == [1, 2, 4]


@pytest.mark.parametrize(("choice", "code"), [("continue", 0), ("stop", 1)])
def test_run_may_continue_without_views_png(
    choice: str, code: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BYOLT_FAIL", "rename views.png:0:ENOSPC")
    done = run("eval.path=null", "train.stop_at_step=2", f"run.on_write_error={choice}")
    assert done.returncode == code
    assert (
        "step 0: views.png could not be written: [Errno 28] No space left on device; continuing"
        in done.stderr
    ) == (choice == "continue")
    assert not (run.out / "views.png").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_nan_stops_the_run_and_is_never_saved(precision: str, run: Run) -> None:
    assert run("train.stop_at_step=2", f"train.precision={precision}").returncode == 0
    before = run.weights()
    nan = torch.full((1, 3, 1, 1), torch.nan)
    with patch("byolt.model.byol.Online.forward", lambda self, a, b, f=Online.forward: f(self, a * nan, b)):
        done = run(
            "--resume", "auto", f"train.precision={precision}", "run.checkpoint_minutes=0", "run.log_every=50"
        )
    assert done.returncode == 1
    assert "not finite in step 3, rank 0, samples " in done.stderr
    (bad,) = json.loads((run.out / "not-finite.json").read_text())
    assert bad["step"] == 3 and bad["rank"] == 0
    assert bad["samples"] == global_batch(0, 0, 2, 32, 8).tolist()
    for path in (*run.out.glob("checkpoint-*.pt"), run.out / "aside-000000003.pt"):
        state = checkpoint.load(path)
        tensors = [*state["model"].values(), *(m["momentum"] for m in state["momentum"].values())]
        assert all(tensor.isfinite().all() for tensor in tensors)
        assert all(torch.equal(t, before[k]) for k, t in state["model"].items())


def test_precision_may_change(run: Run) -> None:
    for step, precision in ((2, "fp32"), (4, "fp16"), (6, "bf16")):
        done = run("--resume", "auto", f"train.stop_at_step={step}", f"train.precision={precision}")
        assert done.returncode == 0, done.stderr


def test_older_checkpoint_is_not_continued_over_newer_ones(run: Run, tmp_path: Path) -> None:
    assert run("train.stop_at_step=2").returncode == 0
    old = (run.out / "checkpoint-000000002.pt").rename(tmp_path / "old.pt")
    assert run("--resume", str(old), "train.stop_at_step=4").returncode == 0
    again = run("--resume", str(old))
    assert again.returncode == 2
    assert "is of step 2, but" in again.stderr and "checkpoint-000000004.pt" in again.stderr


def test_resume_beyond_the_step_to_stop_at_says_so(run: Run) -> None:
    new = run("--resume", "auto", "train.stop_at_step=4")
    assert new.returncode == 0 and f"new run (no checkpoint in {run.out}): steps 0 to 4 of 8" in new.stderr
    again = run("--resume", "auto", "train.stop_at_step=2")
    assert again.returncode == 0 and ": steps 4 to 4 of 8" in again.stderr
    assert "step 4 is past step 2, at which train.stop_at_step ends the run" in again.stderr
    assert f"finished at step 4 of 8: {run.out}" in again.stderr


def test_evaluation_may_begin_later(run: Run) -> None:
    assert run("eval.path=null", "train.stop_at_step=2").returncode == 0
    done = run("--resume", "auto", "train.stop_at_step=4")
    assert done.returncode == 0
    assert re.search(r"^kNN top-1: not measured before training, \d+\.\d % after$", done.stdout, re.M)


def test_finished_run_is_not_run_again(finished: tuple[Run, SimpleNamespace]) -> None:
    run, done = finished
    again = run("--resume", "auto")
    assert again.returncode == 0
    assert "steps 8 to 8" in again.stderr
    assert again.stdout == done.stdout


@pytest.mark.slow
def test_two_ranks_train_like_one(images: Path, tmp_path: Path) -> None:
    """Same ids, same views, synchronised statistics: the losses agree to rounding, also across a resume."""
    losses = []
    for size, stops in ((2, (3, 8)), (1, (8,))):
        (tmp_path / str(size)).mkdir()
        run = whole_runs.Run(tmp_path / str(size), images / "train")
        for stop in stops:
            options = f"train.stop_at_step={stop}", f"eval.path={images / 'val'}", "eval.k=5"
            ranks = run.start_ranks(size, "--resume", "auto", *options)
            assert [rank.wait() for rank in ranks] == [0] * size, ranks[0].text
        assert ("2 x cpu" in ranks[0].text) == (size == 2)
        losses.append([row["loss"] for row in run.rows() if "loss" in row])
    assert len(losses[0]) == 8 and losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["data.path=/nowhere"], "/nowhere' does not exist"),
        (["eval.path=/nowhere"], "/nowhere' does not exist"),
        (["train.batch_size=64"], "train.batch_size=64 is larger than the data set (32 images)"),
        (
            ["--allow-change", "optimizer.base_lrr"],
            "--allow-change optimizer.base_lrr: did you mean optimizer.base_lr?",
        ),
        (["--allow-change", "model.backbone"], "do not fit; begin a new run"),
        (["train.epochs=.inf"], "train.epochs=inf"),
        (["run.out=${nope}"], "do not resolve"),
        (
            ["train.epochs=0.1", "optimizer.warmup_epochs=0"],
            "train.epochs=0.1 is less than one step, which takes train.batch_size=",
        ),
        (["--resume", "nowhere.pt"], "--resume nowhere.pt does not exist: name a checkpoint-*.pt"),
        (["optimizer.backend=apex"], "unrelated package"),
        (["run.out=/proc/byolt"], "/proc/byolt"),
        (["train.device=cuda"], "cuda"),
    ],
)
def test_mistake_is_one_line(arguments: list[str], part: str, run: Run) -> None:
    if arguments == ["train.device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert part in done.stderr


def test_what_ranks_cannot_do_is_refused(run: Run) -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with patch.dict(os.environ, ranks, WORLD_SIZE="3"):
        done = run()
    assert done.returncode == 2
    assert "train.batch_size=8 is not divisible by 3 ranks" in done.stderr
    with patch.dict(os.environ, ranks, WORLD_SIZE="2"):
        done = run("train.compile=true")
    assert done.returncode == 2
    assert "train.compile=true does not work with 2 ranks" in done.stderr
    with patch.dict(os.environ, WORLD_SIZE="many"):
        assert "WORLD_SIZE=many is not a valid number of ranks" in run().stderr


def test_deterministic_run_is_the_same_run(run: Run, finished: tuple[Run, SimpleNamespace]) -> None:
    """On a CPU to the bit; and it may be asked for from a resume on."""
    last = finished[1].stdout.splitlines()[-1]
    assert last.startswith("digest: step 8 sha256 ")
    asked = "train.deterministic=true", "data.backend=auto"
    try:
        with patch.dict(os.environ):
            assert run(*asked, "train.stop_at_step=4").returncode == 0
            assert torch.are_deterministic_algorithms_enabled()
            on = run("--resume", "auto", "data.backend=auto")
        assert on.returncode == 0, on.stderr
        assert not torch.are_deterministic_algorithms_enabled()
        assert on.stdout.splitlines()[-1] == last
    finally:
        torch.use_deterministic_algorithms(False)


def test_existing_run_is_not_overwritten(finished: tuple[Run, SimpleNamespace]) -> None:
    run, _ = finished
    again = run()
    assert again.returncode == 2
    assert "add --resume auto" in again.stderr


def test_other_settings_are_refused_by_name(finished: tuple[Run, SimpleNamespace]) -> None:
    run, _ = finished
    again = run("--resume", "auto", "model.backbone=resnet18", "optimizer.base_lr=3", "run.log_every=9")
    assert again.returncode == 2
    assert "model.backbone: resnet8 in the checkpoint, resnet18 now" in again.stderr
    assert "optimizer.base_lr: 1.0 in the checkpoint, 3.0 now" in again.stderr
    assert "log_every" not in again.stderr
    assert run("--resume", "auto", "optimizer.backend=foreach").returncode == 0  # the same numbers
    insisted = run("--resume", "auto", "optimizer.base_lr=3", "--allow-change", "optimizer.base_lr")
    assert insisted.returncode == 0


def test_damaged_checkpoint_is_passed_over_by_name(run: Run) -> None:
    assert run("train.stop_at_step=2").returncode == 0
    assert run("--resume", "auto", "train.stop_at_step=4").returncode == 0
    newest = run.out / "checkpoint-000000004.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    again = run("--resume", "auto", "train.stop_at_step=6")
    assert again.returncode == 0
    assert "checkpoint-000000004.pt is damaged" in again.stderr
    assert f"resumed from {run.out / 'checkpoint-000000002.pt'}" in again.stderr


def test_print_config_derives(run: Run) -> None:
    done = run("--print-config", "train.batch_size=16")
    assert done.returncode == 0
    assert "# peak learning rate: 0.0625" in done.stdout
    assert "# images: 32" in done.stdout and "# steps: 4, warm-up: 1" in done.stdout
    assert "# images per rank and micro-batch: 16 on 1 rank\n" in done.stdout


def test_print_config_decides_what_is_auto_and_estimates(run: Run) -> None:
    done = run("--print-config", "train.batch_size=auto", "optimizer.base_lr=auto")
    assert done.returncode == 0 and "\n  batch_size: 8\n" in done.stdout and "base_lr: 32.0" in done.stdout
    for line in (
        r"auto: optimizer\.base_lr, train\.batch_size",
        r"device: \d+ CPU cores? \(.+\)",
        r"memory: about 1\.0 of [0-9.]+ GiB \(.*\); a batch of all 32 images fits",
        r"steps: 8, warm-up: 2",
        r"time: about \d+ s at [0-9,]+ images/s \((a step takes .+ ms, )?scaled from resnet8 at 24 px, measured on 2 cores of .*\)",
    ):
        assert re.search(rf"^# {line}$", done.stdout, re.M), (line, done.stdout)
    done = run("--print-config", "train.batch_size=auto", "data.path=/nowhere")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: data path '/nowhere' does not exist: make it with")


@pytest.mark.slow
def test_a_run_that_continues_keeps_the_values_of_its_auto_settings(run: Run) -> None:
    settings = ("train.batch_size=auto", "optimizer.base_lr=auto", "eval.path=null")
    done = run(*settings, "train.stop_at_step=2")
    chosen = r"optimizer\.base_lr=32\.0 train\.batch_size=8$"
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^auto, for these images and this device: {chosen}", done.stderr, re.M)
    assert re.search(r"^\d+ CPU cores? \(.*\): about \d+ s at ", done.stderr, re.M)
    path, state, _ = checkpoint.load_newest(run.out)
    assert (state["config"]["train"]["batch_size"], state["config"]["optimizer"]["base_lr"]) == (8, 32)
    gpu = Device("cuda", "NVIDIA H200", 140 * 2**30, 12)
    state["config"]["train"]["batch_size"] = 16  # as a run on other images would have begun
    checkpoint.write(path, state)
    with patch.object(provenance, "device_of", lambda device: gpu):
        done = run(*settings, "--resume", "auto", "train.stop_at_step=3")
    assert done.returncode == 0, done.stderr
    chosen = r"optimizer\.base_lr=32\.0 train\.batch_size=16$"
    assert re.search(rf"^auto, as in {path}: {chosen}", done.stderr, re.M)
    assert checkpoint.load_newest(run.out)[1]["config"]["train"]["batch_size"] == 16
    again = run(*settings[1:], "train.batch_size=8", "--resume", "auto", "train.stop_at_step=3")
    assert again.returncode == 2 and "train.batch_size: 16 in the checkpoint, 8 now" in again.stderr


def test_print_config_says_why_the_images_cannot_be_counted(run: Run, images: Path, tmp_path: Path) -> None:
    done = run("--print-config", "data.path=/nowhere", "data.expected_images=100")
    assert (
        "\n# images: 100 (data.expected_images; data path '/nowhere' does not exist: make it" in done.stdout
    )
    assert done.returncode == 0 and "\n# steps: 25, warm-up: " in done.stdout
    assert make_shards([str(images / "train"), str(tmp_path / "shards"), "--workers", "1"]) == 0
    os.truncate(tmp_path / "shards/shard-000000.tar", 600)
    for more in ([], ["data.expected_images=100"]):
        done = run("--print-config", f"data.path={tmp_path}/shards", *more)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.startswith(f"error: shard {tmp_path}/shards/shard-000000.tar has 600 bytes")


def test_trace_shows_the_loop_and_the_loader(run: Run) -> None:
    done = run("--trace", "2", "eval.path=null", "train.epochs=4", "train.stop_at_step=8")
    assert done.returncode == 0, done.stderr
    assert f"trace up to step 7: {run.out / 'trace.json'}" in done.stderr
    events = json.loads((run.out / "trace.json").read_text())["traceEvents"]
    for name in ("wait for data", "training step"):
        assert [e["name"] for e in events if e.get("cat") == "user_annotation"].count(name) == 2
    threads = {e["tid"] for e in events if str(e.get("name")).startswith("aten::")}
    assert len(threads) > 1  # the loader's is not the step's


@pytest.mark.parametrize(("steps", "said"), [("4", "needs 9 steps"), ("0", "must be at least 1")])
def test_trace_that_cannot_be_made_is_refused(run: Run, steps: str, said: str) -> None:
    done = run("--trace", steps)
    assert done.returncode == 2 and f"--trace {steps}" in done.stderr and said in done.stderr
