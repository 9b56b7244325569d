"""What people have in their folders: WebDataset tars, tars of tars, odd names and kinds, and the labels they get."""

import io
import json
import os
import random
import re
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_index import write_tar
from test_loader import make_config
from test_make_shards import quarantine

from byolt.files.console import shown
from byolt.pipelines.convert import rules
from byolt.pipelines.formats.decode import decode
from byolt.pipelines.formats.folder import FolderSource
from byolt.pipelines.manifest import Manifest
from byolt.pipelines.plain import plain_images
from byolt.pipelines.resident import Resident
from byolt.pipelines.sources import TarSource, open_source
from byolt.pipelines.subset import listed_ids
from byolt.tools import make_shards
from byolt.tools.verify_shards import main as verify


def image(seed: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 9, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def run(*args: object) -> int:
    return make_shards.main([*map(str, args), "--workers", "1"])


def labels(folder: Path) -> dict[bytes, str]:
    """Image -> the name of its class, or its label."""
    source = TarSource(folder)
    names = source.classes
    return {
        source.read(i): names[source.labels[i]] if names else str(source.labels[i])
        for i in range(len(source))
    }


def members_of(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as opened:
            found |= {m.name: opened.extractfile(m).read() for m in opened}  # type: ignore[union-attr]
    return found


def web_dataset(
    count: int = 32, folder: str = "train/", label: str = "{}", first: int = 0
) -> list[tuple[str, bytes]]:
    members = []
    for i in range(first, first + count):
        members += [
            (f"{folder}{i:06d}.jpg", image(i)),
            (f"{folder}{i:06d}.cls", label.format(i % 4).encode()),
            (f"{folder}{i:06d}.json", json.dumps({"caption": f"number {i}"}).encode()),
        ]
    return members


@pytest.mark.parametrize("folder", ["train/", ""])
@pytest.mark.parametrize("label", ["{}", "class {}\n"])
def test_webdataset_tar_keeps_keys_labels_and_json(
    tmp_path: Path, folder: str, label: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "src").mkdir()
    tar = write_tar(tmp_path / "src/a.tar", web_dataset(folder=folder, label=label))
    assert run(tar, tmp_path / "dst") == 0
    said = capsys.readouterr()
    assert "read as WebDataset: 32 samples, 32 with a label" in said.err
    expected = {image(i): label.format(i % 4).strip() for i in range(32)}
    assert labels(tmp_path / "dst") == expected
    assert quarantine(tmp_path / "dst") == {}
    members = members_of(tmp_path / "dst")
    for i in range(32):
        assert members[f"{folder}{i:06d}.jpg"] == image(i)
        assert json.loads(members[f"{folder}{i:06d}.json"]) == {"caption": f"number {i}"}
    assert run(tmp_path / "src", "--index") == 0
    assert labels(tmp_path / "src") == expected
    assert Manifest.load(tmp_path / "src").classes == Manifest.load(tmp_path / "dst").classes
    assert verify([str(tmp_path / "src")]) == verify([str(tmp_path / "dst")]) == 0


def test_folder_of_webdataset_tars_is_one_set(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for number, names in enumerate((["cat", "dog"], ["ant", "cat"])):
        content = web_dataset(8, "", "{}", 8 * number)
        content[1::3] = [(name, names[int(data) % 2].encode()) for name, data in content[1::3]]
        write_tar(tmp_path / f"src/part{number}.tar", content)
    assert run(tmp_path / "src", tmp_path / "dst") == 0
    expected = {image(i): (["cat", "dog"] if i < 8 else ["ant", "cat"])[i % 2] for i in range(16)}
    assert labels(tmp_path / "dst") == expected
    assert Manifest.load(tmp_path / "dst").classes == ["ant", "cat", "dog"]
    assert {name for name in members_of(tmp_path / "dst") if name.endswith(".jpg")} == {
        f"{i:06d}.jpg" for i in range(16)
    }
    assert run(tmp_path / "src", "--index") == 0
    assert labels(tmp_path / "src") == expected
    assert run(tmp_path / "src", tmp_path / "again") == 0  # by its manifest
    assert labels(tmp_path / "again") == expected


@pytest.mark.parametrize("pattern", ["*[02].tar", "p{0,2}.tar"])
def test_a_pattern_names_some_tars_of_a_folder(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for number in range(3):
        write_tar(tmp_path / f"src/p{number}.tar", web_dataset(4, "", "{}", 4 * number))
    (tmp_path / "src/notes.txt").write_text("beside the tars")
    assert run(tmp_path / "src" / pattern, tmp_path / "dst") == 0
    assert labels(tmp_path / "dst") == {image(i): str(i % 4) for i in (*range(4), *range(8, 12))}
    assert quarantine(tmp_path / "dst") == {}


def test_a_pattern_that_names_all_shards_of_a_data_set_is_the_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "src/a").mkdir(parents=True)
    (tmp_path / "src/a/1.jpg").write_bytes(image(1))
    assert run(tmp_path / "src", tmp_path / "set") == 0
    assert "set: 1 sample in 1 shard, 1 class, 0 in quarantine" in capsys.readouterr().out
    assert run(tmp_path / "set/*.tar", tmp_path / "again") == 0
    assert labels(tmp_path / "again") == {image(1): "a"}
    assert members_of(tmp_path / "again") == members_of(tmp_path / "set")
    assert verify([str(tmp_path / "set")]) == 0
    assert "1 sample is whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://bucket/set", "SRC s3://bucket/set must be local: copy it first, with aws"),
        ("pipe:cat x.tar", "its output written to a file"),
        ("none*.tar", "SRC 'none*.tar': 'none*.tar' matches no file in "),
        ("{a,b}/*.tar", "name one folder, tar or zip, or several tars of one folder"),
        ("a/*", "a/1.tar, a/2.txt: name one folder, tar or zip"),
        ("a/{1,3}.tar", "a/3.tar does not exist"),
        ("a", "a.tar: write the pattern of tars in quotes"),
    ],
)
def test_a_pattern_or_address_that_cannot_be_used(
    source: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.tar", "a/2.txt", "b/1.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    more = ["a/2.tar", "a.tar"] if source == "a" else []
    if more:
        with pytest.raises(SystemExit, match="2"):  # argparse
            run(source, "dst", *more)
    else:
        assert run(source, "dst") == 2
    said = capsys.readouterr().err
    assert message in said and not (tmp_path / "dst").exists()
    assert "does not exist" not in said or "a/3.tar" in said
    if source.startswith("pipe:"):
        assert run(source, "--index") == verify([source]) == 2
        assert capsys.readouterr().err.count("copy it first") == 2


def test_one_damaged_label_does_not_make_the_others_names(tmp_path: Path) -> None:
    content = web_dataset(8, "")
    content[4] = ("000001.cls", b"\xff1")
    tar = write_tar(tmp_path / "a.tar", content)
    assert run(tar, tmp_path / "dst") == 0
    assert labels(tmp_path / "dst") == {image(i): str(i % 4) for i in range(8) if i != 1}
    assert "its label is '\\\\xff1', not an integer" in quarantine(tmp_path / "dst")["000001"]


def test_json_beside_images_in_class_folders_leaves_the_classes(tmp_path: Path) -> None:
    content = []
    for i in range(6):
        content += [(f"c{i % 2}/{i}.jpg", image(i)), (f"c{i % 2}/{i}.json", b"{}")]
    assert run(write_tar(tmp_path / "a.tar", content), tmp_path / "dst") == 0
    assert labels(tmp_path / "dst") == {image(i): f"c{i % 2}" for i in range(6)}


@pytest.mark.parametrize(
    ("kind", "extension"),
    [("WEBP", "webp"), ("AVIF", "avif"), ("JPEG2000", "jp2"), ("TIFF", "tif"), ("BMP", "bmp")],
)
def test_other_kinds_are_named_by_index_and_converted_by_make_shards(
    tmp_path: Path, kind: str, extension: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind not in rules.FORMATS:
        pytest.skip(f"PIL has no {kind}")
    content = web_dataset(32, "")
    for i in range(0, 32, 2):
        content[3 * i] = (f"{i:06d}.{extension}", image(i, kind))
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/a.tar", content[:48])
    write_tar(tmp_path / "tars/b.tar", content[48:])
    assert run(tmp_path / "tars", "--index") == 0
    assert (
        "16 samples in 2 shards, 16 labeled, 16 in quarantine, 0 names without an image, to be converted with "
        in (said := capsys.readouterr().out)
    )
    assert f"tools/make_shards.py {tmp_path}/tars DST: 16 .{extension}\n" in said
    assert labels(tmp_path / "tars") == {image(i): str(i % 4) for i in range(1, 32, 2)}
    reasons = quarantine(tmp_path / "tars")
    assert set(reasons) == {f"{'ab'[i >= 16]}.tar: {i:06d}" for i in range(0, 32, 2)}
    assert all(f"is a .{extension}: convert it" in reason for reason in reasons.values())

    assert run(tmp_path / "tars", tmp_path / "dst", "--quality", 100) == 0
    members = members_of(tmp_path / "dst")
    for i in range(32):
        assert members[f"{i:06d}.cls"] == str(i % 4).encode()
        found = np.asarray(Image.open(io.BytesIO(members[f"{i:06d}.jpg"]))).astype(float)
        expected = np.asarray(Image.open(io.BytesIO(image(i, kind if i % 2 == 0 else "JPEG"))).convert("RGB"))
        assert np.abs(found.mean((0, 1)) - expected.mean((0, 1))).max() < 5
    assert len(members) == 96 and quarantine(tmp_path / "dst") == {}


@pytest.mark.parametrize("key", ["img.{:04d}", "a.b/{:02d}.2020.v1", "c{}.0", "photo.{:02d}.IMG"])
def test_dotted_keys_end_at_the_last_dot(
    tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = []
    for i in range(8):
        content += [(f"{key.format(i)}.jpg", image(i)), (f"{key.format(i)}.cls", str(i % 4).encode())]
    (tmp_path / "tars").mkdir()
    tar = write_tar(tmp_path / "tars/a.tar", content)
    expected = {image(i): str(i % 4) for i in range(8)}
    assert run(tmp_path / "tars", "--index") == 0
    assert "8 keys with dots: the extension begins at the last dot" in capsys.readouterr().out
    assert labels(tmp_path / "tars") == expected
    assert quarantine(tmp_path / "tars") == {}
    assert verify([str(tmp_path / "tars")]) == 0
    names = tmp_path / "names.txt"
    names.write_text(key.format(3))
    assert TarSource(tmp_path / "tars").read(listed_ids(TarSource(tmp_path / "tars"), names)[0]) == image(3)
    assert run(tar, tmp_path / "dst") == 0
    assert (
        "8 keys with dots: the extension begins at the last dot; samples are numbered"
        in capsys.readouterr().err
    )
    assert labels(tmp_path / "dst") == expected
    notes = [data for name, data in members_of(tmp_path / "dst").items() if name.endswith(".json")]
    assert {json.loads(note)["original_key"] for note in notes} == {key.format(i) for i in range(8)}


def test_dots_that_may_mean_two_things_are_refused(tmp_path: Path) -> None:
    content = [
        *[
            ("a.jpg", image(0)),
            ("a.seg.png", image(1, "PNG")),
            ("a.cls", b"1"),
        ],  # one image, by the first dot
        *[("b.left.jpg", image(2)), ("b.right.jpg", image(3)), ("b.cls", b"2")],
        *[("c.1.jpg", image(4)), ("c.2.jpg", image(5)), ("c.cls", b"3")],  # whose label is it?
        *[("d.rgb.jpg", image(6)), ("d.cls", b"0")],
        *[("e.left.jpg", image(7)), ("e.right.jpg", image(8))],
    ]
    (tmp_path / "tars").mkdir()
    tar = write_tar(tmp_path / "tars/a.tar", content)
    assert run(tmp_path / "tars", "--index") == run(tar, tmp_path / "dst") == 0
    for folder in (tmp_path / "tars", tmp_path / "dst"):
        assert labels(folder) == {image(0): "1", image(6): "0"}
        reasons = quarantine(folder)
        assert {name[-1] for name in reasons} == {"b", "c", "e"}
        assert all("rename such files without further dots" in reason for reason in reasons.values())


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


_LONG = random.Random(0).randbytes(2_000_000)
_METADATA = {
    "tEXt": b"Comment\0" + _LONG.hex().encode(),
    "zTXt": b"Raw profile type exif\0\0" + zlib.compress(_LONG),
    "iTXt": b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(_LONG),
    "iCCP": b"profile\0\0" + zlib.compress(_LONG),
    "eXIf": b"MM\0*" + _LONG,
}


@pytest.fixture
def laden(tmp_path: Path) -> Path:
    """20 PNGs with 2 MB of metadata each, before or behind the pixels."""
    (tmp_path / "laden").mkdir()
    for i in range(20):
        data = image(i, "PNG")
        kind = list(_METADATA)[i % 5]
        at = 33 if kind == "iCCP" or i < 10 else len(data) - 12
        (tmp_path / f"laden/{i:02d}.png").write_bytes(
            data[:at] + chunk(kind.encode(), _METADATA[kind]) + data[at:]
        )
    return tmp_path / "laden"


def pixels(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (8, 9, 3), np.uint8)


def test_metadata_of_megabytes_does_not_refuse_a_png(laden: Path, tmp_path: Path) -> None:
    """On every path: converted, indexed and verified, decoded by each back end, resident, and in evaluation."""
    source = FolderSource(laden)
    for i in range(20):
        assert np.array_equal(decode(source.read(i)), pixels(i))

    assert (
        run(laden, tmp_path / "dst")
        == run(laden, tmp_path / "raw", "--format", "beton", "--raw-fraction", 1)
        == 0
    )
    assert quarantine(tmp_path / "dst") == quarantine(tmp_path / "raw") == {}
    bare = {rules.to_jpeg(image(i, "PNG")) for i in range(20)}
    assert {data for name, data in members_of(tmp_path / "dst").items() if name.endswith(".jpg")} == bare
    stored = open_source(tmp_path / "raw")
    assert {decode(stored.read(i)).numpy().tobytes() for i in range(20)} == {
        pixels(i).tobytes() for i in range(20)
    }

    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/a.tar", [(path.name, path.read_bytes()) for path in sorted(laden.iterdir())])
    assert run(tmp_path / "tars", "--index") == verify([str(tmp_path / "tars")]) == 0

    config = make_config()
    for opened in (source, TarSource(tmp_path / "tars")):
        assert Resident(opened, config.augment, torch.device("cpu"), torch.float32, 1).broken == {}
        assert sum(len(labels) for _, labels in plain_images(opened, np.arange(20), config)) == 20


def test_dali_decodes_such_pngs_to_the_same_pixels(laden: Path) -> None:
    fn = pytest.importorskip("nvidia.dali.fn", reason="DALI is not installed")
    from nvidia.dali import pipeline_def

    source = FolderSource(laden)
    encoded = [np.frombuffer(source.read(i), np.uint8) for i in range(20)]

    @pipeline_def
    def graph():  # type: ignore[no-untyped-def]
        return fn.decoders.image(fn.external_source(lambda: encoded, batch=True), device="cpu")

    pipeline = graph(batch_size=20, num_threads=1, device_id=None)
    pipeline.build()
    images = pipeline.run()[0]
    assert all(np.array_equal(images.at(i), pixels(i)) for i in range(20))


def test_limits_against_bombs_stay(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    Image.new("1", (20000, 10000)).save(tmp_path / "src/large.png")
    (tmp_path / "src/sound.png").write_bytes(image(0, "PNG"))
    Image.new("P", (8, 8)).save(tmp_path / "src/comment.gif", comment=b"x" * 100_000)
    assert run(tmp_path / "src", tmp_path / "dst") == 0
    assert quarantine(tmp_path / "dst") == {
        "large.png": "10000 x 20000 is above the limit of 178,956,970 pixels"
    }


def class_tar(classes: list[str], count: int = 3) -> dict[str, bytes]:
    """The tar of each class, with images as ImageNet names them."""
    found = {}
    for number, name in enumerate(classes):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as out:
            for i in range(count):
                data = image(10 * number + i)
                info = tarfile.TarInfo(f"{name}_{i}.JPEG")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
        found[f"{name}.tar"] = buffer.getvalue()
    return found


@pytest.mark.parametrize("form", ["tar", "tar.gz", "folder", "inside"])
def test_tar_of_class_tars(tmp_path: Path, form: str) -> None:
    """ImageNet's ILSVRC2012_img_train.tar, or the folder that it unpacks to."""
    classes = ["n01440764", "n01443537", "n02119789"]
    source = tmp_path / "train"
    source.mkdir()
    for name, data in class_tar(classes).items():
        (source / name).write_bytes(data)
    if form != "folder":
        source = tmp_path / f"a.{form}"
        with tarfile.open(source, f"w:{form[4:] if form != 'inside' else ''}") as out:  # type: ignore[call-overload]
            out.add(tmp_path / "train", "train" if form == "inside" else "./")
    before = set(tmp_path.rglob("*"))
    assert run(source, tmp_path / "dst", *(["--inside", "train"] if form == "inside" else [])) == 0
    assert Manifest.load(tmp_path / "dst").classes == classes
    assert labels(tmp_path / "dst") == {image(10 * c + i): classes[c] for c in range(3) for i in range(3)}
    assert quarantine(tmp_path / "dst") == {}
    assert {path for path in tmp_path.rglob("*") if tmp_path / "dst" not in (path, *path.parents)} == before
    notes = [data for name, data in members_of(tmp_path / "dst").items() if name.endswith(".json")]
    assert {"file": "n01440764/n01440764_0.JPEG"} in map(json.loads, notes)


def test_cut_class_tar_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tars = class_tar(["cat", "dog"])
    tars["cat.tar"] = tars["cat.tar"][:1024]
    tar = write_tar(tmp_path / "a.tar", list(tars.items()))
    assert run(tar, tmp_path / "dst") == 2
    assert re.search(r"a\.tar/cat\.tar: offset \d+: cut", capsys.readouterr().err)


def test_numbered_tars_without_labels_are_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "src").mkdir()
    for number in range(3):
        content = [(f"{i:04d}.jpg", image(i)) for i in range(4 * number, 4 * number + 4)]
        write_tar(tmp_path / f"src/{number:05d}.tar", content)
    (tmp_path / "src/00000_stats.json").write_text("{}")
    assert run(tmp_path / "src", tmp_path / "dst") == 0
    error = capsys.readouterr().err
    assert "read as WebDataset: 12 samples, no labels" in error
    assert "left out, beside the tars: 00000_stats.json\n" in error
    assert labels(tmp_path / "dst") == {image(i): "-1" for i in range(12)}


@pytest.mark.parametrize(
    ("heading", "line"),
    [
        (
            "ImageId,PredictionString\n",
            "{stem},{label} 85 1 499 272 {label} 5 6 7 8 ",
        ),  # LOC_val_solution.csv
        ("", "{stem}.JPEG {label}"),
        ("filename\tclass\n", "val/{stem}.JPEG\t{label}"),
        ("", '"{stem}.JPEG","{label}",train'),
    ],
)
@pytest.mark.parametrize("names", [["n01440764", "n02119789"], ["7", "3"], ["cat, tabby", "dog"]])
def test_flat_folder_with_a_list_of_labels(tmp_path: Path, heading: str, line: str, names: list[str]) -> None:
    if "85" in line:  # a class name of ImageNet's list is one word
        names = [name.split(",")[0] for name in names]
    (tmp_path / "val").mkdir()
    stems = [f"ILSVRC2012_val_{i:08d}" for i in range(8)]
    for i, stem in enumerate(stems):
        (tmp_path / f"val/{stem}.JPEG").write_bytes(image(i))
    path = tmp_path / "labels.txt"
    path.write_text(
        heading + "".join(line.format(stem=s, label=names[i % 2]) + "\n" for i, s in enumerate(stems[:7]))
    )
    source = tmp_path / ("val" if "val/" not in line else "")
    if source == tmp_path:
        source = tmp_path / "a.tar"
        with tarfile.open(source, "w") as out:
            out.add(tmp_path / "val", "val")
    assert run(source, tmp_path / "dst", "--labels", path) == 0
    assert labels(tmp_path / "dst") == {image(i): names[i % 2] for i in range(7)}
    assert Manifest.load(tmp_path / "dst").classes == (None if names[0] == "7" else sorted(names))
    ((name, reason),) = quarantine(tmp_path / "dst").items()
    assert name.endswith("val_00000007.JPEG") and reason == f"has no label in {path}"


def test_mistakes_in_a_list_of_labels_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/0.jpg", "b/0.jpg", "b/1.jpg"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes(image(0))
    write_tar(tmp_path / "web.tar", web_dataset(4))
    for text, message in [
        ("490\n361\n", "line 1: '490' is not a name and a label"),
        ("0.jpg 1\n", "line 1: several files are named '0.jpg': add their folders"),
        ("1.jpg 1\nb/1.jpg 2\n", "line 2: 'b/1.jpg' has another label above"),
        ("x.jpg 1\n", "names none of the 3 files, for example a/0.jpg"),
        ("", "names none of the 3 files"),
    ]:
        (tmp_path / "labels").write_text(text)
        assert run(tmp_path / "src", tmp_path / "dst", "--labels", tmp_path / "labels") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert run(tmp_path / "web.tar", tmp_path / "dst", "--labels", tmp_path / "labels") == 2
    assert "which has labels of its own" in capsys.readouterr().err
    (tmp_path / "labels").write_text("name label\n1.jpg 1\na/0.jpg cat\nx.jpg 1\ny.jpg 2\n")
    assert run(tmp_path / "src", tmp_path / "dst", "--labels", tmp_path / "labels") == 0
    assert "labels has 2 names that are not of a file: x.jpg, y.jpg" in capsys.readouterr().err
    assert quarantine(tmp_path / "dst") == {
        "a/0.jpg": "its label is 'cat', not an integer",
        "b/0.jpg": f"has no label in {tmp_path}/labels",
    }


def test_read_only_tars_are_indexed_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/a.tar", web_dataset(8))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "tars" and access(path, mode))
    assert run(tmp_path / "tars", "--index") == 2
    assert "is read-only: --manifest FOLDER writes" in capsys.readouterr().err
    for _ in range(2):  # the second time beside links that are there
        assert run(tmp_path / "tars", "--index", "--manifest", tmp_path / "here/index") == 0
        assert [path.name for path in (tmp_path / "tars").iterdir()] == ["a.tar"]
        assert labels(tmp_path / "here/index") == {image(i): str(i % 4) for i in range(8)}
        assert verify([str(tmp_path / "here/index")]) == 0
        (tmp_path / "here/index/manifest.json").unlink()


def test_lists_in_messages_fit_a_screen() -> None:
    assert shown([]) == ""
    assert shown(["a", 2, Path("c")]) == "a, 2, c"
    assert shown(map(str, range(5)), "; ") == "0; 1; 2; 3; 4"
    assert shown(f"n{i}" for i in range(26_000)) == "n0, n1, n2, n3, n4, and 25,995 more"
    long = shown(["x" * 60 + "y" * 60, "a\nb"])
    assert long == "x" * 48 + "..." + "y" * 49 + r", a\nb"


def test_a_thousand_names_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flat").mkdir()
    for i in range(1000):
        (tmp_path / f"flat/{i:04d}.txt").write_text("no image")
        (tmp_path / f"deep/{i:04d}/b/c").mkdir(parents=True)
        (tmp_path / f"deep/{i:04d}/b/c/0.jpg").write_bytes(image(0))
    with pytest.raises(ValueError, match=r"1,000 unusable files \(0000\.txt: .*; and 995 more\)") as caught:
        FolderSource(tmp_path / "flat")
    assert len(str(caught.value)) < 1000
    many = [member for i in range(1000) for member in [(f"a{i}.jpg", image(i)), (f"a{i}.k{i}", b"")]]
    many += [("z.jpg", image(0)), ("z.cls", b"1"), *[("z.png", b"")] * 1000]
    assert run(write_tar(tmp_path / "a.tar", many), tmp_path / "dst") == 0
    assert run(tmp_path / "deep", tmp_path / "no") == 2
    error = capsys.readouterr().err
    assert "(0000, 0001, 0002, 0003, 0004, and 995 more)" in error
    assert (
        "left out: members .k0, members .k1, members .k10, members .k100, members .k101, and 995 more"
        in error
    )
    assert max(map(len, error.splitlines())) < 400
    assert len(quarantine(tmp_path / "dst")["z"]) < 200


def test_tars_a_level_too_deep_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "val"):
        (tmp_path / "web" / name).mkdir(parents=True)
        write_tar(tmp_path / f"web/{name}/a.tar", web_dataset(4))
        (tmp_path / "tars").mkdir(exist_ok=True)
        write_tar(tmp_path / f"tars/{name}.tar", [(f"c{i}/{i}.jpg", image(i)) for i in range(4)])
    assert run(tmp_path / "web", tmp_path / "dst") == 2
    assert "has its tars in folders (train, val): name one with --inside" in capsys.readouterr().err
    assert run(tmp_path / "web", tmp_path / "dst", "--inside", "val") == 0
    assert labels(tmp_path / "dst") == {image(i): str(i) for i in range(4)}
    assert run(tmp_path / "tars", tmp_path / "out") == 2
    assert "(train, val): name one of them as SRC" in capsys.readouterr().err
