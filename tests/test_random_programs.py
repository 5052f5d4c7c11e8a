"""Random functions in eager Python: fused or not, what torch.compile makes of them means the same."""

from __future__ import annotations

import collections

import pytest

from benchmarks import fuzz


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("seed", [1, 2, 3, 38])
def test_random_program(seed: int) -> None:
    """Contracts *sound* and *exact*: the same bits, memory and mutations; each fused site is exact when replayed."""
    counts: fuzz.Counts = collections.Counter()
    assert fuzz.one_program(seed, counts) is None
    assert counts["graphs"] == 1


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("seed", [3, 9])
def test_random_served_program(seed: int) -> None:
    """The same of functions with caches, masks, branches and a second group."""
    counts: fuzz.Counts = collections.Counter()
    assert fuzz.one_served(seed, counts) is None
    assert counts["graphs"] == 1
    assert counts["fused"] > 0
