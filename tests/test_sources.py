"""Sources: reading returns the stored bytes, and damage is an error that names the place."""

import errno
import io
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from byolt.pipelines.formats.encoded import inspect
from byolt.pipelines.formats.folder import FolderSource, label_names, list_folder
from byolt.pipelines.manifest import MANIFEST
from byolt.pipelines.sources import (
    ParallelReader,
    SyntheticSource,
    TarSource,
    check_paths,
    open_source,
    open_split,
)
from byolt.tools.make_shards import main as make_shards


def write_images(folder: Path, count: int = 12) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    written = {}
    for i in range(count):
        path = folder / f"class{i % 3}" / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8 + i, 20, 3), np.uint8)).save(path)
        written[str(path.relative_to(folder))] = path.read_bytes()
    return written


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def shards(images: Path, tmp_path: Path) -> Path:
    assert make_shards([str(images), str(tmp_path / "shards"), "--workers", "1"]) == 0
    return tmp_path / "shards"


def test_folder_and_tar_hold_the_same(images: Path, shards: Path) -> None:
    folder, tar = open_source(images), open_source(str(shards))
    assert isinstance(folder, FolderSource)
    assert isinstance(tar, TarSource)
    assert len(folder) == len(tar) == 12
    assert folder.classes == tar.classes == ["class0", "class1", "class2"]

    def rows(source: FolderSource | TarSource) -> list[tuple[bytes, list[int]]]:
        numbers = np.stack([source.labels, source.heights, source.widths], axis=1)
        return sorted((source.read(i), numbers[i].tolist()) for i in range(len(source)))

    assert rows(folder) == rows(tar)
    assert folder.labels.dtype == tar.labels.dtype == np.int64
    assert folder.describe(1) == "class0/03.jpg (sample 1)"
    assert tar.describe(0) == "shard-000000.tar offset 512 (sample 0)"


def test_fingerprint_follows_the_data_not_the_place(images: Path, shards: Path, tmp_path: Path) -> None:
    before = TarSource(shards).fingerprint, FolderSource(images).fingerprint
    shards.rename(tmp_path / "moved")
    images.rename(tmp_path / "images2")
    assert (
        TarSource(tmp_path / "moved").fingerprint,
        FolderSource(tmp_path / "images2").fingerprint,
    ) == before
    (tmp_path / "images2/class0/00.jpg").unlink()
    assert FolderSource(tmp_path / "images2").fingerprint != before[1]


def test_missing_or_cut_shard_is_refused_at_open(shards: Path) -> None:
    shard = shards / "shard-000000.tar"
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    with pytest.raises(
        ValueError, match=rf"shard-000000\.tar has {size - 1:,} bytes, .* states {size:,}: copy"
    ):
        TarSource(shards)
    shard.unlink()
    with pytest.raises(ValueError, match="No such file"):
        TarSource(shards)


def test_shard_cut_while_open_is_an_error_that_says_where(shards: Path) -> None:
    source = TarSource(shards)
    last = len(source) - 1
    assert source.read(last)
    os.truncate(shards / "shard-000000.tar", 600)
    with pytest.raises(OSError, match=rf"shard-000000\.tar offset \d+ \(sample {last}\): read 0 of"):
        source.read(last)


def test_shard_that_was_replaced_or_deleted_before_its_first_read(shards: Path) -> None:
    source, late = TarSource(shards), TarSource(shards)
    shard = shards / "shard-000000.tar"
    (shards / "other").write_bytes(bytes(shard.stat().st_size + 512))
    (shards / "other").replace(shard)
    with pytest.raises(
        OSError, match=r"shard-000000\.tar offset \d+ \(sample 3\): the shard has [\d,]+ bytes now"
    ):
        source.read(3)
    shard.unlink()
    with pytest.raises(OSError, match=r"shard-000000\.tar offset \d+ \(sample 3\): No such file"):
        late.read(3)


def test_threads_forks_and_pickles_read_the_same(shards: Path) -> None:
    source = TarSource(shards)
    expected = [source.read(i) for i in range(12)] * 20
    again = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(again.read, list(range(12)) * 20)) == expected
    child = os.fork()
    if not child:
        os._exit(0 if [source.read(i) for i in range(12)] * 20 == expected else 1)
    assert [source.read(i) for i in range(12)] * 20 == expected
    assert os.waitpid(child, 0)[1] == 0


