"""What every quantiser computes, step by step, in torch ops: the meaning that kernels must match bit for bit.

All arithmetic is IEEE fp32, round to nearest even, no fused multiply-add, no flush to zero, division exact.
Constants are device tensors where they divide: eager CUDA turns a division by a Python number into a
multiplication by its reciprocal, which is another value.
"""

from __future__ import annotations

import torch

from arfusion_pass.ops.layouts import exponent_bytes
from arfusion_pass.ops.spec import Apply, Bound, QuantFormat, QuantSpec, ScaleRound, ScaleRule

FP8_MAX = 448.0
INT8_MAX = 127.0
E2M1_MAX = 6.0
E2M1_THRESHOLDS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
"""Midpoints between the e2m1 values 0, 0.5, 1, 1.5, 2, 3, 4, 6, and whether the tie goes up (to the even code)."""


def quantise(
    norm: torch.Tensor,
    spec: QuantSpec,
    scale: torch.Tensor | None,
    scale_value: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Quantise the norm as ``spec`` says; dynamic per-token FP8, for instance::

        v = norm.to(dtype).float()
        s = v.abs().amax(-1, keepdim=True) / 448
        codes, scales = (v / s).clamp(-448, 448).to(torch.float8_e4m3fn), s

    Args:
        norm: ``[T, H]``, fp32 as the norm left it, or in ``dtype``; rounded to ``dtype`` unless ``spec.unrounded``.
        spec: the quantiser.
        scale: one element (static FP8's scale, NVFP4's global scale), or None for ``scale_value``.
        scale_value: float, read as fp32.
        dtype: ``T``, the dtype of the tensor that was reduced.

    Returns:
        ``codes`` ``[T, H]`` (NVFP4: uint8 ``[T, H / 2]``) and logical ``scales`` ``[T, G]``, whatever the layout: fp32;
        float8_e4m3fn for NVFP4; uint8 exponents for MXFP8; None for static FP8.
    """
    value = (norm if spec.unrounded else norm.to(dtype)).float()
    if spec.format == QuantFormat.NVFP4:
        return _nvfp4(value, _given_scale(value, scale, scale_value))
    if spec.is_static:
        factor = _given_scale(value, scale, scale_value)
        return _to_fp8(_apply(value, factor, None, spec, dtype), spec), None
    limit = INT8_MAX if spec.format == QuantFormat.INT8 else FP8_MAX
    tokens, hidden = value.shape
    group = hidden if spec.group < 0 else spec.group
    grouped = value.view(tokens, hidden // group, group)
    amax, scales = _dynamic_scale(grouped.abs().amax(-1), limit, spec, dtype)
    if spec.format == QuantFormat.MXFP8:
        exponents = e8m0_round_up(scales)
        scaled = _apply(grouped, e8m0_value(exponents).unsqueeze(-1), None, spec, dtype)
        return _to_fp8(scaled, spec).view(tokens, hidden), exponents
    scaled = _apply(grouped, scales.unsqueeze(-1), (limit, amax.unsqueeze(-1)), spec, dtype).view(tokens, hidden)
    return (_to_int8(scaled) if spec.format == QuantFormat.INT8 else _to_fp8(scaled, spec)), scales


def _constant(value: float, like: torch.Tensor) -> torch.Tensor:
    """``value`` as an fp32 tensor on ``like``'s device: a true divisor in eager CUDA too."""
    return torch.full((), value, dtype=torch.float32, device=like.device)


def _given_scale(value: torch.Tensor, scale: torch.Tensor | None, scale_value: float) -> torch.Tensor:
    return _constant(scale_value, value) if scale is None else scale.reshape(()).float()


def _dynamic_scale(
    amax: torch.Tensor, limit: float, spec: QuantSpec, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounded ``amax`` and the scale, both fp32 ``[T, G]``.

    Steps: amax, its bound, the rule in fp32 (one rounding to ``T`` at its end with ``TENSOR``), the scale's bound, the
    rounding to a power of two. With ``TENSOR`` amax and the bound are rounded to ``T`` first.
    """
    in_tensor = spec.scale_round == ScaleRound.TENSOR

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype).float() if in_tensor else tensor

    bound = rounded(_constant(spec.bound, amax))
    amax = rounded(amax)
    if spec.bound_on == Bound.AMAX:
        amax = torch.maximum(amax, bound)
    if spec.scale_rule == ScaleRule.DIVIDE:
        scale = amax / _constant(limit, amax)
    elif spec.scale_rule == ScaleRule.MULTIPLY:
        scale = amax * _constant(1.0 / limit, amax)
    else:
        scale = torch.reciprocal(torch.reciprocal(amax) * _constant(limit, amax))
    scale = rounded(scale)
    if spec.bound_on == Bound.SCALE:
        scale = torch.maximum(scale, bound)
    if spec.scale_round == ScaleRound.POW2:
        scale = pow2_round_up(scale)
    elif spec.scale_round == ScaleRound.POW2_LOG2:
        scale = pow2_by_log2(scale)
    return amax, scale


def _apply(
    value: torch.Tensor,
    scale: torch.Tensor,
    limit_and_amax: tuple[float, torch.Tensor] | None,
    spec: QuantSpec,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``value`` scaled, fp32; rounded to ``T`` where ``in_dtype``."""
    if spec.apply == Apply.DIVIDE:
        scaled = value / scale
    elif spec.apply == Apply.RECIPROCAL:
        scaled = value * torch.reciprocal(scale)
    elif spec.apply == Apply.MULTIPLY:
        scaled = value * scale
    else:
        assert limit_and_amax is not None, "MAX_OVER_AMAX needs a dynamic amax"
        limit, amax = limit_and_amax
        scaled = value * (torch.reciprocal(amax) * _constant(limit, amax))
    return scaled.to(dtype).float() if spec.in_dtype else scaled


def _to_fp8(scaled: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """e4m3, NaN kept. Without a clamp, values past 448 become what this torch's own cast makes of them here."""
    if spec.clamp:
        scaled = scaled.clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn)


def _to_int8(scaled: torch.Tensor) -> torch.Tensor:
    """``rint`` into [-128, 127]; NaN (an all-zero token without a bound) becomes 0, as CUDA's conversion gives."""
    return torch.nan_to_num(torch.round(scaled).clamp(-128.0, 127.0), nan=0.0).to(torch.int8)


def pow2_round_up(scale: torch.Tensor) -> torch.Tensor:
    """Non-negative fp32 up to a power of two by its bits; 0, inf and NaN stay, a subnormal becomes 2**-126."""
    bits = scale.contiguous().view(torch.int32)
    up = torch.where((bits & 0x7FFFFF) != 0, (bits & 0x7F800000) + 0x800000, bits).view(torch.float32)
    return torch.where(torch.isnan(scale), scale, up)


def pow2_by_log2(scale: torch.Tensor) -> torch.Tensor:
    """``exp2(ceil(log2(scale)))`` with ``log2`` rounded to fp32 once: a scale a few ulp above a power stays at it.

    ``log2`` is taken in fp64 and rounded, which gives the correctly rounded fp32 value; the power is exact.
    """
    exponent = torch.ceil(torch.log2(scale.double()).float()).double()
    return torch.exp2(exponent).float()


def e8m0_round_up(scale: torch.Tensor) -> torch.Tensor:
    """UE8M0 code (uint8) of non-negative fp32, rounded up: ``cvt.rp.satfinite.ue8m0x2.f32``.

    The code ``e`` means ``2 ** (e - 127)``: 0 and all up to 2**-127 give 0; past 2**127, and inf, 254; NaN 255.
    """
    bits = scale.contiguous().view(torch.int32) & 0x7FFFFFFF
    up = ((bits & 0x7FFFFF) != 0) & (bits > 0x400000)
    code = (exponent_bytes(scale.contiguous()) + up.to(torch.int32)).clamp(max=254)
    return torch.where(torch.isnan(scale), torch.full_like(code, 255), code).to(torch.uint8)


def e8m0_value(code: torch.Tensor) -> torch.Tensor:
    """fp32 value of UE8M0 codes; code 0 is the subnormal 2**-127, 255 is NaN."""
    wide = code.to(torch.int32)
    value = torch.where(wide == 0, torch.full_like(wide, 0x400000), wide << 23).view(torch.float32)
    return torch.where(wide == 255, torch.full_like(value, float("nan")), value)


def e2m1_codes(value: torch.Tensor) -> torch.Tensor:
    """4-bit e2m1 codes (uint8) of fp32: nearest, ties to even, saturating at 6, sign of zero kept, NaN is +6.

    That is ``cvt.rn.satfinite.e2m1x2.f32``, in software.
    """
    magnitude = value.abs()
    code = torch.zeros_like(value, dtype=torch.uint8)
    for threshold, tie_goes_up in E2M1_THRESHOLDS:
        code += (magnitude >= threshold) if tie_goes_up else (magnitude > threshold)
    code |= torch.signbit(value).to(torch.uint8) << 3
    return torch.where(torch.isnan(value), torch.full_like(code, 7), code)


def _nvfp4(value: torch.Tensor, encode_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4 by FlashInfer's convention.

    ``encode_scale`` is ``448 * 6 / amax`` of the whole tensor, and is multiplied::

        block = e4m3_satfinite(encode_scale * (amax16 * float32(1 / 6)))
        codes = e2m1(value * (encode_scale / float(block) if block != 0 else 0))
    """
    tokens, hidden = value.shape
    grouped = value.view(tokens, hidden // 16, 16)
    amax = grouped.abs().amax(-1)
    block = encode_scale * (amax * _constant(1.0 / E2M1_MAX, amax))
    scales = block.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    decoded = scales.float()
    factor = torch.where(decoded != 0, encode_scale / decoded, torch.zeros_like(decoded))
    codes = e2m1_codes(grouped * factor.unsqueeze(-1)).view(tokens, hidden // 2, 2)
    return codes[..., 0] | codes[..., 1] << 4, scales
