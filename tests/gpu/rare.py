"""Calls with what no common call has: a factor of the sum over ranks, an addend before the residual or behind it,
epsilon in a tensor, a norm by division.

Each is compared as any other (:mod:`tests.gpu.calls`), on real ranks and on simulated ones.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

from arfusion_pass.ops.checks import EPSILON_DTYPES
from arfusion_pass.ops.spec import Flags, QuantFormat, QuantSpec, ScaleLayout
from tests.gpu.calls import Config

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALL = ("allreduce_out", "residual_out", "norm_out")
FACTORS = (("value", False), ("element", False), ("element", True), ("rows", False), ("rows", True))
"""Which, and whether in fp32."""
QUANTISERS = (
    QuantSpec(QuantFormat.FP8),
    QuantSpec(QuantFormat.FP8, -1),
    QuantSpec(QuantFormat.FP8, 128),
    QuantSpec(QuantFormat.INT8, -1),
    QuantSpec(QuantFormat.NVFP4, 16, ScaleLayout.SWIZZLED_128X4),
)


def configs() -> list[Config]:
    """Each form in each dtype, by itself and, at the end, together in front of quantisers."""
    made = []
    base = Config(tokens=6, hidden=720, outputs=ALL)
    forms = [("none", 0), ("same", 0), ("same", int(Flags.ADDEND_LAST)), ("fp32", int(Flags.UNROUNDED_SUM))]
    for dtype, addend, (residual, flags) in itertools.product(DTYPES, ("row", "rows"), forms):
        with_addend = dataclasses.replace(base, dtype=dtype, addend=addend, residual=residual, flags=flags)
        made.append(with_addend)
        if residual == "same":  # many rows, a rounding before the weight, an unrounded sum, wide rows
            flags |= int(Flags.ROUND_BEFORE_WEIGHT)
            made.append(dataclasses.replace(with_addend, tokens=70, flags=flags))
            unrounded = with_addend.flags | int(Flags.UNROUNDED_SUM)
            made.append(dataclasses.replace(with_addend, flags=unrounded, residual_out_fp32=True, weight="none"))
            made.append(dataclasses.replace(with_addend, hidden=12288, tokens=2, outputs=("residual_out", "norm_out")))
    scaled_forms = [
        ("none", "none", 0),
        ("same", "none", 0),
        ("fp32", "none", int(Flags.UNROUNDED_SUM)),
        ("same", "row", 0),
        ("same", "rows", int(Flags.ADDEND_LAST)),
        ("same", "rows", int(Flags.ADDEND_SCALED)),
        ("none", "row", int(Flags.ADDEND_SCALED)),
    ]
    for dtype, factor, (residual, addend, flags) in itertools.product(DTYPES, FACTORS, scaled_forms):
        kind, wide = factor
        scaled = dataclasses.replace(base, dtype=dtype, factor=kind, factor_fp32=wide, residual=residual, addend=addend)
        made.append(dataclasses.replace(scaled, flags=flags))
        if residual == "same":  # many rows, wide rows
            made.append(dataclasses.replace(scaled, tokens=70, flags=flags | int(Flags.ROUND_BEFORE_WEIGHT)))
            made.append(dataclasses.replace(scaled, hidden=12288, tokens=2, flags=flags))
    for dtype, epsilon_in in itertools.product(DTYPES, EPSILON_DTYPES):
        made.append(dataclasses.replace(base, dtype=dtype, epsilon=0.3, epsilon_in=epsilon_in))
    for epsilon in (-0.25, -100.0, float("nan"), float("inf"), 0.0):  # of a tensor, whatever it is
        made.append(dataclasses.replace(base, epsilon=epsilon, epsilon_in=torch.float32))
    for dtype, flag, weight in itertools.product(
        DTYPES, (Flags.DIVIDE_BY_ROOT, Flags.RECIPROCAL_ROOT), ("none", "same", "fp32")
    ):
        for more in (0, int(Flags.ROUND_BEFORE_WEIGHT)):
            made.append(dataclasses.replace(base, dtype=dtype, weight=weight, flags=int(flag) | more))
        made.append(dataclasses.replace(base, dtype=dtype, hidden=8200, tokens=2, weight=weight, flags=int(flag)))
        exact = dataclasses.replace(base, dtype=dtype, residual="none", payload="integers", norm_fp32=True)
        made.append(dataclasses.replace(exact, hidden=64, tokens=40, weight=weight, flags=int(flag)))
    everything = dataclasses.replace(
        base, hidden=4096, addend="row", epsilon=1e-3, epsilon_in=torch.float64, flags=int(Flags.DIVIDE_BY_ROOT)
    )
    for spec in QUANTISERS:
        made.append(dataclasses.replace(everything, spec=spec, outputs=(*ALL, "quant_out")))
        codes = dataclasses.replace(base, hidden=4096, spec=spec, outputs=("residual_out", "quant_out"))
        made.append(dataclasses.replace(codes, factor="rows"))
    made.append(dataclasses.replace(everything, tokens=257, hidden=4112, addend="rows"))
    made.append(dataclasses.replace(everything, tokens=257, hidden=4112, addend="rows", factor="rows"))
    return made
