"""The back ends of LARS and EMA against the multi-tensor definition; launches and bytes of the fused update.

Without a GPU the kernels run in Triton's interpreter, which conftest.py asks for, and amp_C is a stand-in that has the
signatures of its source and, as its kernels, ignores strides.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime import interpreter  # noqa: E402

from byolt.configs.schema import ModelConfig  # noqa: E402
from byolt.model.byol import make_byol  # noqa: E402
from byolt.model.kernels import lars, lars_triton  # noqa: E402
from byolt.model.kernels.lars import FusedUpdate, unfit  # noqa: E402
from byolt.model.kernels.lars_apex import Apex  # noqa: E402
from byolt.model.kernels.layout import is_dense, like  # noqa: E402
from byolt.model.optim import LARS, fused_update, resolve_backend  # noqa: E402
from byolt.model.update import SeparateUpdate, make_update  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [pytest.mark.gpu] if ON_GPU else []
SETTINGS = {"momentum": 0.9, "weight_decay": 0.05, "trust_coefficient": 0.02}
NAN, INF = float("nan"), float("inf")


def flat(x: Tensor) -> Tensor:
    """The elements in the order of memory, as amp_C's kernels read them."""
    assert x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x.as_strided((x.numel(),), (1,))


class AmpC(ModuleType):
    """The three functions of csrc/amp_C_frontend.cpp; how often each was called."""

    def __init__(self) -> None:
        super().__init__("amp_C")
        self.calls: Counter[str] = Counter()

    def _check(
        self, name: str, chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], depth: int
    ) -> None:
        self.calls[name] += 1
        assert isinstance(chunk_size, int) and noop_flag.dtype == torch.int32
        assert len(tensor_lists) == depth and len({len(xs) for xs in tensor_lists}) == 1 and tensor_lists[0]
        for xs in zip(*tensor_lists, strict=True):
            assert len({x.numel() for x in xs}) == 1

    def multi_tensor_scale(self, chunk_size, noop_flag, tensor_lists, scale: float) -> None:
        self._check("scale", chunk_size, noop_flag, tensor_lists, 2)
        for x, out in zip(*tensor_lists, strict=True):
            flat(out).copy_(flat(x) * scale)

    def multi_tensor_axpby(
        self, chunk_size, noop_flag, tensor_lists, a: float, b: float, arg_to_check: int
    ) -> None:
        self._check("axpby", chunk_size, noop_flag, tensor_lists, 3)
        assert isinstance(arg_to_check, int)
        for x, y, out in zip(*tensor_lists, strict=True):
            flat(out).copy_(a * flat(x) + b * flat(y))

    def multi_tensor_l2norm(
        self, chunk_size, noop_flag, tensor_lists, per_tensor: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        self._check("l2norm", chunk_size, noop_flag, tensor_lists, 1)
        norms = torch.stack([flat(x).norm() for x in tensor_lists[0]])
        return norms.norm()[None], norms if per_tensor else norms[:0]


@pytest.fixture
def amp_c(monkeypatch: pytest.MonkeyPatch) -> AmpC:
    """The stand-in, and apex.multi_tensor_apply.multi_tensor_applier, which passes on to it."""
    stand_in, apex, apply = AmpC(), ModuleType("apex"), ModuleType("apex.multi_tensor_apply")
    apply.multi_tensor_applier = lambda op, noop, lists, *args: op(2048 * 32, noop, lists, *args)
    apex.multi_tensor_apply = apply
    for module in (stand_in, apex, apply):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return stand_in


def odd_parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    """Sizes around a block's, sizes that no 4 divides, every memory layout, norms of 0, a negative zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (8, 3, 3, 3),
        (16, 8),
        (16,),
        (5, 3),
        (1,),
        (),
        (64, 64),
        (4097,),
        (3, 4099),
        (1, 1),
        (7, 1, 1, 1),
    ]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors.append(torch.randn(6, 5, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last))
    tensors.append(
        torch.randn(64, 8, 1, 1, generator=generator).contiguous(memory_format=torch.channels_last)
    )
    tensors += [torch.zeros(4, 4), torch.tensor([-0.0, 0.0, 3.0])]
    return [torch.nn.Parameter(t.to(DEVICE)) for t in tensors]


def set_gradients(parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for index, p in enumerate(parameters):
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        if index == 3:
            p.grad.zero_()


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [(t.view(torch.int32) if t.is_floating_point() else t).detach().clone() for t in tensors]


def error(ours: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest norm of a difference relative to the norm of the tensor."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(ours, wanted, strict=True)]
    return max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)


class Model:
    """Online parameters, the targets of all but the last two, and buffers, under one back end."""

    def __init__(self, backend: str, only: slice = slice(None), **settings: Any) -> None:
        self.online = odd_parameters()[only]
        self.target = [t.detach() for t in odd_parameters(1)[only][:-2]]
        self.buffers = [torch.arange(100.0, device=DEVICE), torch.tensor(7, device=DEVICE)]
        self.optimizer = LARS(self.online, lr=0.0, **SETTINGS, backend=backend, **settings)
        # The stand-in for amp_C takes a CPU's tensors, which make_update refuses to give to the real one.
        make = FusedUpdate if backend == "triton" else SeparateUpdate
        self.update = make(self.optimizer, self.target, self.online[:-2], self.buffers)
        self.update.keep_buffers()

    def step(self, lr: float, tau: float) -> tuple[bool, float]:
        """One update; whether it was finite, and the gradients' norm."""
        self.update.set_rates(lr, tau)
        finite, norm = self.update()
        return bool(finite), norm.item()

    def tensors(self) -> list[Tensor]:
        momenta = [self.optimizer.state[p]["momentum"] for p in self.online]
        return [*(p.detach() for p in self.online), *momenta, *self.target]


def compare(backend: str, steps: int, only: slice = slice(None), **settings: Any) -> None:
    """Against the multi-tensor definition, under schedules of learning rate and tau; some steps are not finite."""
    theirs, ours = Model("foreach", only, **settings), Model(backend, only, **settings)
    for step in range(steps):
        results = []
        for model in (theirs, ours):
            set_gradients(model.online, seed=step)
            if step % 50 == 2:
                model.online[step % 3].grad.view(-1)[-1] = (NAN, INF, -INF, NAN)[step // 50]
            results.append(model.step(lr=0.2 * min(step / 20, 1), tau=0.9 + 0.1 * step / steps))
        assert results[0][0] == results[1][0] == (step % 50 != 2)
        assert results[1][1] == pytest.approx(results[0][1], rel=1e-6, nan_ok=True)
    assert error(ours.tensors(), theirs.tensors()) < 1e-6


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.slow), "apex"])
def test_back_ends_agree_over_200_steps(backend: str, amp_c: AmpC) -> None:
    compare(backend, 200, slice(5))
    assert (set(amp_c.calls) == {"scale", "axpby", "l2norm"}) == (backend == "apex")


