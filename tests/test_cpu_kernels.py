"""The compiled kernels against the torch back end and the reference's own numbers: each operation, alone and composed.

Most tests run for both profiles; the reference's numbers are of profile byol. Ceilings are for float32 in [0, 1], where
the two differ by rounding (a few 1e-7 an operation), and by taps of the blur lighter than 1e-6 of the center, which the
kernels drop. An 8-bit level is 3.9e-3.
"""

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from numba.core import caching
from numba.core.dispatcher import Dispatcher

from byolt.configs.schema import AugmentConfig, Profile, ViewConfig
from byolt.pipelines import torch_backend
from byolt.pipelines.kernels import cpu as kernels
from byolt.pipelines.kernels import cpu_byol, cpu_rows, cpu_torchvision, cpu_walks
from byolt.pipelines.kernels.cpu import Pixels, make_views
from byolt.pipelines.views import BRIGHTNESS, CONTRAST, HUE, JITTER_ORDERS, SATURATION, ViewParams, draw

ROOT = Path(__file__).resolve().parent.parent
PLAIN = ViewConfig(blur=0, solarize=0)
both_profiles = pytest.mark.parametrize("profile", ["byol", "torchvision"])


def params_of(count: int, height: int, width: int, **changes: object) -> ViewParams:
    """The whole of `count` images, with no operation but what `changes` says."""
    zeros, off = np.zeros(count, np.int32), np.zeros(count, bool)
    value = np.zeros(count, np.float32)
    params = ViewParams(
        top=zeros, left=zeros, height=zeros + height, width=zeros + width, flip=off, jitter=off,
        order=np.tile(np.arange(4, dtype=np.uint8), (count, 1)), brightness=value, contrast=value + 1,
        saturation=value + 1, hue=value, gray=off, blur=off, sigma=value + 1, solarize=off,
    )  # fmt: skip
    arrays = {
        name: np.full(count, change) if np.ndim(change) == 0 else change for name, change in changes.items()
    }
    return replace(params, **arrays)


def augment_of(size: int, profile: Profile = "byol") -> AugmentConfig:
    return AugmentConfig(profile=profile, size=size, mean=(0, 0, 0), std=(1, 1, 1), view1=PLAIN, view2=PLAIN)


def run(
    images: list[np.ndarray],
    params: ViewParams,
    augment: AugmentConfig,
    pool: ThreadPoolExecutor | None = None,
) -> np.ndarray:
    """(N, size, size, 3) of whole images uint8 (H, W, 3)."""
    box = np.array([[0, 0, *image.shape[:2]] for image in images])
    pixels = Pixels(np.array([image.ctypes.data for image in images]), box)
    out = np.full((len(images), augment.size, augment.size, 3), np.nan, np.float32)
    make_views(pixels, [params], augment, [out], pool)
    return out


def expected(images: list[np.ndarray], params: ViewParams, augment: AugmentConfig) -> np.ndarray:
    settings = augment.size, augment.blur_taps, augment.profile
    views = [
        torch_backend.apply(torch.from_numpy(image), params[i : i + 1], *settings)
        for i, image in enumerate(images)
    ]
    return torch.cat(views).numpy()


def pictures(count: int, height: int, width: int) -> list[np.ndarray]:
    """Smooth colors with noise, black, white and gray patches: every branch of HSV, and both clips."""
    rng = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[:height, :width] / max(height, width)
    out = []
    for _ in range(count):
        waves = [np.sin(6 * (a * y + b * x) + c) for a, b, c in rng.uniform(-1, 1, (3, 3))]
        image = 127 + 140 * np.stack(waves, 2) + rng.normal(0, 20, (height, width, 3))
        image[: height // 4, : width // 4] = rng.choice([0, 255, 90])
        out.append(image.clip(0, 255).astype(np.uint8))
    return out


@pytest.mark.parametrize("size", [32, 64, 224])
def test_resize_equals_reference(size: int, fixtures: Path) -> None:
    with np.load(fixtures / "resize.npz") as data:
        image, wanted = data["in_u8"], data[f"out{size}"]
    ours = run([image], params_of(1, *image.shape[:2]), augment_of(size))[0]
    assert np.abs(ours[: wanted.shape[0], : wanted.shape[1]] - wanted).max() < 1e-5


OPERATIONS = {
    "brightness/-0.4": {"brightness": -0.4}, "brightness/0.4": {"brightness": 0.4},
    "contrast/0.6": {"contrast": 0.6}, "contrast/1.4": {"contrast": 1.4},
    "saturation/0.8": {"saturation": 0.8}, "saturation/1.2": {"saturation": 1.2},
    "hue/-0.1": {"hue": -0.1}, "hue/0.1": {"hue": 0.1},
    "gray": {"gray": True}, "solarize": {"solarize": True},
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_reference(name: str, reference: dict[str, np.ndarray]) -> None:
    """At the image's own size the resize is the identity; the other jitter values are neutral."""
    image = reference["in_u8"]
    params = params_of(1, 48, 48, jitter="/" in name, **OPERATIONS[name])
    assert np.abs(run([image], params, augment_of(48))[0] - reference[name]).max() < 1e-5


def test_blur_equals_reference(reference: dict[str, np.ndarray]) -> None:
    """5 taps belong to 48 pixels; the 23 of the other numbers are asked of the kernel directly."""
    image = reference["in_u8"]
    ours = run([image], params_of(1, 48, 48, blur=True, sigma=1.0), augment_of(48))[0]
    assert np.abs(ours - reference["blur5/1.0"]).max() < 1e-5
    for sigma in (0.1, 1.0, 2.0):
        ours = run_with_taps(image, params_of(1, 48, 48, blur=True, sigma=sigma), 23)
        assert np.abs(ours - reference[f"blur23/{sigma}"]).max() < 1e-5


def test_composition_equals_reference(reference: dict[str, np.ndarray]) -> None:
    params = params_of(
        1, 48, 48, jitter=True, order=np.array([[CONTRAST, HUE, SATURATION, BRIGHTNESS]], np.uint8),
        contrast=1.3, hue=0.07, saturation=0.85, brightness=-0.2, blur=True, sigma=1.5, solarize=True,
    )  # fmt: skip
    ours = run_with_taps(reference["in_u8"], params, 23)
    assert np.abs(ours - reference["compose"]).max() < 1e-5


def run_with_taps(image: np.ndarray, params: ViewParams, taps: int) -> np.ndarray:
    class Augment:
        profile = "byol"
        size, mean, std, blur_taps = 48, (0, 0, 0), (1, 1, 1), taps

    return run([image], params, Augment())[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [8, 13, 24, 32, 45, 224])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (40, 1), (2, 3), (37, 61), (260, 190)])
