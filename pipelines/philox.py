"""Stateless random numbers for `order` and `views`: Philox4x32-10 of (seed, epoch, sample id, stream, slot).

A number depends only on this address, so it is the same on any rank, in any batch and after any restart. Unlike numpy's
generators, it cannot change with a numpy release. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011; the authors' known-answer vectors are in the tests.
"""

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)

ORDER_STREAM = 0xFFFF  # streams 0 and 1 are the two views


def philox4x32(
    counter: tuple[npt.NDArray[np.uint64], ...], key: tuple[int, int]
) -> tuple[npt.NDArray[np.uint64], ...]:
    """Ten rounds of Philox4x32 of a counter, four uint64 arrays of one shape, and a key, two numbers, all of 32 bits.

    Returns four uint64 arrays of that shape with 32 random bits each.
    """
    c0, c1, c2, c3 = counter
    for turn in range(10):
        k0 = np.uint64((key[0] + turn * _WEYL[0]) & 0xFFFFFFFF)
        k1 = np.uint64((key[1] + turn * _WEYL[1]) & 0xFFFFFFFF)
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (right >> _HIGH) ^ c1 ^ k0, right & _LOW
        c2, c3 = (left >> _HIGH) ^ c3 ^ k1, left & _LOW
    return c0, c1, c2, c3


def random_bits(
    seed: int, epoch: int, ids: npt.NDArray[np.integer], stream: int, slots: int
) -> npt.NDArray[np.uint64]:
    """32 random bits for every (slot, sample).

    Args:
        seed: 0 <= seed < 2**63.
        epoch: 0 <= epoch < 2**32.
        ids: (N,) sample ids, 0 <= id < 2**63.
        stream: 0 to 65535; one for each view and one for the order.
        slots: numbers per sample.

    Returns:
        (slots, N) uint64, values below 2**32.
    """
    ids = ids.astype(np.uint64)
    blocks = -(-slots // 4)
    lane = (np.uint64(stream << 16) + np.arange(blocks, dtype=np.uint64))[:, None]
    shape = (blocks, len(ids))
    counter = (
        np.broadcast_to(ids & _LOW, shape),
        np.broadcast_to(ids >> _HIGH, shape),
        np.broadcast_to(np.uint64(epoch), shape),
        np.broadcast_to(lane, shape),
    )
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack(words, axis=1).reshape(blocks * 4, len(ids))[:slots]


def uniform(
    seed: int, epoch: int, ids: npt.NDArray[np.integer], stream: int, slots: int
) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), multiples of 2**-32, shape (slots, N); arguments as `random_bits`."""
    return np.ldexp(random_bits(seed, epoch, ids, stream, slots).astype(np.float64), -32)
