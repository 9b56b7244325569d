"""The drawn parameters: distributions, independence, and purity."""

from dataclasses import fields

import numpy as np
import pytest

from configs.schema import ViewConfig
from pipelines.views import ViewParams, draw

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


def test_one_pixel_image() -> None:
    view = draw(VIEW1, 0, 0, IDS, 0, np.ones(N, int), np.ones(N, int))
    assert (
        (view.height == 1).all()
        and (view.width == 1).all()
        and (view.top == 0).all()
        and (view.left == 0).all()
    )


def test_slice_keeps_rows_together(views: tuple[ViewParams, ViewParams]) -> None:
    part = views[0][10:20]
    assert len(part) == 10 and part.order.shape == (10, 4)
    assert np.array_equal(part.hue, views[0].hue[10:20])
