"""open_loader: the batches of a run with the same settings, without its config."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from byolt import open_loader
from byolt.configs import schema
from byolt.configs.schema import ViewConfig
from byolt.pipelines.backends import make_backend, make_resident
from byolt.pipelines.loader import Batch, CorruptBudgetError, Loader
from byolt.pipelines.sources import open_source

ROOT = Path(__file__).resolve().parent.parent


def take(loader: Loader, steps: int) -> list[Batch]:
    with loader:
        return [batch for (batch,) in islice(loader, steps)]


def assert_equal(ours: list[Batch], expected: list[Batch]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("data", ["synthetic:12:30x40", "synthetic:12:100x120"])  # kept in memory, and not
def test_batches_are_those_of_a_run_with_the_papers_views(data: str) -> None:
    words = [f"data.path={data}", "augment.size=16", "train.batch_size=4", "run.seed=3", "data.threads=1"]
    config = schema.load(ROOT / "configs" / "r50_100ep.yaml", words)
    source, where = open_source(data), (torch.device("cpu"), torch.float32)
    backend, _ = make_resident(config, source, *where) or make_backend(config, *where)
    ours = open_loader(data, 4, size=16, seed=3, threads=1, device="cpu")
    expected = take(Loader(config, source, backend), 4)
    assert_equal(take(ours, 4), expected)
    assert not torch.equal(take(open_loader(data, 4, size=16, seed=4, device="cpu"), 1)[0].id, expected[0].id)
    later = open_loader(data, 4, size=16, seed=3, device="cpu", first_step=2)
    assert_equal(take(later, 2), expected[2:])


def test_ranks_share_a_batch() -> None:
    data = "synthetic:12:30x40"
    (whole,) = take(open_loader(data, 4, size=8, device="cpu"), 1)
    parts = [take(open_loader(data, 4, size=8, device="cpu", rank=r, world_size=2), 1)[0] for r in (0, 1)]
    assert torch.equal(torch.cat([part.id for part in parts]), whole.id)
    assert torch.equal(torch.cat([part.view1 for part in parts]), whole.view1)


def test_views_profile_and_dtype_are_followed() -> None:
    data, still = (
        "synthetic:8:30x40",
        ViewConfig(blur=0, solarize=0, jitter=0, gray=0, flip=0, crop_area=(1, 1)),
    )
    (batch,) = take(open_loader(data, 4, size=16, view1=still, view2=still, device="cpu"), 1)
    (other,) = take(open_loader(data, 4, size=16, view1=still, device="cpu"), 1)
    assert torch.equal(batch.view1, other.view1) and not torch.equal(batch.view2, other.view2)
    torchvision = open_loader(
        data, 4, size=16, view1=still, profile="torchvision", dtype=torch.bfloat16, device="cpu"
    )
    (antialiased,) = take(torchvision, 1)
    assert antialiased.view1.dtype == torch.bfloat16
    assert (antialiased.view1.float() - batch.view1).abs().max() > 0.05


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for arguments, said in (
        (("synthetic:8:30x40", 9), "^batch_size=9 is larger than the data set"),
        (("synthetic:8:30x40", 1), "^batch_size=1 must be at least 2"),
        ((tmp_path / "nowhere", 4), "does not exist"),
    ):
        with pytest.raises(ValueError, match=said):
            open_loader(*arguments, device="cpu")
    with pytest.raises(ValueError, match=r"^threads=0 must .*; size=4 must") as wrong:
        open_loader("synthetic:8:30x40", 4, size=4, threads=0)
    assert "\n" not in str(wrong.value)


def test_broken_images_are_replaced_up_to_max_corrupt(tmp_path: Path) -> None:
    for i in range(6):
        Image.effect_noise((120, 110), 40).convert("RGB").save(tmp_path / f"{i}.jpg")
    loader = open_loader(tmp_path, 6, size=16, device="cpu", threads=1)
    refused = open_loader(tmp_path, 6, size=16, device="cpu", threads=1, max_corrupt=0)
    whole = (tmp_path / "3.jpg").read_bytes()
    (tmp_path / "3.jpg").write_bytes(whole[: len(whole) - 2] + b"xx")  # the same size, without its end
    (batch,) = take(loader, 1)
    assert sorted(batch.id.tolist()) == [0, 1, 2, 4, 4, 5] and loader.corrupt_count == 1
    with pytest.raises(CorruptBudgetError, match="max_corrupt=0"):
        take(refused, 1)
