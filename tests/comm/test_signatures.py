"""Names, argument order, defaults and constants are FlashInfer 0.7.4's; ours are keyword-only, after them."""

from __future__ import annotations

import enum
import importlib
import importlib.metadata
import inspect
from typing import Any

import pytest

from arfusion_pass import comm

_MOE_EPILOGUE = "layout_code, moe_allreduce_out, residual_out, norm_out, quant_out, scale_out"
FROZEN: dict[str, str] = {
    "create_allreduce_fusion_workspace": (
        "backend='auto', world_size=None, rank=None, max_token_num=None, hidden_dim=None, dtype=None, "
        "gpus_per_node=None, comm_backend=None, force_oneshot_support=False, group=None, *, top_k=None, rms_eps=None, "
        "weight_bias=None, routed_scaling_factor=None, include_shared_expert=None, add_residual=None, "
        "write_residual_output=None, apply_rms_norm=None, output_dtype=None, dynamic_fp8=None, write_norm_output=None, "
        "config=None"
    ),
    "allreduce_fusion": (
        "input, workspace, pattern, launch_with_pdl=False, trigger_completion_at_end=True, output=None, "
        "residual_out=None, norm_out=None, quant_out=None, scale_out=None, residual_in=None, rms_gamma=None, "
        "rms_eps=1e-06, scale_factor=None, layout_code=None, use_oneshot=None, fp32_acc=False, "
        "moe_reduction_device_num_experts=None, moe_reduction_scale_input=None, "
        "moe_reduction_active_experts_token_input=None, moe_reduction_token_input=None, "
        "expanded_idx_to_permuted_idx=None, expert_scale_factor=None, shared_expert_output=None, "
        "block_quant_group_size=None, weight_bias=0.0, *, moe_finalize_backend='trtllm'"
    ),
    "trtllm_mnnvl_allreduce": "input, workspace, launch_with_pdl, output=None, strategy=99",
    "trtllm_mnnvl_fused_allreduce_add_rmsnorm": (
        "input, residual_in, gamma, workspace, epsilon=None, output=None, residual_out=None, launch_with_pdl=False, "
        "strategy=99, weight_bias=0.0"
    ),
    "trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant": (
        "input, residual_in, gamma, workspace, epsilon=None, output=None, residual_out=None, quant_out=None, "
        "scale_out=None, output_scale=None, layout_code=0, quant_type=0, launch_with_pdl=False, strategy=99, "
        "weight_bias=0.0"
    ),
    "trtllm_moe_allreduce_fusion": (
        "world_size, world_rank, token_num, hidden_dim, workspace_ptrs, launch_with_pdl, residual_in, rms_gamma, "
        "rms_eps, scale_factor, moe_reduction_device_num_experts, moe_reduction_scale_input, "
        f"moe_reduction_active_experts_token_input, moe_reduction_token_input, {_MOE_EPILOGUE}, weight_bias=None, *, "
        "backend='trtllm'"
    ),
    "trtllm_moe_finalize_allreduce_fusion": (
        "allreduce_in, residual_in, norm_weight, expanded_idx_to_permuted_idx, norm_out, residual_out, quant_out, "
        "scale_out, workspace_ptrs, launch_with_pdl, world_rank, world_size, eps, shared_expert_output, "
        "expert_scale_factor, routed_scaling_factor, weight_bias=None, *, backend='trtllm'"
    ),
    "MNNVLAllReduceFusionWorkspace": (
        "mapping, max_num_tokens=None, hidden_dim=None, dtype=None, buffer_size_in_bytes=None, comm_backend=None"
    ),
    "MNNVLAllReduceFusionWorkspace.is_buffer_size_sufficient": (
        "self, tp_size, num_tokens, hidden_dim, dtype, strategy=99"
    ),
    "MNNVLAllReduceFusionWorkspace.checkpoint_prepare": "self",
    "MNNVLAllReduceFusionWorkspace.checkpoint_restore": "self, comm_backend",
    "MNNVLAllReduceFusionWorkspace.get_required_buffer_size_bytes": (
        "tp_size, num_tokens, hidden_dim, dtype, strategy=99"
    ),
    "AllReduceFusionWorkspace.is_buffer_size_sufficient": (
        "self, tp_size, num_tokens, hidden_dim, dtype, use_oneshot=None"
    ),
}
"""FlashInfer 0.7.4's parameters, read from its wheel; enum defaults by value."""

