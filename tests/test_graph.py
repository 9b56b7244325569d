"""The step as a CUDA graph: its host side on the CPU, with a stand-in that records a function and replays it."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

triton = pytest.importorskip("triton", reason="triton is not installed")

from byolt.configs import schema  # noqa: E402
from byolt.model import graph  # noqa: E402
from byolt.model.byol import BYOL  # noqa: E402
from byolt.model.distributed import World  # noqa: E402
from byolt.model.graph import Graph, choose_graph  # noqa: E402
from byolt.model.kernels import lars_triton  # noqa: E402
from byolt.model.optim import LARS  # noqa: E402
from byolt.model.resnet import make_encoder  # noqa: E402
from byolt.model.step import TrainStep  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ON_GPU = torch.cuda.is_available()
on_cpu = pytest.mark.skipif(ON_GPU, reason="runs in Triton's interpreter")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Linear(nn.Linear):
    """An encoder of 16 features."""

    num_features = 16


class Recorder:
    """In place of graph._Cuda: capturing runs nothing that lasts, replaying runs the function on its own inputs."""

    lasting: ClassVar[list[Tensor]] = []  # what a function changes and a capture does not

    def __init__(self, device: torch.device) -> None:
        self.events: list[str] = []

    def run(self, function: Callable[[], Any]) -> Any:
        self.events.append("run")
        return function()

    def capture(self, function: Callable[[], Any]) -> Any:
        self.events.append("capture")
        before = [x.detach().clone() for x in self.lasting]
        self.function, self.outputs = function, function()
        with torch.no_grad():
            for x, old in zip(self.lasting, before, strict=True):
                x.copy_(old)
        return self.outputs

    def replay(self) -> None:
        self.events.append("replay")
        tree_map(lambda old, new: old.copy_(new), self.outputs, self.function())


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(graph, "_Cuda", Recorder)
    monkeypatch.setattr(Recorder, "lasting", [])
    return Recorder


def test_a_graph_is_eager_then_captured_then_replayed(recorder: type[Recorder]) -> None:
    refreshed: list[int] = []
    double = Graph(
        lambda xs: (xs[0] * 2, [xs[1] + 1]), lambda: refreshed.append(len(double.cuda.events)), CPU
    )  # type: ignore
    inputs = [torch.full((2,), float(i)) for i in range(6)]
    results = [double([x, x]) for x in inputs[:5]]
    assert double.cuda.events == ["run"] * 3 + ["capture", "replay", "replay"]
    assert refreshed == [4, 5]  # before each replay
    assert [r[0].tolist() for r in results[:3]] == [[0, 0], [2, 2], [4, 4]]
    assert (
        results[3][0] is results[4][0]
        and results[4][0].tolist() == [8, 8]
        and results[4][1][0].tolist() == [5, 5]
    )
    assert all(x.tolist() == [i, i] for i, x in enumerate(inputs)), "the caller's tensors are not the graph's"
    assert double([torch.ones(3), torch.ones(3)])[0].tolist() == [2, 2, 2]  # another form: captured anew
    assert double.cuda.events[-2:] == ["capture", "replay"]


def make(
    cuda_graph: bool,
    device: torch.device = CPU,
    encoder: nn.Module | None = None,
    trust: str = "scale",
    **settings: Any,
) -> TrainStep:
    torch.manual_seed(0)
    model = BYOL(
        encoder or Linear(12, 16, bias=False), projector_hidden=32, projector_size=8, predictor_hidden=32
    )
    rates = {"weight_decay": 1e-3, "trust_coefficient": 0.02, "trust": trust}
    optimizer = LARS(model.online.parameters(), 0.0, **rates, backend="triton")  # type: ignore[arg-type]
    world = World(0, 0, 1, device, "none")
    return TrainStep(model, optimizer, world, **{"precision": "fp32", **settings}, cuda_graph=cuda_graph)


def lasting(step: TrainStep) -> list[Tensor]:
    momenta = [step.optimizer.state[p].get("momentum") for p in step.model.online.parameters()]
    return [*step.model.state_dict().values(), *(m for m in momenta if m is not None)]


def views(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, *shape, generator=generator)
    return first, second


@on_cpu
@pytest.mark.parametrize(
    ("accumulation", "trust"),
    [(1, "scale"), (2, "scale"), pytest.param(1, "clip", marks=pytest.mark.slow)],
)
def test_replayed_steps_are_the_eager_ones_to_the_bit(
    accumulation: int, trust: str, recorder: type[Recorder]
) -> None:
    """Schedules of both rates, gauges on demand, and steps that are not finite, before and after the capture."""
    runs = []
    for cuda_graph in (False, True):
        step, results = make(cuda_graph, accumulation=accumulation, trust=trust), []
        for k in range(7):
            pairs = [views(10 * k + i, 8, 12) for i in range(accumulation)]
            if k in (1, 5):
                pairs[0][0][3, 4] = float("nan")
            recorder.lasting = lasting(step)
            result = step(pairs, lr=0.1 * k, tau=0.9 + 0.01 * k, gauges=k % 2 == 0)
            results += [*result[:3], *(result.gauges or ()), *(f.clone() for f in result.features1)]
        runs.append([*results, *lasting(step)])
    assert step.graph and step.graph.cuda.events.count("replay") == 4
    assert len(runs[0]) == len(runs[1])
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*runs, strict=True))


class Operations(TorchDispatchMode):
    """Every operation of torch and launch of a kernel, with all arguments that are not tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "profiler" not in str(function):
            self.add(str(function), *args, *(kwargs or {}).items())
        return function(*args, **(kwargs or {}))

    def add(self, name: str, *args: Any) -> None:
        self.seen.append((name, tree_map(lambda x: "tensor" if isinstance(x, Tensor) else x, args)))


