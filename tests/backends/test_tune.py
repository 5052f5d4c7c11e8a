"""The crossover search with made-up times: where one-shot loses, never, from the start."""

import pytest

from arfusion_pass.backends import tune
from arfusion_pass.ops.spec import Flags


@pytest.mark.parametrize(
    ("limit", "low", "high"), [(1 << 20, 1 << 19, 1 << 21), (1 << 12, 0, 0), (1 << 50, 1 << 40, 1 << 40)]
)
def test_crossover(monkeypatch, limit, low, high):
    def microseconds(group, tokens, hidden, flags):
        message = tokens * hidden * 2
        return (1.0 if message <= limit else 3.0) if flags == Flags.ONESHOT else 2.0

    monkeypatch.setattr(tune, "_microseconds", microseconds)
    assert low <= tune._crossover(None, 4096) <= high
