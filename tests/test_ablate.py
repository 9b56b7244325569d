"""Ablations: which settings each changes, and the table of what came out."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_train import TINY, images  # noqa: F401 (a fixture)

from byolt import train
from byolt.configs import schema
from byolt.files import stop
from byolt.model.run import pictures
from byolt.tools import ablate
from byolt.tools.ablation import recipes, results
from byolt.tools.reporting.figures import MARKS

RECIPE = Path(__file__).parent.parent / "configs/r18_cifar10.yaml"


@pytest.mark.parametrize("name", [name for name in recipes.ABLATIONS if not name.startswith("batch_")])
def test_an_ablation_changes_what_its_name_says_and_nothing_else(name: str) -> None:
    before = schema.load(RECIPE).model_dump()
    after = schema.load(RECIPE, recipes.overrides_of(name, 512)).model_dump()
    changed = {
        f"{section}.{key}"
        for section, values in before.items()
        for key, value in values.items()
        if after[section][key] != value
    }
    sections = {"tau": "optimizer.", "no_predictor": "model.predictor", "baseline": "nothing"}
    allowed = sections.get(name.split("_")[0]) or sections.get(name) or "augment.view"
    assert all(key.startswith(allowed) for key in changed)
    recipe = {"baseline", "tau_0.99", "no_blur"}  # the recipe has tau .99 and no blur
    assert bool(changed) == (name not in recipe)


def test_views_of_crop_only() -> None:
    augment = schema.load(RECIPE, recipes.overrides_of("crop_only", 512)).augment
    for view in (augment.view1, augment.view2):
        assert (view.flip, view.jitter, view.gray, view.blur, view.solarize) == (0, 0, 0, 0, 0)
        assert view.crop_area == (0.2, 1.0)


def test_small_batches_are_accumulated_to_the_recipe_s() -> None:
    assert recipes.overrides_of("batch_64", 512) == ["train.accumulation=8"]
    with pytest.raises(ValueError, match="batch_512: the recipe's batch of 512 is not a multiple of 512"):
        recipes.overrides_of("batch_512", 512)
    with pytest.raises(ValueError, match="not a multiple of 64"):
        recipes.overrides_of("batch_64", 100)


def test_names_are_checked_and_what_fits_is_chosen() -> None:
    with pytest.raises(ValueError, match=r"--only baselin: did you mean baseline\?"):
        recipes.overrides_of("baselin", 512)
    assert [name for name in recipes.fitting(512) if "batch" in name] == [
        "batch_256",
        "batch_128",
        "batch_64",
    ]
    assert not any("batch" in name for name in recipes.fitting(64))


def test_mistakes_come_before_any_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code = ablate.main(["--config", str(RECIPE), "--out", str(tmp_path / "x"), "train.epochz=1"])
    assert code == 2
    assert "epochs" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("code", [1, 2, 143])
def test_only_a_run_that_may_succeed_later_continues(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train, "main", lambda arguments: code)
    assert ablate.main(["--config", str(RECIPE), "--out", str(tmp_path / "x"), "--only", "baseline"]) == code
    remedy = "" if code == 2 else "; the same command continues"
    assert capsys.readouterr().err == f"ablate: baseline ended with code {code}{remedy}\n"


def test_tasks_without_ranks_are_refused_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setattr(ablate, "train", None)
    assert ablate.main(["--config", str(RECIPE), "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.startswith(
        "ablate: in the environment, SLURM_NTASKS=4, but there is no RANK"
    )


def test_ctrl_c_ends_the_command_after_the_run_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    started: list[str] = []

    def run(arguments: list[str]) -> int:
        started.append(arguments[-1])
        with stop.listening():
            signal.raise_signal(signal.SIGINT)
            return 128 + (stop.asked() or 0)

    monkeypatch.setattr(train, "main", run)
    before = [signal.getsignal(number) for number in stop.SIGNALS]
    command = ["--config", str(RECIPE), "--out", str(tmp_path / "x"), "--only", "baseline", "no_blur"]
    assert ablate.main(command) == 130
    assert started == [f"run.out={tmp_path}/x/baseline-0"]
    assert capsys.readouterr().err == "ablate: interrupted; the same command continues\n"
    assert [signal.getsignal(number) for number in stop.SIGNALS] == before


def test_a_time_limit_stops_the_run_and_the_next_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def run(arguments: list[str]) -> int:
        with stop.listening():
            while not stop.asked():
                time.sleep(0.01)
            return 128 + (stop.asked() or 0)

    monkeypatch.setattr(train, "main", run)
    command = ["--config", str(RECIPE), "--out", str(tmp_path / "x"), "--minutes", "0.002"]
    assert ablate.main([*command, "--only", "baseline", "no_blur"]) == 3
    said = "0.002 minutes are over, 2 of 2 runs are left; the same command continues"
    assert capsys.readouterr().err == f"ablate: {said}\n"


def test_a_list_of_one_s_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("high: [optimizer.base_lr=2.0]\nlow: ['optimizer.base_lr=.5', train.epochs=20]\n")
    ablations = recipes.read_list(path)
    assert recipes.overrides_of("low", 64, ablations) == ["optimizer.base_lr=.5", "train.epochs=20"]
    assert recipes.fitting(64, ablations) == ["high", "low"]
    one = {"knn_top1": 40.0, "loss": 1.0, "prediction_std": 0.01, "projection_std": 0.1}
    table, markdown = results.table_of({"high": [one]}, ablations)
    assert table.columns[-1].header == "projection std"
    lines = markdown.splitlines()
    assert [line.split(" | ")[-1] for line in lines] == ["settings |", lines[1], "optimizer.base_lr=2.0 |"]
    command = ["--config", str(RECIPE), "--out", str(tmp_path / "x"), "--list", str(path), "--only", "lw"]
    assert ablate.main(command) == 2
    assert "did you mean low?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *(
            (text, "")
            for text in ("", "a: 1", "a: [train.epochs]", "a/b: [train.epochs=1]", "[", "a: {b: c}")
        ),
        ("a: []\na: [train.epochs=1]", ", line 2: a is there twice: give one of them another name"),
        (
            "a: [run.seed=4]",
            ", line 1: a: run.seed=4: every run has a folder in --out, and its seed by --seeds",
        ),
        ("a: [batch=0]", ", line 1: a: batch=0 must be a number of images"),
        ("a/b: []", ", line 1: name a/b must have 100 letters, digits"),
    ],
)
def test_a_list_of_another_form_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"^--list .*list.yaml{said}"):
        recipes.read_list(tmp_path / "list.yaml")


def test_names_of_a_list_are_taken_as_written(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("0.90: []\n0.9: []\nyes: [batch=64]\n")
    assert list(recipes.read_list(tmp_path / "list.yaml")) == ["0.90", "0.9", "yes"]


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("a: []", ["--minutes", "inf"], "--minutes inf must be above 0 and at most 527,040"),
        ("a: [batch=5]", [], "its batches do not divide the recipe's of"),
        (
            "a: []",
            ["run.mirror=s3://bucket/run"],
            "run.mirror=s3://bucket/run: all runs would share it: remove it",
        ),
        ("a: [train.epochs=auto]", [], "a: train.epochs: auto is for single runs: set values"),
        ("a: []\nb: [train.epoch=1]", [], "ablate: b: overrides of "),
    ],
)
def test_a_list_that_cannot_run_is_refused(
    text: str, more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "list.yaml").write_text(text)
    command = ["--config", str(RECIPE), "--out", str(tmp_path / "x"), "--list", str(tmp_path / "list.yaml")]
    assert ablate.main([*command, *more]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(RECIPE.parent.glob("lists/*.yaml")), ids=lambda path: path.stem)
def test_shipped_lists_fit_their_config(path: Path) -> None:
    config = path.with_name("..") / path.name
    for name in (ablations := recipes.read_list(path)):
        schema.load(config, recipes.overrides_of(name, 512, ablations))
    assert (
        f"--config configs/{path.name}" in path.read_text()
        and f"--list configs/lists/{path.name}" in path.read_text()
    )


def test_the_table_holds_earlier_runs_of_the_same_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def finished(folder: Path, accuracy: float, *overrides: str) -> None:
        folder.mkdir(parents=True)
        settings = schema.load(RECIPE, list(overrides)).model_dump(mode="json")
        (folder / "starts.jsonl").write_text(json.dumps({"step": 0, "config": settings}))
        (folder / "metrics.jsonl").write_text(f'{{"step": 9, "knn_top1": {accuracy}, "loss": "x"}}')
        (folder / "encoder.safetensors").touch()

    def run(arguments: list[str]) -> int:
        finished(tmp_path / "no_blur-3", 30.0)
        return 0

    epochs = "train.epochs=50"
    baseline = recipes.overrides_of("baseline", 512)
    finished(tmp_path / "baseline-11", 42.0, epochs, "run.seed=11", "run.out=elsewhere", *baseline)
    finished(tmp_path / "baseline-2", 41.0, epochs, "run.seed=2", *baseline)
    finished(tmp_path / "baseline-4", 1.0, "run.seed=4", *baseline)  # of other epochs
    finished(tmp_path / "tau_0-2", 1.0, epochs, "run.seed=2")  # with the baseline's tau
    finished(tmp_path / "baseline-5", 1.0, epochs, "run.seed=5", *baseline)
    (tmp_path / "baseline-5" / "encoder.safetensors").unlink()  # still running
    (tmp_path / "baseline-x").mkdir()
    monkeypatch.setattr(ablate, "train", run)
    command = ["--config", str(RECIPE), "--out", str(tmp_path), "--seeds", "3", "--only", "no_blur", epochs]
    assert ablate.main(command) == 0
    report = json.loads((tmp_path / "ablation.json").read_text())
    assert report["seeds"] == {"baseline": [2, 11], "no_blur": [3]}
    assert [result["knn_top1"] for result in report["results"]["baseline"]] == [41.0, 42.0]
    assert report["results"]["no_blur"][0] == {
        "knn_top1": 30.0, "loss": None, "prediction_std": None, "projection_std": None
    }  # fmt: skip
    assert "because their settings differ: baseline-4, tau_0-2\n" in capsys.readouterr().out


def test_help_says_how_to_continue(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        ablate.main(["--help"])
    assert "start the same command again" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_two_runs_and_their_table(
    tmp_path: Path,
    images: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    recipe = tmp_path / "tiny.yaml"
    text = TINY.replace("OUT", "unused").replace("DATA", str(images)).replace("BACKEND", "torch")
    recipe.write_text(text)
    names = ["tau_1", "no_predictor", "train.stop_at_step=4"]  # overrides may come after them
    command = ["--config", str(recipe), "--out", str(tmp_path / "runs"), "--seeds", "3", "--only", *names]
    assert ablate.main(command) == 0
    digests = [line for line in capsys.readouterr().out.splitlines() if line.startswith("digest: ")]
    alone = [sys.executable, str(RECIPE.parent.parent / "train.py"), "--config", str(recipe), "run.seed=3"]
    alone += ["model.predictor=false", f"run.out={tmp_path / 'alone'}", "train.stop_at_step=4"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    said = subprocess.run(alone, check=True, capture_output=True, text=True, env=os.environ | threads).stdout
    assert said.splitlines()[-1] == digests[-1] != digests[0]  # the run before it leaves no trace
    report = json.loads((tmp_path / "runs/ablation.json").read_text())
    assert list(report["results"]) == ["tau_1", "no_predictor"]
    for [result] in report["results"].values():
        assert 0 <= result["knn_top1"] <= 100
        assert 0 < result["prediction_std"] < 1
    markdown = (tmp_path / "runs/ablation.md").read_text().splitlines()
    assert markdown[2].startswith("| tau_1 |")
    assert "| 18.8 |" in markdown[2]
    assert "| 0.2 |" in markdown[3]
    assert (tmp_path / "runs/tau_1-3/encoder.safetensors").exists()
    with Image.open(tmp_path / "runs/ablation.png") as picture:
        assert picture.width > picture.height > 100
    monkeypatch.setattr(ablate, "train", None)
    assert ablate.main(command) == 0  # what is finished is not started again


def test_the_table_gives_mean_and_deviation_over_seeds() -> None:
    one = {"knn_top1": 40.0, "loss": 1.0, "prediction_std": 0.01, "projection_std": 0.1}
    other = one | {"knn_top1": 43.0, "loss": None}
    _, markdown = results.table_of({"tau_0.9": [one, other], "baseline": [one]})
    _, _, tau, baseline = markdown.splitlines()
    assert tau.startswith("| tau_0.9 | 41.5 ± 2.1 | not measured | 0.0100 ± 0.0000 |")  # 3 / sqrt(2)
    assert baseline.startswith("| baseline | 40.0 | 1.000 | 0.0100 | 0.1000 | 72.5 |")


def test_comparison_draws_each_run_where_it_has_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []

    def save(figure: Any, path: Path, plain: Any = pictures.save_png) -> None:
        figures.append(figure)
        plain(figure, path)

    monkeypatch.setattr(pictures, "save_png", save)
    first = [
        {"step": 0, "knn_top1": 20.0},
        {"step": 1, "loss": 3.5},
        {"step": 2, "loss": 3.0, "knn_top1": 25.0},
    ]
    second = [{"step": step, "loss": 4.0 - step / 10} for step in range(1, 12)]
    third = [{"step": 2, "loss": 2.5}]
    runs = {"baseline": [first, second], "tau_0": [third]}
    results.save_curves(tmp_path / "a.png", runs, {"loss": "BYOL loss", "knn_top1": "kNN top-1 (%)"})
    loss, knn = figures[0].axes
    assert (loss.get_ylabel(), knn.get_ylabel()) == ("BYOL loss", "kNN top-1 (%)")
    drawn = [[line.get_xydata().tolist() for line in axis.lines] for axis in (loss, knn)]
    assert drawn[0] == [[[1, 3.5], [2, 3.0]], [[row["step"], row["loss"]] for row in second], [[2, 2.5]]]
    assert drawn[1] == [[[0, 20.0], [2, 25.0]], [], []]
    one, other = MARKS[:2]
    assert [line.get_color() for line in loss.lines] == [one.color, one.color, other.color]
    assert [line.get_marker() for line in loss.lines] == [one.marker, one.marker, other.marker]
    assert [line.get_linestyle() for line in loss.lines] == ["-", "--", "-"]  # the second is another seed
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["baseline", "tau_0"]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > picture.height > 300


def test_a_recipe_that_sizes_itself_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = str(RECIPE.with_name("own_images.yaml"))
    assert ablate.main(["--config", own, "--out", str(tmp_path)]) == 2
    assert "train.batch_size, train.accumulation: auto is for single runs" in capsys.readouterr().err
