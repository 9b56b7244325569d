"""The quickstart's images: deterministic, complete or absent, class not readable from color or pixels."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byolt.tools import quickstart_images
from byolt.tools.quickstart_images import CLASSES, draw, image_rng, main, write_set

CHANCE = 100 / len(CLASSES)

Drawn = dict[str, tuple[np.ndarray, np.ndarray]]  # by split: images uint8 (N, 32, 32, 3), labels int (N,)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    """150 training and 50 validation images a class."""
    sets = {}
    for split, count in (("train", 150), ("val", 50)):
        images = [draw(name, 32, image_rng(0, split, name, i)) for name in CLASSES for i in range(count)]
        sets[split] = (np.stack(images), np.repeat(np.arange(len(CLASSES)), count))
    return sets


def _knn_accuracy(
    bank: np.ndarray, bank_labels: np.ndarray, query: np.ndarray, query_labels: np.ndarray, k: int
) -> float:
    """Percentage of queries whose k nearest (L2) vote for their own class."""
    distance = (query**2).sum(1)[:, None] + (bank**2).sum(1)[None] - 2 * query @ bank.T
    neighbors = bank_labels[np.argsort(distance, axis=1)[:, :k]]
    votes = (neighbors[:, :, None] == np.arange(len(CLASSES))).sum(axis=1)
    return 100 * float((votes.argmax(axis=1) == query_labels).mean())


def test_ten_classes_in_both_splits(tmp_path: Path) -> None:
    assert write_set(tmp_path / "set", {"train": 3, "val": 2}, size=32, seed=0) == 50
    assert len(CLASSES) == 10
    for split, count in (("train", 3), ("val", 2)):
        for name in CLASSES:
            files = sorted(path.name for path in (tmp_path / "set" / split / name).iterdir())
            assert files == [f"{i:04d}.jpg" for i in range(count)]
    with Image.open(tmp_path / "set" / "train" / "star" / "0002.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))


def test_same_seed_same_bytes_and_a_larger_set_contains_the_smaller(tmp_path: Path) -> None:
    write_set(tmp_path / "a", {"train": 2, "val": 1}, size=40, seed=5)
    write_set(tmp_path / "b", {"train": 2, "val": 1}, size=40, seed=5)
    write_set(tmp_path / "larger", {"train": 3, "val": 2}, size=40, seed=5)
    write_set(tmp_path / "other", {"train": 2, "val": 1}, size=40, seed=6)
    first, larger, other = (_digests(tmp_path / name) for name in ("a", "larger", "other"))
    assert first == _digests(tmp_path / "b")
    assert len(set(first.values())) == 30  # no image twice, none shared by train and val
    assert first.items() <= larger.items()
    assert not set(first.values()) & set(other.values())


def test_class_is_not_readable_from_mean_color(drawn: Drawn) -> None:
    (bank, bank_labels), (query, query_labels) = drawn["train"], drawn["val"]
    bank_color, query_color = bank.mean(axis=(1, 2)), query.mean(axis=(1, 2))
    # 500 queries at chance: standard deviation 1.3 points
    assert _knn_accuracy(bank_color, bank_labels, query_color, query_labels, k=20) == pytest.approx(
        CHANCE, abs=4
    )
    centroids = np.stack([bank_color[bank_labels == label].mean(axis=0) for label in range(len(CLASSES))])
    nearest = _knn_accuracy(centroids, np.arange(len(CLASSES)), query_color, query_labels, k=1)
    assert nearest == pytest.approx(CHANCE, abs=4)


def test_raw_pixels_do_not_solve_it(drawn: Drawn) -> None:
    (bank, bank_labels), (query, query_labels) = drawn["train"], drawn["val"]
    bank_pixels, query_pixels = (x.reshape(len(x), -1).astype(np.float64) / 255 for x in (bank, query))
    assert _knn_accuracy(bank_pixels, bank_labels, query_pixels, query_labels, k=20) < 30


@pytest.mark.parametrize("name", CLASSES)
def test_figure_covers_a_fair_part_and_differs_from_the_others(name: str) -> None:
    points = (np.arange(200) + 0.5) / 100 - 1  # the figure's own square, [-1, 1] x [-1, 1]
    u, v = np.meshgrid(points, points)
    mask = CLASSES[name](u, v)
    assert 0.2 < mask.mean() < 0.75
    for other in CLASSES.keys() - {name}:
        assert (mask != CLASSES[other](u, v)).mean() > 0.1


def test_areas_of_figures_match_closed_forms() -> None:
    points = (np.arange(1000) + 0.5) / 500 - 1
    u, v = np.meshgrid(points, points)
    area = {name: 4 * CLASSES[name](u, v).mean() for name in CLASSES}
    assert area["disc"] == pytest.approx(np.pi * 0.85**2, rel=2e-3)
    assert area["ring"] == pytest.approx(np.pi * (0.95**2 - 0.55**2), rel=2e-3)
    assert area["square"] == pytest.approx(2, rel=2e-3)  # circumradius 1: 2 sin(pi / 2) * 4 / 4
    assert area["triangle"] == pytest.approx(3 * np.sqrt(3) / 4, rel=2e-3)
    assert area["cross"] == pytest.approx(4 * 0.54 * 0.95 - 0.54**2, rel=2e-3)
    # ten triangles (0, tip, inner corner)
    assert area["star"] == pytest.approx(5 * 0.38 * np.sin(np.pi / 5), rel=2e-3)


def test_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def interrupted(class_name: str, size: int, rng: np.random.Generator) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 25:
            assert not (tmp_path / "set").exists()  # not under its name while half done
            raise KeyboardInterrupt
        return draw(class_name, size, rng)

    monkeypatch.setattr(quickstart_images, "draw", interrupted)
    assert main([str(tmp_path / "set"), "--per-class", "3", "--val-per-class", "1"]) == 130
    assert calls == 25
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_refused_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("keep")
    assert main([str(tmp_path / "set"), "--per-class", "1"]) == 1
    message = capsys.readouterr().err
    assert f"{tmp_path / 'set'} exists: remove it" in message
    assert message.count("\n") == 1
    assert (tmp_path / "set" / "mine.txt").read_text() == "keep"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("option", ["--per-class=0", "--val-per-class=20000", "--size=8", "--seed=-1"])
def test_value_out_of_range_names_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "set"), option])
    assert stop.value.code == 2
    name, value = option.split("=")
    assert f"{name} {value}: must be between" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
