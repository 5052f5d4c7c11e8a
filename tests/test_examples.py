"""Each example runs as it stands, and fuses what it should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("command", "summary"),
    [
        (["minimal.py"], "1 of 1 sites fused, none missed, in 1 graph"),
        (["hf_tp_plan.py"], "5 of 5 sites fused, none missed, in 1 graph"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_example(command: list[str], summary: str) -> None:
    if command[0].startswith("hf"):
        pytest.importorskip("transformers")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(ROOT / "examples" / command[0]), *command[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launcher, *script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert summary in done.stdout
