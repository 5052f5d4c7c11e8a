"""A few of the fuzz's mutants and chains (``python -m benchmarks.fuzz`` has as many as there is time for)."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import pytest

from arfusion_pass import groups
from benchmarks import fuzz
from tests import random_sites
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


@pytest.mark.parametrize("seed", [1835, *range(1000, 1010)])
def test_writing(seed: int) -> None:
    """Contract *sound* (1835 once failed: an all-reduce in place behind the wait for its tensor)."""
    assert fuzz.one_writing(seed, collections.Counter()) is None


@pytest.mark.parametrize("seed", [1015, 1018, 1034, 1049, 1052, 1055])
def test_silent_writing(seed: int) -> None:
    """Contract *sound*: a writer whose op does not say so."""
    assert fuzz.one_silent(seed, collections.Counter()) is None


@pytest.mark.parametrize("seed", [1300, 1375, 1425])
def test_operands_by_name(seed: int) -> None:
    """Operands that a pass gave by name make no site fail but their own."""
    assert fuzz.one_named(seed, collections.Counter()) is None


@pytest.mark.parametrize("seed", [1002, 1016, 1018, 1038, 1082, 1096])
def test_in_place(seed: int) -> None:
    """All-reduces in place, whose sum others read by the tensor's name, or write to."""
    assert fuzz.one_in_place(seed, collections.Counter()) is None


def test_engine_norm_of_a_widened_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that is widened for an engine's norm is no error of the pass (a drawn graph that once failed)."""
    monkeypatch.setattr(groups, "_registered", {})
    random_sites.register()
    fuzz.register_groups(fuzz.WORLD)
    assert fuzz.one_of_sites(26, collections.Counter()) is None


def test_counts() -> None:
    """What the table counts: most mutants are graphs by themselves, and some of them fuse."""
    counts: fuzz.Counts = collections.Counter()
    assert all(fuzz.one_mutant(seed, counts) is None for seed in range(2000, 2012))
    assert counts["graphs"] > counts["no graph"]
    assert 0 < counts["fused"] < counts["sites"]
