"""Manifest and tar index: every way a tar can be damaged is noticed, with shard and offset."""

import errno
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from byolt.files.atomic import sha256_of, writing
from byolt.pipelines.formats import tar
from byolt.pipelines.formats.index import SAMPLE, index_tar
from byolt.pipelines.manifest import MANIFEST, SAMPLES, Manifest, Shard


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
    records = index_tar(path).records
    Manifest([Shard("a.tar", path.stat().st_size, sha256_of(path), 4)], records, ["x", "y", "z"]).save(
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
    records = index_tar(path).records
    assert records["label"].tolist() == [0, 1, 2]
    assert records["height"].tolist() == [1, 2, 3]
    assert set(records["width"]) == {20}
    with tarfile.open(path) as opened:
        expected = [(m.offset_data, m.size) for m in opened.getmembers() if m.name.endswith(".jpg")]
    assert records[["offset", "length"]].tolist() == expected


def test_unlabelled_and_upper_case(tmp_path: Path) -> None:
    content = [("a.JPEG", jpeg()), ("b.jpg", jpeg()), ("b.json", b"{}"), ("c.jpg", jpeg()), ("c.cls", b"-1")]
    records = index_tar(write_tar(tmp_path / "a.tar", content)).records
    assert records["label"].tolist() == [-1, -1, -1]


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
    assert len(index_tar(path).records) == 3  # one end-of-archive block says enough


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
    ("content", "reason"),
    [
        (
            [("a.jpg", jpeg()), ("b.jpg", jpeg()), ("a.jpg", jpeg())],
            "its key occurs twice; a key ends at the",
        ),
        ([("c.jpg", jpeg()), ("c.jpg", jpeg())], "at most one label, it has: jpg, jpg"),
        ([("c.jpg", jpeg()), ("c.png", jpeg())], "needs one image and at most one label, it has: jpg, png"),
        ([("c.0001.jpg", jpeg()), ("c.0002.jpg", jpeg())], "rename such files without further dots"),
        ([("../c.jpg", jpeg())], "unsafe member name '../c.jpg'"),
        ([("/c.jpg", jpeg())], "unsafe member name '/c.jpg'"),
        ([("c.jpg", b"")], "empty"),
        ([("c.jpg", jpeg()[:-2])], "cut short"),
        ([("c.jpg", jpeg()), ("c.cls", b"cat")], "its label is b'cat', not an integer"),
    ],
)
def test_a_sample_that_cannot_be_used_is_left_out_by_name(
    tmp_path: Path, content: list[tuple[str, bytes]], reason: str
) -> None:
    good = [("good0.jpg", jpeg()), ("good1.jpg", jpeg())]
    found = index_tar(write_tar(tmp_path / "a.tar", [good[0], *content, good[1]]))
    assert [key[-1] for key, _ in found.refused] == [content[-1][0].lstrip("./")[0]]
    assert reason in found.refused[0][1]
    assert found.refused[0][1].startswith("offset ")
    assert len(found.records) == 2 + (len(content) == 3) * 2
    assert found.imageless == 0


def test_names_without_an_image_are_counted(tmp_path: Path) -> None:
    content = [
        ("README.txt", b"hi"),
        ("a.webp", b"RIFF"),
        ("a.cls", b"1"),
        ("b.jpg", jpeg()),
        ("b.seg.png", b""),
    ]
    found = index_tar(write_tar(tmp_path / "a.tar", content))
    assert (len(found.records), found.refused, found.imageless) == (1, [], 2)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        out.addfile(info)
    ((key, reason),) = index_tar(tmp_path / "a.tar").refused
    assert key == "a"
    assert re.match(r"offset 0: 'a\.jpg' is a (symbolic link|hard link|device|fifo)", reason)


def test_member_of_gigabytes_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 5 << 30
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 512 + info.size + 1024)  # sparse
    assert index_tar(path).refused == [("a", "offset 0: 5,368,709,120 bytes: more than an image has")]


def test_fifo_is_no_tar(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=r"a\.tar is not a regular file"):
        index_tar(tmp_path / "a.tar")


def walk(path: Path) -> list[tar.Member]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return list(tar.walk(path, descriptor))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_folder_or_link_with_a_size_swallows_no_member(tmp_path: Path, kind: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", members(1))
    odd = tarfile.TarInfo("odd")
    odd.type, odd.size, odd.linkname = kind, 1024, "x"
    path.write_bytes(odd.tobuf() + path.read_bytes())
    with tarfile.open(path) as opened:
        assert [m.name for m in opened] == ["odd", "000000.jpg", "000000.cls"]
    assert [m.name.rstrip("/") for m in walk(path)] == ["odd", "000000.jpg", "000000.cls"]


def test_old_sparse_file_of_gnu_is_stepped_over(tmp_path: Path) -> None:
    """Two blocks of its map follow the header, which the size does not count."""
    path = write_tar(tmp_path / "a.tar", members(1))
    info = tarfile.TarInfo("sparse")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    maps = bytes(504) + b"\1" + bytes(7) + bytes(512)
    path.write_bytes(bytes(header) + maps + b"x" * 512 + path.read_bytes())
    assert [(m.name, m.kind) for m in walk(path)][:2] == [
        ("sparse", "member of type 'S'"),
        ("000000.jpg", "file"),
    ]
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match="cut inside the map"):
        walk(path)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hard_link_says_of_what(tmp_path: Path, form: int) -> None:
    target = "f/" + "n" * (80 if form == tarfile.USTAR_FORMAT else 150)
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as out:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = tarfile.LNKTYPE, target
        out.addfile(info)
        out.addfile(tarfile.TarInfo("plain"))
    assert [(m.name, m.link) for m in walk(tmp_path / "a.tar")] == [("link", target), ("plain", "")]


def test_error_of_the_disk_names_the_tar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(OSError, match=r"Input/output error: '.*a\.tar'"):
        index_tar(folder / "a.tar")


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
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest\.json"):
        Manifest.load(folder)


def test_deep_nesting_and_foreign_arrays_are_refused_by_name(folder: Path) -> None:
    whole = (folder / SAMPLES).read_bytes()
    foreign = io.BytesIO()
    np.save(foreign, np.zeros(4, "M8[s]"))  # has no buffer to hash
    for data in (b"PK\3\4" + whole, b"", foreign.getvalue(), whole[:10]):
        (folder / SAMPLES).write_bytes(data)
        with pytest.raises(ValueError, match=r"samples\.npy (cannot be read|is no array of sample)"):
            Manifest.load(folder)
    (folder / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    ("field", "row", "value", "message"),
    [
        ("offset", 3, 2**64 - 8, "sample 3 lies outside a.tar"),  # offset + length wraps around
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
