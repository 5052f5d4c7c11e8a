"""TensorRT-LLM's ops: ``trtllm::allreduce`` with no fusion of its own, FlashInfer's norms, and its quantisers.

    %list = trtllm.allreduce.default(%x, None, None, None, None, %workspace, [0, 1], 3, 0, 1e-06, True)   # op 0: NONE
    %ar   = getitem(%list, 0)
    %norm = trtllm.flashinfer_rmsnorm.default(%ar, %weight, 1e-06)

The op names its group by ranks; register it as ``arf.register_group("trtllm:0,1", group)``. AutoDeploy's all-reduces
run over the default group. The argument ``op`` says what the op fuses by itself; those calls are reported as such.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from arfusion_pass.dialects.flashinfer import add_norm_op, fp4, norm_op
from arfusion_pass.dialects.reading.base import Reduced, Refused
from arfusion_pass.dialects.reading.custom_ops import CustomOpDialect, QuantOp
from arfusion_pass.dialects.reading.custom_quantisers import mxfp8_spec
from arfusion_pass.dialects.reading.op_calls import OpCall
from arfusion_pass.graph import describe
from arfusion_pass.ops.spec import QuantFormat, QuantSpec, ScaleLayout

FUSIONS = {
    0: "NONE",
    1: "RESIDUAL_RMS_NORM",
    2: "LAST_PROCESS_FOR_UB",
    3: "RESIDUAL_RMS_PREPOST_NORM",
    4: "RESIDUAL_RMS_NORM_QUANT_FP8",
    5: "RESIDUAL_RMS_NORM_QUANT_NVFP4",
    6: "RESIDUAL_RMS_NORM_OUT_QUANT_FP8",
    7: "RESIDUAL_RMS_NORM_OUT_QUANT_NVFP4",
    8: "MOE_ALLREDUCE_RESIDUAL_RMS_NORM",
}
"""``AllReduceFusionOp`` by value."""

STATIC_FP8 = QuantSpec(QuantFormat.FP8, group=0)
"""``static_quantize_e4m3_per_tensor``: divides by the scale and saturates."""


def _allreduce(call: OpCall) -> Reduced | Refused:
    """``op`` NONE with nothing but an input, whose one result is read."""
    node, fusion = call.node, call["op"]
    if fusion != 0:
        name = FUSIONS.get(fusion, fusion) if isinstance(fusion, int) else fusion
        return Refused(f"{describe(node)} is fused already, by TensorRT-LLM's own {name}", node)
    given = [name for name in ("residual", "norm_weight", "scale", "bias") if call[name] is not None]
    if given:
        return Refused(f"{describe(node)} also takes {', '.join(given)}", node)
    ranks, x, value = call["group"], call["input"], call.output(0)
    if not isinstance(x, fx.Node) or not isinstance(ranks, (list, tuple)) or call.functionalized:
        return Refused(f"{describe(node)} names its group by {ranks!r}, not by a list of ranks", node)
    others = [user for user in node.users if user is not value]
    if value is None or others:
        return Refused(f"{describe(node)} is not read by exactly one getitem of its first result", node)
    group = "trtllm:" + ",".join(map(str, ranks))
    return Reduced(node=node, value=value, x=x, group=group, nodes=(node, value))


def _default_group(argument: str) -> Callable[[OpCall], Reduced | Refused]:
    """AutoDeploy's all-reduce over all ranks."""

    def recognise(call: OpCall) -> Reduced | Refused:
        from torch.distributed import GroupMember, is_available, is_initialized

        x = call[argument]
        if call.in_place or not isinstance(x, fx.Node) or not is_available() or not is_initialized():
            return Refused(f"{describe(call.node)} has no default process group to run over", call.node)
        world = GroupMember.WORLD
        assert world is not None
        return Reduced(node=call.node, value=call.node, x=x, group=world.group_name, nodes=(call.node,))

    return recognise


def _refuse(reason: str) -> Callable[[OpCall, fx.Node], Any]:
    return lambda call, x: f"{describe(call.node)} {reason}"


def _mxfp8(call: OpCall, x: fx.Node) -> Any:
    if call["alignment"] not in (None, 32):
        return f"{describe(call.node)} pads rows to {call['alignment']}; only 32 is fused"
    return mxfp8_spec(call, x, ScaleLayout.SWIZZLED_128X4 if call["swizzedLayout"] else ScaleLayout.LINEAR)


NORMS = {
    "trtllm::flashinfer_rmsnorm": norm_op(0),
    "trtllm::flashinfer_gemma_rmsnorm": norm_op(0, weight_bias=1.0),
    "trtllm::flashinfer_fused_add_rmsnorm": add_norm_op(),
    "trtllm::flashinfer_gemma_fused_add_rmsnorm": add_norm_op(weight_bias=1.0),
}

_448_OVER_AMAX = _refuse("multiplies by 448 / amax, which no spec rounds alike")

QUANTISERS = {
    "tensorrt_llm::static_quantize_e4m3_per_tensor": QuantOp(
        "input", 0, lambda call, x: ("quant_fp8_static", STATIC_FP8), scale="scales"
    ),
    "tensorrt_llm::quantize_e4m3_activation": QuantOp(
        "activation", 0, _refuse("rounds its scales to the tensor's dtype in a way that no spec has"), scales=1
    ),
    "trtllm::fp8_quantize_1x128": QuantOp("input", 0, _448_OVER_AMAX, scales=1),
    "trtllm::fp8_quantize_1x128_packed_ue8m0": QuantOp("input", 0, _448_OVER_AMAX, scales=1),
    "trtllm::fp4_quantize": QuantOp(
        "input",
        0,
        lambda call, x: fp4(call, x, "sfVecSize", "sfUseUE8M0", "isSfSwizzledLayout"),
        scales=1,
        scale="globalScale",
    ),
    "trtllm::mxfp8_quantize": QuantOp("input", 0, _mxfp8, scales=1),
}

DIALECT = CustomOpDialect(
    "tensorrt_llm",
    {
        "trtllm::allreduce": _allreduce,
        "trtllm::allreduce_pg": _allreduce,
        "auto_deploy::torch_dist_all_reduce": _default_group("t"),
        "auto_deploy::trtllm_dist_all_reduce": _default_group("t"),
    },
    NORMS,
    QUANTISERS,
)
