"""Reading a trained encoder: weights of any type, and files that are damaged or made to harm."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from byolt.configs import schema
from byolt.model.byol import make_byol
from byolt.model.run import checkpoint
from byolt.model.run.trained import export_trained, load_trained, weights_digest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = schema.load(ROOT / "configs/r8_cifar10.yaml")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "encoder.safetensors"
    export_trained(path, make_byol(config.model).online.encoder, config, 7)
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_the_digest_is_that_of_the_weights_that_run(
    dtype: torch.dtype, exported: Path, tmp_path: Path
) -> None:
    trained = load_trained(exported)
    narrow = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in trained.encoder.state_dict().items()
    }
    settings = {"steps": "7", "config": schema.to_yaml(trained.config)}
    save_file(narrow, tmp_path / "narrow.safetensors", settings)
    loaded = load_trained(tmp_path / "narrow.safetensors")
    weights = loaded.encoder.state_dict()
    assert loaded.digest == weights_digest(weights) != trained.digest
    assert all(torch.equal(weights[key], value.to(weights[key].dtype)) for key, value in narrow.items())
    assert weights_digest(narrow) != weights_digest(weights)  # the type is part of it


def test_an_encoder_is_known_by_its_content(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "encoder.bin").write_bytes(exported.read_bytes())
    assert load_trained(tmp_path / "encoder.bin").digest == load_trained(exported).digest


def test_a_flipped_bit_is_noticed(exported: Path, tmp_path: Path) -> None:
    """In the tensors, and in the header unless it loads as the same encoder (a space of JSON, an unknown key)."""
    sound = load_trained(exported)
    data = bytearray(exported.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    generator = random.Random(0)
    path = tmp_path / "encoder.safetensors"
    for where in [*(generator.randrange(header) for _ in range(24)), header, len(data) // 2, len(data) - 1]:
        bit = 1 << generator.randrange(8)
        data[where] ^= bit
        path.write_bytes(data)
        try:
            loaded, refusal = load_trained(path), ""
        except checkpoint.CheckpointError as error:
            loaded, refusal = None, str(error)
        if loaded:
            assert where < header and loaded[2:] == sound[2:]  # config, step, digest of the weights
        else:
            assert refusal.startswith(str(path)) and "\n" not in refusal
        data[where] ^= bit


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"config": "3"}, "its config cannot be used: not a valid YAML mapping"),
        ({"config": "[" * 5000}, "its config cannot be used"),
        ({"config": "run: {}"}, "data: missing"),
        ({"steps": "-1"}, "step -1"),
        ({"steps": "9" * 400}, "it is damaged"),
        ({"steps": "x"}, "cannot be used"),
    ],
)
def test_hostile_metadata_is_one_line(change: dict, part: str, exported: Path, tmp_path: Path) -> None:
    trained = load_trained(exported)
    settings = {"steps": "7", "config": schema.to_yaml(trained.config)} | change
    checkpoint.export_encoder(tmp_path / "e.safetensors", trained.encoder.state_dict(), settings)
    with pytest.raises(checkpoint.CheckpointError, match=part) as caught:
        load_trained(tmp_path / "e.safetensors")
    assert "\n" not in str(caught.value) and "e.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model": [1]},
        {"model": {1: torch.zeros(1)}},
        {"model": {"online.encoder.conv1.weight": 3}},
        {"step": [1]},
        {"step": float("inf")},
        {"config": [1]},
        {"config": {"model": {"backbone": "resnet9"}}},
    ],
)
def test_hostile_checkpoints_are_one_line(change: dict, exported: Path, tmp_path: Path) -> None:
    trained = load_trained(exported)
    weights = {f"online.encoder.{key}": value for key, value in trained.encoder.state_dict().items()}
    state = {"step": 7, "model": weights, "config": trained.config.model_dump(mode="json")}
    path = tmp_path / "checkpoint-000000007.pt"
    checkpoint.write(path, state)
    assert load_trained(path).digest == trained.digest
    checkpoint.write(path, state | change)
    with pytest.raises(checkpoint.CheckpointError, match=path.name) as caught:
        load_trained(path)
    assert "\n" not in str(caught.value)
