"""Plain torch's quantisers on real graphs and real ranks: what is recognised, with which spec, and to which bits.

Every case is compiled by torch.compile on two gloo ranks up to Inductor's post-grad passes (:mod:`tests.post_grad`),
run, and replayed against its subgraph. All of them share one start of the ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
import traceback
from typing import Any

import pytest
import torch

from tests import quant_cases as q
from tests.helpers import run_ranks
from tests.quant_cases import Case, site

FOLDS_CASTS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)
"""torch 2.11 drops a cast to bf16 and back."""

STATIC = {"format": 1}
TOKEN = {"format": 1, "group": -1}
GROUP = {"format": 1, "group": 128}
INT8 = {"format": 2, "group": -1}
AMAX, SCALE = 1, 2
MULTIPLY, RECIPROCAL_RULE = 1, 2
TENSOR, POW2_LOG2 = 1, 3
RECIPROCAL, APPLY_MULTIPLY, MAX_OVER_AMAX = 1, 2, 3
COLUMN, COLUMN_TMA = 1, 2

STATIC_NAME, TOKEN_NAME = "FusedAddRMSNormStaticQuantFP8", "FusedAddRMSNormTokenQuantFP8"
GROUP_NAME, INT8_NAME = "FusedAddRMSNormGroupQuantFP8", "FusedAddRMSNormTokenQuantINT8"

CASES: dict[str, Case] = {}


def add(name: str, *args: Any, **kwargs: Any) -> None:
    assert name not in CASES
    CASES[name] = Case(*args, **kwargs)


# Given scales: every spelling, every shape of the scale.
for function, spec in (
    (q.static_div, {}),
    (q.static_div_f32, {}),
    (q.static_reciprocal, {"apply": RECIPROCAL}),
    (q.static_encode, {"apply": APPLY_MULTIPLY}),
    (q.static_max_first, {}),
    (q.static_no_clamp, {"clamp": False}),
):
    add(function.__name__, site(function), STATIC_NAME, STATIC | spec, "residual quant", scale=[0.37])
add("static_scale_0d", site(q.static_div), STATIC_NAME, STATIC | {"in_dtype": True}, "residual quant")
add("static_scale_0d_f32", site(q.static_div_f32), STATIC_NAME, STATIC, "residual quant")
add("static_scale_1_1", site(q.static_div), STATIC_NAME, STATIC, "residual quant", scale=[[0.37]])
add("static_detour", site(q.static_detour), STATIC_NAME, STATIC | {"in_dtype": True}, "residual quant")
add("static_number", site(q.static_number), STATIC_NAME, STATIC | {"in_dtype": True}, "residual quant")
add("static_number_mul", site(q.static_number_mul), STATIC_NAME, STATIC | {"apply": APPLY_MULTIPLY}, "residual quant")
add("static_expanded", site(q.static_expanded), STATIC_NAME, STATIC, "residual quant", scale=[0.37])
UNSCALED = STATIC | {"apply": APPLY_MULTIPLY}
add("static_unscaled", site(q.static_unscaled), STATIC_NAME, UNSCALED | {"clamp": False}, "residual quant")
add("static_clamped_alone", site(q.static_clamped_alone), STATIC_NAME, UNSCALED | {"in_dtype": True}, "residual quant")
add("static_scale_3", site(q.static_div), "FusedAddRMSNorm", None, "residual norm", scale=[0.37] * q.HIDDEN)

# One scale a token.
ON_AMAX = {"bound_on": AMAX, "bound": 1e-12}
ON_SCALE = {"bound_on": SCALE, "bound": 1.0 / (448.0 * 512.0)}
add("token", site(q.token), TOKEN_NAME, TOKEN | ON_AMAX)
add("token_vllm", site(q.token_vllm), TOKEN_NAME, TOKEN | ON_SCALE | {"apply": RECIPROCAL})
add("token_torchao", site(q.token_torchao), TOKEN_NAME, TOKEN | {"scale_round": TENSOR})
add("token_expanded", site(q.token_expanded), TOKEN_NAME, TOKEN | ON_AMAX)
add("token_squeezed", site(q.token_squeezed), TOKEN_NAME, TOKEN | ON_AMAX)
add("token_ends", site(q.token_ends), TOKEN_NAME, TOKEN | ON_AMAX)
add("token_aminmax", site(q.token_aminmax), TOKEN_NAME, TOKEN | ON_AMAX)
add("token_bounded_twice", site(q.token_bounded_twice), TOKEN_NAME, TOKEN | {"bound_on": AMAX, "bound": 1e-4})
add("token_bounded_more", site(q.token_bounded_more), TOKEN_NAME, TOKEN | {"bound_on": SCALE, "bound": 1e-3})
add("token_max_with_index", site(q.token_max_with_index), TOKEN_NAME, TOKEN | ON_SCALE | {"apply": RECIPROCAL})
LOW_BOUND = float(torch.tensor(1e-4).bfloat16())
LOW = {"scale_round": TENSOR, "in_dtype": True, "bound_on": AMAX, "bound": LOW_BOUND}
add("token_low", site(q.token_low), TOKEN_NAME, TOKEN | LOW)
NARROW = {"scale_round": TENSOR, "clamp": False}
add("low_scales", site(q.low_scales), TOKEN_NAME, TOKEN | NARROW | {"in_dtype": True})
add("low_scales_dynamic", site(q.low_scales), TOKEN_NAME, TOKEN | NARROW | {"in_dtype": True}, dynamic=True)
add("low_and_wide_scales", site(q.low_and_wide_scales), TOKEN_NAME, TOKEN | NARROW)
add("int8_token", site(q.int8_token), INT8_NAME, INT8 | {"bound_on": AMAX, "bound": 1e-5})
add("int8_symmetric", site(q.int8_symmetric), INT8_NAME, INT8 | {"bound_on": AMAX, "bound": 1e-5})
add("int8_unclamped", site(q.int8_unclamped), INT8_NAME, INT8 | {"bound_on": AMAX, "bound": 1e-5, "apply": RECIPROCAL})
add("int8_token_low", site(q.int8_token_low), INT8_NAME, INT8 | {"apply": RECIPROCAL})

# One scale a group: spellings, sizes, layouts, powers of two.
GROUP_AMAX = {"bound_on": AMAX, "bound": 1e-10}
DEEPSEEK = {"bound_on": AMAX, "bound": 1e-4, "apply": MAX_OVER_AMAX, "clamp": False}
POWER = GROUP | {"bound_on": AMAX, "bound": 1e-4}
for function, spec in (
    (q.group, GROUP | GROUP_AMAX),
    (q.group_64, GROUP | GROUP_AMAX | {"group": 64}),
    (q.group_32, GROUP | GROUP_AMAX | {"group": 32}),
    (q.group_minus_one, GROUP | DEEPSEEK),
    (q.group_vllm, GROUP | ON_SCALE),
    (q.group_flat, GROUP | GROUP_AMAX),
    (q.group_repeated, GROUP | GROUP_AMAX),
    (q.low_scales_of_groups, GROUP | NARROW | {"in_dtype": True}),
    (q.low_scales_in_columns, GROUP | NARROW | {"in_dtype": True}),
    (q.group_as_is, GROUP | GROUP_AMAX),
    (q.group_column, GROUP | GROUP_AMAX | {"layout": COLUMN}),
    (q.group_transposed, GROUP | GROUP_AMAX | {"layout": COLUMN}),
    (q.group_column_empty, GROUP | GROUP_AMAX | {"layout": COLUMN}),
    (q.group_tma, GROUP | GROUP_AMAX | {"layout": COLUMN_TMA}),
    (q.group_tma_strided, GROUP | GROUP_AMAX | {"layout": COLUMN_TMA}),
    (q.group_tma_deepgemm, GROUP | GROUP_AMAX | {"layout": COLUMN_TMA}),
    (q.group_pow2_log2, POWER | {"scale_round": POW2_LOG2}),
    (q.group_pow2_pow, POWER | {"scale_round": POW2_LOG2}),
):
    add(function.__name__, site(function), GROUP_NAME, spec)
add("group_column_4_tokens", site(q.group_column), GROUP_NAME, GROUP | GROUP_AMAX | {"layout": COLUMN}, shape=(4, 512))
add("group_column_1_token", site(q.group_column), GROUP_NAME, GROUP | GROUP_AMAX, shape=(1, 512))

# Every quantiser behind every norm, with a sum that is read, that is dead, and without one.
FOLDED = {"token": "folds", "static_div_f32": "folds", "int8_token": "folds", "group_minus_one": None}
for (function, label, spec), (norm, residual) in itertools.product(
    (
        (q.static_div_f32, "StaticQuantFP8", STATIC),
        (q.token, "TokenQuantFP8", TOKEN | ON_AMAX),
        (q.group_minus_one, "GroupQuantFP8", GROUP | DEEPSEEK),
        (q.int8_token, "TokenQuantINT8", INT8 | {"bound_on": AMAX, "bound": 1e-5}),
    ),
    ((q.gemma, "dead"), (q.gemma, "none"), (q.torch_norm, "add")),
):
    written = "quant" if function is q.static_div_f32 else "quant scale"
    before = {"add": "residual ", "dead": "", "none": "allreduce "}[residual]
    add(
        f"{function.__name__}_{norm.__name__}_{residual}",
        site(function, norm, residual),
        ("" if residual == "none" else "FusedAdd") + ("Gemma" if norm is q.gemma else "") + "RMSNorm" + label,
        spec,
        before + written,
        scale=[0.37],
        folds=FOLDED[function.__name__] is not None,
        exact=norm is not q.torch_norm,
    )

# Other dtypes: fp16, fp32, an fp32 weight whose norm stays fp32.
add("token_fp16", site(q.token), TOKEN_NAME, TOKEN | ON_AMAX, dtype=torch.float16)
add("token_fp32", site(q.token), TOKEN_NAME, TOKEN | ON_AMAX, dtype=torch.float32)
add("group_fp32", site(q.group_vllm), GROUP_NAME, GROUP | ON_SCALE, dtype=torch.float32)
add("token_fp32_weight", site(q.token), TOKEN_NAME, TOKEN | ON_AMAX | {"unrounded": True}, weight=torch.float32)

# Symbolic token counts, tokens in two dimensions.
add("token_dynamic", site(q.token), TOKEN_NAME, TOKEN | ON_AMAX, dynamic=True)
add("group_dynamic", site(q.group_minus_one), GROUP_NAME, GROUP | DEEPSEEK, dynamic=True)
add("group_flat_dynamic", site(q.group_flat), GROUP_NAME, GROUP | GROUP_AMAX, dynamic=True)
add("group_column_dynamic", site(q.group_column), GROUP_NAME, GROUP | GROUP_AMAX | {"layout": COLUMN}, dynamic=True)
TMA = GROUP | GROUP_AMAX | {"layout": COLUMN_TMA}
add("group_tma_dynamic", site(q.group_tma_strided), GROUP_NAME, TMA, dynamic=True, counts=(9, 7))  # torch guards on 4
add("three_dimensional_token", q.three_dimensional_token, TOKEN_NAME, TOKEN | ON_AMAX, "quant scale", shape=(2, 3, 256))
ROWS = {"layout": COLUMN, **GROUP, **GROUP_AMAX}
add("three_dimensional", q.three_dimensional, GROUP_NAME, ROWS, "quant scale", shape=(2, 3, 256))

# Fan-out.
add("with_router", q.with_router, STATIC_NAME, STATIC, "residual norm quant", scale=[0.37])
add("with_output", q.with_output, "FusedAddGemmaRMSNormTokenQuantFP8", TOKEN | ON_AMAX, "residual norm quant scale")
add("with_indexer", q.with_indexer, GROUP_NAME + "WithIndexer", GROUP | GROUP_AMAX, "residual norm quant scale")
add("with_other_reader", q.with_other_reader, GROUP_NAME, GROUP | GROUP_AMAX, "residual norm quant scale")
add("two_scales", q.two_scales, STATIC_NAME, STATIC, "norm quant", scale=[0.37])
add("static_and_token", q.static_and_token, STATIC_NAME, STATIC, "norm quant", scale=[0.37])
add("twins_static", q.twins_static, STATIC_NAME, STATIC, "quant", scale=[0.37])
add("twins_token", q.twins_token, TOKEN_NAME, TOKEN | ON_AMAX, "quant scale")
add("twins_returned", q.twins_returned, TOKEN_NAME, TOKEN | ON_AMAX, "norm quant scale")
add("scale_alone", q.scale_alone, GROUP_NAME, GROUP | GROUP_AMAX, "quant scale")

# Left alone: the norm is fused, and the report says what stood in the way.
for function, note in (
    (q.tensor_dynamic, "one scale for all tokens"),
    (q.token_added, "add"),
    (q.token_240, "div"),
    (q.token_upper, "clamp_max"),
    (q.group_96, "has a scale for each 16 elements"),
    (q.int8_static, "to INT8 by a scale that is given"),
    (q.int8_group, "has a scale for each 128 elements; the kernels have one for each token"),
    (q.int8_tensor, "one scale for all tokens"),
    (q.group_of_columns, "amax"),
    (q.group_other_scale, "rev"),
    (q.int8_torchao, "neg"),
    (q.token_compressed, "where"),
    (q.token_highest, None),
    (q.token_lowest, "clamp_min"),
    (q.int8_truncated, "convert_element_type"),
    (q.int8_symmetric_unbounded, "clamps to -127 below and 127 above"),
    (q.group_pow2_mask, "by its bits"),
    (q.group_pow2_bits, "by its bits"),
):
    add(function.__name__, site(function), "FusedAddRMSNorm", None, "residual norm", note=note)
add("inside_read", q.inside_read, "FusedAddRMSNorm", None, "norm", note="a value inside the quantiser")

TWINS = ("twins_token", "twins_static")
COPIES = ("group_column", "group_transposed", "group_column_empty", "group_tma", "group_tma_strided")


@dataclasses.dataclass
class Outcome:
    """What became of a case on one rank."""

    pattern: str | None
    reason: str | None
    note: str | None
    outputs: tuple[str, ...]
    spec: dict[str, Any]
    checks: list[tuple[bool, str]]
    geometry: list[tuple[Any, Any]]
    codes: list[torch.Tensor]
    differ: list[int]
    shared: int
    after: str


def flat(value: Any) -> list[torch.Tensor]:
    """The tensors of nested tuples."""
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in flat(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Dtype, shape and strides."""
    return tensor.dtype, tuple(tensor.shape), tensor.stride()


