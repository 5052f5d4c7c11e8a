"""vLLM's ops: its all-reduce, its IR norms, and the norms and quantisers of ``_C``. Schemas as in vLLM 0.32 and 0.33.

    %ar   = vllm.all_reduce.default(%x, "tp:0")                   # arf.register_group("tp:0", group); the plug-in does
    %both = vllm_ir.fused_add_rms_norm.default(%ar, %residual, %weight, 1e-06)     # or vllm_ir.rms_norm
    %norm = getitem(%both, 0); %total = getitem(%both, 1)
    %af   = auto_functionalized(_C.static_scaled_fp8_quant.default, result=%empty, input=%norm, scale=%s)
    %q    = getitem(%af, 1)

What the ops compute, read in vLLM's sources; ``T`` is the dtype of ``x``:

``vllm_ir``
    ``x.float() (+ residual.float())``; the variance is taken of that unrounded sum (``UNROUNDED_SUM``), the sum is
    returned rounded to ``T``; ``(x * rsqrt).to(weight.dtype) * weight`` rounds before a weight in ``T``
    (``ROUND_BEFORE_WEIGHT``) and not before an fp32 one, such as Gemma's ``weight.float() + 1``; without a weight
    there is one rounding.
    ``static_quant_fp8``: ``x.float() * (1 / scale)``, clamped, with a scale of one element. ``dynamic_quant_fp8`` per
    token: the same with ``scale = max(amax / 448, 1 / (448 * 512))``. ``dynamic_group_quant_fp8``: that scale for each
    group, ``x / scale``; with ``use_ue8m0`` the bound, no power of two, comes after the rounding, which no kernel has.
    These are the ops' own (native) semantics. vLLM may lower an op to a kernel that rounds elsewhere.
``_C::rms_norm``, ``_C::fused_add_rms_norm``
    The sum is rounded to ``T`` and the norm reads that. ``Tensor? weight`` in the schema: ``T(x * rsqrt * weight)``
    in fp32. ``Tensor weight`` (before vLLM's norms were IR ops, up to 0.19): ``T(x * rsqrt) * weight`` in ``T``.
    vLLM changed this twice more on the way (its #40860, #42379, #46070), in versions whose graphs hold ``vllm_ir``.
    All operands have one dtype, which may be fp32. With an optional weight an fp32 one beside a 16-bit ``x`` is read as
    what it means there, ``T(x * rsqrt * weight)``: vLLM's own CUDA kernels raise on that mix.
``_C::rms_norm_static_fp8_quant`` and with add
    As the norm of the same library, rounded to ``T``, then quantised.
``_C::rms_norm_dynamic_per_token_quant``, ``_C::rms_norm_per_block_quant``
    The *unrounded* sum, ``T(x * rsqrt) * weight`` in ``T``, then quantised; the residual is written rounded.
Quantisers
    :mod:`arfusion_pass.dialects.reading.custom_quantisers`. Packed group scales round up by their bits, unpacked
    power-of-two ones by ``exp2(ceil(log2()))``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from arfusion_pass.dialects.reading.custom_ops import (
    CustomOpDialect,
    NormOp,
    QuantOp,
    functional_all_gather,
    functional_all_reduce,
    functional_reduce_scatter,
)
from arfusion_pass.dialects.reading.custom_quantisers import (
    FP8_MIN_SCALE,
    INT8_MIN_SCALE,
    TOKEN_FP8,
    fp8_range,
    group_fp8,
    group_layout,
    mxfp8_spec,
    no_whole_groups,
    nvfp4_spec,
    static_fp8,
    token_fp8,
)
from arfusion_pass.dialects.reading.op_calls import OpCall, Operand, same
from arfusion_pass.graph import describe, last_dim, multiplies_instead, statically_equal, value_of
from arfusion_pass.ops.spec import Apply, Bound, Flags, QuantFormat, QuantSpec, ScaleLayout, ScaleRound, ScaleRule


def _ir_flags(call: OpCall, x: torch.dtype, weight: torch.dtype | None, add: bool) -> Flags:
    flags = Flags.UNROUNDED_SUM if add else Flags.NONE
    return flags | (Flags.NONE if weight in (None, torch.float32) else Flags.ROUND_BEFORE_WEIGHT)


def _kernel_flags(call: OpCall, x: torch.dtype, weight: torch.dtype | None, add: bool) -> Flags:
    if x == torch.float32:
        return Flags.UNROUNDED_SUM if add else Flags.NONE  # rounding to x's dtype is none
    in_fp32 = weight in (None, torch.float32) or _takes_fp32_weight(call)
    return Flags.NONE if in_fp32 else Flags.ROUND_BEFORE_WEIGHT


def _dynamic_flags(call: OpCall, x: torch.dtype, weight: torch.dtype | None, add: bool) -> Flags:
    rounds = Flags.NONE if x == torch.float32 else Flags.ROUND_BEFORE_WEIGHT
    return rounds | (Flags.UNROUNDED_SUM if add else Flags.NONE)


def _takes_fp32_weight(call: OpCall) -> bool:
    return call.is_optional("weight") or _weight_in_fp32()


def _weight_in_fp32() -> bool:
    """Whether this process's ``_C::rms_norm`` is of the generation that takes no weight, and multiplies it in fp32."""
    op = getattr(getattr(torch.ops._C, "rms_norm", None), "default", None)
    arguments = op._schema.arguments if op is not None else ()
    return any(each.name == "weight" and isinstance(each.type, torch.OptionalType) for each in arguments)


