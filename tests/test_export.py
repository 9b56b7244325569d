"""tools/export.py: what it writes is loaded by torchvision, timm and transformers and gives the encoder's features."""

import functools
import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from byolt.configs import schema
from byolt.model.byol import make_byol
from byolt.model.resnet import BACKBONES, RESNET8_WIDTHS, make_encoder
from byolt.model.run import checkpoint
from byolt.model.run.trained import Trained, load_trained
from byolt.tools import export
from byolt.tools.exporting import libraries

CONFIG = """
run: {out: unused}
data: {path: datasets/some}
augment: {size: 32, mean: [0.1, 0.2, 0.3], view1: {blur: 1.0, solarize: 0.0}, view2: {blur: 0.1, solarize: 0.2}}
model: {projector_hidden: 8, projector_size: 8, predictor_hidden: 8}
optimizer: {base_lr: 1.0, warmup_epochs: 0, weight_decay: 1.0e-6, base_tau: 0.9}
train: {epochs: 20, batch_size: 64}
"""


def _run(folder: Path, backbone: str, stem: str) -> Path:
    """A checkpoint whose batch-norm statistics are no longer 0 and 1."""
    (folder / "config.yaml").write_text(CONFIG)
    config = schema.load(folder / "config.yaml", [f"model.backbone={backbone}", f"model.stem={stem}"])
    torch.manual_seed(0)
    model = make_byol(config.model)
    for name, buffer in model.online.encoder.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    # Bottlenecks begin as the identity, which is no test of their weights.
    for layer in model.online.encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5)
    online = {name: value for name, value in model.state_dict().items() if name.startswith("online.")}
    state = {"step": 30, "model": online, "config": config.model_dump(mode="json")}
    return checkpoint.save(folder, 30, state, keep=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 with the 7x7 stem."""
    return _run(tmp_path_factory.mktemp("run"), "resnet18", "imagenet")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 with the 3x3 stem."""
    return _run(tmp_path_factory.mktemp("cifar"), "resnet18", "cifar")


loaded = functools.cache(load_trained)


def _features(path: Path) -> tuple[Tensor, Tensor]:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return images, loaded(path).encoder(images)


@pytest.mark.parametrize("stem", [pytest.param("imagenet", marks=pytest.mark.slow), "cifar"])
def test_torchvision(
    stem: str, trained: Path, cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    made = {"imagenet": trained, "cifar": cifar}[stem]
    (path := tmp_path / made.name).hardlink_to(made)
    out = tmp_path / "exported-torchvision"  # without --out
    assert path.parent == tmp_path and export.main([str(tmp_path), "--to", "torchvision"]) == 0
    assert (
        "checked with torchvision: largest relative difference of a feature: 0\n" in capsys.readouterr().out
    )
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "model.safetensors"]
    card = (out / "README.md").read_text()
    lines = (
        card.split("```python\n")[1]
        .split("```")[0]
        .replace("'model.safetensors'", repr(str(out / "model.safetensors")))
    )
    scope: dict = {}
    exec(lines, scope)  # the card's own lines load it
    images, expected = _features(made)
    with torch.no_grad():
        assert torch.equal(scope["model"](images), expected)


def test_every_backbone_of_torchvision_has_its_keys() -> None:
    for backbone in set(BACKBONES) - set(RESNET8_WIDTHS):
        with torch.device("meta"):
            ours = make_encoder(backbone, "imagenet").state_dict()
            theirs = torchvision.models.get_model(backbone, weights=None).state_dict()
        assert ours.keys() == {key for key in theirs if not key.startswith("fc.")}


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.slow
def test_timm(backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    path = _run(tmp_path, backbone, "imagenet")
    out = tmp_path / "exported"
    assert export.main([str(path), "--to", "timm", "--out", str(out)]) == 0
    assert "checked with timm" in capsys.readouterr().out
    images, expected = _features(path)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    settings = timm.data.resolve_model_data_config(model)
    assert [*settings["input_size"], *settings["mean"]] == [3, 32, 32, 0.1, 0.2, 0.3]


@pytest.mark.slow
def test_transformers(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    out = tmp_path / "exported"
    assert export.main([str(trained), "--to", "huggingface", "--out", str(out)]) == 0
    assert "checked with transformers" in capsys.readouterr().out
    images, expected = _features(trained)
    model = transformers.AutoModel.from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=images).pooler_output, expected, rtol=1e-5, atol=1e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    assert tuple(processor.data_config["mean"]) == (0.1, 0.2, 0.3)
    assert model(**processor(Image.new("RGB", (48, 40)))).pooler_output.shape == (1, 512)


def test_without_timm_the_export_says_that_it_was_not_checked(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with patch.dict("sys.modules", {"timm": None}):
        assert export.main([str(trained), "--to", "timm", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert (
        "checked with torchvision: largest relative difference of a feature: 0" in shown
        and "not checked with timm" in shown
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "resnet18" and config["num_features"] == 512


def _document(digest: str, **changes: object) -> dict:
    result = {
        "name": "here", "images": 1000,
        "top1": 61.23, "top1_interval": [60.0, 62.5], "top5": 88.0, "top5_interval": [87.0, 89.0],
    }  # fmt: skip
    return {
        "protocol": "knn", "encoder_sha256": digest, "results": [result],
        "test": {"path": "/home/alice/sets/val"}, "train": {"path": "datasets/some", "images": 1280},
    } | changes  # fmt: skip


def _export(trained: Path, out: Path, target: str = "torchvision") -> str:
    """The card."""
    assert export.main([str(trained), "--to", target, "--out", str(out)]) == 0
    return (out / "README.md").read_text()


def test_card_says_what_was_measured_and_how_sure_that_is(trained: Path, tmp_path: Path) -> None:
    for name, digest in (("knn", loaded(trained).digest), ("linear", "0" * 64)):
        document = _document(digest, protocol=name)
        (trained.parent / f"evaluate-{name}.json").write_text(json.dumps(document))
    rows = [
        {"step": 30, "epoch": 1.5, "loss": 1},
        {"step": 30, "knn_top1": 41.5},
        {"step": 20, "knn_top1": 7.25},
    ]
    (trained.parent / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = _export(trained, tmp_path / "out")
    assert (
        "- `knn`, `here`: top-1 61.23 % (60.00 to 62.50), top-5 88.00 % (87.00 to 89.00); 1000 images of `val`; "
        "bank: 1280 images of `datasets/some`\n"
    ) in card
    assert "- kNN during training (k = 200, temperature 0.1): top-1 41.50 %" in card and "7.25" not in card
    assert "From metrics.jsonl beside the checkpoint, step 30: not checked to be of these weights" in card
    assert "linear" not in card.split("## Load")[0].split("## Measured")[1]
    assert "30 steps of 64 images; 1.5 of 20 epochs (from metrics.jsonl)" in card
    assert "`datasets/some`, 1,280 images (from metrics.jsonl)" in card
    recipe = card.split("```yaml\n")[1].split("```")[0]
    assert schema.from_yaml(recipe) == loaded(trained).config


def test_names_and_paths_are_inert_in_the_card(cifar: Path, tmp_path: Path) -> None:
    path, state = tmp_path / cifar.name, checkpoint.load(cifar)
    state["config"]["data"]["path"] = "/home/alice/a`\n\n# Injected <b>\n"
    state["config"]["run"]["out"] = "/home/alice/```\n<script>"
    state["config"]["run"]["mirror"] = "s3://alice/run"
    state["config"]["eval"]["path"] = "../alice/val"
    checkpoint.write(path, state)
    document = _document(load_trained(path).digest, protocol="knn\n\n# Hello <script>")
    document["test"]["path"] = "/home/alice/`x`\n---\n"
    (tmp_path / "evaluate-x.json").write_text(json.dumps(document))
    card = _export(path, tmp_path / "out")
    assert (
        "alice" not in card and "`a' # Injected <b>`" in card and "- `knn # Hello <script>`, `here`" in card
    )
    headings = [line for line in card.splitlines() if line.startswith("#")]
    assert headings == ["# resnet18, pre-trained with BYOL", "## Measured", "## Load", "## Recipe"]
    recipe = card.split("````yaml\n")[1]
    assert recipe.count("````") == 1 and recipe.endswith("\n````\n")
    published = schema.from_yaml(recipe[:-5])
    assert published.run.out == "```\n<script>" and published.eval.path == "val"
    assert load_trained(tmp_path / "out" / "model.safetensors").config == published


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[1]",
        json.dumps(_document("HERE", results=[{"top1": "x", "top1_interval": [1, 2], "name": "x", "images": 5}])),
        json.dumps(_document("HERE", results=[{"top1": 1e999, "top1_interval": [1, 2], "name": "", "images": 5}])),
        json.dumps(_document("HERE", results=[{"top1": 5, "top1_interval": [1], "name": "x", "images": 5}])),
        json.dumps(_document("HERE", train=None)),
    ],
)  # fmt: skip
def test_damaged_results_are_one_line(
    text: str, cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(export, "load_trained", lambda path: loaded(cifar)._replace(path=path))
    (tmp_path / "evaluate-knn.json").write_text(text.replace("HERE", loaded(cifar).digest))
    assert (
        export.main([str(tmp_path / cifar.name), "--to", "torchvision", "--out", str(tmp_path / "out")]) == 2
    )
    error = capsys.readouterr().err
    assert "evaluate-knn.json is not a result of tools/evaluate.py" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_exported_is_loaded_like_a_run_s(trained: Path, tmp_path: Path) -> None:
    _export(trained, tmp_path / "out")
    images, expected = _features(trained)
    again = load_trained(tmp_path / "out" / "model.safetensors")
    before = loaded(trained)
    assert (again.digest, again.step, again.config) == (before.digest, 30, before.config)
    with torch.no_grad():
        assert torch.equal(again.encoder(images), expected)


@pytest.mark.parametrize(
    ("side", "crop", "said"), [(32, 1.0, "no larger than a view"), (33, 0.875, " larger than a view")]
)
def test_crop_is_that_of_the_images_measured_on(
    side: int, crop: float, said: str, trained: Path, tmp_path: Path
) -> None:
    path, state = tmp_path / trained.name, checkpoint.load(trained)
    (tmp_path / "val").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (side + 9, side)).save(tmp_path / "val" / f"{name}.png")
    state["config"]["eval"]["path"] = str(tmp_path / "val")
    checkpoint.write(path, state)
    with patch.dict("sys.modules", {"timm": None}):
        card = _export(path, tmp_path / "out", "timm")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert settings["crop_pct"] == crop and said in card and "without antialiasing" in card


@pytest.mark.parametrize(
    ("value", "part"), [(0.0, "the encoder has collapsed"), (float("nan"), "its features are not finite")]
)
def test_an_encoder_of_no_use_is_refused(
    value: float, part: str, cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, state = tmp_path / cifar.name, checkpoint.load(cifar)
    for key, weights in state["model"].items():
        if key.startswith("online.encoder.layer4") and weights.is_floating_point():
            weights.fill_(value)
    checkpoint.write(path, state)
    assert export.main([str(path), "--to", "torchvision", "--out", str(tmp_path / "out")]) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_wrong_export_leaves_nothing(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def altered(folder: Path, source: Trained) -> nn.Module:
        weights = load_file(folder / "model.safetensors")
        weights["layer3.0.bn1.running_mean"] += 0.01
        model = torchvision.models.resnet18()
        model.fc = nn.Identity()
        model.load_state_dict(weights)
        return model.eval()

    with patch.dict(libraries.LOADERS, torchvision=altered):
        assert export.main([str(trained), "--to", "torchvision", "--out", str(tmp_path / "out")]) == 1
    assert "torchvision gives other features than the encoder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("backbone", "stem", "target", "part"),
    [
        ("resnet8_half", "cifar", "torchvision", "model.backbone=resnet8_half is this project's own"),
        ("resnet18", "cifar", "timm", "model.stem=cifar: timm, which --to timm uses"),
        ("resnet18", "cifar", "huggingface", "use --to torchvision"),
    ],
)
def test_what_a_library_lacks_is_refused(
    backbone: str,
    stem: str,
    target: str,
    part: str,
    cifar: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    path = cifar if backbone == "resnet18" else _run(tmp_path, backbone, stem)
    assert export.main([str(path), "--to", target, "--out", str(tmp_path / "out")]) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_touched(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert export.main([str(trained), "--to", "torchvision", "--out", str(tmp_path)]) == 2
    assert "exists: name a new folder" in capsys.readouterr().err
