"""train.py on .beton files: the same images as tars give the same ids, views and losses to the bit."""

from pathlib import Path

import pytest
import test_train
import torch
from test_beton import take
from test_train import Run

from byolt.pipelines.loader import Batch
from byolt.pipelines.sources import open_source
from byolt.tools.make_shards import main as make_shards

images = test_train.images  # its fixture


@pytest.fixture(scope="module")
def data(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training images as tars, as .beton files, half of them raw, and in two .beton files; all in one order."""
    root = tmp_path_factory.mktemp("data")
    train = str(images / "train")
    beton = ["--format", "beton"]
    for name, options in (("tars", []), ("betons", beton), ("raw", [*beton, "--raw-fraction", ".5"])):
        assert make_shards([train, str(root / name), "--workers", "1", *options]) == 0
    assert make_shards([train, str(root / "halves"), "--workers", "1", *beton, "--split", "a=.5,b=.5"]) == 0
    return root


def paths(data: Path) -> dict[str, str]:
    one, other = (data / f"halves/{part}/{part}-000000.beton" for part in "ab")
    return {
        "tars": str(data / "tars"),
        "folder": str(data / "betons"),
        "two files": f"{one},{other}",
        "named": f"{data / 'betons/shard-000000.beton'}?image=image&label=label",
    }


def trained(
    folder: Path, images: Path, path: str, *stops: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the steps, and the weights, of a run that is stopped after these steps and continued."""
    folder.mkdir()
    run = Run(folder, images)
    for stop in (*stops, None):
        resume = ["--resume", "auto"] if run.out.exists() else []
        arguments = [f"train.stop_at_step={stop}"] if stop else []
        done = run(f"data.path={path}", "eval.path=null", "run.log_every=1", *resume, *arguments)
        assert done.returncode == 0, done.stderr
        assert ("resumed from" in done.stderr) == bool(resume)
    return [row["loss"] for row in run.rows() if "loss" in row], run.weights()


@pytest.fixture(scope="module")
def on_tars(data: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict]:
    return trained(tmp_path_factory.mktemp("tars") / "run", images, paths(data)["tars"])


@pytest.mark.parametrize(
    "form",
    [
        "two files",
        pytest.param("folder", marks=pytest.mark.slow),
        pytest.param("named", marks=pytest.mark.slow),
    ],
)
def test_tar_and_beton_train_alike_to_the_bit(
    form: str, on_tars: tuple[list[float], dict], data: Path, images: Path, tmp_path: Path
) -> None:
    """8 steps, 4 an epoch; the .beton is stopped in the middle of an epoch and continued."""
    losses, weights = trained(tmp_path / "run", images, paths(data)[form], 3)
    assert len(losses) == 8 and losses == on_tars[0]
    assert all(torch.equal(weights[name], on_tars[1][name]) for name in weights)


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_tar_and_beton_give_the_same_ids_and_views(backend: str, data: Path) -> None:
    """Also with half of the images raw, and from the middle of an epoch on."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    expected = take(open_source(data / "tars"), backend, 0, 6)
    assert not torch.equal(expected[0].view1, expected[4].view1)
    for path, first in ((data / "betons", 0), (data / "raw", 0), (data / "raw", 3)):
        found = take(open_source(path), backend, first, 6)
        for ours, theirs in zip(found, expected[first:], strict=True):
            for name in Batch._fields:
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), (path, name)


def test_field_that_is_not_there_is_one_line(data: Path, images: Path, tmp_path: Path) -> None:
    done = Run(tmp_path, images)(f"data.path={data / 'betons/shard-000000.beton'}?image=photo")
    assert done.returncode == 2
    assert (
        "has no RGB image field named 'photo', only 'image' (RGB image), 'label' (int), 'key' (json)"
        in done.stderr
    )
