"""Wrong arguments: a ValueError that says what was given and what is needed, in eager mode and while tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from arfusion_pass.ops import checks, library
from arfusion_pass.ops.marks import MARK_SHIFT
from arfusion_pass.ops.spec import Apply, Bound, Flags, QuantFormat, QuantSpec, ScaleLayout, ScaleRound, ScaleRule
from tests.ops.cases import SPECS, arguments, outputs

BF16 = torch.bfloat16
FP8 = torch.float8_e4m3fn


def call(**changes: Any) -> tuple[tuple[torch.Tensor], dict[str, Any]]:
    """A right call on 4 tokens of 64 with ``changes``; an output changed to None is left out."""
    x = changes.pop("x", torch.ones(4, 64, dtype=BF16))
    given: dict[str, Any] = {"residual": torch.ones(4, 64, dtype=BF16), "weight": torch.ones(64, dtype=BF16)}
    given.update(norm_out=torch.empty(4, 64, dtype=BF16))
    return (x,), {**arguments(), **given, **changes}


def quantised(name: str, **changes: Any) -> dict[str, Any]:
    """Arguments of the quantiser called ``name`` with right outputs, then ``changes``."""
    given = outputs((4, 64), BF16, SPECS[name])
    return {**given, "quant": SPECS[name].pack(), "quant_bound": SPECS[name].bound, **changes}


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "x dtype": ({"x": torch.ones(4, 64, dtype=torch.int32)}, r"x must be bfloat16 or float16 or float32, got int32"),
    "x scalar": ({"x": torch.tensor(1.0)}, r"x must be \[\.\.\., hidden\]"),
    "x without hidden": ({"x": empty(4, 0)}, r"x must have a hidden size, got \[4, 0\]"),
    "residual tokens": ({"residual": empty(5, 64)}, r"residual must be .* 4 tokens of 64, got \[5, 64\]"),
    "residual hidden": ({"residual": empty(4, 32)}, r"residual must be .* 4 tokens of 64, got \[4, 32\]"),
    "residual dtype": (
        {"residual": empty(4, 64, dtype=torch.float16)},
        r"residual must be bfloat16 or float32, got float16",
    ),
    "fp32 residual": ({"residual": empty(4, 64, dtype=torch.float32)}, r"fp32 residual .* needs flags UNROUNDED_SUM"),
    "weight shape": ({"weight": empty(4, 64)}, r"weight must be \[hidden\] = \[64\], got \[4, 64\]"),
    "weight dtype": ({"weight": empty(64, dtype=torch.float16)}, r"weight must be bfloat16 or float32, got float16"),
    "bias without weight": ({"weight": None, "weight_bias": 1.0}, r"weight_bias=1.0 needs a weight"),
    "addend of another width": ({"addend": empty(32)}, r"addend must be \[hidden\] .* = \[64\], got \[32\]"),
    "addend tokens": ({"addend": empty(3, 64)}, r"addend must be .* with 4 tokens of 64, got \[3, 64\]"),
    "addend dtype": ({"addend": empty(64, dtype=torch.float32)}, r"addend must be bfloat16, got float32"),
    "addend last without a residual": (
        {"addend": empty(64), "residual": None, "flags": int(Flags.ADDEND_LAST)},
        r"flag ADDEND_LAST needs an addend and a residual",
    ),
    "addend last without one": ({"flags": int(Flags.ADDEND_LAST)}, r"ADDEND_LAST needs an addend and a residual"),
    "addend behind an fp32 residual": (
        {
            "addend": empty(64),
            "residual": empty(4, 64, dtype=torch.float32),
            "flags": int(Flags.ADDEND_LAST | Flags.UNROUNDED_SUM),
        },
        r"a residual in front of the addend must be bfloat16, got float32",
    ),
    "addend in a chain": (
        {"addend": empty(64), "flags": int(Flags.RESIDUAL_IN_SHARDED)},
        r"a residual may be sharded without an addend",
    ),
    "factor rows": ({"factor": torch.ones(3, 1)}, r"factor must be \[1\], or .* with 4 tokens of 1, got \[3, 1\]"),
    "factor columns": ({"factor": torch.ones(4)}, r"factor must be \[1\], or .* with 4 tokens of 1, got \[4\]"),
    "factor dtype": ({"factor": torch.ones(1).double()}, r"factor must be bfloat16 or float32, got float64"),
    "factor beyond fp32": ({"factor_value": 1e39}, r"factor_value must be finite in fp32, got 1e\+39"),
    "scaled nothing": (
        {"addend": empty(64), "flags": int(Flags.ADDEND_SCALED)},
        r"flag ADDEND_SCALED needs an addend and a factor",
    ),
    "factor in a chain": (
        {"factor": torch.ones(4, 1), "flags": int(Flags.RESIDUAL_IN_SHARDED)},
        r"a residual may be sharded without an addend, or a factor in memory, only",
    ),
    "two epsilons": ({"epsilon_tensor": torch.ones(2)}, r"epsilon_tensor must have one element, got shape \[2\]"),
    "epsilon dtype": (
        {"epsilon_tensor": torch.ones(1).int()},
        r"epsilon_tensor must be float32 or float64 .* got int32",
    ),
    "both roots": (
        {"flags": int(Flags.DIVIDE_BY_ROOT | Flags.RECIPROCAL_ROOT)},
        r"DIVIDE_BY_ROOT and RECIPROCAL_ROOT exc",
    ),
    "scale without quantiser": ({"scale": torch.ones(1)}, r"scale is for static FP8 and NVFP4 only"),
    "scale shape": (quantised("static", scale=torch.ones(4)), r"scale must have one element, got shape \[4\]"),
    "scale dtype": (quantised("static", scale=torch.ones(1).double()), r"scale must be .* got float64"),
    "no output": ({"norm_out": None}, r"at least one output must be given: allreduce_out, residual_out"),
    "norm shape": ({"norm_out": empty(3, 64)}, r"norm_out must be .* 4 tokens of 64, got \[3, 64\]"),
    "norm dtype": (
        {"norm_out": empty(4, 64, dtype=torch.float16)},
        r"norm_out must be bfloat16 or float32, got float16",
    ),
    "all-reduce dtype": (
        {"allreduce_out": empty(4, 64, dtype=torch.float32)},
        r"allreduce_out must be bfloat16, got float32",
    ),
    "quant_out alone": ({"quant_out": empty(4, 64, dtype=FP8)}, r"need a quantiser, got quant=0"),
    "quantiser alone": (quantised("static", quant_out=None), r"\(FP8\) needs quant_out, got None"),
    "codes dtype": (quantised("int8", quant_out=empty(4, 64, dtype=FP8)), r"quant_out must be int8, got float8_e4m3fn"),
    "codes shape": (
        quantised("nvfp4_linear", quant_out=empty(4, 64, dtype=torch.uint8)),
        r"quant_out must be \[\.\.\., hidden / 2\] with 4 tokens of 32, got \[4, 64\]",
    ),
    "static with scale_out": (quantised("static", scale_out=torch.ones(1)), r"scale_out must be None"),
    "no scale_out": (quantised("group_tma", scale_out=None), r"FP8 needs scale_out, float32 \[2, 4\]; got None"),
    "scale_out dtype": (quantised("token", scale_out=empty(4, 1)), r"scale_out must be float32, got bfloat16"),
    "scale_out shape": (
        quantised("mxfp8_linear", scale_out=empty(4, 4, dtype=torch.uint8)),
        r"4 tokens of 2, got \[4, 4\]",
    ),
    "column shape": (
        quantised("group_tma", scale_out=empty(3, 4, dtype=torch.float32)),
        r"COLUMN_TMA\) must be \[4, 2\] with strides \(1, 4\), or contiguous \[2, 4\], got \[3, 4\]",
    ),
    "swizzle size": (
        quantised("nvfp4_128x4", scale_out=empty(4, 4, dtype=torch.uint8)),
        r"SWIZZLED_128X4\) must have \[128, 4\] = 512 elements, got \[4, 4\]",
    ),
    "group": (
        {"quant": QuantSpec(QuantFormat.FP8, 48).pack(), "quant_out": empty(4, 64, dtype=FP8)},
        r"hidden size 64 is no multiple of the group 48",
    ),
    "quant": ({"quant": 5}, r"quant=0x5 is no packed QuantSpec"),
    "flag bits": ({"flags": 1 << 30}, r"flags=0x40000000 has bits that mean nothing"),
    "both strategies": ({"flags": int(Flags.ONESHOT | Flags.TWOSHOT)}, r"ONESHOT and TWOSHOT exclude each other"),
    "both back-ends": ({"flags": int(Flags.REFERENCE | Flags.FLASHINFER)}, r"REFERENCE and FLASHINFER exclude"),
    "MoE flags": ({"flags": int(Flags.MOE_ROUND_SUM)}, r"MOE_ROUND_\* belong to the MoE ops"),
    "epsilon": ({"epsilon": -1.0}, r"epsilon must be finite in fp32 and not negative, got -1.0"),
    "epsilon NaN": ({"epsilon": float("nan")}, r"epsilon must be finite in fp32 and not negative, got nan"),
    "epsilon beyond fp32": ({"epsilon": 1e39}, r"epsilon must be finite in fp32 and not negative, got 1e\+39"),
    "bias NaN": ({"weight_bias": float("nan")}, r"weight_bias must be finite in fp32, got nan"),
    "bias beyond fp32": ({"weight_bias": -1e39}, r"weight_bias must be finite in fp32, got -1e\+39"),
    "scale beyond fp32": (quantised("static", scale_value=1e39), r"scale_value must be finite in fp32, got 1e\+39"),
    "bound beyond fp32": (quantised("token", quant_bound=1e39), r"the bound must be finite in fp32, got 1e\+39"),
    "device": ({"weight": torch.ones(64, dtype=BF16, device="meta")}, r"weight must be on cpu as x is, got meta"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("mode", ["eager", "fake"])
def test_wrong_arguments(case: str, mode: str) -> None:
    """The same ValueError eagerly and from the fake implementation; nothing was written."""
    changes, message = WRONG[case]
    inputs, kwargs = call(**changes)
    op = library.fused_op("allreduce_rms_norm")
    if mode == "fake":
        if case == "device":
            pytest.skip("fake tensors of two devices fail in torch itself")
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            kwargs = {
                name: fake.from_tensor(value) if isinstance(value, torch.Tensor) else value
                for name, value in kwargs.items()
            }
            with pytest.raises(ValueError, match=f"arfusion::allreduce_rms_norm: .*{message}"):
                op(fake.from_tensor(inputs[0]), **kwargs)
        return
    with pytest.raises(ValueError, match=f"arfusion::allreduce_rms_norm: .*{message}"):
        op(*inputs, **kwargs)


def test_strides_eagerly() -> None:
    """Eager calls take contiguous tensors, and rows at one distance for what is read by rows; the message shows the
    strides. Expanded rows are refused: a kernel would read past them."""
    op = library.fused_op("allreduce_rms_norm")
    apart = r"must be contiguous, or have rows of 64 at one distance"
    for name, wanted in (("x", apart), ("residual", apart), ("norm_out", "must be contiguous")):
        for tensor in (empty(64, 4).t(), empty(1, 64).expand(4, 64), empty(256).as_strided((4, 64), (32, 1))):
            inputs, kwargs = call(**{name: tensor})
            got = rf"got shape \[4, 64\] strides \[{tensor.stride(0)}, {tensor.stride(1)}\]"
            with pytest.raises(ValueError, match=f"{name} {wanted}, {got}"):
                op(*inputs, **kwargs)
    wrong = torch.empty(2, 5).t()[:4]
    inputs, kwargs = call(**quantised("group_tma", scale_out=wrong))
    with pytest.raises(
        ValueError, match=r"strides \(1, 4\), or contiguous \[2, 4\], got \[4, 2\] with strides \[1, 5\]"
    ):
        op(*inputs, **kwargs)
    inputs, kwargs = call(**quantised("group_tma", scale_out=torch.empty(4, 2)))
    with pytest.raises(ValueError, match=r"got \[4, 2\] with strides \[2, 1\]"):
        op(*inputs, **kwargs)


def test_unknown_group() -> None:
    """An unknown process group is named, with what to do; nothing is written before."""
    inputs, kwargs = call(group_name="tp:7", norm_out=torch.full((4, 64), 7.0, dtype=BF16))
    with pytest.raises(ValueError, match=r"no process group is called 'tp:7'.*register_group"):
        library.fused_op("allreduce_rms_norm")(*inputs, **kwargs)
    assert (kwargs["norm_out"] == 7).all()


@pytest.mark.usefixtures("world")
def test_gradients() -> None:
    """A graph's call has no backward: where one is asked for it says so, before anything is written. Without gradients,
    and as an eager call, which is like other kernels', it runs."""
    marked = 1 << MARK_SHIFT
    for name in ("residual", "weight"):
        inputs, kwargs = call(flags=marked, group_name="", norm_out=torch.full((4, 64), 7.0, dtype=BF16))
        kwargs[name].requires_grad_()
        with pytest.raises(RuntimeError, match=rf"{name} requires a gradient, and a fused call has no backward"):
            library.fused_op("allreduce_rms_norm")(*inputs, **kwargs)
        assert (kwargs["norm_out"] == 7).all()
        for guard, flags in ((torch.no_grad(), marked), (torch.enable_grad(), 0)):
            with guard:
                library.fused_op("allreduce_rms_norm")(*inputs, **{**kwargs, "flags": flags})
            assert (kwargs["norm_out"] != 7).all()


