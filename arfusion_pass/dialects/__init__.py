"""One file for each way of spelling the ops; :mod:`arfusion_pass.dialects.reading.base` says what a dialect is."""

from __future__ import annotations

from arfusion_pass.dialects import (
    aten,
    aten_fused,
    aten_moe,
    aten_quant,
    flashinfer,
    functional_collectives,
    sglang,
    symm_mem,
    tensorrt_llm,
    vllm,
)
from arfusion_pass.dialects.reading.base import (
    Dialect,
    Gathered,
    Norm,
    Prologue,
    Quantised,
    Reduced,
    Refused,
    Rows,
    Scattered,
)

DIALECTS: tuple[Dialect, ...] = (
    functional_collectives.DIALECT,
    aten.DIALECT,
    aten_moe.DIALECT,
    aten_quant.DIALECT,
    aten_fused.DIALECT,
    vllm.DIALECT,
    sglang.DIALECT,
    flashinfer.DIALECT,
    tensorrt_llm.DIALECT,
    symm_mem.DIALECT,
)
"""Every dialect, in the order they are asked."""

__all__ = [
    "DIALECTS",
    "Dialect",
    "Gathered",
    "Norm",
    "Prologue",
    "Quantised",
    "Reduced",
    "Refused",
    "Rows",
    "Scattered",
]
