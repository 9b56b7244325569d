"""Random numbers: the known answers of Philox's authors, independent addresses, a uniform distribution."""

import numpy as np
import pytest

from byolt.pipelines.philox import ORDER_STREAM, philox4x32, random_bits, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known-answer vectors of the authors (Random123, kat_vectors, philox4x32 10)
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    words = philox4x32(tuple(np.array([c], np.uint64) for c in counter), key)
    assert tuple(int(w[0]) for w in words) == expected


def test_random_bits_have_addresses() -> None:
    """Seed, epoch, id, stream and slot all matter, and a number does not depend on the other ones."""
    ids = np.array([5, 2**40 + 5, 6])
    base = random_bits(1, 2, ids, 0, 6)
    assert base.shape == (6, 3) and len(np.unique(base)) == 18
    assert np.array_equal(base[:3, 2:], random_bits(1, 2, ids[2:], 0, 3))
    for other in (
        (2, 2, ids, 0),
        (1 + 2**32, 2, ids, 0),
        (1, 3, ids, 0),
        (1, 2, ids, 1),
        (1, 2, ids, ORDER_STREAM),
    ):
        assert not (random_bits(*other, 6) == base).any()


def test_uniform_is_uniform() -> None:
    u = uniform(0, 0, np.arange(100_000), 0, 3)
    assert u.min() >= 0 and u.max() < 1
    assert np.abs(u.mean(1) - 0.5).max() < 0.004  # 4 standard errors
    histogram = np.stack([np.histogram(row, 20, (0, 1))[0] for row in u])
    assert np.abs(histogram - 5000).max() < 5 * 69  # 5 standard deviations of a bin
    assert np.abs(np.corrcoef(u) - np.eye(3)).max() < 0.016