MOE_WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "expert_x": ("reduce", {"expert_x": empty(4, 64)}, r"expert_x must have 3 dimensions, got \[4, 64\]"),
    "reduce scale shape": (
        "reduce",
        {"expert_scale": torch.rand(4, 3)},
        r"expert_scale must be \[experts, tokens\] = \[3, 4\], got \[4, 3\]",
    ),
    "reduce scale dtype": ("reduce", {"expert_scale": empty(3, 4)}, r"expert_scale must be float32, got bfloat16"),
    "token_input": ("reduce", {"token_input": empty(5, 64)}, r"token_input must be .* 4 tokens of 64, got \[5, 64\]"),
    "index dtype": ("finalize", {"index": torch.zeros(4, 2).long()}, r"index must be int32, got int64"),
    "index shape": ("finalize", {"index": torch.zeros(8).int()}, r"index must be \[tokens, top_k\], got \[8\]"),
    "scale dtype": (
        "finalize",
        {"expert_scale": torch.rand(4, 2).half()},
        r"expert_scale must be float32 or bfloat16, got float16",
    ),
    "scale shape": (
        "finalize",
        {"expert_scale": torch.rand(2, 4)},
        r"expert_scale must be .* = \[4, 2\], got \[2, 4\]",
    ),
    "shared": ("finalize", {"shared": empty(4, 64, dtype=torch.float32)}, r"shared must be bfloat16, got float32"),
    "factor": (
        "finalize",
        {"routed_scaling_factor": 1e39},
        r"routed_scaling_factor must be finite in fp32, got 1e\+39",
    ),
    "norm tokens": ("finalize", {"norm_out": empty(9, 64)}, r"norm_out must be .* 4 tokens of 64, got \[9, 64\]"),
}


