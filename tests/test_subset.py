"""Parts of a data set: balanced, nested, by list; errors name the wrong entries."""

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_index import write_tar

from byolt.pipelines.sources import open_source
from byolt.pipelines.subset import Subset, _original, balanced_ids, file_names, listed_ids, random_ids, spaced
from byolt.tools import make_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of five images; the names x.jpg and 7.jpg occur in both."""
    root = tmp_path_factory.mktemp("images")
    for label, names in (("a", ["1", "2", "3", "7", "x"]), ("b", ["4", "5", "6", "7", "x"])):
        (root / label).mkdir()
        for i, name in enumerate(names):
            image = np.full((9, 9, 3), 20 * i + 100 * (label == "b"), np.uint8)
            Image.fromarray(image).save(root / label / f"{name}.jpg")
    return root


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "set"
    assert make_shards.main([str(folder), str(out), "--workers", "1"]) == 0
    return out


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 1.0])
def test_every_class_gives_its_share(share: float) -> None:
    labels = np.repeat(np.arange(4), [100, 40, 10, 1])[np.random.default_rng(0).permutation(151)]
    ids = balanced_ids(labels, share, seed=3)
    counts = np.bincount(labels[ids], minlength=4).tolist()
    assert counts == {
        0.01: [1, 1, 1, 1], 0.1: [10, 4, 1, 1], 0.25: [25, 10, 2, 1], 1.0: [100, 40, 10, 1]
    }[share]  # fmt: skip
    assert (np.diff(ids) > 0).all()


def test_an_image_of_every_class_can_be_left() -> None:
    labels = np.repeat(np.arange(4), [100, 40, 2, 1])
    counts = np.bincount(labels[balanced_ids(labels, 0.1, 3, leave=1)], minlength=4)
    assert counts.tolist() == [10, 4, 1, 0]
    assert np.bincount(labels[balanced_ids(labels, 1, 3, leave=1)]).tolist() == [99, 39, 1]
    assert not len(balanced_ids(labels, 1, 3, leave=100))


def test_seeds_differ_and_shares_are_nested() -> None:
    labels = np.arange(1000) % 10
    small, large = balanced_ids(labels, 0.01, 0), balanced_ids(labels, 0.1, 0)
    assert set(small) < set(large)
    assert set(balanced_ids(labels, 0.01, 1)) != set(small)
    with pytest.raises(ValueError, match="share of 0 of the labels"):
        balanced_ids(labels, 0, 0)


def test_subset_renumbers(folder: Path) -> None:
    source = open_source(folder)
    part = Subset(source, np.array([7, 2]))
    assert len(part) == 2 and part.labels.tolist() == [1, 0]
    assert part.read(0) == source.read(7) and part.describe(1) == source.describe(2)


def test_other_samples_are_another_data_set(folder: Path) -> None:
    source = open_source(folder)
    prints = [Subset(source, np.array(ids)).fingerprint for ids in ([0, 1], [0, 2], [1, 0], [0], [0, 1])]
    assert prints[0] == prints[4] and len({source.fingerprint, *prints}) == 5
    other = SimpleNamespace(**vars(source) | {"fingerprint": "0"})
    assert Subset(other, np.array([0, 1])).fingerprint != prints[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(("total", "count"), [(10, 10), (10, 99), (1000, 7), (7, 5), (5, 0)])
def test_spaced_numbers(total: int, count: int) -> None:
    numbers = [*spaced(total, count).tolist(), total]
    gaps = np.diff(numbers)
    assert len(gaps) == min(count, total)
    assert count == 0 or (numbers[0] == 0 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


@pytest.mark.parametrize(("total", "count"), [(10, 10), (10, 99), (1000, 7), (7, 5)])
def test_drawn_numbers(total: int, count: int) -> None:
    numbers = random_ids(total, count)
    assert len(numbers) == min(count, total) and (np.diff(numbers) > 0).all()
    assert numbers[0] >= 0 and numbers[-1] < total and (numbers == random_ids(total, count)).all()


def test_drawn_numbers_have_no_period() -> None:
    """Evenly spaced, all 100 would be of one residue."""
    counts = np.bincount(random_ids(1000, 100) % 10, minlength=10)
    assert ((counts - 10) ** 2 / 10).sum() < 21.7  # chi squared of 9 degrees of freedom: 99 %


@pytest.fixture(scope="module")
def beton(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("beton") / "set"
    assert make_shards.main([str(folder), str(out), "--workers", "1", "--format", "beton"]) == 0
    return out


@pytest.mark.parametrize("kind", ["folder", "shards", "beton", "one.beton"])
def test_lists_of_ids_and_names(kind: str, folder: Path, shards: Path, beton: Path, tmp_path: Path) -> None:
    [single] = beton.glob("*.beton")
    source = open_source({"folder": folder, "shards": shards, "beton": beton, "one.beton": single}[kind])
    order = [f"{label}/{name}.jpg" for label, names in (("a", "1237x"), ("b", "4567x")) for name in names]
    place = {name: number for number, name in enumerate(order)}
    if kind != "folder":  # make_shards shuffles; the bytes say which is which
        by_bytes = {source.read(i): i for i in range(10)}
        place = {name: by_bytes[(folder / name).read_bytes()] for name in order}
    listing = tmp_path / "list.txt"
    listing.write_text("9\n0\n")
    assert listed_ids(source, listing).tolist() == [0, 9]
    listing.write_text("b/x.jpg\n\n5.jpg\n")
    assert listed_ids(source, listing).tolist() == sorted([place["b/x.jpg"], place["b/5.jpg"]])
    for text, part in (
        ("x.jpg\n", "name no sample, or several: x.jpg"),
        ("1.jpg\nnope\n", "1 of 2 entries name no sample, or several: nope"),
        ("1\n1\n", "1 entries twice"),
        ("\n", "is empty"),
    ):
        listing.write_text(text)
        with pytest.raises(ValueError, match=part):
            listed_ids(source, listing)
    with pytest.raises(ValueError, match="cannot be read"):
        listed_ids(source, tmp_path / "nowhere")


def test_keys_in_beton_files(beton: Path, tmp_path: Path) -> None:
    source, listing = open_source(beton), tmp_path / "list.txt"
    key = json.loads(source.note(7))["key"]  # type: ignore[attr-defined]
    listing.write_text(f"{key}\n")
    assert not key.isdecimal() or key.startswith("0")
    assert listed_ids(source, listing).tolist() == [7]


def test_a_note_of_anything_is_no_name() -> None:
    for text in (b"", b"[1]", b"{}", b'{"key": 3}', b"\xff"):
        assert _original(text, "key", "file") == set()
    assert _original(b'{"key": "a"}', "key", "file") == {"a"}


def test_made_up_images_have_no_names(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("somebody\n")
    with pytest.raises(ValueError, match="has no names of its samples: list ids, 0 to 9"):
        listed_ids(open_source("synthetic:10:8x8"), tmp_path / "list.txt")


def test_a_key_is_no_id(tmp_path: Path) -> None:
    """make_shards numbers the files that it found: after one that does not decode a sample's key is not its id."""
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).save(
            tmp_path / "images" / "a" / f"{i}.jpg"
        )
    cut = tmp_path / "images" / "a" / "0.jpg"  # third of the shuffled order
    cut.write_bytes(cut.read_bytes()[:-200])
    assert make_shards.main([str(tmp_path / "images"), str(tmp_path / "set"), "--workers", "1"]) == 0
    [shard] = (tmp_path / "set").glob("*.tar")
    source, listing = open_source(tmp_path / "set"), tmp_path / "list.txt"
    with tarfile.open(shard) as tar:
        keys = [name.removesuffix(".jpg") for name in tar.getnames() if name.endswith(".jpg")]
        data = [tar.extractfile(f"{key}.jpg").read() for key in keys]  # type: ignore[union-attr]
    assert len(keys) == 11 and keys[-1].lstrip("0") == "11"  # there is a hole: its id is 10
    moved = [(key, i) for i, key in enumerate(keys) if int(key) != i]
    assert moved
    for key, i in moved:
        listing.write_text(f"{key}\n")
        assert listed_ids(source, listing).tolist() == [i] and source.read(i) == data[i]
        listing.write_text(f"{key}\n{key}.jpg\n")
        with pytest.raises(ValueError, match="1 entries twice"):
            listed_ids(source, listing)
    listing.write_text("10\n9\n")
    assert listed_ids(source, listing).tolist() == [9, 10]


