"""Two CPU ranks against one rank with the whole batch; torchrun's environment; the helpers."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from whole_runs import on_two_ranks

from byolt.configs import command_line
from byolt.files import stop
from byolt.model import distributed
from byolt.model.byol import BYOL
from byolt.model.distributed import World
from byolt.model.kernels import norm as norms
from byolt.model.kernels.norm import BatchNorm, convert_sync_batchnorm
from byolt.model.optim import LARS
from byolt.model.resnet import make_encoder
from byolt.model.step import TrainStep

ALONE = World(0, 0, 1, torch.device("cpu"), "none")
TRAININGS: dict[str, dict[str, int]] = {
    "plain": {"accumulation": 1},
    "accumulated": {"accumulation": 2},
    "fused": {"accumulation": 1, "batch": 4, "steps": 1},
}
ROOT = Path(__file__).resolve().parent.parent


def _train(
    world: World, accumulation: int, batch: int = 16, steps: int = 2, fused: bool = False
) -> dict[str, Any]:
    """Steps on this rank's share of fixed batches; returns results that must not depend on the number of ranks.

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
    if fused:
        norms.FUSED_DEVICES = {"cpu"}
        step.layout = torch.channels_last  # of the images, and so of the convolutions' outputs
    generator = torch.Generator().manual_seed(7)
    losses: list[Tensor] = []
    gradients: dict[str, Tensor] = {}
    for k in range(steps):
        views = torch.randn(accumulation, 2, batch, 3, 8, 8, generator=generator, dtype=torch.float64)
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


def _worker(rank: int, folder: str, fused: bool) -> None:
    if fused and not torch.cuda.is_available():
        import interpreter  # noqa: F401
    world = distributed.init("cpu", timeout=30)
    row = torch.tensor([[float(rank), 1.0]])
    norm = nn.BatchNorm2d(3).eval()
    out = {
        "world": (world.rank, world.local_rank, world.size, str(world.device), world.backend, world.is_main),
        "plain": _train(world, **TRAININGS["plain"]),
        "accumulated": _train(world, **TRAININGS["accumulated"]),
        "norms": {name: _one_norm(world, *case) for name, case in NORMS.items()},
        "mean": distributed.all_reduce_mean(row, world),
        "row": row,
        "any": [distributed.any_rank(flag, world) for flag in (False, rank == 1, True)],
        "object": distributed.broadcast_object({"step": 10 + rank}, world),
        "rows": distributed.gather_rows(row.repeat(rank + 1, 1), world),
        "labels": distributed.gather_rows(torch.arange(3 - rank), world),
        "eval": (convert_sync_batchnorm(norm, world)(torch.full((1, 3, 2, 2), 2.0 + rank))),
    }
    if fused:
        out["fused"] = _train(world, **TRAININGS["fused"], fused=True)
        out["norms"] = {name: _one_norm(world, *case) for name, case in NORMS.items()}
    distributed.barrier(world)
    torch.save(out, Path(folder) / f"{rank}.pt")
    distributed.shutdown(world)


def _one_norm(
    world: World, shape: list[int], layout: torch.memory_format, dtype: torch.dtype, momentum: float | None
) -> dict[str, Tensor]:
    """One batch norm forward and backward on uneven shares: rank 1 holds the last image, rank 0 the others."""
    generator = torch.Generator().manual_seed(3)
    images, slopes = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    share = slice(None) if world.size == 1 else slice(-1) if world.rank == 0 else slice(-1, None)
    plain = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    norm: Any = convert_sync_batchnorm(plain(shape[1], momentum=momentum), world)
    norm.double() if dtype == torch.float64 else norm.float()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, shape[1]))
        norm.bias.copy_(torch.linspace(-1, 1, shape[1]))
    mine = (5 + images[share]).contiguous(memory_format=layout).requires_grad_()
    output = norm(mine)
    assert output.is_contiguous(memory_format=layout)
    (output * slopes[share]).sum().backward()
    assert mine.grad is not None
    statistics = torch.stack([norm.running_mean, norm.running_var])
    parameters = torch.stack([norm.weight.grad, norm.bias.grad])
    return {
        "output": output.detach(),
        "gradient": mine.grad,
        "parameters": parameters,
        "statistics": statistics,
    }


