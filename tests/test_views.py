"""The sampled parameters: distributions, independence, and purity."""

import zlib
from dataclasses import fields

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from byolt.configs.schema import AugmentConfig, Profile, ViewConfig
from byolt.pipelines.views import ViewParams, draw, draw_both

N = 100_000
VIEW1, VIEW2 = ViewConfig(blur=1.0, solarize=0.0), ViewConfig(blur=0.1, solarize=0.2)
IDS, HEIGHTS, WIDTHS = np.arange(N), np.full(N, 375), np.full(N, 500)


@pytest.fixture(scope="module")
def views() -> tuple[ViewParams, ViewParams]:
    return draw(VIEW1, 7, 0, IDS, 0, HEIGHTS, WIDTHS), draw(VIEW2, 7, 0, IDS, 1, HEIGHTS, WIDTHS)


def test_crop_lies_in_the_image(views: tuple[ViewParams, ViewParams]) -> None:
    for view in views:
        assert (view.top >= 0).all() and (view.top + view.height <= 375).all() and (view.height >= 1).all()
        assert (view.left >= 0).all() and (view.left + view.width <= 500).all() and (view.width >= 1).all()


def test_crop_area_and_ratio_are_uniform_where_nothing_is_clamped() -> None:
    huge = np.full(N, 4000)
    view = draw(VIEW1.model_copy(update={"crop_area": (0.08, 0.5)}), 7, 0, IDS, 0, huge, huge)
    area = view.height * view.width.astype(float) / 4000**2
    ratio = np.log(view.width / view.height) / np.log(4 / 3)
    deciles = np.linspace(0.1, 0.9, 9)
    assert np.abs(np.quantile(area, deciles) - (0.08 + 0.42 * deciles)).max() < 0.004
    assert np.abs(np.quantile(ratio, deciles) - (2 * deciles - 1)).max() < 0.02
    assert abs(np.corrcoef(area, ratio)[0, 1]) < 0.016
    place = view.top / (4000 - view.height)
    assert np.abs(np.quantile(place, deciles) - deciles).max() < 0.01


def test_window_reaches_every_edge_equally(views: tuple[ViewParams, ViewParams]) -> None:
    small = draw(VIEW1, 0, 0, IDS, 0, np.full(N, 4), np.full(N, 4))
    rows = small.height == 3
    assert set(small.top[rows]) == {0, 1}
    assert abs(small.top[rows].mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("flip", (0.5, 0.5)),
        ("jitter", (0.8, 0.8)),
        ("gray", (0.2, 0.2)),
        ("blur", (1.0, 0.1)),
        ("solarize", (0.0, 0.2)),
    ],
)
def test_probabilities(field: str, expected: tuple, views: tuple[ViewParams, ViewParams]) -> None:
    for view, probability in zip(views, expected, strict=True):
        share = getattr(view, field).mean()
        assert share == probability if probability in (0.0, 1.0) else abs(share - probability) < 0.007


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [
        ("brightness", -0.4, 0.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
        ("sigma", 0.1, 2),
    ],
)
def test_ranges(field: str, low: float, high: float, views: tuple[ViewParams, ViewParams]) -> None:
    deciles = np.linspace(0, 1, 11)
    for view in views:
        values = getattr(view, field)
        assert values.min() >= np.float32(low) and values.max() <= np.float32(high)
        assert np.abs(np.quantile(values, deciles) - (low + (high - low) * deciles)).max() < 0.01 * (
            high - low
        )


def test_all_24_orders_are_equally_likely(views: tuple[ViewParams, ViewParams]) -> None:
    _, counts = np.unique(views[0].order, axis=0, return_counts=True)
    assert len(counts) == 24
    assert np.abs(counts - N / 24).max() < 5 * np.sqrt(N / 24)


def test_views_epochs_and_samples_are_independent(views: tuple[ViewParams, ViewParams]) -> None:
    later = draw(VIEW1, 7, 1, IDS, 0, HEIGHTS, WIDTHS)
    for name in ("brightness", "contrast", "saturation", "hue", "sigma", "top"):
        first, second, other = (getattr(v, name).astype(float) for v in (*views, later))
        for a, b in ((first, second), (first, other), (first[:-1], first[1:])):
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.016
    both = np.stack(
        [getattr(views[0], n).astype(float) for n in ("flip", "jitter", "gray", "brightness", "hue", "left")]
    )
    assert np.abs(np.corrcoef(both) - np.eye(6)).max() < 0.016


