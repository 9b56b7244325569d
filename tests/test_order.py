"""Every sample exactly once an epoch, the same order for any number of ranks, and nothing else."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byolt.pipelines.order import (
    BLOCK,
    LANE_WINDOW,
    RankOrder,
    global_batch,
    lanes,
    position,
    steps_per_epoch,
)

FULL = [716, 618, 961, 829, 330, 34, 195, 838]
LANES = [33503, 10146, 76265, 90660, 51629, 8061, 23252, 12743]
BLOCKS = [41894, 14381, 10146, 60973, 26768, 7377, 63023, 96258]
GRID = [(n, b) for n in (1, 2, 7, 64, 257, 1000, 20_000) for b in (1, 2, 7, 64, 1000) if b <= n]


@pytest.mark.parametrize("mode", ["full", "block", "lanes"])
@pytest.mark.parametrize(("n", "b"), GRID)
def test_each_sample_once_an_epoch(n: int, b: int, mode: str) -> None:
    steps = steps_per_epoch(n, b)
    seen = np.concatenate([global_batch(3, 1, step, n, b, mode) for step in range(min(steps, 50))])
    assert seen.dtype == np.int64 and seen.min() >= 0 and seen.max() < n
    assert len(np.unique(seen)) == len(seen) == min(steps, 50) * b
    if steps <= 50 and n % b == 0:
        assert np.array_equal(np.sort(seen), np.arange(n))


@pytest.mark.parametrize("mode", ["full", "block", "lanes"])
def test_epochs_and_seeds_differ_and_repeat(mode: str) -> None:
    first = global_batch(0, 0, 3, 5000, 100, mode)
    assert np.array_equal(first, global_batch(0, 0, 3, 5000, 100, mode))
    for seed, epoch in ((0, 1), (1, 0)):
        assert not np.array_equal(first, global_batch(seed, epoch, 3, 5000, 100, mode))


def test_order_is_frozen() -> None:
    """The order of a release is the order of every later one: a run resumed after an upgrade continues unchanged."""
    assert global_batch(0, 0, 0, 1000, 8).tolist() == FULL
    assert global_batch(0, 0, 0, 100_000, 8, "block").tolist() == BLOCKS
    assert global_batch(0, 0, 0, 100_000, 8, "lanes").tolist() == LANES


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
    with pytest.raises(ValueError, match=r"^the data set has 1 image; at least 2 are needed"):
        global_batch(0, 0, 0, 1, 2)
    with pytest.raises(ValueError, match="step 2 is outside"):
        global_batch(0, 0, 2, 10, 4)
    with pytest.raises(ValueError, match="'random'"):
        global_batch(0, 0, 0, 10, 4, "random")  # type: ignore[arg-type]


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10_000),
    n=st.integers(1, 2000),
    mode=st.sampled_from(["full", "block", "lanes"]),
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
    if mode == "lanes":
        return
    # The same epoch in other batches is the same order: only where it is cut differs.
    other = data.draw(st.integers(1, n))
    again = np.concatenate([global_batch(seed, epoch, k, n, other, mode) for k in range(n // other)])
    both = min(len(seen), len(again))
    assert np.array_equal(seen[:both], again[:both])


SHARED = st.tuples(st.sampled_from([1, 2, 3, 4, 8, 64]), st.integers(1, 3), st.integers(1, 5))


@settings(deadline=None, max_examples=50)
@given(SHARED, st.integers(0, 4), st.integers(0, 20_000), st.sampled_from(["full", "block", "lanes"]))
def test_ranks_share_every_micro_batch(shared: tuple[int, int, int], step: int, more: int, mode: str) -> None:
    """In one epoch or in several: 1 rank has the samples that any number of ranks have together, in their order."""
    ranks, accumulation, images = shared
    b = ranks * accumulation * images
    one = RankOrder(3, b + more, b, mode, accumulation)
    parts = [RankOrder(3, b + more, b, mode, accumulation, rank, ranks) for rank in range(ranks)]
    epoch, rows = one.batches(step)
    together = np.concatenate([part.batches(step)[1] for part in parts], 1)
    assert np.array_equal(together, rows) and rows.shape == (accumulation, b // accumulation)
    place = position(step, b + more, b)[1]
    assert np.array_equal(np.sort(rows, None), np.sort(global_batch(3, epoch, place, b + more, b, mode)))


def _blocks_by_lane(seed: int, n: int, b: int) -> np.ndarray:
    """An epoch's blocks, (steps, lanes, samples of a lane in a step)."""
    epoch = np.stack([global_batch(seed, 1, step, n, b, "lanes") for step in range(n // b)])
    return epoch.reshape(n // b, lanes(b), -1) // BLOCK


def _assert_each_block_read_once(seed: int, n: int, b: int, most: float) -> None:
    """By the rank of its lane, at about the same time; only the cut between two lanes reads a block twice."""
    blocks = _blocks_by_lane(seed, n, b)
    steps, count, each = blocks.shape
    for ranks in (k for k in (1, 2, 4, 8, 64) if count % k == 0):
        downloads = [np.unique(part) for part in np.split(blocks, ranks, 1)]
        assert sum(map(len, downloads)) <= most
    step = np.broadcast_to(np.arange(steps)[:, None], (steps, each))
    for lane in blocks[:, 0], blocks[:, -1]:
        for block in np.unique(lane):
            assert np.ptp(step[lane == block]) <= -(-LANE_WINDOW * BLOCK // each)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**63 - 1), st.integers(1, 15_000), st.sampled_from([2, 48, 64, 128, 192, 320]))
def test_a_block_has_one_lane(seed: int, more: int, b: int) -> None:
    n = b + more
    _assert_each_block_read_once(seed, n, b, -(-n // BLOCK) + lanes(b) - 1)


@pytest.mark.slow
def test_ranks_download_imagenet_once() -> None:
    _assert_each_block_read_once(0, 1_281_167, 4096, 1.02 * 1_281_167 / BLOCK)


def test_lanes_mix_more_blocks_than_block_order() -> None:
    """And not all of them at once need their next blocks: the first step needs 1 to 8 blocks of each lane."""
    for step, fewest, most in ((0, 200, 300), (100, 400, 9 * 64)):
        blocks = np.unique(global_batch(0, 0, step, 1_281_167, 4096, "lanes") // BLOCK)
        assert fewest < len(blocks) <= most
    assert len(np.unique(global_batch(0, 0, 100, 1_281_167, 4096, "block") // BLOCK)) <= 2 * 64


@pytest.mark.parametrize("mode", ["block", "lanes"])
def test_a_hundred_million_samples_need_no_permutation(mode: str) -> None:
    tracemalloc.start()
    ids = RankOrder(0, 10**8, 4096, mode, rank=3, world_size=64).batches(7)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ids.shape == (1, 64) and peak < 40 * 2**20
