"""The GPU's kernels against the definitions in torch and the reference's own numbers: each operation, alone and composed.

Most tests run for both profiles, with the ceilings of tests/test_cpu_kernels.py; the reference's numbers are of profile
byol. With a GPU the kernels run on it, and all tests here are marked gpu. Without one conftest.py selects Triton's
interpreter on the CPU, where a program of a kernel takes milliseconds: images are small, and batched where possible.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
from test_cpu_kernels import OPERATIONS, augment_of, both_profiles, expected, params_of, pictures  # noqa: E402

from byolt.configs.schema import AugmentConfig, Profile, ViewConfig  # noqa: E402
from byolt.pipelines.kernels import cpu as kernels  # noqa: E402
from byolt.pipelines.kernels import gpu, gpu_byol, gpu_torchvision  # noqa: E402
from byolt.pipelines.kernels.inputs import Pixels  # noqa: E402
from byolt.pipelines.views import BRIGHTNESS, CONTRAST, HUE, JITTER_ORDERS, SATURATION, ViewParams, draw  # noqa: E402

tl = triton.language
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [pytest.mark.gpu] if ON_GPU else []
# The interpreter takes three times as long for torchvision's antialias.
byol_first = pytest.mark.parametrize("profile", ["byol", pytest.param("torchvision", marks=pytest.mark.slow)])
# Factor of the interpreter's ceilings on a GPU, where float32 division is within 2 units in the last place and
# multiplications are fused with additions. The other ceilings have that room already.
ROOM = 4 if ON_GPU else 1
EVERYTHING = ViewConfig(flip=0.5, jitter=1.0, gray=0.2, blur=0.8, solarize=0.5)


def upload(images: list[np.ndarray]) -> tuple[Pixels, torch.Tensor]:
    """Whole images uint8 (H, W, 3), one behind the other in the memory of the device."""
    memory = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])).to(DEVICE)
    starts = np.cumsum([0, *(image.size for image in images[:-1])])
    return Pixels(
        memory.data_ptr() + starts, np.array([[0, 0, *image.shape[:2]] for image in images])
    ), memory


def run(
    images: list[np.ndarray], *params: ViewParams, augment: AugmentConfig, dtype: torch.dtype = torch.float32
) -> np.ndarray | torch.Tensor:
    """(views, N, size, size, 3); of a single view without the first axis; a tensor where numpy has no such type."""
    pixels, memory = upload(images)
    shape = len(images), augment.size, augment.size, 3
    outs = [torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in params]
    gpu.make_views(pixels, params, augment, outs)
    result = (outs[0] if len(outs) == 1 else torch.stack(outs)).cpu()
    del memory
    return result.numpy() if dtype == torch.float32 else result


def with_taps(size: int, taps: int, profile: Profile = "byol") -> AugmentConfig:
    """A wider blur than belongs to the size."""
    return SimpleNamespace(profile=profile, size=size, mean=(0, 0, 0), std=(1, 1, 1), blur_taps=taps)  # type: ignore[return-value]


def joined(params: list[ViewParams]) -> ViewParams:
    names = [field.name for field in fields(ViewParams)]
    return ViewParams(**{name: np.concatenate([getattr(part, name) for part in params]) for name in names})


@pytest.mark.parametrize("size", [32, pytest.param(64, marks=pytest.mark.slow)])
def test_resize_equals_reference(size: int, fixtures: Path) -> None:
    with np.load(fixtures / "resize.npz") as data:
        image, wanted = data["in_u8"], data[f"out{size}"]
    ours = run([image], params_of(1, *image.shape[:2]), augment=augment_of(size))[0]
    assert np.abs(ours[: wanted.shape[0], : wanted.shape[1]] - wanted).max() < 1e-5


@pytest.mark.slow
def test_operations_equal_reference(reference: dict[str, np.ndarray]) -> None:
    """At the image's own size the resize is the identity; the other jitter values are neutral. 5 taps at 48 pixels."""
    params = [params_of(1, 48, 48, jitter="/" in name, **OPERATIONS[name]) for name in OPERATIONS]
    params.append(params_of(1, 48, 48, blur=True, sigma=1.0))
    ours = run([reference["in_u8"]] * len(params), joined(params), augment=augment_of(48))
    for name, view in zip([*OPERATIONS, "blur5/1.0"], ours, strict=True):
        assert np.abs(view - reference[name]).max() < 1e-5, name