def _whole_variance(call: OpCall) -> str | None:
    size = value_of(call["variance_size"])
    if size is None or statically_equal(size, last_dim(call["x"])):
        return None
    return f"{describe(call.node)} takes its variance over {size} columns, not over the whole row"


def _no_upper_bound(call: OpCall) -> str | None:
    return None if call["scale_ub"] is None else f"{describe(call.node)} bounds its scales from above (scale_ub)"


def _token(call: OpCall, x: fx.Node) -> Any:
    return _no_upper_bound(call) or token_fp8(call, x)


def _norm_token(call: OpCall, x: fx.Node) -> Any:
    """FP8 or INT8 per token, by the dtype of the result's buffer."""
    result = call.operand("result")
    if result is not None and result.dtype == torch.int8:
        spec = QuantSpec(QuantFormat.INT8, group=-1, bound_on=Bound.SCALE, bound=INT8_MIN_SCALE, apply=Apply.RECIPROCAL)
        return "quant_int8_token", spec
    return token_fp8(call, x)


def _norm_block(call: OpCall, x: fx.Node) -> Any:
    group, scales = call["group_size"], call.operand("scale")
    reason = no_whole_groups(call, x, group)
    if reason is not None or scales is None:
        return reason or f"{describe(call.node)} has no buffer for its scales"
    layout = group_layout(x, scales, last_dim(x) // group)  # type: ignore[operator]
    if layout is None or (layout != ScaleLayout.ROW) != bool(call["is_scale_transposed"]):
        return f"the scales of {describe(call.node)} have sizes {scales.size} and strides {scales.stride}"
    spec = QuantSpec(QuantFormat.FP8, group=group, layout=layout, bound_on=Bound.SCALE, bound=FP8_MIN_SCALE)
    return "quant_fp8_group", spec


def _ir_misfit(call: OpCall) -> str | None:
    if call["fp8_dtype"] != torch.float8_e4m3fn:
        return f"{describe(call.node)} quantises to {call['fp8_dtype']}; float8_e4m3fn is fused"
    if call["num_token_padding"] is not None:
        return f"{describe(call.node)} pads its rows (num_token_padding)"
    return None


def _ir_static(call: OpCall, x: fx.Node) -> Any:
    """One given scale, applied by its reciprocal in fp32."""
    return _ir_misfit(call) or static_fp8(call, x)


def _ir_dynamic(call: OpCall, x: fx.Node) -> Any:
    """One scale a token, ``amax / 448`` with a lower bound, applied by its reciprocal."""
    if not call["per_token"]:
        return f"{describe(call.node)} makes one scale of all tokens; one scale a token or a group is fused"
    spec = dataclasses.replace(TOKEN_FP8, scale_rule=_over_limit(x), apply=Apply.RECIPROCAL)
    return _ir_misfit(call) or _no_upper_bound(call) or ("quant_fp8_token", spec)


def _ir_group(call: OpCall, x: fx.Node) -> Any:
    """Groups along a row, ``amax / 448`` with a lower bound; the scales' layout is the result's."""
    shape, scales = call["group_shape"], call.result(1)
    column, alignment = call["column_major"], call["scale_alignment"] or 1
    if call["use_ue8m0"]:
        return (
            f"{describe(call.node)} bounds its scales by 1 / (448 * 512), which is no power of two, after it rounded "
            "them up to one; a bound before that is fused"
        )
    if not isinstance(shape, (list, tuple)) or len(shape) != 2 or shape[0] != 1:
        return f"{describe(call.node)} quantises groups of {shape}; groups within a row are fused"
    reason = _ir_misfit(call) or no_whole_groups(call, x, shape[1])
    if reason is not None:
        return reason
    layout = ScaleLayout.ROW if scales is None else group_layout(x, scales, last_dim(x) // shape[1])  # type: ignore[operator]
    if scales is not None and (layout is None or not _aligned(scales, alignment if column else 1)):
        return f"the scales of {describe(call.node)} have strides {scales.stride}, and are to be aligned to {alignment}"
    spec = QuantSpec(
        QuantFormat.FP8,
        group=shape[1],
        layout=layout or ScaleLayout.ROW,
        bound_on=Bound.SCALE,
        bound=FP8_MIN_SCALE,
        scale_rule=_over_limit(x),
    )
    return "quant_fp8_group", spec


def _aligned(scales: Operand, alignment: int) -> bool:
    """Whether columns of scales begin at multiples of ``alignment``: asked for of the kernel that an op is lowered to,
    and not always a fact of the op's own value in the graph."""
    return alignment == 1 or same(scales.stride[-1] % alignment, 0)


def _over_limit(x: fx.Node) -> ScaleRule:
    """How ``amax / 448.0`` is computed where ``x`` lies."""
    return ScaleRule.MULTIPLY if multiplies_instead(x) else ScaleRule.DIVIDE


def _group(call: OpCall, x: fx.Node) -> Any:
    rounding = ScaleRound.POW2_LOG2 if call["scale_ue8m0"] else ScaleRound.FP32
    reason = fp8_range(call, "fp8_min", "fp8_max")
    return reason or group_fp8(call, x, call.operand("output_s"), call["group_size"], call["eps"], rounding)


def _packed(call: OpCall, x: fx.Node) -> Any:
    reason = fp8_range(call, "fp8_min", "fp8_max")
    scales = call.operand("output_s_packed")
    return reason or group_fp8(call, x, scales, call["group_size"], call["eps"], ScaleRound.POW2)


def _nvfp4(call: OpCall, x: fx.Node) -> Any:
    swizzled = call["is_sf_swizzled_layout"]
    return nvfp4_spec(call, x, ScaleLayout.SWIZZLED_128X4 if swizzled else ScaleLayout.LINEAR)


def _mxfp8(call: OpCall, x: fx.Node) -> Any:
    swizzled = call["is_sf_swizzled_layout"]
    return mxfp8_spec(call, x, ScaleLayout.SWIZZLED_128X4 if swizzled else ScaleLayout.LINEAR)


NORMS = {
    "vllm_ir::rms_norm": NormOp("x", norm=0, flags=_ir_flags, mixed=True, refuse=_whole_variance),
    "vllm_ir::fused_add_rms_norm": NormOp(
        "x", norm=0, flags=_ir_flags, residual="x_residual", total=1, mixed=True, refuse=_whole_variance
    ),
    "vllm_ir::fused_add_rms_norm.maybe_inplace": NormOp(
        "x", norm=0, flags=_ir_flags, residual="x_residual", total=1, mixed=True, refuse=_whole_variance
    ),
    "_C::rms_norm": NormOp("input", norm="result", flags=_kernel_flags, fp32=True, fp32_weight=_takes_fp32_weight),
    "_C::fused_add_rms_norm": NormOp(
        "input",
        norm="input",
        flags=_kernel_flags,
        residual="residual",
        total="residual",
        fp32=True,
        fp32_weight=_takes_fp32_weight,
    ),
    "_C::rms_norm_static_fp8_quant": NormOp(
        "input", norm=None, flags=_kernel_flags, fp32=True, quant=QuantOp("input", "result", static_fp8, scale="scale")
    ),
    "_C::fused_add_rms_norm_static_fp8_quant": NormOp(
        "input",
        norm=None,
        flags=_kernel_flags,
        fp32=True,
        residual="residual",
        total="residual",
        quant=QuantOp("input", "result", static_fp8, scale="scale"),
    ),
    "_C::rms_norm_dynamic_per_token_quant": NormOp(
        "input",
        norm=None,
        flags=_dynamic_flags,
        fp32=True,
        residual="residual",
        total="residual",
        refuse=_no_upper_bound,
        quant=QuantOp("input", "result", _norm_token, scales="scale"),
    ),
    "_C::rms_norm_per_block_quant": NormOp(
        "input",
        norm=None,
        flags=_dynamic_flags,
        fp32=True,
        residual="residual",
        total="residual",
        refuse=_no_upper_bound,
        quant=QuantOp("input", "result", _norm_block, scales="scale"),
    ),
}

QUANTISERS = {
    "vllm_ir::static_quant_fp8": QuantOp("x", 0, _ir_static, scale="scale"),
    "vllm_ir::dynamic_quant_fp8": QuantOp("x", 0, _ir_dynamic, scales=1),
    "vllm_ir::dynamic_group_quant_fp8": QuantOp("x", 0, _ir_group, scales=1),
    "_C::static_scaled_fp8_quant": QuantOp("input", "result", static_fp8, scale="scale"),
    "_C::dynamic_per_token_scaled_fp8_quant": QuantOp("input", "result", _token, scales="scale"),
    "_C::per_token_group_fp8_quant": QuantOp("input", "output_q", _group, scales="output_s"),
    "_C::per_token_group_fp8_quant_packed": QuantOp("input", "output_q", _packed, scales="output_s_packed"),
    "_C::scaled_fp4_quant": QuantOp("input", 0, _nvfp4, scales=1, scale="input_scale"),
    "_C::scaled_fp4_quant.out": QuantOp("input", "output", _nvfp4, scales="output_scale", scale="input_scale"),
    "vllm::flashinfer_nvfp4_quantize": QuantOp(
        "a", 0, lambda call, x: nvfp4_spec(call, x, ScaleLayout.SWIZZLED_8X4), scales=1, scale="a_global_sf"
    ),
    "vllm::mxfp8_quantize": QuantOp("x", 0, _mxfp8, scales=1),
    "vllm::flashinfer_mxfp8_quantize_8x4": QuantOp(
        "a", 0, lambda call, x: mxfp8_spec(call, x, ScaleLayout.SWIZZLED_8X4), scales=1
    ),
}

DIALECT = CustomOpDialect(
    "vllm",
    {"vllm::all_reduce": functional_all_reduce("tensor", "group_name")},
    NORMS,
    QUANTISERS,
    {"vllm::reduce_scatter": functional_reduce_scatter("tensor", "dim", "world_size", "group_name")},
    {"vllm::all_gather": functional_all_gather("tensor", "dim", "world_size", "group_name")},
)
