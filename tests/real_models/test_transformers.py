"""Real Hugging Face models with random weights, sharded by transformers' own ``tp_plan`` over two gloo ranks."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers import run_ranks

transformers = pytest.importorskip("transformers", reason="transformers is an extra")

LAYERS = 2
SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "pad_token_id": 0,
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, how many of its all-reduces fuse, and what the reasons of the others must say."""

    config: str
    fused: int
    missed: tuple[str, ...] = ()
    extra: tuple[tuple[str, Any], ...] = ()
    reassociate: bool = False


DEEPSEEK = (
    *(("n_routed_experts", 4), ("num_experts_per_tok", 2), ("moe_intermediate_size", 64), ("n_shared_experts", 1)),
    *(("n_group", 1), ("topk_group", 1), ("first_k_dense_replace", 1)),
    *(("kv_lora_rank", 32), ("q_lora_rank", 64), ("qk_rope_head_dim", 16), ("qk_nope_head_dim", 32)),
    *(("v_head_dim", 32), ("head_dim", 16), ("num_key_value_heads", 4)),
)

MODELS = {
    "llama": Model("LlamaConfig", 2 * LAYERS + 1),
    "mistral": Model("MistralConfig", 2 * LAYERS + 1),
    "qwen3": Model("Qwen3Config", 2 * LAYERS + 1),
    # The embedding's all-reduce is scaled by sqrt(hidden) before the first norm.
    "gemma2": Model("Gemma2Config", 2 * LAYERS, ("mul",), (("query_pre_attn_scalar", 32),)),
    "gemma3": Model("Gemma3TextConfig", 2 * LAYERS, ("mul",), (("query_pre_attn_scalar", 32),)),
    "qwen3_moe": Model(
        "Qwen3MoeConfig",
        2 * LAYERS + 1,
        (),
        (("num_experts", 4), ("num_experts_per_tok", 2), ("moe_intermediate_size", 64)),
    ),
    "mixtral": Model("MixtralConfig", 2 * LAYERS + 1, (), (("num_local_experts", 4), ("num_experts_per_tok", 2))),
    # Norms behind attention and MLP, before the residual add: the embedding's all-reduce feeds no norm.
    "olmo2": Model("Olmo2Config", 2 * LAYERS, ("no RMSNorm",)),
    # Norms on both sides.
    "glm4": Model("Glm4Config", 2 * LAYERS + 1),
    # residual + 0.22 * all_reduce, which fuses with the setting alone.
    "granite": Model("GraniteConfig", 2 * LAYERS + 1, reassociate=True),
    # The plan leaves its attention whole and reduces routed and shared experts apart: with the setting one sum.
    "deepseek_v3": Model("DeepseekV3Config", 3, (), DEEPSEEK, reassociate=True),
}


def _run(rank: int, world: int, names: tuple[str, ...], folder: str) -> dict[str, dict[str, Any]]:
    import arfusion_pass as arf
    from arfusion_pass.inspection import replay

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))  # where transformers looks
    results = {}
    for name in names:
        torch._dynamo.reset()
        case = MODELS[name]
        config = getattr(transformers, case.config)(**(SMALL | dict(case.extra)))
        path = f"{folder}/{name}"
        if rank == 0:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for parameter in model.parameters():  # norms other than the identity
                if parameter.dim() == 1:
                    torch.nn.init.normal_(parameter, 0.5, 0.2)
            model.save_pretrained(path)
        dist.barrier()
        load = transformers.AutoModelForCausalLM.from_pretrained
        exact = load(path, dtype=torch.float32).eval()
        sharded = load(path, tp_plan="auto", dtype=torch.bfloat16).eval()
        ids = torch.randint(1, config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), replay.recording() as recorder:
            wanted = exact(ids, use_cache=False).logits
            unfused = sharded(ids, use_cache=False).logits
            options = arf.inductor_options(arf.FusionConfig(raise_errors=True, reassociate=case.reassociate))
            fused = torch.compile(sharded, options=options)(ids, use_cache=False).logits
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