def test_a_sample_is_drawn_alike_in_any_batch(views: tuple[ViewParams, ViewParams]) -> None:
    some = np.array([99_999, 3, 40_000])
    alone = draw(VIEW1, 7, 0, some, 0, HEIGHTS[some], WIDTHS[some])
    for field in fields(ViewParams):
        assert np.array_equal(getattr(alone, field.name), getattr(views[0], field.name)[some]), field.name


@pytest.mark.parametrize("profile", ["byol", "torchvision"])
def test_one_pixel_image(profile: Profile) -> None:
    one = np.ones(N, int)
    view = draw(VIEW1, 0, 0, IDS, 0, one, one, profile)
    assert (view.height == 1).all() and (view.width == 1).all()
    assert (view.top == 0).all() and (view.left == 0).all()


def test_slice_keeps_rows_together(views: tuple[ViewParams, ViewParams]) -> None:
    part = views[0][10:20]
    assert len(part) == 10 and part.order.shape == (10, 4)
    assert np.array_equal(part.hue, views[0].hue[10:20])


def test_draws_of_byol_are_those_of_earlier_runs() -> None:
    """A checkpoint's parameters must not change with a release: digests of all fields, of 1000 samples."""
    ids = np.arange(1000) * 7919
    for index, (view, digest) in enumerate(((VIEW1, 1975904645), (VIEW2, 4047288462))):
        params = draw(view, 7, 3, ids, index, 100 + ids % 433, 90 + ids % 577)
        data = b"".join(getattr(params, field.name).tobytes() for field in fields(ViewParams))
        assert zlib.crc32(data) == digest


@pytest.fixture(scope="module")
def tv() -> ViewParams:
    """View 2 of N samples by profile torchvision."""
    return draw(VIEW2, 7, 0, IDS, 1, HEIGHTS, WIDTHS, "torchvision")


def test_torchvision_crop_lies_in_the_image(tv: ViewParams) -> None:
    assert (tv.top >= 0).all() and (tv.top + tv.height <= 375).all() and (tv.height >= 1).all()
    assert (tv.left >= 0).all() and (tv.left + tv.width <= 500).all() and (tv.width >= 1).all()


def test_torchvision_crop_is_uniform_where_the_first_try_fits() -> None:
    huge = np.full(N, 4000)
    small = VIEW1.model_copy(update={"crop_area": (0.08, 0.5)})
    view = draw(small, 7, 0, IDS, 0, huge, huge, "torchvision")
    area = view.height * view.width.astype(float) / 4000**2
    ratio = np.log(view.width / view.height) / np.log(4 / 3)
    deciles = np.linspace(0.1, 0.9, 9)
    assert np.abs(np.quantile(area, deciles) - (0.08 + 0.42 * deciles)).max() < 0.004
    assert np.abs(np.quantile(ratio, deciles) - (2 * deciles - 1)).max() < 0.02
    assert abs(np.corrcoef(area, ratio)[0, 1]) < 0.016
    for place in (view.top / (4000 - view.height), view.left / (4000 - view.width)):
        assert np.abs(np.quantile(place, deciles) - deciles).max() < 0.01


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (400, 120), (30, 100)])
def test_torchvision_crop_has_the_distribution_of_torchvisions_own(height: int, width: int) -> None:
    """1e5 of ours, 1e4 of torchvision's: no two distribution functions are further apart than 0.0204, which equal ones
    are with probability 1e-3 (Kolmogorov-Smirnov)."""
    torch.manual_seed(0)
    image, crop = torch.empty(3, height, width), v2.RandomResizedCrop(224, (0.08, 1.0))
    drawn = [crop.make_params([image]) for _ in range(10_000)]
    names = "top", "left", "height", "width"
    theirs = {name: np.array([params[name] for params in drawn]) for name in names}
    view = draw(VIEW1, 11, 0, IDS, 0, np.full(N, height), np.full(N, width), "torchvision")
    ours = {name: getattr(view, name) for name in names}
    for each in (ours, theirs):
        each |= {"area": each["height"] * each["width"], "ratio": each["width"] / each["height"]}
    for name in ours:
        values = np.unique(np.concatenate([ours[name], theirs[name]]))
        shares = [np.searchsorted(np.sort(a[name]), values, "right") / len(a[name]) for a in (ours, theirs)]
        assert np.abs(shares[0] - shares[1]).max() < 0.0204, name


@pytest.mark.parametrize(
    ("height", "width", "window"),
    [
        (10, 1000, [0, 493, 10, 13]),
        (1000, 10, [493, 0, 13, 10]),
        (3, 90, [0, 43, 3, 4]),
        (90, 3, [43, 0, 4, 3]),
    ],
)
def test_torchvision_takes_the_center_where_nothing_fits(height: int, width: int, window: list[int]) -> None:
    """No window of .08 of the area fits, so 4/3 of the short side is taken, centered (torchvision rounds down)."""
    view = draw(VIEW1, 0, 0, IDS, 0, np.full(N, height), np.full(N, width), "torchvision")
    drawn = np.unique(np.stack([view.top, view.left, view.height, view.width], 1), axis=0)
    assert drawn.tolist() == [window]


