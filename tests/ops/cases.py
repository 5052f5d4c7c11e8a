"""Ready-made calls of the fused ops for the tests."""

from __future__ import annotations

from typing import Any

import torch

from arfusion_pass.ops import layouts
from arfusion_pass.ops.spec import NO_QUANT, Apply, Bound, QuantFormat, QuantSpec, ScaleLayout, ScaleRound

FP8, INT8, NVFP4, MXFP8 = QuantFormat.FP8, QuantFormat.INT8, QuantFormat.NVFP4, QuantFormat.MXFP8

SPECS: dict[str, QuantSpec] = {
    "static": QuantSpec(FP8),
    "static_reciprocal": QuantSpec(FP8, apply=Apply.RECIPROCAL),
    "token": QuantSpec(FP8, -1, bound_on=Bound.SCALE, bound=1 / (448 * 512)),
    "group_row": QuantSpec(FP8, 128, bound_on=Bound.AMAX, bound=1e-10),
    "group_column": QuantSpec(FP8, 64, ScaleLayout.COLUMN),
    "group_tma": QuantSpec(FP8, 32, ScaleLayout.COLUMN_TMA),
    "group_packed": QuantSpec(FP8, 64, ScaleLayout.PACKED_UE8M0, scale_round=ScaleRound.POW2),
    "int8": QuantSpec(INT8, -1),
    "nvfp4_128x4": QuantSpec(NVFP4, 16, ScaleLayout.SWIZZLED_128X4),
    "nvfp4_8x4": QuantSpec(NVFP4, 16, ScaleLayout.SWIZZLED_8X4),
    "nvfp4_linear": QuantSpec(NVFP4, 16, ScaleLayout.LINEAR),
    "mxfp8_128x4": QuantSpec(MXFP8, 32, ScaleLayout.SWIZZLED_128X4),
    "mxfp8_linear": QuantSpec(MXFP8, 32, ScaleLayout.LINEAR),
}


def outputs(
    shape: tuple[int, ...], dtype: torch.dtype, spec: QuantSpec = NO_QUANT, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """All outputs that an op can write for ``[..., H]``, filled with a value that no result has everywhere."""
    given = {
        name: torch.full(shape, 77.0, dtype=dtype, device=device)
        for name in ("allreduce_out", "residual_out", "norm_out")
    }
    if spec.format != QuantFormat.NONE:
        codes = torch.empty(layouts.codes_shape(shape, spec), dtype=layouts.codes_dtype(spec), device=device)
        given["quant_out"] = codes
        codes.view(torch.uint8).fill_(0x5A)
        tokens = int(layouts.token_count(shape))
        scales = layouts.allocate_scales(tokens, shape[-1], spec, device)
        if scales is not None:
            scales.view(torch.uint8).fill_(0x5A)
            given["scale_out"] = scales
    return given


def logical_view(buffer: torch.Tensor, tokens: int, spec: QuantSpec) -> torch.Tensor:
    """The ``[T, G]`` view (packed: ``[T, ceil(G / 4)]``) of a column-major transpose; other layouts as they are."""
    return buffer.t()[:tokens] if spec.layout in layouts.COLUMN_MAJOR else buffer


def arguments(spec: QuantSpec = NO_QUANT, group: str = "", **changes: Any) -> dict[str, Any]:
    """The epilogue's keyword arguments with ``spec`` in them."""
    return {
        "residual": None,
        "weight": None,
        "scale": None,
        "group_name": group,
        "quant": spec.pack(),
        "quant_bound": spec.bound,
        **changes,
    }
