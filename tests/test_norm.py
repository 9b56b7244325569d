"""Batch norm + shortcut + ReLU: the definition against torch's modules, the kernels against the definition in float64.

With a GPU the kernels run on it (and all tests here are marked gpu), without one in Triton's interpreter on the CPU.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from byolt.model.byol import BYOL, MLP, byol_loss
from byolt.model.kernels import norm as norms
from byolt.model.kernels.norm import BatchNorm, each_view
from byolt.model.resnet import BACKBONES, BasicBlock, Bottleneck, make_encoder

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [pytest.mark.gpu] if ON_GPU else []
MODES = ["none", "identity", "norm", "pool"]  # the shortcut, or max-pool


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """They compute on the CPU too."""
    module = pytest.importorskip("byolt.model.kernels.norm_triton", reason="triton is not installed")
    monkeypatch.setattr(norms, "FUSED_DEVICES", {"cpu", "cuda"})
    return module


@contextmanager
def unfused() -> Iterator[None]:
    """The definition computes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "FUSED_DEVICES", set())
        yield


class Case(NamedTuple):
    """A layer's inputs, on the CPU, in the dtype that the layer gets."""

    x: Tensor
    other: Tensor  # the shortcut
    slopes: Tensor
    slopes2: Tensor  # of the output's second use
    mode: str
    relu: bool
    views: int


def make_case(
    shape: list[int], mode: str, relu: bool = True, views: int = 2, dtype: torch.dtype = torch.float32
) -> Case:
    generator = torch.Generator().manual_seed(5)
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    x, *more = (torch.randn(shape, generator=generator).to(dtype, memory_format=layout) for _ in range(4))
    x = x * torch.linspace(0.5, 3, shape[0]).to(dtype).view(-1, *[1] * (len(shape) - 1)) + 1  # views differ
    return Case(x, *more, mode, relu, views)  # type: ignore[arg-type]


def layers(channels: int, mode: str, dtype: torch.dtype) -> list[BatchNorm]:
    """The norm, and the shortcut's; nothing in them has a special value."""
    made = []
    for index in range(1 + (mode == "norm")):
        layer = BatchNorm(channels).to(dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-0.5, 2, channels) + index)
            layer.bias.copy_(torch.linspace(1, -1, channels))
            layer.running_mean.fill_(0.3)
            layer.running_var.fill_(2.0)
        made.append(layer)
    return made