def run_case(case: Case, rank: int) -> Outcome:
    """Compile, run, replay, and compare with eager. With two ranks a sum in fp32 and one in bf16 are the same."""
    import arfusion_pass as arf
    from arfusion_pass.inspection import replay
    from arfusion_pass.ops.spec import QuantSpec
    from tests.post_grad import compiled

    torch._dynamo.reset()
    fusion = arf.AllReduceFusionPass(arf.FusionConfig(raise_errors=True))
    model = q.reduced(case.model)
    args = q.inputs(case, rank)
    got, wanted = [], []
    with replay.recording() as recorder:
        fn = compiled(model, fusion)
        if case.dynamic:
            for tensor in args[:2]:
                torch._dynamo.mark_dynamic(tensor, 0)
        got += flat(fn(*args))
        wanted += flat(model(*args))
        if case.dynamic:  # other counts in the same graph
            for count in case.counts:
                more = q.inputs(dataclasses.replace(case, shape=(count, *case.shape[1:])), rank)
                got += flat(fn(*more))
                wanted += flat(model(*more))
    assert len(recorder.reports) == 1, "compiled again"
    (found,) = recorder.reports[0].sites
    checks = [(check.ok, check.detail) for check in recorder.checks()]
    call = recorder.sites[0].calls[0].arguments
    spec = QuantSpec.unpack(call["quant"], call["quant_bound"])
    after = recorder.reports[0].after
    assert after is not None
    return Outcome(
        pattern=found.pattern,
        reason=found.reason,
        note=found.note,
        outputs=found.outputs,
        spec=dataclasses.asdict(spec),
        checks=checks,
        geometry=[(geometry(a), geometry(b)) for a, b in zip(got, wanted, strict=True)],
        codes=[tensor.contiguous() for tensor in got],
        differ=[replay.compare(a, b).mismatched for a, b in zip(got, wanted, strict=True)],
        shared=len(got) - len({tensor.untyped_storage().data_ptr() for tensor in got}),
        after=after,
    )


