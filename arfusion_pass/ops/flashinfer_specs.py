"""FlashInfer's quantisers as this package's specs: the sources of a formula are its kernels, read in 0.7.2.post1."""

from __future__ import annotations

from typing import Any

import torch

from arfusion_pass.ops.flashinfer_enums import as_layout
from arfusion_pass.ops.spec import Apply, Bound, QuantFormat, QuantSpec, ScaleLayout, ScaleRound

FP8 = torch.float8_e4m3fn

STATIC_FP8 = QuantSpec(QuantFormat.FP8, apply=Apply.RECIPROCAL)
"""FlashInfer's static FP8: ``e4m3_satfinite(float(norm) * (1 / scale_factor))``."""

TOKEN_FP8 = QuantSpec(QuantFormat.FP8, group=-1, bound_on=Bound.SCALE, bound=1.0 / (448 * 512))
"""FlashInfer's dynamic FP8: ``scale = max(amax / 448, 1 / (448 * 512))``, ``e4m3(norm / scale)``; vLLM's too."""


def packed_group_fp8(group: int) -> QuantSpec:
    """FlashInfer's per-token-group FP8: ``max(amax / 448, 1e-10)`` rounded up to a power of two, exponents packed."""
    return QuantSpec(
        QuantFormat.FP8,
        group=group,
        layout=ScaleLayout.PACKED_UE8M0,
        bound_on=Bound.SCALE,
        scale_round=ScaleRound.POW2,
        bound=1e-10,
    )


def nvfp4(layout_code: Any, api: str) -> QuantSpec:
    """FlashInfer's NVFP4: groups of 16, e4m3 scales times the global encode scale, in one of three layouts."""
    return QuantSpec(QuantFormat.NVFP4, group=16, layout=as_layout(api, layout_code))


def mxfp8(layout_code: Any, api: str) -> QuantSpec:
    """FlashInfer's MXFP8 (0.7.4), that of its ``mxfp8_quantize``: groups of 32, ``amax / 448`` rounded up to a power of
    two, whose exponents lie in one of three layouts."""
    return QuantSpec(QuantFormat.MXFP8, group=32, layout=as_layout(api, layout_code))
