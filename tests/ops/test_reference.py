"""The fused ops' reference on one rank: equal to the unfused eager graph, every output, flag and prologue."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from arfusion_pass.ops import layouts, library, reference
from arfusion_pass.ops.spec import Flags, QuantFormat
from tests.ops.cases import SPECS, arguments, outputs

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
EPSILONS = [1e-5, 1e-6, 3e-6, 1.1920928955078125e-07]
fused = library.fused_op("allreduce_rms_norm")


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * 3).to(dtype)


def run(op: torch._ops.OpOverload, inputs: tuple[Any, ...], given: dict[str, torch.Tensor], **changes: Any) -> None:
    op(*inputs, **{**arguments(), **changes}, **given)


def hf_norm(h: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Hugging Face LlamaRMSNorm."""
    h32 = h.float()
    h32 = h32 * torch.rsqrt(h32.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * h32.to(h.dtype)


def gemma_norm(h: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Hugging Face Gemma: ``1 + weight`` in fp32, one rounding."""
    h32 = h.float()
    h32 = h32 * torch.rsqrt(h32.pow(2).mean(-1, keepdim=True) + epsilon)
    return (h32 * (1.0 + weight.float())).to(h.dtype)


def torch_norm(h: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``F.rms_norm``."""
    return torch.nn.functional.rms_norm(h, (h.shape[-1],), weight, epsilon)


SPELLINGS = [(hf_norm, Flags.ROUND_BEFORE_WEIGHT, 0.0), (gemma_norm, 0, 1.0), (torch_norm, 0, 0.0)]


@dtypes
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize(("norm", "flags", "bias"), SPELLINGS, ids=["hf", "gemma", "torch"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])
def test_equals_unfused(
    dtype: torch.dtype, epsilon: float, norm: Any, flags: int, bias: float, with_residual: bool
) -> None:
    """Exact: ``residual_out`` and the norm are the eager graph's bits, 3-D input, flattened residual."""
    x, residual, weight = sample(dtype, 2, 5, 192), sample(dtype, 10, 192), sample(dtype, 192)
    given = outputs((10, 192), dtype)
    run(
        fused,
        (x,),
        given,
        residual=residual if with_residual else None,
        weight=weight,
        epsilon=epsilon,
        weight_bias=bias,
        flags=int(flags),
    )
    total = residual + x.view(10, 192) if with_residual else x.view(10, 192)
    assert torch.equal(given["allreduce_out"], x.view(10, 192))
    assert torch.equal(given["residual_out"], total)
    assert torch.equal(given["norm_out"], norm(total, weight, epsilon))


@dtypes
def test_fp32_sum(dtype: torch.dtype) -> None:
    """vLLM's native form: the norm reads the unrounded sum; an fp32 residual stream stays fp32."""
    x, weight = sample(dtype, 6, 128), sample(dtype, 128)
    for residual, out_dtype in ((sample(dtype, 6, 128), dtype), (torch.randn(6, 128), torch.float32)):
        given = outputs((6, 128), dtype)
        given["residual_out"] = torch.empty(6, 128, dtype=out_dtype)
        run(fused, (x,), given, residual=residual, weight=weight, flags=int(Flags.UNROUNDED_SUM))
        total = x.float() + residual.float()
        normalised = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)
        assert torch.equal(given["residual_out"], total.to(out_dtype))
        assert torch.equal(given["norm_out"], (normalised * weight.float()).to(dtype))


def test_fp32_weight() -> None:
    """An fp32 gamma beside bf16, or none: fp32 norm out (torch's promotion), bf16 norm out, rounded before it."""
    x, weight = sample(torch.bfloat16, 6, 128), torch.randn(128)
    x32 = x.float()
    normalised = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)
    cases = [
        (weight, 0, normalised * weight),
        (weight, Flags.ROUND_BEFORE_WEIGHT, weight * normalised.bfloat16()),
        (None, 0, normalised),
        (None, Flags.ROUND_BEFORE_WEIGHT, normalised.bfloat16().float()),
    ]
    for gamma, flags, wanted in cases:
        for out_dtype in (torch.float32, torch.bfloat16):
            norm_out = torch.empty(6, 128, dtype=out_dtype)
            run(fused, (x,), {"norm_out": norm_out}, weight=gamma, flags=int(flags))
            assert torch.equal(norm_out, wanted.to(out_dtype))


