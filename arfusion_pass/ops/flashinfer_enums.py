"""FlashInfer's constants under FlashInfer's names and with its values; all of them are also plain integers.

    AllReduceFusionPattern.kARResidualRMSNorm == 1
    QuantizationSFLayout.LINEAR == 2

Where a call takes one, the bare integer and FlashInfer's own constant are taken as well.
"""

from __future__ import annotations

import enum
from typing import Any

from arfusion_pass.ops.spec import ScaleLayout


class AllReduceFusionPattern(enum.IntEnum):
    """What :func:`arfusion_pass.comm.allreduce_fusion` computes, and so what it writes and needs.

    ==  ============================================  =======================================================
    0   ``kAllReduce``                                ``output``
    1   ``kARResidualRMSNorm``                        ``residual_out``, ``norm_out``
    2   ``kARResidualRMSNormFP8Quant``                ``residual_out``, ``quant_out``; static, needs scale_factor
    3   ``kARResidualRMSNormFP4Quant``                ``residual_out``, ``quant_out``, ``scale_out``; NVFP4
    4   ``kARResidualRMSNormOutFP8Quant``             as 2, and ``norm_out``
    5   ``kARResidualRMSNormOutFP4Quant``             as 3, and ``norm_out``
    6   ``kMoEReductionARResidualRMSNorm``            any of the outputs; FP8 or NVFP4 by quant_out
    7   ``kMoEFinalizeARResidualRMSNorm``             any of the outputs; FP8 or NVFP4 by quant_out
    8   ``...PerTokenGroupFP8PackedQuant``            ``residual_out``, ``quant_out``, ``scale_out`` (packed UE8M0)
    9   ``...OutPerTokenGroupFP8PackedQuant``         as 8, and ``norm_out``
    10  ``kARResidualRMSNormDynamicFP8Quant``         ``residual_out``, ``quant_out``, ``scale_out`` (per token)
    11  ``kARResidualRMSNormOutDynamicFP8Quant``      as 10, and ``norm_out``
    12  ``kMoEFinalizeARResidualRMSNormFP8Quant``     refused: pattern 7 with an FP8 quant_out is the same
    13  ``kARResidualRMSNormMXFP8Quant``              ``residual_out``, ``quant_out``, ``scale_out`` (UE8M0, by 32)
    14  ``kARResidualRMSNormOutMXFP8Quant``           as 13, and ``norm_out``
    ==  ============================================  =======================================================
    """

    kAllReduce = 0
    kARResidualRMSNorm = 1
    kARResidualRMSNormFP8Quant = 2
    kARResidualRMSNormFP4Quant = 3
    kARResidualRMSNormOutFP8Quant = 4
    kARResidualRMSNormOutFP4Quant = 5
    kMoEReductionARResidualRMSNorm = 6
    kMoEFinalizeARResidualRMSNorm = 7
    kARResidualRMSNormPerTokenGroupFP8PackedQuant = 8
    kARResidualRMSNormOutPerTokenGroupFP8PackedQuant = 9
    kARResidualRMSNormDynamicFP8Quant = 10
    kARResidualRMSNormOutDynamicFP8Quant = 11
    kMoEFinalizeARResidualRMSNormFP8Quant = 12
    kARResidualRMSNormMXFP8Quant = 13
    kARResidualRMSNormOutMXFP8Quant = 14


class QuantizationSFLayout(enum.IntEnum):
    """Where NVFP4's and MXFP8's block scales lie; the index formulas are in :mod:`arfusion_pass.ops.layouts`."""

    SWIZZLED_128x4 = 0
    SWIZZLED_8x4 = 1
    LINEAR = 2


class MNNVLQuantType(enum.IntEnum):
    """Quantiser of :func:`arfusion_pass.comm.trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant`."""

    NONE = 0
    FP8 = 1
    """Static, per tensor."""
    NVFP4 = 2
    DYNAMIC_FP8 = 3
    """Per token."""
    MXFP8 = 4


class MNNVLAllreduceFusionStrategy(enum.Enum):
    """How an all-reduce travels; never changes a bit of the result."""

    ONESHOT = 0
    """Every rank pushes its tensor to every other and sums itself."""
    TWOSHOT = 1
    """Every token has an owner, which sums and pushes on."""
    AUTO = 99
    """By the measured table."""


SCALE_LAYOUTS: dict[int, ScaleLayout] = {
    QuantizationSFLayout.SWIZZLED_128x4: ScaleLayout.SWIZZLED_128X4,
    QuantizationSFLayout.SWIZZLED_8x4: ScaleLayout.SWIZZLED_8X4,
    QuantizationSFLayout.LINEAR: ScaleLayout.LINEAR,
}
"""FlashInfer's layout codes to the fused ops' own."""


def as_pattern(api: str, pattern: Any) -> AllReduceFusionPattern:
    """``pattern`` as a member; ``ValueError`` for an unknown value, and for 12 by name."""
    try:
        member = AllReduceFusionPattern(pattern)
    except ValueError:
        raise ValueError(f"{api}: pattern must be an AllReduceFusionPattern, 0 to 14, got {pattern!r}") from None
    if member == AllReduceFusionPattern.kMoEFinalizeARResidualRMSNormFP8Quant:
        raise ValueError(
            f"{api}: pattern 12 (kMoEFinalizeARResidualRMSNormFP8Quant) is not taken; use pattern 7 "
            "(kMoEFinalizeARResidualRMSNorm) with a float8_e4m3fn quant_out and scale_factor, which computes the same"
        )
    return member


def as_layout(api: str, layout_code: Any) -> ScaleLayout:
    """``layout_code`` as the fused ops' layout; None is ``SWIZZLED_128x4``, FlashInfer's default."""
    if layout_code is None:
        return ScaleLayout.SWIZZLED_128X4
    layout = SCALE_LAYOUTS.get(layout_code) if isinstance(layout_code, int) else None
    if layout is None:
        raise ValueError(
            f"{api}: layout_code must be a QuantizationSFLayout (0 SWIZZLED_128x4, 1 SWIZZLED_8x4, 2 LINEAR), "
            f"got {layout_code!r}"
        )
    return layout


def as_strategy(api: str, strategy: Any) -> MNNVLAllreduceFusionStrategy:
    """``strategy`` as a member; FlashInfer's own member and its integer are taken too."""
    try:
        return MNNVLAllreduceFusionStrategy(getattr(strategy, "value", strategy))
    except ValueError:
        raise ValueError(
            f"{api}: strategy must be a MNNVLAllreduceFusionStrategy (ONESHOT, TWOSHOT, AUTO), got {strategy!r}"
        ) from None


def as_quant_type(api: str, quant_type: Any) -> MNNVLQuantType:
    """``quant_type`` as a member; ``ValueError`` for ``NONE`` (the default), which does not quantise."""
    try:
        member = MNNVLQuantType(quant_type)
    except ValueError:
        raise ValueError(
            f"{api}: quant_type must be a MNNVLQuantType (1 FP8, 2 NVFP4, 3 DYNAMIC_FP8, 4 MXFP8), got {quant_type!r}"
        ) from None
    if member == MNNVLQuantType.NONE:
        raise ValueError(
            f"{api}: quant_type=NONE does not quantise: give MNNVLQuantType.FP8, NVFP4, DYNAMIC_FP8 or MXFP8, or call "
            "trtllm_mnnvl_fused_allreduce_add_rmsnorm"
        )
    return member
