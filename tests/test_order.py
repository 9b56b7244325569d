"""Every sample exactly once an epoch, the same order for any number of ranks, and nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byolt.pipelines.order import BLOCK, global_batch, position, steps_per_epoch

FULL = [716, 618, 961, 829, 330, 34, 195, 838]
BLOCKS = [41894, 14381, 10146, 60973, 26768, 7377, 63023, 96258]
GRID = [(n, b) for n in (1, 2, 7, 64, 257, 1000, 20_000) for b in (1, 2, 7, 64, 1000) if b <= n]


@pytest.mark.parametrize("mode", ["full", "block"])
@pytest.mark.parametrize(("n", "b"), GRID)
def test_each_sample_once_an_epoch(n: int, b: int, mode: str) -> None:
    steps = steps_per_epoch(n, b)
    seen = np.concatenate([global_batch(3, 1, step, n, b, mode) for step in range(min(steps, 50))])
    assert seen.dtype == np.int64 and seen.min() >= 0 and seen.max() < n
    assert len(np.unique(seen)) == len(seen) == min(steps, 50) * b
    if steps <= 50 and n % b == 0:
        assert np.array_equal(np.sort(seen), np.arange(n))


@pytest.mark.parametrize("mode", ["full", "block"])
def test_epochs_and_seeds_differ_and_repeat(mode: str) -> None:
    first = global_batch(0, 0, 3, 5000, 100, mode)
    assert np.array_equal(first, global_batch(0, 0, 3, 5000, 100, mode))
    for seed, epoch in ((0, 1), (1, 0)):
        assert not np.array_equal(first, global_batch(seed, epoch, 3, 5000, 100, mode))


def test_order_is_frozen() -> None:
    """The order of a release is the order of every later one: a run resumed after an upgrade continues unchanged."""
    assert global_batch(0, 0, 0, 1000, 8).tolist() == FULL
    assert global_batch(0, 0, 0, 100_000, 8, "block").tolist() == BLOCKS


def test_full_order_is_a_fair_shuffle() -> None:
    places = np.stack([global_batch(0, epoch, 0, 50, 50) for epoch in range(2000)])
    counts = np.stack([np.bincount(column, minlength=50) for column in places.T])
    assert np.abs(counts - 40).max() < 6 * np.sqrt(40)


def test_block_order_reads_near_one_another() -> None:
    n = 400_000
    blocks = np.unique(global_batch(0, 0, 0, n, 16_384, "block") // BLOCK)
    assert len(blocks) == 64
    assert np.diff(blocks).max() > 1  # but the blocks themselves are shuffled


def test_position_counts_whole_batches() -> None:
    assert [position(k, 10, 4) for k in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size=11 is larger than the data set \(10 images\)"):
        global_batch(0, 0, 0, 10, 11)
    with pytest.raises(ValueError, match="step 2 is outside"):
        global_batch(0, 0, 2, 10, 4)
    with pytest.raises(ValueError, match="'random'"):
        global_batch(0, 0, 0, 10, 4, "random")  # type: ignore[arg-type]


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10_000),
    n=st.integers(1, 2000),
    mode=st.sampled_from(["full", "block"]),
    data=st.data(),
)
def test_steps_of_an_epoch_share_no_sample(
    seed: int, epoch: int, n: int, mode: str, data: st.DataObject
) -> None:
    b = data.draw(st.integers(1, n))
    steps = [global_batch(seed, epoch, step, n, b, mode) for step in range(steps_per_epoch(n, b))]
    seen = np.concatenate(steps)
    assert len(np.unique(seen)) == len(seen) == n // b * b
    assert seen.min() >= 0 and seen.max() < n
    # The same epoch in other batches is the same order: only where it is cut differs.
    other = data.draw(st.integers(1, n))
    again = np.concatenate([global_batch(seed, epoch, k, n, other, mode) for k in range(n // other)])
    both = min(len(seen), len(again))
    assert np.array_equal(seen[:both], again[:both])