@both_profiles
def test_windows_of_any_shape(profile: Profile, size: int, height: int, width: int) -> None:
    """Random windows, flips and every operation, enlarging and reducing, sizes that no vector length divides."""
    count = 6
    images = pictures(count, height, width)
    sides = np.full(count, height), np.full(count, width)
    view = ViewConfig(blur=0.7, solarize=0.5, jitter=0.9, gray=0.2)
    params = draw(view, size, 0, np.arange(count), 0, *sides, profile)
    augment = augment_of(size, profile)
    assert np.abs(run(images, params, augment) - expected(images, params, augment)).max() < 1e-5


@pytest.mark.parametrize("size", [8, 32, 224])
def test_antialias_over_many_taps(size: int) -> None:
    """900 x 1100 to 8: 552 taps an axis."""
    images, params = pictures(1, 900, 1100), params_of(1, 900, 1100, flip=True, brightness=1.0)
    augment = augment_of(size, "torchvision")
    assert np.abs(run(images, params, augment) - expected(images, params, augment)).max() < 1e-5


@pytest.mark.parametrize(
    "name", ["brightness", "contrast", "saturation", "hue", "gray", "blur", "solarize", "flip"]
)
@both_profiles
def test_each_operation_over_its_range(profile: Profile, name: str) -> None:
    count, lowest = 16, 0 if profile == "torchvision" else -1
    images = pictures(count, 50, 70)
    grid = {
        "brightness": np.linspace(lowest, lowest + 2, count), "contrast": np.linspace(0, 2, count),
        "saturation": np.linspace(0, 2, count), "hue": np.linspace(-0.5, 0.5, count),
    }  # fmt: skip
    changes: dict[str, object] = (
        {"jitter": True, name: grid[name].astype(np.float32)} if name in grid else {name: True}
    )
    if name == "blur":
        changes["sigma"] = np.linspace(0.05, 5, count, dtype=np.float32)
    if profile == "torchvision":
        changes = {"brightness": np.float32(1)} | changes
    params, augment = params_of(count, 50, 70, **changes), augment_of(64, profile)
    ours = run(images, params, augment)
    assert np.abs(ours - expected(images, params, augment)).max() < 5e-6
    assert np.abs(ours - run(images, params_of(count, 50, 70), augment)).max() > 0.01


@both_profiles
def test_every_order_of_the_color_operations(profile: Profile) -> None:
    count = len(JITTER_ORDERS)
    images = pictures(count, 40, 40)
    params = params_of(
        count, 40, 40, jitter=True, order=JITTER_ORDERS, brightness=np.float32({"byol": 0.3, "torchvision": 1.3}[profile]), contrast=np.float32(1.4),
        saturation=np.float32(1.2), hue=np.float32(-0.08),
    )  # fmt: skip
    augment = augment_of(40, profile)
    ours = run(images, params, augment)
    assert np.abs(ours - expected(images, params, augment)).max() < 5e-6
    of_one = run(images[:1] * count, params, augment)
    apart = [np.abs(a - b).max() for a, b in itertools.combinations(of_one, 2)]
    if profile == "byol":  # 12 orders have hue beside saturation: these two commute in HSV
        assert sum(distance < 1e-3 for distance in apart) == 6
    else:
        assert min(apart) > 1e-3


