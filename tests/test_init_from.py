"""Encoders that begin with the weights of a file: by values, damaged, of another network, made to harm; and timm's networks."""

import copy
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from whole_runs import ROOT, Run, write_images

from byolt.configs import command_line, schema
from byolt.files.weights import CHECKPOINT, weights_kind
from byolt.model.distributed import World
from byolt.model.kernels import norm as norms
from byolt.model.kernels.norm import BatchNorm, each_view
from byolt.model.resnet import make_encoder
from byolt.model.run import checkpoint
from byolt.model.run.checkpoint import CheckpointError
from byolt.model.run.trained import export_trained, initialize, load_trained
from byolt.tools import export
from byolt.tools.evaluate import main as evaluate

CONFIG = schema.load(ROOT / "configs/r8_cifar10.yaml")
MODEL = CONFIG.model


def features(encoder: nn.Module) -> Tensor:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return encoder.eval()(images)


def moved(encoder: nn.Module) -> nn.Module:
    """With running statistics that are not those of a new network."""
    for name, buffer in encoder.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return encoder


@pytest.fixture(scope="module")
def source() -> nn.Module:
    torch.manual_seed(1)
    return moved(make_encoder(MODEL.backbone, MODEL.stem))


@pytest.fixture(scope="module")
def files(source: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source's weights in every format."""
    folder = tmp_path_factory.mktemp("weights")
    weights = source.state_dict()
    names = (
        "encoder.safetensors",
        "checkpoint-000000007.pt",
        "plain.safetensors",
        "new.pth",
        "old.pth",
        "nested.pth",
    )
    exported, ours, plain, new, old, nested = paths = [folder / name for name in names]
    export_trained(exported, source, CONFIG, 7)
    model = {f"online.encoder.{name}": value for name, value in weights.items()}
    checkpoint.write(ours, {"step": 7, "model": model, "config": CONFIG.model_dump(mode="json")})
    head = {"fc.weight": torch.zeros(10, 128), "fc.bias": torch.zeros(10)}
    narrow = {name: value.double() if value.is_floating_point() else value for name, value in weights.items()}
    save_file({**narrow, **head}, plain)
    torch.save({**weights, **head}, new)
    torch.save(weights, old, _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "state_dict": {k: v for k, v in weights.items() if "tracked" not in k}}, nested)
    return dict(zip(names, paths, strict=True))


def fresh() -> nn.Module:
    torch.manual_seed(2)
    return make_encoder(MODEL.backbone, MODEL.stem)


@pytest.mark.parametrize(
    ("name", "kind", "left"),
    [
        ("encoder.safetensors", "safetensors", ""),
        ("checkpoint-000000007.pt", "checkpoint", ""),
        ("plain.safetensors", "safetensors", "left out fc.bias, fc.weight"),
        ("new.pth", "pickle", "left out fc.bias, fc.weight"),
        ("old.pth", "pickle", ""),
        ("nested.pth", "pickle", ""),
    ],
)
def test_features_are_the_sources(
    name: str, kind: str, left: str, files: dict[str, Path], source: nn.Module
) -> None:
    encoder = fresh()
    assert not torch.equal(features(encoder), features(source))
    assert weights_kind(files[name]) == kind
    found, note = initialize(encoder, str(files[name]))
    assert torch.equal(features(encoder), features(source))
    assert found["path"] == str(files[name]) and len(found["sha256"]) == 64
    assert note.endswith(left) and bool(note) == bool(left)


def refused(path: Path, encoder: nn.Module) -> str:
    """The one line that refuses the file; the encoder is as before."""
    before = copy.deepcopy(encoder.state_dict())
    with pytest.raises((CheckpointError, ValueError)) as caught:
        initialize(encoder, str(path))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_another_network_of_a_run_is_named(files: dict[str, Path]) -> None:
    encoder = make_encoder("resnet8_half", "imagenet")
    message = refused(files["encoder.safetensors"], encoder)
    assert "(model.backbone=resnet8 model.stem=cifar) does not fit" in message and "and 40 more" in message


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 8 + b"{",
        b"\x10" + bytes(7) + b"{}",
        b"PK\x03\x04" + bytes(9),
        b"\x80\x02.",
        CHECKPOINT + b"1 " + bytes(9),
        b"<html>",
        b"",
        b"{",
    ],
)
def test_a_refusal_begins_with_the_setting_and_the_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises((CheckpointError, ValueError), match=f"^model.init_from={tmp_path}/weights "):
        initialize(make_encoder("resnet8", "cifar"), f"{tmp_path}/weights")


