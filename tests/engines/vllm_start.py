"""One start of vLLM's compiler on a toy model, on CPU: what ``test_vllm_caches.py`` runs in processes of their own.

vLLM's CPU platform compiles without its own backend; a config with ``VLLM_COMPILE`` on a CPU device takes the way of a
GPU: split at attention (here: a stand-in), its pass manager, its cache, its AOT artefacts.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import sys
from typing import Any

import torch

HIDDEN, LAYERS, TOKENS = 64, 3, 8


def start(rank: int, world: int) -> dict[str, Any]:
    """Start, run one step and tell: what was compiled, loaded, fused, and what came out.

    In the environment, beside vLLM's own variables and ours: ``START_PLUGIN=0`` is a start without the plug-in
    installed, ``START_SOURCES`` stands for other sources of ours, ``START_CACHE_DIR`` is a user's cache folder,
    ``START_QUANTISED=1`` puts per-token FP8 behind each norm.
    """
    if os.environ.get("START_PLUGIN", "1") == "1":
        from arfusion_pass import cache_key
        from arfusion_pass.engines import vllm as plugin

        plugin.register()
        if sources := os.environ.get("START_SOURCES"):
            cache_key.source_hash = lambda: sources  # type: ignore[assignment]
    from vllm.compilation.counter import compilation_counter
    from vllm.compilation.decorators import support_torch_compile
    from vllm.config import (
        CompilationConfig,
        CompilationMode,
        DeviceConfig,
        ParallelConfig,
        PassConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.distributed import parallel_state
    from vllm.forward_context import set_forward_context

    logging.getLogger("vllm").setLevel(logging.WARNING)
    _stub_the_gpu()
    if quantised := os.environ.get("START_QUANTISED", "0") == "1":
        torch.library.define(
            "_C::dynamic_per_token_scaled_fp8_quant",
            "(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
        )
        torch.library.impl("_C::dynamic_per_token_scaled_fp8_quant", "CPU", _token_fp8)
        torch.library.define("toy::scaled_mm", "(Tensor codes, Tensor scales, Tensor weight) -> Tensor")
        torch.library.impl("toy::scaled_mm", "CPU", lambda codes, scales, w: (codes.float() * scales).bfloat16() @ w)
        torch.library.register_fake("toy::scaled_mm", lambda codes, scales, w: w.new_empty(codes.shape[0], w.shape[1]))
    torch.library.define("toy::attention", "(Tensor x, Tensor(a!) out) -> ()")
    torch.library.impl("toy::attention", "CPU", _attention)
    torch.library.register_fake("toy::attention", lambda x, out: None)
    config = VllmConfig(
        device_config=DeviceConfig(device="cpu"),
        parallel_config=ParallelConfig(tensor_parallel_size=world, rank=rank),
        compilation_config=CompilationConfig(
            mode=CompilationMode.VLLM_COMPILE,
            pass_config={field.name: False for field in dataclasses.fields(PassConfig) if "fus" in field.name},
            splitting_ops=["toy::attention"],
            cudagraph_mode="NONE",
            compile_sizes=[],
            use_inductor_graph_partition=False,
            cache_dir=os.environ.get("START_CACHE_DIR", ""),
        ),
    )
    config.parallel_config.rank = rank
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(world, rank, local_rank=rank, backend="gloo")
        parallel_state.initialize_model_parallel(world, backend="gloo")
        model = support_torch_compile(dynamic_arg_dims={"x": 0, "positions": 0})(_toy(quantised, world))(
            vllm_config=config
        )
        x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
        with torch.no_grad(), set_forward_context(None, config, num_tokens=TOKENS):
            out = model(x.clone(), torch.arange(TOKENS))
    counts = {
        "compiled": compilation_counter.num_backend_compilations,
        "loaded": compilation_counter.num_compiled_artifacts_loaded,
        "aot_saved": compilation_counter.num_aot_artifacts_saved,
        "aot_loaded": compilation_counter.num_aot_artifacts_loaded,
    }
    outcome: dict[str, Any] = {"out": out.float(), "plugin": "arfusion_pass" in sys.modules, **counts}
    if outcome["plugin"]:
        import arfusion_pass as arf
        from arfusion_pass.ops import reference

        reports = arf.reports()
        outcome["fused"] = reports.matched_count
        outcome["missed"] = [site.reason for site in reports.missed]
        outcome["reports"] = [report.to_dict() for report in reports]
        calls = []
        original = reference.ordered_all_reduce
        reference.ordered_all_reduce = lambda *args: calls.append(1) or original(*args)  # type: ignore[func-returns-value]
        with torch.no_grad(), set_current_vllm_config(config), set_forward_context(None, config, num_tokens=TOKENS):
            model(x.clone(), torch.arange(TOKENS))
        outcome["fused_calls"] = len(calls)
    root = pathlib.Path(os.environ["VLLM_CACHE_ROOT"])
    outcome["folders"] = sorted(str(p.relative_to(root)) for p in root.glob("torch_compile_cache/*/*") if p.is_dir())
    return outcome


def _attention(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x * 0.5)


def _token_fp8(result: torch.Tensor, input: torch.Tensor, scale: torch.Tensor, scale_ub: torch.Tensor | None) -> None:
    scale.copy_(input.float().abs().amax(-1, keepdim=True) / 448.0)
    result.copy_((input.float() / scale).clamp(-448.0, 448.0).to(result.dtype))


def _stub_the_gpu() -> None:
    """The one pass of vLLM that names ops of its CUDA library; the toy model has none of those it rewrites."""
    from vllm.compilation.passes import pass_manager

    if not hasattr(torch.ops._C, "rms_norm"):
        pass_manager.FixFunctionalizationPass.__call__ = lambda self, graph: None


def _toy(quantised: bool, world: int) -> type:
    from vllm import ir

    class Layer(torch.nn.Module):
        """``attention -> all-reduce -> add + norm -> matmul``, called as vLLM's models call them."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter((torch.randn(HIDDEN, HIDDEN) / 8).bfloat16(), requires_grad=False)
            shared = torch.rand(HIDDEN, generator=torch.Generator().manual_seed(0))
            self.norm = torch.nn.Parameter((1 + shared).bfloat16(), requires_grad=False)

        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            attended = torch.empty_like(x)
            torch.ops.toy.attention(x, attended)
            reduced = attended @ self.weight
            if world > 1:  # as tensor_model_parallel_all_reduce has it
                reduced = torch.ops.vllm.all_reduce(reduced, group_name="tp:0")
            x, residual = ir.ops.fused_add_rms_norm(reduced, residual, self.norm, 1e-6)
            if quantised:
                codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
                scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
                torch.ops._C.dynamic_per_token_scaled_fp8_quant(codes, x, scales, None)
                x = torch.ops.toy.scaled_mm(codes, scales, self.weight)
            return x, residual

    class Toy(torch.nn.Module):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            torch.manual_seed(torch.distributed.get_rank())  # each rank's shard
            self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))

        def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            residual = x + positions.unsqueeze(-1).to(x.dtype) * 0.0
            for layer in self.layers:
                x, residual = layer(x, residual)
            return x + residual

    return Toy