CONSTANTS: dict[str, dict[str, int]] = {
    "AllReduceFusionPattern": {
        "kAllReduce": 0,
        "kARResidualRMSNorm": 1,
        "kARResidualRMSNormFP8Quant": 2,
        "kARResidualRMSNormFP4Quant": 3,
        "kARResidualRMSNormOutFP8Quant": 4,
        "kARResidualRMSNormOutFP4Quant": 5,
        "kMoEReductionARResidualRMSNorm": 6,
        "kMoEFinalizeARResidualRMSNorm": 7,
        "kARResidualRMSNormPerTokenGroupFP8PackedQuant": 8,
        "kARResidualRMSNormOutPerTokenGroupFP8PackedQuant": 9,
        "kARResidualRMSNormDynamicFP8Quant": 10,
        "kARResidualRMSNormOutDynamicFP8Quant": 11,
        "kMoEFinalizeARResidualRMSNormFP8Quant": 12,
        "kARResidualRMSNormMXFP8Quant": 13,
        "kARResidualRMSNormOutMXFP8Quant": 14,
    },
    "QuantizationSFLayout": {"SWIZZLED_128x4": 0, "SWIZZLED_8x4": 1, "LINEAR": 2},
    "MNNVLQuantType": {"NONE": 0, "FP8": 1, "NVFP4": 2, "DYNAMIC_FP8": 3, "MXFP8": 4},
    "MNNVLAllreduceFusionStrategy": {"ONESHOT": 0, "TWOSHOT": 1, "AUTO": 99},
}


def value(default: Any) -> Any:
    """An enum's value, anything else as it is."""
    return default.value if isinstance(default, enum.Enum) else default


def parameters(function: Any) -> list[tuple[str, str, Any]]:
    """(name, kind, default) of every parameter."""
    return [(p.name, str(p.kind), value(p.default)) for p in inspect.signature(function).parameters.values()]


def frozen(text: str) -> list[tuple[str, str, Any]]:
    scope: dict[str, Any] = {}
    exec(f"def function({text}): ...", scope)
    return parameters(scope["function"])


def find(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def assert_starts_with(ours: list[tuple[str, str, Any]], theirs: list[tuple[str, str, Any]]) -> None:
    """Ours begins with theirs; what follows is keyword-only and optional."""
    assert ours[: len(theirs)] == theirs
    for name, kind, default in ours[len(theirs) :]:
        assert kind == str(inspect.Parameter.KEYWORD_ONLY), name
        assert default is not inspect.Parameter.empty, name


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_signature(name: str) -> None:
    """Every function takes what FlashInfer 0.7.4's takes, in its order, with its defaults."""
    assert_starts_with(parameters(find(comm, name)), frozen(FROZEN[name]))


@pytest.mark.parametrize("name", CONSTANTS)
def test_frozen_constants(name: str) -> None:
    """Every constant has FlashInfer's name and value, and there is none that FlashInfer has not."""
    assert {member.name: member.value for member in getattr(comm, name)} == CONSTANTS[name]


@pytest.fixture(scope="module")
def flashinfer_modules() -> list[Any]:
    """The modules of an installed FlashInfer 0.7.4 that hold these names."""
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("flashinfer-python is not installed")
    if version != "0.7.4":
        pytest.skip(f"compared with FlashInfer 0.7.4, {version} is installed")
    return [importlib.import_module(f"flashinfer.comm{part}") for part in ("", ".trtllm_mnnvl_ar")]


@pytest.mark.parametrize("name", FROZEN)
def test_installed_signature(flashinfer_modules: list[Any], name: str) -> None:
    """The same against the installed package, so that the frozen list is FlashInfer's and not ours."""
    theirs = next(find(module, name) for module in flashinfer_modules if hasattr(module, name.split(".")[0]))
    assert_starts_with(parameters(find(comm, name)), parameters(inspect.unwrap(theirs)))


@pytest.mark.parametrize("name", CONSTANTS)
def test_installed_constants(flashinfer_modules: list[Any], name: str) -> None:
    """The constants against the installed package."""
    theirs = next(getattr(module, name) for module in flashinfer_modules if hasattr(module, name))
    for member, number in CONSTANTS[name].items():
        assert value(getattr(theirs, member)) == number
