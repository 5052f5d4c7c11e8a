"""What engines' quantiser kernels compute, as specs: shared by the dialects of custom ops.

Formulas were read in the engines' public sources (named beside each), for NVIDIA GPUs. ``x`` is what the op reads.

static FP8
    ``clamp(x * (1 / scale))``
FP8 per token (vLLM)
    ``scale = max(amax / 448, 1 / (448 * 512))``, ``clamp(x / scale)``
FP8 per group
    ``scale = max(amax, eps) / 448``, up to a power of two where asked, ``clamp(x / scale)``
NVFP4
    FlashInfer's and TensorRT-LLM's convention. Their kernels take approximate reciprocals (``rcp.approx.ftz``), ours
    divides exactly.
MXFP8
    The exponent of ``amax / 448`` rounded up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from arfusion_pass.dialects.reading.op_calls import OpCall, Operand, is_contiguous, same
from arfusion_pass.graph import constant, describe, dtype_of, last_dim, tensor_of
from arfusion_pass.ops.layouts import leading_dimension, token_count
from arfusion_pass.ops.spec import Apply, Bound, QuantFormat, QuantSpec, ScaleLayout, ScaleRound, ScaleRule

FP8_MAX = 448.0
FP8_MIN_SCALE = 1.0 / (FP8_MAX * 512.0)
"""vLLM's ``min_scaling_factor<c10::Float8_e4m3fn>``."""
INT8_MIN_SCALE = 2.0**-23
"""vLLM's ``min_scaling_factor<int8_t>``: the epsilon of fp32."""
GROUP_MIN_SCALE = 1e-10
"""Lower bound of a group's scale before it is rounded to a power of two, in vLLM's and SGLang's kernels."""

STATIC_FP8 = QuantSpec(QuantFormat.FP8, group=0, apply=Apply.RECIPROCAL)
TOKEN_FP8 = QuantSpec(QuantFormat.FP8, group=-1, bound_on=Bound.SCALE, bound=FP8_MIN_SCALE)


def static_fp8(call: OpCall, x: fx.Node) -> Any:
    """One given scale for the tensor, applied by its reciprocal. vLLM says so by a group of ``[-1, -1]``."""
    if call["group_shape"] is not None and list(call["group_shape"]) != [-1, -1]:
        return f"{describe(call.node)} has no scale of one element, but one for each group of {call['group_shape']}"
    return "quant_fp8_static", STATIC_FP8


def group_bound(eps: float, power_of_two: bool) -> tuple[Bound, float]:
    """The bound of ``max(amax, eps) / 448``, of which a power of two takes ``max(., 1e-10)`` besides: one of the two
    bounds is the larger whatever ``amax`` is."""
    if power_of_two and eps / FP8_MAX <= GROUP_MIN_SCALE:
        return Bound.SCALE, GROUP_MIN_SCALE
    return Bound.AMAX, eps


def group_fp8(
    call: OpCall,
    x: fx.Node,
    scales: Operand | None,
    group: Any,
    eps: Any,
    scale_round: ScaleRound = ScaleRound.FP32,
    scale_rule: ScaleRule = ScaleRule.DIVIDE,
) -> Any:
    """Groups along a row; the layout is read off the scales' buffer."""
    eps = constant(eps)
    if (reason := no_whole_groups(call, x, group)) is not None:
        return reason
    if eps is None or scales is None:
        return f"{describe(call.node)} has no constant lower bound, or no buffer for its scales"
    layout = group_layout(x, scales, last_dim(x) // group)  # type: ignore[operator]
    if layout is None:
        return (
            f"the scales of {describe(call.node)} have sizes {scales.size} and strides {scales.stride}; row-major, "
            "column-major, TMA-aligned and packed ones are fused"
        )
    power_of_two = scale_round != ScaleRound.FP32
    if layout == ScaleLayout.PACKED_UE8M0 and not power_of_two:
        return f"the scales of {describe(call.node)} are packed exponents, but not powers of two"
    bound_on, bound = group_bound(eps, power_of_two)
    spec = QuantSpec(
        QuantFormat.FP8,
        group=group,
        layout=layout,
        bound_on=bound_on,
        bound=bound,
        scale_rule=scale_rule,
        scale_round=scale_round,
    )
    return "quant_fp8_group", spec


def no_whole_groups(call: OpCall, x: fx.Node, group: Any) -> str | None:
    """A reason where rows are no whole groups."""
    hidden = last_dim(x)
    if isinstance(group, int) and group > 0 and hidden is not None and hidden % group == 0:
        return None
    return f"{describe(call.node)} quantises groups of {group!r} in rows of {hidden}"


def group_layout(x: fx.Node, scales: Operand, groups: int) -> ScaleLayout | None:
    """The layout of a buffer of ``groups`` scales a token, as the op sees it; None where it is no known one."""
    tensor = tensor_of(x)
    if tensor is None or len(scales.size) < 2:
        return None
    tokens = token_count(tensor.shape)
    packed = scales.dtype == torch.int32
    columns = (groups + 3) // 4 if packed else groups
    if (not packed and scales.dtype != torch.float32) or not same(scales.size[-1], columns):
        return None
    if not same(token_count(scales.size), tokens):
        return None
    if not packed and is_contiguous(scales.size, scales.stride):
        return ScaleLayout.ROW
    if len(scales.size) != 2 or not (same(scales.stride[0], 1) or same(tokens, 1)):
        return None
    kinds = (ScaleLayout.PACKED_UE8M0,) if packed else (ScaleLayout.COLUMN, ScaleLayout.COLUMN_TMA)
    for layout in kinds:
        ld = leading_dimension(tokens, QuantSpec(QuantFormat.FP8, group=1, layout=layout))
        if same(columns, 1) or same(scales.stride[1], ld):
            return layout
    return None


def token_fp8(call: OpCall, x: fx.Node) -> Any:
    """One scale a token with vLLM's lower bound."""
    return "quant_fp8_token", TOKEN_FP8


def nvfp4_spec(call: OpCall, x: fx.Node, layout: ScaleLayout) -> Any:
    """NVFP4; only 16-bit tensors, as the kernels take."""
    if dtype_of(x) not in (torch.bfloat16, torch.float16):
        return f"{describe(call.node)} quantises {dtype_of(x)} to NVFP4; bfloat16 and float16 are fused"
    hidden = last_dim(x)
    if hidden is None or hidden % 16:
        return f"{describe(call.node)} quantises rows of {hidden}, no multiple of 16"
    return "quant_nvfp4", QuantSpec(QuantFormat.NVFP4, group=16, layout=layout)


def mxfp8_spec(call: OpCall, x: fx.Node, layout: ScaleLayout) -> Any:
    """MXFP8; rows must be whole groups of 32 (the kernels pad others)."""
    hidden = last_dim(x)
    if hidden is None or hidden % 32:
        return f"{describe(call.node)} quantises rows of {hidden}, no multiple of 32"
    return "quant_mxfp8", QuantSpec(QuantFormat.MXFP8, group=32, layout=layout)


def fp8_range(call: OpCall, low: str, high: str) -> str | None:
    """A reason where the bounds that a call names are not e4m3's."""
    bounds = constant(call[low]), constant(call[high])
    if bounds == (-FP8_MAX, FP8_MAX):
        return None
    return f"{describe(call.node)} clamps to {bounds}; only float8_e4m3fn's range of 448 is fused"
