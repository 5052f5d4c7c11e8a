"""FlashInfer's norms and quantisers, where they are registered with torch (its ``register_custom_op`` is a no-op in
0.7; versions and engines that do register them use these names).

    %af   = auto_functionalized(flashinfer.fused_add_rmsnorm.default, input=%ar, residual=%r, weight=%w, eps=1e-06,
                                enable_pdl=None)
    %norm = getitem(%af, 1); %total = getitem(%af, 2)

Read in ``norm.cuh``: everything in fp32 and rounded once, ``x * rsqrt * (weight_bias + weight)`` with the bias 1 in
the Gemma ops. The norm with an add reads the unrounded sum and writes it rounded. The ops that quantise do it from the
unrounded norm, by ``* (1 / scale)``. A missing weight counts as ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from arfusion_pass.dialects.reading.custom_ops import CustomOpDialect, NormOp, QuantOp
from arfusion_pass.dialects.reading.custom_quantisers import mxfp8_spec, nvfp4_spec
from arfusion_pass.dialects.reading.op_calls import OpCall, Output
from arfusion_pass.graph import describe
from arfusion_pass.ops.spec import Apply, Flags, QuantFormat, QuantSpec, ScaleLayout

LAYOUT_CODES = {0: ScaleLayout.SWIZZLED_128X4, 1: ScaleLayout.SWIZZLED_8X4, 2: ScaleLayout.LINEAR}
"""FlashInfer's ``SfLayout``."""
UNROUNDED_STATIC_FP8 = QuantSpec(QuantFormat.FP8, group=0, apply=Apply.RECIPROCAL, unrounded=True)


def _flags(call: OpCall, x: torch.dtype, weight: torch.dtype | None, add: bool) -> Flags:
    return Flags.UNROUNDED_SUM if add else Flags.NONE


def norm_op(result: Output | None, weight_bias: float = 0.0, quant: QuantOp | None = None) -> NormOp:
    """FlashInfer's RMSNorm: ``(input, weight, eps)``."""
    return NormOp("input", norm=result, flags=_flags, epsilon="eps", weight_bias=weight_bias, quant=quant)


def add_norm_op(weight_bias: float = 0.0, quant: QuantOp | None = None) -> NormOp:
    """FlashInfer's RMSNorm with an add: ``(input!, residual!, weight, eps)``, the norm in ``input``."""
    return NormOp(
        "input",
        norm="input" if quant is None else None,
        flags=_flags,
        epsilon="eps",
        residual="residual",
        total="residual",
        weight_bias=weight_bias,
        quant=quant,
    )


def _static(call: OpCall, x: fx.Node) -> Any:
    return "quant_fp8_static", UNROUNDED_STATIC_FP8


def _swizzle(call: OpCall, eight: bool, argument: str = "is_sf_swizzled_layout") -> ScaleLayout:
    if not call[argument]:
        return ScaleLayout.LINEAR
    return ScaleLayout.SWIZZLED_8X4 if eight else ScaleLayout.SWIZZLED_128X4


def fp4(call: OpCall, x: fx.Node, vector: str, ue8m0: str, swizzled: str, eight: bool = False) -> Any:
    """NVFP4 by ``fp4_quantize``; its MXFP4 (groups of 32, or UE8M0 scales) is not fused. The strings name arguments."""
    if call[vector] != 16 or call[ue8m0]:
        return f"{describe(call.node)} quantises to MXFP4; NVFP4 (groups of 16 with e4m3 scales) is fused"
    return nvfp4_spec(call, x, _swizzle(call, eight, swizzled))


def _fp4(call: OpCall, x: fx.Node) -> Any:
    if call["is_global_scale_inversed"]:
        return f"{describe(call.node)} takes the inverse of the global scale"
    return fp4(call, x, "sf_vec_size", "sf_use_ue8m0", "is_sf_swizzled_layout", bool(call["is_sf_8x4_layout"]))


def _mxfp8(call: OpCall, x: fx.Node) -> Any:
    """``sf_swizzle_layout`` (0: 128x4, 1: 8x4, 2: linear) in newer versions, ``is_sf_swizzled_layout`` before."""
    if call["alignment"] not in (None, 32):
        return f"{describe(call.node)} pads rows to {call['alignment']}; only 32 is fused"
    if not call.has_argument("sf_swizzle_layout"):
        return mxfp8_spec(call, x, _swizzle(call, False))
    layout = LAYOUT_CODES.get(call["sf_swizzle_layout"])
    return mxfp8_spec(call, x, layout) if layout is not None else f"{describe(call.node)} has an unknown scale layout"


_STATIC = QuantOp("input", "out", _static, scale="scale")
FP4 = QuantOp("input", 0, _fp4, scales=1, scale="global_scale")
"""``fp4_quantize`` under whatever name it is registered."""
MXFP8 = QuantOp("input", 0, _mxfp8, scales=1)
"""``mxfp8_quantize`` likewise."""

NORMS = {
    "flashinfer::rmsnorm": norm_op("out"),
    "flashinfer::gemma_rmsnorm": norm_op("out", weight_bias=1.0),
    "flashinfer::fused_add_rmsnorm": add_norm_op(),
    "flashinfer::gemma_fused_add_rmsnorm": add_norm_op(weight_bias=1.0),
    "flashinfer::rmsnorm_quant": norm_op(None, quant=_STATIC),
    "flashinfer::fused_add_rmsnorm_quant": add_norm_op(quant=_STATIC),
}

QUANTISERS = {
    "flashinfer::fp4_quantize_sm100": FP4,
    "flashinfer::mxfp8_quantize_sm100": MXFP8,
}

DIALECT = CustomOpDialect("flashinfer", norms=NORMS, quantisers=QUANTISERS)