def measure(
    case: Case, dtype: torch.dtype, device: torch.device = DEVICE, twice: bool = False
) -> dict[str, Tensor]:
    """Output, gradients, running statistics of a layer that computes in `dtype` parameters and the case's own inputs."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made = [layer.to(device) for layer in layers(case.x.shape[1], case.mode, wide)]
    x, other, slopes, slopes2 = (t.detach().to(device, dtype) for t in case[:4])
    x.requires_grad_()
    other.requires_grad_()
    BatchNorm.views = case.views
    try:
        output = made[0](
            x,
            other if case.mode in ("identity", "norm") else None,
            made[1] if case.mode == "norm" else None,
            relu=case.relu,
            pool=nn.MaxPool2d(3, 2, 1) if case.mode == "pool" else None,
        )
    finally:
        BatchNorm.views = 1
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    assert output.dtype == dtype and output.is_contiguous(memory_format=layout)
    if case.mode == "pool":
        slopes = slopes[:, :, : output.shape[2], : output.shape[3]]
    loss = (output * slopes).sum()
    if twice:
        loss = loss + (getattr(output, "second", output) * slopes2).sum()
    loss.backward()
    found = {"output": output.detach(), "dx": x.grad}
    if other.grad is not None:
        found["dshortcut"] = other.grad
    for index, layer in enumerate(made):
        found |= {f"{name}{index}": getattr(layer, name).grad for name in ("weight", "bias")}
        found |= {f"{name}{index}": getattr(layer, name) for name in ("running_mean", "running_var")}
        assert layer.num_batches_tracked.item() == case.views
    return {name: value.detach().cpu().double() for name, value in found.items()}  # type: ignore[union-attr]


def exact(case: Case, twice: bool = False) -> dict[str, Tensor]:
    with unfused():
        return measure(case, torch.float64, torch.device("cpu"), twice)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest number of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max(), name


# ------------------------------------------------------------------------------------------------ the definition


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("shape", "mode"), [*(([6, 4, 3, 3], mode) for mode in MODES), ([6, 4], "norm")])
def test_the_definition_is_torchs_modules_to_the_bit(
    shape: list[int], mode: str, relu: bool, training: bool
) -> None:
    case = make_case(shape, mode)
    with unfused():
        ours = layers(4, mode, torch.float32)
        theirs = [(nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(4) for _ in ours]
        for a, b in zip(ours, theirs, strict=True):
            b.load_state_dict(a.state_dict())
            a.train(training)
            b.train(training)
        second = case.other if mode in ("identity", "norm") else None
        pool = nn.MaxPool2d(3, 2, 1) if mode == "pool" else nn.Identity()
        found = ours[0](case.x, second, ours[1] if len(ours) > 1 else None, relu, pool)
    expected = theirs[0](case.x)
    if second is not None:
        expected += theirs[1](second) if len(theirs) > 1 else second
    assert torch.equal(found, pool(expected.relu() if relu else expected))
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


@pytest.mark.parametrize("shape", [[6, 4, 3, 3], [6, 4]])
def test_views_of_the_definition_are_passes_one_after_the_other(shape: list[int]) -> None:
    case = make_case(shape, "norm", views=3)
    whole = exact(case)
    made = layers(4, "norm", torch.float64)
    x, other = (t.double().requires_grad_() for t in (case.x, case.other))
    with unfused():
        parts = zip(x.chunk(3), other.chunk(3), strict=True)
        output = torch.cat([made[0](*part, made[1], relu=True) for part in parts])
    (output * case.slopes).sum().backward()
    assert x.grad is not None and other.grad is not None
    found = {"output": output.detach(), "dx": x.grad, "dshortcut": other.grad}
    for index, layer in enumerate(made):
        found |= {f"{name}{index}": getattr(layer, name).grad for name in ("weight", "bias")}
        found |= {f"{name}{index}": getattr(layer, name) for name in ("running_mean", "running_var")}
    assert_close(found, whole, 1e-14)


# ------------------------------------------------------------------------------------------------ the kernels

# Channels and rows that no tile divides, one channel, few rows; slices of several tiles, several blocks of channels.
SHAPES = [[4, 5, 3, 7], [2, 1, 3, 2], [20, 33], [4, 8, 16, 16], [4, 130, 5, 5]]


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(
    ("shape", "mode"), [(s, m) for s in SHAPES for m in MODES if m != "pool" or len(s) == 4], ids=str
)
def test_kernels_equal_the_definition(
    kernels: Any, shape: list[int], views: int, relu: bool, mode: str
) -> None:
    case = make_case(shape, mode, relu, views)
    assert_close(measure(case, torch.float32), exact(case), 3e-6)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_kernels_in_float64(kernels: Any, mode: str, relu: bool) -> None:
    case = make_case([4, 6, 5, 5], mode, relu)
    assert_close(measure(case, torch.float64), exact(case), 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
def test_kernels_in_half_precision(kernels: Any, dtype: torch.dtype, tolerance: float, mode: str) -> None:
    """Only what is written is rounded (Triton's interpreter cuts bfloat16 off): statistics are float32's."""
    case = make_case([4, 24, 6, 6], mode, dtype=dtype)
    found, expected = measure(case, dtype), exact(case)
    assert_close(found, expected, tolerance)
    running = [name for name in expected if "running" in name]
    assert_close({n: found[n] for n in running}, {n: expected[n] for n in running}, 1e-6)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("mode", ["identity", "norm"])
def test_gradients_of_both_uses_of_the_output_are_added(kernels: Any, mode: str, relu: bool) -> None:
    case = make_case([4, 24, 6, 6], mode, relu)
    assert_close(measure(case, torch.float32, twice=True), exact(case, twice=True), 3e-6)


def test_the_second_use_alone_has_a_gradient(kernels: Any) -> None:
    case = make_case([4, 6, 5, 5], "identity")
    layer = layers(6, "identity", torch.float32)[0].to(DEVICE)
    x, other, slopes = (t.to(DEVICE).requires_grad_() for t in case[:3])
    first, second = (
        torch.autograd.grad(name(layer(x, other, relu=True)), x, slopes.detach())[0]
        for name in (lambda output: output, lambda output: output.second)
    )
    assert torch.equal(first, second)


def test_far_from_zero_float32_keeps_its_digits(kernels: Any) -> None:
    """Sums of squares would have lost the variance: 1,000 deviations from 0."""
    case = make_case([4, 6, 9, 9], "none")
    case = case._replace(x=case.x + 1000)
    found, expected = measure(case, torch.float32), exact(case)
    assert_close(found, expected, 3e-4)  # a rounding of the mean is 6e-5 of a deviation
    assert_close({"v": found["running_var0"]}, {"v": expected["running_var0"]}, 1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["x", "other"])
def test_nan_stays_in_its_channel_and_view(kernels: Any, where: str, mode: str) -> None:
    case = make_case([4, 6, 3, 3], mode)
    getattr(case, where)[0, 2, 1, 1] = torch.nan
    with unfused():
        expected = measure(case, torch.float32, torch.device("cpu"))
    found = measure(case, torch.float32)
    for name, value in expected.items():
        assert torch.equal(found[name].isnan(), value.isnan()), name
    assert found["output"].isnan().any() == (where == "x" or mode in ("identity", "norm"))


def test_minus_infinity_in_the_shortcut_is_cut_off(kernels: Any) -> None:
    case = make_case([4, 6, 3, 3], "identity")
    case.other[0, 0, 0, 0] = -torch.inf
    assert measure(case, torch.float32)["output"][0, 0, 0, 0] == 0


def test_the_same_batch_gives_the_same_bits(kernels: Any) -> None:
    case = make_case([4, 40, 9, 9], "norm")
    runs = [measure(case, torch.float32, twice=True) for _ in range(2)]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_other_layouts_and_modes_go_by_the_definition(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "normalize", None)
    layer = layers(6, "none", torch.float32)[0].to(DEVICE)
    x = torch.randn(4, 6, 3, 3, device=DEVICE)
    layer(x)  # contiguous
    layer.eval()(x.contiguous(memory_format=torch.channels_last))
    layer.train().momentum = None  # a cumulative average
    layer(x.contiguous(memory_format=torch.channels_last))
    assert layer.num_batches_tracked.item() == 2


def test_what_cannot_be_normalized_is_refused(kernels: Any) -> None:
    layer = layers(6, "none", torch.float32)[0].to(DEVICE)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 6, device=DEVICE))
    BatchNorm.views = 2
    try:
        with pytest.raises(ValueError, match="a batch of 3 cannot be cut into 2 views"):
            layer(torch.randn(3, 6, device=DEVICE))
    finally:
        BatchNorm.views = 1
    with pytest.raises(ValueError, match=r"expected \(N, C\) or \(N, C, H, W\)"):
        layer(torch.randn(3, 6, 2, device=DEVICE))


# ------------------------------------------------------------------------------------------------ what it costs


def spy(kernels: Any, monkeypatch: pytest.MonkeyPatch, x: Tensor, runs: bool = True) -> list[float]:
    """For each launch the bytes of the tensors as large as x, or as x pooled, that it reads or writes, over those of x."""
    launches: list[float] = []

    class Spy:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable:
            def launch(*args: Any, **settings: Any) -> None:
                large = [
                    a for a in args if isinstance(a, Tensor) and a.numel() in (x.numel(), x.numel() // 4)
                ]
                launches.append(sum(a.nbytes for a in large) / x.nbytes)
                if runs:
                    self.kernel[grid](*args, **settings)

            return launch

    for name in ("_moments", "_merge", "_normalize", "_pool", "_reduce", "_add", "_propagate"):
        monkeypatch.setattr(kernels, name, Spy(getattr(kernels, name)))
    return launches


# Mode, second gradient of the output: launches and passes over the batch, forward and backward.
COSTS = {
    ("none", False): ((3, 3), (3, 5)),
    ("identity", False): ((3, 4), (3, 7)),
    ("identity", True): ((3, 4), (3, 8)),
    ("norm", False): ((5, 5), (3, 8)),
    ("norm", True): ((5, 5), (3, 10)),
    ("pool", False): ((3, 2 + 0.25 + 0.125), (3, 3 + 2 * (0.25 + 0.125))),
}


@pytest.mark.parametrize(("mode", "twice"), COSTS)
def test_launches_and_traffic_of_a_layer(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, mode: str, twice: bool
) -> None:
    """torch's batch norm, addition and ReLU: 3 + 3 + 2 passes forward, 2 + 3 + 5 backward."""
    case = make_case([4, 8, 16, 16], mode, dtype=torch.float16)
    launches = spy(kernels, monkeypatch, case.x)
    measure(case, torch.float16, twice=twice)
    forward, backward = COSTS[mode, twice]
    assert (len(launches), sum(launches)) == (forward[0] + backward[0], forward[1] + backward[1])
    assert sum(launches[: forward[0]]) == forward[1]


@pytest.mark.parametrize(("backbone", "launches"), [("resnet8", 86), ("resnet18", 180), ("resnet50", 472)])
def test_launches_of_a_step(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, backbone: str, launches: int
) -> None:
    """Both networks forward and the online one backward: 3 for each norm, and 2 more forward for a shortcut's."""
    model = BYOL(make_encoder(backbone, "cifar"), 8, 4, 8).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    view = torch.randn(2, 3, 8, 8, device=DEVICE).contiguous(memory_format=torch.channels_last)
    launched = spy(kernels, monkeypatch, view, runs=False)
    byol_loss(model.online(view, view), *model.target(view, view)).backward()
    assert len(launched) == launches


@pytest.mark.parametrize("mode", MODES)
def test_backward_keeps_no_more_than_torchs_modules(kernels: Any, mode: str) -> None:
    def kept() -> int:
        found: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        made = layers(8, mode, torch.float32)
        x, other = (t.to(DEVICE).requires_grad_() for t in make_case([4, 8, 16, 16], mode)[:2])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            second = made[1].to(DEVICE) if len(made) > 1 else None
            pool = nn.MaxPool2d(3, 2, 1) if mode == "pool" else None
            shortcut = other if mode in ("identity", "norm") else None
            output = made[0].to(DEVICE)(x, shortcut, second, relu=True, pool=pool)
        del output
        return sum(found.values())

    fused = kept()
    with unfused():
        assert fused <= kept()


# ------------------------------------------------------------------------------------------------ whole networks


def both_ways(
    model: BYOL, view1: Tensor, view2: Tensor, dtype: torch.dtype | None = None
) -> list[dict[str, Tensor]]:
    """Output, loss, gradients and state of one batch by the kernels, and of two passes by the definition."""

    def go() -> dict[str, Tensor]:
        mine = copy.deepcopy(model)
        with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype is not None):
            online, (projection1, projection2) = mine.online(view1, view2), mine.target(view1, view2)
        loss = byol_loss(online, projection1, projection2)
        loss.backward()
        gradients = {f"d {name}": p.grad for name, p in mine.online.named_parameters()}
        outputs = {"loss": loss.detach(), "features1": online.features1, "projection2": projection2}
        found = outputs | gradients | dict(mine.state_dict())
        return {name: value.detach().double().cpu() for name, value in found.items()}  # type: ignore[union-attr]

    fused = go()
    with unfused():
        return [fused, go()]


