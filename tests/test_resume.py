"""Checkpoints that are accepted and refused: hostile, foreign and older files."""

import io
import lzma
import resource
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from byolt.configs import schema
from byolt.model.byol import make_byol
from byolt.model.distributed import World
from byolt.model.optim import LARS
from byolt.model.run import checkpoint
from byolt.model.run.checkpoint import CheckpointError
from byolt.model.run.digest import digest
from byolt.model.run.resume import find_checkpoint, restore
from byolt.model.step import TrainStep

WORLD = World(0, 0, 1, torch.device("cpu"), "none")
GOLDEN = "500347087123bcdf29a0c392f165d15bde73ae2e571b6215880cc972d10a3c40"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory, fixtures: Path) -> Path:
    """A checkpoint of version 1, as the first release wrote it."""
    path = tmp_path_factory.mktemp("golden") / "golden.pt"
    path.write_bytes(lzma.decompress((fixtures / "checkpoint_v1.pt.xz").read_bytes()))
    return path


def load_and_restore(path: Path, out: Path, precision: str = "fp32") -> tuple[dict[str, Any], dict[str, Any]]:
    """Resumes as train.py does; returns the checkpoint's state and that of the network after it."""
    found, state = find_checkpoint(out, str(path), WORLD)
    assert found == path
    settings = schema.Config.model_validate(state["config"])
    torch.manual_seed(0)
    model = make_byol(settings.model)
    optimizer = LARS(model.online.parameters(), lr=0.0)
    step = TrainStep(model, optimizer, WORLD, precision)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        restore(path, state, step, probe=None)
    except CheckpointError:
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        raise
    return state, {
        **state,
        "model": model.state_dict(),
        "momentum": optimizer.state_dict()["state"],
        "train_step": step.state_dict(),
    }


def test_golden_checkpoint_loads_to_its_digest(golden: Path, tmp_path: Path) -> None:
    state, restored = load_and_restore(golden, tmp_path)
    assert state["step"] == 2
    assert digest(state) == digest(restored) == GOLDEN


@pytest.mark.faults
def test_golden_checkpoint_goes_on(golden: Path, tmp_path: Path) -> None:
    from whole_runs import Run, write_images

    run = Run(tmp_path, write_images(tmp_path / "images"))
    process = run("--resume", str(golden), "train.stop_at_step=4", "--allow-change", "data.fingerprint")
    assert process.wait() == 0, process.text
    assert f"resumed from {golden} (its fingerprint of the data does not cover" in process.text
    assert ": steps 2 to 4" in process.text


def test_checkpoint_of_a_gpu_loads_without_one(golden: Path, tmp_path: Path) -> None:
    state = checkpoint.load(golden)
    with patch("torch.serialization.location_tag", return_value="cuda:3"):
        checkpoint.write(tmp_path / "gpu.pt", state)
    assert b"cuda:3" in (tmp_path / "gpu.pt").read_bytes()
    assert digest(checkpoint.load(tmp_path / "gpu.pt")) == GOLDEN