@pytest.mark.parametrize("settings", [{}, {"trust": "clip", "decay_all": True}], ids=["scale", "clip"])
@pytest.mark.parametrize("backend", ["triton", "apex"])
def test_back_ends_agree_on_odd_sizes_and_layouts(backend: str, settings: Any, amp_c: AmpC) -> None:
    compare(backend, 5, **settings)


@pytest.mark.filterwarnings("ignore:.* encountered in multiply")
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e30])
def test_a_step_that_is_not_finite_changes_no_bit(bad: float) -> None:
    """Whatever the tensors hold: NaN, infinities, negative zeros; 1e30 squared is beyond float32. The buffers return."""
    model = Model("triton")
    set_gradients(model.online, seed=1)
    model.step(lr=0.1, tau=0.9)
    odd = torch.tensor([NAN, INF, -INF, -0.0, 1e-40], device=DEVICE)
    with torch.no_grad():
        for x in model.tensors():
            if x.numel() >= 32:
                flat(x)[:5] = odd
    set_gradients(model.online, seed=2)
    model.online[6].grad[3, 5] = bad
    model.update.keep_buffers()
    before = bits([*model.tensors(), *model.buffers])
    for b in model.buffers:
        b.add_(1)
    finite, norm = model.step(lr=0.1, tau=0.9)
    assert not finite and not math.isfinite(norm)
    after = bits([*model.tensors(), *model.buffers])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_buffers_of_a_finite_step_stay() -> None:
    model = Model("triton")
    set_gradients(model.online, seed=1)
    model.update.keep_buffers()
    for b in model.buffers:
        b.add_(1)
    assert model.step(lr=0.1, tau=0.9)[0]
    assert model.buffers[0].tolist() == [i + 1.0 for i in range(100)] and model.buffers[1].item() == 8


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.996, 1.0])
def test_target_is_exact_at_both_ends(tau: float) -> None:
    model = Model("triton", slice(5))
    set_gradients(model.online, seed=1)
    before = [t.clone() for t in model.target]
    model.step(lr=0.1, tau=tau)
    for old, t, p in zip(before, model.target, model.online, strict=False):
        torch.testing.assert_close(
            t, torch.lerp(old, p.detach(), 1 - tau), rtol=0, atol=0 if tau in (0, 1) else 1e-6
        )