def run_all(rank: int, world: int, names: list[str]) -> dict[str, Outcome | str]:
    """Every case's outcome, or its traceback: one that fails leaves the others their results."""
    results: dict[str, Outcome | str] = {}
    for name in names:
        try:
            results[name] = run_case(CASES[name], rank)
        except Exception:
            results[name] = traceback.format_exc()
    return results


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> list[dict[str, Outcome]]:
    """Every selected case on both ranks."""
    items = [item for item in request.session.items if "outcomes" in getattr(item, "fixturenames", ())]
    chosen = {item.callspec.params["name"] for item in items if hasattr(item, "callspec")}
    return run_ranks(2, run_all, sorted(chosen | {*TWINS, *COPIES}), timeout=900)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, outcomes: list[dict[str, Outcome]]) -> None:
    """The site is fused under the expected pattern and spec, replays within the contract on both ranks, and its
    outputs have the eager model's dtypes, shapes, strides and (where eager runs the graph's own ops) bits."""
    case = CASES[name]
    one, other = (rank[name] for rank in outcomes)
    assert isinstance(one, Outcome), one
    assert isinstance(other, Outcome), other
    assert one.pattern == "AllReduce" + case.pattern, one.reason or one.note
    assert {o.removesuffix("_out") for o in one.outputs} == set(case.outputs.split()), one.outputs
    if case.spec is not None:
        folded = {"unrounded": True} if case.folds and FOLDS_CASTS else {}
        assert spec_of(case.spec | folded) == one.spec
        assert one.note is None
    elif case.note is not None:
        assert one.note is not None
        assert case.note in one.note
    for outcome in (one, other):
        assert all(ok for ok, _ in outcome.checks), outcome.checks
        assert len(outcome.checks) == (3 if case.dynamic else 1)
        assert all(got == wanted for got, wanted in outcome.geometry), outcome.geometry
        assert outcome.shared == 0  # no model returns one tensor's memory twice
        if case.exact and not (case.folds and FOLDS_CASTS):
            assert outcome.differ == [0] * len(outcome.differ)
    assert "_c10d_functional" not in one.after
    for mine, its in zip(one.codes, other.codes, strict=True):
        assert torch.equal(mine.reshape(-1).view(torch.uint8), its.reshape(-1).view(torch.uint8)), "the ranks differ"


def spec_of(fields: dict[str, Any]) -> dict[str, Any]:
    """A spec's fields, the defaults filled in."""
    from arfusion_pass.ops.spec import QuantSpec

    return dataclasses.asdict(QuantSpec(**fields))


def test_twins_are_one(outcomes: list[dict[str, Outcome]]) -> None:
    """Three quantisers that compute the same thing leave one call, no amax and no division."""
    for name in TWINS:
        after = outcomes[0][name].after
        assert after.count("arfusion.allreduce_rms_norm") == 1
        assert "aten.div" not in after
        assert "aten.amax" not in after


def test_copies_of_scales_go(outcomes: list[dict[str, Outcome]]) -> None:
    """Where the kernel writes the scales column-major, nothing copies or pads them any more."""
    for name in COPIES:
        after = outcomes[0][name].after
        assert "clone" not in after
        assert "copy" not in after
        assert "pad" not in after
