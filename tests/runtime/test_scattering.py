"""Sequence parallelism on the kernels: which calls they have, and what is launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from arfusion_pass.ops.checks import FusedCall
from arfusion_pass.ops.schema import SCATTERING_OP
from arfusion_pass.ops.spec import Flags
from arfusion_pass.runtime import dispatch, native, scattering, workspace
from tests.ops.cases import SPECS, arguments

BF16 = torch.bfloat16


def call(**given: Any) -> dict[str, Any]:
    rows = {"x": torch.zeros(8, 64, dtype=BF16), "norm_out": torch.empty(8, 64, dtype=BF16), "block": 0}
    names = ("allreduce_out", "residual_out", "norm_out", "quant_out", "scale_out")
    defaults = {"epsilon": 1e-6, "weight_bias": 0.0, "flags": 0, "scale_value": 1.0}
    return {**dict.fromkeys(names), **defaults, **arguments(group="0"), **rows, **given}


@pytest.mark.usefixtures("world")
def test_without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The group's collectives run the op, and the other ranks, which may have the library, hear why."""
    told = []
    monkeypatch.setattr(native, "try_load", lambda: None)
    monkeypatch.setattr(native, "failure", lambda: "no nvcc")
    monkeypatch.setattr(workspace, "without_library", lambda *given: told.append(given))
    assert not dispatch.dispatch(SCATTERING_OP, call())
    assert told == [("0", None, "no nvcc")]


OWN = torch.empty(4, 64, dtype=BF16)
FITS = {
    "add": ({"residual": OWN, "residual_out": OWN}, True),
    "first": ({"allreduce_out": OWN}, True),
    "one block": ({"block": 4}, True),
    "several blocks": ({"block": 2}, True),
    "addend": ({"residual": OWN, "residual_out": OWN, "addend": OWN}, True),
    "sum beside an addend": ({"addend": OWN, "allreduce_out": OWN}, False),
    "sum beside the add": ({"residual": OWN, "allreduce_out": OWN}, False),
    "sums alone": ({"norm_out": None, "residual_out": OWN}, False),
    "no tokens": ({"x": torch.zeros(0, 64, dtype=BF16)}, False),
}


@pytest.mark.parametrize("name", FITS)
def test_fits(name: str) -> None:
    """By what all ranks know: shapes, and which tensors there are."""
    given, fits = FITS[name]
    assert scattering.fits(FusedCall.bind(SCATTERING_OP, call(**given)), world=2) is fits


def test_launch() -> None:
    """Every tensor, dtype, pitch and number of the call; the flags say that each rank owns one block."""
    spec = SPECS["group_tma"]
    x = torch.zeros(8, 128, dtype=BF16)[:, :64]
    given = {
        "x": x,
        "residual": torch.zeros(4, 64),
        "weight": torch.ones(64),
        "residual_out": OWN,
        "norm_out": None,
        "quant_out": torch.empty(8, 64, dtype=torch.float8_e4m3fn),
        "scale_out": torch.empty(2, 8),
        "quant": spec.pack(),
        "flags": int(Flags.UNROUNDED_SUM | Flags.TWOSHOT | Flags.NO_PDL),
        "weight_bias": 1.0,
        "block": 2,
        "addend": torch.zeros(4, 64, dtype=BF16),
    }
    launch = scattering.launch_of(FusedCall.bind(SCATTERING_OP, call(**given)))
    assert (launch.dtype, launch.tokens, launch.hidden, launch.x_stride, launch.residual_stride) == (0, 8, 64, 128, 64)
    assert launch.flags == int(Flags.UNROUNDED_SUM | Flags.NO_PDL | scattering.BLOCKS)
    assert (launch.residual_fp32, launch.weight_fp32, launch.residual_out_fp32, launch.norm_out_fp32) == (1, 1, 0, 0)
    assert (launch.quant, launch.scale_pad_last, launch.weight_bias) == (spec.pack(), 1, 1.0)
    for name in ("x", "residual", "weight", "residual_out", "quant_out", "scale_out", "addend"):
        assert getattr(launch, name) == given[name].data_ptr(), name  # type: ignore[attr-defined]
    assert (launch.block, launch.addend_rows) == (2, 1)
    first = scattering.launch_of(FusedCall.bind(SCATTERING_OP, call(allreduce_out=OWN)))
    assert (first.residual_out, first.allreduce_out, first.residual) == (OWN.data_ptr(), None, None)
