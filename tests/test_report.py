"""The report: what it says about whole, unfinished, unlabeled and damaged runs, and that it is inert."""

import io
import json
import os
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import Run as TrainRun
from test_train import images  # noqa: F401 (a fixture)

from byolt.configs import schema
from byolt.model.byol import make_byol
from byolt.model.run import checkpoint
from byolt.tools import export, report
from byolt.tools.reporting import figures, page
from byolt.tools.reporting.features import neighbors_section
from byolt.tools.reporting.run import ImageFeatures, read_run

EVIL = "<script>alert('x')<"
VOID = {"meta", "img"}


class Inert(HTMLParser):
    """Reads a page and refuses whatever runs, loads or is left open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        assert all(count == 1 for count in self.ids.values())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        assert tag not in {"script", "link", "iframe", "object", "embed", "form", "base"}
        for name, value in attributes:
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href"}:
                assert value and value.startswith(("data:image/png;base64,", "#"))
            assert "url(" not in (value or "").replace("url(#", "")
        self.ids.update(value for name, value in attributes if name == "id" and value)
        self.classes.update(value for name, value in attributes if name == "class" and value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data


def _pictures(folder: Path, classes: list[str]) -> None:
    """Six random images of each class, or in no folder for a class ''."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / name / f"{i}.png")


def _config(folder: Path, data: Path, evaluate: bool = True) -> schema.Config:
    path = folder / "c.yaml"
    path.write_text(f"""
run: {{out: {folder}}}
data: {{path: {data}, backend: torch, threads: 1}}
augment: {{size: 16, view1: {{blur: 1.0, solarize: 0.0}}, view2: {{blur: 0.1, solarize: 0.2}}}}
model: {{backbone: resnet8, stem: cifar, projector_hidden: 16, projector_size: 8, predictor_hidden: 16}}
optimizer: {{base_lr: 1.0, warmup_epochs: 0.5, weight_decay: 1.0e-6, base_tau: 0.9}}
train: {{epochs: 4, batch_size: 6}}
eval: {{path: {data if evaluate else "null"}}}
""")
    return schema.load(path)


def _save(folder: Path, config: schema.Config, step: int, exported: bool = False) -> None:
    """A checkpoint as train.py writes it, or the exported encoder."""
    torch.manual_seed(step)
    model = make_byol(config.model)
    if exported:
        about = {"backbone": "resnet8", "stem": "cifar", "steps": str(step), "config": schema.to_yaml(config)}
        checkpoint.export_encoder(folder / "encoder.safetensors", model.online.encoder.state_dict(), about)
    else:
        state = {"step": step, "model": model.state_dict(), "config": config.model_dump(mode="json")}
        checkpoint.save(folder, step, state, keep=3)


ROWS = [
    {"step": 0, "knn_top1": 25.0},
    {"step": 2, "epoch": 1.0, "loss": 3.5, "lr": 0.1, "tau": 0.9, "images_per_second": 100.0,
     "data_wait_percent": 1.0, "gradient_norm": 2.0, "corrupt_images": 0.0, "prediction_std": 0.2,
     "prediction_cosine": 0.5, "projection_std": 0.3, "projection_cosine": 0.4},
    {"step": 8, "knn_top1": 62.5},
]  # fmt: skip
FEW = [
    ROWS[0],
    {"step": 2, "epoch": 1.0, "loss": 3.5, "corrupt_images": 0.0},
    ROWS[2],
]  # a figure a column takes time


