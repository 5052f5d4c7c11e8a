"""Sequence parallelism: each rank sums, adds and normalises its own rows, and all rows of the norm are gathered.

    mine = reduce_scatter(x, group, block)                                  out = auto_functionalized(
    norm, total = fused_add_rms_norm(mine, residual, weight, ...)               reduce_scatter_rms_norm_all_gather,
    whole = all_gather(norm, group, block)                                      x, residual, block, ...)
    codes = quant_fp8_static(whole, scale, ...)

``residual``, ``total`` and ``mine`` are this rank's rows.
"""

from __future__ import annotations

from torch._inductor.pattern_matcher import CallFunction, KeywordArg, PatternExpr

from arfusion_pass import ir
from arfusion_pass.ops.schema import SCATTERING_OP
from arfusion_pass.patterns.chains import AllReduceRMSNormChain, call


class ReduceScatterRMSNormAllGatherChain(AllReduceRMSNormChain):
    """The chain between a reduce-scatter and an all-gather."""

    op_name = SCATTERING_OP

    def name(self, weight_bias: float, adds: int, scaled: bool) -> str:
        """The pattern's name in reports, such as ``ReduceScatterFusedAddRMSNormStaticQuantFP8AllGather``."""
        return super().name(weight_bias, adds, scaled).replace("AllReduce", "ReduceScatter", 1) + "AllGather"

    def reduction(self, x: PatternExpr) -> CallFunction:
        """The reduce-scatter."""
        return call(ir.op.reduce_scatter.default, x, KeywordArg("group"), KeywordArg("block"))

    def gathered(self, norm: CallFunction) -> CallFunction:
        """The all-gather of the norm."""
        return call(ir.op.all_gather.default, norm, KeywordArg("group"), KeywordArg("block"))
