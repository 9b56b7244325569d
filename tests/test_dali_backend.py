"""DALI against the torch back end: same bytes, same parameters; how far apart the pixels are is measured and printed."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_loader import make_config

from byolt.configs.schema import AugmentConfig, Profile, ViewConfig
from byolt.pipelines import torch_backend
from byolt.pipelines.backends import make_backend
from byolt.pipelines.formats.decode import UndecodableError
from byolt.pipelines.views import ViewParams, draw

dali_backend = pytest.importorskip("byolt.pipelines.dali_backend", reason="NVIDIA DALI is not installed")
CPU = torch.device("cpu")
NONE = ViewConfig(flip=0, jitter=0, gray=0, blur=0, solarize=0)


def _augment(size: int, view: ViewConfig, profile: Profile = "byol") -> AugmentConfig:
    return AugmentConfig(profile=profile, size=size, mean=(0, 0, 0), std=(1, 1, 1), view1=view, view2=view)


def _smooth_jpegs(count: int, height: int = 60, width: int = 80) -> list[bytes]:
    """Small JPEGs with color and detail: noise on a coarse grid, enlarged."""
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


def _params(encoded: list[bytes], view: ViewConfig, index: int = 0, profile: Profile = "byol") -> ViewParams:
    return draw(view, 3, 0, np.arange(len(encoded)), index, *_sizes(encoded), profile)


def _difference(encoded: list[bytes], view: ViewConfig, size: int, profile: Profile = "byol") -> torch.Tensor:
    """(N, 3, size, size): |DALI - torch| in levels of 255, for one view of each image, beside another."""
    params, other = (_params(encoded, view, index, profile) for index in (0, 1))
    augment = _augment(size, view, profile)
    ours, _ = dali_backend.DaliBackend(augment, CPU, torch.float32, threads=1)(encoded, params, other)
    plain = [
        torch_backend.apply(torch_backend.decode(data), params[i : i + 1], size, augment.blur_taps, profile)
        for i, data in enumerate(encoded)
    ]
    return (ours - torch.cat(plain).permute(0, 3, 1, 2)).abs() * 255


@pytest.fixture(scope="module")
def encoded() -> list[bytes]:
    return _smooth_jpegs(24)


def _saved(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {"format": "JPEG", "quality": 92, "subsampling": kind}) for kind in (0, 1, 2)]
    + [
        ("RGB", {"format": "JPEG", "quality": 80, "progressive": True}),
        ("L", {"format": "JPEG", "quality": 90}),
        ("RGB", {"format": "PNG"}),
    ],
)
def test_decoding_the_windows_alone_equals_decoding_all(mode: str, options: dict[str, Any]) -> None:
    """A window at its own size is the decoder alone. DALI decodes only what both windows cover, PIL everything."""
    rng = np.random.default_rng(1)
    count, size, images = 20, 8, []
    for _ in range(count):
        height, width = rng.integers(16, 120, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8))
        images.append(
            _saved(coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode), **options)
        )
    heights, widths = _sizes(images)
    plain = draw(NONE, 0, 0, np.arange(count), 0, heights, widths)
    side = np.full(count, size)
    pair = [
        replace(
            plain, top=rng.integers(0, heights - 7), left=rng.integers(0, widths - 7), height=side, width=side
        )
        for _ in range(2)
    ]
    views = dali_backend.DaliBackend(_augment(size, NONE), CPU, torch.float32, 1)(images, *pair)
    for view, params in zip(views, pair, strict=True):
        for i, data in enumerate(images):
            top, left = params.top[i], params.left[i]
            pixels = torch_backend.decode(data)[top : top + size, left : left + size].permute(2, 0, 1)
            assert torch.equal((view[i] * 255).round(), pixels.float())


EACH = {
    "crop, resize, flip": NONE.model_copy(update={"flip": 0.5}),
    "brightness": NONE.model_copy(update={"jitter": 1.0, "contrast": 0, "saturation": 0, "hue": 0}),
    "contrast": NONE.model_copy(update={"jitter": 1.0, "brightness": 0, "saturation": 0, "hue": 0}),
    "saturation": NONE.model_copy(update={"jitter": 1.0, "brightness": 0, "contrast": 0, "hue": 0}),
    "hue": NONE.model_copy(update={"jitter": 1.0, "brightness": 0, "contrast": 0, "saturation": 0}),
    "gray": NONE.model_copy(update={"gray": 1.0}),
    "blur": NONE.model_copy(update={"blur": 1.0}),
    "solarize": NONE.model_copy(update={"solarize": 1.0}),
    "view 1": ViewConfig(blur=1.0, solarize=0.0),
    "view 2": ViewConfig(blur=0.1, solarize=0.2),
    "every operation": ViewConfig(blur=1.0, solarize=1.0, jitter=1.0, gray=0.2),
}


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("profile", ["byol", "torchvision"])
def test_pixels_equal_the_torch_back_end(profile: Profile, name: str, encoded: list[bytes]) -> None:
    """Both compute in float32 from the same bytes: a thousandth of a level is rounding."""
    assert _difference(encoded, EACH[name], 64, profile).max() < 2e-3
    assert _difference(encoded, EACH[name], 29, profile).max() < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "most"), [("byol", 5e-3), ("torchvision", 2e-2)])
def test_difference_is_measured(
    profile: Profile, most: float, shared_data: Path, capsys: pytest.CaptureFixture
) -> None:
    """Printed, with ceilings: on the CPU, whole chains from real JPEGs; all of them in the last."""
    images = [path.read_bytes() for path in sorted((shared_data / "imagenet-sample").iterdir())]
    rows = []
    for name, view in EACH.items():
        some = images if name == "every operation" else images[::5]
        apart = _difference(some, view, 224, profile)
        rows.append((name, len(some), apart.mean().item(), apart.max().item()))
    with capsys.disabled():
        print(f"\n|DALI - torch| in levels of 255, profile {profile}, ImageNet images")
        for row in rows:
            print("  {:24} {:4} images: mean {:8.5f}, max {:7.5f}".format(*row))
    assert max(mean for _, _, mean, _ in rows) < 2e-4
    assert max(largest for _, _, _, largest in rows) < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_is_channels_last_and_keeps_its_memory(dtype: torch.dtype, encoded: list[bytes]) -> None:
    """Views of earlier batches are not overwritten by later ones, though DALI owns the memory."""
    heights, widths = _sizes(encoded)
    params = draw(NONE, 0, 0, np.arange(len(encoded)), 0, heights, widths)
    backend = dali_backend.DaliBackend(_augment(32, NONE), CPU, dtype, threads=1)
    first, _ = backend(encoded, params, params)
    part = backend(encoded, params, params)[1][2:4]  # a part of a batch keeps its memory too
    kept = first.clone()
    for _ in range(4):
        backend(encoded[::-1], params, params)
    assert torch.equal(part, kept[2:4])
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


def test_window_outside_an_image_is_an_error(encoded: list[bytes]) -> None:
    """A manifest that is wrong about a size must not make the kernels read beyond the pixels."""
    params = draw(NONE, 0, 0, np.arange(2), 0, np.full(2, 90), np.full(2, 300))
    params = replace(params, left=np.full(2, 150, np.int32), width=np.full(2, 100, np.int32))
    backend = dali_backend.DaliBackend(_augment(32, NONE), CPU, torch.float32, threads=1)
    with pytest.raises(RuntimeError, match="window"):
        backend(encoded[:2], params, params)


def test_image_that_only_dali_refuses_is_named(encoded: list[bytes]) -> None:
    """A PNG with a wrong checksum: PIL passes it, DALI does not."""
    buffer = io.BytesIO()
    Image.new("RGB", (80, 60), (9, 80, 200)).save(buffer, "PNG")
    png = bytearray(buffer.getvalue())
    png[png.index(b"IEND") - 8] ^= 0xFF  # last byte but three of the checksum of the pixels
    images = [*encoded[:4], bytes(png), *encoded[4:8]]
    assert torch_backend.decode(images[4]).shape == (60, 80, 3)
    heights, widths = _sizes(images)
    params = draw(NONE, 0, 0, np.arange(9), 0, heights, widths)
    backend = dali_backend.DaliBackend(_augment(32, NONE), CPU, torch.float32, threads=1)
    with pytest.raises(UndecodableError, match="image 4 of the batch: DALI does not decode it"):
        backend(images, params, params)


def test_gpu_graph_is_well_formed() -> None:
    """Serializing checks names, devices and argument kinds of every operator, without a GPU."""
    texts = [
        dali_backend._graph(
            on="gpu", hw_decoder_load=load, batch_size=4, num_threads=1, device_id=None
        ).serialize()
        for load in (1.0, 0.65)
    ]
    for text in texts:
        assert b"mixed" in text and b"jpeg_fancy_upsampling" in text and b"encoded" in text
        assert b"hw_decoder_load" in text
    assert texts[0] != texts[1]


def test_hw_decoder_load_reaches_dali(monkeypatch: pytest.MonkeyPatch, encoded: list[bytes]) -> None:
    """The setting's value, by way of the back end; its default sends every JPEG to the same decoder."""
    seen, graph = [], dali_backend._graph
    monkeypatch.setattr(
        dali_backend, "_graph", lambda **given: seen.append(given["hw_decoder_load"]) or graph(**given)
    )
    for data in ({}, {"hw_decoder_load": 0.65}):
        config = make_config(data={"backend": "dali", **data})
        backend, _ = make_backend(config, CPU, torch.float32)
        backend(encoded[:2], *(_params(encoded[:2], NONE) for _ in range(2)))
    assert seen == [1.0, 0.65]