@pytest.mark.slow
def test_blurs_equal_reference(reference: dict[str, np.ndarray]) -> None:
    sigmas = (0.1, 1.0, 2.0)
    params = joined([params_of(1, 48, 48, blur=True, sigma=sigma) for sigma in sigmas])
    ours = run([reference["in_u8"]] * len(sigmas), params, augment=with_taps(48, 23))
    for sigma, view in zip(sigmas, ours, strict=True):
        assert np.abs(view - reference[f"blur23/{sigma}"]).max() < 1e-5, sigma


def test_composition_equals_reference(reference: dict[str, np.ndarray]) -> None:
    composed = params_of(
        1, 48, 48, jitter=True, order=np.array([[CONTRAST, HUE, SATURATION, BRIGHTNESS]], np.uint8),
        contrast=1.3, hue=0.07, saturation=0.85, brightness=-0.2, blur=True, sigma=1.5, solarize=True,
    )  # fmt: skip
    (ours,) = run([reference["in_u8"]], composed, augment=with_taps(48, 23))
    assert np.abs(ours - reference["compose"]).max() < 1e-5


@pytest.mark.parametrize(
    ("profile", "size"),
    [
        ("byol", 8),
        *(pytest.param("byol", size, marks=pytest.mark.slow) for size in (29, 45)),
        *(pytest.param("torchvision", size, marks=pytest.mark.slow) for size in (8, 29, 45)),
    ],
)
def test_images_of_any_shape_in_one_batch(profile: Profile, size: int) -> None:
    """Random windows, flips and every operation, enlarging and reducing, sizes that no block divides; two views."""
    images, parts = [], ([], [])
    for height, width in [(1, 1), (1, 40), (40, 1), (2, 3), (37, 61), (110, 70)]:
        images += pictures(1, height, width)
        for view, params in enumerate(parts):
            ids, sides = np.array([len(images)]), (np.array([height]), np.array([width]))
            params.append(draw(EVERYTHING, size, 0, ids, view, *sides, profile))
    params, augment = [joined(part) for part in parts], augment_of(size, profile)
    ours = run(images, *params, augment=augment)
    for view, drawn in zip(ours, params, strict=True):
        assert np.abs(view - expected(images, drawn, augment)).max() < 1e-5


@pytest.mark.slow
# The interpreter takes 150 s for the largest.
@pytest.mark.parametrize(("height", "width"), [(500, 20), (20, 500), *([(500, 400)] if ON_GPU else [])])
def test_antialias_over_many_taps(height: int, width: int) -> None:
    """84 taps where 500 pixels become 24."""
    images, augment = pictures(1, height, width), augment_of(24, "torchvision")
    params = params_of(1, height, width, flip=True)
    ours = run(images, params, augment=augment)
    assert np.abs(ours - expected(images, params, augment)).max() < 2e-6 * ROOM


@byol_first
def test_windows_at_the_borders_and_thin_ones(profile: Profile) -> None:
    """Pixels outside the window are never read: other ones around it change nothing, to the bit."""
    (image,) = pictures(1, 40, 50)
    windows = [
        (0, 0, 40, 50), (0, 0, 9, 11), (31, 39, 9, 11), (0, 39, 9, 11), (31, 0, 9, 11), (7, 20, 30, 1),
        (7, 20, 1, 30), (39, 49, 1, 1), (0, 0, 40, 1), (20, 20, 2, 2),
    ]  # fmt: skip
    rows = np.array(windows, np.int32)
    names = ("top", "left", "height", "width")
    params = params_of(len(rows), 40, 50, flip=np.arange(len(rows)) % 2 == 1)
    params = replace(params, **dict(zip(names, rows.T, strict=True)))
    augment = augment_of(32, profile)
    ours = run([image] * len(rows), params, augment=augment)
    assert np.abs(ours - expected([image] * len(rows), params, augment)).max() < 1e-6 * ROOM
    others = []
    for top, left, height, width in windows:
        other = 255 - image
        other[top : top + height, left : left + width] = image[top : top + height, left : left + width]
        others.append(other)
    assert np.array_equal(run(others, params, augment=augment), ours)