def test_links_are_followed_and_hidden_files_ignored(images: Path) -> None:
    (images / "class0/.hidden").write_bytes(b"x")
    (images / "class3").symlink_to(images / "class1")
    (images / "class2/loop").symlink_to(images)
    assert open_source(images).classes == ["class0", "class1", "class2", "class3"]
    assert len(open_source(images)) == 16


def test_flat_folder_has_no_labels(images: Path) -> None:
    source = open_source(images / "class1")
    assert source.classes is None
    assert source.labels.tolist() == [-1] * 4


def test_exif_rotation_does_not_change_the_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 10)).save(tmp_path / "a.jpg", exif=exif)
    source = FolderSource(tmp_path)
    assert (source.heights[0], source.widths[0]) == (10, 30)


def test_synthetic() -> None:
    source = open_source("synthetic:1000:48x64")
    assert isinstance(source, SyntheticSource)
    assert len(source) == 1000
    assert inspect(source.read(999))[:3] == ("jpeg", 48, 64)
    assert source.read(3) == SyntheticSource(1000, 48, 64).read(3) != source.read(4)
    assert source.labels[[0, 13, 999]].tolist() == [0, 3, 9]
    with Image.open(io.BytesIO(source.read(5))) as image:
        image.load()
    with pytest.raises(IndexError):
        source.read(1000)


def test_refused_paths(tmp_path: Path, images: Path) -> None:
    (tmp_path / "x.beton").write_bytes(b"")
    (tmp_path / "folder.beton").mkdir()
    (tmp_path / "above").mkdir()
    (tmp_path / "above/images").symlink_to(images)
    (tmp_path / "betons").mkdir()
    (tmp_path / "betons/a.beton").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/a.tar").write_bytes(b"")
    (images / "class0/readme.txt").write_text("hi")
    cases: list[tuple[Path | str, str]] = [
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "x.beton", r"x\.beton is cut short inside the header \(0 bytes\)"),
        (tmp_path / "no.beton", r"no\.beton' does not exist"),
        (f"{tmp_path}/x.beton,", r"x\.beton is cut short"),
        (f"{tmp_path}/no, {tmp_path}/x.beton", r"no' does not exist: name a \.beton file"),
        (tmp_path / "folder.beton", r"folder\.beton' cannot be read: Is a directory"),
        (tmp_path / "betons", r"has \.beton files: name the files, separated by commas"),
        (images / "class0/readme.txt", "is a file"),
        (tmp_path / "empty", "holds no images"),
        (tmp_path / "tars", "make_shards.py --index"),
        (images.parent / "above", "13 of 13 images are a level below the class folders"),
        (images, r"1 unusable file \(class0/readme.txt: not a JPEG or PNG\): tools/make_shards.py"),
        ("synthetic:10:5", "synthetic:NUM:HxW"),
        ("synthetic:0:5x5", "NUM=0 must"),
        ("synthetic:2147483648:5x5", "NUM=2147483648 must be 1 to 2,147,483,647"),
    ]
    for path, message in cases:
        with pytest.raises(ValueError, match=message):
            open_source(path)


def test_a_missing_relative_path_names_the_folder_that_was_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("photos", "a.beton", "photos, more"):
        with pytest.raises(ValueError, match=rf"does not exist in {tmp_path}"):
            open_source(path)


def test_a_misspelled_path_is_named_once_with_its_neighbor(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images.parent)
    with pytest.raises(
        ValueError, match=r"^data\.path: 'imagez' does not .*: did you mean images\? Otherwise make"
    ):
        check_paths({"data.path": "imagez"})
    with pytest.raises(ValueError, match=r"^--data: 'zzz' does not exist in .*: make it with"):
        open_split("--data", "zzz")