@on_cpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_step_takes_nothing_from_the_host(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps at other rates are the same operations with the same numbers; none reads a tensor, none uploads."""
    step, operations = make(False, precision=precision), Operations()
    for name in ("norms", "ratios", "update", "keep"):

        def launcher(grid: Any, name: str = name) -> Any:
            return lambda *args, **kwargs: operations.add(name, grid, args, kwargs)

        monkeypatch.setattr(
            lars_triton, name, type("", (), {"__getitem__": lambda self, grid, f=launcher: f(grid)})()
        )
    seen = []
    for k in range(3):
        step.update.set_rates(0.1 * k, 0.9 + 0.01 * k)
        batch, operations.seen = [*views(k, 8, 12)], []
        with monkeypatch.context() as capturing, operations:
            if k:  # addresses are refreshed between capture and replay
                capturing.setattr(step.update, "refresh", lambda: None)
            step._run(batch)
        seen.append(operations.seen)
    assert len(seen[1]) > 50 and seen[1] == seen[2]
    assert [name for name, _ in seen[1] if name in ("keep", "norms", "ratios", "update")] == [
        "keep", "norms", "ratios", "update"
    ]  # fmt: skip
    read = ("_local_scalar_dense", "is_nonzero", "_to_copy", "nonzero", "equal")
    reads = [name for name, _ in seen[1] if any(part in name for part in read)]
    assert not reads or (precision == "bf16" and set(reads) == {"aten._to_copy.default"})  # autocast's casts


RECIPE = ROOT / "configs" / "r50_100ep.yaml"


@pytest.mark.parametrize(
    ("overrides", "world", "precision", "reason"),
    [
        ([], World(0, 0, 1, CPU, "none"), "fp32", "the device is cpu"),
        ([], World(0, 0, 2, CUDA, "nccl"), "bf16", "DDP's reductions over 2 ranks are not captured"),
        ([], World(0, 0, 1, CUDA, "none"), "fp16", "fp16's gradient scaler is not captured"),
        (
            ["train.compile=true"],
            World(0, 0, 1, CUDA, "none"),
            "bf16",
            "train.compile=true makes graphs of its own",
        ),
        (
            ["optimizer.backend=foreach"],
            World(0, 0, 1, CUDA, "none"),
            "bf16",
            "backend=foreach takes the learning rate",
        ),
    ],
)
def test_a_step_that_cannot_be_captured(
    overrides: list[str], world: World, precision: str, reason: str
) -> None:
    def decide(setting: str) -> tuple[bool, str]:
        paths = ["data.path=x", "run.out=x", f"train.cuda_graph={setting}"]
        return choose_graph(schema.load(RECIPE, [*paths, *overrides]), world, precision)

    with pytest.raises(ValueError, match=f"train.cuda_graph=true: .*{reason}.*; set train.cuda_graph=auto"):
        decide("true")
    assert decide("false") == (False, "")
    captured, note = decide("auto")
    assert not captured and (reason in note) == (world.device == CUDA)


def test_where_a_step_is_captured() -> None:
    world = World(0, 0, 1, CUDA, "none")
    paths = ["data.path=x", "run.out=x"]
    assert choose_graph(schema.load(RECIPE, [*paths, "train.cuda_graph=true"]), world, "bf16")[0]
    captured, note = choose_graph(schema.load(RECIPE, paths), world, "bf16")
    assert not captured and "not yet measured on a GPU" in note
    with pytest.raises(ValueError, match=r"train.cuda_graph='some'"):
        schema.load(RECIPE, [*paths, "train.cuda_graph=some"])


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "accumulation"), [*itertools.product(["fp32", "bf16"], [1, 2])])
def test_on_a_gpu_replayed_steps_are_the_eager_ones_to_the_bit(precision: str, accumulation: int) -> None:
    """Not yet run."""
    runs = []
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        for cuda_graph in (False, True):
            step, results = (
                make(
                    cuda_graph,
                    CUDA,
                    make_encoder("resnet8", "cifar"),
                    precision=precision,
                    accumulation=accumulation,
                ),
                [],
            )
            for k in range(8):
                pairs = [views(10 * k + i, 16, 3, 32, 32) for i in range(accumulation)]
                if k in (1, 5):
                    pairs[0][0][3, 1, 4, 4] = float("nan")
                if k == 6:  # a resumed run's momentum is a new tensor
                    step.optimizer.load_state_dict(step.optimizer.state_dict())
                result = step([(a.cuda(), b.cuda()) for a, b in pairs], lr=0.1 * k, tau=0.9 + 0.01 * k)
                results += [x.clone() for x in (*result[:3], *result.features1)]
            runs.append([*results, *lasting(step)])
    finally:
        torch.backends.cudnn.deterministic = deterministic
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait() -> None:
    """Not yet run."""
    step = make(True, CUDA, make_encoder("resnet8", "cifar"))
    pair = [tuple(view.cuda() for view in views(1, 16, 3, 32, 32))]
    for _ in range(4):
        step(pair, lr=0.1, tau=0.9)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(pair, lr=0.2, tau=0.99, gauges=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
