"""The crossover search with made-up times: where one-shot loses, never, from the start."""

import subprocess
import sys

import pytest

from arfusion_pass.cli import tune
from arfusion_pass.ops.spec import Flags


@pytest.mark.parametrize(
    ("limit", "low", "high"), [(1 << 20, 1 << 19, 1 << 21), (1 << 12, 0, 0), (1 << 50, 1 << 40, 1 << 40)]
)
def test_crossover(monkeypatch, limit, low, high):
    def microseconds(group, tokens, hidden, flags):
        message = tokens * hidden * 2
        return (1.0 if message <= limit else 3.0) if flags == Flags.ONESHOT else 2.0

    monkeypatch.setattr(tune, "_microseconds", microseconds)
    assert low <= tune._crossover(None, 4096, Flags.ONESHOT, Flags.TWOSHOT) <= high


def test_one_noisy_figure_does_not_decide():
    """One-shot is ahead at four sizes, of which an outlier hides one; two-shot from the fifth on."""
    sizes, behind = [1 << power for power in range(14, 20)], [0.2, 0.4]
    assert tune.limit(sizes, [-0.3, 0.05, -0.3, -0.3, *behind]) == tune.limit(sizes, [-0.3] * 4 + behind)


def test_too_few_gpus_are_a_line():
    """Of the module as a script, which a job on the wrong machine runs."""
    command = [sys.executable, "-m", "arfusion_pass.cli.tune", "99"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("tune: tuning for 99 ranks needs as many GPUs, there are ")
    assert "Traceback" not in done.stderr
