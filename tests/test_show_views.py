"""The pictures of tools/show_views.py: what they show is what training sees, where it stands, and what is refused."""

import errno
import io
import sys
from dataclasses import fields
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from PIL import Image

from byolt.configs.schema import Config, load
from byolt.pipelines import torch_backend
from byolt.pipelines.backends import Backend, make_backend
from byolt.pipelines.loader import Loader
from byolt.pipelines.order import global_batch
from byolt.pipelines.sources import open_source
from byolt.pipelines.torch_backend import TorchBackend
from byolt.pipelines.views import ViewParams
from byolt.tools.show_views import main
from byolt.tools.viewing.samples import (
    DrawnSamples,
    choose,
    make_views,
    neutral_jitter,
    operations,
    read,
    table,
    to_pixels,
)
from byolt.tools.viewing.sheets import COLORS, Cell, Page, comparison, contact_sheet, operation_strips, short

ROOT = Path(__file__).resolve().parent.parent
CONFIG = str(ROOT / "configs" / "r8_cifar10.yaml")
SETTINGS = ["augment.size=16", "run.seed=7", "data.threads=1", "train.batch_size=4", "train.device=cpu"]
TORCH = "data.backend=torch"
SIZES = [(40, 40), (30, 50), (64, 20), (300, 20), (20, 300), (33, 47), (48, 36)]  # width, height


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth colored noise of seven shapes; one has a long name."""
    out, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        name = f"{i}{'_and_what_a_long_name' * 3 if i == 3 else ''}.png"
        coarse.resize(size, Image.Resampling.BICUBIC).save(out / name)
    return out


def _config(folder: Path, *overrides: str) -> Config:
    return load(CONFIG, [*SETTINGS, f"data.path={folder}", *overrides])


def _backend(config: Config) -> Backend:
    return make_backend(config, torch.device("cpu"), torch.float32)[0]


def _samples(config: Config, folder: Path, *ids: int, epoch: int = 0) -> DrawnSamples:
    return read(config, open_source(folder), epoch, np.array(ids))


def _sheet(config: Config, samples: DrawnSamples) -> Page:
    return contact_sheet(config, samples, _backend(config), ["a note"])


# ── what is shown is what training sees ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "profile"), [("torch", "byol"), ("dali", "byol"), ("torch", "torchvision")])
def test_sheet_shows_the_loaders_batches(name: str, profile: str, folder: Path) -> None:
    """To the bit: every step of two epochs, whatever the batch was; the pictures hold these pixels."""
    if name == "dali":
        pytest.importorskip("byolt.pipelines.dali_backend", reason="NVIDIA DALI is not installed")
    overrides = f"data.backend={name}", f"augment.profile={profile}"
    config = _config(folder, *overrides, "augment.view1.blur=0.5", "augment.view2.gray=0.5")
    source, backend = open_source(folder), _backend(config)
    with Loader(config, source, _backend(config)) as loader:  # it works in a thread of its own
        for epoch, (batch,) in zip(range(2), iter(loader), strict=False):
            ids = batch.id.numpy()
            assert choose(config, source, epoch, 4).tolist() == ids.tolist()
            samples = read(config, source, epoch, ids)
            for view, seen in zip(make_views(config, backend, samples), batch[:2], strict=True):
                assert torch.equal(view, seen)
            shown = [
                axes.images[0].get_array() for axes in contact_sheet(config, samples, backend, []).figure.axes
            ]
            for i in range(4):
                original, first, second = shown[3 * i : 3 * i + 3]
                assert np.array_equal(original, torch_backend.decode(source.read(int(ids[i]))).numpy())
                for picture, seen in ((first, batch.view1), (second, batch.view2)):
                    assert np.array_equal(picture, to_pixels(config, seen)[i].clip(0, 1))


def test_seed_and_epoch_change_the_views(folder: Path) -> None:
    def lefts(*overrides: str, epoch: int = 0) -> list[int]:
        samples = _samples(_config(folder, *overrides), folder, 3, 4, 5, 6, epoch=epoch)
        return np.concatenate([params.left for params in samples.params]).tolist()

    assert lefts() == lefts()
    assert lefts() != lefts("run.seed=8") and lefts() != lefts(epoch=1)


def test_the_first_of_the_epoch_are_chosen_and_no_more_than_there_are(folder: Path) -> None:
    config, source = _config(folder), open_source(folder)
    assert choose(config, source, 2, 3).tolist() == global_batch(7, 2, 0, 7, 3).tolist()
    assert sorted(choose(config, source, 0, 50).tolist()) == list(range(7))


# ── where it stands ─────────────────────────────────────────────────────────────────────────────────────────


def _params(**values: object) -> ViewParams:
    """One sample; what is not given is zero."""
    zero = {field.name: np.zeros(1) for field in fields(ViewParams)} | {"order": np.array([[0, 1, 2, 3]])}
    return ViewParams(**zero | {name: np.array([value]) for name, value in values.items()})  # type: ignore[arg-type]


def test_table_of_all_that_was_drawn(folder: Path) -> None:
    view = _params(
        top=5,
        left=10,
        height=20,
        width=30,
        flip=True,
        jitter=True,
        order=[3, 0, 2, 1],
        brightness=-0.214,
        contrast=1.25,
        saturation=0.8,
        hue=0.06,
        gray=True,
        blur=True,
        sigma=1.234,
        solarize=True,
    )
    assert table(view, 0, 40, 60, neutral_jitter(_config(folder))) == [
        ("crop", ("25.0 % of the area, ratio 1.50",)),
        ("", ("30 × 20 px at (10, 5)",)),
        ("flip", ("yes",)),
        ("jitter", ("1 hue +0.06", "2 brightness −0.21")),
        ("", ("3 saturation ×0.80", "4 contrast ×1.25")),
        ("gray", ("yes",)),
        ("blur", ("sigma 1.23 px",)),
        ("solarize", ("yes",)),
    ]


def test_table_of_a_plain_view_has_as_many_rows(folder: Path) -> None:
    view = _params(height=1, width=3)
    rows = table(view, 0, 40, 60, neutral_jitter(_config(folder)))
    assert rows[2:] == [
        ("flip", ("no",)),
        ("jitter", ("no",)),
        ("", ()),
        ("gray", ("no",)),
        ("blur", ("no",)),
        ("solarize", ("no",)),
    ]
    assert len(rows) == 8


def test_boxes_are_the_windows(folder: Path) -> None:
    config = _config(folder, TORCH)
    samples = _samples(config, folder, *range(7))
    originals = _sheet(config, samples).figure.axes[::3]
    for i, axes in enumerate(originals):
        boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        assert len(boxes) == 2
        for box, params, color in zip(boxes, samples.params, COLORS, strict=True):
            expected = params.left[i], params.top[i], params.width[i], params.height[i]
            assert (*box.get_xy(), box.get_width(), box.get_height()) == expected
            assert box.get_edgecolor()[:3] == to_rgb(color)


def test_a_box_is_painted_around_its_pixels(folder: Path) -> None:
    """In the PNG itself: the colored pixels' extent, in pixels of the original, is the window's."""
    config = _config(folder, TORCH)
    samples = _samples(config, folder, 5)
    page = _sheet(config, samples)
    buffer = io.BytesIO()
    page.figure.savefig(buffer, format="png", dpi=200)
    painted = np.asarray(Image.open(buffer).convert("RGB")).astype(int)
    assert painted.shape == (page.height, page.width, 3)
    axes = page.figure.axes[0]
    cell = axes.get_position()
    left, right = round(cell.x0 * page.width), round(cell.x1 * page.width)
    top, bottom = round((1 - cell.y1) * page.height), round((1 - cell.y0) * page.height)
    width, height = SIZES[5]
    assert abs((right - left) / (bottom - top) - width / height) < 0.01
    for params, color in zip(samples.params, COLORS, strict=True):
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        ys, xs = np.nonzero(np.abs(painted - rgb).max(2)[top - 8 : bottom + 8, left - 8 : right + 8] < 3)
        scale = (right - left) / width
        found = (xs.min() + xs.max() + 1) / 2 - 8, (ys.min() + ys.max() + 1) / 2 - 8
        window = params.left[0] + params.width[0] / 2, params.top[0] + params.height[0] / 2
        assert np.allclose(found, np.array(window) * scale, atol=1.5)
        extent = np.array([xs.max() - xs.min(), ys.max() - ys.min()]) / scale
        assert np.allclose(extent, [params.width[0], params.height[0]], atol=5 / scale)


def test_picture_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the picture of an earlier call stays as it was."""
    path = tmp_path / "views.png"
    path.write_bytes(b"earlier")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    page = Page("title", [], [[Cell(np.zeros((4, 4, 3)))]])
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            page.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["views.png"] and path.read_bytes() == b"earlier"
    page.save(path)
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size == (page.width, page.height)