@pytest.mark.slow
def test_several_hundred_tensors_in_one_table() -> None:
    """Most of one block, one of many; gradients in one bucket at odd offsets, as DDP's, and no two of one size."""
    sizes = [*range(1, 360), 3 * 4096 + 1]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(sum(sizes), generator=generator).to(DEVICE)
    bucket = torch.randn(sum(sizes), generator=generator).to(DEVICE).split(sizes)
    models = [[torch.nn.Parameter(x.clone()[None]) for x in values.split(sizes)] for _ in range(2)]
    for parameters, backend in zip(models, ("triton", "foreach"), strict=True):
        for p, g in zip(parameters, bucket, strict=True):
            p.grad = g[None]
        LARS(parameters, lr=0.5, **SETTINGS, backend=backend).step()
    assert error([p.detach() for p in models[0]], [p.detach() for p in models[1]]) < 1e-6


def test_groups_keep_their_settings_and_idle_parameters_stay() -> None:
    results = []
    for backend in ("triton", "foreach"):
        parameters = odd_parameters()[:8]
        groups: list[dict[str, Any]] = [
            {"params": parameters[:4]},
            {"params": parameters[4:], "lr": 0.5, "momentum": 0.5},
        ]
        optimizer = LARS(groups, lr=0.1, weight_decay=0.1, backend=backend)
        for step in range(3):
            set_gradients(parameters, seed=step)
            parameters[1].grad = parameters[5].grad = None
            optimizer.param_groups[1]["weight_decay"] = 0.1 * step
            optimizer.step()
        assert parameters[1] not in optimizer.state
        results.append([p.detach() for p in parameters])
    assert error(*results) < 1e-6


def test_step_is_gated_by_found_inf_and_ungated_without() -> None:
    """As the multi-tensor step: without the attribute, NaN goes into the weights."""
    (p,), (q,) = odd_parameters()[1:2], odd_parameters()[1:2]
    for x, found in ((p, torch.tensor(1.0, device=DEVICE)), (q, None)):
        optimizer = LARS([x], lr=0.5, backend="triton")
        optimizer.found_inf = found
        x.grad = torch.full_like(x, NAN)
        optimizer.step()
        assert bool(x.isnan().all()) == (found is None)
        assert bool((optimizer.state[x]["momentum"] == 0).all()) == (found is not None)
    LARS(
        [torch.nn.Parameter(torch.ones(2, device=DEVICE))], lr=0.5, backend="triton"
    ).step()  # no gradients: no launch