def test_patterns_of_shards(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, options in (("tars", []), ("betons", ["--format", "beton"])):
        arguments = [str(images), str(tmp_path / name), "--split", "a=.5,b=.5", "--workers", "1", *options]
        assert make_shards(arguments) == 0
    beton = open_source(f"{tmp_path}/betons/{{a,b}}/*.beton")
    assert sorted(beton.describe(i) for i in (0, len(beton) - 1)) == sorted(
        f"{tmp_path}/betons/{part}/{part}-000000.beton sample {number}"
        for part, number in (("a", 0), ("b", len(open_source("~/betons/b")) - 1))
    )
    assert len(open_source("~/betons/{a,b}/?-{000000..000000}.beton?image=image")) == len(beton) == 12
    whole = open_source(tmp_path / "tars/a")
    assert open_source("~/tars/a/*.tar").fingerprint == whole.fingerprint
    assert open_source("~/tars/a/a-{000000..000000}.tar").fingerprint == whole.fingerprint
    (tmp_path / "tars/a/other.tar").touch()
    for path, message in (
        (
            "~/tars/a/{a-000000,a-000001}.tar",
            r"names 2 files, but .*/tars/a has 2 tars: tars are read as one",
        ),
        ("~/tars/{a,b}", "names 2 files or folders: name one folder"),
        ("~/tars/{a,c}", r"tars/c' does not exist"),
        ("~/tars/*.tar", "matches no file"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(path)


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("hf://datasets/a/b", "hf download"),
        ("pipe:curl -s https://host/a.tar", "its output written to a file"),
        ("gopher://host/*.tar", "your tool for this kind of storage"),
    ],
)
def test_remote_paths_get_the_true_answer(path: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"URLs are read as s3, gs, az, http, https \(.*: copy .*{remedy}"):
        open_source(path)


def test_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    """Eight folders, each with a link to every other: without a memory there would be 8! ways through them."""
    for i in range(8):
        (tmp_path / f"c{i}").mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / f"c{i}/a.jpg")
        for j in range(8):
            (tmp_path / f"c{i}/to{j}").symlink_to(tmp_path / f"c{j}")
    (tmp_path / "c0/itself").symlink_to("itself")
    names = list_folder(tmp_path)
    assert len(names) == 8 * 8 + 8  # each class reaches all eight pictures; the link to itself is listed
    assert names.count("c0/itself") == 1


def test_fifo_is_refused_not_waited_for(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "b.jpg")
    with pytest.raises(ValueError, match=r"b\.jpg: not a regular file"):
        FolderSource(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["labels.csv", "top/a/0.jpg", "top/b/0.jpg", "top/c/0.jpg"], "3 of 3 images are a level below"),
        (["0.jpg", "1.jpg", "2.jpg", "masks/0.png"], "3 images are beside the folders and 1 in them"),
    ],
)
def test_stray_files_do_not_hide_the_wrong_level(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_names(names)


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_reader_keeps_the_order(threads: int) -> None:
    source, wanted = SyntheticSource(40, 20, 30), [7, 3, 3, 39, 0, 12, 5]
    reader = ParallelReader(source, threads)
    for count in range(len(wanted) + 1):
        found = list(reader(wanted[:count], unwanted={3}))
        assert found == [b"" if i == 3 else source.read(i) for i in wanted[:count]]
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_reads_wait_together() -> None:
    """Two threads are both inside a read, or the barrier breaks."""
    barrier = threading.Barrier(2, timeout=20)

    class Slow(SyntheticSource):
        def read(self, i: int) -> bytes:
            barrier.wait()
            return super().read(i)

    reader = ParallelReader(Slow(40, 20, 30), 2)
    assert list(reader([4, 9])) == [SyntheticSource(40, 20, 30).read(i) for i in (4, 9)]
    reader.close()


def test_a_path_that_the_system_refuses_is_named(tmp_path: Path) -> None:
    long = str(tmp_path / ("x" * 300))
    with pytest.raises(ValueError, match=f"^data path '{long}' cannot be read: File name too long: {long}"):
        open_source(long)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/gone.jpg").symlink_to("nowhere")
    (tmp_path / "a/b").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a/b/1.png")
    with pytest.raises(
        ValueError, match=r"a: 1 unusable file \(gone\.jpg: a broken link, or a folder that cannot"
    ):
        open_source(tmp_path / "a")
    refused = PermissionError(errno.EACCES, "Permission denied")
    with (
        patch("os.scandir", side_effect=refused),
        pytest.raises(ValueError, match="a cannot be read: Permission"),
    ):
        open_source(tmp_path / "a")


def test_a_run_is_not_written_among_its_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a/1.png")
    for out in (tmp_path, tmp_path / "runs/x", tmp_path / "a"):
        with pytest.raises(
            ValueError, match=f"^run.out={out} is in eval.path={tmp_path}/, a folder of images"
        ):
            check_paths({"data.path": None, "eval.path": f"{tmp_path}/"}, str(out))
    for out in (tmp_path.parent, tmp_path / ".run", tmp_path.with_name(tmp_path.name + "2")):
        check_paths({"data.path": str(tmp_path)}, str(out))
    (tmp_path / MANIFEST).touch()  # shards
    check_paths({"data.path": str(tmp_path)}, str(tmp_path / "run"))
