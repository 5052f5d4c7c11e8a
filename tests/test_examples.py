"""Each example, and the benchmark of a whole model, runs as it stands and fuses what it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


EXAMPLES = {
    "minimal.py": "1 of 1 sites fused, none missed, in 1 graph",
    "sequence_parallel.py": "3 of 3 sites fused, none missed, in 1 graph",
    "hf_tp_plan.py --model qwen3": "5 of 5 sites fused, none missed, in 1 graph",
    "hf_tp_plan.py --generate 4": "with the pass: ",
}
"""What is run of ``examples/``, and what it prints."""


@pytest.mark.parametrize(("command", "summary"), EXAMPLES.items(), ids=lambda text: text.partition(" sites")[0])
def test_example(command: str, summary: str) -> None:
    if command.startswith("hf"):
        pytest.importorskip("transformers")
    assert summary in on_two_ranks(*f"{ROOT}/examples/{command}".split())


def test_model_benchmark(tmp_path: Path) -> None:
    """A decode step behind a static cache: every all-reduce of a layer and the embedding's fuses, the logits stay."""
    pytest.importorskip("transformers")
    small = ["--layers", "1", "--hidden", "256", "--batch", "2", "--context", "32"]
    on_two_ranks("-m", "benchmarks.bench_model", *small, "--out", str(tmp_path / "model.json"))
    measured = json.loads((tmp_path / "model.json").read_text())["batches"]["2"]["with the pass"]
    assert (measured["fused"], measured["missed"]) == (3, 0)
    assert measured["from eager"] < 0.05


def test_model_benchmark_of_a_prefill_in_fp8(tmp_path: Path) -> None:
    """A whole prompt through FP8 linear layers: all 2n + 1 sites fuse, the 2n in front of FP8 layers with their
    quantiser, each exact."""
    pytest.importorskip("transformers")
    small = ["--layers", "1", "--hidden", "128", "--prefill", "24", "--linear", "fp8", "--check"]
    on_two_ranks("-m", "benchmarks.bench_model", *small, "--out", str(tmp_path / "model.json"))
    measured = json.loads((tmp_path / "model.json").read_text())["prefill"]["24"]
    for name in ("with the pass, replicated", "with the pass, sharded"):
        found = measured[name]
        assert (found["fused"], found["missed"], found["quantised"], found["exact"]) == (3, 0, 2, 3)
    assert measured["with the pass, sharded"]["the replicated's bits"]


def on_two_ranks(*command: str) -> str:
    """What a script or module prints under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr, done.stderr  # who copies an example starts with what will last
    return done.stdout