def test_two_roundings_reach_every_output() -> None:
    """With ROUND_BEFORE_WEIGHT a bf16 weight's product is bf16, for fp32 norm_out and unrounded quantiser too."""
    x, weight = sample(torch.bfloat16, 6, 128), sample(torch.bfloat16, 128)
    spec = dataclasses.replace(SPECS["token"], unrounded=True)
    given = outputs((6, 128), x.dtype, spec)
    given["norm_out"] = torch.empty(6, 128)
    run(fused, (x,), given, weight=weight, flags=int(Flags.ROUND_BEFORE_WEIGHT), quant=spec.pack())
    wanted = hf_norm(x, weight, 1e-6)
    assert torch.equal(given["norm_out"], wanted.float())
    codes, _ = reference.quantise(wanted, dataclasses.replace(spec, bound=0.0), None, 1.0, x.dtype)
    assert torch.equal(given["quant_out"].view(torch.uint8), codes.view(torch.uint8))


def test_negative_zero_weight_keeps_its_sign() -> None:
    """A bias of 0 is not added: -0.0 + 0.0 would be +0.0, and the eager graph has no such addition."""
    x, weight = torch.ones(2, 64, dtype=torch.bfloat16), torch.full((64,), -0.0, dtype=torch.bfloat16)
    given = outputs((2, 64), x.dtype)
    run(fused, (x,), given, weight=weight)
    assert torch.signbit(given["norm_out"]).all()


@pytest.mark.parametrize("name", SPECS)
def test_quantised_outputs(name: str) -> None:
    """Codes and scales are the quantiser's, applied to the norm rounded to bf16, in the layout asked for."""
    spec = SPECS[name]
    x, weight = sample(torch.bfloat16, 3, 3, 256), sample(torch.bfloat16, 256)
    given = outputs((9, 256), x.dtype, spec)
    scale = torch.tensor([0.02]) if spec.is_static else None
    run(fused, (x,), given, weight=weight, scale=scale, quant=spec.pack(), quant_bound=spec.bound, scale_value=300.0)
    codes, scales = reference.quantise(given["norm_out"], spec, scale, 300.0, x.dtype)
    assert torch.equal(given["quant_out"].view(torch.uint8), codes.view(torch.uint8))
    if scales is not None:
        found = layouts.read_scales(given["scale_out"], 9, 256, spec)
        assert torch.equal(found.view(torch.uint8), scales.contiguous().view(torch.uint8))


def test_other_scale_and_code_dtypes() -> None:
    """NVFP4 codes as ``float4_e2m1fn_x2`` and scales as uint8, MXFP8 scales as ``float8_e8m0fnu``: the same bytes."""
    for name, changes in (
        ("nvfp4_128x4", {"quant_out": torch.float4_e2m1fn_x2, "scale_out": torch.uint8}),
        ("mxfp8_linear", {"scale_out": torch.float8_e8m0fnu}),
    ):
        spec, x = SPECS[name], sample(torch.bfloat16, 4, 128)
        first, second = outputs((4, 128), x.dtype, spec), outputs((4, 128), x.dtype, spec)
        second.update({key: second[key].view(torch.uint8).view(dtype) for key, dtype in changes.items()})
        for given in (first, second):
            run(fused, (x,), given, quant=spec.pack())
        for key in ("quant_out", "scale_out"):
            assert torch.equal(first[key].view(torch.uint8), second[key].view(torch.uint8))


