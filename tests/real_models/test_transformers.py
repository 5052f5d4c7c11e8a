"""Real Hugging Face models with random weights, sharded by transformers' own ``tp_plan`` over two gloo ranks."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import pytest
import torch

from tests.helpers import run_ranks
from tests.real_models.small import LAYERS, model_types, sharded, small_config, token_ids

transformers = pytest.importorskip("transformers", reason="transformers is an extra")


@dataclasses.dataclass(frozen=True)
class Model:
    """How many of a model's all-reduces fuse, and what the reasons of the others must say."""

    fused: int
    missed: tuple[str, ...] = ()
    reassociate: bool = False


MODELS = {
    "llama": Model(2 * LAYERS + 1),
    "mistral": Model(2 * LAYERS + 1),
    "qwen3": Model(2 * LAYERS + 1),
    # The embedding's all-reduce is scaled by sqrt(hidden) before the first norm; torch 2.11 scales what it reduces.
    "gemma2": Model(2 * LAYERS + 1),
    "gemma3_text": Model(2 * LAYERS + 1),
    "qwen3_moe": Model(2 * LAYERS + 1),
    "mixtral": Model(2 * LAYERS + 1),
    # Norms behind attention and MLP, before the residual add: the embedding's all-reduce feeds no norm.
    "olmo2": Model(2 * LAYERS, ("is the first of 4 sums between it and the nearest norm",)),
    # Norms on both sides.
    "glm4": Model(2 * LAYERS + 1),
    # residual + 0.22 * all_reduce.
    "granite": Model(2 * LAYERS + 1),
    # The plan leaves its attention whole and reduces routed and shared experts apart: with the setting one sum.
    "deepseek_v3": Model(4, reassociate=True),
}


def _run(rank: int, world: int, names: tuple[str, ...], folder: str) -> dict[str, dict[str, Any]]:
    import arfusion_pass as arf
    from arfusion_pass.inspection import replay

    torch.set_num_threads(1)
    known = model_types()
    results = {}
    for name in names:
        torch._dynamo.reset()
        case = MODELS[name]
        config = small_config(name)
        exact, model = sharded(rank, getattr(transformers, known[name]), config, f"{folder}/{name}")
        ids = token_ids(config)
        with torch.no_grad(), replay.recording() as recorder:
            wanted = exact(ids, use_cache=False).logits
            unfused = model(ids, use_cache=False).logits
            options = arf.inductor_options(arf.FusionConfig(raise_errors=True, reassociate=case.reassociate))
            fused = torch.compile(model, options=options)(ids, use_cache=False).logits
        checks = recorder.checks()
        sites = [site for report in recorder.reports for site in report.sites]
        results[name] = {
            "fused": [site.pattern for site in sites if site.fused],
            "missed": [site.reason for site in sites if not site.fused],
            "checks": [(check.site.name, check.ok, check.detail) for check in checks],
            "error_unfused": (unfused.float() - wanted).norm().item() / wanted.norm().item(),
            "error_fused": (fused.float() - wanted).norm().item() / wanted.norm().item(),
        }
    return results


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    """Every model's outcome on rank 0; one pair of processes for all."""
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(2, _run, tuple(MODELS), folder, timeout=900)[0]


@pytest.mark.parametrize("name", MODELS)
def test_every_all_reduce_is_accounted_for(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    """Each model's all-reduces fuse in the expected number; each other one has its reason."""
    case, outcome = MODELS[name], outcomes[name]
    if case.missed == ("mul",) and torch.__version__.startswith("2.11"):
        case = Model(case.fused + 1)
    assert len(outcome["fused"]) == case.fused, outcome
    assert len(outcome["missed"]) == len(case.missed), outcome["missed"]
    for words, reason in zip(case.missed, outcome["missed"], strict=True):
        assert words in reason


@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_exact(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    """On the inputs it met, each fused site equals its subgraph within the *exact* contract."""
    assert outcomes[name]["checks"]
    assert [check for check in outcomes[name]["checks"] if not check[1]] == []


@pytest.mark.parametrize("name", MODELS)
def test_whole_model_is_as_accurate(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    """Against an fp32 model, the fused model's error is at most 1.1 times the unfused model's."""
    assert outcomes[name]["error_fused"] <= 1.1 * outcomes[name]["error_unfused"]


def test_small_text_model() -> None:
    """A model for several kinds of input is made small as its text model, which its causal class takes."""
    config = small_config("llama4")
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama4_text", 128, LAYERS)
