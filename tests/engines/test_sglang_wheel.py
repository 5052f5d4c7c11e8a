"""Against the real SGLang wheel: its op schemas, its pass manager with our plug-in, its norms and all-reduces on two
gloo ranks, and its calls of FlashInfer's API on ours. Skipped where SGLang is not installed (``python -m venv; pip
install sglang pytest``; on a CPU torch without torchvision's compiled part). Written for SGLang
0.5.23; 0.5.17, its last for torch 2.11, runs too: some ops came later."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import pathlib
import types
from typing import Any
from unittest import mock

import pytest
import torch
from packaging.version import Version

from arfusion_pass.dialects import sglang as dialect
from arfusion_pass.fusion_pass import AllReduceFusionPass
from tests.dialects.cases import COLLECTIVE, standard
from tests.helpers import run_ranks

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed", allow_module_level=True)

OP_MODULES = ("per_token_group_quant", "per_token_group_quant_8bit_v2", "per_token_quant_fp8", "per_tensor_quant_fp8")


NEWEST = Version(importlib.metadata.version("sglang")) >= Version("0.5.23")


def pass_manager() -> Any:
    """A new one, as SGLang's backend makes it; until 0.5.17 it configures it too."""
    from sglang.srt.compilation.pass_manager import PostGradPassManager

    manager = PostGradPassManager()
    if not NEWEST:
        manager.configure()
    return manager


def schema_of(name: str) -> torch.FunctionSchema:
    schemas = registered_schemas()
    if name not in schemas and not NEWEST:
        pytest.skip(f"SGLang has no {name} before 0.5.23")
    return schemas[name]


def registered_schemas() -> dict[str, torch.FunctionSchema]:
    """SGLang's own ops; those that wrap FlashInfer's exist only beside FlashInfer."""
    importlib.import_module("sglang.srt.distributed.parallel_state")
    for name in OP_MODULES:
        if NEWEST or importlib.util.find_spec(f"sglang.kernels.ops.quantization.{name}"):
            importlib.import_module(f"sglang.kernels.ops.quantization.{name}")
    schemas = torch._C._jit_get_all_schemas()
    return {schema.name: schema for schema in schemas if schema.name.startswith("sglang::")}


OURS = [name for name in dialect.QUANTISERS if name.startswith("sglang::") and "flashinfer" not in name]


@pytest.mark.parametrize("name", OURS)
def test_ops_have_the_arguments_that_the_tables_name(name: str) -> None:
    """Every quantiser of SGLang's namespace is in the wheel, with what its entry reads, and writes what it says."""
    schema, entry = schema_of(name), dialect.QUANTISERS[name]
    arguments = {argument.name: argument for argument in schema.arguments}
    assert entry.x in arguments
    for written in (entry.codes, entry.scales or entry.scale):
        assert arguments[written].alias_info.is_write, (written, schema)


@pytest.mark.parametrize("name", ["outplace_all_reduce", "flashinfer_allreduce", "inplace_all_reduce"])
def test_all_reduces_have_the_arguments_that_the_tables_name(name: str) -> None:
    """The all-reduces take ``tensor`` and ``group_name``; only one of them writes to its tensor."""
    arguments = {argument.name: argument for argument in schema_of(f"sglang::{name}").arguments}
    assert "group_name" in arguments
    assert (arguments["tensor"].alias_info is not None) == (name == "inplace_all_reduce")


def test_every_pass_manager_has_the_pass_once() -> None:
    """Registered twice, a new pass manager holds our pass once, and its key is a key of ours."""
    from sglang.srt.compilation.pass_manager import PostGradPassManager
    from torch._inductor import config as inductor_config

    from arfusion_pass import cache_key
    from arfusion_pass.engines import sglang as plugin

    with inductor_config.patch({plugin.HOOK: None}), pytest.MonkeyPatch.context() as patch:
        patch.setattr(PostGradPassManager, "__init__", PostGradPassManager.__init__)
        plugin.register()
        plugin.register()
        manager = pass_manager()
        assert [type(each).__name__ for each in manager.passes] == ["ArFusionPass"]
        before = manager.uuid()
        patch.setattr(cache_key, "source_hash", lambda: "other sources")
        assert manager.uuid() != before
        assert isinstance(getattr(inductor_config, plugin.HOOK), AllReduceFusionPass)


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """``ARFUSION_SGLANG=0`` leaves everything alone."""
    from torch._inductor import config as inductor_config

    from arfusion_pass.engines import sglang as plugin

    monkeypatch.setenv("ARFUSION_SGLANG", "0")
    before = getattr(inductor_config, plugin.HOOK)
    plugin.register()
    assert getattr(inductor_config, plugin.HOOK) is before


