"""verify_shards: a whole data set passes; each kind of damage is named with shard, offset and sample."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.shards import Manifest, Shard, file_sha256
from tools.make_shards import main as make_shards
from tools.verify_shards import main as verify


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "src/a").mkdir(parents=True)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8)).save(tmp_path / f"src/a/{i}.jpg")
    assert make_shards([str(tmp_path / "src"), str(tmp_path / "dst"), "--workers", "1"]) == 0
    return tmp_path / "dst"


def shard(dataset: Path) -> Path:
    return dataset / "shard-000000.tar"


def write_at(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def resign(dataset: Path, samples: np.ndarray) -> None:
    """A manifest that agrees with the damaged shard, so that only the damage itself can be found."""
    path = shard(dataset)
    Manifest([Shard(path.name, path.stat().st_size, file_sha256(path), len(samples))], samples, ["a"]).save(
        dataset
    )


def test_whole_data_set(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--no-decode"], ["--workers", "2"]):
        assert verify([str(dataset), *options]) == 0
        assert "8 samples are whole" in capsys.readouterr().out


def test_one_changed_bit_is_named(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = Manifest.load(dataset).samples[5]
    middle = int(record["offset"] + record["length"] // 2)
    old = shard(dataset).read_bytes()[middle]
    write_at(shard(dataset), middle, bytes((old ^ 1,)))
    assert verify([str(dataset), "--no-decode"]) == 1
    error = capsys.readouterr().err
    assert f"shard-000000.tar: offset {record['offset']}: sample 5: its bytes are not those" in error
    assert "sha256" in error
    assert "2 problems in 8 samples" in error


def test_damaged_image_with_right_hashes_is_found_by_decoding(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import zlib

    samples = np.array(Manifest.load(dataset).samples)
    offset, length = int(samples[3]["offset"]), int(samples[3]["length"])
    write_at(shard(dataset), offset + length - 300, bytes(298))
    samples["crc32"][3] = zlib.crc32(shard(dataset).read_bytes()[offset : offset + length])
    resign(dataset, samples)
    assert verify([str(dataset), "--no-decode"]) == 0
    assert verify([str(dataset)]) == 1
    assert f"offset {offset}: sample 3: Corrupt JPEG data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("height", "is 40 x 30, the manifest states 41 x 30"),
        ("label", "label is 0 in the file, the manifest states -1"),
        ("crc32", "crc32"),
        ("offset", "crc32"),
    ],
)
def test_wrong_record_is_named(
    dataset: Path, field: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = np.array(Manifest.load(dataset).samples)
    samples[field][2] = samples[field][2] + (-1 if field == "label" else 1)
    resign(dataset, samples)
    assert verify([str(dataset)]) == 1
    error = capsys.readouterr().err
    assert "sample 2: " in error
    assert message in error
    assert "1 problems" in error


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "bytes, the manifest states"),
        (_cut, "cut "),
        (_cut, "sample 7: 0 of"),
        (lambda path: path.unlink(), "No such file"),
    ],
)
def test_cut_or_missing_shard(
    dataset: Path, damage: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(shard(dataset))
    assert verify([str(dataset)]) == 1
    assert message in capsys.readouterr().err


def test_limit_and_missing_manifest(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(dataset).write_bytes(bytes(shard(dataset).stat().st_size))
    assert verify([str(dataset), "--limit", "3"]) == 1
    assert capsys.readouterr().err.count("\n") == 4
    content = json.loads((dataset / "manifest.json").read_text())
    (dataset / "manifest.json").write_text(json.dumps({**content, "version": 2}))
    assert verify([str(dataset)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_tars_beside_the_data_set_are_mentioned(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dataset / "more.tar").write_bytes(b"")
    assert verify([str(dataset)]) == 0
    captured = capsys.readouterr()
    assert f"note: {dataset}/more.tar is not part of the data set" in captured.err
    assert "8 samples are whole" in captured.out


def test_fifo_in_the_place_of_a_shard_is_a_problem(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(dataset).unlink()
    os.mkfifo(shard(dataset))
    assert verify([str(dataset)]) == 1
    assert "shard-000000.tar is not a regular file" in capsys.readouterr().err
