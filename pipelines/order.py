"""Orders the samples: the ids of global step k are a pure function of (seed, epoch, step), for any number of ranks.

    epoch e:   order(e) = [ s0 s1 s2 ... s(n-1) ]                     every sample once
               step k   = order(e)[k*B : (k+1)*B]                     k < n // B; the last n % B samples are dropped,
               rank r   = step k [r*b : (r+1)*b],  b = B / ranks      different ones in each epoch

    lanes:     the shuffled blocks, cut into L = gcd(B, 64) lanes of n // L samples
               lane l   = [ window | window | ... ]                   8 blocks each, their samples shuffled
               step k   = lane 0 [k*c : (k+1)*c], lane 1 [k*c ...     c = B / L; rank r reads its own L / ranks lanes

A run of E epochs takes int(E * n / B) steps, as in the reference. Because epochs drop samples, the last steps can be in
one more epoch. "block" and "lanes" compute only the windows that a batch touches, "full" the whole epoch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from byolt.files.console import count
from byolt.pipelines.manifest import BLOCK
from byolt.pipelines.philox import ORDER_STREAM, random_bits

Mode = Literal["full", "block", "lanes"]
WINDOW = 64  # blocks whose samples are shuffled together: 16,384 samples
LANES = 64  # at most
LANE_WINDOW = 8  # blocks whose samples are shuffled together in a lane; in all lanes 131,072 samples
_PIECE = 1 << 16  # samples whose random bits are computed together: temporaries of 3 MB each

_Ids = npt.NDArray[np.int64]


def check_batch_size(num_samples: int, batch_size: int) -> None:
    """Raises ValueError if the data set has fewer than the two images of batch norm, or a batch is larger."""
    if num_samples < 2 <= batch_size:
        raise ValueError(
            f"the data set has {count(num_samples, 'image')}; at least 2 are needed (batch norm)"
        )
    if batch_size > num_samples:
        raise ValueError(
            f"train.batch_size={batch_size} is larger than the data set ({num_samples} images): "
            f"lower it to at most {num_samples}, or use more images"
        )


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Whole batches in one epoch; see `check_batch_size`."""
    check_batch_size(num_samples, batch_size)
    return num_samples // batch_size


def position(step: int, num_samples: int, batch_size: int) -> tuple[int, int]:
    """(epoch, step within the epoch) of the run's step k."""
    return divmod(step, steps_per_epoch(num_samples, batch_size))


def global_batch(
    seed: int, epoch: int, step: int, num_samples: int, batch_size: int, mode: Mode = "full"
) -> _Ids:
    """Sample ids of one global batch, in order.

    Args:
        seed: 0 <= seed < 2**63.
        epoch: 0-based.
        step: 0-based within the epoch, below num_samples // batch_size.
        num_samples: size of the data set.
        batch_size: images of all ranks together.
        mode: "full": a permutation of all samples. "block": blocks of 256 consecutive samples are shuffled, then the
            samples within every 64 blocks, so that consecutive reads are near each other. "lanes": the same in up to 64
            lanes with 8 blocks at once each, so that every rank reads blocks of its own.

    Returns:
        (batch_size,) int64, all different; no two steps of an epoch share an id.

    Raises:
        ValueError: step or batch size out of range.
    """
    return RankOrder(seed, num_samples, batch_size, mode).part(epoch, step, 0, batch_size)


