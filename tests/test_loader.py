"""The loader: which samples reach which rank, what happens to bad bytes, and that it never hangs."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import Config
from pipelines.loader import Batch, CorruptBudgetError, Loader, make_backend, plain_images
from pipelines.order import global_batch
from pipelines.sources import SyntheticSource
from pipelines.torch_backend import UndecodableError

N = 40


def make_config(**changes: dict) -> Config:
    settings: dict = {
        "run": {"out": "unused", "seed": 5},
        "data": {"path": "unused", "backend": "torch", "threads": 1},
        "augment": {
            "size": 8,
            "view1": {"blur": 0.0, "solarize": 0.0},
            "view2": {"blur": 0.0, "solarize": 0.2},
        },
        "model": {},
        "optimizer": {"base_lr": 0.1, "weight_decay": 0, "base_tau": 0.9, "warmup_epochs": 0},
        "train": {"epochs": 1, "batch_size": 8},
    }
    for section, values in changes.items():
        settings[section] |= values
    return Config.model_validate(settings)


class Damaged(SyntheticSource):
    """A source some of whose samples are replaced."""

    def __init__(self, damage: dict[int, Callable[[bytes], bytes]]) -> None:
        super().__init__(N, 20, 30)
        self._damage = damage

    def read(self, i: int) -> bytes:
        return self._damage.get(i, lambda data: data)(super().read(i))


def take(
    config: Config, steps: int, source: SyntheticSource | None = None, **options: object
) -> list[list[Batch]]:
    backend, _ = make_backend(config, torch.device("cpu"), torch.float32)
    with Loader(config, source or Damaged({}), backend, **options) as loader:  # type: ignore[arg-type]
        batches = iter(loader)
        return [next(batches) for _ in range(steps)]


def ids(steps: list[list[Batch]]) -> list[list[int]]:
    return [torch.cat([batch.id for batch in step]).tolist() for step in steps]


def test_batches_follow_the_order() -> None:
    steps = take(make_config(), 7)
    expected = [global_batch(5, epoch, step, N, 8).tolist() for epoch in range(2) for step in range(5)]
    assert ids(steps) == expected[:7]
    batch = steps[0][0]
    assert batch.view1.shape == batch.view2.shape == (8, 3, 8, 8)
    assert batch.label.tolist() == Damaged({}).labels[batch.id.numpy()].tolist()
    assert not torch.equal(batch.view1, batch.view2)


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_share_the_same_global_batch(ranks: int, accumulation: int) -> None:
    """Together they see the same samples with the same pixels as one rank alone."""
    alone = take(make_config(), 2)
    parts = [
        take(make_config(train={"accumulation": accumulation}), 2, rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]
    for step in range(2):
        rows = [parts[rank][step][micro] for micro in range(accumulation) for rank in range(ranks)]
        assert torch.cat([row.id for row in rows]).tolist() == alone[step][0].id.tolist()
        assert torch.equal(torch.cat([row.view1 for row in rows]), alone[step][0].view1)
        assert torch.equal(torch.cat([row.view2 for row in rows]), alone[step][0].view2)


def test_it_begins_at_any_step() -> None:
    whole, late = take(make_config(), 9), take(make_config(), 3, first_step=6)
    assert ids(late) == ids(whole)[6:]
    assert torch.equal(late[0][0].view1, whole[6][0].view1)


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_bad_bytes_are_replaced_counted_and_listed(backend: str, tmp_path: Path) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    damage: dict[int, Callable[[bytes], bytes]] = {
        3: lambda _: b"",
        4: lambda _: b"not an image",
        11: lambda data: data[: len(data) // 2],
        20: lambda data: b"\xff\xd8\xff\xd9",
    }
    config = make_config(data={"backend": backend}, train={"batch_size": N})
    log = tmp_path / "corrupt.jsonl"
    (step,) = take(config, 1, Damaged(damage), corrupt_log=log)
    order = global_batch(5, 0, 0, N, N).tolist()
    replacement = {3: 5, 4: 5, 11: 12, 20: 21}
    assert step[0].id.tolist() == [replacement.get(i, i) for i in order]
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == [3, 4, 11, 20]
    assert all(row["reason"] and row["where"] for row in rows)


def test_image_that_only_the_decoder_finds_broken_is_replaced() -> None:
    source = Damaged({})

    def backend(encoded: list[bytes], *params: object) -> tuple[torch.Tensor, torch.Tensor]:
        bad = {i: "broken" for i, data in enumerate(encoded) if data == source.read(7)}
        if bad:
            raise UndecodableError(bad)
        return torch.zeros(len(encoded)), torch.zeros(len(encoded))

    config = make_config(train={"batch_size": N})
    with Loader(config, source, backend) as loader:
        (batch,) = next(iter(loader))
    assert 7 not in batch.id.tolist() and batch.id.tolist().count(8) == 2


def test_budget_for_bad_images() -> None:
    config = make_config(data={"max_corrupt": 2}, train={"batch_size": N})
    with pytest.raises(CorruptBudgetError, match=r"3 undecodable images, more than data\.max_corrupt=2"):
        take(config, 1, Damaged({i: lambda _: b"" for i in (1, 2, 3)}))


def test_wholly_bad_data_ends_instead_of_looping() -> None:
    config = make_config(data={"max_corrupt": 1000}, train={"batch_size": N})
    with pytest.raises(CorruptBudgetError):
        take(config, 1, Damaged({i: lambda _: b"" for i in range(N)}))


def test_error_while_reading_reaches_the_step() -> None:
    def fail(_: bytes) -> bytes:
        raise OSError("shard gone")

    with pytest.raises(OSError, match="shard gone"):
        take(make_config(), 5, Damaged(dict.fromkeys(range(N), fail)))


def test_batch_larger_than_the_data_set() -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size=48 is larger than the data set \(40 images\)"):
        take(make_config(train={"batch_size": 48}), 1)


def test_close_ends_the_thread_and_waiting_is_counted() -> None:
    config = make_config()
    backend, _ = make_backend(config, torch.device("cpu"), torch.float32)
    loader = Loader(config, Damaged({}), backend)
    next(iter(loader))
    assert loader.waited > 0
    loader.close()
    assert "loader" not in [thread.name for thread in threading.enumerate()]


def test_plain_images_are_the_centre() -> None:
    """A 20 x 30 image at size 8: the central 17 x 17 pixels (7/8 of the short side), resized."""
    from pipelines.torch_backend import decode, resize_bicubic

    source, config = Damaged({2: lambda _: b""}), make_config()
    pixels, labels = zip(*plain_images(source, np.array([0, 2, 1]), config, batch_size=2), strict=True)
    assert [len(p) for p in pixels] == [1, 1]  # the broken one is left out
    assert torch.cat(labels).tolist() == source.labels[[0, 1]].tolist()
    expected = resize_bicubic(decode(source.read(1)), 2, 7, 17, 17, 8)
    mean, std = torch.tensor(config.augment.mean), torch.tensor(config.augment.std)
    assert torch.allclose(pixels[1][0].permute(1, 2, 0), (expected - mean) / std, atol=1e-6)


def test_backend_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pipelines.dali_backend", None)  # import fails
    _, reason = make_backend(make_config(data={"backend": "auto"}), torch.device("cpu"), torch.float32)
    assert "torch on the CPU, because DALI is not installed" in reason and "byolt[dali]" in reason
    with pytest.raises(ValueError, match=r"data\.backend=dali needs NVIDIA DALI"):
        make_backend(make_config(data={"backend": "dali"}), torch.device("cpu"), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_batches_made_on_a_stream_of_their_own_are_those_of_the_cpu(backend: str) -> None:
    """The consumer's stream waits for them, and keeps their memory until it is done."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    config = make_config(data={"backend": backend})
    device = torch.device("cuda", torch.cuda.current_device())
    made, _ = make_backend(config, device, torch.float32)
    with Loader(config, Damaged({}), made, device=device) as loader:
        batches = iter(loader)
        ours = [batch.view1 * 1 for _ in range(8) for batch in next(batches)]  # and the views are given up
    with Loader(config, Damaged({}), make_backend(config, torch.device("cpu"), torch.float32)[0]) as loader:
        batches = iter(loader)
        wanted = [batch.view1 for _ in range(8) for batch in next(batches)]
    for view, expected in zip(ours, wanted, strict=True):
        assert view.device == device
        assert (view.cpu() - expected).abs().mean() < 0.02  # a JPEG's decoder rounds differently


def test_back_end_says_what_it_is() -> None:
    pytest.importorskip("pipelines.dali_backend", reason="NVIDIA DALI is not installed")
    for choice, why in {"auto": ", because it is installed", "dali": ""}.items():
        _, reason = make_backend(make_config(data={"backend": choice}), torch.device("cpu"), torch.float32)
        assert reason == f"data.backend={choice}: DALI on the CPU{why}, 1 threads"


def test_loader_draws_by_the_profile() -> None:
    """The first batch of a run is what the back end makes of draws by torchvision's rules."""
    from pipelines.views import draw_both

    config, source = make_config(augment={"profile": "torchvision"}), Damaged({})
    ((batch,),) = take(config, 1, source)
    numbers = batch.id.numpy()
    params = draw_both(config.augment, 5, 0, numbers, source.heights[numbers], source.widths[numbers])
    backend, _ = make_backend(config, torch.device("cpu"), torch.float32)
    view1, view2 = backend([source.read(i) for i in numbers.tolist()], *params)
    assert torch.equal(batch.view1, view1) and torch.equal(batch.view2, view2)
    ((other,),) = take(make_config(), 1, source)
    assert not torch.equal(batch.view1, other.view1)