def test_a_flipped_byte_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("encoder.safetensors", "checkpoint-000000007.pt"):
        data = bytearray(files[name].read_bytes())
        data[-100] ^= 1
        (path := tmp_path / name).write_bytes(data)
        assert "is damaged" in refused(path, fresh())


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"conv1.weight": None}, "conv1.weight is missing"),
        ({"conv1.weight": torch.zeros(32, 3, 7, 7)}, "conv1.weight is (32, 3, 7, 7) instead of"),
        ({"bn1.bias": torch.full((32,), torch.nan)}, "bn1.bias is not finite"),
        ({"bn1.running_var": torch.full((32,), -1.0)}, "bn1.running_var is negative"),
        ({"bn1.bias": torch.ones(32, dtype=torch.int8)}, "bn1.bias is int8 instead of floating point"),
        ({"layer1.1.conv1.weight": torch.zeros(1)}, "layer1.1.conv1.weight is unexpected"),
        (
            {f"layer{i}.7.weight": torch.zeros(1) for i in (1, 2, 3)} | {"bn1.a\nb" * 99: torch.zeros(1)},
            "...",
        ),
        ({"conv1.weight": torch.zeros(2, dtype=torch.complex64)}, "more than tensors"),
        ({"conv1.weight": "x"}, "more than tensors"),
    ],
)
def test_what_does_not_fit_is_listed(
    change: dict[str, Any], part: str, source: nn.Module, tmp_path: Path
) -> None:
    weights = {**source.state_dict(), **change}
    torch.save(
        {name: value for name, value in weights.items() if value is not None}, tmp_path / "weights.pth"
    )
    message = refused(tmp_path / "weights.pth", fresh())
    assert part in message and len(message) < 900


def test_other_names_are_shown(source: nn.Module, tmp_path: Path) -> None:
    """Of a DataParallel or a method's state_dict, whose prefix has to be removed."""
    save_file({f"module.{name}": value for name, value in source.state_dict().items()}, tmp_path / "w")
    assert re.search(
        r"running_var is missing, and 40 more; its names: module\.[\w.]+, module",
        refused(tmp_path / "w", fresh()),
    )


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("new", [True, False])
def test_pickles_execute_nothing(new: bool, source: nn.Module, tmp_path: Path) -> None:
    made, path = tmp_path / "made", tmp_path / "weights.pth"
    torch.save({**source.state_dict(), "x": Payload(made)}, path, _use_new_zipfile_serialization=new)
    message = refused(path, fresh())
    assert "holds more than tensors" in message and "weights_only" not in message and not made.exists()
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    assert made.exists()  # otherwise this would prove nothing


def test_files_are_checked_before_torch_is_needed(tmp_path: Path) -> None:
    config = schema.load(
        ROOT / "configs/quickstart.yaml", [f"run.out={tmp_path}/run", f"model.init_from={tmp_path}/no"]
    )
    for resume in (None, "auto"):
        with pytest.raises(ValueError, match=r"model.init_from=.*/no cannot be read: No such file"):
            command_line.check_init_from(config, resume)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-000000001.pt").touch()
    command_line.check_init_from(config, "auto")  # the checkpoint decides; the file may be gone
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("weights")
    for name, part in (
        ("run", "is a folder: name"),
        ("fifo", "not a regular file"),
        ("text", "is not a file of weights"),
    ):
        with pytest.raises(ValueError, match=part):
            weights_kind(tmp_path / name)


