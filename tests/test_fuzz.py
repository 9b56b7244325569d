"""A short run of tests/fuzz.py; benchmarks/cpu holds the result of a long one."""

import fuzz
import pytest


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_damaged_files_are_read_or_refused(name: str) -> None:
    outcomes = fuzz.run(name, 1500, seed=1)
    assert outcomes["read"] > 15 and outcomes["ValueError"] > 100  # both sides of the readers are reached
