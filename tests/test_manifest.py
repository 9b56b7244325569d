"""The manifest: it comes back as it was saved, and every contradiction in it is refused by name."""

import hashlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_index import members, write_tar

from byolt.files.atomic import sha256_of, writing
from byolt.pipelines import manifest as module
from byolt.pipelines.formats.index import SAMPLE, index_tar
from byolt.pipelines.manifest import MANIFEST, SAMPLES, Manifest, Shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of one shard with four samples."""
    path = write_tar(tmp_path / "a.tar", members())
    records = index_tar(path).records
    Manifest([Shard("a.tar", path.stat().st_size, sha256_of(path), 4)], records, ["x", "y", "z"]).save(
        tmp_path
    )
    return tmp_path


def test_manifest_comes_back(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.classes == ["x", "y", "z"]
    assert manifest.shards[0].samples == 4
    assert np.array_equal(manifest.samples, index_tar(folder / "a.tar").records)
    assert isinstance(manifest.samples, np.memmap)


def _edit(key: str, value: object) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        target = content["shards"][0] if key in content["shards"][0] else content
        target[key] = value
        del content["sha256"]  # which would refuse it first
        (folder / MANIFEST).write_text(json.dumps(content))

    return damage


def _swap(folder: Path) -> None:
    """Exchanges two records, with the sha256 of the result."""
    samples = np.load(folder / SAMPLES)[[0, 2, 1, 3]]
    np.save(folder / SAMPLES, samples)
    _edit("samples_sha256", hashlib.sha256(samples.data).hexdigest())(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing: .*make_shards.py --index"),
        (lambda f: (f / MANIFEST).write_text("{"), "cannot be read"),
        (lambda f: (f / MANIFEST).write_text("[]"), "not a byolt-shards manifest"),
        (lambda f: (f / SAMPLES).unlink(), "samples.npy is missing"),
        (lambda f: (f / SAMPLES).write_bytes((f / SAMPLES).read_bytes()[:-1]), "samples.npy cannot be read"),
        (lambda f: (f / SAMPLES).write_bytes((f / SAMPLES).read_bytes()[:-1] + b"?"), "sha256"),
        (_edit("version", 9), "version 9"),
        (_edit("num_samples", 5), "states 5 samples"),
        (_edit("samples", 3), "a.tar states 3 samples, but has 4 records"),
        (_edit("size", 2000), "sample 1 is outside a.tar"),
        (_swap, "sample 2 is out of order"),
        (_edit("name", "../a.tar"), "plain"),
        (_edit("classes", ["x"]), "outside the 1 classes"),
    ],
)
@pytest.mark.parametrize("piece", [1, module._PIECE], ids=["in pieces", "whole"])
def test_damaged_manifest(
    folder: Path, damage: Callable[[Path], object], message: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        Manifest.load(folder)


def test_temporary_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with writing(tmp_path / "x") as file:
            file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", -1),
        ("size", 2**70),
        ("size", None),
        ("samples", "x"),
        ("name", 5),
        ("name", ".."),
        ("name", ""),
        ("name", "\0x"),
        ("name", "\ud800"),
        ("classes", 5),
        ("classes", "abc"),
        ("classes", [1, 2, 3]),
        ("settings", 5),
        ("shards", 5),
        ("shards", ["a.tar"]),
        ("num_samples", None),
    ],
)
def test_edited_manifest_is_refused_by_name(key: str, value: object, folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    target = content["shards"][0] if key in content["shards"][0] else content
    target[key] = value
    del content["sha256"]  # which would refuse it first
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest\.json"):
        Manifest.load(folder)


def test_a_flipped_bit_of_the_manifest_is_refused_by_name(folder: Path) -> None:
    path = folder / MANIFEST
    whole = path.read_bytes()
    sound = Manifest.load(folder)
    refused = 0
    for where in range(0, len(whole), 3):
        flipped = bytes([whole[where] ^ 1 << where % 8])
        path.write_bytes(whole[:where] + flipped + whole[where + 1 :])
        try:
            manifest = Manifest.load(folder)
        except ValueError as error:
            refused += str(error).startswith(str(path)) or SAMPLES in str(error)
        else:  # a space, or a letter of the key "sha256"
            refused += (manifest.shards, manifest.classes, manifest.settings) == (
                sound.shards, sound.classes, sound.settings
            )  # fmt: skip
    assert refused == len(range(0, len(whole), 3))


def test_older_manifest_without_a_checksum_is_read(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    del content["sha256"]
    (folder / MANIFEST).write_text(json.dumps(content))
    assert Manifest.load(folder).shards


def test_deep_nesting_and_foreign_arrays_are_refused_by_name(folder: Path) -> None:
    whole = (folder / SAMPLES).read_bytes()
    foreign = io.BytesIO()
    np.save(foreign, np.zeros(4, "M8[s]"))  # has no buffer to hash
    for data in (b"PK\3\4" + whole, b"", foreign.getvalue(), whole[:10]):
        (folder / SAMPLES).write_bytes(data)
        with pytest.raises(ValueError, match=r"samples\.npy (cannot be read|is not an array of sample)"):
            Manifest.load(folder)
    (folder / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    ("field", "row", "value", "message"),
    [
        ("offset", 3, 2**64 - 8, "sample 3 is outside a.tar"),  # offset + length wraps around
        ("offset", 1, 600, "sample 2 is out of order"),
    ],
)
def test_records_out_of_range_or_order(folder: Path, field: str, row: int, value: int, message: str) -> None:
    manifest = Manifest.load(folder)
    samples = np.array(manifest.samples)
    samples[field][row] = value
    if "order" in message:
        samples[[1, 2]] = samples[[2, 1]]
    with pytest.raises(ValueError, match=message):
        Manifest(manifest.shards, samples, manifest.classes).save(folder)


@settings(deadline=None, max_examples=20)
@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    classes=st.one_of(st.none(), st.lists(st.text(max_size=9), min_size=1, max_size=3)),
    made_with=st.dictionaries(st.text(max_size=5), st.one_of(st.none(), st.integers(), st.text(max_size=5))),
    data=st.data(),
)
def test_any_manifest_comes_back(
    counts: list[int], classes: list[str] | None, made_with: dict, data: st.DataObject
) -> None:
    """Whatever is saved is loaded as it was: labels and sizes at the edges of their range, names in any script."""
    records = []
    for number, count in enumerate(counts):
        part = np.zeros(count, SAMPLE)
        lengths = data.draw(st.lists(st.integers(1, 2**32 - 1), min_size=count, max_size=count))
        part["shard"], part["length"] = number, lengths
        part["offset"] = np.cumsum([512, *lengths[:-1]], dtype=np.uint64)
        for name, low, high in (("height", 1, 2**32 - 1), ("width", 1, 2**32 - 1), ("crc32", 0, 2**32 - 1)):
            part[name] = data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count))
        part["label"] = data.draw(
            st.lists(
                st.integers(-1, len(classes) - 1 if classes else 2**31 - 2), min_size=count, max_size=count
            )
        )
        records.append(part)
    samples = np.concatenate(records)
    shards = [
        Shard(f"{k}.tar", int(part["offset"][-1]) + int(part["length"][-1]), "0" * 64, len(part))
        for k, part in enumerate(records)
    ]
    with tempfile.TemporaryDirectory() as folder:
        Manifest(shards, samples, classes, made_with).save(folder)
        again = Manifest.load(folder)
        assert np.array_equal(again.samples, samples)
        for number, (shard, first, part) in enumerate(again.by_shard()):
            assert shard is again.shards[number] and first == sum(counts[:number])
            assert np.array_equal(part, records[number])
        assert number == len(counts) - 1
    assert (again.shards, again.classes, again.settings) == (shards, classes, made_with)