@pytest.mark.parametrize("backend", ["triton", "apex"])
def test_layouts_that_differ_are_put_in_order(backend: str, amp_c: AmpC) -> None:
    """A contiguous gradient of a channels_last weight, and the momentum of a checkpoint of another layout."""
    results = []
    for name in ("foreach", backend):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(
            torch.randn(6, 5, 3, 3, generator=generator).to(DEVICE, memory_format=torch.channels_last)
        )
        optimizer = LARS([p], lr=0.5, **SETTINGS, backend=name)
        optimizer.state[p]["momentum"] = torch.randn(6, 5, 3, 3, generator=generator).to(DEVICE)
        for _ in range(2):
            p.grad = torch.randn(6, 5, 3, 3, generator=generator).to(DEVICE)
            optimizer.step()
        results.append([p.detach(), optimizer.state[p]["momentum"]])
    assert error(*results) < 1e-6


def test_tables_are_uploaded_only_if_something_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, uploads = Model("triton", slice(5)), []
    upload = lars._upload
    monkeypatch.setattr(lars, "_upload", lambda values, out: (uploads.append(out.shape), upload(values, out)))
    for expected in (3, 0):  # constants, blocks, rows; then nothing
        set_gradients(model.online, seed=1) if expected else None
        uploads.clear()
        model.step(lr=0.1, tau=0.9)
        assert len(uploads) == expected
    address = model.update.weights.rows.data_ptr()
    uploads.clear()
    model.online[0].grad = model.online[0].grad.clone()
    model.step(lr=0.1, tau=0.9)
    assert len(uploads) == 1 and model.update.weights.rows.data_ptr() == address


def test_only_aligned_tensors_are_read_16_bytes_at_once() -> None:
    def aligned(size: int, offset: int) -> bool:
        p = torch.nn.Parameter(torch.zeros(2, size, device=DEVICE))
        p.grad = torch.zeros(2 * size + offset, device=DEVICE)[offset:].view(2, size)
        update = FusedUpdate(LARS([p], 0.1))
        update.refresh()
        return update.weights.aligned

    assert [aligned(size, offset) for size, offset in ((8, 0), (8, 4), (8, 1), (7, 0), (6, 0))] == [
        True, True, False, False, True,
    ]  # fmt: skip


def test_the_step_of_the_target_is_rounded_once() -> None:
    """1 - 0.9999 in float64, then float32; the other way it is wrong in the fourth digit."""
    model = Model("triton", slice(5))
    model.update.set_rates(0.1, 0.9999)
    assert model.update.pace.item() == pytest.approx(1e-4, rel=1e-7)


def test_a_captured_update_that_no_longer_fits_is_refused() -> None:
    model = Model("triton", slice(5))
    set_gradients(model.online, seed=1)
    model.step(lr=0.1, tau=0.9)
    model.update.captured = model.update.weights.form()
    set_gradients(model.online, seed=2)  # other addresses of the same kind
    model.update.refresh()
    model.online[1].grad = model.online[1].grad.T.contiguous().T  # would be copied, but not in each replay
    with pytest.raises(RuntimeError, match="changed after a CUDA graph captured"):
        model.update.refresh()
    model.online[4].grad = None
    with pytest.raises(RuntimeError, match="changed after a CUDA graph captured"):
        model.update.refresh()


def test_a_target_whose_parameter_has_no_gradient_is_refused() -> None:
    model = Model("triton", slice(5))
    with pytest.raises(ValueError, match="3 parameters with a target have no gradient"):
        model.step(lr=0.1, tau=0.9)


def test_which_back_end_updates_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [resolve_backend("auto", device) for device in (cpu, cuda)] == ["foreach", "triton"]
    assert resolve_backend("foreach", cuda) == "foreach"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend in ("triton", "apex"):
        assert resolve_backend(backend, cuda) == backend
        with pytest.raises(
            ValueError, match=f"optimizer.backend={backend} needs a CUDA device, not cpu; set 'auto'"
        ):
            resolve_backend(backend, cpu)


