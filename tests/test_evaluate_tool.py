"""tools/evaluate.py as its users run it: every protocol on images whose class is their color, on one and two ranks."""

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.progress import Progress
from whole_runs import SERVER, free_port, on_two_ranks, rank_environment

from byolt.configs import schema
from byolt.model import distributed
from byolt.model.byol import make_byol
from byolt.model.quality.linear import fit_logistic
from byolt.model.run import checkpoint
from byolt.model.run.trained import export_trained, load_trained, weights_digest
from byolt.pipelines.plain import plain_images
from byolt.pipelines.sources import Source, open_source
from byolt.tools import evaluate
from byolt.tools.evaluation import finetuning, frozen, inputs, program, protocols, result
from byolt.tools.evaluation.confusion import save_confusion
from byolt.tools.evaluation.frozen import Setup
from byolt.tools.exporting import model_card
from byolt.tools.make_shards import main as make_shards

CONFIG = """
run: {out: unused}
data: {path: DATA/train, backend: torch, threads: 1}
augment:
  size: 16
  mean: [0.5, 0.5, 0.5]
  std: [0.25, 0.25, 0.25]
  view1: {blur: 1.0, solarize: 0.0, crop_area: [0.5, 1.0]}
  view2: {blur: 0.1, solarize: 0.2}
model: {backbone: resnet8, stem: cifar, projector_hidden: 16, projector_size: 8, predictor_hidden: 16}
optimizer: {base_lr: 1.0, warmup_epochs: 0, weight_decay: 1.0e-6, base_tau: 0.9}
train: {epochs: 2, batch_size: 8}
eval: {path: DATA/val}
"""
COLORS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
FAST = {
    "knn": ["--k", "5"],
    "linear": ["--epochs", "15", "--batch-size", "16", "--lr", "0.5", "1"],
    "finetune": ["--labels", "0.5", "--epochs", "8", "--lr", "0.2", "0.000001", "--batch-size", "16"],
    "transfer": ["--l2", "5"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a checkpoint, an exported encoder and images of three colors: 24 to learn from, 7 to test."""
    root = tmp_path_factory.mktemp("colors")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 7)):
        for name, color in COLORS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.normal(0, 40, (18, 20, 3))
                pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (root / "config.yaml").write_text(CONFIG.replace("DATA", str(root)))
    config = schema.load(root / "config.yaml")
    torch.manual_seed(0)
    model = make_byol(config.model)
    state = {"step": 18, "model": model.state_dict(), "config": config.model_dump(mode="json")}
    checkpoint.save(root, 18, state, keep=1)
    settings = {"backbone": "resnet8", "stem": "cifar", "steps": "18", "config": schema.to_yaml(config)}
    checkpoint.export_encoder(root / "encoder.safetensors", model.online.encoder.state_dict(), settings)
    return root


def _main(run: Path, out: Path, *options: str) -> int:
    threads = torch.get_num_threads()
    given = [str(run / "checkpoint-000000018.pt"), "--out", str(out), "--device", "cpu", "--threads", "1"]
    try:
        return evaluate.main([*given, *options])
    finally:
        torch.set_num_threads(threads)


def _measure(run: Path, out: Path, *options: str) -> dict[str, Any]:
    assert _main(run, out, *options) == 0
    [document] = out.glob("*.json")
    assert Image.open(document.with_suffix(".png")).width > 300
    return json.loads(document.read_text())


def test_checkpoint_and_export_hold_the_same_encoder(run: Path) -> None:
    first, second = (load_trained(run / name) for name in ("checkpoint-000000018.pt", "encoder.safetensors"))
    assert first.digest == second.digest and first.config == second.config and first.step == second.step == 18
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(first.encoder(images), second.encoder(images))
    with torch.no_grad():
        first.encoder.conv1.weight[0, 0, 0, 0] += 1e-3  # type: ignore[index,union-attr,operator]
    assert weights_digest(first.encoder.state_dict()) != second.digest


@pytest.mark.parametrize("protocol", FAST)
def test_every_protocol_finds_the_colors(
    protocol: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    document = _measure(run, tmp_path, "--protocol", protocol, *FAST[protocol])
    [result] = document["results"]
    assert result["top1"] == result["mean_per_class"] == 100.0 and result["images"] == 21
    assert "top5" not in result  # of three classes
    z2 = 1.959964**2
    assert result["top1_interval"] == pytest.approx([100 * 21 / (21 + z2), 100])
    assert document["encoder_sha256"] == load_trained(run / "encoder.safetensors").digest
    shown = capsys.readouterr().out
    assert "100.00" in shown and f"evaluate-{protocol}" in " ".join(shown.split())
    assert shown.splitlines()[-1].startswith(f"{tmp_path}/evaluate-{protocol}")
    settings = result["settings"]
    if protocol == "linear":
        assert settings["train_images"] == 66 and settings["held_out_images"] == 6 and settings["steps"] == 61
        assert settings["held_out_top1"].keys() == {"0.5", "1.0"}
    if protocol == "finetune":
        assert settings["train_images"] == 36 and settings["held_out_images"] == 3
        assert settings["lr"] == 0.2  # not the useless one
    if protocol == "transfer":
        assert len(settings["held_out_top1"]) == 5 and settings["l2"] in settings["l2_values"]


def test_features_taken_once_do_as_well(run: Path, tmp_path: Path) -> None:
    document = _measure(run, tmp_path, "--protocol", "linear", "--fast", *FAST["linear"])
    assert document["results"][0]["top1"] == 100.0 and document["protocol"] == "linear-fast"
    assert (tmp_path / "evaluate-linear-fast-step18.json").exists()  # beside the other's, not over it


@pytest.mark.slow
def test_lbfgs_on_standardized_features_ignores_their_scale(run: Path, tmp_path: Path) -> None:
    document = _measure(run, tmp_path, "--protocol", "linear", "--lbfgs", "--l2", "3")
    [result] = document["results"]
    assert document["protocol"] == "linear-lbfgs" and result["top1"] == 100.0
    assert result["settings"]["standardized"] and len(result["settings"]["held_out_top1"]) == 3
    assert (tmp_path / "evaluate-linear-lbfgs-step18.json").exists()
    setup = _setup(run, open_source(str(run / "train")), open_source(str(run / "val")))
    [plain], _ = protocols.evaluate_transfer(setup, [0.1], 100, standardize=True)
    scales = torch.linspace(0.1, 10, setup.width)
    setup.encoder.register_forward_hook(lambda encoder, images, features: features * scales)
    [scaled], _ = protocols.evaluate_transfer(setup, [0.1], 100, standardize=True)
    torch.testing.assert_close(scaled.scores, plain.scores, rtol=1e-4, atol=1e-4)


def test_finetuning_on_a_list(run: Path, tmp_path: Path) -> None:
    listing = tmp_path / "some.txt"
    listing.write_text("".join(f"{name}/{i}.png\n" for name in COLORS for i in range(8)))
    options = ["--subset", str(listing), *FAST["finetune"][2:-2], "--batch-size", "8"]
    document = _measure(run, tmp_path / "out", "--protocol", "finetune", *options)
    assert document["results"][0]["settings"]["train_images"] == 24
    assert (tmp_path / "out" / "evaluate-finetune-some-step18.json").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--protocol", "finetune"], "needs --labels 0.01, 0.1 or 1.0, or --subset FILE"),
        (["--protocol", "finetune", "--labels", "2"], "share of 2 of the labels"),
        (["--protocol", "linear", "--batch-size", "67"], "a batch of 67 on 1 ranks does not fit 66"),
        (
            ["--protocol", "knn", "--seed", str(2**63)],
            "--seed 9223372036854775808 must be at least 0 and below 2**63",
        ),
        (["--protocol", "knn", "--threads", str(2**31)], "--threads 2147483648 must be at most 1024"),
        (["--protocol", "transfer", "--l2", "99999"], "--l2 99999 must be at most 10000"),
        (
            ["--protocol", "knn", "--device", "cuda"],
            "--device=cuda: process 0 of this machine finds 0 GPUs: set it to cpu",
        ),
        (["--protocol", "linear", "--batch-size", "0"], "--batch-size 0 must be a finite number above 0"),
        (["--protocol", "linear", "--lr", "1", "0"], "--lr 0.0 must be a finite number above 0"),
        (["--protocol", "linear", "--epochs", "inf"], "--epochs inf must be a finite number above 0"),
        (["--protocol", "knn", "--temperature", "nan"], "--temperature nan must be a finite number above 0"),
        (["--protocol", "linear", "--epochs", "1", "2"], "takes one number"),
        (["--protocol", "knn", "--fast"], "--fast is an option of --protocol linear, not knn"),
        (["--protocol", "knn", "--labels", "1.0"], "--labels is an option of --protocol finetune, not knn"),
        (["--protocol", "linear", "--l2", "5"], "--l2 needs --lbfgs"),
        (["--protocol", "linear", "--lbfgs", "--fast"], "--fast cannot be combined with --lbfgs"),
        (["--protocol", "linear", "--k", "5"], "--k is an option of --protocol knn, not linear"),
        (["--protocol", "transfer", "--lr", "1"], "--lr is an option of --protocol linear and finetune, not"),
        (
            ["--protocol", "finetune", "--max-iterations", "9"],
            "--max-iterations is an option of --protocol linear and transfer",
        ),
        (
            ["--protocol", "finetune", "--subset", "x", "--max-images", "9"],
            "--subset cannot be combined with --max-images",
        ),
        (["--protocol", "knn", "--data", "/nowhere"], "--data: '/nowhere' does not exist"),
        (["--protocol", "knn", "--data", "FLAT"], "holds unlabeled images"),
        (["--protocol", "knn", "--train", "synthetic:10:8x8"], "has other classes than"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str],
    part: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    flat = str(run / "val" / "red")
    command = [str(run / "encoder.safetensors"), *(flat if o == "FLAT" else o for o in options)]
    assert (
        evaluate.main(
            [*command[:1], "--device", "cpu", "--threads", "1", "--out", str(tmp_path), *command[1:]]
        )
        == 2
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("evaluate: ") and part in error
    assert list(tmp_path.iterdir()) == []


def _setup(run: Path, train: Source, test: Source) -> Setup:
    trained, world = load_trained(run / "encoder.safetensors"), distributed.init("cpu")
    progress = Progress(disable=True)
    return Setup(trained.config, trained.encoder, world, train, test, 0, torch.float32, progress)


class _Cut:
    """A source, one of whose images does not decode."""

    def __init__(self, source: Source, cut: int) -> None:
        self._source, self._cut = source, cut

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, i: int) -> bytes:
        data = self._source.read(i)
        return data[:100] if i == self._cut else data


def test_an_image_that_does_not_decode_does_not_hang_a_batch_of_all(run: Path) -> None:
    train, test = open_source(run / "train"), open_source(run / "val")
    fit = protocols._hold_out(_setup(run, train, test))[0]
    setup = _setup(run, _Cut(train, int(fit._ids[5])), test)
    [outcome], _ = protocols.evaluate_linear(setup, [0.5], 3, len(fit), fast=True)
    settings = outcome.settings
    assert (settings["batch_size"], settings["train_images"], settings["steps"]) == (65, 65, 3)


def test_a_trial_that_diverges_is_not_the_answer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--protocol", "finetune", "--labels", "0.5", "--epochs", "8", "--batch-size", "16", "--lr"]
    document = _measure(run, tmp_path / "one", *options, "1e30", "0.2")
    [result] = document["results"]
    assert result["top1"] == 100.0 and result["settings"]["lr"] == 0.2
    assert result["settings"]["held_out_top1"] == {"lr 1e+30, 8 epochs": None, "lr 0.2, 8 epochs": 100.0}
    assert _main(run, tmp_path / "all", *options, "1e30", "1e31") == 1
    assert "all 2 settings diverged" in capsys.readouterr().err and not list((tmp_path / "all").iterdir())


def test_a_head_that_diverges_is_not_the_answer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--protocol", "linear", "--fast", "--epochs", "15", "--batch-size", "16", "--lr"]
    [result] = _measure(run, tmp_path / "one", *options, "5e39", "0.5")["results"]
    assert result["top1"] == 100.0 and result["settings"]["held_out_top1"] == {"5e+39": None, "0.5": 100.0}
    assert _main(run, tmp_path / "all", *options, "5e39") == 1
    assert "all 1 settings diverged" in capsys.readouterr().err and not list((tmp_path / "all").iterdir())


def test_a_fit_that_diverges_is_not_the_answer(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(features: torch.Tensor, labels: torch.Tensor, classes: int, l2: float, most: int) -> Any:
        fitted = fit_logistic(features, labels, classes, l2, most)
        return fitted._replace(bias=fitted.bias * torch.nan) if l2 < 1e-5 else fitted

    monkeypatch.setattr("byolt.tools.evaluation.protocols.fit_logistic", fit)
    [result] = _measure(run, tmp_path, "--protocol", "transfer", "--l2", "3")["results"]
    settings = result["settings"]
    assert settings["held_out_top1"][0] is None and settings["l2"] > 1e-5 and result["top1"] == 100.0


@pytest.mark.parametrize("temperature", ["0.01", "0.0001"])
def test_knn_at_a_low_temperature(temperature: str, run: Path, tmp_path: Path) -> None:
    document = _measure(run, tmp_path, "--protocol", "knn", "--k", "60", "--temperature", temperature)
    assert document["results"][0]["top1"] == 100.0


def test_thinned_images_have_a_fingerprint_of_their_own(run: Path, tmp_path: Path) -> None:
    options = ["--protocol", "knn", "--k", "5"]
    documents = [
        _measure(run, tmp_path / str(number), *options, "--max-images", str(number))
        for number in (20, 21, 19, 99)
    ]
    tests = [document["test"] for document in documents]
    assert [test["images"] for test in tests] == [20, 21, 19, 21]
    assert tests[1]["fingerprint"] == tests[3]["fingerprint"] == open_source(run / "val").fingerprint
    assert len({test["fingerprint"] for test in tests}) == 3


def test_ctrl_c_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "load_trained", interrupted)
    assert evaluate.main([str(run / "encoder.safetensors"), "--protocol", "knn"]) == 130
    assert capsys.readouterr().err == "evaluate: interrupted, nothing was written\n"


def test_after_a_failure_no_rank_waits_for_the_others(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To leave NCCL's group is to wait for the ranks that failed."""
    left: list[distributed.World] = []
    monkeypatch.setattr(distributed, "shutdown", left.append)
    assert _main(run, tmp_path, "--protocol", "finetune", "--labels", "2") == 2 and not left
    assert _main(run, tmp_path, "--protocol", "knn") == 0 and len(left) == 1


def test_labels_that_are_ids_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(run / "train")
    source.labels, source.classes = source.labels + 10**12, None
    monkeypatch.setattr(inputs, "open_split", lambda option, path, settings=None: source)
    assert _main(run, tmp_path, "--protocol", "knn") == 2
    assert "the largest label is 1,000,000,000,002" in capsys.readouterr().err


def test_only_labels_that_occur_are_classes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix of 100,000 x 100,000 counts has 80 GB."""

    def open_with_odd_labels(path: str) -> Source:
        source = open_source(path)
        source.labels, source.classes = np.array([3, 7, 99_999])[source.labels], None
        return source

    plain = _measure(run, tmp_path / "plain", "--protocol", "knn", *FAST["knn"])
    monkeypatch.setattr(inputs, "open_split", lambda option, path, settings: open_with_odd_labels(path))
    odd = _measure(run, tmp_path / "odd", "--protocol", "knn", *FAST["knn"])
    assert odd["classes"] == 3 and odd["results"] == plain["results"]
    train, test = open_with_odd_labels(str(run / "train")), open_with_odd_labels(str(run / "val"))
    test.classes = ["a", "b", "c", "d"]  # 3 has a name
    inputs.number_classes(train, test)
    assert test.classes == train.classes == ["a", "b", "c", "d", "7", "99999"]
    assert set(train.labels) == set(test.labels) == {3, 4, 5}


def test_what_is_no_checkpoint_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    damaged = tmp_path / "checkpoint-000000018.pt"
    data = bytearray((run / damaged.name).read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    other = tmp_path / "other.safetensors"
    checkpoint.export_encoder(other, {"w": torch.zeros(1)}, {})
    for path, part in (
        (tmp_path, "has no encoder: checkpoint"),
        (run / "val", "has no encoder: it holds neither encoder.safetensors nor a checkpoint-*.pt"),
        (damaged, "is damaged"),
        (other, "has no 'steps' in its header"),
        (tmp_path / "nowhere.safetensors", "cannot be read"),
        (run / "config.yaml", "is not a byolt checkpoint"),
    ):
        assert evaluate.main([str(path), "--protocol", "knn"]) == 2
        assert part in capsys.readouterr().err


def _features(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    trained, world = load_trained(run / "encoder.safetensors"), distributed.init("cpu", timeout=30)
    source, progress = open_source(run / "train"), Progress(disable=True)
    setup = Setup(trained.config, trained.encoder, world, source, source, 0, torch.float32, progress)
    try:
        return frozen.plain_features(setup, source, "features")
    finally:
        distributed.shutdown(world)


def _worker(rank: int, ports: list[int], run: str, out: str) -> None:
    frozen.BATCH = 8  # so that there are batches for both
    for (protocol, options), port in zip(FAST.items(), ports, strict=False):
        os.environ["MASTER_PORT"] = str(port)
        assert _main(Path(run), Path(out) / protocol, "--protocol", protocol, *_undecided(options)) == 0
    os.environ["MASTER_PORT"] = str(ports[-1])
    torch.save(_features(Path(run)), Path(out) / f"{rank}.pt")


def _undecided(options: list[str]) -> list[str]:
    """So short a training that the answers are not yet all right: equality then says something."""
    short = {"15": "0.5", "8": "1", "0.2": "0.02"}
    return [short.get(option, option) for option in options]


@pytest.mark.slow
def test_two_ranks_measure_what_one_measures(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_two_ranks(_worker, [free_port() for _ in range(len(FAST) + 1)], str(run), str(tmp_path / "two"))
    monkeypatch.setattr(frozen, "BATCH", 8)
    whole, labels = _features(run)
    assert whole.shape == (72, 128) and labels.tolist() == [0] * 24 + [1] * 24 + [2] * 24
    for rank in range(2):
        features, its_labels = torch.load(tmp_path / "two" / f"{rank}.pt", weights_only=True)
        assert torch.equal(features, whole) and torch.equal(its_labels, labels)
    wrong = []
    for protocol, options in FAST.items():
        one = _measure(run, tmp_path / "one" / protocol, "--protocol", protocol, *_undecided(options))
        two = json.loads(next((tmp_path / "two" / protocol).glob("*.json")).read_text())
        assert one["machine"]["ranks"] == 1 and two["machine"]["ranks"] == 2
        assert one["results"] == two["results"]
        wrong.append(one["results"][0]["top1"] < 100)
    assert any(wrong)


def test_settings_are_printed_as_people_write_them() -> None:
    values = (9.999999999999993, 0.1, 30.0, 1e-6, True, False, 384, "sgd")
    assert [result._shown(value) for value in values] == [
        "10", "0.1", "30", "1e-06", "yes", "no", "384", "sgd",
    ]  # fmt: skip


def test_untrained_is_the_same_network_with_fresh_weights(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--protocol", "knn", "--k", "5", "--untrained"]
    documents = [_measure(run, tmp_path / seed, *options, "--seed", seed) for seed in "001"]
    documents.append(_measure(run, tmp_path / "trained", *options[:-1]))
    scores = [document["results"] for document in documents]
    assert scores[0] == scores[1]
    assert [document["untrained"] for document in documents] == [True, True, True, False]
    assert documents[0]["encoder_sha256"] is None and documents[0]["step"] == 0
    assert (tmp_path / "0" / "evaluate-knn-untrained.json").exists()
    assert "knn: resnet8 (cifar stem), untrained" in capsys.readouterr().out
    first, again, other = (inputs.untrained(load_trained(run / "encoder.safetensors"), s) for s in (0, 0, 1))
    weights = [trained.encoder.conv1.weight for trained in (first, again, other)]  # type: ignore[union-attr]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])  # type: ignore[arg-type]


def test_batch_norms_of_an_untrained_encoder_fit_the_training_images(run: Path) -> None:
    train = open_source(run / "train")
    setup = _setup(run, train, train)
    setup.encoder = inputs.untrained(load_trained(run / "encoder.safetensors"), 0).encoder
    frozen.calibrate(setup)
    inside: list[torch.Tensor] = []
    norm = setup.encoder.bn1
    norm.register_forward_hook(lambda module, inputs, output: inside.append(module.forward(*inputs)))  # type: ignore[operator,union-attr]
    images = torch.cat([images for images, _ in plain_images(train, np.arange(72), setup.config)])
    with torch.no_grad():
        setup.encoder(images)
    [normalized] = inside  # of the very batch that was averaged over: mean 0 and deviation 1 in each channel
    deviation, mean = torch.std_mean(normalized, dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(deviation, torch.ones(32), atol=1e-2, rtol=0)


def test_the_supervised_ceiling_learns_from_fresh_weights(run: Path, tmp_path: Path) -> None:
    options = ["--epochs", "8", "--lr", "0.2", "--batch-size", "16", "--untrained"]
    document = _measure(run, tmp_path, "--protocol", "finetune", "--labels", "1.0", *options)
    assert document["results"][0]["top1"] == 100.0 and document["untrained"]
    assert (tmp_path / "evaluate-finetune-1-untrained.json").exists()


@pytest.fixture
def fourth(run: Path, tmp_path: Path) -> list[str]:
    """--data and --train with a fourth class that sorts last and has but few images: white."""
    options = []
    for split in ("train", "val"):
        root = tmp_path / "four" / split
        shutil.copytree(run / split, root)
        (root / "white").mkdir()
        Image.new("RGB", (20, 18), (250, 250, 250)).save(root / "white" / "0.png")
        options += [{"train": "--train", "val": "--data"}[split], str(root)]
    return options


def test_a_class_that_has_a_name_and_no_image_is_drawn(
    run: Path, fourth: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "random_ids", lambda total, count: np.arange(0, total - 1, 2))  # no white
    options = ["--protocol", "knn", "--k", "5", "--max-images", "20"]
    document = _measure(run, tmp_path / "out", *options, *fourth)
    assert document["classes"] == 4 and document["results"][0]["top1"] == 100.0


def test_a_picture_that_fails_is_a_warning(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such font")

    options = ["--protocol", "knn", "--k", "5"]
    _measure(run, tmp_path, *options)
    monkeypatch.setattr("byolt.tools.evaluation.result.save_confusion", fail)
    assert _main(run, tmp_path, *options) == 0
    assert "could not be drawn: no such font" in capsys.readouterr().err
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]  # the earlier picture is gone


def test_thinned_images_are_of_all_classes(run: Path) -> None:
    source = inputs.open_labeled("--data", "synthetic:1000:8x8", 100)  # labels are i mod 10
    counts = np.bincount(source.labels, minlength=10)
    assert counts.sum() == 100 and counts.min() >= 3


def test_results_of_other_settings_lie_side_by_side(run: Path, tmp_path: Path) -> None:
    knn, other = ["--protocol", "knn", "--k", "5"], str(tmp_path / "pets" / "val")
    shutil.copytree(run / "val", other)
    Image.new("RGB", (20, 18), (250, 30, 30)).save(Path(other) / "red" / "x.png")
    for more in (
        [],
        ["--max-images", "20"],
        ["--data", other],
        ["--data", str(run / "val")],
        ["--seed", "3"],
    ):
        assert _main(run, tmp_path / "out", *knn, *more) == 0
    names = sorted(path.stem for path in (tmp_path / "out").glob("*.json"))
    assert names == [
        "evaluate-knn-step18", "evaluate-knn-step18-max20", "evaluate-knn-step18-pets-val", "evaluate-knn-step18-seed3",
    ]  # fmt: skip


def test_export_finds_every_result_of_its_weights(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "encoder.safetensors", tmp_path)
    trained = load_trained(tmp_path / "encoder.safetensors")
    for more in ([], ["--max-images", "20"], ["--untrained"]):
        assert _main(run, tmp_path, "--protocol", "knn", "--k", "5", *more) == 0
    card = model_card.model_card(trained, library="", loading="", resizing="")
    lines = [line for line in card.splitlines() if line.startswith("- `knn`")]
    assert [line.split(" images of ")[0][-2:] for line in lines] == ["20", "21"]  # not the untrained one's


def test_a_folder_that_takes_no_file_is_refused_before_the_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(program, "run", None)
    (tmp_path / "file").write_text("")
    assert _main(run, tmp_path / "file" / "below", "--protocol", "knn") == 2
    assert "cannot be written (Not a directory): give another folder by --out" in capsys.readouterr().err


def test_images_that_were_learned_are_no_test(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for more in ([], ["--max-images", "9"]):
        assert _main(run, tmp_path, "--protocol", "knn", "--train", str(run / "val"), *more) == 2
        assert "hold the same images" in capsys.readouterr().err


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same 12 JPEGs in every form of a data set, 4 of them with 8 others, and 12 others."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(32):
        image = Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8))
        for name, numbers in (("folder", range(12)), ("some", range(8, 20)), ("others", range(20, 32))):
            if i in numbers:
                path = root / name / "ab"[i % 2] / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    for name, form in (("tars", "webdataset"), ("betons", "beton")):
        made = [str(root / "folder"), str(root / name), "--format", form, "--workers", "1"]
        assert make_shards(made) == 0
    bare = str(shutil.copy(root / "betons/shard-000000.beton", root / "bare.beton"))
    return {path.name: str(path) for path in root.iterdir() if path.is_dir()} | {
        "bare": bare,
        "synthetic": "synthetic:9:8x8",
    }


@pytest.mark.parametrize("form", ["folder", "tars", "betons", "bare"])
def test_shared_images_are_found_in_any_form(form: str, photos: dict[str, str]) -> None:
    def check(train: str, test: str, limit: int | None = None) -> str:
        opened = [inputs.open_labeled("", photos[name], limit) for name in (train, test)]
        return inputs.check_splits(train, opened[0], test, opened[1])

    for train in ("folder", "tars", "betons", "bare"):
        with pytest.raises(ValueError, match=f"{train} and .*{form} hold the same images"):
            check(train, form)
    said = "warning: 4 of the 12 images of --data {} are also in --train {}, byte for byte"
    assert check("some", form).startswith(said.format(form, "some"))
    assert check(form, "some").startswith(said.format("some", form))
    assert check("others", form) == check(form, "others") == check("synthetic", "bare") == ""


@pytest.mark.slow
def test_the_warning_of_shared_images_is_printed(
    photos: dict[str, str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    splits = ["--train", photos["some"], "--data", photos["tars"]]
    assert _main(run, tmp_path, "--protocol", "knn", "--k", "3", *splits) == 0
    assert "warning: 4 of the 12 images of --data" in capsys.readouterr().err


def test_equal_settings_give_the_gentlest() -> None:
    assert protocols._best([50.0, 90.0, None, 90.0, 80.0], [1, 2, 9, 4, 5]) == 3
    assert protocols._best([90.0, 90.0, 90.0], [(-0.1, -50), (-0.1, -30), (-0.2, -30)]) == 1
    assert protocols._best([None, 1.0], [5, 1]) == 1


def test_a_lost_rank_is_told_in_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer; gloo/")

    monkeypatch.setattr(program, "run", fail)
    assert _main(run, tmp_path, "--protocol", "knn") == 1
    assert capsys.readouterr().err.count("\n") == 1
    # what nobody foresaw is shown whole
    monkeypatch.setattr("byolt.model.distributed.is_lost_peer", lambda error: False)
    assert _main(run, tmp_path, "--protocol", "knn") == 1
    assert "Traceback" in capsys.readouterr().err


def _failing_worker(rank: int, port: int, run: str, out: str) -> None:
    os.environ |= rank_environment(rank, 2, port)
    whole = program.measure

    def measure(args: Any, setup: Setup) -> Any:
        if rank == 1:
            raise FloatingPointError("a feature is not finite")
        return whole(args, setup)

    program.measure = measure
    sys.stderr = (Path(out) / f"{rank}.err").open("w")
    code = _main(Path(run), Path(out) / "out", "--protocol", "knn")
    sys.stderr.close()
    os._exit(code + 10)


@pytest.mark.slow
def test_every_rank_tells_what_failed_first(run: Path, tmp_path: Path) -> None:
    arguments = free_port(), str(run), str(tmp_path)
    processes = [SERVER.Process(target=_failing_worker, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [11, 11]
    for rank in range(2):
        error = (tmp_path / f"{rank}.err").read_text()
        assert "evaluate: rank 1: a feature is not finite" in error and "Traceback" not in error


def test_a_folder_that_is_not_utf8(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict"))
    _measure(run, tmp_path / "caf\udce9", "--protocol", "knn", "--data", str(run / "val"))


def _damage(path: Path) -> None:
    """The pixels of a PNG; its header and end stay."""
    data = path.read_bytes()
    path.write_bytes(data[:60] + bytes(len(data) - 80) + data[-20:])


@pytest.mark.parametrize(
    "protocol",
    [
        "knn",
        "linear --fast",
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("linear", "finetune", "transfer")),
    ],
)
def test_images_that_do_not_decode_are_counted(
    protocol: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = []
    for option, split, cut in (("--train", "train", range(24)), ("--data", "val", range(2))):
        root = tmp_path / "cut" / split
        shutil.copytree(run / split, root)
        for i in cut:
            path = root / "red" / f"{i}.png"
            _damage(path)
        options += [option, str(root)]
    name = protocol.split()[0]
    labels = ["--labels", "1"] if name == "finetune" else []
    document = _measure(run, tmp_path, "--protocol", *protocol.split(), *FAST[name], *labels, *options)
    test, train = document["test"], document["train"]
    assert (test["images"], test["of"], train["images"], train["of"]) == (19, 21, 48, 72)
    shown = " ".join(capsys.readouterr().out.split())
    assert "19 test images (2 of 21 do not decode and are left out) of 3 classes; 48 training images" in shown


@pytest.mark.parametrize("protocol", ["linear", "finetune"])
def test_where_nothing_decodes_the_data_set_is_named(
    protocol: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(run / "train", tmp_path / "cut")
    for path in (tmp_path / "cut").rglob("*.png"):
        _damage(path)
    options = ["--protocol", protocol, *FAST[protocol], "--train", str(tmp_path / "cut")]
    assert _main(run, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        error == f"evaluate: --train {tmp_path / 'cut'}: no image decodes; run tools/verify_shards.py on it"
    )


def test_rows_are_named_by_the_neighbors_that_voted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = _measure(run, tmp_path, "--protocol", "knn", "--k", "200", "20", "100")
    assert [(row["name"], row["settings"]["k"]) for row in document["results"]] == [
        ("k = 72", 72),
        ("k = 20", 20),
    ]
    assert "note: k = 200 is more than the training images: k = 72 is used" in capsys.readouterr().err


def test_a_runs_folder_is_evaluated_by_knn_as_the_run_does(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without options: the newest encoder, the run's k and its own data; the picture shows that k."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = schema.load(run / "config.yaml", ["eval.k=7", "eval.temperature=0.2", f"run.out={folder}"])
    model = make_byol(config.model)
    for step in (18, 36):
        state = {"step": step, "model": model.state_dict(), "config": config.model_dump(mode="json")}
        checkpoint.save(folder, step, state, keep=2)
    export_trained(folder / "encoder.safetensors", model.online.encoder, config, 18)
    titles = []
    monkeypatch.setattr(
        "byolt.tools.evaluation.result.save_confusion", lambda *given: titles.append(given[-1])
    )
    for more in ([], ["--k", "20", "7"]):
        assert evaluate.main([str(folder), "--device", "cpu", "--threads", "1", *more]) == 0
        document = json.loads((folder / "evaluate-knn-step36.json").read_text())
        assert document["checkpoint"] == "checkpoint-000000036.pt" and document["drawn"] == "k = 7"
        settings = [(row["settings"]["k"], row["settings"]["temperature"]) for row in document["results"]]
        assert settings == [(20, 0.2), (7, 0.2)] if more else [(7, 0.2), (72, 0.2), (20, 0.2)]
    assert len(titles) == 2 and all(title.splitlines()[1].startswith("k = 7: top-1 ") for title in titles)


def test_a_class_of_one_image_is_learned(run: Path, fourth: list[str]) -> None:
    train = open_source(fourth[1])
    fit, held = protocols._hold_out(_setup(run, train, train))
    assert np.bincount(fit.labels).tolist() == [22, 22, 22, 1] and np.bincount(held.labels).tolist() == [
        2,
        2,
        2,
    ]


def test_one_class_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for split in ("train", "val"):
        shutil.copytree(run / split / "red", tmp_path / split / "red")
    options = ["--train", str(tmp_path / "train"), "--data", str(tmp_path / "val")]
    assert _main(run, tmp_path / "out", "--protocol", "knn", *options) == 2
    assert (
        "all 24 images are of one class: give a data set with two classes or more" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("ranks", "images", "size"), [(1, 5000, 1024), (3, 5000, 1023), (3, 90, 63), (6, 13, 12)]
)
def test_default_batches_fit_the_ranks(ranks: int, images: int, size: int, run: Path) -> None:
    train = open_source(run / "train")
    setup = _setup(run, train, train)
    setup.world = distributed.World(0, 0, ranks, torch.device("cpu"), "gloo")
    assert finetuning.batch_size_for(setup, None, images) == size


def test_one_back_end_for_all_trainings(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], finetuning.make_backend

    def counted(*args: Any) -> Any:
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(finetuning, "make_backend", counted)
    options = ["--labels", "0.5", "--epochs", "1", "2", "--lr", "0.2", "0.1", "--batch-size", "16"]
    document = _measure(run, tmp_path, "--protocol", "finetune", *options)
    assert len(document["results"][0]["settings"]["held_out_top1"]) == 4 and len(made) == 1


@pytest.mark.parametrize("name", ["$x^$", "$\\frac$", "caf\udce9"])
def test_any_folder_name_can_stand_at_the_confusions(name: str, tmp_path: Path) -> None:
    save_confusion(tmp_path / "c.png", torch.eye(2, dtype=torch.int64), [name, "b"], f"title {name}")
    assert Image.open(tmp_path / "c.png").width > 300