def test_any_subset_of_outputs() -> None:
    """Each subset gives the same bits as all of them at once."""
    spec = SPECS["token"]
    x, residual, weight = (sample(torch.bfloat16, *shape) for shape in ((4, 64), (4, 64), (64,)))
    everything = outputs((4, 64), x.dtype, spec)
    run(fused, (x,), everything, residual=residual, weight=weight, quant=spec.pack(), quant_bound=spec.bound)
    units = [("allreduce_out",), ("residual_out",), ("norm_out",), ("quant_out", "scale_out")]
    for count in range(1, 5):
        for subset in itertools.combinations(units, count):
            names = list(itertools.chain(*subset))
            blank = outputs((4, 64), x.dtype, spec)
            given = {name: blank[name] for name in names}
            quant = spec.pack() if "quant_out" in names else 0
            run(fused, (x,), given, residual=residual, weight=weight, quant=quant, quant_bound=spec.bound)
            for name in names:
                assert torch.equal(given[name].view(torch.uint8), everything[name].view(torch.uint8)), (names, name)


def test_in_place() -> None:
    """``norm_out`` may be the input and ``residual_out`` the residual, as vLLM calls it."""
    x, residual, weight = (sample(torch.bfloat16, *shape) for shape in ((4, 64), (4, 64), (64,)))
    total, norm = residual + x, torch_norm(residual + x, weight, 1e-6)
    run(fused, (x,), {"norm_out": x, "residual_out": residual}, residual=residual, weight=weight)
    assert torch.equal(x, norm)
    assert torch.equal(residual, total)


@pytest.mark.parametrize("name", ["none", *SPECS])
def test_no_tokens(name: str) -> None:
    """T = 0 is a call like any other."""
    spec = SPECS.get(name, reference.NO_QUANT)
    given = outputs((0, 256), torch.bfloat16, spec)
    run(fused, (torch.empty(0, 256, dtype=torch.bfloat16),), given, quant=spec.pack(), quant_bound=spec.bound)


def test_special_values_survive() -> None:
    """-0.0, NaN and inf of one token stay in their own token and keep their signs."""
    x = torch.ones(4, 64, dtype=torch.bfloat16)
    x[0], x[1, 3], x[2, 5] = -0.0, torch.nan, torch.inf
    given = outputs((4, 64), x.dtype)
    run(fused, (x,), given)
    assert torch.signbit(given["allreduce_out"][0]).all()
    assert torch.signbit(given["norm_out"][0]).all()
    assert given["norm_out"][1].isnan().all()
    assert given["norm_out"][2, 5].isnan()
    assert torch.equal(given["norm_out"][3], torch_norm(x[3], torch.ones(64, dtype=x.dtype), 1e-6))


MOE_FLAGS = [0, Flags.MOE_ROUND_PRODUCT, Flags.MOE_ROUND_PRODUCT | Flags.MOE_ROUND_PARTIAL, Flags.MOE_ROUND_SUM]


@dtypes
@pytest.mark.parametrize("flags", MOE_FLAGS)
@pytest.mark.parametrize("with_input", [True, False])
def test_moe_reduce(dtype: torch.dtype, flags: int, with_input: bool) -> None:
    """Expert rows times fp32 weights, summed in expert order, plus the token's own input."""
    x, scale, own = sample(dtype, 3, 5, 64), torch.rand(3, 5), sample(dtype, 5, 64)
    products = [x[e].float() * scale[e, :, None] for e in range(3)]
    if flags & Flags.MOE_ROUND_PRODUCT:
        products = [product.to(dtype).float() for product in products]
    total = products[0].clone()
    for product in products[1:]:
        total = total + product
        if flags & Flags.MOE_ROUND_PARTIAL:
            total = total.to(dtype).float()
    if flags & Flags.MOE_ROUND_SUM:
        total = total.to(dtype).float()
    wanted = (total + own.float() if with_input else total).to(dtype)
    out = torch.empty(5, 64, dtype=dtype)
    inputs = (x, scale, own if with_input else None)
    run(library.fused_op("moe_reduce_allreduce_rms_norm"), inputs, {"allreduce_out": out}, flags=int(flags))
    assert torch.equal(out, wanted)