def test_the_back_end_decides_how_a_step_updates() -> None:
    (p,), kinds = odd_parameters()[:1], {"auto": FusedUpdate if ON_GPU else SeparateUpdate}
    kinds |= {"triton": FusedUpdate, "foreach": SeparateUpdate}
    for backend, kind in kinds.items():
        assert type(make_update(LARS([p], 0.1, backend=backend), [], [], [])) is kind
    half = torch.nn.Parameter(p.detach().half())
    assert type(make_update(LARS([half], 0.1), [], [], [])) is SeparateUpdate
    with pytest.raises(
        ValueError, match=r"backend=triton: .*float16, not float32; set optimizer.backend=foreach"
    ):
        make_update(LARS([half], 0.1, backend="triton"), [], [], [])


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(3, dtype=torch.float64), "float64, not float32"),
        (torch.zeros(4, 4)[:, :2], "gaps between its elements"),
        (torch.zeros(1).expand(3), "gaps between its elements"),
        (torch.empty(2**31, device="meta"), "2.31 elements or more"),
        (torch.zeros(3, device="meta"), "the tensors are on 2 devices"),
    ],
)
def test_tensors_that_the_kernels_cannot_update(tensor: Tensor, reason: str) -> None:
    assert re.search(reason, str(unfit([torch.zeros(1), tensor])))
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64, device=DEVICE))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"backend=triton: .*float64.*set optimizer.backend=foreach"):
        LARS([p], lr=0.1, backend="triton").step()
    LARS([p], lr=0.1).step()  # auto: the multi-tensor operations
    assert p.tolist() == pytest.approx([-0.1] * 3)


def test_buffers_that_cannot_be_kept() -> None:
    assert unfit([], [torch.zeros(3), torch.zeros(3, dtype=torch.int64)]) is None
    assert "bool" in str(unfit([], [torch.zeros(3, dtype=torch.bool)]))
    assert "gaps" in str(unfit([], [torch.zeros(4, 4)[:, 0]]))


def test_layouts_are_compared_by_their_order_in_memory() -> None:
    x = torch.randn(6, 5, 1, 1)
    last = x.contiguous(memory_format=torch.channels_last)
    assert like(x, last) is x  # other strides, the same order
    wide = torch.randn(6, 5, 3, 3)
    moved = like(wide, wide.contiguous(memory_format=torch.channels_last))
    assert (
        moved is not wide
        and moved.is_contiguous(memory_format=torch.channels_last)
        and torch.equal(moved, wide)
    )
    assert like(wide.double(), wide).dtype == torch.float32
    assert is_dense(moved) and is_dense(wide.transpose(0, 1)) and not is_dense(moved[..., 0])