IMAGES, ROWS = [4, 2, 3, 3], [16, 5]
PLAIN, LAST = torch.contiguous_format, torch.channels_last
NORMS = {
    "images": (IMAGES, PLAIN, torch.float32, 0.1),
    "images, channels last": (IMAGES, LAST, torch.float32, 0.1),
    "images, channels last, cumulative": (IMAGES, LAST, torch.float32, None),
    "images, channels last, bfloat16": (IMAGES, LAST, torch.bfloat16, 0.1),
    "images, float64": (IMAGES, PLAIN, torch.float64, 0.1),
    "rows": (ROWS, PLAIN, torch.float32, 0.1),
    "rows, bfloat16": (ROWS, PLAIN, torch.bfloat16, 0.1),
}


def _spawn(folder: Path, fused: bool = False) -> list[dict[str, Any]]:
    """Results of two ranks."""
    on_two_ranks(_worker, str(folder), fused)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return _spawn(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """With the kernels for GPUs, by Triton's interpreter, which takes seconds."""
    return _spawn(tmp_path_factory.mktemp("fused"), fused=True)


FUSED = pytest.param("fused", marks=pytest.mark.slow)


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


@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "accumulated", FUSED])
def test_two_ranks_equal_one_with_the_whole_batch(request: pytest.FixtureRequest, name: str) -> None:
    ranks = request.getfixturevalue("fused" if name == "fused" else "ranks")
    whole = _train(ALONE, **TRAININGS[name])
    assert bool(whole["finite"])
    for rank in ranks:
        torch.testing.assert_close(rank[name]["losses"], whole["losses"], rtol=1e-10, atol=0)
        assert _relative_error(rank[name]["gradients"], whole["gradients"]) <= 1e-10
        assert _relative_error(rank[name]["state"], whole["state"]) <= 1e-10
        running = {k: v for k, v in whole["state"].items() if "running" in k}
        assert _relative_error({k: rank[name]["state"][k] for k in running}, running) <= 1e-10
    states = [rank[name]["state"] for rank in ranks]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("kernels", ["ranks", FUSED])
