"""aten's RMSNorm as one op: graphs without Inductor's decompositions (other back-ends, ``torch.export``).

    %both = aten._fused_rms_norm.default(%x, [H], %weight, 1e-06)       # (norm, rstd)
    %norm = getitem(%both, 0)
    or %norm = aten.rms_norm.default(%x, [H], %weight, 1e-06)

fp32 throughout with one rounding at the end. Epsilon None is fp32's, as in the decomposition.
"""

from __future__ import annotations

import torch

from arfusion_pass.dialects.reading.custom_ops import CustomOpDialect, NormOp
from arfusion_pass.dialects.reading.op_calls import OpCall
from arfusion_pass.graph import describe, last_dim
from arfusion_pass.ops.spec import Flags


def _flags(call: OpCall, x: torch.dtype, weight: torch.dtype | None, add: bool) -> Flags:
    return Flags.NONE


def _over_rows(call: OpCall) -> str | None:
    shape, x = call["normalized_shape"], call["input"]
    if not isinstance(shape, (list, tuple)) or list(shape) != [last_dim(x)]:
        return f"{describe(call.node)} normalises over {shape}; only a norm over the whole last dimension is fused"
    return None


_NORM = NormOp(
    "input",
    norm=0,
    flags=_flags,
    epsilon="eps",
    default_epsilon=torch.finfo(torch.float32).eps,
    mixed=True,
    refuse=_over_rows,
)

DIALECT = CustomOpDialect("aten_fused", norms={"aten::_fused_rms_norm": _NORM, "aten::rms_norm": _NORM})
