"""Small images kept in memory: the same batches as from their bytes, and when that is done."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loader import Damaged, N, make_config

from byolt.configs.schema import Profile
from byolt.pipelines.backends import make_backend, make_resident
from byolt.pipelines.kernels.inputs import Pixels
from byolt.pipelines.kernels.memory import Memory
from byolt.pipelines.loader import Batch, CorruptBudgetError, Loader
from byolt.pipelines.resident import Resident, is_wanted, useful_threads
from byolt.pipelines.sources import SyntheticSource

CPU = torch.device("cpu")


def batches(resident: str, source: SyntheticSource, log: Path | None = None, **data: object) -> list[Batch]:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    view = {"blur": 0.5, "solarize": 0.5}
    config = make_config(
        data={"backend": "dali", "resident": resident, "threads": 2} | data,
        augment={"view1": view, "view2": view},
    )
    kept = make_resident(config, source, CPU, torch.float32)
    assert (kept is not None) == (resident == "always")
    backend, _ = kept or make_backend(config, CPU, torch.float32)
    with Loader(config, source, backend, corrupt_log=log) as loader:
        steps = iter(loader)
        return [batch for _ in range(7) for batch in next(steps)]


def test_small_images_are_decoded_by_one_thread() -> None:
    """More would wait for the interpreter lock."""
    seen = set()

    class Seen(SyntheticSource):
        def read(self, i: int) -> bytes:
            seen.add(threading.get_ident())
            return super().read(i)

    assert [useful_threads(size**2) for size in (1, 32, 64, 224)] == [1, 1, 2, 24]
    Resident(Seen(1024, 20, 30), make_config().augment, CPU, torch.float32, threads=4)
    assert len(seen) == 1


def test_views_are_those_of_the_encoded_images() -> None:
    for kept, decoded in zip(batches("always", Damaged({})), batches("never", Damaged({})), strict=True):
        assert kept.id.tolist() == decoded.id.tolist()
        assert kept.label.tolist() == decoded.label.tolist()
        assert kept.view1.is_contiguous(memory_format=torch.channels_last)
        # DALI's decoder and PIL's agree to the bit, so the views do
        assert torch.equal(kept.view1, decoded.view1)
        assert torch.equal(kept.view2, decoded.view2)


def test_broken_images_are_replaced_and_listed_as_from_bytes(tmp_path: Path) -> None:
    def half(data: bytes) -> bytes:
        return data[: len(data) // 2]

    def wide(_: bytes) -> bytes:
        return SyntheticSource(1, 20, 31).read(0)

    def source() -> Damaged:
        return Damaged({3: half, 4: lambda _: b"", N - 1: wide})

    logs = tmp_path / "kept.jsonl", tmp_path / "decoded.jsonl"
    kept, decoded = batches("always", source(), logs[0]), batches("never", source(), logs[1])
    assert [batch.id.tolist() for batch in kept] == [batch.id.tolist() for batch in decoded]
    assert not {3, 4, N - 1} & {number for batch in kept for number in batch.id.tolist()}
    assert all(torch.equal(a.view1, b.view1) for a, b in zip(kept, decoded, strict=True))
    first, second = (sorted(log.read_text().splitlines()) for log in logs)
    assert first == second
    assert len(first) == 3


def test_ranks_share_what_is_broken(tmp_path: Path) -> None:
    """Each has decoded the whole set, and lists its part: all ranks together list every image once."""
    source = Damaged({i: lambda _: b"" for i in (3, 4, 9, 12, 15)})
    config = make_config(data={"backend": "auto", "resident": "always", "max_corrupt": 3})
    kept = Resident(source, config.augment, CPU, torch.float32, threads=1)
    for rank, expected in enumerate(([4, 12], [3, 9, 15])):
        log = tmp_path / f"{rank}.jsonl"
        with Loader(config, source, kept, rank=rank, world_size=2, corrupt_log=log) as loader:
            next(iter(loader))
            assert loader.corrupt_count == len(expected)
        assert [json.loads(line)["id"] for line in log.read_text().splitlines()] == expected


def test_the_budget_of_broken_images_holds() -> None:
    source = Damaged({3: lambda _: b"", 4: lambda _: b"text"})
    with pytest.raises(CorruptBudgetError, match=r"2 undecodable images, more than data\.max_corrupt=1"):
        batches("always", source, max_corrupt=1)


def test_a_set_without_a_sound_image_is_refused() -> None:
    with pytest.raises(ValueError, match=f"none of the {N} images decodes; the first: empty"):
        Resident(
            Damaged({i: lambda _: b"" for i in range(N)}),
            make_config().augment,
            CPU,
            torch.float32,
            threads=1,
        )


def test_views_have_the_dtype_that_is_asked_for() -> None:
    config, ids = make_config(), np.arange(4)
    expected, actual = (
        Resident(Damaged({}), config.augment, CPU, dtype, threads=1)
        for dtype in (torch.float32, torch.bfloat16)
    )
    with Loader(config, Damaged({}), expected) as loader:
        params = loader._draw(ids, 0)
    assert torch.equal(actual(ids, *params)[0], expected(ids, *params)[0].bfloat16())


@pytest.mark.parametrize("profile", ["byol", pytest.param("torchvision", marks=pytest.mark.slow)])
def test_the_gpu_makes_the_same_views(profile: Profile) -> None:
    """On the GPU, or its kernels in Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    view = {"blur": 0.5, "solarize": 0.5}
    config, ids = (
        make_config(augment={"profile": profile, "view1": view, "view2": view}),
        np.array([5, 0, 39]),
    )
    kept, on_cpu = (Resident(Damaged({}), config.augment, d, torch.float32, threads=1) for d in (device, CPU))
    with Loader(config, Damaged({}), on_cpu) as loader:
        params = loader._draw(ids, 0)
    pixels = Pixels(kept._pixels.data_ptr() + kept._starts[ids], kept._boxes[ids])
    views = kept._on_gpu(pixels, params, (3, 8, 8, 3))
    for view, expected in zip(views, on_cpu(ids, *params), strict=True):
        # the values are divided by std
        torch.testing.assert_close(view.permute(0, 3, 1, 2).cpu(), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("count", "height", "width", "wanted"),
    [
        (10, 96, 32, True),
        (10, 97, 32, False),
        (10, 32, 97, False),
        (155_344, 96, 96, True),
        (155_345, 96, 96, False),
    ],
)
def test_auto_keeps_small_images_below_the_limit(count: int, height: int, width: int, wanted: bool) -> None:
    # 155,344 times 96 x 96 x 3 bytes are 4 GiB but 1,536 bytes
    source = SyntheticSource(count, height, width)
    assert is_wanted(make_config().data, source) == wanted
    assert is_wanted(make_config(data={"backend": "auto", "resident": "always"}).data, source)
    assert not is_wanted(make_config(data={"resident": "never"}).data, source)


def test_images_stay_encoded_for_the_torch_back_end() -> None:
    config = make_config(data={"backend": "torch", "resident": "auto"})
    assert is_wanted(config.data, Damaged({}))
    assert make_resident(config, Damaged({}), CPU, torch.float32) is None


def test_memory_is_used_again_only_when_its_tensor_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = []
    empty = np.empty

    def counting(*arguments: object) -> np.ndarray:
        allocated.append(arguments[0])
        return empty(*arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(np, "empty", counting)
    memory = Memory()
    first = torch.from_numpy(memory.take((2, 3)))
    address = first.data_ptr()
    other = memory.take((2, 3))
    assert other.ctypes.data != address and len(allocated) == 2
    row = first[1]
    del first
    assert memory.take((2, 3)).ctypes.data != address  # the row still shows it
    assert len(allocated) == 3
    del row
    del other
    assert memory.take((2, 3)).shape == (2, 3) and len(allocated) == 3  # what is free is enough
    assert memory.take((4, 3)).shape == (4, 3) and len(allocated) == 4