class Memory:
    """Counts launches, and bytes that unmasked lanes read and write, in Triton's interpreter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[str] = []
        self.bytes: Counter[str] = Counter()
        builder = interpreter.interpreter_builder
        load, store = type(builder).create_masked_load, type(builder).create_masked_store

        def counted_load(builder, pointers, mask, *rest):
            result = load(builder, pointers, mask, *rest)
            self.bytes[self.launches[-1]] += int(mask.data.sum()) * result.data.itemsize
            return result

        def counted_store(builder, pointers, value, mask, *rest):
            self.bytes[self.launches[-1]] += int(mask.data.sum()) * value.data.itemsize
            return store(builder, pointers, value, mask, *rest)

        monkeypatch.setattr(type(builder), "create_masked_load", counted_load)
        monkeypatch.setattr(type(builder), "create_masked_store", counted_store)
        for name in ("norms", "ratios", "update", "keep"):
            kernel = getattr(lars_triton, name)
            monkeypatch.setattr(lars_triton, name, _Counted(kernel, self.launches))


class _Counted:
    def __init__(self, kernel: Any, launches: list[str]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.launches.append(self.kernel.__name__)
            self.kernel[grid](*args, **options)

        return launch


@pytest.mark.skipif(ON_GPU, reason="counts in Triton's interpreter")
@pytest.mark.parametrize("finite", [True, False])
def test_launches_and_bytes_of_an_update(finite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three launches; per weight 8 bytes for the norms, then 20, and 8 for a target; 2 % for tables and sums.

    A step that is not finite reads the gradients once and restores the buffers.
    """
    n, words = 4 * 4096, 102
    parameters = [torch.nn.Parameter(torch.ones(2, n // 2)), torch.nn.Parameter(torch.ones(n))]
    buffers = [torch.zeros(words - 2), torch.zeros((), dtype=torch.int64)]
    fused = fused_update(
        LARS(parameters, 0.1, backend="triton"), [torch.zeros(2, n // 2)], parameters[:1], buffers
    )
    assert fused
    for p in parameters:
        p.grad = torch.full_like(p, 1.0 if finite else NAN)
    memory = Memory(monkeypatch)
    fused.keep_buffers()
    fused.set_rates(0.2, 0.99)
    fused()
    assert memory.launches == ["keep", "norms", "ratios", "update"]
    wanted = {
        "keep": 8 * words,
        "norms": 8 * 2 * n,
        "ratios": 0,
        "update": 20 * 2 * n + 8 * n if finite else 8 * words,
    }
    for name, bytes_moved in wanted.items():
        assert bytes_moved <= memory.bytes[name] <= 1.02 * bytes_moved + 400, name


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from byolt.model.kernels import lars_triton

types = {"table": "*i64", "buffers": "*i64", "blocks": "*i32", "buffer_blocks": "*i32", "finite": "*i1"}
types |= dict.fromkeys(("count", "rows"), "i32")
out = []
for name in ("norms", "ratios", "update", "keep"):
    kernel = getattr(lars_triton, name)
    for aligned in (True, False) if "aligned" in kernel.arg_names else (None,):
        signature = {k: "constexpr" if k == "aligned" else types.get(k, "*fp32") for k in kernel.arg_names}
        constants = {} if aligned is None else {"aligned": aligned}
        source = ASTSource(kernel, signature, constexprs=constants)
        for capability in (80, 90):
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
            out.append([name, aligned, capability, len(made.asm["cubin"]), made.asm["ptx"]])
json.dump(out, sys.stdout)
"""


@pytest.mark.slow
def test_kernels_compile_for_ampere_and_hopper(compiled: Callable[[str], list[list[Any]]]) -> None:
    """Aligned tensors are read 16 bytes at once."""
    made = compiled(COMPILE)
    assert len(made) == 12
    for name, aligned, capability, _, ptx in made:
        if aligned is not None:
            assert ("ld.global.v4.b32" in ptx) == aligned, (name, capability)
            assert ("st.global.v4.b32" in ptx) == (aligned and name == "update"), (name, capability)


@pytest.mark.gpu
def test_host_does_not_wait() -> None:
    model = Model("triton")
    for sync in ("default", "error"):  # the first compiles
        set_gradients(model.online, seed=1)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(sync)
        try:
            model.update.keep_buffers()
            model.update.set_rates(0.2, 0.99)
            model.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_an_update_runs_at_half_of_the_copy_bandwidth_or_more() -> None:
    """ResNet-50's 35 million weights; the prototype reached 87 % on an H200, where that is 0.34 ms. Not yet run."""
    model = make_byol(ModelConfig(backbone="resnet50", stem="imagenet")).to(DEVICE)
    optimizer = LARS(model.online.parameters(), lr=0.0, **SETTINGS, backend="triton")
    update = make_update(optimizer, *model.ema_parameters(), [*model.buffers()])
    for p in model.online.parameters():
        p.grad = torch.randn_like(p)
    weights, targets = (
        sum(p.numel() for p in part) for part in (model.online.parameters(), model.ema_parameters()[0])
    )
    source = torch.empty(28 * weights + 8 * targets, dtype=torch.uint8, device=DEVICE).chunk(2)
    assert milliseconds(lambda: source[0].copy_(source[1])) > 0.5 * milliseconds(update)


def milliseconds(launch: Callable[[], Any]) -> float:
    """The median of 20."""
    times = []
    for _ in range(23):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launch()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[3:])[10]


@pytest.mark.gpu
def test_the_real_amp_c() -> None:
    """Not yet run."""
    pytest.importorskip("amp_C", reason="NVIDIA's amp_C is not installed")
    compare("apex", 200)


def test_apex_without_amp_c_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(
        ValueError, match=r"amp_C.*from source.*github.com/NVIDIA/apex.*unrelated package.*backend=auto"
    ):
        Apex()
