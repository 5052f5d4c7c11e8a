"""Which all-reduces of transformers' causal language models fuse: every model with a tensor-parallel plan, made small.

Two layers with random weights, sharded by the model's own ``tp_plan`` over two gloo ranks and compiled with the pass;
where a reason names ``FusionConfig(reassociate=True)``, once more with it. Each fused site is replayed against the
subgraph that it replaced, and the model's logits are compared with an fp32 model's. One pair of processes a model.

    python -m benchmarks.survey_transformers [MODEL_TYPE ...] [--seconds 150] [--write]
"""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers import run_ranks

RESULTS = Path(__file__).parent / "results" / "transformers.md"
TOKENS = 12

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size",), 128),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size"), 256),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 64),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "zero_expert_num"), 1),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("head_dim", "global_head_dim", "query_pre_attn_scalar", "qk_nope_head_dim", "v_head_dim"), 32),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "kv_lora_rank", "index_head_dim"), 32),
    **dict.fromkeys(("q_lora_rank", "sliding_window"), 64),
    **dict.fromkeys(("qk_rope_head_dim", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("laurel_rank", "index_topk"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 256),
    "max_position_embeddings": 128,
}
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def model_types() -> dict[str, str]:
    """Model type to class of every causal model that has a plan."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    planned = (name for name in NAMES if name in CONFIG_MAPPING)
    return {name: NAMES[name] for name in planned if getattr(CONFIG_MAPPING[name], "base_model_tp_plan", None)}


def small_config(model_type: str) -> Any:
    """The type's own configuration with the sizes that it has made small, its first and its last kind of layer."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    base = CONFIG_MAPPING[model_type]()
    sizes = {name: size for name, size in SMALL.items() if getattr(base, name, None) is not None}
    if hasattr(base, "qk_rope_head_dim"):  # latent attention: one rotary part for all heads
        sizes["head_dim"] = SMALL["qk_rope_head_dim"]
        if base.num_attention_heads == getattr(base, "num_key_value_heads", None):
            sizes["num_key_value_heads"] = SMALL["num_attention_heads"]
    written = base.to_dict()
    for name in ("layer_types", "mlp_layer_types"):
        if kinds := written.get(name):
            sizes[name] = [kinds[0], kinds[-1]]
    return CONFIG_MAPPING[model_type](**sizes, **TOKEN_IDS)


def survey(rank: int, world: int, model_type: str, class_name: str, folder: str) -> dict[str, Any]:
    """One model on one rank."""
    import transformers

    import arfusion_pass as arf
    from arfusion_pass.inspection import replay

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))  # where transformers looks
    config = small_config(model_type)
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    if rank == 0:
        model = model_class(config).float()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms other than the identity
                torch.nn.init.normal_(parameter, 0.5, 0.2)
        model.save_pretrained(folder)
    dist.barrier()
    exact = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    sharded = model_class.from_pretrained(folder, tp_plan="auto", dtype=torch.bfloat16).eval()
    ids = torch.randint(3, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))

    def error(logits: torch.Tensor) -> float:
        return (logits.float() - wanted).norm().item() / wanted.norm().item()

    def compiled(**settings: bool) -> dict[str, Any]:
        torch._dynamo.reset()
        with replay.recording() as recorder:
            options = arf.inductor_options(arf.FusionConfig(raise_errors=True, **settings))
            logits = torch.compile(sharded, options=options)(ids, use_cache=False).logits
        sites = [site for report in recorder.reports for site in report.sites]
        return {
            "sites": len(sites),
            "fused": sum(site.fused for site in sites),
            "reasons": [str(site.reason) for site in sites if not site.fused],
            "inexact": [check.detail for check in recorder.checks() if not check.ok],
            "error": error(logits),
        }

    with torch.no_grad():
        wanted = exact(ids, use_cache=False).logits
        unfused = error(sharded(ids, use_cache=False).logits)
        torch._dynamo.reset()
        plain = error(torch.compile(sharded)(ids, use_cache=False).logits)
        result = {"unfused": max(unfused, plain), "default": compiled(), "moved": None}
        if any("reassociate" in reason for reason in result["default"]["reasons"]):
            result["moved"] = compiled(reassociate=True)
    return result


def reason_kind(reason: str) -> str:
    """A reason in a few words."""
    if "stands between" in reason:
        return f"{reason.split('(')[1].split('.')[1]} before the norm"
    return "sum of two, one fused" if "is fused with" in reason else "no RMSNorm follows"


def row(model_type: str, outcome: dict[str, Any] | str) -> str:
    """One line of the table."""
    if isinstance(outcome, str):
        return f"| {model_type} | not run: {outcome} | | | | |"
    default, moved = outcome["default"], outcome["moved"]
    kinds = collections.Counter(map(reason_kind, default["reasons"]))
    left = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    runs = [default] if moved is None else [default, moved]
    exact = "yes" if not any(run["inexact"] for run in runs) else "NO"
    errors = " / ".join(f"{run['error'] / outcome['unfused']:.2f}" for run in runs)
    with_setting = "" if moved is None else f"{moved['fused']} of {moved['sites']}"
    return f"| {model_type} | {default['fused']} of {default['sites']} | {with_setting} | {exact} | {errors} | {left} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="MODEL_TYPE", help="default: all")
    parser.add_argument("--seconds", type=float, default=150, help="for one model")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(RESULTS.parents[2])}")
    arguments = parser.parse_args()
    import transformers

    known = model_types()
    lines = []
    show = functools.partial(print, flush=True)
    for model_type in arguments.types or known:
        outcome: dict[str, Any] | str
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = run_ranks(2, survey, model_type, known[model_type], folder, timeout=arguments.seconds)[0]
            except TimeoutError:
                outcome = f"over {arguments.seconds:.0f} s"
            except RuntimeError as error:
                outcome = str(error).strip().splitlines()[-1][:100].replace("|", "/")
        lines.append(row(model_type, outcome))
        show(lines[-1])
    ran = [line for line in lines if "not run" not in line]
    text = (
        "# transformers' causal language models\n\n"
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}; `python -m benchmarks.survey_transformers`. "
        f"{len(ran)} of the {len(lines)} models asked for ran; transformers has {len(known)} with a plan.\n\n"
        "*exact*: every fused site equals its subgraph within the *exact* contract. *error*: the fused model's "
        "distance from an fp32 model over the larger of the unfused ones' (eager and compiled), by default and with "
        "the setting.\n\n"
        "| model | fused | with `reassociate` | exact | error | left alone by default |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(lines) + "\n"
    )
    if arguments.write:
        RESULTS.write_text(text)
        show(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