def _pngs(count: int, height: int = 60, width: int = 80) -> list[bytes]:
    rng = np.random.default_rng(1)
    coarse = [Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8)) for _ in range(count)]
    resized = [image.resize((width + i, height), Image.Resampling.BICUBIC) for i, image in enumerate(coarse)]
    return [_saved(image, format="PNG") for image in resized]


def _on(device: str, dtype: torch.dtype = torch.float32, profile: Profile = "byol") -> Any:
    augment = _augment(64, EACH["every operation"], profile)
    return dali_backend.DaliBackend(augment, torch.device(device), dtype, 2)


def _both(encoded: list[bytes], profile: Profile = "byol") -> tuple[ViewParams, ViewParams]:
    views = EACH["every operation"], EACH["view 2"]
    first, second = (_params(encoded, view, i, profile) for i, view in enumerate(views))
    return first, second


@pytest.mark.gpu
@pytest.mark.parametrize("profile", ["byol", "torchvision"])
def test_gpu_pixels_equal_cpu_pixels(profile: Profile) -> None:
    """From PNGs, which decode without loss, with every operation: only rounding differs."""
    images = _pngs(24)
    params = _both(images, profile)
    on_cpu, on_gpu = (_on(device, profile=profile)(images, *params) for device in ("cpu", "cuda"))
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert gpu.device.type == "cuda" and gpu.is_contiguous(memory_format=torch.channels_last)
        # Four times what Triton's interpreter is held to: a GPU's float32 division is within 2 ulp, and it fuses
        # multiplications with additions.
        assert (cpu - gpu.cpu()).abs().max() * 255 < 8e-3


