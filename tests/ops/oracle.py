"""An independent reading of ``spec.py`` in numpy: bit patterns, IEEE fp32 arithmetic, value tables. Imports no torch.

Deliberately unlike ``arfusion_pass.ops.quantisers``: conversions go by nearest entry of a decoded table in float64
(exact, since every fp32 difference of table values is), powers of two by ``frexp``.
"""

from __future__ import annotations

import numpy as np

from arfusion_pass.ops.spec import Apply, Bound, QuantFormat, QuantSpec, ScaleRound, ScaleRule

F32 = np.float32


def round_to(value: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 rounded to ``dtype`` (bf16, fp16, fp32), nearest even, given back as fp32."""
    if dtype == "fp32":
        return value
    if dtype == "fp16":
        return value.astype(np.float16).astype(F32)
    bits = value.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    out = rounded.astype(np.uint32).view(F32)
    return np.where(np.isnan(value), F32(np.nan), out)


def _e4m3_table() -> np.ndarray:
    """Values of the 127 non-negative finite e4m3 codes."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    normal = np.ldexp(1.0 + mantissa / 8.0, exponent - 7)
    return np.where(exponent == 0, np.ldexp(mantissa / 8.0, -6), normal)


E4M3 = _e4m3_table()
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def nearest_even(value: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Index of the nearest entry of ``table``; a tie goes to the even index; saturates. ``value`` is not NaN."""
    magnitude = np.minimum(np.abs(value.astype(np.float64)), table[-1])
    upper = np.clip(np.searchsorted(table, magnitude), 1, len(table) - 1)
    lower = upper - 1
    down, up = magnitude - table[lower], table[upper] - magnitude
    take_lower = (down < up) | ((down == up) & (lower % 2 == 0))
    return np.where(take_lower, lower, upper)


def e4m3_codes(value: np.ndarray) -> np.ndarray:
    """Saturating e4m3 codes; NaN as 0x7F (its sign is not compared)."""
    safe = np.where(np.isnan(value), F32(0), value)
    codes = nearest_even(safe, E4M3) | np.signbit(value).astype(np.int64) << 7
    return np.where(np.isnan(value), 0x7F, codes).astype(np.uint8)


def e2m1_codes(value: np.ndarray) -> np.ndarray:
    """Saturating e2m1 codes; NaN is +6."""
    safe = np.where(np.isnan(value), F32(0), value)
    codes = nearest_even(safe, E2M1) | np.signbit(value).astype(np.int64) << 3
    return np.where(np.isnan(value), 7, codes).astype(np.uint8)


def power_of_two_up(scale: np.ndarray) -> np.ndarray:
    """The least normal power of two not under ``scale``, by frexp; 0, inf and NaN stay."""
    mantissa, exponent = np.frexp(scale.astype(np.float64))
    up = np.ldexp(1.0, np.maximum(np.where(mantissa == 0.5, exponent - 1, exponent), -126))
    with np.errstate(over="ignore"):
        up = up.astype(F32)
    return np.where((scale == 0) | ~np.isfinite(scale), scale, up)


def e8m0(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """UE8M0 code rounded up and its value as fp32."""
    codes = np.zeros(scale.shape, np.uint8)
    values = np.zeros(scale.shape, F32)
    for index, one in np.ndenumerate(scale.astype(np.float64)):
        if np.isnan(one):
            codes[index], values[index] = 255, np.nan
            continue
        code = next((c for c in range(255) if np.ldexp(1.0, c - 127) >= one), 254)
        codes[index], values[index] = code, np.ldexp(1.0, code - 127)
    return codes, values


def quantise(norm: np.ndarray, spec: QuantSpec, given: float, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes as uint8/int8 and scales (fp32, or uint8 for the 1-byte formats), for clamped specs."""
    with np.errstate(all="ignore"):
        value = norm if spec.unrounded else round_to(norm, dtype)
        tokens, hidden = value.shape
        if spec.format == QuantFormat.NVFP4:
            return _nvfp4(value, F32(given))
        if spec.is_static:
            return e4m3_codes(_clamp(_apply(value, F32(given), F32(0), spec, dtype, F32(448)))), None
        limit = F32(127) if spec.format == QuantFormat.INT8 else F32(448)
        grouped = value.reshape(tokens, -1, hidden if spec.group == -1 else spec.group)
        amax = np.abs(grouped).max(-1)
        amax, scale = _scale(amax, limit, spec, dtype)
        written = scale
        if spec.format == QuantFormat.MXFP8:
            written, scale = e8m0(scale)
        scaled = _apply(grouped, scale[..., None], amax[..., None], spec, dtype, limit).reshape(tokens, hidden)
        if spec.format == QuantFormat.INT8:
            rounded = np.clip(np.rint(scaled), -128, 127)
            return np.where(np.isnan(rounded), 0, rounded).astype(np.int8), written
        return e4m3_codes(_clamp(scaled)), written


def _clamp(value: np.ndarray) -> np.ndarray:
    return np.clip(value, F32(-448), F32(448))


def _scale(amax: np.ndarray, limit: np.float32, spec: QuantSpec, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    low = dtype if spec.scale_round == ScaleRound.TENSOR else "fp32"
    bound = round_to(np.full(amax.shape, spec.bound, F32), low)
    amax = round_to(amax, low)
    if spec.bound_on == Bound.AMAX:
        amax = np.maximum(amax, bound)
    scale = {
        ScaleRule.DIVIDE: lambda: amax / limit,
        ScaleRule.MULTIPLY: lambda: amax * F32(1.0 / float(limit)),
        ScaleRule.RECIPROCAL: lambda: F32(1) / (F32(1) / amax * limit),
    }[spec.scale_rule]()
    scale = round_to(scale, low)
    if spec.bound_on == Bound.SCALE:
        scale = np.maximum(scale, bound)
    if spec.scale_round == ScaleRound.POW2:
        scale = power_of_two_up(scale)
    if spec.scale_round == ScaleRound.POW2_LOG2:
        exponent = np.ceil(np.log2(scale.astype(np.longdouble)).astype(F32))
        scale = np.ldexp(1.0, np.where(np.isfinite(exponent), exponent, 0).astype(int)).astype(F32)
        scale = np.where(np.isfinite(exponent), scale, np.where(exponent == -np.inf, F32(0), exponent))
    return amax, scale


def _apply(
    value: np.ndarray, scale: np.ndarray, amax: np.ndarray, spec: QuantSpec, dtype: str, limit: np.float32
) -> np.ndarray:
    scaled = {
        Apply.DIVIDE: lambda: value / scale,
        Apply.RECIPROCAL: lambda: value * (F32(1) / scale),
        Apply.MULTIPLY: lambda: value * scale,
        Apply.MAX_OVER_AMAX: lambda: value * (F32(1) / amax * limit),
    }[spec.apply]()
    return round_to(scaled, dtype) if spec.in_dtype else scaled


def _nvfp4(value: np.ndarray, encode: np.float32) -> tuple[np.ndarray, np.ndarray]:
    tokens, hidden = value.shape
    grouped = value.reshape(tokens, -1, 16)
    block = e4m3_codes(encode * (np.abs(grouped).max(-1) * F32(1 / 6)))
    decoded = np.where(block == 0x7F, np.nan, E4M3[np.minimum(block & 0x7F, 126)]).astype(F32)
    factor = np.where(decoded == 0, F32(0), encode / decoded)
    codes = e2m1_codes(grouped * factor[..., None]).reshape(tokens, hidden // 2, 2)
    return codes[..., 0] | codes[..., 1] << 4, block