def test_names_of_backbones() -> None:
    load = lambda *overrides: schema.load(ROOT / "configs/r50_100ep.yaml", list(overrides))  # noqa: E731
    assert (
        load("model.backbone=timm:vit_small_patch16_224.dino").model.backbone
        == "timm:vit_small_patch16_224.dino"
    )
    for name in ("resnet49", "timm:", "timm:hf-hub:x/y", "timm:a b", "[1]", "3"):
        with pytest.raises(ValueError, match=r"'resnet8_half' or 'timm:NAME'"):
            load(f"model.backbone={name}")
    with pytest.raises(
        ValueError, match=r"model.stem=cifar: timm builds the stem of model.backbone=timm:resnet50"
    ):
        load("model.backbone=timm:resnet50", "model.stem=cifar")


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(
        ValueError, match=r"timm:resnet10t needs the package timm.*pip install -e '.\[timm\]'"
    ):
        command_line.check_backbone("timm:resnet10t")
    command_line.check_backbone("resnet18")


# ------------------------------------------------------------------------------------------------ networks of timm


@pytest.fixture
def timm() -> Any:
    return pytest.importorskip("timm", reason="timm is not installed")


@pytest.mark.slow
def test_networks_that_timm_cannot_build(timm: Any) -> None:
    for name, size, part in (
        ("resnet5O", 8, "did you mean timm:resnet50 or"),
        ("test_vit", 8, "cannot be built for augment.size=8: Input height"),
        ("mixer_s32_224", 40, "patches of 32 pixels, .* at augment.size=40: set a multiple"),
    ):
        with pytest.raises(ValueError, match=part):
            make_encoder(f"timm:{name}", "imagenet", size)


@pytest.mark.slow
def test_a_networks_random_numbers_are_off(timm: Any) -> None:
    """A resumed run could not repeat them. Swin drops paths by default, and has no such layer where the rate is 0."""
    encoder = make_encoder("timm:swin_tiny_patch4_window7_224", "imagenet", 32)
    drops = [layer for layer in encoder.modules() if type(layer).__name__ == "DropPath"]
    assert drops and all(layer.drop_prob == 0 for layer in drops)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["test_efficientnet", "resnet10t"])
def test_each_view_has_its_own_statistics(timm: Any, backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As timm's, one view after the other, and as ours, which several ranks use: in one batch as on a GPU, and over ranks."""
    torch.manual_seed(0)
    theirs = make_encoder(f"timm:{backbone}", "imagenet", 32).double()
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in theirs.modules())
    ours = copy.deepcopy(theirs)
    monkeypatch.setattr(norms, "all_reduce_sum_", lambda tensor: None)  # one rank of one
    norms.convert_sync_batchnorm(ours, World(0, 0, 2, torch.device("cpu"), "gloo"))
    assert all(isinstance(layer, BatchNorm) for layer in ours.modules() if isinstance(layer, nn.BatchNorm2d))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    apart = copy.deepcopy(theirs)
    view1, view2 = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    view2 = 2 * view2 + 1
    expected = torch.stack([apart(view1), apart(view2)])
    fused = copy.deepcopy(ours)
    torch.testing.assert_close(torch.stack(each_view(ours, view1, view2)), expected)  # type: ignore[arg-type]
    monkeypatch.setattr(BatchNorm, "forward", BatchNorm.define)
    monkeypatch.setattr(norms._BatchNormAct, "forward", lambda self, x: self.act(self.drop(self.define(x))))
    monkeypatch.setattr(norms, "FUSED_DEVICES", {"cpu"})
    layout: Any = torch.channels_last
    views = [view.contiguous(memory_format=layout) for view in (view1, view2)]
    torch.testing.assert_close(torch.stack(each_view(theirs, *views)), expected)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.stack(each_view(fused, *views)), expected)  # type: ignore[arg-type]
    for network in (theirs, ours, fused):
        for name, value in network.state_dict().items():
            torch.testing.assert_close(value, apart.state_dict()[name], msg=name)


@pytest.mark.slow
def test_layers_that_cannot_be_synchronized(timm: Any) -> None:
    network = nn.Sequential(timm.layers.EvoNorm2dB0(4))
    with pytest.raises(ValueError, match="EvoNorm2dB0 cannot take its statistics over several ranks"):
        norms.convert_sync_batchnorm(network, World(0, 0, 2, torch.device("cpu"), "gloo"))


