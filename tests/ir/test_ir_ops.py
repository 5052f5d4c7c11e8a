"""The canonical ops: frozen schemas, honest fakes, and chained, the same bits as the fused op."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from arfusion_pass.ir import ops as ir
from arfusion_pass.ops import library
from arfusion_pass.ops.spec import Flags, QuantFormat, QuantSpec, ScaleLayout
from tests.ops.cases import SPECS, arguments, logical_view, outputs

BF16 = torch.bfloat16
NORM = ["weight: Optional[Tensor]", "epsilon: float", "dtype: int", "weight_bias: float", "flags: int"]
RARE = [
    "addend: Optional[Tensor]",
    "epsilon_tensor: Optional[Tensor]",
    "factor: Optional[Tensor]",
    "factor_value: float",
]
DYNAMIC = (["x: Tensor", "quant: int", "bound: float"], 2)
FROZEN: dict[str, tuple[list[str], int]] = {
    "all_reduce": (["x: Tensor", "group: str"], 1),
    "reduce_scatter": (["x: Tensor", "group: str", "block: int"], 1),
    "all_gather": (["x: Tensor", "group: str", "block: int"], 1),
    "rms_norm": (["x: Tensor", *NORM, RARE[1]], 1),
    "fused_add_rms_norm": (["x: Tensor", "residual: Optional[Tensor]", *NORM, "residual_dtype: int", *RARE], 2),
    "quant_fp8_static": (["x: Tensor", "scale: Optional[Tensor]", "scale_value: float", "quant: int"], 1),
    "quant_fp8_token": DYNAMIC,
    "quant_fp8_group": DYNAMIC,
    "quant_int8_token": DYNAMIC,
    "quant_mxfp8": DYNAMIC,
    "quant_nvfp4": (["x: Tensor", "scale: Optional[Tensor]", "scale_value: float", "quant: int"], 2),
    "moe_reduce": (
        ["expert_x: Tensor", "expert_scale: Tensor", "token_input: Optional[Tensor]", "flags: int"],
        1,
    ),
    "moe_finalize": (
        [
            "permuted_x: Tensor",
            "index: Tensor",
            "expert_scale: Optional[Tensor]",
            "shared: Optional[Tensor]",
            "routed_scaling_factor: float",
            "flags: int",
        ],
        1,
    ),
}
"""Arguments (ScalarType is an int to the dispatcher) and the number of results."""


@pytest.mark.parametrize("name", FROZEN)
def test_schema(name: str) -> None:
    """Frozen: patterns capture these arguments by position; no defaults, nothing keyword-only, nothing mutated."""
    schema = ir.ir_op(name)._schema
    arguments, results = FROZEN[name]
    assert [f"{argument.name}: {argument.type}" for argument in schema.arguments] == arguments
    assert not any(argument.kwarg_only or argument.has_default_value() for argument in schema.arguments)
    assert len(schema.returns) == results
    assert not schema.is_mutable
    assert set(ir.SCHEMAS) == set(FROZEN)


def quant_arguments(spec: QuantSpec, scale: torch.Tensor | None = None) -> tuple[Any, ...]:
    """What follows ``x`` in the quantiser op of ``spec``."""
    if spec.is_static or spec.format == QuantFormat.NVFP4:
        return (scale, 0.5, spec.pack())
    return (spec.pack(), spec.bound)


SAMPLES: dict[str, tuple[Any, ...]] = {
    "all_reduce": (torch.randn(2, 3, 32), ""),
    "reduce_scatter": (torch.randn(2, 3, 32), "", 0),
    "all_gather": (torch.randn(2, 3, 32), "", 2),
    "rms_norm": (torch.randn(2, 3, 32).bfloat16(), torch.randn(32), 1e-6, torch.float32, 0.0, 1, torch.tensor(1e-3)),
    "fused_add_rms_norm": (
        torch.randn(6, 32).bfloat16(),
        torch.randn(6, 32),
        None,
        1e-6,
        BF16,
        0.0,
        1,
        torch.float32,
        torch.randn(32).bfloat16(),
        None,
        torch.randn(6, 1),
        1.0,
    ),
    "moe_reduce": (torch.randn(3, 5, 32), torch.rand(3, 5), None, 0),
    "moe_finalize": (torch.randn(7, 32), torch.zeros(5, 2).int(), torch.rand(5, 2), torch.randn(5, 32), 2.5, 0),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    """Schema, fake, strides and dynamic tracing agree with the meaning."""
    torch.library.opcheck(ir.ir_op(name), SAMPLES[name])


def quantiser_op(spec: QuantSpec) -> torch._ops.OpOverload:
    """The canonical op of ``spec``."""
    (name,) = (name for name, takes in ir.QUANTISERS.items() if takes(spec))
    return ir.ir_op(name)


@pytest.mark.parametrize("name", SPECS)
def test_opcheck_quantisers(name: str) -> None:
    """The same for each quantiser and scale layout (``test_schema`` fails inside torch on fp8 results)."""
    spec = SPECS[name]
    inputs = (torch.randn(2, 3, 128, dtype=BF16), *quant_arguments(spec))
    torch.library.opcheck(quantiser_op(spec), inputs, test_utils=("test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("flags", [0, Flags.UNROUNDED_SUM, Flags.ROUND_BEFORE_WEIGHT], ids=["plain", "fp32sum", "hf"])
def test_chain_is_the_fused_op(name: str, flags: int) -> None:
    """all_reduce -> fused_add_rms_norm -> quantiser gives the fused op's outputs: what fusing them rests on."""
    spec = SPECS[name]
    x, residual, weight = (torch.randn(*shape).to(BF16) for shape in ((2, 3, 128), (2, 3, 128), (128,)))
    given = outputs((2, 3, 128), BF16, spec)
    scale = torch.tensor([0.5]) if spec.is_static or spec.format == QuantFormat.NVFP4 else None
    values = arguments(spec, residual=residual, weight=weight, flags=int(flags), scale=scale)
    library.fused_op("allreduce_rms_norm")(x, **values, **given)

    reduced = ir.ir_op("all_reduce")(x, "")
    add_norm = ir.ir_op("fused_add_rms_norm")
    norm, total = add_norm(reduced, residual, weight, 1e-6, BF16, 0.0, int(flags), BF16, None, None, None, 1.0)
    assert torch.equal(norm, given["norm_out"])
    assert torch.equal(total, given["residual_out"])
    result = quantiser_op(spec)(norm, *quant_arguments(spec, scale))
    codes, scales = (result, None) if spec.is_static else result
    assert codes.shape == given["quant_out"].shape
    assert torch.equal(codes.view(torch.uint8), given["quant_out"].view(torch.uint8))
    if scales is not None:
        found = logical_view(given["scale_out"], 6, spec)
        assert torch.equal(scales.reshape(found.shape).float(), found.float())
        if spec.layout in (ScaleLayout.ROW, ScaleLayout.LINEAR):
            assert scales.shape[:-1] == (2, 3)


