"""SGLang's all-reduces, and the norms and quantisers of its kernels: ``sgl_kernel``, and the ``sglang`` namespace.

    %ar   = sglang.outplace_all_reduce.default(%x, "tp:0", "auto")
    %af   = auto_functionalized(sgl_kernel.fused_add_rmsnorm.default, input=%ar, residual=%r, weight=%w, eps=1e-06,
                                enable_pdl=False)
    %norm = getitem(%af, 1); %total = getitem(%af, 2)

Schemas as in sgl-kernel 0.3.21, which SGLang 0.5.23 has moved to ops of its own (``sglang::per_token_group_quant``).
The norms are FlashInfer's (:mod:`arfusion_pass.dialects.flashinfer`). Quantisers, read in SGLang's sources:

* per tensor: ``clamp(x * (1 / scale))``; its scale is declared as written, so that a graph in which others read the
  scale after the call does not fuse it.
* per token: ``scale = amax / 448``, ``clamp(x * (1 / scale))``. Of an all-zero token its two kernels (for few and for
  many tokens) make different codes; ours follows the formula.
* per group, v1: ``scale = max(amax, eps) / 448``, ``clamp(x / scale)``, packed UE8M0 scales up to a power of two.
* per group, since v2: ``scale = max(amax, 1e-10) * (1 / 448)``, ``x * (448 / max(amax, 1e-10))``, or up to a power of
  two and by that. These kernels are compiled with fast math, whose quotient is ``448 * rcp.approx(amax)``; ours takes
  the exact reciprocal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from arfusion_pass.dialects.flashinfer import FP4, MXFP8, add_norm_op, norm_op
from arfusion_pass.dialects.reading.custom_ops import CustomOpDialect, QuantOp, functional_all_reduce, refused
from arfusion_pass.dialects.reading.custom_quantisers import STATIC_FP8, fp8_range, group_fp8, nvfp4_spec
from arfusion_pass.dialects.reading.op_calls import OpCall
from arfusion_pass.graph import constant, describe, dtype_of
from arfusion_pass.ops.spec import Apply, Bound, QuantFormat, QuantSpec, ScaleLayout, ScaleRound, ScaleRule

TOKEN_FP8 = QuantSpec(QuantFormat.FP8, group=-1, apply=Apply.RECIPROCAL)
AMAX_BOUND = 1e-10
"""Lower bound of a group's ``amax`` in the kernels since v2, whatever epsilon the call names."""


def _tensor(call: OpCall, x: fx.Node) -> Any:
    if call["is_static"] is not True:
        return f"{describe(call.node)} makes one scale for the whole tensor: all tokens would have to be there first"
    return "quant_fp8_static", STATIC_FP8


def _rounding(call: OpCall) -> ScaleRound:
    return ScaleRound.POW2_LOG2 if call["scale_ue8m0"] else ScaleRound.FP32


def _unpacked_power(call: OpCall) -> str | None:
    scales = call.operand("output_s")
    if call["scale_ue8m0"] and (scales is None or scales.dtype != torch.int32):
        return f"{describe(call.node)} writes power-of-two scales that are not packed into int32"
    return None


def _group(call: OpCall, x: fx.Node) -> Any:
    reason = fp8_range(call, "fp8_min", "fp8_max") or _unpacked_power(call)
    return reason or group_fp8(call, x, call.operand("output_s"), call["group_size"], call["eps"], _rounding(call))


def _group_v2(low: str, high: str) -> Callable[[OpCall, fx.Node], Any]:
    """The entry of an op whose bounds have these names."""

    def describe(call: OpCall, x: fx.Node) -> Any:
        return fp8_range(call, low, high) or _by_encode_scale(call, x)

    return describe


def _group_v3(call: OpCall, x: fx.Node) -> Any:
    if call["scale_ue8m0"] and dtype_of(x) == torch.float16:
        return f"{describe(call.node)} rounds its multiplier to float16, which has no room for that of a small row"
    return _unpacked_power(call) or _by_encode_scale(call, x)


def _by_encode_scale(call: OpCall, x: fx.Node) -> Any:
    """``x * (448 / amax)`` beside ``scale = amax * (1 / 448)``, with the bound of ``amax`` that is in the kernel."""
    if call["fuse_silu_and_mul"] or call["masked_m"] is not None or call["sorted_token_ids"] is not None:
        return f"{describe(call.node)} has an activation in front, or quantises a selection of its rows"
    if call["eps"] is not None and constant(call["eps"]) != AMAX_BOUND:
        return f"{describe(call.node)} asks for a lower bound of {call['eps']}; its kernel has {AMAX_BOUND}"
    power_of_two = bool(call["scale_ue8m0"])
    rounding = ScaleRound.POW2 if power_of_two else ScaleRound.FP32
    scales = call.operand("output_s")
    found = group_fp8(call, x, scales, call["group_size"], AMAX_BOUND, rounding, ScaleRule.MULTIPLY)
    if isinstance(found, str):
        return found
    op, spec = found
    apply = Apply.DIVIDE if power_of_two else Apply.MAX_OVER_AMAX
    return op, dataclasses.replace(spec, bound_on=Bound.AMAX, bound=AMAX_BOUND, apply=apply)


NORMS = {
    "sgl_kernel::rmsnorm": norm_op("output"),
    "sgl_kernel::gemma_rmsnorm": norm_op("output", weight_bias=1.0),
    "sgl_kernel::fused_add_rmsnorm": add_norm_op(),
    "sgl_kernel::gemma_fused_add_rmsnorm": add_norm_op(weight_bias=1.0),
}

_STATIC = QuantOp("input", "output_q", _tensor, scale="output_s")
_TOKEN = QuantOp("input", "output_q", lambda call, x: ("quant_fp8_token", TOKEN_FP8), scales="output_s")

QUANTISERS = {
    "sgl_kernel::sgl_per_tensor_quant_fp8": _STATIC,
    "sgl_kernel::sgl_per_token_quant_fp8": _TOKEN,
    "sgl_kernel::sgl_per_token_group_quant_8bit": QuantOp("input", "output_q", _group, scales="output_s"),
    "sgl_kernel::sgl_per_token_group_quant_fp8": QuantOp("input", "output_q", _group, scales="output_s"),
    "sgl_kernel::sgl_per_token_group_quant_8bit_v2": QuantOp(
        "input", "output_q", _group_v2("fp8_min", "fp8_max"), scales="output_s"
    ),
    "sglang::flashinfer_fp4_quantize": FP4,
    "sglang::flashinfer_mxfp8_quantize": MXFP8,
    "sglang::per_tensor_quant_fp8": _STATIC,
    "sglang::per_token_quant_fp8": _TOKEN,
    "sglang::per_token_group_quant": QuantOp("input", "output_q", _group_v3, scales="output_s"),
    "sglang::per_token_group_quant_8bit_v2": QuantOp(
        "input", "output_q", _group_v2("min_8bit", "max_8bit"), scales="output_s"
    ),
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
        "sglang::flashinfer_allreduce": functional_all_reduce("tensor", "group_name"),
        "sglang::inplace_all_reduce": refused(
            "{node} reduces in place and splits SGLang's piecewise graphs: the norm is in another graph; let SGLang "
            "use its out-of-place all-reduce (custom all-reduce or symmetric memory)"
        ),
    },
    NORMS,
    QUANTISERS,
)
