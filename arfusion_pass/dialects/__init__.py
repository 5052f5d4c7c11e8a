"""One file for each way of spelling the ops; :mod:`arfusion_pass.dialects.reading.base` says what a dialect is."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

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
from arfusion_pass.dialects.reading.operands import Sum, sums

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


NO_NORM = "no RMSNorm over its last dimension follows"
"""What is said of an all-reduce behind which no dialect knows one."""


def norms_of(value: fx.Node) -> Iterator[tuple[Norm | Refused, str]]:
    """The norms whose operand is ``value``, with or without an add, each with its dialect's name."""
    candidates = (Sum(value), *sums(value))
    for dialect in DIALECTS:
        for found in dialect.norms(value, candidates):
            yield found, dialect.name


__all__ = [
    "DIALECTS",
    "NO_NORM",
    "Dialect",
    "Gathered",
    "Norm",
    "Prologue",
    "Quantised",
    "Reduced",
    "Refused",
    "Rows",
    "Scattered",
    "norms_of",
]
