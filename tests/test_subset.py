"""Parts of a data set: balanced, nested, by list; what is asked for wrongly is named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.sources import open_source
from pipelines.subset import Subset, balanced_ids, listed_ids
from tools import make_shards


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


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_lists_of_ids_and_names(kind: str, folder: Path, shards: Path, tmp_path: Path) -> None:
    source = open_source({"folder": folder, "shards": shards}[kind])
    order = [f"{label}/{name}.jpg" for label, names in (("a", "1237x"), ("b", "4567x")) for name in names]
    place = {name: number for number, name in enumerate(order)}
    if kind == "shards":  # make_shards shuffles; the bytes say which is which
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


def test_made_up_images_have_no_names(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("somebody\n")
    with pytest.raises(ValueError, match="keeps no names"):
        listed_ids(open_source("synthetic:10:8x8"), tmp_path / "list.txt")