def test_torchvision_takes_the_whole_image_where_nothing_fits_but_its_ratio_is_allowed() -> None:
    """The whole area in any ratio but the image's own is too high or too wide: most samples never fit."""
    view = VIEW1.model_copy(update={"crop_area": (1.0, 1.0)})
    params = draw(view, 0, 0, IDS, 0, np.full(N, 300), np.full(N, 330), "torchvision")
    whole = (params.height == 300) & (params.width == 330)
    assert whole.mean() > 0.98  # 300 x 329 and the like fit, rarely
    assert (params.top[whole] == 0).all() and (params.left[whole] == 0).all()


def test_torchvision_tries_ten_times() -> None:
    """A try fits 100 x 400 pixels with probability p (integrated on a grid): (1 - p)^10 are centered."""
    area = 0.08 + 0.92 * (np.arange(1000)[:, None] + 0.5) / 1000
    ratio = (3 / 4) ** (1 - 2 * (np.arange(1000) + 0.5) / 1000)
    fits = (np.rint(np.sqrt(area * 40_000 / ratio)) <= 100).mean()
    view = draw(VIEW1, 3, 0, IDS, 0, np.full(N, 100), np.full(N, 400), "torchvision")
    centered = (view.height == 100) & (view.width == 133) & (view.left == 133)
    expected = (1 - fits) ** 10
    assert 0.05 < expected < 0.2 and abs((1 - fits) ** 9 - expected) > 0.01
    assert abs(centered.mean() - expected) < 0.005


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
        ("sigma", 0.1, 2),
    ],
)
def test_torchvision_ranges(field: str, low: float, high: float, tv: ViewParams) -> None:
    deciles, values = np.linspace(0, 1, 11), getattr(tv, field)
    assert values.min() >= np.float32(low) and values.max() <= np.float32(high)
    assert np.abs(np.quantile(values, deciles) - (low + (high - low) * deciles)).max() < 0.01 * (high - low)


def test_torchvision_orders_and_probabilities(tv: ViewParams) -> None:
    _, counts = np.unique(tv.order, axis=0, return_counts=True)
    assert len(counts) == 24 and np.abs(counts - N / 24).max() < 5 * np.sqrt(N / 24)
    for field, share in {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": 0.1, "solarize": 0.2}.items():
        assert abs(getattr(tv, field).mean() - share) < 0.007, field


def test_profiles_differ_in_window_and_brightness_alone(
    tv: ViewParams, views: tuple[ViewParams, ViewParams]
) -> None:
    same = {
        f.name for f in fields(ViewParams) if np.array_equal(getattr(tv, f.name), getattr(views[1], f.name))
    }
    assert {f.name for f in fields(ViewParams)} - same == {"top", "left", "height", "width", "brightness"}
    assert np.abs(tv.brightness - views[1].brightness - 1).max() < 1e-6


def test_torchvision_views_epochs_and_samples_are_independent(tv: ViewParams) -> None:
    first = draw(VIEW1, 7, 0, IDS, 0, HEIGHTS, WIDTHS, "torchvision")
    later = draw(VIEW2, 7, 1, IDS, 1, HEIGHTS, WIDTHS, "torchvision")
    for name in ("brightness", "hue", "sigma", "top", "left", "height", "width"):
        a, b, c = (getattr(view, name).astype(float) for view in (tv, first, later))
        for pair in ((a, b), (a, c), (a[:-1], a[1:])):
            assert abs(np.corrcoef(*pair)[0, 1]) < 0.016


@pytest.mark.parametrize("profile", ["byol", "torchvision"])
def test_both_views_of_a_config_are_those_of_its_profile_in_any_batch(profile: Profile) -> None:
    augment = AugmentConfig(profile=profile, view1=VIEW1, view2=VIEW2)
    whole = [draw(view, 7, 0, IDS, i, HEIGHTS, WIDTHS, profile) for i, view in enumerate((VIEW1, VIEW2))]
    for ids in (np.array([99_999, 3, 40_000]), np.arange(7), np.arange(7, 5000)):
        both = draw_both(augment, 7, 0, ids, HEIGHTS[ids], WIDTHS[ids])
        for ours, expected in zip(both, whole, strict=True):
            for field in fields(ViewParams):
                assert np.array_equal(getattr(ours, field.name), getattr(expected, field.name)[ids]), (
                    field.name
                )