class Layers(torch.nn.Module):
    """Norms of SGLang behind its all-reduces, called as its models call them."""

    def __init__(self, hidden: int) -> None:
        from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNorm

        super().__init__()
        self.first = RMSNorm(hidden, eps=1e-6)
        self.second = RMSNorm(hidden, eps=1e-5, cast_x_before_out_mul=True)
        self.third = GemmaRMSNorm(hidden, eps=1e-6)
        for norm in (self.first, self.second, self.third):
            norm.weight.data = torch.rand(hidden).bfloat16()

    def forward(self, x: torch.Tensor, residual: torch.Tensor, eager: bool) -> tuple[torch.Tensor, torch.Tensor]:
        def reduce(y: torch.Tensor) -> torch.Tensor:  # what GroupCoordinator.all_reduce calls on a GPU, when compiled
            if eager:
                y = y.clone()
                torch.distributed.all_reduce(y)
                return y
            return torch.ops.sglang.outplace_all_reduce(y, "tp:0", "auto")

        x, residual = self.first.forward_native(reduce(x), residual)
        x, residual = self.second.forward_native(reduce(x), residual)
        x, residual = self.third.forward_native(reduce(x), residual)
        return self.first.forward_native(reduce(x)), residual


def _distributed(rank: int, world: int) -> Any:
    """SGLang's group of all ranks, which it calls ``tp:0``; SGLang itself holds it weakly."""
    from sglang.srt.distributed import parallel_state

    parallel_state.init_distributed_environment(world, rank, local_rank=rank, backend="gloo")
    return parallel_state.init_model_parallel_group(
        [list(range(world))], rank, "gloo", use_pynccl=False, use_custom_allreduce=False, group_name="tp"
    )


def _compiled(rank: int, world: int) -> dict[str, Any]:
    from sglang.srt.compilation.inductor_pass import pass_context
    from torch._inductor import config as inductor_config

    from arfusion_pass.engines import sglang as plugin
    from arfusion_pass.inspection import replay

    plugin.register()
    coordinator = _distributed(rank, world)
    torch.manual_seed(rank)
    x, residual, _ = standard()
    torch.manual_seed(0)
    layers = Layers(x.shape[-1]).eval()
    outcomes = {}
    for way in ("global", "manager"):
        torch._dynamo.reset()
        patch: dict[str, Any] = {"fx_graph_cache": False}
        if way == "manager":
            patch |= {plugin.HOOK: pass_manager(), "enable_auto_functionalized_v2": False}
        with torch.no_grad(), inductor_config.patch(patch), pass_context(None), replay.recording() as recorder:
            expected = layers(x, residual, True)
            actual = torch.compile(layers, fullgraph=True)(x, residual, False)
        report = recorder.reports[0]
        outcomes[way] = {
            "patterns": [site.pattern for site in report.fused],
            "missed": [site.reason for site in report.missed],
            "groups": {site.group for site in report.sites} - {coordinator.unique_name},
            "problems": [check.detail for check in recorder.checks() if not check.ok],
            "after": report.after,
            "error": max((a.float() - b.float()).abs().max().item() for a, b in zip(actual, expected, strict=True)),
        }
    return outcomes


def test_two_ranks_compiled() -> None:
    """SGLang's norms behind its all-reduce op on its own groups, through the global hook and through its pass manager:
    every site fuses, no all-reduce is left, and each site is within the contract of what it replaced."""
    add = "AllReduceFusedAddRMSNorm"
    for outcome in run_ranks(2, _compiled, timeout=300.0)[0].values():
        assert outcome["patterns"] == [add, add, "AllReduceFusedAddGemmaRMSNorm", "AllReduceRMSNorm"], outcome
        assert not outcome["missed"]
        assert not outcome["groups"], outcome["groups"]
        assert not COLLECTIVE.findall(outcome["after"]), outcome["after"]
        assert not outcome["problems"], (outcome["problems"], outcome["after"])
        assert outcome["error"] < 0.2, outcome["error"]


def _started(rank: int, world: int) -> list[dict[str, Any]]:
    from sglang.srt.compilation.inductor_pass import pass_context
    from torch._inductor import config as inductor_config

    import arfusion_pass as arf
    from arfusion_pass.engines import sglang as plugin

    plugin.register()
    coordinator = _distributed(rank, world)
    x, residual, _ = standard()
    patch = {plugin.HOOK: pass_manager(), "enable_auto_functionalized_v2": False}
    with torch.no_grad(), inductor_config.patch(patch), pass_context(None):
        torch.compile(Layers(x.shape[-1]).eval(), fullgraph=True)(x, residual, False)
    assert coordinator.world_size == world
    return [report.to_dict() for report in arf.reports()]


