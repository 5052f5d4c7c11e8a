"""A few of the fuzz's mutants and chains (``python -m benchmarks.fuzz`` has as many as there is time for)."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import pytest

from benchmarks import fuzz
from tests.simulate import fake_world

FOUND = (311,)
"""Seeds that once failed: an INT8 quantiser whose whole numbers go through fp16."""


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with fake_world(fuzz.WORLD):
        yield


@pytest.mark.parametrize("seed", [*FOUND, *range(1000, 1020)])
def test_mutant(seed: int) -> None:
    assert fuzz.one_mutant(seed, collections.Counter()) is None


def test_counts() -> None:
    """What the table counts: most mutants are graphs by themselves, and some of them fuse."""
    counts: fuzz.Counts = collections.Counter()
    assert all(fuzz.one_mutant(seed, counts) is None for seed in range(2000, 2012))
    assert counts["graphs"] > counts["no graph"]
    assert 0 < counts["fused"] < counts["sites"]
