"""DALI against the torch back end: same bytes, same parameters; how far apart the pixels are is measured and printed."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import AugmentConfig, ViewConfig
from pipelines import torch_backend
from pipelines.torch_backend import TorchBackend, UndecodableError
from pipelines.views import ViewParams, draw

dali_backend = pytest.importorskip("pipelines.dali_backend", reason="NVIDIA DALI is not installed")

CPU = torch.device("cpu")
NONE = ViewConfig(flip=0, jitter=0, gray=0, blur=0, solarize=0)


def _augment(size: int, view: ViewConfig) -> AugmentConfig:
    return AugmentConfig(size=size, mean=(0, 0, 0), std=(1, 1, 1), view1=view, view2=view)


def _smooth_jpegs(count: int, height: int = 60, width: int = 80) -> list[bytes]:
    """Small JPEGs with colour and detail: noise on a coarse grid, enlarged."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8 + i % 5, 9, 3), np.uint8))
        buffer = io.BytesIO()
        coarse.resize((width + i % 7, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
        out.append(buffer.getvalue())
    return out


def _sizes(encoded: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    shapes = np.array([torch_backend.decode(data).shape[:2] for data in encoded])
    return shapes[:, 0], shapes[:, 1]


def _difference(encoded: list[bytes], view: ViewConfig, size: int, **fixed: object) -> torch.Tensor:
    """(N, 3, size, size): |DALI - torch| in levels of 255, for one drawn view of each image."""
    heights, widths = _sizes(encoded)
    params = replace(draw(view, 3, 0, np.arange(len(encoded)), 0, heights, widths), **fixed)
    augment = _augment(size, view)
    dali = dali_backend.DaliBackend(augment, CPU, torch.float32, threads=1)
    plain = TorchBackend(augment, CPU, torch.float32, threads=1)
    return (dali(encoded, params, params)[0] - plain(encoded, params, params)[0]).abs() * 255


def _inside(difference: torch.Tensor) -> torch.Tensor:
    """Without the border: DALI's cubic resize repeats the edge pixel, the reference drops the tap."""
    return difference[..., 6:-6, 6:-6]


@pytest.fixture(scope="module")
def encoded() -> list[bytes]:
    return _smooth_jpegs(24)


def test_decoded_pixels_are_equal(encoded: list[bytes]) -> None:
    """A crop of the whole image at its own size is the decoder alone: DALI's default IDCT equals PIL's."""
    square = _smooth_jpegs(3, 64, 64)[:1]
    whole = {"top": np.zeros(1, int), "left": np.zeros(1, int), "height": np.full(1, 64), "width": np.full(1, 64)}
    assert _difference(square, NONE, 64, **whole).max() < 1e-3


def test_crop_resize_and_flip(encoded: list[bytes]) -> None:
    difference = _difference(encoded, NONE.model_copy(update={"flip": 0.5}), 64)
    assert _inside(difference).mean() < 0.05 and _inside(difference).max() < 2


@pytest.mark.parametrize(
    ("name", "ceiling"),
    [("brightness", 0.05), ("contrast", 0.1), ("gray", 0.05), ("solarize", 0.05), ("blur", 0.5)],
)
def test_operations_that_are_exact(name: str, ceiling: float, encoded: list[bytes]) -> None:
    """Mean difference in levels; contrast differs at all only because the border moves its mean."""
    view = NONE.model_copy(update={"jitter": 1.0, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0})
    view = view.model_copy(update={name: 1.0 if name in ("gray", "solarize", "blur") else 0.4})
    fixed = {} if name != "brightness" else {"brightness": np.full(len(encoded), 0.2, np.float32)}
    difference = _difference(encoded, view, 64, **fixed)
    assert _inside(difference).mean() < ceiling
    untouched = _difference(encoded, NONE, 64)
    assert not torch.equal(difference, untouched)


def test_color_affine_composes_in_drawn_order() -> None:
    """Against the operations themselves, on colours that no step clips; linear operations only."""
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.uniform(0.4, 0.6, (1, 5, 5, 3)).astype(np.float32))
    heights = np.full(200, 5)
    drawn = draw(ViewConfig(blur=0, solarize=0, brightness=0.1, jitter=1.0), 0, 0, np.arange(200), 0, heights, heights)
    a, b, c = dali_backend.color_affine(replace(drawn, saturation=np.ones(200, np.float32), hue=np.zeros(200)))
    for i in range(200):
        expected = image
        for operation in drawn.order[i]:
            if operation == 0:
                expected = torch_backend.brightness(expected, torch.from_numpy(drawn.brightness[i : i + 1]))
            if operation == 1:
                expected = torch_backend.contrast(expected, torch.from_numpy(drawn.contrast[i : i + 1]))
        if drawn.gray[i]:
            expected = torch_backend.grayscale(expected)
        ours = image.numpy() @ a[i].T + image.numpy().mean((1, 2)) @ b[i].T + c[i]
        assert np.abs(ours - expected.numpy()).max() < 1e-5


def test_hue_of_whole_thirds_permutes_the_channels() -> None:
    pixel = np.array([0.9, 0.2, 0.4])
    turned = dali_backend._hue_rotation(np.array([1 / 3, 2 / 3])) @ pixel
    assert np.allclose(turned, [[0.4, 0.9, 0.2], [0.2, 0.4, 0.9]])


def test_whole_recipe_difference_is_measured(shared_data: Path, capsys: pytest.CaptureFixture) -> None:
    """The linear colour of this back end: printed, and not to grow unseen."""
    files = sorted((shared_data / "imagenet-sample").iterdir())[::10]
    images = [path.read_bytes() for path in files]
    rows = []
    for name, view in {
        "crop, resize, flip": NONE.model_copy(update={"flip": 0.5}),
        "brightness, contrast, grey": ViewConfig(saturation=0, hue=0, blur=0, solarize=0),
        "saturation": NONE.model_copy(update={"jitter": 1.0, "brightness": 0, "contrast": 0, "hue": 0}),
        "hue": NONE.model_copy(update={"jitter": 1.0, "brightness": 0, "contrast": 0, "saturation": 0}),
        "blur": NONE.model_copy(update={"blur": 1.0}),
        "view 1": ViewConfig(blur=1.0, solarize=0.0),
        "view 2": ViewConfig(blur=0.1, solarize=0.2),
    }.items():
        difference = _difference(images, view, 224)
        rows.append((name, difference.mean().item(), difference.amax((1, 2, 3)).median().item()))
    with capsys.disabled():
        print(f"\n|DALI - reference| in levels of 255, {len(images)} ImageNet images: mean, median of the largest")
        for name, mean, largest in rows:
            print(f"  {name:28} {mean:6.3f} {largest:6.2f}")
    assert rows[0][1] < 0.1
    assert max(mean for _, mean, _ in rows) < 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_is_channels_last_and_keeps_its_memory(dtype: torch.dtype, encoded: list[bytes]) -> None:
    """Views of earlier batches are not overwritten by later ones, though DALI owns the memory."""
    heights, widths = _sizes(encoded)
    params = draw(NONE, 0, 0, np.arange(len(encoded)), 0, heights, widths)
    backend = dali_backend.DaliBackend(_augment(32, NONE), CPU, dtype, threads=1)
    first, _ = backend(encoded, params, params)
    kept = first.clone()
    for _ in range(4):
        backend(encoded[::-1], params, params)
    assert first.shape == (24, 3, 32, 32) and first.dtype == dtype
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(first, kept)


def test_same_result_for_any_batch_and_threads(encoded: list[bytes]) -> None:
    view = ViewConfig(blur=0.5, solarize=0.2)
    heights, widths = _sizes(encoded)
    params = draw(view, 0, 0, np.arange(len(encoded)), 0, heights, widths)

    def run(threads: int, parts: int) -> torch.Tensor:
        backend = dali_backend.DaliBackend(_augment(32, view), CPU, torch.float32, threads)
        size = len(encoded) // parts
        rows = [slice(i, i + size) for i in range(0, len(encoded), size)]
        return torch.cat([backend(encoded[row], params[row], params[row])[0] for row in rows])

    assert torch.equal(run(1, 1), run(2, 4))


def test_broken_image_is_named_and_the_backend_goes_on(encoded: list[bytes]) -> None:
    heights, widths = _sizes(encoded)
    params = draw(NONE, 0, 0, np.arange(len(encoded)), 0, heights, widths)
    backend = dali_backend.DaliBackend(_augment(32, NONE), CPU, torch.float32, threads=1)
    before = backend(encoded, params, params)[0].clone()
    broken = list(encoded)
    broken[5] = b"\xff\xd8\xff\xe0junk\xff\xd9"
    with pytest.raises(UndecodableError) as caught:
        backend(broken, params, params)
    assert set(caught.value.reasons) == {5}
    assert torch.equal(backend(encoded, params, params)[0], before)


def test_gpu_graph_is_well_formed() -> None:
    """Serializing checks names, devices and argument kinds of every operator, without a GPU."""
    from nvidia.dali import types

    view = ViewConfig(blur=0.5, solarize=0.2)
    graph = dali_backend._graph(
        augment=_augment(224, view), on="gpu", dtype=types.FLOAT16, batch_size=4, num_threads=1, device_id=None
    )
    text = graph.serialize()
    assert b"mixed" in text and len(text) > 10_000


@pytest.mark.gpu
def test_gpu_pixels_equal_cpu_pixels(encoded: list[bytes]) -> None:
    """nvJPEG may round a pixel differently: two levels at most once resized."""
    view = ViewConfig(blur=0.5, solarize=0.0)
    heights, widths = _sizes(encoded)
    params: ViewParams = draw(view, 0, 0, np.arange(len(encoded)), 0, heights, widths)
    views = [
        dali_backend.DaliBackend(_augment(64, view), torch.device(device), torch.float32, 2)(encoded, params, params)[0]
        for device in ("cpu", "cuda")
    ]
    assert views[1].device.type == "cuda"
    assert (views[0] - views[1].cpu()).abs().mean() * 255 < 0.5
