"""Orders the samples: the ids of global step k are a pure function of (seed, epoch, step), for any number of ranks.

    epoch e:   order(e) = [ s0 s1 s2 ... s(n-1) ]                     every sample once
               step k   = order(e)[k*B : (k+1)*B]                     k < n // B; the last n % B samples are dropped,
               rank r   = step k [r*b : (r+1)*b],  b = B / ranks      different ones in each epoch

A run of E epochs takes int(E * n / B) steps, as in the reference. Because epochs drop samples, the last steps can be in
one more epoch.
"""

from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from byolt.pipelines.philox import ORDER_STREAM, random_bits

Mode = Literal["full", "block"]
BLOCK = 256  # consecutive samples: 28 MB of ImageNet in one read
WINDOW = 64  # blocks whose samples are shuffled together: 16,384 samples


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Whole batches in one epoch.

    Raises:
        ValueError: the batch is larger than the data set.
    """
    if batch_size > num_samples:
        raise ValueError(
            f"train.batch_size={batch_size} is larger than the data set ({num_samples} images): "
            f"lower it to at most {num_samples}, or use more images"
        )
    return num_samples // batch_size


def position(step: int, num_samples: int, batch_size: int) -> tuple[int, int]:
    """(epoch, step within the epoch) of the run's step k."""
    return divmod(step, steps_per_epoch(num_samples, batch_size))


def global_batch(
    seed: int, epoch: int, step: int, num_samples: int, batch_size: int, mode: Mode = "full"
) -> npt.NDArray[np.int64]:
    """Sample ids of one global batch, in order.

    Args:
        seed: 0 <= seed < 2**63.
        epoch: 0-based.
        step: 0-based within the epoch, below num_samples // batch_size.
        num_samples: size of the data set.
        batch_size: images of all ranks together.
        mode: "full": a permutation of all samples. "block": blocks of 256 consecutive samples are shuffled, then the
            samples within every 64 blocks, so that consecutive reads are near each other.

    Returns:
        (batch_size,) int64, all different; no two steps of an epoch share an id.

    Raises:
        ValueError: step or batch size out of range.
    """
    steps = steps_per_epoch(num_samples, batch_size)
    if not 0 <= step < steps:
        raise ValueError(f"step {step} is outside the epoch's {steps} steps")
    return _epoch_order(seed, epoch, num_samples, mode)[step * batch_size : (step + 1) * batch_size]


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_samples: int, mode: Mode) -> npt.NDArray[np.int64]:
    """The permutation of one epoch, (num_samples,) int64: half a second for 1.28 M samples."""
    if mode == "full":
        order = _shuffled(seed, epoch, np.arange(num_samples), slot=0)
    elif mode == "block":
        blocks = _shuffled(seed, epoch, np.arange(-(-num_samples // BLOCK)), slot=1)
        samples = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        samples = samples[samples < num_samples]
        windows = np.split(samples, range(BLOCK * WINDOW, num_samples, BLOCK * WINDOW))
        order = np.concatenate([_shuffled(seed, epoch, window, slot=0) for window in windows])
    else:
        raise ValueError(f'order mode {mode!r} is neither "full" nor "block"')
    order.flags.writeable = False  # every caller of the cache shares it
    return order


def _shuffled(seed: int, epoch: int, ids: npt.NDArray[np.int64], slot: int) -> npt.NDArray[np.int64]:
    """The ids sorted by 64 random bits of each."""
    bits = random_bits(seed, epoch, ids, ORDER_STREAM, 2 * slot + 2)[2 * slot :]
    return ids[np.argsort(bits[0] << np.uint64(32) | bits[1], kind="stable")]
