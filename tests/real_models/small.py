"""A transformers model made small, with random weights: whole in fp32, and sharded by its own ``tp_plan``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LAYERS = 2
TOKENS = 12

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "rel_extent"), 128),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "intermediate_size_mlp"), 256),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer"), LAYERS),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 64),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "zero_expert_num"), 1),
    **dict.fromkeys(("num_shared_experts", "num_expert_group"), 1),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "linear_num_value_heads", "n_head", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "global_head_dim", "query_pre_attn_scalar", "qk_nope_head_dim", "v_head_dim"), 32),
    **dict.fromkeys(
        ("linear_key_head_dim", "linear_value_head_dim", "kv_lora_rank", "index_head_dim", "swa_head_dim"), 32
    ),
    **dict.fromkeys(("q_lora_rank", "sliding_window", "attention_chunk_size"), 64),
    **dict.fromkeys(("qk_rope_head_dim", "hidden_size_per_layer_input", "rotary_dim", "hc_lowrank"), 16),
    **dict.fromkeys(("laurel_rank", "index_topk"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), 256),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 64),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    "num_kv_shared_layers": 0,
    "mamba_d_ssm": 256,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
}
"""Sizes by the names that configurations give them; one gets those that it has."""

ALWAYS = ("head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "n_shared_experts")
"""Sizes that some configurations leave open, and their models need."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
_SEES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "crop_size": 28}
_HEARS = {"hidden_size": 64, "intermediate_size": 64, "num_blocks": 2, "num_attention_heads": 2, "input_size": 16}

OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "phi4_multimodal": {
        "vision_config": _SEES | {"image_size": 28},
        "audio_config": _HEARS | dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel"), 64),
    },
    "qwen4_exp_text": {
        **dict.fromkeys(("indexer_n_heads", "indexer_compress_ratio"), 2),
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 8,
        "layer_types": ["linear_attention", "indexed_attention"],
    },
}
"""What single configurations leave open that their models need."""

FACTORS = {"residual_multiplier": 0.22, "embedding_multiplier": 12.0}
"""Granite's as published, where a configuration's own are 1."""

AS_LOADED = ("sarvam_moe",)
"""Models whose checkpoints transformers cannot convert where they are sharded (5.24 splits one rank's part of a fused
QKV by the sizes of all ranks'): written in the form that they are loaded into."""

TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def model_types() -> dict[str, str]:
    """Model type to class of every causal model of the installed transformers that has a tensor-parallel plan."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    planned = (name for name in NAMES if name in CONFIG_MAPPING)
    return {name: NAMES[name] for name in planned if getattr(CONFIG_MAPPING[name], "base_model_tp_plan", None)}


def small_config(model_type: str, **settings: Any) -> Any:
    """The type's own configuration with the sizes that it has made small, its first and its last kind of layer.

    Args:
        model_type: transformers' name.
        **settings: of the configuration, over the small ones.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    text = config.get_text_config()
    if text is not config:  # of a model for several kinds of input, whose causal model is the text's
        return small_config(text.model_type, **settings)
    written = config.to_dict()
    sizes: dict[str, Any] = {}
    for name, value in written.items():
        if name in SIZES and (isinstance(value, (int, float, list)) or name in ALWAYS):
            sizes[name] = SIZES[name]
        elif name in FACTORS and value == 1.0:
            sizes[name] = FACTORS[name]
        elif isinstance(value, list) and len(value) == written.get("num_hidden_layers"):  # one for each layer
            sizes[name] = [value[0], value[-1]]
    if "qk_rope_head_dim" in written:  # latent attention: one rotary part for all heads
        sizes["head_dim"] = SIZES["qk_rope_head_dim"]
        if written["num_attention_heads"] == written.get("num_key_value_heads"):
            sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
    return CONFIG_MAPPING[model_type](**(sizes | TOKEN_IDS | OWN.get(model_type, {}) | settings))


def sharded(rank: int, model_class: Any, config: Any, folder: str | Path) -> tuple[Any, Any]:
    """One model with random weights as ``(whole in fp32, sharded in bf16)``, the same on all ranks. Collective.

    Args:
        rank: of two; rank 0 writes the checkpoint.
        model_class: transformers' class.
        config: of :func:`small_config`.
        folder: for the checkpoint, seen by both.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(dist.get_world_size()))  # it looks there
    if rank == 0:
        torch.manual_seed(0)
        model = model_class(config).float()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms other than the identity
                torch.nn.init.normal_(parameter, 0.5, 0.2)
        as_published = config.model_type not in AS_LOADED
        model.save_pretrained(folder, **({} if as_published else {"save_original_format": False}))
    dist.barrier()
    exact = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    return exact, model_class.from_pretrained(folder, dtype=torch.bfloat16, **_plan()).eval()


def _plan() -> dict[str, Any]:
    """What :meth:`from_pretrained` takes for the model's own plan: newer transformers take it in a config."""
    from transformers.distributed import DistributedConfig

    plan = {"tp_plan": "auto"}
    return {"distributed_config": DistributedConfig(**plan)} if hasattr(DistributedConfig, "tp_plan") else plan


def token_ids(config: Any) -> torch.Tensor:
    """``[1, TOKENS]`` ids, the same on all ranks."""
    return torch.randint(3, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
