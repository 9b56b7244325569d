"""make_shards from the outside: its inputs and outputs, its refusals, and the state that a kill leaves."""

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_index import write_tar

from byolt.pipelines.convert import make as making
from byolt.pipelines.convert import plan as planning
from byolt.pipelines.convert import shard_writer as writer
from byolt.pipelines.convert.from_files import FileReader, list_files
from byolt.pipelines.formats.encoded import inspect
from byolt.pipelines.formats.folder import FolderSource
from byolt.pipelines.manifest import Manifest
from byolt.pipelines.sources import TarSource
from byolt.tools import make_shards
from byolt.tools.verify_shards import main as verify

ROOT = Path(__file__).resolve().parent.parent


def noise(height: int, width: int, seed: int = 0, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[..., 0])


def write_images(folder: Path, count: int = 20, side: int = 16) -> Path:
    for i in range(count):
        path = folder / f"c{i % 2}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(side + i % 5, side, i).save(path)
    return folder


def jpeg(seed: int = 0, height: int = 8) -> bytes:
    buffer = io.BytesIO()
    noise(height, 9, seed).save(buffer, "JPEG")
    return buffer.getvalue()


def half_done(source: Path, dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(making, "commit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(source, dst)


def run(*args: object) -> int:
    return make_shards.main([*map(str, args), "--workers", "1"])


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def samples(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Name of the input file -> (bytes, label), read by tarfile."""
    found: dict[str, tuple[bytes, int]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as opened:
            members = {m.name: opened.extractfile(m).read() for m in opened}  # type: ignore[union-attr]
        for name, data in members.items():
            if name.endswith(".jpg"):
                meta = json.loads(members[name.replace(".jpg", ".json")])
                found[meta["file"]] = data, int(members.get(name.replace(".jpg", ".cls"), b"-1"))
    return found


def quarantine(folder: Path) -> dict[str, str]:
    lines = (folder / "quarantine.jsonl").read_text().splitlines()
    return {row["file"]: row["reason"] for row in map(json.loads, lines)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_images(tmp_path / "src")


def test_passes_bytes_and_labels_in_a_shuffled_order(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "dst") == 0
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*.jpg"))
    found = samples(tmp_path / "dst")
    assert {name: (data, label) for name, (data, label) in found.items()} == {
        name: ((source / name).read_bytes(), int(name[1])) for name in names
    }
    assert list(found) != names
    assert run(source, tmp_path / "other", "--seed", 1) == 0
    assert list(samples(tmp_path / "other")) not in (names, list(found))
    manifest = Manifest.load(tmp_path / "dst")
    assert manifest.classes == ["c0", "c1"]
    assert sorted(path.name for path in (tmp_path / "dst").iterdir()) == [
        "manifest.json",
        "quarantine.jsonl",
        "samples.npy",
        "shard-000000.tar",
    ]


def test_folder_tar_xz_and_zip_give_the_same_shards(source: Path, tmp_path: Path) -> None:
    for mode in ("tar", "tar.xz", "tar.gz"):
        with tarfile.open(tmp_path / f"a.{mode}", f"w:{mode[4:]}") as out:  # type: ignore[call-overload]
            out.add(source, "deep/src")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in source.rglob("*.jpg"):
            archive.write(path, f"deep/src/{path.relative_to(source)}")
    assert run(source, tmp_path / "expected") == 0
    for name in ("a.tar", "a.tar.xz", "a.tar.gz", "a.zip"):
        out = tmp_path / f"out-{name}"
        assert run(tmp_path / name, out, "--inside", "deep/src") == 0
        assert hashes(out) == hashes(tmp_path / "expected")


def test_number_of_processes_does_not_change_the_result(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_chunks", lambda entries, size: _chunks_of(entries, 6))
    assert run(source, tmp_path / "one") == 0
    assert make_shards.main([str(source), str(tmp_path / "two"), "--workers", "2"]) == 0
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert len(Manifest.load(tmp_path / "two").shards) == 4


def _chunks_of(entries: list, number: int) -> list:
    numbered = list(enumerate(entries))
    return [numbered[i : i + number] for i in range(0, len(numbered), number)]


def test_rules_for_odd_images(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    gray16 = np.arange(24 * 40, dtype=np.uint16).reshape(24, 40) * 68
    Image.fromarray(gray16).save(src / "sixteen.png")
    color = Image.new("RGBA", (40, 24), (200, 30, 60, 0))  # alpha 0 everywhere: dropped, the color stays
    color.save(src / "alpha.webp", lossless=True, exact=True)
    color.convert("RGB").save(src / "png-named.jpg", "PNG")
    color.convert("RGB").save(src / "a.bmp")
    color.convert("RGB").save(src / "a.tiff")
    Image.new("CMYK", (40, 24), (0, 255, 255, 0)).save(src / "cmyk.jpg", quality=95)
    Image.new("RGB", (40, 24), (0, 255, 0)).save(
        src / "animated.gif", save_all=True, append_images=[Image.new("RGB", (40, 24), (255, 0, 0))]
    )
    noise(24, 40, channels=1).save(src / "gray.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(24, 40).save(src / "rotated.jpg", exif=exif)
    (src / "jpeg-named.png").write_bytes((src / "gray.jpg").read_bytes())
    assert run(src, tmp_path / "dst") == 0
    assert quarantine(tmp_path / "dst") == {}
    found = samples(tmp_path / "dst")
    assert len(found) == 10
    for name, (data, label) in found.items():
        assert (*inspect(data)[:3], label) == ("jpeg", 24, 40, -1), name
    for name in ("gray.jpg", "rotated.jpg", "jpeg-named.png"):
        assert found[name][0] == (src / name).read_bytes()

    def pixels(name: str) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(found[name][0]))).astype(float)

    assert np.abs(pixels("sixteen.png") - gray16 / 257).mean() < 1.5
    for name in ("alpha.webp", "png-named.jpg", "a.bmp", "a.tiff"):
        assert np.abs(pixels(name) - (200, 30, 60)).max() <= 3, name
    assert np.abs(pixels("cmyk.jpg") - (255, 0, 0)).max() <= 3
    assert np.abs(pixels("animated.gif") - (0, 255, 0)).max() <= 3


def test_max_size_reencodes_only_what_is_larger(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    noise(100, 50).save(src / "large.jpg")
    noise(64, 20).save(src / "fits.jpg")
    assert run(src, tmp_path / "dst", "--max-size", 64, "--quality", 80) == 0
    found = samples(tmp_path / "dst")
    assert found["fits.jpg"][0] == (src / "fits.jpg").read_bytes()
    assert inspect(found["large.jpg"][0])[1:3] == (64, 32)


def write_bad(src: Path) -> None:
    large = io.BytesIO()
    noise(100, 100).save(large, "JPEG")
    half = large.getvalue()[: len(large.getvalue()) // 2]
    (src / "c0/empty.jpg").write_bytes(b"")
    (src / "c0/text.jpg").write_text("no image")
    (src / "c0/cut.jpg").write_bytes(half)
    (src / "c0/cut2.jpg").write_bytes(half + b"\xff\xd9")
    (src / "c1/link.jpg").symlink_to(src / "nowhere")
    os.mkfifo(src / "c1/fifo.jpg")
    Image.new("1", (20000, 10000)).save(src / "c1/bomb.png")
    (src / "readme.txt").write_text("beside")
    (src / "c0/.hidden").write_text("ignored")
    (src / "c1/good.jpg").symlink_to(src / "c0/0000.jpg")


def test_unusable_files_go_to_quarantine(source: Path, tmp_path: Path) -> None:
    write_bad(source)
    assert run(source, tmp_path / "dst") == 0
    reasons = quarantine(tmp_path / "dst")
    expected = {
        "c0/empty.jpg": "empty",
        "c0/text.jpg": "not an image",
        "c0/cut.jpg": "cut short",
        "c0/cut2.jpg": "Corrupt JPEG data",
        "c1/link.jpg": "broken link",
        "c1/fifo.jpg": "not a regular file",
        "c1/bomb.png": "10000 x 20000 is above the limit",
        "readme.txt": "beside the class folders",
    }
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in reasons[name]
    assert len(samples(tmp_path / "dst")) == 21
    assert verify([str(tmp_path / "dst")]) == 0


def test_strict_makes_them_fatal(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "c0/text.jpg").write_text("no image")
    assert run(source, tmp_path / "dst", "--strict") == 1
    assert "c0/text.jpg: not an image" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "dst").iterdir()] == [".make_shards"]


def test_archive_members_never_leave_it(source: Path, tmp_path: Path) -> None:
    data = (source / "c0/0000.jpg").read_bytes()
    write_tar(tmp_path / "a.tar", [(name, data) for name in ("../evil.jpg", "/evil.jpg", "c/good.jpg")])
    with tarfile.open(tmp_path / "a.tar", "a") as out:
        link = tarfile.TarInfo("c/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        out.addfile(link)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../evil.jpg", data)
        archive.writestr("c/good.jpg", data)
    before = set(tmp_path.rglob("*"))
    for name in ("a.tar", "a.zip"):
        assert run(tmp_path / name, tmp_path / "dst") == 0
        assert list(samples(tmp_path / "dst")) == ["c/good.jpg"]
        assert quarantine(tmp_path / "dst")["../evil.jpg"] == "unsafe name"
        shutil.rmtree(tmp_path / "dst")
    assert set(tmp_path.rglob("*")) == before


def test_split_is_disjoint_and_complete(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "dst", "--split", "train=.9,val=.1") == 0
    train, val = samples(tmp_path / "dst/train"), samples(tmp_path / "dst/val")
    assert (len(train), len(val)) == (18, 2)
    assert not train.keys() & val.keys()
    for name in ("train", "val"):
        assert Manifest.load(tmp_path / "dst" / name).classes == ["c0", "c1"]
        assert Manifest.load(tmp_path / "dst" / name).shards[0].name == f"{name}-000000.tar"
        assert verify([str(tmp_path / "dst" / name)]) == 0


def test_killed_and_started_again_is_byte_identical(tmp_path: Path) -> None:
    source = write_images(tmp_path / "src", 60, side=400)  # 60 images, 9 shards
    (source / "c0/text.jpg").write_text("no image")
    command = [sys.executable, "-m", "byolt.tools.make_shards", str(source), str(tmp_path / "dst")]
    command += ["--shard-size", "1", "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    notes = tmp_path / "dst/.make_shards"
    while len(list(notes.glob("shard-*.json"))) < 2:
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "dst").glob("*.tar")}
    assert not (tmp_path / "dst/manifest.json").exists()
    done = {path.stem for path in notes.glob("shard-*.json")}
    (tmp_path / "dst/.shard-000099.tar.1.byolt-tmp").write_bytes(b"left over")
    assert run(source, tmp_path / "dst", "--shard-size", 1) == 0
    assert all((tmp_path / f"dst/{name}.tar").stat().st_mtime_ns == kept[f"{name}.tar"] for name in done)
    assert run(source, tmp_path / "straight", "--shard-size", 1) == 0
    assert hashes(tmp_path / "dst") == hashes(tmp_path / "straight")
    assert len(Manifest.load(tmp_path / "dst").shards) > len(done) >= 2


def test_finished_shard_that_was_cut_is_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_done(source, tmp_path / "dst", monkeypatch)
    os.truncate(tmp_path / "dst/shard-000000.tar", 1000)
    assert run(source, tmp_path / "dst") == 0
    assert verify([str(tmp_path / "dst")]) == 0


# Seconds: while the workers start, and while they work.
@pytest.mark.parametrize(
    ("workers", "after"),
    [
        (1, 0.15),
        (2, 0.0),
        pytest.param(1, 0.0, marks=pytest.mark.slow),
        pytest.param(2, 0.15, marks=pytest.mark.slow),
    ],
)
def test_interrupt_is_one_line(tmp_path: Path, workers: int, after: float) -> None:
    source = write_images(tmp_path / "src", 60, side=400)
    for i in range(1500):
        (source / f"c0/link{i}.jpg").symlink_to(source / "c0/0000.jpg")
    # Where SIGINT is ignored, as in a shell's background, a child inherits that and Python leaves it so.
    start = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start += "runpy.run_module('byolt.tools.make_shards', run_name='__main__')"
    command = [sys.executable, "-c", start, str(source), str(tmp_path / "dst")]
    command += ["--shard-size", "1", "--workers", str(workers)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "dst/.make_shards/settings.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(0.05 + after)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert error == "make_shards: interrupted; start it again to continue\n"
    assert not list(tmp_path.rglob("*.byolt-tmp"))


def test_full_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run(source, tmp_path / "dst") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "dst").rglob("*") if path.is_file()]
    assert run(source, tmp_path / "dst") == 0


def test_other_settings_or_source_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    half_done(source, tmp_path / "dst", monkeypatch)
    assert run(source, tmp_path / "dst", "--seed", 1) == 2
    assert "unfinished and has other settings: seed was 0, now 1" in capsys.readouterr().err
    assert run(source, tmp_path / "dst") == 0
    before = hashes(tmp_path / "dst")
    capsys.readouterr()
    assert run(source, tmp_path / "dst") == 0
    assert "already done" in capsys.readouterr().out
    assert run(source, tmp_path / "dst", "--max-size", 9) == 2
    assert "finished data set: max_size was 0, now 9" in capsys.readouterr().err
    (source / "c0/0000.jpg").unlink()
    assert run(source, tmp_path / "dst") == 2
    assert "source_files was 20, now 19" in capsys.readouterr().err
    assert hashes(tmp_path / "dst") == before


def test_user_mistakes_are_one_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("a")
    (tmp_path / "file").write_text("a file that is not a tar" * 100)
    (tmp_path / "deep").mkdir()
    shutil.copytree(source, tmp_path / "deep/train")
    for args, code, message in [
        ((tmp_path / "nowhere", "dst"), 2, "nowhere does not exist"),
        ((tmp_path / "empty", "dst"), 2, "holds no files"),
        ((tmp_path / "texts", "dst"), 2, f"SRC {tmp_path}/texts: no file is an image, see"),
        ((tmp_path / "file", "dst2"), 2, "not an uncompressed tar"),
        ((tmp_path / "deep", "dst2"), 2, r"(train): name one of them with --inside"),
        ((source, "file/dst"), 1, "Not a directory"),
        ((source, "src/dst"), 2, "or inside of it"),
        ((source, "dst2", "--split", "train=.9,val=.2"), 2, "sum to 1"),
        ((source, "dst2", "--split", "train=.99,val=.01"), 2, "no image is left"),
        ((source, "dst2", "--inside", "nothing"), 2, "is not a folder"),
        ((source, "--index"), 2, "holds no .tar"),
    ]:
        rest = [args[1] if str(args[1]).startswith("--") else tmp_path / args[1], *args[2:]]
        assert run(args[0], *rest) == code, args
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1, error
    assert not list((tmp_path / "dst2").glob("*"))
    assert not list((tmp_path / "dst").glob("*.tar"))


def test_index_of_tars_made_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        members = []
        for i in range(3):
            members += [(f"{number}{i}.jpeg", jpeg(i, 8 + i)), (f"{number}{i}.txt", b"caption")]
        write_tar(tmp_path / f"part{number}.tar", members)
    before = hashes(tmp_path)
    assert run(tmp_path, "--index") == 0
    assert "6 samples in 2 shards, 0 labeled" in capsys.readouterr().out
    source = TarSource(tmp_path)
    assert source.heights.tolist() == [8, 9, 10] * 2
    assert source.labels.tolist() == [-1] * 6
    assert {**hashes(tmp_path), **before} == hashes(tmp_path)
    assert verify([str(tmp_path)]) == 0
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "quarantine.jsonl").unlink()
    shard = tmp_path / "part1.tar"
    shard.write_bytes(shard.read_bytes()[:2048])
    assert run(tmp_path, "--index") == 2
    assert "part1.tar: offset" in capsys.readouterr().err
    assert not (tmp_path / "manifest.json").exists()


def test_webdataset_and_dali_read_the_same_samples(source: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def

    assert run(source, tmp_path / "dst") == 0
    ours = TarSource(tmp_path / "dst")
    path = str(tmp_path / "dst/shard-000000.tar")
    expected = [(ours.read(i), int(ours.labels[i])) for i in range(20)]
    theirs = webdataset.WebDataset(path, shardshuffle=False)
    assert [(sample["jpg"], int(sample["cls"])) for sample in theirs] == expected

    @pipeline_def
    def graph():  # type: ignore[no-untyped-def]
        return tuple(fn.readers.webdataset(paths=[path], ext=["jpg", "cls"]))

    pipeline = graph(batch_size=20, num_threads=1, device_id=None)
    pipeline.build()
    images, labels = (output.as_cpu() for output in pipeline.run())
    read = [(images.at(i).tobytes(), int(labels.at(i).tobytes())) for i in range(20)]
    assert read == expected


def test_real_photographs(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "imagenet-sample"
    assert run(source, tmp_path / "dst", "--shard-size", 8) == 0
    found = samples(tmp_path / "dst")
    assert len(found) == 250
    assert all(data == (source / name).read_bytes() for name, (data, _) in found.items())
    assert verify([str(tmp_path / "dst"), "--workers", "2"]) == 0


def test_files_of_the_user_are_left_alone(tmp_path: Path) -> None:
    source, dst = write_images(tmp_path / "src"), tmp_path / "dst"
    dst.mkdir()
    (dst / "thesis.tmp").write_text("years of work")
    assert run(source, dst) == 0
    assert (dst / "thesis.tmp").read_text() == "years of work"


def test_split_named_like_the_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_images(tmp_path / "d/train")
    before = hashes(tmp_path)
    assert run(source, tmp_path / "d", "--split", "train=.5,val=.5") == 2
    assert "or inside of it" in capsys.readouterr().err
    assert hashes(tmp_path) == before


def test_strict_holds_for_what_was_done_before(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_images(tmp_path / "src")
    (source / "c0/bad.jpg").write_text("no image")
    assert run(source, tmp_path / "dst") == 0
    assert run(source, tmp_path / "dst", "--strict") == 1
    assert "bad.jpg" in capsys.readouterr().err


def test_done_is_not_claimed_of_a_missing_shard(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = write_images(tmp_path / "src")
    assert run(source, tmp_path / "dst") == 0
    (tmp_path / "dst/shard-000000.tar").unlink()
    assert run(source, tmp_path / "dst") == 2
    assert "shard-000000.tar" in capsys.readouterr().err


def test_tar_that_ends_in_a_zip_is_a_tar(tmp_path: Path) -> None:
    source = write_images(tmp_path / "src")
    with zipfile.ZipFile(source / "c1/zzz.zip", "w") as inner:
        inner.write(source / "c0/0000.jpg", "x/0.jpg")
    with tarfile.open(tmp_path / "src.tar", "w") as out:
        out.add(source, ".")
    assert run(tmp_path / "src.tar", tmp_path / "dst") == 0
    assert len(Manifest.load(tmp_path / "dst").samples) == 20


def test_no_worker_outlives_a_killed_run(tmp_path: Path) -> None:
    source = write_images(tmp_path / "src", 60, side=400)
    command = [sys.executable, "-m", "byolt.tools.make_shards", str(source), str(tmp_path / "dst")]
    command += ["--shard-size", "1", "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    while not list((tmp_path / "dst/.make_shards").glob("shard-*.json")):
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=30)  # ends when the last process that could write to stderr has ended


def test_mistyped_source_leaves_nothing(tmp_path: Path) -> None:
    assert run(tmp_path / "nosuch", tmp_path / "dst") == 2
    assert not (tmp_path / "dst").exists()
    (tmp_path / "empty/c").mkdir(parents=True)
    (tmp_path / "empty/c/a.txt").write_text("no image")
    assert run(tmp_path / "empty", tmp_path / "dst") == 2
    assert run(write_images(tmp_path / "src"), tmp_path / "dst") == 0


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.bz2", "a.tar.xz"])
def test_damaged_archive_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with tarfile.open(tmp_path / name, f"w:{name.rpartition('.')[2]}") as out:
        out.add(write_images(tmp_path / "src"), "src")
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 0xFF
    data[len(data) // 2 + 1] ^= 0xFF
    (tmp_path / name).write_bytes(data)
    assert run(tmp_path / name, tmp_path / "dst", "--inside", "src") == 2
    assert f"{name} is damaged" in capsys.readouterr().err


def test_index_leaves_out_what_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = ("bad.jpg", jpeg()[:-2])
    write_tar(tmp_path / "a.tar", [("README.txt", b"hi"), ("a.jpg", jpeg()), bad, ("c.webp", b"RIFF")])
    assert run(tmp_path, "--index", "--strict") == 1
    assert "a.tar: bad: offset" in capsys.readouterr().err
    assert run(tmp_path, "--index") == 0
    assert "1 sample in 1 shard, 0 labeled, 2 in quarantine, 1 name without" in capsys.readouterr().out
    assert "cut short" in quarantine(tmp_path)["a.tar: bad"]
    assert TarSource(tmp_path).read(0) == jpeg()
    assert verify([str(tmp_path)]) == 0


def test_index_without_any_sample_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [("img.left.jpg", jpeg()), ("img.right.jpg", jpeg())])
    assert run(tmp_path, "--index") == 2
    assert "rename such files without further dots" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_source_that_changed_at_the_same_size_is_not_continued_with(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    half_done(source, tmp_path / "dst", monkeypatch)
    path = source / "c0/0000.jpg"
    path.write_bytes(path.read_bytes())
    os.utime(path, (1, 1))
    assert run(source, tmp_path / "dst") == 2
    assert "unfinished and has other settings: source_modified was" in capsys.readouterr().err
    assert run(source, tmp_path / "new") == 0
    assert "source_modified" not in Manifest.load(tmp_path / "new").settings


def test_strict_holds_for_shards_of_a_laxer_start(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "c0/bad.jpg").write_text("no image")
    half_done(source, tmp_path / "dst", monkeypatch)
    assert run(source, tmp_path / "dst", "--strict") == 1
    assert "c0/bad.jpg: not an image" in capsys.readouterr().err
    assert not (tmp_path / "dst/manifest.json").exists()
    assert run(source, tmp_path / "dst") == 0


def test_file_that_changes_while_it_is_read_is_refused(source: Path, tmp_path: Path) -> None:
    listing = list_files(source, "", tmp_path)
    (source / listing.images[0].name).write_bytes(jpeg())
    with pytest.raises(ValueError, match=r"has \d+ bytes, and had [\d,]+ when SRC was listed"):
        FileReader(listing.path).read(listing.images[0])


def test_folder_whose_files_cannot_be_looked_at(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    def denied(path: Path, **options: bool) -> os.stat_result:
        if path.name == "0001.jpg":  # as in a folder of mode r--
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", denied)
        assert run(source, tmp_path / "dst") == 0
    assert quarantine(tmp_path / "dst") == {"c1/0001.jpg": "Permission denied"}


@pytest.mark.parametrize("inside", ["../other", "a/../..", ".."])
def test_inside_cannot_leave_the_source(
    source: Path, tmp_path: Path, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, tmp_path / "dst", "--inside", inside) == 2
    assert f"--inside {inside} leads out of SRC" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


def test_names_of_archives_are_tidied_and_hard_links_followed(tmp_path: Path) -> None:
    members = [("./top/./a/0.jpg", jpeg(0)), ("top//b/1.jpg", jpeg(1)), ("top/b/bad.jpg", b"x")]
    write_tar(tmp_path / "a.tar", members)
    with tarfile.open(tmp_path / "a.tar", "a") as out:
        for name, target in (("top/b/2.jpg", "top/./a/0.jpg"), ("top/b/3.jpg", "top/nowhere.jpg")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, target
            out.addfile(link)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in members:
            archive.writestr(name, data)
    for name in ("a.tar", "a.zip"):
        assert run(tmp_path / name, tmp_path / f"{name}-out", "--inside", "./top/") == 0
    expected = {"a/0.jpg": (jpeg(0), 0), "b/1.jpg": (jpeg(1), 1)}
    assert samples(tmp_path / "a.zip-out") == expected
    assert samples(tmp_path / "a.tar-out") == {**expected, "b/2.jpg": (jpeg(0), 1)}
    assert quarantine(tmp_path / "a.zip-out").keys() == {"b/bad.jpg"}
    assert quarantine(tmp_path / "a.tar-out")["b/3.jpg"] == "a hard link, not a file"


@pytest.mark.parametrize("create_system", [0, 3])  # Windows; Unix, as another zip program may state
def test_backslashes_in_the_names_of_a_zip_are_separators(create_system: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in [
            ("set\\a\\", b""),
            ("set\\a\\0.jpg", jpeg(0)),
            ("set\\b\\1.jpg", jpeg(1)),
            ("..\\2.jpg", b"x"),
        ]:
            info = zipfile.ZipInfo(name)
            info.create_system = create_system
            archive.writestr(info, data)
    assert run(tmp_path / "a.zip", tmp_path / "dst", "--inside", "set") == 0
    assert samples(tmp_path / "dst") == {"a/0.jpg": (jpeg(0), 0), "b/1.jpg": (jpeg(1), 1)}
    assert quarantine(tmp_path / "dst") == {}
    assert run(tmp_path / "a.zip", tmp_path / "all", "--inside", "") == 2  # classes are a level further down
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "dst"]


def test_backslash_beside_slashes_is_part_of_a_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/x\\0.jpg", jpeg(0))
        archive.writestr("b/1.jpg", jpeg(1))
    assert run(tmp_path / "a.zip", tmp_path / "dst") == 0
    assert samples(tmp_path / "dst").keys() == {"a/x\\0.jpg", "b/1.jpg"}


def test_hidden_and_system_files_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_images(tmp_path / "src", 4)
    for name in ("@eaDir/0.jpg", "__MACOSX/._0.jpg", "lost+found/0.jpg", ".Trash/0.jpg"):
        (source / name).parent.mkdir()
        (source / name).write_bytes(jpeg())
    for name in ("@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", ".thumbnails/0.jpg", ".ipynb_checkpoints/0.jpg"):
        (source / "c0" / name).parent.mkdir(parents=True)
        (source / "c0" / name).write_bytes(jpeg())
    (source / "c1/._0001.jpg").write_bytes(jpeg())
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        out.add(source, "top")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in source.rglob("*.jpg"):
            if path.is_file():
                archive.write(path, f"top/{path.relative_to(source)}")
    for path, options in (
        (source, ()),
        (tmp_path / "a.tar", ("--inside", "top")),
        (tmp_path / "a.zip", ("--inside", "top")),
    ):
        assert run(path, tmp_path / f"{path.name}-out", *options) == 0
        error = capsys.readouterr().err
        assert (
            error == "make_shards: note: left out: 8 hidden or system files and folders, for example .Trash\n"
        )
        assert Manifest.load(tmp_path / f"{path.name}-out").classes == ["c0", "c1"]
        assert len(samples(tmp_path / f"{path.name}-out")) == 4
        assert quarantine(tmp_path / f"{path.name}-out") == {}
    assert len(FolderSource(source)) == 4


def test_entry_of_a_zip_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.jpg", jpeg())
        with archive.open("a/bomb.png", "w") as file:
            for _ in range(257):
                file.write(bytes(1 << 20))
    assert run(tmp_path / "a.zip", tmp_path / "dst") == 0
    assert "269,484,032 bytes" in quarantine(tmp_path / "dst")["a/bomb.png"]


def test_directory_of_a_zip_is_parsed_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in source.rglob("*.jpg"):
            archive.write(path, path.relative_to(source))
    opened = []

    class Counted(zipfile.ZipFile):
        def __init__(self, file: Any) -> None:
            super().__init__(file)
            opened.append(len(self.infolist()))

    monkeypatch.setattr(zipfile, "ZipFile", Counted)
    monkeypatch.setattr(planning, "_chunks", lambda entries, size: _chunks_of(entries, 5))
    assert run(tmp_path / "a.zip", tmp_path / "dst") == 0
    assert len(Manifest.load(tmp_path / "dst").shards) == 4
    assert sorted(opened) == [0] * 20 + [20]  # to list it; reading a member takes its entry alone


def test_zip_of_an_unknown_version_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/0.jpg", jpeg())
    data = bytearray((tmp_path / "a.zip").read_bytes())
    at = data.rfind(b"PK\1\2")
    data[at + 6] = 99
    (tmp_path / "a.zip").write_bytes(data)
    assert run(tmp_path / "a.zip", tmp_path / "dst") == 2
    assert "a.zip is a damaged or unusual zip" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


def test_sources_that_would_never_end_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        assert run(path, tmp_path / "dst") == 2
        assert "neither a folder nor a regular file" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


def test_want_of_memory_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(writer, "to_jpeg", exhausted)
        assert run(source, tmp_path / "dst") == 1
    assert "out of memory: use fewer --workers" in capsys.readouterr().err
    assert run(source, tmp_path / "dst") == 0


def test_sample_that_training_would_refuse_goes_to_quarantine(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "c0/bad.jpg").write_text("no image")
    monkeypatch.setattr(writer, "to_jpeg", lambda data, **_: data)  # as with a --max-pixels above training's
    assert run(source, tmp_path / "dst") == 0
    assert quarantine(tmp_path / "dst") == {"c0/bad.jpg": "not a JPEG or PNG"}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            BlockingIOError(errno.EAGAIN, "x"),
            2,
            "dst is in use by a process that has not named itself yet: wait",
        ),
        (OSError(errno.ENOLCK, "No locks available"), 0, "lock: this file system has no locks; use DST"),
        (OSError(errno.EIO, "broken"), 1, "dst/.make_shards/lock: cannot be locked: broken"),
    ],
)
def test_lock_says_what_is_wrong(
    source: Path,
    tmp_path: Path,
    error: OSError,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert run(source, tmp_path / "dst") == code
    assert message in capsys.readouterr().err


def test_shares_that_sum_to_almost_one_lose_no_image(source: Path, tmp_path: Path) -> None:
    listing = list_files(source, "", tmp_path)
    images = listing.images * 30_000  # 600,000: a millionth of it rounds to one
    options = planning.ConversionOptions(source, tmp_path / "dst", split="a=.5,b=.499999")
    tasks = planning.plan(listing._replace(images=images), options)
    assert sum(len(task.images) for part in tasks.values() for task in part) == len(images)
