"""make_shards --format beton: the file is as the format's description says, and the way back loses nothing."""

import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_make_shards import hashes, quarantine, run, samples, write_bad, write_images

from byolt.pipelines.convert import beton_writer
from byolt.pipelines.convert import plan as planning
from byolt.pipelines.convert import shard_writer as writer
from byolt.pipelines.convert.beton_writer import BetonWriter, page_size_for
from byolt.pipelines.formats.beton import BetonSource
from byolt.pipelines.formats.decode import decode
from byolt.pipelines.formats.encoded import inspect, ppm_header
from byolt.pipelines.manifest import Manifest
from byolt.pipelines.sources import BetonFolder, TarSource, open_source
from byolt.tools.verify_shards import main as verify

NAME = "shard-000000.beton"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_images(tmp_path / "src")


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> int:
    """2 MiB, so that files of several pages are small."""
    monkeypatch.setattr(beton_writer, "PAGE_SIZE", 1 << 21)
    monkeypatch.setattr(writer, "PAGE_SIZE", 1 << 21)
    return 1 << 21


def by_file(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Name of the input file -> (bytes, label) of the sample, from .beton files."""
    found = {}
    for path in sorted(folder.glob("*.beton")):
        beton = BetonSource([path])
        for i in range(len(beton)):
            found[json.loads(beton.note(i))["file"]] = beton.read(i), int(beton.labels[i])
    return found


def parse(data: bytes) -> tuple[int, list[tuple], list[tuple]]:
    """Page size, metadata and regions of a file with image, int and JSON, from the description of the format alone."""
    version, fields, page, count, table = struct.unpack_from("<HHIQQ", data, 0)
    assert (version, fields) == (2, 3)
    descriptions = [struct.unpack_from("<B16s1024s", data, 24 + 1041 * k) for k in range(3)]
    assert [(kind, name.rstrip(b"\0")) for kind, name, _ in descriptions] == [
        (2, b"image"),
        (1, b"label"),
        (5, b"key"),
    ]
    assert not any(any(arguments) for _, _, arguments in descriptions)
    start = 24 + 3 * 1041
    metadata = [struct.unpack_from("<BHHQ3xqQQ", data, start + 40 * i) for i in range(count)]
    regions = [struct.unpack_from("<QQQ", data, at) for at in range(table, len(data), 24)]
    end = start + 40 * count
    assert table % page == 0
    for sample, pointer, size in sorted(regions, key=lambda region: region[1]):
        assert sample < count and size > 0
        assert pointer >= -(-(start + 40 * count) // page) * page
        assert pointer // page == (pointer + size - 1) // page
        assert not any(data[end:pointer])  # zeros between; regions do not overlap
        assert pointer >= end
        end = pointer + size
    assert not any(data[end:table]) and table - end < page
    return page, metadata, regions


@pytest.mark.parametrize("raw_fraction", [0, 0.5])
def test_file_is_as_the_description_says(raw_fraction: float, source: Path, tmp_path: Path) -> None:
    (source / "c0/bad.jpg").write_text("no image")  # leaves a row of the metadata unused
    assert run(source, tmp_path / "dst", "--format", "beton", "--raw-fraction", raw_fraction) == 0
    data = (tmp_path / "dst" / NAME).read_bytes()
    page, metadata, regions = parse(data)
    assert page == 1 << 23
    assert len(metadata) == 20 and len(regions) == 40
    pages = {sample: {pointer // page for s, pointer, _ in regions if s == sample} for sample in range(20)}
    assert all(len(of_sample) == 1 for of_sample in pages.values())
    sizes = {pointer: size for _, pointer, size in regions}
    seen = set()
    for mode, width, height, image, label, note, length in metadata:
        info = json.loads(data[note : note + length - 1])
        assert data[note + length - 1] == 0 and sizes[note] == length
        original = (source / info["file"]).read_bytes()
        assert (height, width) == inspect(original)[1:3]
        assert label == int(info["file"][1])
        pixels = decode(original).numpy().tobytes()
        assert data[image : image + sizes[image]] == (pixels if mode else original)
        seen.add(info["key"])
    assert len(seen) == 20
    assert 3 < sum(row[0] for row in metadata) < 17 if raw_fraction else not any(row[0] for row in metadata)


def test_same_samples_in_the_same_order_as_tars(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "tars") == 0
    assert run(source, tmp_path / "betons", "--format", "beton") == 0
    tars, betons = open_source(tmp_path / "tars"), open_source(tmp_path / "betons")
    assert isinstance(tars, TarSource) and isinstance(betons, BetonFolder)
    assert [betons.read(i) for i in range(20)] == [tars.read(i) for i in range(20)]
    for name in ("labels", "heights", "widths", "classes"):
        assert np.array_equal(getattr(betons, name), getattr(tars, name)), name
    assert betons.fingerprint == open_source(tmp_path / "betons").fingerprint != tars.fingerprint
    assert sorted(path.name for path in (tmp_path / "betons").iterdir()) == [
        "manifest.json",
        "quarantine.jsonl",
        "samples.npy",
        NAME,
    ]
    assert not list(tmp_path.rglob("*.byolt-tmp"))


def test_quarantine_split_strict_and_verification(source: Path, tmp_path: Path) -> None:
    write_bad(source)
    assert run(source, tmp_path / "tars", "--split", "a=.5,b=.5") == 0
    assert run(source, tmp_path / "dst", "--split", "a=.5,b=.5", "--format", "beton") == 0
    assert quarantine(tmp_path / "dst") == quarantine(tmp_path / "tars") != {}
    for part in "ab":
        assert by_file(tmp_path / "dst" / part) == samples(tmp_path / "tars" / part)
        assert verify([str(tmp_path / "dst" / part), "--workers", "1"]) == 0
    assert run(source, tmp_path / "strict", "--format", "beton", "--strict") == 1


def test_max_size_and_raw_fraction_together(tmp_path: Path) -> None:
    source = write_images(tmp_path / "src", 20, side=64)
    options = ("--format", "beton", "--max-size", 40, "--quality", 80, "--raw-fraction", 0.5)
    assert run(source, tmp_path / "dst", *options) == 0
    beton = open_source(tmp_path / "dst")
    assert isinstance(beton, BetonSource)
    assert set(np.maximum(beton.heights, beton.widths)) == {40}
    assert 3 < beton.raw.sum() < 17
    for i in range(20):
        name = json.loads(beton.note(i))["file"]
        with Image.open(source / name) as image:
            expected = image.resize((beton.widths[i], beton.heights[i]), Image.Resampling.LANCZOS)
        difference = np.abs(decode(beton.read(i)).numpy().astype(int) - np.asarray(expected))
        assert difference.max() == 0 if beton.raw[i] else 0 < difference.mean() < 30
    assert run(source, tmp_path / "again", *options) == 0
    assert hashes(tmp_path / "again") == hashes(tmp_path / "dst")


def test_page_grows_with_the_largest_sample(small_pages: int, tmp_path: Path) -> None:
    """Raw, it is larger than its file says; a page ends where the next sample has no room."""
    source = tmp_path / "src"
    source.mkdir()
    for i, side in enumerate((400, 500, 400, 900, 400, 500, 400, 400)):
        Image.new("RGB", (side, side), (i * 9, i, i)).save(source / f"{i}.jpg")
    (source / "bad.jpg").write_text("no image")
    assert run(source, tmp_path / "dst", "--format", "beton", "--raw-fraction", 1) == 0
    page, metadata, _ = parse((tmp_path / "dst" / NAME).read_bytes())
    assert page == 1 << 22  # 3 * 900 * 900 = 2.4 MB
    assert sorted(row[1] for row in metadata) == [400] * 5 + [500] * 2 + [900]
    assert len({row[3] // page for row in metadata}) > 1
    assert list(quarantine(tmp_path / "dst")) == ["bad.jpg"]
    assert writer._counters[0] == 9  # though the file was begun twice
    assert verify([str(tmp_path / "dst"), "--workers", "1"]) == 0


def test_page_sizes() -> None:
    assert [page_size_for(size) for size in (1, 1 << 23, (1 << 23) + 1, 1 << 31)] == [
        1 << 23,
        1 << 23,
        1 << 24,
        1 << 31,
    ]
    with pytest.raises(ValueError, match=r"a page of a \.beton has at most"):
        page_size_for((1 << 31) + 1)


def test_writer_refuses_a_png(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with open(tmp_path / "a.beton", "wb") as file, pytest.raises(ValueError, match="cannot hold a png"):
        BetonWriter(file, 1).add("0", (tmp_path / "a.png").read_bytes(), 0, {})


def test_image_wider_than_a_beton_can_say_goes_to_quarantine(source: Path, tmp_path: Path) -> None:
    """16 bits hold a side; a PPM's header says more. The largest that they hold goes through."""
    for width in (65_535, 65_536, 99_999):
        (source / f"c0/{width}.ppm").write_bytes(ppm_header(1, width) + bytes(3 * width))
    assert run(source, tmp_path / "dst", "--format", "beton") == 0
    refused = quarantine(tmp_path / "dst")
    assert refused.keys() == {"c0/65536.ppm", "c0/99999.ppm"}
    assert "1 x 65536: a side has at most 65500 pixels (set --max-size)" in refused["c0/65536.ppm"]
    kept, _ = by_file(tmp_path / "dst")["c0/65535.ppm"]
    assert kept == (source / "c0/65535.ppm").read_bytes()
    assert verify([str(tmp_path / "dst"), "--workers", "1"]) == 0
    with open(tmp_path / "a.beton", "wb") as file, pytest.raises(ValueError, match="at most 65535 pixels"):
        BetonWriter(file, 1).add("0", ppm_header(1, 65_536) + bytes(3 * 65_536), 0, {})


def test_stopped_and_started_again_is_byte_identical(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered = lambda entries, _: [list(enumerate(entries))[i : i + 7] for i in range(0, 20, 7)]  # noqa: E731
    monkeypatch.setattr(planning, "_chunks", numbered)
    options = ("--format", "beton", "--raw-fraction", 0.3)
    assert run(source, tmp_path / "straight", *options) == 0
    write, calls = writer._write, []

    def dies(*args: object) -> int:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write", dies)
        assert run(source, tmp_path / "dst", *options) == 1
    assert sorted(path.name for path in (tmp_path / "dst").iterdir()) == [
        ".make_shards",
        NAME,
        "shard-000001.beton",
    ]
    assert run(source, tmp_path / "dst") == 2  # as tars, into the same folder
    first = (tmp_path / "dst" / NAME).stat().st_mtime_ns
    assert run(source, tmp_path / "dst", *options) == 0
    assert (tmp_path / "dst" / NAME).stat().st_mtime_ns == first
    assert hashes(tmp_path / "dst") == hashes(tmp_path / "straight")
    assert verify([str(tmp_path / "dst"), "--workers", "1"]) == 0


def test_tar_to_beton_to_tar_is_byte_identical(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "tars", "--seed", 3) == 0
    assert run(tmp_path / "tars", tmp_path / "betons", "--format", "beton") == 0
    assert run(tmp_path / "betons", tmp_path / "again") == 0
    name = "shard-000000.tar"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "tars" / name).read_bytes()
    assert Manifest.load(tmp_path / "again").classes == ["c0", "c1"]
    notes = [json.loads(BetonSource([tmp_path / "betons" / NAME]).note(i)) for i in range(20)]
    assert [note["key"] for note in notes] == [f"{i:06d}" for i in range(20)]
    file = tmp_path / "betons" / NAME
    assert run(f"{file}?label=label", tmp_path / "file", "--split", "a=.5,b=.5") == 0
    parts = [samples(tmp_path / "file" / part) for part in "ab"]
    assert {**parts[0], **parts[1]} == samples(tmp_path / "tars") and not parts[0].keys() & parts[1].keys()
    order = list(samples(tmp_path / "tars"))
    for part in parts:  # drawn, and in their order
        assert sorted(part, key=order.index) == list(part)
    assert list(parts[0]) != order[:10]


def test_raw_pixels_stay_raw_and_become_jpeg_in_a_tar(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "a", "--format", "beton", "--raw-fraction", 1) == 0
    assert run(tmp_path / "a", tmp_path / "b", "--format", "beton") == 0
    assert (tmp_path / "b" / NAME).read_bytes() == (tmp_path / "a" / NAME).read_bytes()
    assert run(tmp_path / "a", tmp_path / "tars", "--quality", 100) == 0
    for name, (data, label) in by_file(tmp_path / "a").items():
        jpeg, same = samples(tmp_path / "tars")[name]
        assert inspect(jpeg).format == "jpeg" and label == same
        assert np.abs(decode(jpeg).numpy().astype(int) - decode(data).numpy()).mean() < 25


def small_beton(path: Path, rows: list[tuple[str, int]], **info: object) -> Path:
    with open(path, "wb") as file:
        out = BetonWriter(file, len(rows))
        for number, (key, label) in enumerate(rows):
            out.add(key, ppm_header(2, 3) + bytes([number]) * 18, label, dict(info))
        out.finish()
    return path


@pytest.mark.parametrize(
    "keys", [["a", "a"], ["a", "b.c"], ["a", "../b"], ["a", "x/__b"], ["a", "b" * 91], ["a", ""]]
)
def test_keys_that_cannot_name_members_are_noted_instead(keys: list[str], tmp_path: Path) -> None:
    path = small_beton(tmp_path / "a.beton", [(key, i) for i, key in enumerate(keys)], more=[1])
    assert run(path, tmp_path / "tars") == 0
    assert len(samples_by_key(tmp_path / "tars")) == 2
    for i, key in enumerate(keys):
        expected = {"original_key": key, "more": [1]} if key else {"more": [1]}
        assert samples_by_key(tmp_path / "tars")[f"{i:06d}"] == expected


def test_keys_that_can_are_kept(tmp_path: Path) -> None:
    path = small_beton(tmp_path / "a.beton", [("n01/x_7", 5), ("é", -1)])
    assert run(path, tmp_path / "tars") == 0
    assert samples_by_key(tmp_path / "tars").keys() == {"n01/x_7", "é"}
    assert open_source(tmp_path / "tars").labels.tolist() == [5, -1]


def samples_by_key(folder: Path) -> dict[str, dict]:
    import tarfile

    with tarfile.open(folder / "shard-000000.tar") as opened:
        return {m.name[:-5]: json.load(opened.extractfile(m)) for m in opened if m.name.endswith(".json")}  # type: ignore[arg-type]


def test_label_that_a_manifest_cannot_hold_goes_to_quarantine(tmp_path: Path) -> None:
    path = small_beton(tmp_path / "a.beton", [("a", -2), ("b", 1 << 31), ("c", 7)])
    assert run(path, tmp_path / "tars") == 0
    assert quarantine(tmp_path / "tars").keys() == {"a.beton sample 0", "a.beton sample 1"}
    assert open_source(tmp_path / "tars").labels.tolist() == [7]


def test_damage_in_a_data_set_is_found_by_its_checksum(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "a", "--format", "beton", "--raw-fraction", 1) == 0
    offset = int(Manifest.load(tmp_path / "a").samples["offset"][4])
    flip(tmp_path / "a" / NAME, offset + 30)
    assert run(tmp_path / "a", tmp_path / "b") == 0
    assert list(quarantine(tmp_path / "b").values()) == ["its bytes are not those that were indexed (crc32)"]


@pytest.mark.parametrize("options", [(), ("--no-decode",)])
def test_what_was_proven_is_not_decoded_again(
    options: tuple[str, ...], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    assert run(source, tmp_path / "tars", *options) == 0
    monkeypatch.setattr("byolt.pipelines.convert.rules.prove", lambda *_: decoded.append(1))
    assert run(tmp_path / "tars", tmp_path / "betons", "--format", "beton") == 0
    assert run(tmp_path / "betons", tmp_path / "again") == 0
    assert len(decoded) == (20 if options else 0)  # once, if at all


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes((byte ^ 1,)))


def test_what_has_no_place_is_said(
    tmp_path: Path, fixtures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import lzma

    path = tmp_path / "golden.beton"
    path.write_bytes(lzma.decompress((fixtures / "ffcv_1.0.2.beton.xz").read_bytes()))
    assert run(path, tmp_path / "tars") == 0
    assert f"note: left out: {path}: f, {path}: b" in capsys.readouterr().err
    assert list(samples_by_key(tmp_path / "tars")) == [f"{i:05d}" for i in range(12)]
    assert open_source(tmp_path / "tars").labels.tolist() == [i % 3 for i in range(12)]
    golden, tars = BetonSource([path]), open_source(tmp_path / "tars")
    assert [tars.read(i) == golden.read(i) for i in range(12)] == (~golden.raw).tolist()


def test_no_decode_trusts_what_has_header_and_end(source: Path, tmp_path: Path) -> None:
    whole = (source / "c0/0000.jpg").read_bytes()
    (source / "c0/0000.jpg").write_bytes(whole[:-100] + b"\xff\xd9")
    (source / "c0/0002.jpg").write_bytes(whole[:-100])
    assert run(source, tmp_path / "a", "--format", "beton", "--no-decode") == 0
    assert list(quarantine(tmp_path / "a")) == ["c0/0002.jpg"]
    assert run(source, tmp_path / "b", "--format", "beton") == 0
    assert list(quarantine(tmp_path / "b")) == ["c0/0000.jpg", "c0/0002.jpg"]


# ── verification ────────────────────────────────────────────────────────────────────────────────────────────


def problems(path: object, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert verify([str(path), "--workers", "1"]) == 1
    return capsys.readouterr().err


def test_one_changed_bit_is_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "a", "--format", "beton", "--raw-fraction", 0.5) == 0
    record = Manifest.load(tmp_path / "a").samples[5]
    flip(tmp_path / "a" / NAME, int(record["offset"] + record["length"] // 2))
    for path in (tmp_path / "a", tmp_path / "a" / NAME):
        error = problems(path, capsys)
        assert f"{NAME}: offset {record['offset']}: sample 5: its bytes are not those" in error
        assert "sha256" in error and "2 problems in 20 samples" in error


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (24 + 3 * 1041 + 40 * 3 + 16, "sample 3: label is"),
        (24 + 3 * 1041 + 40 * 3 + 1, "sample 3: its image has no bytes|sample 3: its raw image"),
        (16, "its allocation table|is cut short"),
        (0, "is not a .beton of version 2"),
    ],
)
def test_damaged_structure_is_named(
    offset: int, message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, tmp_path / "a", "--format", "beton", "--raw-fraction", 1) == 0
    flip(tmp_path / "a" / NAME, offset)
    error = problems(tmp_path / "a", capsys)
    assert any(part in error for part in message.split("|")), error
    with pytest.raises(ValueError, match=r"labels or sizes|raw image|allocation|version|cut short"):
        open_source(tmp_path / "a")


def test_beton_without_manifest(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "a", "--format", "beton") == 0
    (tmp_path / "b").mkdir()
    for name in ("x.beton", "y.beton"):
        (tmp_path / "b" / name).write_bytes((tmp_path / "a" / NAME).read_bytes())
    pair = f"{tmp_path}/b/x.beton,{tmp_path}/b/y.beton"
    for path in (tmp_path / "b", pair, f"{pair}?label=label"):
        assert verify([str(path), "--workers", "1"]) == 0
        assert "40 samples are whole" in capsys.readouterr().out
    beton = BetonSource([tmp_path / "b/y.beton"])
    with open(tmp_path / "b/y.beton", "r+b") as file:
        file.seek(int(beton.offsets[7] + beton.lengths[7] - 80))
        file.write(bytes(60))
    assert f"{tmp_path}/b/y.beton sample 7: " in problems(tmp_path / "b", capsys)
    assert verify([str(tmp_path / "b"), "--no-decode", "--workers", "1"]) == 0
    os.truncate(tmp_path / "b/y.beton", 1000)
    assert verify([pair]) == 2
    assert "y.beton is cut short" in capsys.readouterr().err


def test_missing_or_exchanged_file_is_noticed_at_opening(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "a", "--format", "beton") == 0
    os.truncate(tmp_path / "a" / NAME, 1000)
    with pytest.raises(ValueError, match=f"{NAME} has 1,000 bytes, manifest.json states"):
        open_source(tmp_path / "a")
    (tmp_path / "a" / NAME).unlink()
    with pytest.raises(ValueError, match="No such file"):
        open_source(tmp_path / "a")


def test_engine_that_is_not_installed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.delitem(sys.modules, "ffcv.writer", raising=False)
    assert run(source, tmp_path / "dst", "--format", "beton", "--engine", "ffcv") == 2
    error = capsys.readouterr().err
    assert "--engine ffcv needs the library ffcv" in error and "tools/install_ffcv.sh FOLDER" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "dst").exists()


def test_mistakes_are_one_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_beton(tmp_path / "a.beton", [("a", 0)])
    for args, message in [
        ((source, tmp_path / "d", "--raw-fraction", 0.5), "are for --format beton"),
        ((source, tmp_path / "d", "--engine", "ffcv"), "are for --format beton"),
        ((source, tmp_path / "d", "--format", "beton", "--raw-fraction", 1.5), "must be 0 to 1"),
        (
            (f"{path}?image=x", tmp_path / "d"),
            "has no RGB image field named 'x', only 'image' (RGB image), 'label'",
        ),
        ((tmp_path / "b.beton", tmp_path / "d"), "b.beton' does not exist"),
        ((path, tmp_path / "d", "--inside", "x"), "is a data set, which has no folders"),
    ]:
        try:
            code = run(*args)
        except SystemExit as exit_:  # argparse's
            code = int(exit_.code or 0)
        assert code == 2, args
        assert message in capsys.readouterr().err, args
    assert not (tmp_path / "d").exists()
