"""Tar and .beton index: every way a tar can be damaged is noticed, with shard and offset."""

import errno
import io
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from byolt.pipelines.formats import tar
from byolt.pipelines.formats.index import SAMPLE, index_tar


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


def test_unlabeled_and_upper_case(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("damage", "message"), [(_flip, "checksum"), (_concatenate, "after the end")])
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
            "its key occurs twice (a key ends at the",
        ),
        ([("c.jpg", jpeg()), ("c.jpg", jpeg())], "at most one label, it has: jpg, jpg"),
        ([("c.jpg", jpeg()), ("c.png", jpeg())], "needs one image and at most one label, it has: jpg, png"),
        ([("c.left.jpg", jpeg()), ("c.right.jpg", jpeg())], "rename such files without further dots"),
        ([("../c.jpg", jpeg())], "unsafe member name '../c.jpg'"),
        ([("/c.jpg", jpeg())], "unsafe member name '/c.jpg'"),
        ([("c.jpg", b"")], "empty"),
        ([("c.jpg", jpeg()[:-2])], "cut short"),
        ([("c.jpg", jpeg()), ("c.cls", b"cat")], "its label is 'cat', not an integer"),
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
    content = [("README.txt", b"hi"), ("a.heic", b""), ("a.cls", b"1"), ("b.jpg", jpeg()), ("b.seg.png", b"")]
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
    assert index_tar(path).refused == [
        ("a", "offset 0: 5,368,709,120 bytes: an image has at most 1,073,741,824")
    ]


def test_fifo_is_no_tar(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=r"a\.tar is not a regular file"):
        index_tar(tmp_path / "a.tar")


def walk(path: Path) -> list[tar.Member]:
    with tar.Tar(path) as file:
        return list(file.walk())


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


def test_error_of_the_disk_names_the_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", members())

    def broken(*_: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(OSError, match=r"Input/output error: '.*a\.tar'"):
        index_tar(path)
