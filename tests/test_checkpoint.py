"""Checkpoints: round trip, damage, and failed writes."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from byolt.model.run import checkpoint
from byolt.model.run.checkpoint import CheckpointError


def state(step: int) -> dict:
    return {
        "step": step,
        "model": {"w": torch.arange(6.0).view(2, 3) + step},
        "config": {"a": [1, None, "x"]},
    }


def test_round_trip_and_keep(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-000000010.pt",
        "checkpoint-000000015.pt",
    ]
    path, loaded, damaged = checkpoint.load_newest(tmp_path)
    assert path == tmp_path / "checkpoint-000000015.pt" and damaged == []
    assert loaded["step"] == 15 and loaded["config"] == {"a": [1, None, "x"]}
    assert torch.equal(loaded["model"]["w"], state(15)["model"]["w"])


def test_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path) == (None, {}, [])


@pytest.mark.parametrize("where", [0, 40, 120, 700, -1])
def test_single_flipped_bit_is_noticed(where: int, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1), keep=3)
    path = checkpoint.save(tmp_path, 2, state(2), keep=3)
    data = bytearray(path.read_bytes())
    data[where] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)
    newest, loaded, damaged = checkpoint.load_newest(tmp_path)
    assert loaded["step"] == 1 and newest is not None and newest.name == "checkpoint-000000001.pt"
    assert len(damaged) == 1 and path.name in damaged[0]


def test_renamed_to_another_step_is_not_the_newest(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1), keep=3)
    checkpoint.save(tmp_path, 2, state(2), keep=3)
    (tmp_path / "checkpoint-000000001.pt").rename(tmp_path / "checkpoint-000000009.pt")
    newest, loaded, damaged = checkpoint.load_newest(tmp_path)
    assert newest == tmp_path / "checkpoint-000000002.pt" and loaded["step"] == 2
    renamed = tmp_path / "checkpoint-000000009.pt"
    assert damaged == [f"checkpoint {renamed} was renamed: it is of step 1, give it that name again"]
    other = renamed.rename(tmp_path / "best.pt")  # a name without a step contradicts nothing
    assert checkpoint.load(other)["step"] == 1


@pytest.mark.parametrize("length", [0, 10, 91, 200])
def test_truncation_is_noticed(length: int, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, state(1), keep=1)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="checkpoint-000000001"):
        checkpoint.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        checkpoint.load(tmp_path / "nowhere.pt")


class Payload:
    def __reduce__(self) -> tuple:
        return (Path("/tmp/byolt-payload").touch, ())


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"step": Payload()}, keep=1)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        checkpoint.load(path)
    assert not Path("/tmp/byolt-payload").exists()


@pytest.mark.parametrize("write", [0, 1, 4])
def test_failed_write_leaves_the_last_checkpoint_and_no_temporary(
    write: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, state(1), keep=1)
    monkeypatch.setenv("BYOLT_FAIL", f"checkpoint write:{write}:ENOSPC")
    with pytest.raises(OSError, match=r"cannot be written, .*free some space.*No space left on device\)$"):
        checkpoint.save(tmp_path, 2, state(2), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000000001.pt"]


def test_error_that_is_not_the_disk_s_is_not_blamed_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BYOLT_FAIL", "checkpoint write:1:raise")
    with pytest.raises(RuntimeError) as caught:
        checkpoint.save(tmp_path, 2, state(2), keep=1)
    assert "free some space" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_stale_temporary_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / ".checkpoint-000000001.pt.123.byolt-tmp"
    stale.write_bytes(b"half")
    checkpoint.save(tmp_path, 2, state(2), keep=1)
    assert not stale.exists()


def test_exported_encoder(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    checkpoint.export_encoder(path, {"conv1.weight": weight}, {"backbone": "resnet50"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"backbone": "resnet50"}
        assert torch.equal(file.get_tensor("conv1.weight"), weight)
