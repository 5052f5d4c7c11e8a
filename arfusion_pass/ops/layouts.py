"""Where scales lie in memory: allocation, index formulas, writing and reading back, for every ``ScaleLayout``.

Everything here speaks of *logical* scales ``[T, G]``: token ``t``, group ``g``. A column-major buffer comes in two
forms that share one address formula, ``g * ld + t``: the logical view ``[T, G]`` with strides ``(1, ld)``, and the
contiguous transpose ``[G, ld]`` (what the graph rewrite allocates, because Inductor plans only contiguous buffers).
Padding inside the given tensor's own span is written as 0; memory past the last element of a strided view may
belong to someone else and is left alone.

Token counts may be ``SymInt`` wherever only a shape is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch

from arfusion_pass.ops.spec import QuantFormat, QuantSpec, ScaleLayout

Size: TypeAlias = "int | torch.SymInt"

SWIZZLED = (ScaleLayout.SWIZZLED_128X4, ScaleLayout.SWIZZLED_8X4)
COLUMN_MAJOR = (ScaleLayout.COLUMN, ScaleLayout.COLUMN_TMA, ScaleLayout.PACKED_UE8M0)

SCALE_DTYPES: dict[QuantFormat, tuple[torch.dtype, ...]] = {
    QuantFormat.NVFP4: (torch.float8_e4m3fn, torch.uint8),
    QuantFormat.MXFP8: (torch.uint8, torch.float8_e8m0fnu),
}
"""Accepted dtypes of 1-byte scales, the one that is allocated first."""

CODE_DTYPES: dict[QuantFormat, tuple[torch.dtype, ...]] = {
    QuantFormat.FP8: (torch.float8_e4m3fn,),
    QuantFormat.INT8: (torch.int8,),
    QuantFormat.NVFP4: (torch.uint8, torch.float4_e2m1fn_x2),
    QuantFormat.MXFP8: (torch.float8_e4m3fn,),
}
"""Accepted dtypes of the quantised output, the one that is allocated first."""


def round_up(size: Size, multiple: int) -> Size:
    """``size`` rounded up to ``multiple``; keeps a ``SymInt`` symbolic."""
    return (size + multiple - 1) // multiple * multiple


def token_count(shape: Sequence[Size]) -> Size:
    """Tokens of an ``[..., H]`` shape: the product of all dimensions but the last."""
    return math.prod(shape[:-1])


def group_count(hidden: Size, spec: QuantSpec) -> Size:
    """Scales a token has: ``H / group``, or 1 for one scale a token."""
    return 1 if spec.group <= 0 else hidden // spec.group


def codes_shape(shape: Sequence[Size], spec: QuantSpec) -> tuple[Size, ...]:
    """Shape of the quantised output for an input ``[..., H]``: the same, or ``[..., H / 2]`` bytes for NVFP4."""
    hidden = shape[-1] // 2 if spec.format == QuantFormat.NVFP4 else shape[-1]
    return (*shape[:-1], hidden)


def codes_dtype(spec: QuantSpec) -> torch.dtype:
    """Dtype that the quantised output is allocated in."""
    return CODE_DTYPES[spec.format][0]


def scale_dtypes(spec: QuantSpec) -> tuple[torch.dtype, ...]:
    """Dtypes that ``scale_out`` may have; the first is the one that is allocated."""
    if spec.layout == ScaleLayout.PACKED_UE8M0:
        return (torch.int32,)
    return SCALE_DTYPES.get(spec.format, (torch.float32,))


def leading_dimension(tokens: Size, spec: QuantSpec) -> Size:
    """Distance between two groups of one token in a column-major layout, in elements."""
    return tokens if spec.layout == ScaleLayout.COLUMN else round_up(tokens, 4)


def column_count(hidden: Size, spec: QuantSpec) -> Size:
    """Columns of a column-major buffer: ``G``, or ``ceil(G / 4)`` words where four exponents share one."""
    groups = group_count(hidden, spec)
    return (groups + 3) // 4 if spec.layout == ScaleLayout.PACKED_UE8M0 else groups


def scale_allocation(tokens: Size, hidden: Size, spec: QuantSpec) -> tuple[tuple[Size, ...], torch.dtype] | None:
    """Shape and dtype of a contiguous ``scale_out``, or None where the quantiser writes no scale.

    Column-major layouts are given as their transpose (``[G, T]``, ``[G, pad4(T)]``, packed ``[ceil(G / 4), pad4(T)]``);
    its transpose, cut to ``T`` rows, is the ``[T, G]`` view that a consumer reads.
    """
    if spec.format == QuantFormat.NONE or spec.is_static:
        return None
    groups = group_count(hidden, spec)
    dtype = scale_dtypes(spec)[0]
    if spec.layout in COLUMN_MAJOR:
        return (column_count(hidden, spec), leading_dimension(tokens, spec)), dtype
    if spec.layout in SWIZZLED:
        rows = 128 if spec.layout == ScaleLayout.SWIZZLED_128X4 else 8
        return (round_up(tokens, rows), round_up(groups, 4)), dtype
    return (tokens, groups), dtype


def allocate_scales(tokens: int, hidden: int, spec: QuantSpec, device: torch.device | str) -> torch.Tensor | None:
    """An uninitialised ``scale_out`` of :func:`scale_allocation`'s shape, or None where there is none."""
    allocation = scale_allocation(tokens, hidden, spec)
    return None if allocation is None else torch.empty(allocation[0], dtype=allocation[1], device=device)


