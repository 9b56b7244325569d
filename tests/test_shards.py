"""Manifest and tar index: every way a tar can be damaged is noticed, with shard and offset."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.shards import MANIFEST, SAMPLE, SAMPLES, Manifest, Shard, Temporary, file_sha256, index_tar


def jpeg(height: int = 8, width: int = 9) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, height, width)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def members(count: int = 4) -> list[tuple[str, bytes]]:
    pairs = [((f"{i:06d}.jpg", jpeg(i + 1, 20)), (f"{i:06d}.cls", b"%d" % (i % 3))) for i in range(count)]
    return [member for pair in pairs for member in pair]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of one shard with four samples."""
    path = write_tar(tmp_path / "a.tar", members())
    records = index_tar(path)
    Manifest([Shard("a.tar", path.stat().st_size, file_sha256(path), 4)], records, ["x", "y", "z"]).save(
        tmp_path
    )
    return tmp_path


def test_record_layout() -> None:
    assert SAMPLE.itemsize == 32


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder_name", ["", "a/", "n" * 90 + "/" + "m" * 80 + "/", "ünïcode/"])
def test_index_agrees_with_tarfile(tmp_path: Path, form: int, folder_name: str) -> None:
    content = [(folder_name + name, data) for name, data in members(3)]
    content.insert(2, (folder_name + "__meta__.txt", b"no sample"))
    path = write_tar(tmp_path / "a.tar", content, form)
    records = index_tar(path)
    assert records["label"].tolist() == [0, 1, 2]
    assert records["height"].tolist() == [1, 2, 3]
    assert set(records["width"]) == {20}
    with tarfile.open(path) as opened:
        expected = [(m.offset_data, m.size) for m in opened.getmembers() if m.name.endswith(".jpg")]
    assert records[["offset", "length"]].tolist() == expected


def test_unlabelled_and_upper_case(tmp_path: Path) -> None:
    records = index_tar(
        write_tar(tmp_path / "a.tar", [("a.JPEG", jpeg()), ("b.jpg", jpeg()), ("b.json", b"{}")])
    )
    assert records["label"].tolist() == [-1, -1]


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", members(3))
    whole = path.read_bytes()
    with tarfile.open(path) as opened:
        last = opened.getmembers()[-1]
    end = last.offset_data + 512  # of the last member; the end-of-archive blocks follow
    for length in [*range(0, end, 512), *range(100, end, 512)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.tar: offset \d+: cut"):
            index_tar(path)
    path.write_bytes(whole[: end + 512])
    assert len(index_tar(path)) == 3  # one end-of-archive block says enough


def _flip(data: bytes) -> bytes:
    return data[:3] + b"!" + data[4:]


def _concatenate(data: bytes) -> bytes:
    return data + data


@pytest.mark.parametrize(("damage", "message"), [(_flip, "checksum"), (_concatenate, "behind the end")])
def test_damaged_tar(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = write_tar(tmp_path / "a.tar", members())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"a\.tar: offset \d+: .*{message}"):
        index_tar(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([("a.jpg", jpeg()), ("b.jpg", jpeg()), ("a.cls", b"1")], "key 'a' occurs twice"),
        ([("a.jpg", jpeg()), ("a.jpg", jpeg())], "member 'a.jpg' occurs twice"),
        ([("a.cls", b"1")], "sample 'a' needs one image, it has: cls"),
        ([("a.jpg", jpeg()), ("a.png", jpeg())], "needs one image, it has: jpg, png"),
        ([("../a.jpg", jpeg())], "unsafe member name '../a.jpg'"),
        ([("/a.jpg", jpeg())], "unsafe member name '/a.jpg'"),
        ([("a.jpg", b"")], "image of sample 'a': empty"),
        ([("a.jpg", jpeg()[:-2])], "image of sample 'a': cut short"),
        ([("a.jpg", jpeg()), ("a.cls", b"cat")], "label of sample 'a' is b'cat'"),
    ],
)
def test_refused_content(tmp_path: Path, content: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.tar: offset \d+: .*{message}"):
        index_tar(write_tar(tmp_path / "a.tar", content))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        out.addfile(info)
    with pytest.raises(ValueError, match=r"offset 0: 'a\.jpg' is a (symbolic link|hard link|device|fifo)"):
        index_tar(tmp_path / "a.tar")


def test_manifest_comes_back(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.classes == ["x", "y", "z"]
    assert manifest.shards[0].samples == 4
    assert np.array_equal(manifest.samples, index_tar(folder / "a.tar"))
    assert isinstance(manifest.samples, np.memmap)


def _edit(key: str, value: object) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        target = content["shards"][0] if key in content["shards"][0] else content
        target[key] = value
        (folder / MANIFEST).write_text(json.dumps(content))

    return damage


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
        (_edit("samples", 3), "a.tar states 3 samples, records say 4"),
        (_edit("size", 2000), "sample 1 lies outside a.tar"),
        (_edit("name", "../a.tar"), "plain"),
        (_edit("classes", ["x"]), "outside the 1 classes"),
    ],
)
def test_damaged_manifest(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        Manifest.load(folder)


def test_temporary_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with Temporary(tmp_path / "x") as file:
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
    ],
)
def test_edited_manifest_is_refused_by_name(key: str, value: object, folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["shards"][0][key] = value
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest\.json"):
        Manifest.load(folder)
