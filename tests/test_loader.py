"""The loader: which samples reach which rank, what happens to bad bytes, and that it never hangs."""

import io
import json
import resource
import struct
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from byolt.configs.schema import Config
from byolt.pipelines.backends import make_backend, make_resident
from byolt.pipelines.formats.decode import UndecodableError
from byolt.pipelines.loader import Batch, CorruptBudgetError, Loader
from byolt.pipelines.order import global_batch
from byolt.pipelines.sources import SyntheticSource

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
    where = torch.device("cpu"), torch.float32
    keep = source is not None and config.data.resident == "always"
    backend, _ = (keep and make_resident(config, source, *where)) or make_backend(config, *where)
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


def test_ranks_share_the_global_batches_of_lanes() -> None:
    """Each rank with two micro-batches reads other samples; together they have those of one rank, also later."""
    lanes = {"data": {"order": "lanes"}, "train": {"accumulation": 2}}
    alone = take(make_config(**lanes), 9)
    parts = [take(make_config(**lanes), 4, rank=rank, world_size=2, first_step=5) for rank in range(2)]
    for step in range(4):
        for micro in range(2):
            rows, whole = [part[step][micro] for part in parts], alone[5 + step][micro]
            assert torch.cat([row.id for row in rows]).tolist() == whole.id.tolist()
            assert torch.equal(torch.cat([row.view1 for row in rows]), whole.view1)


@pytest.mark.parametrize("order", ["full", "lanes"])
def test_it_begins_at_any_step(order: str) -> None:
    config = make_config(data={"order": order})
    whole, late = take(config, 9), take(config, 3, first_step=6)
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


@pytest.mark.parametrize("resident", ["never", "always"])
def test_images_above_max_pixels_are_replaced_undecoded(resident: str, tmp_path: Path) -> None:
    large = io.BytesIO()
    Image.new("RGB", (30, 40)).save(large, "PNG")
    source = Damaged({4: lambda _: large.getvalue()})
    source.heights = source.heights.copy()
    source.heights[4] = 40
    backend = "torch" if resident == "never" else "auto"
    config = make_config(
        data={"backend": backend, "resident": resident, "max_pixels": 1199}, train={"batch_size": N}
    )
    log = tmp_path / "corrupt.jsonl"
    (step,) = take(config, 1, source, corrupt_log=log)
    assert 4 not in step[0].id
    [row] = [json.loads(line) for line in log.read_text().splitlines()]
    assert (row["id"], row["reason"]) == (4, "40 x 30 is above the limit of 1,199 pixels")
    config = make_config(
        data={"backend": backend, "resident": resident, "max_pixels": 1200}, train={"batch_size": N}
    )
    assert 4 in take(config, 1, source)[0][0].id


def bad_images() -> dict[str, bytes]:
    """Bytes that are not an image, by name."""
    image = Image.effect_noise((30, 20), 60)

    def encode(picture: Image.Image, kind: str) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        return buffer.getvalue()

    whole = encode(image.convert("RGB"), "JPEG")
    bomb = whole.replace(b"\x08" + struct.pack(">HH", 20, 30), b"\x08" + struct.pack(">HH", 20_000, 20_000))
    assert bomb != whole
    return {
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"this is no image\n" * 20,
        "magic": b"\xff\xd9" + whole[2:],
        "header": whole[:25],
        "CMYK": encode(image.convert("CMYK"), "JPEG"),
        "16 bit": encode(Image.fromarray(np.full((20, 30), 40_000, np.uint16)), "PNG"),
        "GIF": encode(image.convert("P"), "GIF"),
        "400 Mpx": bomb,
        "zeros": bytes(1000),
    }


MAY_DECODE = {"CMYK", "16 bit"}