def test_another_version_is_refused_with_both_numbers(golden: Path, tmp_path: Path) -> None:
    data = golden.read_bytes().replace(b"byolt-checkpoint 1 ", b"byolt-checkpoint 12 ", 1)
    (tmp_path / "new.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"new\.pt has version 12, this release reads 1"):
        checkpoint.load(tmp_path / "new.pt")


def _put(*keys: Any, value: Any = None) -> Callable[[dict], None]:
    """Returns a function that sets the entry under the keys, or removes it if there is no value."""

    def change(at: dict) -> None:
        for key in keys[:-1]:
            at = at[key]
        if value is None:
            del at[keys[-1]]
        else:
            at[keys[-1]] = value

    return change


WEIGHT = "online.encoder.conv1.weight"
HOSTILE: dict[str, tuple[Callable[[dict], None], str]] = {
    "extra key": (_put("evil", value=1), "unexpected or wrongly typed keys: evil"),
    "no key": (_put("momentum"), "unexpected or wrongly typed keys: momentum"),
    "step is text": (_put("step", value="3"), "wrongly typed keys: step"),
    "step is true": (_put("step", value=True), "wrongly typed keys: step"),
    "step is negative": (_put("step", value=-1), "wrongly typed keys: step"),
    "config is a list": (_put("config", value=[1]), "wrongly typed keys: config"),
    "rounding is a list": (_put("rounding", value=[1]), "wrongly typed keys: rounding"),
    "rounding of a tensor": (_put("rounding", value={"x": torch.ones(2)}), "wrongly typed keys: rounding"),
    "init_from without a sha256": (_put("init_from", value={"path": "x"}), "wrongly typed keys: init_from"),
    "init_from of a tensor": (
        _put("init_from", value={"path": "x", "sha256": torch.ones(2)}),
        "wrongly typed keys: init_from",
    ),
    "extra tensor": (_put("model", "evil", value=torch.ones(2)), r"model\.evil is float32 \(2,\), but must be absent"),
    "no tensor": (_put("model", WEIGHT), "conv1.weight is absent, but must be float32"),
    "shape": (_put("model", WEIGHT, value=torch.ones(3)), r"conv1.weight is float32 \(3,\), but must be float32 \("),
    "dtype": (_put("model", WEIGHT, value=torch.ones(8, 3, 3, 3).double()), "conv1.weight is float64"),
    "no tensor at all": (_put("model", WEIGHT, value="x"), "conv1.weight is of type str"),
    "sparse": (_put("model", WEIGHT, value=torch.eye(3).to_sparse()), "conv1.weight is sparse or empty"),
    "huge by strides": (
        _put("model", WEIGHT, value=torch.zeros(1).expand(2_500_000_000)),
        r"float32 \(2500000000,\), but must",
    ),
    "momentum": (_put("momentum", 0, "momentum", value=torch.ones(3)), "momentum of parameter 0 is float32"),
    "momentum too many": (_put("momentum", 99, value={"momentum": torch.ones(3)}), "parameter 99 is float32"),
    "momentum is none": (_put("momentum", 0, value=[1]), "malformed: its momentum or scaler"),
    "momentum is a tensor": (_put("momentum", 0, value=torch.ones(3)), "malformed: its momentum or scaler"),
    "scaler": (_put("train_step", "scaler", "scale", value="x"), "its scaler is"),
    "no scaler": (_put("train_step", "scaler"), "malformed: its momentum or scaler"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_state_is_refused_and_nothing_changed(
    change: Callable[[dict], None], message: str, golden: Path, tmp_path: Path
) -> None:
    state = checkpoint.load(golden)
    change(state)
    path = tmp_path / "hostile.pt"
    checkpoint.write(path, state)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_and_restore(path, tmp_path)
    assert str(path) in str(caught.value)


SCALER = torch.amp.GradScaler("cpu").state_dict()


@pytest.mark.parametrize(
    ("scaler", "message"),
    [
        ({"foo": 1.0}, r"scaler\._growth_tracker is absent, but must be of type int"),
        (SCALER | {"foo": 1.0}, r"scaler\.foo is of type float, but must be absent"),
        ({key: SCALER[key] for key in SCALER if key != "scale"}, r"scaler\.scale is absent"),
        (
            SCALER | {"growth_interval": 2.5},
            r"scaler\.growth_interval is of type float, but must be of type int",
        ),
        (SCALER | {"scale": float("nan")}, r"its scaler is .*nan"),
        (SCALER | {"scale": float("inf")}, r"its scaler is .*inf"),
        (SCALER | {"scale": -1.0}, r"its scaler is .*-1\.0"),
        (SCALER | {"growth_interval": 10**400}, r"its scaler is .*1000"),
        (SCALER | {"scale": [1.0]}, r"its scaler is "),
    ],
)
def test_hostile_scaler_is_refused_in_fp16_and_nothing_changed(
    scaler: dict, message: str, golden: Path, tmp_path: Path
) -> None:
    checkpoint.write(tmp_path / "hostile.pt", checkpoint.load(golden) | {"train_step": {"scaler": scaler}})
    with pytest.raises(CheckpointError, match=message):
        load_and_restore(tmp_path / "hostile.pt", tmp_path, "fp16")


def test_scaler_is_restored_in_fp16_and_left_out_elsewhere(golden: Path, tmp_path: Path) -> None:
    for scaler, precision, expected in (
        (SCALER | {"scale": 8.0}, "fp16", SCALER | {"scale": 8.0}),
        (SCALER | {"scale": 8.0}, "bf16", {}),
        ({}, "fp16", SCALER),
    ):
        checkpoint.write(tmp_path / "a.pt", checkpoint.load(golden) | {"train_step": {"scaler": scaler}})
        _, restored = load_and_restore(tmp_path / "a.pt", tmp_path, precision)
        assert restored["train_step"] == {"scaler": expected}


@pytest.mark.parametrize(
    ("newest", "chosen", "named"),
    [
        ({"foo": 1}, {}, "checkpoint-000000005.pt"),
        ({"step": "x"}, {}, "checkpoint-000000005.pt"),
        ({}, {"step": "x"}, "chosen.pt"),
        ({}, {"step": None}, "chosen.pt"),
    ],
)
def test_either_checkpoint_is_checked_before_their_steps_are_compared(
    newest: dict, chosen: dict, named: str, golden: Path, tmp_path: Path
) -> None:
    state = checkpoint.load(golden)
    checkpoint.write(tmp_path / "checkpoint-000000005.pt", state | {"step": 5} | newest)
    checkpoint.write(tmp_path / "chosen.pt", state | {"step": 9} | chosen)
    with pytest.raises(CheckpointError, match=f"{named} is malformed: "):
        find_checkpoint(tmp_path, str(tmp_path / "chosen.pt"), WORLD)


class _Call:
    """Pickled, it is a call of `function` when it is loaded."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple:
        return self._call


def _sign(path: Path, body: bytes) -> Path:
    """A file with the right header: who can write a file can hash it."""
    import hashlib

    path.write_bytes(checkpoint._MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    return path


def test_no_code_is_run(tmp_path: Path) -> None:
    import os

    for function, arguments in (
        (Path.touch, (tmp_path / "ran",)),
        (os.mkdir, (str(tmp_path / "ran"),)),
        (eval, ("1",)),
    ):
        checkpoint.write(tmp_path / "evil.pt", {"step": _Call(function, *arguments)})
        with pytest.raises(CheckpointError, match=r"evil\.pt cannot be loaded"):
            checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_archive_that_claims_more_than_it_has_is_refused_unread(golden: Path, tmp_path: Path) -> None:
    """Every entry deflated: 512 MB of zeros in 2 MB."""
    whole = zipfile.ZipFile(io.BytesIO(golden.read_bytes()[checkpoint._HEADER_BYTES :]))
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for entry in whole.infolist():
            with archive.open(entry.filename, "w", force_zip64=True) as file:
                if entry.filename.endswith("data/0"):
                    for _ in range(512):
                        file.write(bytes(1 << 20))
                else:
                    file.write(whole.read(entry))
    path = _sign(tmp_path / "bomb.pt", body.getvalue())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        CheckpointError, match=r"bomb\.pt cannot be loaded: its entries claim 54\d,\d+,\d+ bytes"
    ):
        checkpoint.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert path.stat().st_size < 20e6


def test_tensor_that_claims_more_than_its_storage_is_refused(golden: Path, tmp_path: Path) -> None:
    """The pickle says that a storage has 10 GB; the archive holds the few bytes that were there."""
    numel = checkpoint.load(golden)["model"][WEIGHT].numel()
    assert 255 < numel < 65536
    whole = zipfile.ZipFile(io.BytesIO(golden.read_bytes()[checkpoint._HEADER_BYTES :]))
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for entry in whole.infolist():
            data = whole.read(entry)
            if entry.filename.endswith("data.pkl"):
                old = b"M" + numel.to_bytes(2, "little")  # pickle's BININT2, then LONG1
                assert old in data
                data = data.replace(old, b"\x8a\x05" + (2_500_000_000).to_bytes(5, "little"))
            archive.writestr(entry.filename, data)
    with pytest.raises(CheckpointError, match=r"huge\.pt cannot be loaded"):
        checkpoint.load(_sign(tmp_path / "huge.pt", body.getvalue()))


@pytest.mark.parametrize("body", [b"", b"junk", b"PK\5\6" + bytes(18), b"\x80\x02}q\0."])
def test_rightly_signed_junk_is_refused(body: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"junk\.pt cannot be loaded"):
        checkpoint.load(_sign(tmp_path / "junk.pt", body))


def test_hostile_checkpoint_is_one_line_of_train_py(golden: Path, tmp_path: Path) -> None:
    from test_train import Run

    (tmp_path / "images/train/a").mkdir(parents=True)
    for i in range(32):
        Image.fromarray(np.full((20, 20, 3), i, np.uint8)).save(tmp_path / f"images/train/a/{i}.jpg")
    state = checkpoint.load(golden)
    state["model"].pop(WEIGHT)
    checkpoint.write(tmp_path / "evil.pt", state)
    run = Run(tmp_path, tmp_path / "images")
    allowed = ("augment.view1.blur", "train.epochs", "data.fingerprint")
    change = [text for key in allowed for text in ("--allow-change", key)]
    done = run("--resume", str(tmp_path / "evil.pt"), "eval.path=null", "train.epochs=3", *change)
    assert done.returncode == 2, done.stderr
    assert "evil.pt does not fit this network: model.online.encoder.conv1.weight is absent" in done.stderr
    assert not list(run.out.glob("checkpoint-*"))
    shutil.rmtree(run.out)