@pytest.mark.parametrize(
    "name", ["brightness", "contrast", "saturation", "hue", "gray", "blur", "solarize", "flip"]
)
@byol_first
def test_each_operation_over_its_range(profile: Profile, name: str) -> None:
    """Of the blur 11 pixels on either side of 24: most of what it adds up is beyond the border."""
    count, neutral = 4, 1 if profile == "torchvision" else 0
    images, augment = pictures(count, 26, 24), with_taps(24, 23, profile)
    grid = {
        "brightness": np.linspace(neutral - 1, neutral + 1, count), "contrast": np.linspace(0, 2, count),
        "saturation": np.linspace(0, 2, count), "hue": np.linspace(-0.5, 0.5, count),
    }  # fmt: skip
    changes: dict[str, object] = {"brightness": np.float32(neutral)}
    changes |= {"jitter": True, name: grid[name].astype(np.float32)} if name in grid else {name: True}
    if name == "blur":
        changes["sigma"] = np.linspace(0.05, 5, count, dtype=np.float32)
    params = params_of(count, 26, 24, **changes)
    ours = run(images, params, augment=augment)
    assert np.abs(ours - expected(images, params, augment)).max() < 5e-6
    assert np.abs(ours - expected(images, params_of(count, 26, 24), augment)).max() > 0.01


@pytest.mark.slow
@both_profiles
def test_every_order_of_the_color_operations(profile: Profile) -> None:
    count = len(JITTER_ORDERS)
    images = pictures(1, 30, 30) * count
    params = params_of(
        count, 30, 30, jitter=True, order=JITTER_ORDERS, contrast=np.float32(1.4), saturation=np.float32(1.2),
        brightness=np.float32({"byol": 0.3, "torchvision": 1.3}[profile]), hue=np.float32(-0.08),
    )  # fmt: skip
    augment = augment_of(30, profile)
    wanted = expected(images, params, augment)
    assert len(np.unique(wanted.round(3), axis=0)) > 12  # the orders differ
    assert np.abs(run(images, params, augment=augment) - wanted).max() < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "count"), [("byol", 3), ("torchvision", 1)])
def test_real_size_equals_the_torch_back_end_and_the_cpu_kernels(profile: Profile, count: int) -> None:
    augment = augment_of(224, profile)
    images = pictures(count, 300, 400)
    params = draw(EVERYTHING, 1, 0, np.arange(count), 0, np.full(count, 300), np.full(count, 400), profile)
    blur, sigma = np.array([True, True, False])[:count], np.array([2.0, 0.7, 1], np.float32)[:count]
    params = replace(params, blur=blur, sigma=sigma)
    ours = run(images, params, augment=augment)
    assert np.abs(ours - expected(images, params, augment)).max() < 1e-5
    box = np.array([[0, 0, 300, 400]] * count)
    cpu = np.empty_like(ours)
    kernels.make_views(Pixels(np.array([i.ctypes.data for i in images]), box), [params], augment, [cpu])
    assert np.abs(ours - cpu).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.slow
def test_other_types_are_the_rounded_numbers(dtype: torch.dtype) -> None:
    """Triton's interpreter cuts bfloat16 off instead of rounding it: there, one unit in the last place."""
    images, augment = pictures(3, 30, 40), AugmentConfig(size=24, view1=EVERYTHING, view2=EVERYTHING)
    params = draw(EVERYTHING, 0, 0, np.arange(3), 0, np.full(3, 30), np.full(3, 40))
    exact = torch.from_numpy(run(images, params, augment=augment))
    ours = run(images, params, augment=augment, dtype=dtype)
    assert ours.dtype == dtype
    if dtype == torch.bfloat16 and not ON_GPU:
        assert ((ours.float() - exact).abs() <= exact.abs() * 2**-7).all()
    else:
        assert torch.equal(ours, exact.to(dtype))


def test_normalization() -> None:
    images, augment = pictures(2, 30, 30), AugmentConfig(size=30, view1=EVERYTHING, view2=EVERYTHING)
    params = params_of(2, 30, 30, blur=np.array([True, False]))  # both ways out
    plain = (expected(images, params, augment) - np.array(augment.mean)) / np.array(augment.std)
    assert np.abs(run(images, params, augment=augment) - plain).max() < 1e-5