@pytest.mark.parametrize("case", MOE_WRONG)
def test_wrong_moe_arguments(case: str) -> None:
    """MoE inputs: shapes and dtypes that FlashInfer reads silently wrong are errors here."""
    op, changes, message = MOE_WRONG[case]
    own: dict[str, Any]
    if op == "reduce":
        own = {"expert_x": empty(3, 4, 64), "expert_scale": torch.rand(3, 4), "token_input": None}
    else:
        index = torch.zeros(4, 2, dtype=torch.int32)
        own = {"permuted_x": empty(9, 64), "index": index, "expert_scale": None, "shared": None}
        own["routed_scaling_factor"] = 1.0
    name = f"moe_{op}_allreduce_rms_norm"
    kwargs = {**own, **arguments(), "norm_out": empty(4, 64), **changes}
    with pytest.raises(ValueError, match=f"arfusion::{name}: .*{message}"):
        library.fused_op(name)(**kwargs)


E4M3, ROW = QuantFormat.FP8, ScaleLayout.ROW
BAD_SPECS = [
    (QuantSpec(E4M3, bound_on=Bound.AMAX), "static scale has no lower bound"),
    (QuantSpec(E4M3, layout=ScaleLayout.COLUMN), "static scale has no layout"),
    (QuantSpec(E4M3, apply=Apply.MAX_OVER_AMAX), "needs a dynamic scale"),
    (QuantSpec(E4M3, -1, apply=Apply.MULTIPLY), "for a static scale"),
    (QuantSpec(E4M3, -2), "group must be 0, -1 or positive, got -2"),
    (QuantSpec(E4M3, -1, ScaleLayout.COLUMN), "FP8 scales of group -1 come in ROW"),
    (QuantSpec(E4M3, 64, ScaleLayout.LINEAR), "come in ROW, COLUMN, COLUMN_TMA, PACKED_UE8M0"),
    (QuantSpec(E4M3, 64, ScaleLayout.PACKED_UE8M0), "packed UE8M0 scales are powers of two"),
    (
        QuantSpec(E4M3, 64, ROW, apply=Apply.MAX_OVER_AMAX, scale_round=ScaleRound.POW2),
        "does not apply the rounded scale",
    ),
    (QuantSpec(QuantFormat.INT8, 64), r"INT8 is quantised per token \(group -1\), got group 64"),
    (QuantSpec(QuantFormat.NVFP4, 32, ScaleLayout.LINEAR), "NVFP4 has groups of 16, got 32"),
    (QuantSpec(QuantFormat.MXFP8, 32, ROW), "MXFP8 scales come in SWIZZLED_128X4, SWIZZLED_8X4, LINEAR"),
    (QuantSpec(QuantFormat.NVFP4, 16, ScaleLayout.LINEAR, scale_rule=ScaleRule.MULTIPLY), "NVFP4 has one formula"),
    (
        QuantSpec(QuantFormat.MXFP8, 32, ScaleLayout.LINEAR, scale_round=ScaleRound.TENSOR),
        "rounds its exponent up itself",
    ),
    (QuantSpec(E4M3, -1, bound_on=Bound.SCALE, bound=float("inf")), "bound must be finite in fp32, got inf"),
]


@pytest.mark.parametrize(("spec", "message"), BAD_SPECS, ids=range(len(BAD_SPECS)))
def test_impossible_specs(spec: QuantSpec, message: str) -> None:
    """A spec that no quantiser has says which part of it is impossible."""
    with pytest.raises(ValueError, match=message):
        checks.check_spec(spec)


@pytest.mark.parametrize("name", SPECS)
def test_possible_specs(name: str) -> None:
    """The specs that the tests use are accepted."""
    checks.check_spec(SPECS[name])