@dtypes
@pytest.mark.parametrize("flags", [0, Flags.MOE_ROUND_PRODUCT, Flags.MOE_ROUND_SUM | Flags.MOE_ROUND_SCALED])
def test_moe_finalize(dtype: torch.dtype, flags: int) -> None:
    """Gather with -1 skipped, router weights, one scaling, shared expert; a token without experts is its share."""
    x, shared = sample(dtype, 7, 64), sample(dtype, 4, 64)
    index = torch.tensor([[0, 3], [-1, 6], [2, -1], [-1, -1]], dtype=torch.int32)
    op = library.fused_op("moe_finalize_allreduce_rms_norm")
    for scale in (torch.rand(4, 2), torch.rand(4, 2).to(dtype), None):
        wanted = torch.zeros(4, 64)
        for token, k in itertools.product(range(4), range(2)):
            if index[token, k] >= 0:
                product = x[index[token, k]].float() * (1.0 if scale is None else scale[token, k].float())
                wanted[token] += product.to(dtype).float() if flags & Flags.MOE_ROUND_PRODUCT else product
        wanted = wanted.to(dtype).float() if flags & Flags.MOE_ROUND_SUM else wanted
        wanted = wanted * 2.5
        wanted = wanted.to(dtype).float() if flags & Flags.MOE_ROUND_SCALED else wanted
        out = torch.empty(4, 64, dtype=dtype)
        run(op, (x, index, scale, shared, 2.5), {"allreduce_out": out}, flags=int(flags))
        assert torch.equal(out, (wanted + shared.float()).to(dtype))
    empty = torch.empty(4, 64, dtype=dtype)
    run(op, (x[:0], torch.full_like(index, -1), None, shared, 1.0), {"allreduce_out": empty})
    assert torch.equal(empty, shared)


def test_rank_order() -> None:
    """The sum is fp32 and in rank order: an order that cancels late gives another result."""
    parts = torch.tensor([[1e8], [1.0], [-1e8]])
    assert reference.sum_in_rank_order(parts).item() == 0.0
    assert reference.sum_in_rank_order(parts[[0, 2, 1]]).item() == 1.0
    assert reference.sum_in_rank_order(torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()).item() == 258.0
    assert torch.signbit(reference.sum_in_rank_order(torch.full((3, 1), -0.0)))


def test_formats_have_specs() -> None:
    """Every format is in the tests' list."""
    assert {spec.format for spec in SPECS.values()} == set(QuantFormat) - {QuantFormat.NONE}


@dtypes
@pytest.mark.parametrize("row", [True, False], ids=["bias", "rows"])
def test_an_addend_is_rounded_where_the_graph_rounds(dtype: torch.dtype, row: bool) -> None:
    """Exact: ``r + (x + t)``, ``(r + x) + t`` and ``x + t``, each sum in the tensor's dtype, as eager has them."""
    x, residual, weight = sample(dtype, 2, 5, 192), sample(dtype, 10, 192), sample(dtype, 192)
    addend = sample(dtype, 192) if row else sample(dtype, 10, 192)
    flat = x.view(10, 192)
    forms = [
        (residual, 0, residual + (flat + addend)),
        (residual, Flags.ADDEND_LAST, (residual + flat) + addend),
        (None, 0, flat + addend),
    ]
    for given_residual, flags, total in forms:
        given = outputs((10, 192), dtype)
        run(fused, (x,), given, residual=given_residual, weight=weight, flags=int(flags), addend=addend)
        assert torch.equal(given["allreduce_out"], flat)
        assert torch.equal(given["residual_out"], total)
        assert torch.equal(given["norm_out"], torch_norm(total, weight, 1e-6))