@pytest.mark.slow
def test_parts_of_a_batch_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many views share the scratch memory, and in a second run, the result is the same to the bit."""
    count = 4
    images, augment = pictures(count, 33, 47), augment_of(24)
    sides = np.full(count, 33), np.full(count, 47)
    params = [draw(EVERYTHING, 0, 0, np.arange(count), view, *sides) for view in (0, 1)]
    whole = run(images, *params, augment=augment)
    monkeypatch.setattr(gpu, "_SCRATCH", 12 * 24 * 24 * 3)  # three views, so 8 are three parts
    assert np.array_equal(run(images, *params, augment=augment), whole)


class Counted:
    """In place of a kernel: counts its launches and programs."""

    def __init__(self) -> None:
        self.grids: list[int] = []

    def __getitem__(self, grid: tuple[int]) -> "Counted":
        self.grids.append(*grid)
        return self

    def __call__(self, *args: object, **options: object) -> None:
        pass


@pytest.mark.parametrize(("size", "count", "parts"), [(32, 512, 1), (96, 256, 1), (224, 256, 5)])
def test_launches_of_a_batch(size: int, count: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both views of a whole batch of small images are made in one sequence of four launches."""
    kernels = {name: Counted() for name in ("_resize", "_color", "_blur_rows", "_blur_columns")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(gpu, name, kernel)
    box = np.array([[0, 0, 40, 50]] * count)
    view1, view2 = ViewConfig(blur=1.0, solarize=0.0), ViewConfig(blur=0.1, solarize=0.2)
    augment = AugmentConfig(size=size, view1=view1, view2=view2)
    params = [draw(view, 0, 0, np.arange(count), 0, box[:, 2], box[:, 3]) for view in (view1, view2)]
    outs = [torch.empty(count, size, size, 3, dtype=torch.bfloat16, device=DEVICE) for _ in params]
    gpu.make_views(Pixels(np.zeros(count, np.int64), box), params, augment, outs)
    assert [len(kernel.grids) for kernel in kernels.values()] == [parts] * 4
    assert kernels["_blur_rows"].grids == kernels["_blur_columns"].grids
    assert sum(kernels["_color"].grids) == 2 * count * -(-size * size // 1024)


@byol_first
def test_part_of_an_image_gives_what_the_whole_gives(profile: Profile) -> None:
    (image,), augment = pictures(1, 90, 80), augment_of(32, profile)
    params = params_of(1, 41, 33, top=30, left=20)
    pixels, memory = upload([np.ascontiguousarray(image[25:80, 18:60])])
    out = torch.empty(1, 32, 32, 3, device=DEVICE)
    pixels = Pixels(pixels.address, np.array([[25, 18, 55, 42]]))
    gpu.make_views(pixels, [params], augment, [out])
    assert np.array_equal(out.cpu().numpy(), run([image], params, augment=augment))
    del memory


@pytest.mark.parametrize("change", [{"top": 50}, {"left": -1}, {"height": 61}, {"width": 0}])
def test_window_outside_the_pixels_is_refused(change: dict[str, int]) -> None:
    params = replace(params_of(1, 60, 60), **{name: np.full(1, value) for name, value in change.items()})
    with pytest.raises(ValueError, match="window"):
        run(pictures(1, 60, 60), params, augment=augment_of(16))


def test_output_of_another_shape_or_layout_is_refused() -> None:
    pixels, memory = upload(pictures(1, 20, 20))
    for out in (torch.empty(1, 16, 16, 4), torch.empty(1, 3, 16, 16).permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match="an output is"):
            gpu.make_views(pixels, [params_of(1, 20, 20)], augment_of(16), [out.to(DEVICE)])
    del memory


_position = gpu_byol.position


@triton.jit
def _positions(floors, rests, length, size: tl.constexpr, block: tl.constexpr):
    place = tl.arange(0, block)
    floor, rest = _position(place, length, size)
    tl.store(floors + place, floor, place < size)
    tl.store(rests + place, rest, place < size)


@pytest.mark.parametrize("size", [8, 24, 45, 96, 224, 512, 1000, 1024])
def test_positions_in_integers_are_those_in_float64(size: int) -> None:
    """Of 1024 pixels some are halfway between two steps of the kernel table. A position at a pixel may be its end."""
    lengths = [1, 2, 3, size - 1, size, size + 1, 333, 500, 4095, 65535]
    for length in lengths:
        floors = torch.empty(size, dtype=torch.int32, device=DEVICE)
        rests = torch.empty(size, device=DEVICE)
        _positions[(1,)](floors, rests, length, size, triton.next_power_of_2(size))
        center = (np.arange(size) + 0.5) * (length / size) - 0.5
        wanted = np.floor(center) + np.rint((center - np.floor(center)) * 1024) / 1024
        assert np.array_equal(floors.cpu().numpy() + rests.cpu().numpy().astype(float), wanted), length
        assert ((rests >= 0) & (rests <= 1)).all()


taps, weight = gpu_torchvision.taps, gpu_torchvision.weight


@triton.jit
def _antialias(
    firsts, counts, weights, length, place, most, size: tl.constexpr, some: tl.constexpr, block: tl.constexpr
):
    """Of `some` places from `place` on: the first tap, how many there are at most, and weights (some, most)."""
    places = place + tl.arange(0, some)
    first, count = taps(places, length, size)
    tl.store(firsts + tl.arange(0, some), first)
    tl.store(counts, count)
    for begin in range(0, most, block):
        tap = begin + tl.arange(0, block)
        at = weights + tl.arange(0, some)[:, None] * most + tap[None, :]
        tl.store(at, weight(places[:, None], first[:, None] + tap[None, :], length, size))


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 333, 500, 65535, 1_000_000])
@pytest.mark.parametrize("size", [16, 224, 1024])
def test_antialias_weights_are_those_in_float64(size: int, length: int) -> None:
    """At both ends of a view and in its middle; as far as a job's sides go, where float32 has no place for the half."""
    stretch, some = max(length / size, 1), 4
    most = triton.next_power_of_2(int(4 * stretch) + 2)
    block = min(most, 2048 if ON_GPU else 1 << 14)  # compiling for a million numbers would take minutes
    for start in (0, size // 2, size - some):
        firsts, counts = (torch.empty(some, dtype=torch.int32, device=DEVICE) for _ in range(2))
        weights = torch.empty(some, most, device=DEVICE)
        _antialias[(1,)](firsts, counts, weights, length, start, most, size, some, block)
        ours, count = weights.cpu().numpy().astype(float), int(counts[0])
        center = (start + np.arange(some) + 0.5) * length / size
        first = np.maximum(np.floor(center - 2 * stretch + 0.5), 0)
        assert np.array_equal(firsts.cpu().numpy(), first)
        tap = first[:, None] + np.arange(most)
        d = np.abs(tap + 0.5 - center[:, None]) / stretch
        near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
        wanted = np.where(tap < length, np.where(d < 1, near, np.where(d < 2, far, 0)), 0)
        assert np.abs(ours - wanted).max() < 1e-6 * ROOM
        assert count <= most and not ours[:, count:].any() and not wanted[:, count:].any()


COMPILE = """
import itertools, json, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from byolt.pipelines.kernels import gpu

norm = {f"{a}_{c}": "fp32" for a in ("scale", "shift") for c in "rgb"}
pointers = {"table": "*i32", "scratch": "*fp32", "blurred": "*fp32", "sums": "*fp32"}
out = []
names = "_resize", "_color", "_blur_rows", "_blur_columns"
for name, profile in itertools.product(names, ("byol", "torchvision")):
    kernel = getattr(gpu, name)
    for kind in (tl.float32, tl.float16, tl.bfloat16) if "kind" in kernel.arg_names else (None,):
        constants = {"size": 224, "block": 256, "strips": 14, "power": 16, "kind": kind, "profile": profile}
        constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
        signature = {k: (pointers | norm).get(k, "constexpr") for k in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=constants)
        for capability in (80, 90):
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            out.append([f"{name} {profile} {kind}", len(made.asm["cubin"]), made.asm["ptx"]])
json.dump(out, sys.stdout)
"""


@pytest.mark.slow
def test_kernels_compile_for_an_a100_and_an_h100(compiled: Callable[[str], list[list[Any]]]) -> None:
    """Profile byol reads 12 bytes of a row of the window for each column of the view, and a thread has two columns.

    16 taps for each pixel were 48 bytes. Profile torchvision has two walks, which read four taps at once.
    """
    made = compiled(COMPILE)
    assert len(made) == 32
    for name, _, ptx in made:
        if name.startswith("_resize"):
            assert ptx.count("ld.global.b8") == (24 if "byol" in name else 48), name


@pytest.mark.gpu
def test_host_does_not_wait() -> None:
    images, augment = pictures(8, 60, 80), augment_of(64)
    params = draw(EVERYTHING, 0, 0, np.arange(8), 0, np.full(8, 60), np.full(8, 80))
    run(images, params, augment=augment)  # compiles
    pixels, memory = upload(images)
    out = torch.empty(8, 64, 64, 3, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu.make_views(pixels, [params], augment, [out])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.array_equal(out.cpu().numpy(), run(images, params, augment=augment))
    del memory