def test_an_id_that_is_the_key_of_another_sample_is_refused(tmp_path: Path) -> None:
    """Others' tars have keys without leading zeros."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key in (1, 0, 2):
            buffer = io.BytesIO()
            Image.new("RGB", (9, 9), (80 * key, 0, 0)).save(buffer, "JPEG")
            for name, data in ((f"{key}.jpg", buffer.getvalue()), (f"{key}.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert make_shards.main(["--index", str(tmp_path)]) == 0
    source, listing = open_source(tmp_path), tmp_path / "list.txt"
    listing.write_text("0\n2\n")
    with pytest.raises(
        ValueError, match="1 of 2 entries are the id of one sample and the name of another: 0; write"
    ):
        listed_ids(source, listing)
    listing.write_text("0.jpg\n")
    assert listed_ids(source, listing).tolist() == [1]
    listing.write_text("2\n")
    assert listed_ids(source, listing).tolist() == [2]  # both are the same sample


@pytest.mark.parametrize("entry", ["٣", "03", "+3", "3.0", "9" * 5000])
def test_other_numbers_are_names(entry: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{entry}\n")
    with pytest.raises(ValueError, match="has no names"):
        listed_ids(open_source("synthetic:10:8x8"), tmp_path / "list.txt")


@pytest.mark.parametrize("format", ["webdataset", "beton", "folder"])
def test_a_caption_names_the_original_file(format: str, tmp_path: Path) -> None:
    names = [f"c{i % 2}/photo.{i}.png" for i in range(4)]
    for i, name in enumerate(names):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8 + i)).save(tmp_path / "src" / name)
    folder = tmp_path / "src"
    if format != "folder":
        folder = tmp_path / "dst"
        assert (
            make_shards.main([str(tmp_path / "src"), str(folder), "--workers", "1", "--format", format]) == 0
        )
    source = open_source(folder)
    name_of = file_names(source)
    found = [(name_of(i), int(source.heights[i])) for i in range(4)]
    assert sorted(found) == sorted((name, 8 + i) for i, name in enumerate(names))


def test_a_caption_without_a_recorded_file_names_the_member(tmp_path: Path) -> None:
    content = []
    for i, note in enumerate((b"{}", b"no json", b'{"file": 3}', b'{"file": "a/b.png"}')):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8 + i)).save(buffer, "JPEG")
        content += [(f"x/{i}.jpg", buffer.getvalue()), (f"x/{i}.cls", b"0"), (f"x/{i}.json", note)]
    write_tar(tmp_path / "a.tar", content)
    assert make_shards.main(["--index", str(tmp_path)]) == 0
    name_of = file_names(open_source(tmp_path))
    assert [name_of(i) for i in range(4)] == ["x/0.jpg", "x/1.jpg", "x/2.jpg", "a/b.png"]
    # damaged since it was opened
    (tmp_path / "a.tar").write_bytes(bytes((tmp_path / "a.tar").stat().st_size))
    assert name_of(0) == "a.tar offset 512 (sample 0)"