def _rows(folder: Path, rows: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "lo')


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with a hostile name."""
    folder = tmp_path / "a<b>run&"
    folder.mkdir()
    return folder


def _report(folder: Path, *arguments: str) -> tuple[str, Inert]:
    assert report.main([str(folder), *arguments]) == 0
    html = (folder / "report.html").read_text()
    page = Inert(html)
    return " ".join(" ".join(page.text).split()), page


def test_a_finished_run_with_hostile_names(folder: Path, tmp_path: Path) -> None:
    _pictures(tmp_path / "images", ["a$b$", EVIL])
    config = _config(folder, tmp_path / "images")
    _save(folder, config, 8, exported=True)
    _rows(folder, ROWS)
    start = {"step": 0, "command": "python train.py <x>", "hardware": "abacus", "versions": {"torch": "9.9"}}
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    broken = {"id": 3, "where": '"><img src=x onerror=alert(1)>', "reason": "broken"}
    (folder / "corrupt.jsonl").write_text(f"{json.dumps(broken)}\n{json.dumps(broken)}\n")
    Image.new("RGB", (40, 20)).save(folder / "views.png")
    text, page = _report(folder)
    assert "a<b>run&" in text and EVIL in text and broken["where"] in text
    assert "resnet8 · 12 images · step 8 of 8, finished" in text
    assert "25.0 → 62.5 %" in text and "3.500" in text
    assert "python train.py <x>" in text and "abacus" in text and "torch 9.9" in text
    assert "projector_size: 8" in text
    assert "encoder.safetensors, step 8" in text
    assert "1 image could not be decoded in training; each was replaced by the next one" in text
    # views.png, and two queries with five neighbors
    assert page.tags["img"] == page.classes["plot"] + 1 + 2 * 6
    assert page.classes["right"] + page.classes["wrong"] == 10
    assert text.count("✗") == page.classes["wrong"] > 0
    assert "note" not in page.classes  # nothing is missing


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict, dict]]:
    """What is to be drawn as curves; nothing is, which saves half a second a report."""
    drawn: list[tuple[dict, dict]] = []

    def draw(series: dict, *_: object, **more: object) -> bytes:
        drawn.append((series, more))
        return b"png"

    monkeypatch.setattr(figures, "curves", draw)
    return drawn


def _result(folder: Path, name: str, protocol: str, *rows: dict, step: int = 8, **more: object) -> None:
    document = {
        "protocol": protocol, "untrained": False, "step": step, "results": rows, "test": {"path": "<val>"}, **more,
    }  # fmt: skip
    (folder / f"evaluate-{name}.json").write_text(json.dumps(document))
    Image.new("RGB", (40, 20)).save(folder / f"evaluate-{name}.png")


def _knn(k: int, top1: float) -> dict:
    return {"name": f"k = {k}", "images": 9, "top1": top1, "top1_interval": [40, 60], "mean_per_class": 51}


def test_results_of_evaluate_stand_beside_those_of_the_training(folder: Path, curves: list) -> None:
    _rows(folder, [ROWS[0], {**ROWS[1], "probe_top1": 71.25}, ROWS[2]])
    _result(folder, "knn-step8", "knn", _knn(200, 50.125), _knn(20, 55), drawn="k = 20")
    _result(folder, "linear-fast-step8", "linear-fast", {"name": "lr = 0.4", "images": 9, "top1": 66.0})
    _result(folder, "knn-step2", "knn", _knn(20, 45), step=2)
    _result(folder, "knn-untrained", "knn", _knn(20, 30), untrained=True)
    _result(folder, "bad", "knn", {**_knn(20, 30), "top1": float("nan")})
    (folder / "evaluate-evil.json").write_text("[" * 100_000)
    text, page = _report(folder)
    start = text.index("Accuracy, side by side")
    section = text[start : text.index("Curves", start)]
    for row in (
        "in training: kNN step 8 62.5 - - held-out images",
        "in training: online probe step 2 71.2 - - augmented training images",
        "knn: k = 20 untrained 30.0 40.0 to 60.0 51.0 9 images of <val>",
        "knn: k = 20 step 2 45.0 40.0 to 60.0 51.0 9 images of <val>",
        "knn: k = 200 step 8 50.1 40.0 to 60.0 51.0 9 images of <val>",
        "linear-fast: lr = 0.4 step 8 66.0 - - 9 images of <val>",
        "probe a linear classifier that learns beside the network, tested on each batch of augmented training images",
        "linear a linear classifier, trained to the end on the frozen features",
        "evaluate-bad.json is not a result of tools/evaluate.py (nan is not between 0 and 100); it is skipped.",
        "evaluate-evil.json is not a result",
        "Confusion: knn, k = 20 Of the images of each true class (row)",
        "Confusion: linear-fast, lr = 0.4",
    ):
        assert row in section, row
    assert "Confusion: knn, k = 200" not in text and text.count("Confusion: ") == 2  # as drawn, of the newest
    assert page.classes["plot"] == 9 + 2


def test_a_run_without_evaluations_says_how_to_get_them(folder: Path, curves: list) -> None:
    _rows(folder, ROWS)
    assert "tools/evaluate.py RUN measures kNN and, with --protocol linear" in _report(folder)[0]


def _two_runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs of the same name, which differ in one setting, one version and their rows."""
    for name, tau in (("first", 0.9), ("second", 0.99)):
        folder = tmp_path / name / "run$x"
        folder.mkdir(parents=True)
        config = _config(folder, tmp_path)
        settings = config.model_dump(mode="json")
        settings["optimizer"]["base_tau"] = tau
        _save(folder, schema.from_settings(settings), 8)
        _rows(folder, ROWS if name == "first" else [*ROWS[:2], {"step": 4, "loss": 1.25, "probe_top1": 33.0}])
        start = {"step": 0, "hardware": "abacus", "versions": {"torch": name, "numpy": "1"}}
        (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    return tmp_path / "first" / "run$x", tmp_path / "second" / "run$x"


def test_runs_are_compared(tmp_path: Path, curves: list) -> None:
    first, second = _two_runs(tmp_path)
    _result(first, "knn-step8", "knn", _knn(20, 55))
    assert report.main([str(first), str(second)]) == 0
    page = Inert((first / "comparison.html").read_text())
    text = " ".join(" ".join(page.text).split())
    assert "2 runs compared first/run$x · second/run$x" in text
    assert (
        "first/run$x step 8 of 8, finished 3.5000 25.0 → 62.5 - knn, k = 20: 55.0 (step 8) "
        "second/run$x step 4 of 8, not finished 1.2500 25.0 33.0 -"
    ) in text
    differing = text[text.index("Settings that differ") : text.index("Curves")].strip()
    assert differing == (
        "Settings that differ setting first/run$x second/run$x optimizer.base_tau 0.9 0.99 "
        "version of torch first second"
    )
    for title in (
        "Loss",
        "Accuracy, kNN, held-out images",
        "Accuracy, online probe, training images",
        "Gradient",
    ):
        assert title in text
    assert page.classes["plot"] == page.tags["img"] == len(curves) == 12
    names, marks = ("first/run$x", "second/run$x"), figures.MARKS
    assert curves[0] == (
        {names[0]: [(2, 3.5)], names[1]: [(2, 3.5), (4, 1.25)]}, {"marks": [marks[0], marks[1]]}
    )  # fmt: skip
    assert curves[1][0] == {names[0]: [(0, 25.0), (8, 62.5)], names[1]: [(0, 25.0)]}
    assert curves[2] == ({names[1]: [(4, 33.0)]}, {"marks": [marks[1]]})  # the same mark in every figure


def test_equal_runs_have_equal_settings(tmp_path: Path, curves: list) -> None:
    first, second = _two_runs(tmp_path)
    for name in ("checkpoint-000000008.pt", "starts.jsonl"):
        (second / name).write_bytes((first / name).read_bytes())
    assert report.main([str(first), str(second), "--out", str(tmp_path / "c.html")]) == 0
    assert (
        "None but run.out: settings, hardware and versions are the same." in (tmp_path / "c.html").read_text()
    )


def test_an_unfinished_run_says_what_is_missing(folder: Path) -> None:
    _rows(folder, ROWS[1:2])
    text, page = _report(folder)
    for sentence in (
        "step 2",
        "kNN accuracy: not measured",
        "Command, hardware and versions: not recorded",
        "Settings: not known",
        "Not in metrics.jsonl: accuracy.",
        "views.png does not exist",
        "There is no encoder yet",
    ):
        assert sentence in text
    assert page.classes["plot"] == page.tags["img"] == 8


def test_lines_that_cannot_be_read_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _rows(folder, ROWS[:3])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('\n\nnull\n{"step": 11, "lo')
    (folder / "corrupt.jsonl").write_text("x\n")
    assert read_run(folder).problems == [
        "metrics.jsonl: lines 4, 6: not as train.py writes them; skipped.",
        "corrupt.jsonl: line 1: not as train.py writes them; skipped.",
    ]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "metrics.jsonl has no rows, and there is no checkpoint"),
        ("\0\n" * 9, "metrics.jsonl: lines 1, 2, 3, 4, 5, and 4 more: not as train.py writes them; skipped"),
    ],
)
def test_a_run_of_which_nothing_is_left_is_refused(
    folder: Path, content: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "metrics.jsonl").write_text(content)
    assert report.main([str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"report: {folder}: nothing is left to report: {why}. Give")
    assert not (folder / "report.html").exists()


def test_a_run_that_took_no_step(folder: Path) -> None:
    (folder / "starts.jsonl").write_text('{"step": 0, "command": "x"}\n')
    text, page = _report(folder)
    assert "There is no encoder yet" in text and page.tags["img"] == 0


def test_an_unlabeled_run_on_its_training_images(folder: Path, tmp_path: Path) -> None:
    _pictures(tmp_path / "images", [""])
    _save(folder, _config(folder, tmp_path / "images", evaluate=False), 3)
    text, page = _report(folder)
    assert "data.path, the training images" in text and "checkpoint-000000003.pt, step 3" in text
    assert text.count("There are no labels, so all points look alike") == 1 and "no label<" not in text
    assert "wrong neighbors are not marked" in text
    assert page.tags["img"] == page.classes["plot"] + 6 * 6 and "wrong" not in page.classes


def test_data_and_number_of_images(folder: Path, tmp_path: Path) -> None:
    _pictures(tmp_path / "other", ["a", "b"])
    _save(folder, _config(folder, tmp_path / "gone"), 3)
    text, _ = _report(folder)
    assert "The images cannot be read (eval.path)" in text and "Give others with --data" in text
    text, _ = _report(folder, "--data", str(tmp_path / "other"), "--images", "5")
    assert " 5 of 12 images" in text and "of at most 4;" in text


def test_the_newest_whole_encoder_is_taken(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, tmp_path)
    _save(folder, config, 3)
    _save(folder, config, 4, exported=True)
    assert read_run(folder).encoder_origin == "encoder.safetensors, step 4"
    _save(folder, config, 5)  # the run went on
    run = read_run(folder)
    assert run.encoder_origin == "checkpoint-000000005.pt, step 5"
    torch.manual_seed(5)
    expected = make_byol(config.model).online.encoder.state_dict()
    assert run.trained is not None
    assert all(torch.equal(value, expected[key]) for key, value in run.trained.encoder.state_dict().items())
    (folder / "encoder.safetensors").write_bytes(b"x" * 100)
    (folder / "checkpoint-000000005.pt").write_bytes(b"x" * 100)
    text, _ = _report(folder)
    assert "encoder.safetensors cannot be read" in text and "checkpoint-000000005.pt is not a byolt" in text
    assert read_run(folder).encoder_origin == "checkpoint-000000003.pt, step 3"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"config": {"model": {"backbone": "resnet9"}}}, "its config cannot be used"),
        ({"config": None}, "its config cannot be used"),
        ({"model": {}}, "does not fit its own config"),
        ({"model": {"online.encoder.conv1.weight": torch.zeros(1)}}, "does not fit its own config"),
        ({"model": [1]}, "is not a run's checkpoint"),
        ({"step": None}, "is not a run's checkpoint"),
        ({"step": "DROP"}, "holds no 'step'"),
    ],
)  # fmt: skip
def test_odd_checkpoints_are_passed_over(change: dict, sentence: str, folder: Path, tmp_path: Path) -> None:
    config = _config(folder, tmp_path)
    _save(folder, config, 2)
    model = make_byol(config.model)
    state = {"step": 3, "model": model.state_dict(), "config": config.model_dump(mode="json")} | change
    checkpoint.save(folder, 3, {key: value for key, value in state.items() if value != "DROP"}, keep=3)
    (folder / "checkpoint-x1.pt").write_bytes(b"somebody's")
    text, _ = _report(folder)
    assert sentence in text and "checkpoint-000000003.pt" in text
    assert read_run(folder).encoder_origin == "checkpoint-000000002.pt, step 2"


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("metrics.jsonl", '{"step": 99, "epoch": "x"}'),
        ("metrics.jsonl", '{"step": 99, "epoch": 1e-320}'),
        ("metrics.jsonl", '{"step": 99, "corrupt_images": Infinity}'),
        ("metrics.jsonl", '{"step": 99, "loss": NaN, "knn_top1": null}'),
        ("metrics.jsonl", f'{{"step": 99, "loss": {"9" * 400}}}'),
        ("metrics.jsonl", f'{{"step": {"9" * 400}, "loss": 1}}'),
        ("metrics.jsonl", "[" * 100_000),
        ("starts.jsonl", '{"step": 1, "versions": [1], "config": 3}'),
        ("starts.jsonl", '{"step": "x"}'),
        ("corrupt.jsonl", '{"id": [1]}'),
    ],
)  # fmt: skip
def test_hostile_lines_do_not_stop_the_report(file: str, line: str, folder: Path, tmp_path: Path) -> None:
    _save(folder, _config(folder, tmp_path / "gone"), 3)
    _rows(folder, FEW)
    with (folder / file).open("a") as lines:
        lines.write(f"\n{line}\n")
    text, _ = _report(folder)
    assert "resnet8 · 12 images" in text and "25.0 → 62.5 %" in text and "3.500" in text