@dtypes
@pytest.mark.parametrize("kind", ["number", "element", "rows"])
def test_a_factor_is_rounded_where_the_graph_rounds(dtype: torch.dtype, kind: str) -> None:
    """Exact: ``r + x * f``, with an addend behind or before the product, and ``x * f`` alone, each step in the tensor's
    dtype, as eager has them."""
    x, residual, weight = sample(dtype, 2, 5, 192), sample(dtype, 10, 192), sample(dtype, 192)
    flat, addend = x.view(10, 192), sample(dtype, 10, 192)
    factor: Any = {"number": 0.22, "element": sample(dtype, 1), "rows": sample(dtype, 10, 1)}[kind]
    named = (
        {"factor_value": factor} if kind == "number" else {"factor": factor.view(2, 5, 1) if kind == "rows" else factor}
    )
    forms = [
        (residual, None, 0, residual + flat * factor),
        (residual, addend, 0, residual + (flat * factor + addend)),
        (residual, addend, Flags.ADDEND_LAST, (residual + flat * factor) + addend),
        (residual, addend, Flags.ADDEND_SCALED, residual + (flat + addend) * factor),
        (None, None, 0, flat * factor),
    ]
    for given_residual, given_addend, flags, total in forms:
        given = outputs((10, 192), dtype)
        options = {"residual": given_residual, "addend": given_addend, "flags": int(flags)}
        run(fused, (x,), given, weight=weight, **options, **named)
        assert torch.equal(given["allreduce_out"], flat)
        assert torch.equal(given["residual_out"], total)
        assert torch.equal(given["norm_out"], torch_norm(total, weight, 1e-6))


def test_a_factor_in_fp32() -> None:
    """Beside a 16-bit tensor it is multiplied in fp32, and the product rounded."""
    x, factor = sample(torch.bfloat16, 6, 128), torch.randn(6, 1)
    given = {"residual_out": torch.empty(6, 128).bfloat16()}
    run(fused, (x,), given, factor=factor)
    assert torch.equal(given["residual_out"], (x.float() * factor).bfloat16())


def test_an_addend_beside_an_fp32_residual() -> None:
    """The sum with the addend is rounded, the sum with the fp32 residual is not; an unrounded last sum likewise."""
    x, addend, wide = sample(torch.bfloat16, 6, 128), sample(torch.bfloat16, 128), torch.randn(6, 128)
    low = sample(torch.bfloat16, 6, 128)
    forms = [
        (wide, Flags.UNROUNDED_SUM, (x + addend).float() + wide),
        (low, Flags.UNROUNDED_SUM | Flags.ADDEND_LAST, (x + low).float() + addend.float()),
        (None, Flags.UNROUNDED_SUM, x.float() + addend.float()),
    ]
    for residual, flags, total in forms:
        given = {"residual_out": torch.empty(6, 128), "norm_out": torch.empty(6, 128)}
        run(fused, (x,), given, residual=residual, flags=int(flags), addend=addend)
        assert torch.equal(given["residual_out"], total)
        assert torch.equal(given["norm_out"], torch_norm(total, None, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1e-6, 0.3, -0.1, -1e9, float("nan")])
def test_epsilon_in_a_tensor(dtype: torch.dtype, value: float) -> None:
    """Exact: the bits that eager makes of a 0-dim epsilon of any dtype, negative and NaN ones too."""
    x, weight, epsilon = sample(torch.bfloat16, 6, 128), torch.randn(128), torch.tensor(value, dtype=dtype)
    x32 = x.float()
    wanted = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + epsilon) * weight
    for given in (epsilon, epsilon.view(1)):
        norm_out = torch.empty(6, 128)
        run(fused, (x,), {"norm_out": norm_out}, weight=weight, epsilon_tensor=given)
        assert torch.equal(norm_out.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("rounds", [False, True])
def test_norms_by_division(rounds: bool) -> None:
    """Exact: ``x / sqrt`` and ``x * (1 / sqrt)`` each with eager's own steps, which the others do not have."""
    x, weight = sample(torch.bfloat16, 64, 128), torch.randn(128)
    x32 = x.float()
    root = torch.sqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)
    normalised = {Flags.DIVIDE_BY_ROOT: x32 / root, Flags.RECIPROCAL_ROOT: x32 * (1 / root)}
    assert not torch.equal(*normalised.values())
    for flag, value in normalised.items():
        norm_out = torch.empty(64, 128)
        flags = int(flag | (Flags.ROUND_BEFORE_WEIGHT if rounds else 0))
        run(fused, (x,), {"norm_out": norm_out}, weight=weight, flags=flags)
        assert torch.equal(norm_out, (value.bfloat16() if rounds else value) * weight)