def swizzled_index(row: torch.Tensor, column: torch.Tensor, groups: int, layout: ScaleLayout) -> torch.Tensor:
    """Flat index of the scale of (row ``m``, group ``k``); ``tiles = ceil(G / 4)`` tiles a row of tiles.

    128x4 (cuBLAS, CUTLASS, FlashInfer code 0)::

        (m / 128) * tiles * 512 + (k / 4) * 512 + (m % 32) * 16 + ((m % 128) / 32) * 4 + k % 4

    8x4 (TensorRT-LLM's low-latency GEMM, FlashInfer code 1)::

        (m / 8) * tiles * 32 + (k / 4) * 32 + (m % 8) * 4 + k % 4
    """
    tiles = (groups + 3) // 4
    if layout == ScaleLayout.SWIZZLED_128X4:
        tile = (row // 128 * tiles + column // 4) * 512
        return tile + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
    return (row // 8 * tiles + column // 4) * 32 + row % 8 * 4 + column % 4


def is_transposed(buffer: torch.Tensor, tokens: int, hidden: int, spec: QuantSpec) -> bool:
    """Whether a column-major ``buffer`` is the contiguous transpose rather than the logical view."""
    shape = (column_count(hidden, spec), leading_dimension(tokens, spec))
    return tuple(buffer.shape) == shape and buffer.is_contiguous()


def exponent_bytes(scales: torch.Tensor) -> torch.Tensor:
    """Biased exponents (int32, 0 to 255) of fp32 ``scales``; 0 for 0, 255 for inf and NaN."""
    return scales.view(torch.int32) >> 23 & 0xFF


def write_scales(scales: torch.Tensor, out: torch.Tensor, hidden: int, spec: QuantSpec) -> None:
    """Write logical ``scales`` ``[T, G]`` into ``out`` in the layout of ``spec``, padding as 0.

    Args:
        scales: fp32; e4m3 for NVFP4; uint8 exponents for MXFP8.
        out: a buffer that the checks of :mod:`arfusion_pass.ops.checks` accept.
        hidden: hidden size.
    """
    tokens, groups = scales.shape
    if tokens == 0:
        return
    if spec.layout in COLUMN_MAJOR:
        _write_columns(scales, out, hidden, spec)
    elif spec.layout in SWIZZLED:
        flat = out.view(torch.uint8).view(-1)
        flat.zero_()
        flat[_swizzle_map(tokens, groups, spec, out.device)] = scales.contiguous().view(torch.uint8).view(-1)
    elif spec.layout == ScaleLayout.LINEAR:
        out.view(torch.uint8).view(tokens, groups).copy_(scales.contiguous().view(torch.uint8))
    else:
        out.view(tokens, groups).copy_(scales)


def read_scales(buffer: torch.Tensor, tokens: int, hidden: int, spec: QuantSpec) -> torch.Tensor:
    """The inverse of :func:`write_scales`: logical scales ``[T, G]``, a copy.

    fp32, also for packed exponents (byte 0 reads as 0.0, 255 as inf); uint8 for the 1-byte layouts.
    """
    groups = int(group_count(hidden, spec))
    if spec.layout in COLUMN_MAJOR:
        columns, ld = int(column_count(hidden, spec)), int(leading_dimension(tokens, spec))
        # clone, not contiguous(): a single token's column counts as contiguous whatever its strides say
        logical = buffer.as_strided((columns, tokens), (ld, 1)).t().clone(memory_format=torch.contiguous_format)
        if spec.layout != ScaleLayout.PACKED_UE8M0:
            return logical
        exponents = logical.view(torch.uint8)[:, :groups].to(torch.int32)
        return (exponents << 23).view(torch.float32)
    if spec.layout in SWIZZLED:
        flat = buffer.contiguous().view(torch.uint8).view(-1)
        return flat[_swizzle_map(tokens, groups, spec, buffer.device)].view(tokens, groups)
    if spec.layout == ScaleLayout.LINEAR:
        return buffer.contiguous().view(torch.uint8).view(tokens, groups).clone()
    return buffer.contiguous().view(tokens, groups).clone()


def _swizzle_map(tokens: int, groups: int, spec: QuantSpec, device: torch.device) -> torch.Tensor:
    row = torch.arange(tokens, device=device).unsqueeze(1)
    column = torch.arange(groups, device=device).unsqueeze(0)
    return swizzled_index(row, column, groups, spec.layout).view(-1)


def _write_columns(scales: torch.Tensor, out: torch.Tensor, hidden: int, spec: QuantSpec) -> None:
    """Zero the whole span of ``out``, then write the tokens: the padding between columns stays 0."""
    tokens = scales.shape[0]
    columns, ld = int(column_count(hidden, spec)), int(leading_dimension(tokens, spec))
    span = columns * ld if is_transposed(out, tokens, hidden, spec) else (columns - 1) * ld + tokens
    out.as_strided((span,), (1,)).zero_()
    out.as_strided((columns, tokens), (ld, 1)).copy_(_words(scales, columns, spec).t())


def _words(scales: torch.Tensor, columns: int, spec: QuantSpec) -> torch.Tensor:
    """``scales`` as the buffer's elements: fp32 as they are, or four exponents an int32 (byte ``g % 4``)."""
    if spec.layout != ScaleLayout.PACKED_UE8M0:
        return scales
    tokens, groups = scales.shape
    packed = torch.zeros(tokens, 4 * columns, dtype=torch.uint8, device=scales.device)
    packed[:, :groups] = exponent_bytes(scales).to(torch.uint8)
    return packed.view(torch.int32)