def test_a_second_start_is_told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's pass manager gives Inductor our key: a second start loads the fused graph from Inductor's cache, and
    reports it as the first did."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (cold,), (warm,) = (run_ranks(2, _started, timeout=300.0)[0] for _ in range(2))
    assert (cold["cached"], warm["cached"]) == (False, True)
    assert cold["matched_count"] == 4
    assert warm["sites"] == cold["sites"]


def _called(rank: int, world: int) -> list[dict[str, Any]]:
    from arfusion_pass.engines import sglang as plugin

    coordinator = _distributed(rank, world)
    fusion = importlib.import_module("sglang.srt.layers.flashinfer_comm_fusion")
    if not NEWEST:  # the function of the op, which is registered for CUDA alone
        with mock.patch("sglang.srt.utils.custom_op.register_custom_op", return_value=lambda function: function):
            importlib.reload(fusion)
    plugin.replace_flashinfer()
    decisions: dict[str, Any] = {  # what SGLang decides from its server's arguments and from the GPU
        "is_flashinfer_available": lambda: True,
        "resolve_flashinfer_allreduce_fusion_backend": lambda *server_args: "trtllm",
        "_sync_allreduce_unavailable_across_tp": lambda: None,
    }
    if NEWEST:
        decisions["uses_cutedsl_ar_fusion"] = lambda: False
        decisions["resolve_fusion_world_size"] = lambda *, use_attn_tp_group: world
        decisions["resolve_fusion_group"] = lambda *, use_attn_tp_group: (world, rank, coordinator)
    else:
        decisions["get_parallel"] = lambda: types.SimpleNamespace(attn_tp_size=world, attn_tp_rank=rank)
        decisions["get_attn_tp_group"] = lambda: coordinator
        decisions["get_server_args"] = lambda: None
    for name, value in decisions.items():
        assert hasattr(fusion, name), name
        setattr(fusion, name, value)
    return [_call(rank, fusion, dtype) for dtype in (torch.bfloat16, torch.float32)]


def _call(rank: int, fusion: Any, dtype: torch.dtype) -> dict[str, Any]:
    manager = fusion.FlashInferWorkspaceManager()
    fusion._get_workspace_manager = lambda use_attn_tp_group: manager
    torch.manual_seed(rank)
    x, _, weight = (tensor.to(dtype) for tensor in standard())
    torch.manual_seed(0)
    residual = torch.randn_like(x)
    fused = inspect.unwrap(fusion.flashinfer_allreduce_residual_rmsnorm)  # the op is registered for CUDA alone
    norm, total = fused(x, residual, weight, 1e-6, max_token_num=64)
    assert norm is not None, f"SGLang made no workspace for {dtype}"
    wanted = x.clone()
    torch.distributed.all_reduce(wanted)
    reduced = fusion.flashinfer_allreduce(x, use_attn_tp_group=True) if NEWEST else wanted
    wanted_total = wanted + residual
    scale = torch.rsqrt(wanted_total.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    wanted_norm = wanted_total.float() * scale * weight.float()
    sufficient = manager.is_buffer_size_sufficient(64, x.shape[1], x.dtype)
    backend = manager.workspace.backend
    manager.cleanup()
    return {
        "backend": backend,
        "sufficient": sufficient,
        "reduced": (reduced.float() - wanted.float()).abs().max().item(),
        "total": (total.float() - wanted_total.float()).abs().max().item(),
        "norm": ((norm.float() - wanted_norm).abs() / wanted_norm.abs().clamp(min=1.0)).max().item(),
    }


def test_two_ranks_called() -> None:
    """SGLang's own wrapper of FlashInfer's fused all-reduce, its workspace manager included, on our API, in bf16 and in
    fp32, of which SGLang tells the workspace more than FlashInfer's takes."""
    for outcome in (each for outcomes in run_ranks(2, _called, timeout=300.0) for each in outcomes):
        assert outcome["backend"] == "reference"  # what runs on a CPU; FlashInfer knows no such backend
        assert outcome["sufficient"]
        assert outcome["reduced"] == 0.0  # of two ranks the sum has one order
        assert outcome["total"] == 0.0
        assert outcome["norm"] < 2**-7, outcome
