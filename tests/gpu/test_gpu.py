"""The GPU cases under pytest: all cases of a world size run in one set of processes, each is a test of its own."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.gpu import failures, harness

pytestmark = pytest.mark.gpu

WORLDS = (1, 2, 3, 4)
AVAILABLE = torch.cuda.device_count() if torch.cuda.is_available() else 0


@functools.cache
def _outcomes(world: int) -> dict[str, harness.Outcome]:
    outcomes = harness.run(world, [], timeout=900, case_timeout=180)
    return {outcome.id: outcome for outcome in outcomes}


@pytest.mark.parametrize(("world", "identity"), [(w, c.id) for w in WORLDS for c in harness.select(w, [])])
def test_case(world: int, identity: str) -> None:
    if world > AVAILABLE:
        pytest.skip(f"needs {world} CUDA GPUs, there are {AVAILABLE}")
    outcome = _outcomes(world)[identity]
    assert outcome.state == "passed", outcome.message


@pytest.mark.parametrize("world", [w for w in WORLDS if w > 1])
def test_killed_rank(world: int) -> None:
    if world > AVAILABLE:
        pytest.skip(f"needs {world} CUDA GPUs, there are {AVAILABLE}")
    for outcome in failures.run(world):
        assert outcome.state == "passed", outcome.message