def make_network(backbone: str, stem: str) -> BYOL:
    """In float64; the last scales of bottlenecks are 0 no more."""
    torch.manual_seed(0)
    encoder: Any = bottlenecks() if backbone == "bottlenecks" else make_encoder(backbone, stem)
    model = BYOL(encoder, projector_hidden=8, projector_size=4, predictor_hidden=8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bn3.weight"):
                p.fill_(0.5)
    return model.to(DEVICE, torch.float64, memory_format=torch.channels_last)  # type: ignore[call-overload]


def bottlenecks() -> nn.Module:
    """An encoder of two bottlenecks, the second with the identity as shortcut."""
    shortcut = nn.Sequential(nn.Conv2d(3, 8, 1, stride=2, bias=False), BatchNorm(8))
    first = Bottleneck(3, 2, stride=2, downsample=shortcut)
    blocks = first, Bottleneck(8, 2), Bottleneck(8, 2)
    encoder = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder.num_features = 8
    return encoder


def two_views(size: int) -> tuple[Tensor, Tensor]:
    """In float64; they differ in mean and deviation."""
    view1, view2 = torch.randn(2, 3, 3, size, size, dtype=torch.float64).to(DEVICE)
    view1, view2 = (v.contiguous(memory_format=torch.channels_last) for v in (view1, 2 * view2 + 1))
    return view1, view2


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Outputs, gradients, running statistics (view 1, then view 2) and counters, to float64's rounding."""
    assert found.keys() == expected.keys()
    assert {value.item() for name, value in found.items() if "num_batches_tracked" in name} == {2}
    largest = max(value.abs().max() for name, value in expected.items() if name.startswith("d "))
    for name, value in expected.items():
        scale = largest if name.startswith("d ") else value.abs().max().clamp_min(1e-3)
        assert (found[name] - value).abs().max() <= 1e-9 * scale, name


@pytest.mark.parametrize(
    ("backbone", "stem", "size"),
    [
        ("bottlenecks", "cifar", 8),
        pytest.param("resnet8", "imagenet", 32, marks=pytest.mark.slow),
        pytest.param("resnet18", "cifar", 8, marks=pytest.mark.slow),
        *([("resnet50", "imagenet", 32)] if ON_GPU else []),  # the interpreter takes more than 20 minutes
    ],
)
def test_both_views_in_one_batch_are_two_passes(kernels: Any, backbone: str, stem: str, size: int) -> None:
    assert_equal(*both_ways(make_network(backbone, stem), *two_views(size)))


@pytest.mark.slow
def test_every_norm_of_every_backbone_is_ours() -> None:
    """So that the networks below stand for those of more, or wider, blocks of the same two kinds."""
    with torch.device("meta"):
        for backbone in BACKBONES:
            kinds = {type(module) for module in make_encoder(backbone, "imagenet").modules()}
            assert {kind for kind in kinds if issubclass(kind, _NormBase)} == {BatchNorm}
            assert len(kinds & {BasicBlock, Bottleneck}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "stem"),
    [
        *((name, "imagenet") for name in ("resnet8", "resnet8_half", "resnet18", "resnet50")),
        ("resnet18", "cifar"),
    ],
)
def test_a_backbone_in_one_batch_by_the_definition(
    monkeypatch: pytest.MonkeyPatch, backbone: str, stem: str
) -> None:
    """What the interpreter would take minutes for: every norm of a network gets the views."""
    model, views = make_network(backbone, stem), two_views(32)
    monkeypatch.setattr(BatchNorm, "forward", BatchNorm.define)
    monkeypatch.setattr(norms, "FUSED_DEVICES", {DEVICE.type})
    assert_equal(*both_ways(model, *views))