@pytest.mark.slow
def test_timms_weights_with_and_without_their_head(timm: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = moved(timm.create_model("test_convnext", num_classes=5))
    save_file(source.state_dict(), tmp_path / "convnext.safetensors")
    encoder = make_encoder("timm:test_convnext", "imagenet", 32)
    _, note = initialize(encoder, str(tmp_path / "convnext.safetensors"))
    assert note.endswith("left out head.fc.bias, head.fc.weight")
    source.reset_classifier(0)
    assert torch.equal(features(encoder), features(source))
    vit = timm.create_model("test_vit", num_classes=5)  # 160 px
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    encoder = make_encoder("timm:test_vit", "imagenet", 32)
    initialize(encoder, str(tmp_path / "vit.pth"))
    vit.set_input_size((32, 32))  # timm's own interpolation
    vit.reset_classifier(0)
    torch.testing.assert_close(features(encoder), features(vit))


# ------------------------------------------------------------------------------------------------ whole runs

TINY = ("augment.size=32", "model.stem=imagenet", "train.batch_size=8", "train.epochs=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
def test_a_transformer_resumes_to_the_bit_and_is_evaluated_and_exported(
    timm: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = *TINY, "model.backbone=timm:test_vit"
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, parts = Run(tmp_path / "whole", data), Run(tmp_path / "parts", data)
    done, first = whole.start(*settings), parts.start(*settings, "train.stop_at_step=2")
    assert done.wait() == first.wait() == 0, done.text
    assert parts(*settings, "--resume", "auto").digest == done.digest
    trained, folder = load_trained(whole.out), str(whole.out)
    assert trained.config.model.backbone == "timm:test_vit" and trained.step == 4
    for path in (test := write_images(tmp_path / "test", 10)).rglob("*.jpg"):
        Image.open(path).rotate(180).save(path)
    assert evaluate([folder, "--train", str(data), "--data", str(test)]) == 0
    for target in ("timm", "huggingface"):
        assert export.main([folder, "--to", target]) == 0
        assert "checked with" in capsys.readouterr().out
    network = timm.create_model(f"local-dir:{folder}/exported-timm", pretrained=True)
    torch.testing.assert_close(features(network), features(trained.encoder))
    assert export.main([folder, "--to", "torchvision"]) == 2
    assert "is a network of timm: use --to timm" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_begin_with_the_same_weights_and_a_resumed_run_reads_no_file(
    timm: Any, data: Path, tmp_path: Path
) -> None:
    run, path = Run(tmp_path, data), tmp_path / "weights.safetensors"
    source = moved(timm.create_model("test_efficientnet", num_classes=3))
    save_file(source.state_dict(), path)
    settings = (
        *TINY,
        "model.backbone=timm:test_efficientnet",
        f"model.init_from={path}",
        "optimizer.base_lr=0",
    )
    ranks = run.start_ranks(2, *settings, "train.stop_at_step=2")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text
    assert "left out classifier.bias, classifier.weight" in ranks[0].text
    weights = run.newest()[1]["model"]
    for name, value in source.named_parameters():  # the learning rate is 0
        if not name.startswith("classifier"):
            assert torch.equal(weights[f"online.encoder.{name}"], value)
            assert torch.equal(weights[f"target.encoder.{name}"], value)
    (start,) = [json.loads(line) for line in (run.out / "starts.jsonl").read_text().splitlines()]
    assert start["init_from"]["path"] == str(path)
    ending = f", initialized from {path} sha256 {start['init_from']['sha256']}"
    assert ranks[0].text.rstrip().endswith(ending)
    path.unlink()
    done = run.start(*settings, "--resume", "auto")
    (tmp_path / "new").mkdir()
    missing = Run(tmp_path / "new", data)(*settings, "--resume", "auto")
    assert missing.wait() == 2 and "weights.safetensors cannot be read: No such file" in missing.text
    assert done.wait() == 0 and done.text.rstrip().endswith(ending), done.text
    other = run(*settings, f"model.init_from={path}2", "--resume", "auto")
    assert other.wait() == 2 and f"model.init_from: {path} in the checkpoint, {path}2 now" in other.text