def test_only_an_earlier_report_is_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _rows(folder, FEW)
    _report(folder)
    _report(folder)
    (tmp_path / "mine.html").write_text("<!DOCTYPE html>precious")
    (tmp_path / "folder.html").mkdir()
    for name in ("mine.html", "folder.html"):
        assert report.main([str(folder), "--out", str(tmp_path / name)]) == 2
        assert f"{name} exists and is not a report" in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "<!DOCTYPE html>precious"


def test_names_need_not_be_utf_8(folder: Path, tmp_path: Path) -> None:
    _pictures(tmp_path / "images", ["a", "b"])
    (tmp_path / "images" / "b").rename(tmp_path / "images" / os.fsdecode(b"caf\xe9"))
    _save(folder, _config(folder, tmp_path / "images"), 3)
    assert "caf?" in _report(folder)[0]


def test_no_image_decodes(folder: Path, tmp_path: Path) -> None:
    _pictures(tmp_path / "images", ["a"])
    for path in (tmp_path / "images" / "a").iterdir():
        data = path.read_bytes()
        path.write_bytes(data[:100] + bytes(20) + data[120:])  # header and end are whole
    _save(folder, _config(folder, tmp_path / "images"), 3)
    assert "none of 6 images decodes" in _report(folder)[0]


def test_ctrl_c_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    _rows(folder, ROWS)
    monkeypatch.setattr("byolt.tools.reporting.run.read_run", interrupted)
    assert report.main([str(folder)]) == 130
    assert capsys.readouterr().err == "report: interrupted, nothing was written\n"
    monkeypatch.setattr(export, "load_trained", interrupted)
    assert export.main(["x.safetensors", "--to", "timm", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "export: interrupted, nothing was written\n"


def test_broken_features_are_said(folder: Path, tmp_path: Path) -> None:
    _pictures(tmp_path / "images", ["a", "b"])
    config = _config(folder, tmp_path / "images")
    for value, sentence in ((0.0, "All images have the same features"), (torch.nan, "are not finite")):
        model = make_byol(config.model)
        for parameter in model.online.encoder.parameters():
            parameter.data.fill_(value)
        state = {"step": 1, "model": model.state_dict(), "config": config.model_dump(mode="json")}
        checkpoint.save(folder, 1, state, keep=1)
        assert sentence in _report(folder)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["."], "neither metrics.jsonl nor a checkpoint"),
        (["run", "--images", "1"], "--images 1"),
        (["run", "--data", "nowhere"], "'nowhere' does not exist"),
        (["run", "nowhere"], "nowhere is not a folder"),
        (["run", "./run"], "run is named twice"),
        (["run"] * 11, "11 runs: compare 2 to 10"),
        (["run", "other", "--data", "run"], "--data is for the report of one run"),
        (["run", "--out", "no/where.html"], "--out no/where.html: its folder does not exist"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
        _rows(tmp_path / name, ROWS)
    assert report.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.html"))


def test_marks_go_to_the_most_frequent_classes() -> None:
    labels = np.array([*range(12), *range(1, 11), -1])  # 0 and 11 are once, the others twice
    marks = figures.marks_of_classes(labels)
    assert list(marks) == list(range(1, 11)) and figures.OTHERS not in marks.values()
    assert len({mark.color for mark in marks.values()}) == len({mark.marker for mark in marks.values()}) == 10
    assert figures.marks_of_classes(np.array([-1, -1])) == {}


def test_figures_have_a_background_of_their_own() -> None:
    series = {"one": [(1, 2.0), (3, 4.0)], "two": [(2, 3.0)]}
    marks = [figures.MARKS[1], figures.OTHERS]
    for png in (
        figures.curves(series, 3, "unit", hint=(3.0, "hint")),
        figures.scatter(np.eye(2), marks),
        figures.spectrum(np.array([3.0, 1.0, 0.0]), 1.8),
    ):
        with Image.open(io.BytesIO(png)) as picture:
            assert picture.format == "PNG" and picture.width > 500
            assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)  # on a dark page, too


def _twelve_images(folder: Path, tmp_path: Path) -> None:
    _pictures(tmp_path / "images", ["a", "b"])
    _save(folder, _config(folder, tmp_path / "images"), 3)


def test_without_scikit_learn_the_map_is_pca_s(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _twelve_images(folder, tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    text, page = _report(folder)
    assert "Map: PCA" in text and "scikit-learn is not installed" in text and "Map: t-SNE" not in text
    assert page.classes["plot"] == 2


def test_with_scikit_learn_there_is_a_second_map(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn.manifold", reason="scikit-learn is not installed")
    _twelve_images(folder, tmp_path)
    text, page = _report(folder)
    assert "Map: PCA" in text and "Map: t-SNE" in text and "By scikit-learn, cosine, perplexity 4" in text
    assert page.classes["plot"] == 3
    text, page = _report(folder, "--images", "9")
    assert "it needs 10 images or more" in text and page.classes["plot"] == 2


def test_wrong_neighbors_are_marked() -> None:
    angles = torch.tensor([0.0, 20.0, 50.0, 80.0]) * torch.pi / 180
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    pixels = [np.zeros((2, 2, 3), np.uint8)] * 4
    files = ["a.jpg", "b.jpg", "c.jpg", "e<b>/" + 30 * "d" + ".jpg"]
    labels = np.array([0, 1, 0, -1])
    encoded = ImageFeatures(features, labels, pixels, ["cat", "dog"], tried=4, file=files.__getitem__)
    html = page.render("name", "", [], [], [neighbors_section(encoded)])
    cells = re.findall(r'<td class="(\w*)"><img alt="([^"]*)"', html)
    assert cells == [
        ("", "cat"), ("wrong", "✗ dog 0.94"), ("right", "cat 0.64"), ("", f"…\u2060{19 * 'd'}.jpg 0.17"),
        ("", "dog"), ("wrong", "✗ cat 0.94"), ("wrong", "✗ cat 0.87"), ("", f"…\u2060{19 * 'd'}.jpg 0.50"),
    ]  # fmt: skip
    assert f'title="e&lt;b&gt;/{30 * "d"}.jpg"' in html and "no label" not in html
    assert "33.3 % of these neighbors" in html and "chance is 33.3 %" in html


@pytest.mark.slow
def test_report_of_what_train_leaves(tmp_path: Path, images: Path) -> None:  # noqa: F811
    run = TrainRun(tmp_path, images)
    assert run("train.stop_at_step=4", drawn=True).returncode == 0
    text, _ = _report(run.out)
    assert "step 4 of 8, stopped there by train.stop_at_step" in text
    assert run("--resume", "auto").returncode == 0
    text, page = _report(run.out)
    assert [row["step"] for row in read_run(run.out).starts] == [0, 4]
    assert "started before" in text and "at step 4" in text
    assert "step 8 of 8, finished" in text and "encoder.safetensors, step 8" in text
    assert "of 8 images" in text and "data.backend=torch" in text
    assert page.classes["plot"] == 9 + 2 and "note" not in page.classes