def test_networks_whose_norms_are_not_ours_keep_two_passes(kernels: Any) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(DEVICE)
    view1, view2 = torch.randn(5, 3, device=DEVICE), 1 + torch.randn(5, 3, device=DEVICE)
    found = each_view(network, view1, view2)
    assert torch.equal(found[0], network(view1)) and torch.equal(found[1], network(view2))
    mlp = MLP(3, 4, 2).to(DEVICE)
    uneven = each_view(mlp, view1, view2[:4])
    torch.testing.assert_close(uneven[1], mlp(view2[:4]))
    assert BatchNorm.views == 1


@pytest.mark.parametrize(
    ("backbone", "dtype"),
    [
        ("resnet8", torch.float16),  # bfloat16 is cut off by Triton's interpreter
        *(pytest.param("resnet18", d, marks=pytest.mark.gpu) for d in (None, torch.bfloat16, torch.float16)),
    ],
)
@pytest.mark.slow
def test_a_network_is_as_close_to_float64_as_by_torchs_modules(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, backbone: str, dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, views = make_network(backbone, "imagenet"), two_views(32)
    with unfused():
        exact = both_ways(model, *views)[1]
    view1, view2 = (view.float() for view in views)
    fused, defined = (split(found) for found in both_ways(model.float(), view1, view2, dtype))
    for name, value in split(exact).items():
        ours, torchs = ((found[name] - value).norm() / value.norm() for found in (fused, defined))
        assert ours <= 1.5 * torchs + 1e-5, name


def split(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Vectors of all outputs, of all gradients and of all running statistics."""
    kinds: dict[str, list[Tensor]] = {"outputs": [], "gradients": [], "statistics": []}
    for name, value in found.items():
        kind = "gradients" if name.startswith("d ") else "statistics" if "running" in name else "outputs"
        if kind != "outputs" or "." not in name:
            kinds[kind].append(value.flatten())
    return {kind: torch.cat(values) for kind, values in kinds.items()}


@pytest.mark.gpu
def test_the_host_does_not_wait(kernels: Any) -> None:
    model = BYOL(make_encoder("resnet8", "cifar"), 8, 4, 8).to(DEVICE, memory_format=torch.channels_last)
    view = torch.randn(4, 3, 16, 16, device=DEVICE).contiguous(memory_format=torch.channels_last)

    def go() -> None:
        byol_loss(model.online(view, -view), *model.target(view, -view)).backward()

    go()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        go()
    finally:
        torch.cuda.set_sync_debug_mode("default")


COMPILE = """
import itertools, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from byolt.model.kernels import norm_triton

BATCH = ("slopes", "slopes2", "x", "y", "shortcut", "passed", "dx", "dshortcut")
COUNTS = ("rows", "channels", "side_y", "side_x", "slice_rows", "count_parts")
SHAPE = {"height": 32, "width": 128, "eps": 1e-5, "momentum": 0.1, "views": 2}
cases = [dict(name=name, relu=True, whole=True, absent=()) for name in ("_moments", "_merge", "_add")]
cases += [dict(name="_moments", relu=True, whole=False, absent=())]
cases += [dict(name="_merge", relu=True, whole=True, absent=("weight", "running_mean", "running_var", "tracked"))]
cases += [dict(name="_add", relu=True, whole=True, absent=("moments2",))]
modes = [("shortcut", "moments2", "bias2", "slopes2", "y", "passed"), ("moments2", "bias2"), ("y", "passed")]
for name, whole, absent in itertools.product(("_normalize", "_reduce", "_propagate"), (True, False), modes):
    absent = tuple(n for n in absent if name == "_reduce" or n != "y")
    cases.append(dict(name=name, relu=True, whole=whole, absent=(*absent, "index", "side_y", "side_x")))
cases += [dict(name=name, relu=True, whole=True, absent=modes[0]) for name in ("_reduce", "_propagate")]
cases += [dict(name="_pool", relu=True, whole=False, absent=())]
out = []
for case, (capability, kind) in itertools.product(cases, ((80, "bf16"), (90, "bf16"), (90, "fp32"))):
    kernel = getattr(norm_triton, case["name"])
    constants = {k: v for k, v in {**SHAPE, "relu": case["relu"], "whole": case["whole"]}.items() if k in kernel.arg_names}
    constants |= {k: None for k in case["absent"] if k in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in COUNTS:
            signature[name] = "i32"
        else:
            others = {"tracked": "*i64", "index": "*u8"}
            signature[name] = f"*{kind}" if name in BATCH else others.get(name, "*fp32")
    source = ASTSource(kernel, signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    out.append([f"{case} {capability} {kind}", len(made.asm["cubin"]), made.asm["ptx"]])
json.dump(out, sys.stdout)
"""


@pytest.mark.slow
def test_kernels_compile_for_an_a100_and_an_h100(compiled: Callable[[str], list[list[Any]]]) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert len(compiled(COMPILE)) == 27 * 3