def _page(kind: str, folder: Path) -> Page:
    config = _config(folder, TORCH, "augment.view1.jitter=1", "augment.view2.jitter=1")
    if kind == "operations":
        return operation_strips(config, _samples(config, folder, 3), _backend(config), ["another " * 60])
    if kind == "comparison":
        samples = _samples(config, folder, 3, 4)
        return comparison(config, samples, _Shifted(config), "DALI on the GPU", ["x" * 300])[0]
    return _sheet(config, _samples(config, folder, *range(int(kind))))


@pytest.mark.parametrize("kind", ["1", "4", "7", "operations", "comparison"])
def test_nothing_overlaps_and_nothing_leaves_the_page(kind: str, folder: Path) -> None:
    page = _page(kind, folder)
    renderer = FigureCanvasAgg(page.figure).get_renderer()
    texts = [text for text in page.figure.texts if text.get_text()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    boxes += [axes.get_window_extent(renderer) for axes in page.figure.axes]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.width and box.y1 <= page.height
    for a, b in combinations(boxes, 2):
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or down <= 1, (a, b)


# ── each operation alone, two back ends ─────────────────────────────────────────────────────────────────────


def test_strips_show_each_operation_at_its_extremes(folder: Path) -> None:
    """Against the operations themselves, on the central square."""
    config = _config(folder, TORCH, "augment.view2.brightness=0.6", "augment.view1.blur_sigma=[0.2,1.0]")
    samples = _samples(config, folder, 1)
    image = torch_backend.decode(samples.encoded[0])
    plain = torch_backend.resize_bicubic(image, 10, 0, 30, 30, 16)[None]
    page = operation_strips(config, samples, _backend(config), [])
    pictures = iter([torch.from_numpy(axes.images[0].get_array().data) for axes in page.figure.axes])
    strips = operations(config, samples, 50, 30)
    shown = {name: [(label, next(pictures)) for label, _ in strip] for name, strip in strips}
    assert next(pictures, None) is None

    def expect(name: str, labels: list[str], *expected: torch.Tensor) -> None:
        assert [label for label, _ in shown[name]] == labels
        for (label, picture), value in zip(shown[name], expected, strict=True):
            assert torch.allclose(picture, value[0], atol=1e-5), (name, label)

    def at(function: object, *values: float) -> list[torch.Tensor]:
        return [function(plain, torch.tensor([value])) for value in values]  # type: ignore[operator]

    expect("brightness", ["−0.60", "+0.00", "+0.60"], *at(torch_backend.brightness, -0.6, 0, 0.6))
    expect("contrast", ["×0.60", "×1.00", "×1.40"], *at(torch_backend.contrast, 0.6, 1, 1.4))
    expect("saturation", ["×0.80", "×1.00", "×1.20"], *at(torch_backend.saturation, 0.8, 1, 1.2))
    expect("hue: share of a turn", ["−0.10", "+0.00", "+0.10"], *at(torch_backend.hue, -0.1, 0, 0.1))
    taps = config.augment.blur_taps
    blurred = [torch_backend.gaussian_blur(plain, torch.tensor([s]), taps) for s in (0.1, 1.05, 2.0)]
    expect("blur: sigma", ["0.10 px", "1.05 px", "2.00 px"], *blurred)
    switched = plain.flip(2), torch_backend.grayscale(plain), torch_backend.solarize(plain)
    expect("switches", ["flip", "gray", "solarize"], *switched)


def test_crop_strips_have_the_stated_area_and_ratio(folder: Path) -> None:
    config = _config(folder)
    areas, ratios = operations(config, _samples(config, folder, 0), 400, 400)[:2]
    assert [label for label, _ in areas[1]] == ["20 %", "60 %", "100 %"]
    for share, (_, view) in zip((0.2, 0.6, 1.0), areas[1], strict=True):
        assert view.height[0] * view.width[0] / 160_000 == pytest.approx(share, abs=0.005)
        assert (
            abs(2 * view.top[0] + view.height[0] - 400) <= 1
            and abs(2 * view.left[0] + view.width[0] - 400) <= 1
        )
    assert [label for label, _ in ratios[1]] == ["0.75", "1.00", "1.33"]
    for ratio, (_, view) in zip((3 / 4, 1, 4 / 3), ratios[1], strict=True):
        assert view.width[0] / view.height[0] == pytest.approx(ratio, abs=0.01)


class _Shifted(TorchBackend):
    """Two levels of 255 away from torch in one pixel of every view."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.augment, torch.device("cpu"), torch.float32, 1)
        self._std = torch.tensor(config.augment.std)

    def __call__(self, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        views = super().__call__(*arguments)  # type: ignore[arg-type]
        for view in views:
            view[:, :, 3, 4] += 2 / 255 / self._std
        return views


def test_comparison_measures_and_amplifies(folder: Path) -> None:
    config = _config(folder)
    page, lines = comparison(config, _samples(config, folder, 0, 5), _Shifted(config), "DALI", [])
    assert lines[1] == "id 0 view 1: max 2, mean 0.0078"  # 2 / 16**2
    assert lines[4] == "id 5 view 2: max 2, mean 0.0078"
    assert lines[-1] == "all views: max 2, mean 0.0078"
    assert sum(text.get_text() == "difference × 100" for text in page.figure.texts) == 2
    amplified = np.asarray(page.figure.axes[2].images[0].get_array())
    assert amplified[3, 4] == pytest.approx([200 / 255] * 3, abs=1e-4)
    assert np.delete(amplified.reshape(-1, 3), 3 * 16 + 4, 0).max() == 0


def test_equal_back_ends_differ_by_nothing(folder: Path) -> None:
    config = _config(folder, TORCH)
    page, lines = comparison(config, _samples(config, folder, 0), _backend(config), "torch", [])
    assert lines[-1] == "all views: max 0, mean 0"
    assert page.figure.axes[2].images[0].get_array().max() == 0


def test_two_digits_that_count() -> None:
    assert [short(x) for x in (0.0, 0.00023456, 2.0, 12.34)] == ["0", "0.00023", "2", "12"]


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────


def _run(folder: Path | str, *arguments: str) -> int:
    return main([str(folder), "--config", CONFIG, *arguments, *SETTINGS])


@pytest.mark.parametrize("mode", [(), ("--operations",), ("--ids", "3", "0", "--epoch", "4")])
def test_writes_a_picture(
    mode: tuple[str, ...], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run" / ("show_operations.png" if "--operations" in mode else "show_views.png")
    assert _run(folder if mode else f"data.path={folder}", *mode, f"run.out={out.parent}", TORCH) == 0
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert capsys.readouterr().out == f"{out}: {image.width} x {image.height} pixels\n"


def test_compares_with_dali(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("byolt.pipelines.dali_backend", reason="NVIDIA DALI is not installed")
    out = tmp_path / "both.png"
    assert _run(folder, "--compare", "--ids", "0", "5", "--out", str(out)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|DALI on the CPU - torch| in levels of 255" and out.exists()
    assert float(lines[-2].split()[3].rstrip(",")) < 2e-3  # all views: max ..., mean ...


def _empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ids", "7", "2", "99"], "--ids 7 99: the data set has ids 0 to 6"),
        (["--ids", "-1"], "--ids -1: ids are whole numbers from 0"),
        (["--ids", "one"], "--ids one: ids are whole numbers from 0"),
        (["--images", "0"], "show 1 to 64 images, not 0"),
        (["--images", "65"], "show 1 to 64 images, not 65"),
        (["--epoch", "-3"], "--epoch -3: epochs count from 0"),
        (["--out", "sheet.jpg"], "--out sheet.jpg: name a .png file"),
        (["--out", "nowhere/sheet.png"], "--out nowhere/sheet.png: name a .png file in a folder that exists"),
        (["--compare", TORCH], "--compare needs a back end other than torch; data.backend=torch"),
        (["augment.sise=9"], "did you mean augment.size?"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run(folder, *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_unusable_data_sets_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert _run(tmp_path / "missing") == 2
    assert "does not exist: make it with tools/make_shards.py" in capsys.readouterr().err
    assert _run(_empty(tmp_path)) == 2
    assert "holds no images" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["torch", "dali"])
def test_an_image_that_does_not_decode_is_named(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Whole by its header and end, broken inside: no back end decodes it."""
    if name == "dali":
        pytest.importorskip("byolt.pipelines.dali_backend", reason="NVIDIA DALI is not installed")
    png = bytearray((folder / "0.png").read_bytes())
    middle = png.index(b"IDAT") + 4
    png[middle : middle + 40] = bytes(40)
    (tmp_path / "good.png").write_bytes((folder / "1.png").read_bytes())
    (tmp_path / "ill.png").write_bytes(png)
    assert _run(tmp_path, f"data.backend={name}", "--out", str(tmp_path / "sheet.png")) == 2
    assert "ill.png (sample 1): " in (error := capsys.readouterr().err) and "show others with --ids" in error
    assert not (tmp_path / "sheet.png").exists()


def test_bytes_that_changed_under_the_index_are_named(folder: Path, tmp_path: Path) -> None:
    """A back end must not be handed them: DALI can end the process."""
    (tmp_path / "a.png").write_bytes((folder / "0.png").read_bytes())
    source, config = open_source(tmp_path), _config(folder)
    (tmp_path / "a.png").write_bytes((folder / "1.png").read_bytes())
    with pytest.raises(ValueError, match=r"a\.png .*: its bytes are not those that were indexed"):
        read(config, source, 0, np.array([0]))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.png .*show others with --ids"):
        read(config, source, 0, np.array([0]))


@pytest.mark.parametrize("choice", ["auto", "dali"])
def test_comparing_without_dali_says_how_to_get_it(
    choice: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "byolt.pipelines.dali_backend", None)  # import fails
    assert _run(folder, "--compare", "--out", str(tmp_path / "c.png"), f"data.backend={choice}") == 2
    assert "pip install -e '.[dali]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