@dataclass(frozen=True)
class RankOrder:
    """One rank's part of every global batch of a run.

    Micro-batch j of a step consists of the same samples for any number of ranks.
    """

    seed: int  # 0 <= seed < 2**63
    num_samples: int  # size of the data set
    batch_size: int  # images of all ranks together, a multiple of accumulation * world_size
    mode: Mode = "full"  # see `global_batch`
    accumulation: int = 1  # micro-batches per step
    rank: int = 0  # this process, 0 <= rank < world_size
    world_size: int = 1  # processes that share each global batch

    def __post_init__(self) -> None:
        check_batch_size(self.num_samples, self.batch_size)

    def batches(self, step: int) -> tuple[int, _Ids]:
        """The epoch of the run's step k, and this rank's ids, int64 (accumulation, images), a row per micro-batch."""
        epoch, place = position(step, self.num_samples, self.batch_size)
        if self.mode == "lanes":  # the rank's lanes; each micro-batch takes evenly from all of them
            share = self.batch_size // self.world_size
            ids = self.part(epoch, place, self.rank * share, (self.rank + 1) * share)
            return epoch, np.ascontiguousarray(ids.reshape(-1, self.accumulation).T)
        ids = self.part(epoch, place, 0, self.batch_size)
        return epoch, ids.reshape(self.accumulation, self.world_size, -1)[:, self.rank]

    def part(self, epoch: int, step: int, start: int, stop: int) -> _Ids:
        """Places `start` to `stop` of a global batch, of any ranks; see `global_batch`."""
        steps = self.num_samples // self.batch_size
        if not 0 <= step < steps:
            raise ValueError(f"step {step} is outside the epoch's {steps} steps")
        of_epoch = self.seed, epoch, self.num_samples
        first = step * self.batch_size
        if self.mode == "full":
            return _full_order(*of_epoch)[first + start : first + stop]
        if self.mode == "block":
            return _in_windows(*of_epoch, first + start, first + stop, _block_window)
        if self.mode != "lanes":
            raise ValueError(f'order mode {self.mode!r} is none of "full", "block" and "lanes"')
        count = lanes(self.batch_size)
        each = self.batch_size // count  # samples of a lane in a step
        parts = []
        for lane in range(start // each, -(-stop // each)):
            begin = lane * (self.num_samples // count) + step * each
            inside = begin + max(start - lane * each, 0), begin + min(stop - lane * each, each)
            parts.append(_in_windows(*of_epoch, *inside, partial(_lane_window, *of_epoch, count, lane)))
        return np.concatenate(parts)


def window(mode: Mode, batch_size: int) -> int:
    """Samples that are shuffled together, on all ranks: these blocks are in use at once ("full": as for "block")."""
    return lanes(batch_size) * LANE_WINDOW * BLOCK if mode == "lanes" else WINDOW * BLOCK


def lanes(batch_size: int) -> int:
    """Number of lanes: it does not depend on the number of ranks, and divides the batch."""
    return math.gcd(batch_size, LANES)


@lru_cache(maxsize=2)
def _full_order(seed: int, epoch: int, num_samples: int) -> _Ids:
    """The permutation of one epoch: 0.3 s for 1.28 M samples, 27 s and 3.2 GB for 100 M."""
    return _frozen(_shuffled(seed, epoch, np.arange(num_samples), slot=0))


@lru_cache(maxsize=4)
def _blocks(seed: int, epoch: int, num_samples: int) -> tuple[_Ids, _Ids]:
    """The shuffled block numbers of an epoch, and where each begins and the last ends in the sequence of samples."""
    blocks = _shuffled(seed, epoch, np.arange(-(-num_samples // BLOCK)), slot=1)
    ends = np.cumsum(np.minimum(BLOCK, num_samples - blocks * BLOCK))
    return _frozen(blocks), _frozen(np.append(0, ends))


def _in_windows(
    seed: int, epoch: int, num_samples: int, first: int, last: int, find: Callable[[int], tuple[int, int]]
) -> _Ids:
    """Places `first` to `last` of the shuffled blocks' samples, each window shuffled; `find` finds a place's."""
    parts = []
    while first < last:
        begin, end = find(first)
        parts.append(_window(seed, epoch, num_samples, begin, end)[first - begin : last - begin])
        first = end
    return np.concatenate(parts)


def _block_window(place: int) -> tuple[int, int]:
    begin = place - place % (WINDOW * BLOCK)
    return begin, begin + WINDOW * BLOCK


def _lane_window(
    seed: int, epoch: int, num_samples: int, count: int, lane: int, place: int
) -> tuple[int, int]:
    """Begin and end of a lane's window, both between two blocks or at the lane's ends.

    First windows have 1 to 8 blocks, so that the lanes do not all need their next blocks at the same step.
    """
    starts = _blocks(seed, epoch, num_samples)[1]
    length = num_samples // count
    of_lane, of_place = np.searchsorted(starts, (lane * length, place), "right") - 1
    origin = of_lane - lane % LANE_WINDOW
    begin = of_place - (of_place - origin) % LANE_WINDOW
    edges = starts[np.clip((begin, begin + LANE_WINDOW), 0, len(starts) - 1)]
    begin, end = np.clip(edges, lane * length, (lane + 1) * length).tolist()
    return begin, end


@lru_cache(maxsize=4 * LANES)  # this epoch's windows and the next ones: 4 MB in lanes, 33 MB in blocks
def _window(seed: int, epoch: int, num_samples: int, begin: int, end: int) -> _Ids:
    """Places `begin` to `end` of the shuffled blocks' samples, shuffled among themselves."""
    blocks, starts = _blocks(seed, epoch, num_samples)
    first, last = np.searchsorted(starts, begin, "right") - 1, np.searchsorted(starts, end)
    samples = (blocks[first:last, None] * BLOCK + np.arange(BLOCK)).ravel()
    samples = samples[samples < num_samples][begin - starts[first] : end - starts[first]]
    return _frozen(_shuffled(seed, epoch, samples, slot=0))


def _shuffled(seed: int, epoch: int, ids: _Ids, slot: int) -> _Ids:
    """The ids sorted by 64 random bits of each."""
    keys = np.empty(len(ids), np.uint64)
    for first in range(0, len(ids), _PIECE):
        piece = slice(first, first + _PIECE)
        high, low = random_bits(seed, epoch, ids[piece], ORDER_STREAM, 2 * slot + 2)[2 * slot :]
        keys[piece] = high << np.uint64(32) | low
    return ids[np.argsort(keys, kind="stable")]


def _frozen(ids: _Ids) -> _Ids:
    ids.flags.writeable = False  # every caller of a cache shares it
    return ids
