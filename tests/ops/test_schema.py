"""The ops' interface is frozen: kernels, recognisers and saved artefacts depend on every argument."""

from __future__ import annotations

import itertools

import pytest
import torch

from arfusion_pass.ops import library
from arfusion_pass.ops.schema import OUTPUT_NAMES, SCATTERING_OP, SCHEMAS
from arfusion_pass.ops.spec import NO_QUANT, Apply, Bound, QuantFormat, QuantSpec, ScaleLayout, ScaleRound, ScaleRule

EPILOGUE = [
    ("residual", "Optional[Tensor]", None, False, False),
    ("weight", "Optional[Tensor]", None, False, False),
    ("scale", "Optional[Tensor]", None, False, False),
    ("group_name", "str", None, False, False),
    ("epsilon", "float", 1e-6, False, False),
    ("weight_bias", "float", 0.0, False, False),
    ("flags", "int", 0, False, False),
    ("quant", "int", 0, False, False),
    ("quant_bound", "float", 0.0, False, False),
    ("scale_value", "float", 1.0, False, False),
    ("addend", "Optional[Tensor]", None, True, False),
    ("epsilon_tensor", "Optional[Tensor]", None, True, False),
    ("factor", "Optional[Tensor]", None, True, False),
    ("factor_value", "float", 1.0, True, False),
    ("allreduce_out", "Optional[Tensor]", None, True, True),
    ("residual_out", "Optional[Tensor]", None, True, True),
    ("norm_out", "Optional[Tensor]", None, True, True),
    ("quant_out", "Optional[Tensor]", None, True, True),
    ("scale_out", "Optional[Tensor]", None, True, True),
]
"""Name, type, default, keyword-only, written."""


def tensor(name: str, optional: bool = False) -> tuple[str, str, None, bool, bool]:
    return (name, "Optional[Tensor]" if optional else "Tensor", None, False, False)


FROZEN = {
    "allreduce_rms_norm": [tensor("x"), *EPILOGUE],
    "moe_reduce_allreduce_rms_norm": [
        tensor("expert_x"),
        tensor("expert_scale"),
        tensor("token_input", optional=True),
        *EPILOGUE,
    ],
    "moe_finalize_allreduce_rms_norm": [
        tensor("permuted_x"),
        tensor("index"),
        tensor("expert_scale", optional=True),
        tensor("shared", optional=True),
        ("routed_scaling_factor", "float", None, False, False),
        *EPILOGUE,
    ],
    SCATTERING_OP: [tensor("x"), *EPILOGUE[:10], ("block", "int", 0, False, False), *EPILOGUE[10:]],
}


@pytest.mark.parametrize("name", FROZEN)
def test_arguments(name: str) -> None:
    """Frozen: names, order, types, defaults, keyword-only, mutation; nothing is returned."""
    schema = library.fused_op(name)._schema
    found = [
        (
            argument.name,
            str(argument.type),
            argument.default_value,
            argument.kwarg_only,
            argument.alias_info is not None and argument.alias_info.is_write,
        )
        for argument in schema.arguments
    ]
    assert found == FROZEN[name]
    assert schema.returns == []


def test_no_other_op() -> None:
    """The namespace's ops are the frozen ones."""
    assert SCHEMAS.keys() == FROZEN.keys()
    assert OUTPUT_NAMES == ("allreduce_out", "residual_out", "norm_out", "quant_out", "scale_out")


@pytest.mark.parametrize("name", FROZEN)
def test_tags(name: str) -> None:
    """Inductor must hand over contiguous inputs: any other tag passes a transposed producer's strides on."""
    assert torch.Tag.needs_contiguous_strides in library.fused_op(name).tags


def test_defining_again_is_harmless() -> None:
    """A second import under another path finds the ops defined and leaves them."""
    assert library._define() is None


def test_spec_round_trip() -> None:
    """Every field of a QuantSpec survives the one integer that ops and kernels read; unequal specs pack differently."""
    seen: dict[int, QuantSpec] = {}
    fields = itertools.product(
        [QuantFormat.FP8, QuantFormat.MXFP8], [-1, 0, 128], ScaleLayout, Bound, ScaleRule, ScaleRound, Apply
    )
    for (form, group, layout, bound_on, rule, rounding, apply), low in itertools.product(fields, range(8)):
        spec = QuantSpec(
            form, group, layout, bool(low & 1), bound_on, rule, rounding, apply, bool(low & 2), bool(low & 4)
        )
        packed = spec.pack()
        assert QuantSpec.unpack(packed) == spec
        assert seen.setdefault(packed, spec) == spec
    assert NO_QUANT.pack() == 0
    assert QuantSpec.unpack(0) == NO_QUANT


@pytest.mark.parametrize("quant", [5, 1 << 32, 1 | 9 << 4, -1, 1 | 1 << 20, 1 << 4])
def test_spec_rejects(quant: int) -> None:
    """An integer that no spec packs to is a ValueError, not a silent quantiser."""
    with pytest.raises(ValueError, match="no packed QuantSpec"):
        QuantSpec.unpack(quant)