@pytest.mark.gpu
def test_nvjpeg_differs_from_libjpeg_by_little(encoded: list[bytes], capsys: pytest.CaptureFixture) -> None:
    """From JPEGs the two decoders' rounding is added. Printed: it has not yet been measured, the ceiling is a guess."""
    cpu, gpu = (_on(device)(encoded, *_both(encoded))[0].cpu() for device in ("cpu", "cuda"))
    difference = (cpu - gpu).abs() * 255
    with capsys.disabled():
        print(
            f"\n|nvJPEG - libjpeg| in levels of 255: mean {difference.mean():.4f}, max {difference.max():.2f}"
        )
    assert difference.mean() < 1


@pytest.mark.gpu
@pytest.mark.parametrize("load", [1.0, 0.65])
def test_pixels_by_place_in_the_batch(
    load: float, encoded: list[bytes], capsys: pytest.CaptureFixture
) -> None:
    """The same images, at eight places in the batch, not resized. Printed: how many pixels differ.

    1.0 is data.hw_decoder_load's default because nothing may differ. If nothing differs with 0.65 either, the default
    can become 0.65, which is 1.5 times faster.
    """
    count, size = len(encoded), 48
    side, zero = np.full(count, size), np.zeros(count, np.int64)
    params = replace(_params(encoded, NONE), top=zero, left=zero, height=side, width=side)  # resizes nothing
    backend = dali_backend.DaliBackend(_augment(size, NONE), torch.device("cuda"), torch.float32, 2, load)
    levels = []
    for shift in range(0, count, 3):
        view, _ = backend([*encoded[shift:], *encoded[:shift]], params, params)
        levels.append((view.roll(shift, 0) * 255).round())
    difference = (torch.stack(levels) - levels[0]).abs()
    with capsys.disabled():
        differ = (difference > 0).float().mean().item()
        print(
            f"\nhw_decoder_load {load}: {differ:.6%} of the pixels depend on the place, by at most {difference.max():.0f}"
        )
    assert difference.max() <= (0 if load == 1.0 else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_result_is_the_same_in_every_run_and_stays(dtype: torch.dtype, encoded: list[bytes]) -> None:
    """Batches follow each other without waiting; none is overwritten, nor are the pixels it is made from."""
    backend, params = _on("cuda", dtype), _both(encoded)
    runs = [backend(encoded, *params) for _ in range(20)]
    half = [backend(encoded[:12], *(part[:12] for part in params)) for _ in range(3)]
    for views in runs[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(views, runs[0], strict=True))
    assert all(torch.equal(ours[0], runs[0][0][:12]) for ours in half)
    assert runs[0][0].dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [False, True])
def test_host_does_not_wait_for_the_gpu(own_stream: bool, encoded: list[bytes]) -> None:
    backend, params, others = _on("cuda"), _both(encoded), _both(encoded[::-1])
    expected = backend(encoded, *params)[0].cpu()  # builds the graph, compiles the kernels
    torch.cuda.synchronize()
    # of torch's own waits; DALI's decoder waits inside run() as it needs to
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(torch.cuda.Stream() if own_stream else None):
            view = backend(encoded, *params)[0]
            backend(encoded[::-1], *others)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(view.cpu(), expected)


@pytest.mark.gpu
def test_broken_image_is_named_on_the_gpu(encoded: list[bytes]) -> None:
    backend, params = _on("cuda"), _both(encoded)
    before = backend(encoded, *params)[0].clone()
    broken = list(encoded)
    broken[5] = b"\xff\xd8\xff\xe0junk\xff\xd9"
    with pytest.raises(UndecodableError) as caught:
        backend(broken, *params)
    assert set(caught.value.reasons) == {5}
    assert torch.equal(backend(encoded, *params)[0], before)