@pytest.mark.faults
@pytest.mark.parametrize("backend", ["torch", "dali", "resident"])
@pytest.mark.parametrize("batch", [16, 256])
def testbad_images_among_ten_thousand(batch: int, backend: str, tmp_path: Path) -> None:
    """No crash, the same replacements on resume, every one listed once, and memory as if there were no bomb."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    n = 10_000
    data = {"backend": "auto" if backend == "resident" else backend}
    data["resident"] = "always" if backend == "resident" else "never"
    config = make_config(data=data, train={"batch_size": batch})
    order = [global_batch(5, 0, step, n, batch) for step in range(3)]
    bad = bad_images()
    places = np.linspace(0, batch - 1, len(bad)).astype(int)
    ids_of = {int(order[1][place]): name for place, name in zip(places, bad, strict=True)}

    class Source(SyntheticSource):
        def read(self, i: int) -> bytes:
            return bad[ids_of[i]] if i in ids_of else super().read(i)

    source = Source(n, 20, 30)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = take(config, 3, source, corrupt_log=tmp_path / "whole.jsonl")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 500_000  # kB; 400 Mpx are 1.2 GB
    for step, expected in zip(whole, order, strict=True):
        for found, wanted in zip(step[0].id.tolist(), expected.tolist(), strict=True):
            assert found == wanted or wanted in ids_of
            assert found not in ids_of or ids_of[found] in MAY_DECODE
    rows = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    listed = [row["id"] for row in rows]
    assert len(set(listed)) == len(listed)
    assert {ids_of[i] for i in listed} >= bad.keys() - MAY_DECODE
    log = tmp_path / "resumed.jsonl"
    first = take(config, 2, source, corrupt_log=log)
    again = take(config, 2, source, corrupt_log=log, first_step=1)
    assert ids(first) == ids(whole)[:2] and ids(again) == ids(whole)[1:]
    assert torch.equal(again[0][0].view1, whole[1][0].view1)
    assert sorted(json.loads(line)["id"] for line in log.read_text().splitlines()) == sorted(listed)


def test_budget_goes_on_over_a_resume(tmp_path: Path) -> None:
    """Two bad images are listed; a list that a kill cut short, or of another rank, is accepted."""
    log = tmp_path / "corrupt.jsonl"
    rows = [{"id": i, "where": "", "reason": "empty", "rank": rank} for i, rank in ((1, 0), (2, 0), (9, 1))]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"id": 3, "wh')
    config = make_config(data={"max_corrupt": 2}, train={"batch_size": N})
    assert take(config, 1, Damaged({}), corrupt_log=log, first_step=1)
    source = Damaged({3: lambda _: b""})  # the two that are listed are not read again
    for _ in range(2):  # the line that was cut short costs the next one nothing: the third stays listed
        with pytest.raises(CorruptBudgetError, match="3 undecodable images"):
            take(config, 1, source, corrupt_log=log, first_step=1)
        source = Damaged({})


@pytest.mark.parametrize(
    ("listed", "max_corrupt", "said"),
    [
        (3, 2, r"3 undecodable images, more than data\.max_corrupt=2 allows"),
        (N, 1000, f"all {N} images are undecodable: none is left to train on"),
    ],
)
def test_spent_budget_is_refused_on_resume(listed: int, max_corrupt: int, said: str, tmp_path: Path) -> None:
    """Though no new image is undecodable; and with every image listed there is none to take instead."""
    log = tmp_path / "corrupt.jsonl"
    rows = [{"id": i, "where": "", "reason": "empty", "rank": 0} for i in range(listed)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(data={"max_corrupt": max_corrupt})
    with pytest.raises(CorruptBudgetError, match=said) as caught:
        take(config, 1, Damaged({}), corrupt_log=log, first_step=1)
    assert f"if they have been repaired, remove {log} to continue" in str(caught.value)
    log.unlink()
    assert take(config, 1, Damaged({}), corrupt_log=log, first_step=1)


def test_threads_that_read_change_no_batch(tmp_path: Path) -> None:
    """Order, views, replacements and the list of the undecodable, in its order."""
    damage: dict[int, Callable[[bytes], bytes]] = {3: lambda _: b"", 4: lambda _: b"text"}
    logs = {threads: tmp_path / f"{threads}.jsonl" for threads in (1, 3)}
    one, three = (
        take(make_config(data={"threads": threads}), 7, Damaged(damage), corrupt_log=log)
        for threads, log in logs.items()
    )
    assert ids(one) == ids(three)
    assert all(torch.equal(a[0].view1, b[0].view1) for a, b in zip(one, three, strict=True))
    assert logs[1].read_text() == logs[3].read_text() != ""


@pytest.mark.parametrize("ranks", [(2, 1, 2), (1, 4, 8), (8, 2, 4)])
def test_order_does_not_depend_on_the_number_of_ranks(ranks: tuple[int, ...]) -> None:
    """Three epochs of five steps; the number of ranks changes within the second and the third."""
    config = make_config(train={"batch_size": 16}, data={"resident": "never"})
    source = SyntheticSource(83, 20, 30)
    blank = torch.zeros(2, 1)

    def backend(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return blank, blank

    seen: list[int] = []
    for size, steps in zip(ranks, (range(7), range(7, 11), range(11, 15)), strict=True):
        loaders = [
            Loader(config, source, backend, rank=rank, world_size=size, first_step=steps[0])
            for rank in range(size)
        ]
        with ExitStack() as stack:
            batches = [iter(stack.enter_context(loader)) for loader in loaders]
            for _ in steps:
                for rank in batches:
                    seen += next(rank)[0].id.tolist()
    assert seen == [
        i for epoch in range(3) for step in range(5) for i in global_batch(5, epoch, step, 83, 16).tolist()
    ]


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
    with pytest.raises(CorruptBudgetError, match=f"all {N} images are undecodable") as caught:
        take(config, 1, Damaged({i: lambda _: b"" for i in range(N)}))
    assert "data.max_corrupt" not in str(caught.value)  # raising it would not help


def test_error_while_reading_reaches_the_step() -> None:
    def fail(_: bytes) -> bytes:
        raise OSError("shard gone")

    for threads in (1, 2):
        with pytest.raises(OSError, match="shard gone"):
            take(make_config(data={"threads": threads}), 5, Damaged(dict.fromkeys(range(N), fail)))


def test_batch_larger_than_the_data_set() -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size=48 is larger than the data set \(40 images\)"):
        take(make_config(train={"batch_size": 48}), 1)


def test_thread_lives_from_entering_to_leaving_and_waiting_is_counted() -> None:
    def threads() -> int:
        return [thread.name for thread in threading.enumerate()].count("loader")

    config = make_config()
    backend, _ = make_backend(config, torch.device("cpu"), torch.float32)
    loader = Loader(config, Damaged({}), backend)
    assert threads() == 0  # whatever fails before it is entered leaves none behind
    with pytest.raises(RuntimeError, match="only inside its with statement"):
        next(iter(loader))
    with loader:
        next(iter(loader))
        assert loader.waited > 0 and threads() == 1
    assert threads() == 0


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
        if backend == "torch":  # made on the CPU and only moved
            assert torch.equal(view.cpu(), expected)
        assert (view.cpu() - expected).abs().mean() < 0.02  # a JPEG's decoder rounds differently


def test_loader_draws_by_the_profile() -> None:
    """The first batch of a run is what the back end makes of draws by torchvision's rules."""
    from byolt.pipelines.views import draw_both

    config, source = make_config(augment={"profile": "torchvision"}), Damaged({})
    ((batch,),) = take(config, 1, source)
    numbers = batch.id.numpy()
    params = draw_both(config.augment, 5, 0, numbers, source.heights[numbers], source.widths[numbers])
    backend, _ = make_backend(config, torch.device("cpu"), torch.float32)
    view1, view2 = backend([source.read(i) for i in numbers.tolist()], *params)
    assert torch.equal(batch.view1, view1) and torch.equal(batch.view2, view2)
    ((other,),) = take(make_config(), 1, source)
    assert not torch.equal(batch.view1, other.view1)
