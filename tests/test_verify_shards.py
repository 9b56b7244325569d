"""verify_shards: a whole data set passes; each kind of damage is named with shard, offset and sample."""

import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byolt.files.atomic import sha256_of
from byolt.pipelines.manifest import Manifest, Shard
from byolt.pipelines.sources import TarSource
from byolt.tools.make_shards import main as make_shards
from byolt.tools.verify_shards import main as verify


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
    Manifest([Shard(path.name, path.stat().st_size, sha256_of(path), len(samples))], samples, ["a"]).save(
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
        ("height", "is 40 x 30 pixels, and 41 x 30 by the index"),
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
    assert "1 problem in 8 samples" in error


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


def _members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as opened:
        return opened.getmembers()


def _keep(path: Path, length: int) -> None:
    os.truncate(path, length)


def _another(path: Path) -> None:
    """A sound tar of the same size with other images: the index is not its own."""
    infos = _members(path)
    data = path.read_bytes()
    shift = infos[0].offset_data + infos[0].size // 2
    path.write_bytes(data[:shift] + bytes(7) + data[shift + 7 :])


DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # The message of verify, and that of the trainer before its first step; "" where the trainer is not affected.
    "cut at a member boundary": (
        lambda p: _keep(p, _members(p)[6].offset),
        r"offset \d+: cut at a member boundary",
        r"has [\d,]+ bytes, .* from offset \d+ on \(sample 2\)",
    ),
    "cut in a header": (
        lambda p: _keep(p, _members(p)[6].offset + 100),
        r"offset \d+: cut inside a header: 100 of 512 bytes",
        r"has [\d,]+ bytes, .* from offset \d+ on \(sample 2\)",
    ),
    "cut in data": (
        lambda p: _keep(p, _members(p)[6].offset_data + 99),
        r"offset \d+: cut inside a member's data: 99 of",
        r"has [\d,]+ bytes, .* from offset \d+ on \(sample 2\)",
    ),
    "cut inside its last member": (
        lambda p: _keep(p, _members(p)[-1].offset_data + 1),
        r"offset \d+: cut inside a member's data|offset \d+: cut at a member boundary",
        r"has [\d,]+ bytes, .* states",
    ),
    "end blocks missing": (
        lambda p: _keep(p, _members(p)[-1].offset_data + 512),
        r"offset \d+: cut at a member boundary: the end-of-archive block is missing",
        r"has [\d,]+ bytes, .* states",
    ),
    "header byte flipped": (
        lambda p: write_at(p, _members(p)[4].offset + 3, b"!"),
        r"offset \d+: header checksum is wrong",
        "",
    ),
    "index of another tar": (_another, r"offset \d+: sample 0: its bytes are not those", ""),
}


@pytest.mark.parametrize(("damage", "verified", "trained"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_tar_is_named_with_its_offset(
    damage: Callable[[Path], None],
    verified: str,
    trained: str,
    dataset: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A flipped header byte does not concern the trainer: it reads images by the offsets of the manifest."""
    source = TarSource(dataset)
    whole = [source.read(i) for i in range(len(source))]
    damage(shard(dataset))
    assert verify([str(dataset)]) == 1
    assert re.search(rf"shard-000000\.tar: {verified}", capsys.readouterr().err)
    if trained:
        with pytest.raises(ValueError, match=rf"shard-000000\.tar {trained}"):
            TarSource(dataset)
    else:
        again = TarSource(dataset)
        for i in range(len(again)):
            if i == 0 and damage is _another:
                with pytest.raises(ValueError, match="its bytes are not those that were indexed"):
                    again.read(i)
            else:
                assert again.read(i) == whole[i]


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
    assert f"note: not part of the data set, so that nothing reads it: {dataset}/more.tar" in captured.err
    assert "8 samples are whole" in captured.out


def test_fifo_in_the_place_of_a_shard_is_a_problem(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(dataset).unlink()
    os.mkfifo(shard(dataset))
    assert verify([str(dataset)]) == 1
    assert "shard-000000.tar is not a regular file" in capsys.readouterr().err
