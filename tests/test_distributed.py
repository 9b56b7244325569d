"""Two CPU ranks against one rank with the whole batch; torchrun's environment; the helpers."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import distributed
from model.byol import BYOL, make_encoder
from model.distributed import World
from model.optim import LARS
from model.step import TrainStep

ALONE = World(0, 0, 1, torch.device("cpu"), "none")
BATCH, STEPS = 16, 2
ROOT = Path(__file__).resolve().parent.parent


def _train(world: World, accumulation: int) -> dict[str, Any]:
    """Two steps on this rank's share of fixed batches; what must not depend on the number of ranks.

    In float64: in float32 a ReLU whose input is within rounding of 0 may switch, and gradients jump.
    """
    # Ranks above 0 start elsewhere: TrainStep has to make them equal.
    torch.manual_seed(world.rank)
    model = BYOL(
        make_encoder("resnet8", "cifar"), projector_hidden=32, projector_size=16, predictor_hidden=32
    )
    model.double()
    optimizer = LARS(model.online.parameters(), lr=0.0, weight_decay=1e-2, trust_coefficient=0.01)
    step = TrainStep(model, optimizer, world, "fp32", accumulation, channels_last=False)
    generator = torch.Generator().manual_seed(7)
    losses: list[Tensor] = []
    gradients: dict[str, Tensor] = {}
    for k in range(STEPS):
        views = torch.randn(accumulation, 2, BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
        share = views.chunk(world.size, dim=2)[world.rank]
        result = step([(pair[0], pair[1]) for pair in share], lr=0.5, tau=0.9)
        losses.append(distributed.all_reduce_mean(result.loss, world))
        gradients |= {
            f"{k}.{n}": p.grad.clone() for n, p in model.online.named_parameters() if p.grad is not None
        }
    return {
        "losses": torch.stack(losses),
        "gradients": gradients,
        "state": _state(model),
        "finite": result.finite,
    }


def _state(model: BYOL) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = distributed.init("cpu", timeout=30)
    row = torch.tensor([[float(rank), 1.0]])
    norm = nn.BatchNorm2d(3).eval()
    out = {
        "world": (world.rank, world.local_rank, world.size, str(world.device), world.backend, world.is_main),
        "plain": _train(world, accumulation=1),
        "accumulated": _train(world, accumulation=2),
        "float32": _one_norm(world, torch.float32),
        "bfloat16": _one_norm(world, torch.bfloat16),
        "mean": distributed.all_reduce_mean(row, world),
        "row": row,
        "any": [distributed.any_rank(flag, world) for flag in (False, rank == 1, True)],
        "object": distributed.broadcast_object({"step": 10 + rank}, world),
        "rows": distributed.gather_rows(row.repeat(rank + 1, 1), world),
        "labels": distributed.gather_rows(torch.arange(3 - rank), world),
        "eval": (distributed.convert_sync_batchnorm(norm, world)(torch.full((1, 3, 2, 2), 2.0 + rank))),
    }
    distributed.barrier(world)
    torch.save(out, Path(folder) / f"{rank}.pt")
    distributed.shutdown(world)


def _one_norm(world: World, dtype: torch.dtype) -> dict[str, Tensor]:
    """One batch norm forward and backward on uneven shares: rank 0 holds three images, rank 1 one."""
    generator = torch.Generator().manual_seed(3)
    images, slopes = (torch.randn(4, 2, 3, 3, generator=generator).to(dtype) for _ in range(2))
    share = slice(0, 4) if world.size == 1 else slice(0, 3) if world.rank == 0 else slice(3, 4)
    norm: Any = distributed.convert_sync_batchnorm(nn.BatchNorm2d(2, momentum=None), world)
    mine = (5 + images[share]).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = norm(mine)
    (output * slopes[share]).sum().backward()
    assert mine.grad is not None
    statistics = torch.stack([norm.running_mean, norm.running_var])
    return {"output": output.detach(), "gradient": mine.grad, "statistics": statistics}


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two spawned ranks found; everything two ranks can tell comes from this one spawn."""
    folder = tmp_path_factory.mktemp("ranks")
    # A forkserver imports torch once for both.
    torch.multiprocessing.set_forkserver_preload(["torch.nn.parallel", "model.byol", "model.step"])
    torch.multiprocessing.start_processes(
        _worker, (_free_port(), str(folder)), nprocs=2, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any tensor relative to its norm.

    A tensor below a thousandth of the largest norm counts relative to that: the gradient of a bias before a
    batch norm is 0 but for rounding.
    """
    assert found.keys() == expected.keys()
    assert len(expected) > 30
    floor = 1e-3 * max(value.double().norm().item() for value in expected.values())
    return max(
        (found[name].double() - value.double()).norm().item() / max(value.double().norm().item(), floor)
        for name, value in expected.items()
    )


@pytest.mark.parametrize(("name", "accumulation"), [("plain", 1), ("accumulated", 2)])
def test_two_ranks_equal_one_with_the_whole_batch(
    ranks: list[dict[str, Any]], name: str, accumulation: int
) -> None:
    whole = _train(ALONE, accumulation)
    assert bool(whole["finite"])
    for rank in ranks:
        torch.testing.assert_close(rank[name]["losses"], whole["losses"], rtol=1e-10, atol=0)
        assert _relative_error(rank[name]["gradients"], whole["gradients"]) <= 1e-10
        assert _relative_error(rank[name]["state"], whole["state"]) <= 1e-10
        running = {k: v for k, v in whole["state"].items() if "running" in k}
        assert _relative_error({k: rank[name]["state"][k] for k in running}, running) <= 1e-10
    states = [rank[name]["state"] for rank in ranks]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
def test_uneven_shares_low_precision_and_a_cumulative_average(
    ranks: list[dict[str, Any]], dtype: torch.dtype, tolerance: float
) -> None:
    name = str(dtype).removeprefix("torch.")
    whole = _one_norm(ALONE, dtype)
    for what in ("output", "gradient"):
        both = torch.cat([rank[name][what] for rank in ranks])
        assert both.dtype == dtype
        torch.testing.assert_close(both, whole[what], rtol=tolerance, atol=tolerance)
    for rank in ranks:
        torch.testing.assert_close(rank[name]["statistics"], whole["statistics"], rtol=2e-6, atol=0)


def test_in_eval_mode_ranks_do_not_talk(ranks: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(ranks):
        expected = torch.full((1, 3, 2, 2), (2.0 + number) / (1 + 1e-5) ** 0.5)
        torch.testing.assert_close(rank["eval"], expected)


def test_what_ranks_tell_each_other(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["world"] == (0, 0, 2, "cpu", "gloo", True)
    assert ranks[1]["world"] == (1, 1, 2, "cpu", "gloo", False)
    for number, rank in enumerate(ranks):
        assert rank["mean"].tolist() == [[0.5, 1.0]]
        assert rank["row"].tolist() == [[number, 1.0]]
        assert rank["any"] == [False, True, True]
        assert rank["object"] == {"step": 10}
        assert rank["rows"].tolist() == [[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
        assert rank["labels"].tolist() == [0, 1, 2, 0, 1]


def test_a_single_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in distributed._TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    world = distributed.init("cpu")
    assert world == ALONE
    assert world.is_main
    module, x = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.ones(3, 2)
    assert distributed.wrap(module, world) is module
    assert distributed.convert_sync_batchnorm(module, world) is module
    assert type(module[1]) is nn.BatchNorm1d
    with distributed.no_sync(module):
        assert torch.equal(distributed.all_reduce_mean(x, world), x)
    assert torch.equal(distributed.gather_rows(x, world), x)
    assert distributed.any_rank(True, world)
    assert not distributed.any_rank(False, world)
    assert distributed.broadcast_object("a", world) == "a"
    distributed.barrier(world)
    distributed.shutdown(world)
    assert not torch.distributed.is_initialized()


def test_init_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"train\.device=tpu is unknown"):
        distributed.init("tpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="finds 0 GPUs"):
        distributed.init("cuda")
    for name in distributed._TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set"):
        distributed.init("cpu")


RESTARTED = """
import os, torch
from model import distributed
world = distributed.init("cpu", timeout=60)
total = distributed.all_reduce_mean(torch.tensor([float(world.rank)]), world)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and world.rank == 1:
    os._exit(3)
distributed.barrier(world)
os.write(1, f"finished {world.rank} {total.item()}\\n".encode())
distributed.shutdown(world)
"""


@pytest.mark.slow
def test_torchrun_restarts_a_dead_rank(tmp_path: Path) -> None:
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "--max-restarts=1", str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(line for line in done.stdout.splitlines() if "finished" in line) == [
        "finished 0 0.5",
        "finished 1 0.5",
    ]