def test_norm_without_residual() -> None:
    """all_reduce -> rms_norm is the fused op without a residual."""
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(64)
    given = outputs((4, 64), BF16)
    given["norm_out"] = torch.empty(4, 64)
    library.fused_op("allreduce_rms_norm")(x, **arguments(weight=weight, weight_bias=1.0), **given)
    assert torch.equal(ir.ir_op("rms_norm")(x, weight, 1e-6, torch.float32, 1.0, 0, None), given["norm_out"])


@pytest.mark.parametrize("factor", [torch.rand(2, 3, 1), torch.rand(6, 1).bfloat16(), torch.rand(()), 0.22])
def test_factor(factor: Any) -> None:
    """all_reduce -> fused_add_rms_norm with a factor, in memory or not, is the fused op with it."""
    x, residual, weight = torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 3, 64).bfloat16(), torch.randn(64)
    given = outputs((2, 3, 64), BF16)
    named = {"factor": factor} if isinstance(factor, torch.Tensor) else {"factor_value": factor}
    library.fused_op("allreduce_rms_norm")(x, **arguments(residual=residual, weight=weight), **named, **given)
    both = (factor, 1.0) if isinstance(factor, torch.Tensor) else (None, factor)
    norm, total = ir.ir_op("fused_add_rms_norm")(x, residual, weight, 1e-6, BF16, 0.0, 0, BF16, None, None, *both)
    assert torch.equal(norm, given["norm_out"]) and torch.equal(total, given["residual_out"])


def test_wrong_quantiser() -> None:
    """A spec given to another quantiser's op, or a group that does not divide, is a ValueError."""
    x = torch.randn(4, 96)
    with pytest.raises(ValueError, match=r"quant_fp8_token: quant=.* is another quantiser's"):
        ir.ir_op("quant_fp8_token")(x, SPECS["int8"].pack(), 0.0)
    with pytest.raises(ValueError, match="hidden size 96 is no multiple of the group 64"):
        ir.ir_op("quant_fp8_group")(x, SPECS["group_column"].pack(), 0.0)