def test_batch_norm_over_uneven_shares_equals_one_of_the_whole(
    request: pytest.FixtureRequest, kernels: str, name: str
) -> None:
    """By the definition, and by the kernels for GPUs where they take the batch."""
    whole, dtype = _one_norm(ALONE, *NORMS[name]), NORMS[name][2]
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 0.03, torch.float64: 1e-10}[dtype]
    found = [rank["norms"][name] for rank in request.getfixturevalue(kernels)]
    for what in ("output", "gradient"):
        both = torch.cat([rank[what] for rank in found])
        assert both.dtype == dtype
        torch.testing.assert_close(both, whole[what], rtol=tolerance, atol=tolerance)
    added = found[0]["parameters"] + found[1]["parameters"]
    torch.testing.assert_close(added, whole["parameters"], rtol=tolerance, atol=tolerance)
    for rank in found:
        torch.testing.assert_close(rank["statistics"], whole["statistics"], rtol=3e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [PLAIN, LAST])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_on_a_gpu_it_equals_torchs_batch_norm_and_the_host_does_not_wait(
    layout: torch.memory_format, dtype: torch.dtype, tolerance: float
) -> None:
    place = torch.device("cuda", 0)
    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1, device_id=place
    )
    try:
        plain = nn.BatchNorm2d(16).to(place)
        ours = BatchNorm(16).to(place)
        ours.synchronized = True
        generator = torch.Generator(place).manual_seed(0)
        x, slopes = (
            torch.randn(8, 16, 9, 9, device=place, generator=generator).to(dtype, memory_format=layout)
            for _ in range(2)
        )
        inputs = [(3 + x).requires_grad_() for _ in range(3)]
        ours(inputs[2]).backward(slopes)  # NCCL connects
        ours.reset_running_stats()
        ours.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = ours(inputs[0])
            output.backward(slopes)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = plain(inputs[1])
        expected.backward(slopes)
        assert output.is_contiguous(memory_format=layout) and output.dtype == dtype
        pairs = [(output, expected), (inputs[0].grad, inputs[1].grad)]
        pairs += [(getattr(ours, name).grad, getattr(plain, name).grad) for name in ("weight", "bias")]
        pairs += [(getattr(ours, name), getattr(plain, name)) for name in ("running_mean", "running_var")]
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    finally:
        torch.distributed.destroy_process_group()


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
    for name in command_line._TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    world = distributed.init("cpu")
    assert world == ALONE
    assert world.is_main
    module, x = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.ones(3, 2)
    assert distributed.wrap(module, world) is module
    assert convert_sync_batchnorm(module, world) is module
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
    with pytest.raises(ValueError, match=r"train\.device=tpu must be auto, cpu or cuda"):
        distributed.init("tpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"^train\.device=cuda: process 0 .* finds 0 GPUs: set it to cpu$"):
        distributed.init("cuda")
    for name in command_line._TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set"):
        distributed.init("cpu")


def test_address_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        for name, value in {**given, "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"^rank 0 of 2 .* MASTER_PORT={port}: .*EADDRINUSE") as caught:
            distributed.init("cpu", timeout=5)
    assert "\n" not in str(caught.value)


def test_ranks_that_share_a_gpu_are_no_lost_peers() -> None:
    error = torch.distributed.DistBackendError
    assert distributed.is_lost_peer(error("NCCL error: unhandled system error"))
    shared = "ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4000"
    assert not distributed.is_lost_peer(error(shared))


@pytest.mark.parametrize(("number", "slurm"), [(0, True), (3, False)])
def test_a_task_that_sees_its_own_gpu_only_takes_it(
    number: int, slurm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun --gpus-per-task=1; but four tasks of four visible GPUs take one each."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1 if slurm else 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: None)
    monkeypatch.setenv("SLURM_LOCALID", "3")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert distributed._place("auto", 3, "train.device") == torch.device("cuda", number)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    if slurm:
        with pytest.raises(
            ValueError, match=r"finds 1 GPU: set it to cpu, or start fewer \(torchrun's --nproc"
        ):
            distributed._place("auto", 3, "train.device")


@pytest.mark.parametrize("deterministic", [False, True])
def test_how_torch_computes_is_settled_before_cuda_starts(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*command_line._TORCHRUN, "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    for name in ("benchmark", "allow_tf32"):  # put back afterwards
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    seen: list[Any] = []

    def start(place: torch.device) -> None:
        seen.append(place)
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        seen.append(torch.are_deterministic_algorithms_enabled())

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", start)
    try:
        world = distributed.init("auto", deterministic=deterministic)
    finally:
        torch.use_deterministic_algorithms(False)
    assert world.device == torch.device("cuda", 0)
    assert seen == [world.device, ":4096:8" if deterministic else None, deterministic]
    assert torch.backends.cudnn.benchmark is not deterministic
    assert not torch.backends.cudnn.allow_tf32


def test_a_rank_says_that_it_waits_and_lets_signals_end_it(capsys: pytest.CaptureFixture) -> None:
    before = {number: signal.signal(number, lambda number, frame: None) for number in stop.SIGNALS}
    try:
        with distributed._waiting("rank 1 of 2 waits", silent=0.01):
            assert {signal.getsignal(number) for number in before} == {signal.SIG_DFL}
            time.sleep(0.1)
        assert all(callable(signal.getsignal(number)) for number in before)
        with distributed._waiting("never said", silent=5):
            pass
    finally:
        for number, former in before.items():
            signal.signal(number, former)
    assert capsys.readouterr().err == "rank 1 of 2 waits\n"


def test_a_rank_that_got_a_signal_does_not_wait_for_the_others() -> None:
    """While torch was imported, for example: the others may have ended at it."""
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    try:
        with stop.listening():
            handler = signal.getsignal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(stop.Stopped), distributed._waiting("rank 1 of 2 waits"):
                pytest.fail("waits")
            assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@pytest.mark.slow
def test_sigterm_ends_a_rank_that_waits_for_its_master() -> None:
    program = """
import signal
from byolt.model import distributed
signal.signal(signal.SIGTERM, lambda number, frame: None)
waiting = distributed._waiting
distributed._waiting = lambda message: waiting(message, silent=0.2)
distributed.init("cpu", timeout=120)
"""
    ranks = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "9",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | ranks, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stderr
    for line in process.stderr:
        if "rank 1 of 2 waits for the others at MASTER_ADDR=127.0.0.1 MASTER_PORT=9, for up to 2 min" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM


def test_store_that_outlives_a_restart_over_machines_is_warned_of(capfd: pytest.CaptureFixture[str]) -> None:
    alone = {
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    several = alone | {"GROUP_WORLD_SIZE": "2"}
    for environment in ({}, alone, several | {"TORCHELASTIC_USE_AGENT_STORE": "False"}):
        distributed._warn_of_shared_store(environment)
    assert capfd.readouterr().err == ""
    distributed._warn_of_shared_store(several)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capfd.readouterr().err
