"""Real model classes of vLLM, compiled by its back-end as on a GPU (``vllm_models.py``): every site that there is
fuses, with its quantiser, to the bits of the graph as it came; the others say why. Skipped without vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
if shutil.which("gcc") is None:
    pytest.skip("there is no gcc to make an empty libcuda with", allow_module_level=True)

PLAIN, ADD = "AllReduceRMSNorm", "AllReduceFusedAddRMSNorm"
GEMMA, ADD_GEMMA = "AllReduceGemmaRMSNorm", "AllReduceFusedAddGemmaRMSNorm"
EMBEDDING_GEMMA = "AllReduceScaledGemmaRMSNorm"
USUAL = [PLAIN, *[ADD] * 4]
LAYER_NORM = "belongs to a LayerNorm"


def with_quantiser(name: str) -> list[str]:
    """The usual sites, each norm but the last with this quantiser."""
    return [*(pattern + name for pattern in USUAL[:-1]), ADD]


EXPECTED: dict[int, dict[str, tuple[list[str], list[str]]]] = {
    9: {
        "qwen3_moe": (USUAL, []),
        "deepseek_v3": (USUAL, []),
        "gpt_oss": (USUAL, []),
        "llama": (USUAL, []),
        "llama+fp8_static": (with_quantiser("StaticQuantFP8"), []),
        "llama+fp8": (with_quantiser("TokenQuantFP8"), []),
        "gemma": ([EMBEDDING_GEMMA, *[ADD_GEMMA] * 4], []),
        "gemma2": ([EMBEDDING_GEMMA, *[GEMMA] * 4], []),
        "tf_gemma": ([EMBEDDING_GEMMA, *[ADD_GEMMA] * 4], []),
        "glm4": ([PLAIN] * 5, []),
        "olmo2": ([PLAIN] * 4, ["no RMSNorm over its last dimension follows"]),
        "mamba2": ([PLAIN, ADD, ADD], ["it reduces one number for each row"] * 2),
        "granite": (["AllReduceScaledRMSNorm", *["AllReduceScaledFusedAddRMSNorm"] * 4], []),
        "cohere": ([], [LAYER_NORM] * 3),
    },
    10: {
        "llama+fp8_block": (with_quantiser("GroupQuantFP8"), []),
        "llama+nvfp4": (with_quantiser("QuantNVFP4"), []),
    },
}
"""By compute capability and model: the fused sites' patterns, and a part of each other one's reason, in graph order."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Any]:
    """What became of each model, a process for each capability."""
    root = pathlib.Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm"))}
    found = {}
    for capability, models in EXPECTED.items():
        command = [sys.executable, "-m", "tests.engines.vllm_models", str(capability), *models]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-4000:]
        outcome = json.loads(done.stdout.splitlines()[-1])
        found |= {(capability, name): outcome[name] for name in models}
    return found


@pytest.mark.parametrize(("capability", "name"), [(each, name) for each in EXPECTED for name in EXPECTED[each]])
def test_model(capability: int, name: str, outcomes: dict[tuple[int, str], Any]) -> None:
    patterns, reasons = EXPECTED[capability][name]
    outcome = outcomes[capability, name]
    assert outcome["patterns"] == patterns, outcome["missed"]
    assert len(outcome["missed"]) == len(reasons), outcome["missed"]
    assert all(part in reason for part, reason in zip(reasons, outcome["missed"], strict=True)), outcome["missed"]
    assert outcome["differing"] == []