@both_profiles
def test_part_of_an_image_gives_what_the_whole_gives(profile: Profile) -> None:
    """Pixels may be a part of an image: pixels outside the window are never read."""
    (image,), augment = pictures(1, 90, 80), augment_of(16, profile)
    params = params_of(1, 41, 33, top=30, left=20)
    part = np.ascontiguousarray(image[25:80, 18:60])
    out = np.empty((1, 16, 16, 3), np.float32)
    make_views(Pixels(np.array([part.ctypes.data]), np.array([[25, 18, 55, 42]])), [params], augment, [out])
    assert np.array_equal(out, run([image], params, augment))


@pytest.mark.parametrize("change", [{"top": 50}, {"left": -1}, {"height": 61}, {"width": 0}])
def test_window_outside_the_pixels_is_refused(change: dict[str, int]) -> None:
    params = replace(params_of(1, 60, 60), **{name: np.full(1, value) for name, value in change.items()})
    with pytest.raises(ValueError, match="window"):
        run(pictures(1, 60, 60), params, augment_of(16))


def test_normalization() -> None:
    images = pictures(3, 30, 30)
    augment = AugmentConfig(size=30, view1=PLAIN, view2=PLAIN)
    params = params_of(3, 30, 30)
    plain = (expected(images, params, augment) - np.array(augment.mean)) / np.array(augment.std)
    assert np.abs(run(images, params, augment) - plain).max() < 1e-5


@both_profiles
def test_threads_and_batch_do_not_matter(profile: Profile) -> None:
    """Nor what the same memory held before: with a mirrored border, not even a neighbor's blur."""
    count = 50
    images, augment = pictures(count, 33, 47), augment_of(32, profile)
    sides = np.full(count, 33), np.full(count, 47)
    params = draw(ViewConfig(blur=0.5, solarize=0.2), 0, 0, np.arange(count), 0, *sides, profile)
    alone = [run(images[i : i + 1], params[i : i + 1], augment)[0] for i in range(count)]
    with ThreadPoolExecutor(3) as pool:
        assert np.array_equal(run(images, params, augment, pool), np.stack(alone))


def test_without_a_cache_folder_it_compiles_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba raises where neither the package's folder nor the user's can be written."""
    with_cache = kernels.compiled("byol", 2)
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    spec = importlib.util.spec_from_file_location("kernels_without_cache", kernels.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.compiled("byol", 2).stats.cache_path is None
    assert with_cache.stats.cache_path is not None


def test_each_function_has_cache_files_of_its_own() -> None:
    """numba numbers the functions in a file; two processes at once could give one number to two of them."""
    functions = [kernels.compiled(profile, views) for profile in get_args(Profile) for views in (1, 2)]
    assert len({function.py_func.__qualname__ for function in functions}) == 4


def test_no_two_functions_share_a_name() -> None:
    """Where both are loaded from the cache, which different processes filled, one would be called for the other: the
    views of profile torchvision were byol's in a third process, after one had compiled byol and the next torchvision.
    """
    names: dict[tuple[str, str], set[int]] = {}
    for module in (cpu_rows, cpu_walks, cpu_byol, cpu_torchvision):
        for function in vars(module).values():
            if isinstance(function, Dispatcher):
                plain = function.py_func
                names.setdefault((plain.__module__, plain.__qualname__), set()).add(id(plain))
    assert len(names) > 20
    assert [name for name, functions in names.items() if len(functions) > 1] == []


@pytest.mark.slow
def test_cache_notices_a_change_in_any_of_the_files(tmp_path: Path) -> None:
    """numba itself watches cpu.py alone."""
    for package in ("byolt", "configs", "files", "pipelines"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, symlinks=True, ignore=ignored)
    script = """
import numpy as np
from byolt.configs.schema import AugmentConfig, ViewConfig
from byolt.pipelines.kernels import cpu as kernels
from byolt.pipelines.views import draw
view, one = ViewConfig(flip=0, jitter=0, gray=0, blur=0, solarize=0), np.ones(1, int)
augment = AugmentConfig(size=8, mean=(0, 0, 0), std=(1, 1, 1), view1=view, view2=view)
image, out = np.full((1, 1, 3), 255, np.uint8), np.empty((1, 8, 8, 3), np.float32)
pixels = kernels.Pixels(np.array([image.ctypes.data]), np.array([[0, 0, 1, 1]]))
kernels.make_views(pixels, [draw(view, 0, 0, one, 0, one, one)], augment, [out])
print(out[0, 0, 0, 0], sum(kernels.compiled("byol", 1).stats.cache_hits.values()))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def run_it() -> list[str]:
        command = [sys.executable, "-c", script]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.split()

    assert run_it() == ["1.0", "0"]
    assert run_it() == ["1.0", "1"]
    part = tmp_path / "pipelines" / "kernels" / "cpu_walks.py"
    part.write_text(part.read_text().replace("1 / 255", "0.5 / 255"))
    assert run_it() == ["0.5", "0"]
