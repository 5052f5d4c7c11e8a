"""SGLang's all-reduce, and the norms and quantisers of ``sgl_kernel``. Schemas as in sgl-kernel 0.3.21.

    %ar   = sglang.outplace_all_reduce.default(%x, "tp:0", "ca")
    %af   = auto_functionalized(sgl_kernel.fused_add_rmsnorm.default, input=%ar, residual=%r, weight=%w, eps=1e-06,
                                enable_pdl=False)
    %norm = getitem(%af, 1); %total = getitem(%af, 2)

The norms are FlashInfer's (:mod:`arfusion_pass.dialects.flashinfer`). Quantisers, read in SGLang's sources:

* per tensor: ``clamp(x * (1 / scale))``; its scale is declared as written, so that a graph in which others read the
  scale after the call does not fuse it.
* per token: ``scale = amax / 448``, ``clamp(x * (1 / scale))``. Of an all-zero token its two kernels (for few and for
  many tokens) make different codes; ours follows the formula.
* per group: ``scale = max(amax, eps) / 448``, ``clamp(x / scale)``, packed UE8M0 scales up to a power of two. The
  ``_v2`` op multiplies by ``448 / amax``, which rounds elsewhere: only its packed form (powers of two) is fused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from arfusion_pass.dialects.custom_ops import CustomOpDialect, OpCall, QuantOp, functional_all_reduce, refused
from arfusion_pass.dialects.custom_quantisers import STATIC_FP8, fp8_range, group_fp8, nvfp4_spec
from arfusion_pass.dialects.flashinfer import add_norm_op, norm_op
from arfusion_pass.ops.spec import Apply, Bound, QuantFormat, QuantSpec, ScaleLayout, ScaleRound, ScaleRule

TOKEN_FP8 = QuantSpec(QuantFormat.FP8, group=-1, apply=Apply.RECIPROCAL)


def _tensor(call: OpCall, x: fx.Node) -> Any:
    if call["is_static"] is not True:
        return f"{call.node.name} makes one scale for the whole tensor: all tokens would have to be there first"
    return "quant_fp8_static", STATIC_FP8


def _rounding(call: OpCall) -> ScaleRound:
    return ScaleRound.POW2_LOG2 if call["scale_ue8m0"] else ScaleRound.FP32


def _unpacked_power(call: OpCall) -> str | None:
    scales = call.operand("output_s")
    if call["scale_ue8m0"] and (scales is None or scales.dtype != torch.int32):
        return f"{call.node.name} writes power-of-two scales that are not packed into int32"
    return None


def _group(call: OpCall, x: fx.Node) -> Any:
    reason = fp8_range(call, "fp8_min", "fp8_max") or _unpacked_power(call)
    return reason or group_fp8(call, x, call.operand("output_s"), call["group_size"], call["eps"], _rounding(call))


def _group_v2(call: OpCall, x: fx.Node) -> Any:
    if call["fuse_silu_and_mul"] or call["masked_m"] is not None:
        return f"{call.node.name} is masked, or has an activation in front"
    if not call["scale_ue8m0"]:
        return f"{call.node.name} multiplies by 448 / amax, which no spec rounds alike; v1 of the op is fused"
    reason = fp8_range(call, "fp8_min", "fp8_max") or _unpacked_power(call)
    if reason is not None:
        return reason
    found = group_fp8(
        call, x, call.operand("output_s"), call["group_size"], call["eps"], ScaleRound.POW2, ScaleRule.MULTIPLY
    )
    if isinstance(found, str):
        return found
    op, spec = found
    return op, QuantSpec(**{**vars(spec), "bound_on": Bound.AMAX, "bound": float(call["eps"])})


NORMS = {
    "sgl_kernel::rmsnorm": norm_op("output"),
    "sgl_kernel::gemma_rmsnorm": norm_op("output", weight_bias=1.0),
    "sgl_kernel::fused_add_rmsnorm": add_norm_op(),
    "sgl_kernel::gemma_fused_add_rmsnorm": add_norm_op(weight_bias=1.0),
}

QUANTISERS = {
    "sgl_kernel::sgl_per_tensor_quant_fp8": QuantOp("input", "output_q", _tensor, scale="output_s"),
    "sgl_kernel::sgl_per_token_quant_fp8": QuantOp(
        "input", "output_q", lambda call, x: ("quant_fp8_token", TOKEN_FP8), scales="output_s"
    ),
    "sgl_kernel::sgl_per_token_group_quant_8bit": QuantOp("input", "output_q", _group, scales="output_s"),
    "sgl_kernel::sgl_per_token_group_quant_fp8": QuantOp("input", "output_q", _group, scales="output_s"),
    "sgl_kernel::sgl_per_token_group_quant_8bit_v2": QuantOp("input", "output_q", _group_v2, scales="output_s"),
    "sgl_kernel::scaled_fp4_quant": QuantOp(
        "input",
        "output",
        lambda call, x: nvfp4_spec(call, x, ScaleLayout.SWIZZLED_128X4),
        scales="output_scale",
        scale="input_scale",
    ),
}

DIALECT = CustomOpDialect(
    "sglang",
    {
        "sglang::outplace_all_reduce": functional_all_reduce("tensor", "group_name"),
        "sglang::inplace_all_reduce": refused(
            "{node} reduces in place and splits SGLang's piecewise graphs: the norm is in another graph; let SGLang "
            "use its out-of-place all-reduce (custom all-reduce or symmetric memory)"
        ),
    },
    NORMS,
    QUANTISERS,
)
