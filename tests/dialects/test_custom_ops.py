"""How custom ops are read, on hand-made graphs in one process: names, defaults, new arguments, refusals."""

from __future__ import annotations

import operator
import re
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

import arfusion_pass as arf
from arfusion_pass.dialects import vllm
from arfusion_pass.dialects.reading.op_calls import V1, V2, OpCall, op_name
from arfusion_pass.ops.spec import Flags
from tests.dialects import engine_ops
from tests.simulate import captured, check_fused, check_unchanged, fused_copy, tensors, trace

TOKENS, HIDDEN = 6, 64
c10d = torch.ops._c10d_functional

# A later engine's ops: arguments added with defaults, and the names of known ones in another order.
engine_ops.define(
    "arfusion_test::norm",
    "(Tensor x, Tensor? weight, float epsilon, SymInt? variance_size=None, bool fast=False, *, int lanes=4) -> Tensor",
    lambda x, *rest, **kwargs: x.clone(),
    engine_ops.like,
)
engine_ops.define(
    "arfusion_test::write",
    "(Tensor! out, Tensor x, Tensor!? extra, float epsilon=1e-6) -> ()",
    lambda out, x, extra, epsilon=1e-6: None,
)

# A library's own quantiser, read by nobody's table: codes and a scale a row.
engine_ops.define(
    "arfusion_test::quantise",
    "(Tensor x) -> (Tensor, Tensor)",
    lambda x: (x.to(torch.float8_e4m3fn), x.new_ones(x.shape[0], dtype=torch.float32)),
    lambda x: (torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], dtype=torch.float32)),
)


class Builder:
    """A graph with fake values, node by node."""

    def __init__(self) -> None:
        self.graph, self.mode = fx.Graph(), FakeTensorMode()

    def input(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> fx.Node:
        node = self.graph.placeholder(f"arg{len(self.graph.nodes)}")
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def call(self, target: Any, *args: Any, val: Any = None, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        if val is None:
            fake = fx.node.map_arg((args, kwargs), lambda each: each.meta["val"])
            with self.mode:
                val = target(*fake[0], **fake[1])
        node.meta["val"] = val
        return node

    def reduced(self) -> fx.Node:
        x = self.input(TOKENS, HIDDEN)
        return self.call(c10d.wait_tensor.default, self.call(c10d.all_reduce.default, x, "sum", "0"))

    def module(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs)
        return fx.GraphModule(torch.nn.Module(), self.graph)


def test_arguments_by_name_with_dropped_and_new_defaults() -> None:
    """Positional, keyword and left-out arguments read alike; an argument that a table does not know does not matter;
    an unknown name is None."""
    builder = Builder()
    x, weight = builder.input(TOKENS, HIDDEN), builder.input(HIDDEN)
    target = torch.ops.arfusion_test.norm.default
    for node in (
        builder.call(target, x, weight, 1e-5),
        builder.call(target, x, epsilon=1e-5, weight=weight, variance_size=None),
        builder.call(target, x, weight, 1e-5, None, False, lanes=4),
    ):
        call = OpCall(node)
        assert call.name == op_name(node) == "arfusion_test::norm"
        assert (call["x"], call["weight"], call["epsilon"], call["variance_size"]) == (x, weight, 1e-5, None)
        assert (call["lanes"], call["fast"], call["unheard_of"]) == (4, False, None)
        assert call.output(0) is node
        assert call.reads("x", x)
        assert not call.reads("x", weight)


@pytest.mark.parametrize("unheard_of", [{"fast": False}, {"fast": True}])
def test_an_argument_that_no_table_knows(
    world: None, monkeypatch: pytest.MonkeyPatch, unheard_of: dict[str, Any]
) -> None:
    """Contract *sound*: at its default it does not matter; with another value the op is not what the table says."""
    monkeypatch.setitem(vllm.DIALECT.norm_ops, "arfusion_test::norm", vllm.NORMS["vllm_ir::rms_norm"])
    builder = Builder()
    value, weight = builder.reduced(), builder.input(HIDDEN)
    norm = builder.call(torch.ops.arfusion_test.norm.default, value, weight, 1e-6, **unheard_of)
    module = builder.module(norm)
    if not unheard_of["fast"]:
        assert arf.fuse(module).matched_count == 1
        return
    ((name, given),) = unheard_of.items()
    assert f"is given {name}={given}, an argument that is not known here" in str(
        check_unchanged(module).missed[0].reason
    )


@pytest.mark.parametrize("extra", [False, True])
def test_results_of_both_auto_functionalized(extra: bool) -> None:
    """A written argument's result is found by the schema's order in v1 and by its base in v2, also where an optional
    written argument is None; a base that two arguments share is nobody's result."""
    builder = Builder()
    x, out, more = (builder.input(TOKENS, HIDDEN) for _ in range(3))
    target, val = torch.ops.arfusion_test.write.default, (None, out.meta["val"], more.meta["val"])
    v1 = builder.call(V1, target, out=out, x=x, extra=more if extra else None, epsilon=1e-6, val=val)
    bases = [more, out] if extra else [out]
    indices = {"_out_base_index": len(bases) - 1, "_extra_base_index": 0 if extra else None}
    v2 = builder.call(V2, target, x=x, epsilon=1e-6, _all_bases=bases, val=val, **indices)
    for node, first, second in ((v1, 1, 2), (v2, len(bases), 1)):
        read = {
            index: builder.call(operator.getitem, node, index, val=val[1]) for index in [first, second][: 1 + extra]
        }
        call = OpCall(node)
        assert call.output("out") is read[first]
        assert call.output("extra") is (read[second] if extra else None)
        assert call["out"] is out
        assert call["extra"] is (more if extra else None)
        assert call.functionalized
        assert not call.in_place
    shared = builder.call(
        V2, target, x=x, epsilon=1e-6, _all_bases=[out], _out_base_index=0, _extra_base_index=0, val=val
    )
    builder.call(operator.getitem, shared, 1, val=out.meta["val"])
    assert OpCall(shared).output("out") is None


def test_a_view_of_a_part_is_not_the_whole() -> None:
    """Under v2, a written argument that is a slice of its base, or a view at other strides, does not read the base."""
    builder = Builder()
    x, base = builder.input(TOKENS, HIDDEN), builder.input(2 * TOKENS, HIDDEN)
    common: dict[str, Any] = {
        "x": x,
        "epsilon": 1e-6,
        "_extra_base_index": None,
        "_out_base_index": 0,
        "_all_bases": [base],
    }

    def reads(**view: Any) -> bool:
        node = builder.call(V2, torch.ops.arfusion_test.write.default, val=(None, base.meta["val"]), **common, **view)
        return OpCall(node).reads("out", base)

    strided = {"_out_storage_offset": 0}
    assert reads()
    assert reads(_out_size=(2, TOKENS, HIDDEN), _out_stride=(TOKENS * HIDDEN, HIDDEN, 1), **strided)
    assert not reads(_out_slice_dim=0, _out_slice_start=0, _out_slice_end=TOKENS)
    assert not reads(_out_size=(TOKENS, HIDDEN), _out_stride=(HIDDEN, 1), **strided)
    assert not reads(_out_size=(2 * TOKENS, HIDDEN), _out_stride=(1, 2 * TOKENS), **strided)


def _reduce(x: torch.Tensor) -> torch.Tensor:
    return c10d.wait_tensor(c10d.all_reduce(x, "sum", "0"))


@pytest.mark.parametrize("epsilon", [1e-6, None])
@pytest.mark.parametrize("add", [False, True])
def test_aten_norm_as_one_op(world: None, epsilon: float | None, add: bool) -> None:
    """``aten._fused_rms_norm`` and ``aten.rms_norm`` fuse undecomposed, with aten's add in front and without."""

    builder = Builder()
    value, residual, weight = builder.reduced(), builder.input(TOKENS, HIDDEN), builder.input(HIDDEN)
    total = builder.call(torch.ops.aten.add.Tensor, residual, value) if add else value
    rows = builder.mode.from_tensor(torch.empty(TOKENS, 1))
    both = builder.call(
        torch.ops.aten._fused_rms_norm.default, total, [HIDDEN], weight, epsilon, val=(total.meta["val"], rows)
    )
    norm = builder.call(operator.getitem, both, 0, val=total.meta["val"])
    report = arf.fuse(builder.module(norm, total), arf.FusionConfig(raise_errors=True))
    pattern = "AllReduceFusedAddRMSNorm" if add else "AllReduceRMSNorm"
    assert [site.pattern for site in report.fused] == [pattern], str(report)
    expected = torch.finfo(torch.float32).eps if epsilon is None else epsilon
    assert report.fused[0].epsilon == pytest.approx(expected, rel=1e-6)


def test_aten_norm_over_two_dimensions_is_refused(world: None) -> None:
    """A norm over more than the last dimension stays, with a reason that says so."""
    builder = Builder()
    value, weight = builder.reduced(), builder.input(TOKENS, HIDDEN)
    norm = builder.call(torch.ops.aten.rms_norm.default, value, [TOKENS, HIDDEN], weight, 1e-6, val=value.meta["val"])
    report = check_unchanged(builder.module(norm))
    assert "whole last dimension" in str(report.missed[0].reason)


def test_in_place_outside_auto_functionalized_is_refused(world: None) -> None:
    """A norm op that writes to the graph's memory, where no auto_functionalized is around it, stays with advice."""
    engine_ops.register_sglang()
    builder = Builder()
    value, residual, weight = builder.reduced(), builder.input(TOKENS, HIDDEN), builder.input(HIDDEN)
    op = torch.ops.sgl_kernel.fused_add_rmsnorm.default
    builder.call(op, value, residual, weight, 1e-6, False, val=())
    report = check_unchanged(builder.module(value, residual))
    assert "post_grad_custom_post_pass" in str(report.missed[0].reason)


def test_symmetric_memory_by_average_is_refused(world: None) -> None:
    """Another reduce op than the sum stays, and is named."""
    engine_ops.register_vllm()
    builder = Builder()
    x, weight = builder.input(TOKENS, HIDDEN), builder.input(HIDDEN)
    value = builder.call(torch.ops.symm_mem.one_shot_all_reduce.default, x, "avg", "0", val=x.meta["val"])
    norm = builder.call(torch.ops.vllm_ir.rms_norm.default, value, weight, 1e-6)
    report = check_unchanged(builder.module(norm))
    assert "'avg'" in str(report.missed[0].reason)


def test_epsilon_as_a_node(world: None) -> None:
    """An epsilon that is a graph input is no literal: it becomes a tensor, which the fused call reads."""
    engine_ops.register_vllm()
    builder = Builder()
    value, weight = builder.reduced(), builder.input(HIDDEN)
    epsilon = builder.graph.placeholder("epsilon")
    epsilon.meta["val"] = 1e-6
    norm = builder.call(torch.ops.vllm_ir.rms_norm.default, value, weight, epsilon, val=value.meta["val"])
    module = builder.module(norm)
    _, report = fused_copy(module)
    assert report.fused[0].epsilon_input == "epsilon"


@pytest.mark.parametrize(
    ("weight_dtype", "expected"),
    [
        (torch.bfloat16, Flags.UNROUNDED_SUM | Flags.ROUND_BEFORE_WEIGHT),
        (torch.float32, Flags.UNROUNDED_SUM),
        (None, Flags.UNROUNDED_SUM),
    ],
)
def test_rounding_of_vllm_ir(world: None, weight_dtype: torch.dtype | None, expected: Flags) -> None:
    """The IR's norm reads the unrounded sum, and rounds before a weight in the tensor's dtype only."""
    from arfusion_pass.config import FusionConfig
    from arfusion_pass.rewrite.raising import find_sites

    engine_ops.register_vllm()
    builder = Builder()
    value, residual = builder.reduced(), builder.input(TOKENS, HIDDEN)
    weight = None if weight_dtype is None else builder.input(HIDDEN, dtype=weight_dtype)
    both = builder.call(torch.ops.vllm_ir.fused_add_rms_norm.default, value, residual, weight, 1e-6)
    norm = builder.call(operator.getitem, both, 0)
    builder.module(norm)
    (site,) = find_sites(builder.graph, FusionConfig())
    assert site.reason is None
    assert site.norm is not None
    assert site.norm.flags == expected
    assert site.norm.total is None  # nobody reads the sum


def test_a_norm_of_a_sum_of_sums(world: None) -> None:
    """aten's add in front of an op that adds once more is two adds: an addend and a residual."""
    engine_ops.register_vllm()
    builder = Builder()
    value, r, s, weight = builder.reduced(), *(builder.input(TOKENS, HIDDEN) for _ in range(2)), builder.input(HIDDEN)
    total = builder.call(torch.ops.aten.add.Tensor, value, r)
    both = builder.call(torch.ops.vllm_ir.fused_add_rms_norm.default, total, s, weight, 1e-6)
    report = check_fused(builder.module(builder.call(operator.getitem, both, 0)), 1)
    assert report.fused[0].pattern == "AllReduceFusedTwoAddsRMSNorm"


def test_traced_engine_norm_is_exact(world: None) -> None:
    """A functional engine norm behind aten's all-reduce and add gives the same bits fused as unfused."""
    engine_ops.register_vllm()

    def fn(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        norm, total = torch.ops.vllm_ir.fused_add_rms_norm(_reduce(x), r, w, 1e-6)
        last = torch.ops.vllm_ir.rms_norm(_reduce(norm) + total, w.float() + 1.0, 1e-5)
        return last, total

    module = trace(fn, *tensors((TOKENS, HIDDEN), (TOKENS, HIDDEN), (HIDDEN,)))
    report = check_fused(module, 2)
    assert [site.dialect for site in report.fused] == ["functional_collectives+vllm"] * 2


@pytest.mark.parametrize("read", [False, True])
def test_a_factor_in_front_of_an_op(world: None, read: bool) -> None:
    """The op's sum, which nobody reads, is not the product, which somebody may: then the site is left."""
    engine_ops.register_vllm()

    def fn(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        product = _reduce(x) * 0.22
        norm, _ = torch.ops.vllm_ir.fused_add_rms_norm(product, r, w, 1e-6)
        return (norm, product.exp()) if read else norm

    module = trace(fn, *tensors((TOKENS, HIDDEN), (TOKENS, HIDDEN), (HIDDEN,)))
    if read:
        assert "is also read by" in str(check_unchanged(module).missed[0].reason)
    else:
        assert check_fused(module, 1).fused[0].pattern == "AllReduceScaledFusedAddRMSNorm"


@pytest.mark.parametrize("custom", [False, True])
def test_scale_computed_from_the_norm_is_left(world: None, custom: bool) -> None:
    """A static quantiser whose scale is the norm's own maximum needs all tokens first: the norm is fused without it,
    and a note says why."""
    engine_ops.register_vllm()
    engine_ops.register_tensorrt_llm()

    def fn(x: torch.Tensor, w: torch.Tensor) -> Any:
        norm = torch.ops.vllm_ir.rms_norm(torch.ops.vllm.all_reduce(x, "0"), w, 1e-6)
        scale = norm.float().abs().amax() / 448.0
        if custom:
            return torch.ops.tensorrt_llm.static_quantize_e4m3_per_tensor(norm, scale)[0]
        return (norm.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)

    report = check_fused(trace(fn, *tensors((TOKENS, HIDDEN), (HIDDEN,))), 1)
    assert report.fused[0].quantiser is None
    assert re.search("is computed from rms_norm|amax", str(report.fused[0].note))


@pytest.mark.parametrize("viewed", [False, True])
def test_an_unknown_quantiser_is_named(world: None, viewed: bool) -> None:
    """Contract *clear*: codes that an op of a library's own makes of the norm are no silence in the report."""

    def fn(x: torch.Tensor, w: torch.Tensor) -> Any:
        norm = torch.ops.vllm_ir.rms_norm(_reduce(x), w, 1e-6)
        return torch.ops.arfusion_test.quantise(norm.view(-1, HIDDEN // 2) if viewed else norm)

    engine_ops.register_vllm()
    report = check_fused(trace(fn, *tensors((TOKENS, HIDDEN), (HIDDEN,))), 1)
    assert "arfusion_test.quantise.default) gives torch.float8_e4m3fn, as a quantiser does" in str(report.fused[0].note)


def vllm_norm(value: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.ops.vllm_ir.rms_norm(value, w, 1e-6)


def added_to_itself(x: torch.Tensor, w: torch.Tensor) -> Any:
    value = _reduce(x)
    return torch.ops.vllm_ir.fused_add_rms_norm(value, value, w, 1e-6)[0]


def weight_of_rows(x: torch.Tensor, w: torch.Tensor) -> Any:
    return vllm_norm(_reduce(x), w.expand(TOKENS, HIDDEN).contiguous())


def reduced_weight(x: torch.Tensor, w: torch.Tensor) -> Any:
    return vllm_norm(x, _reduce(w))


def sum_alone(x: torch.Tensor, w: torch.Tensor) -> Any:
    return torch.ops.vllm_ir.fused_add_rms_norm(_reduce(x), x, w, 1e-6)[1]


def residual_in_part(x: torch.Tensor, w: torch.Tensor) -> Any:
    """vLLM's kernel writes the sum into a part of a larger buffer."""
    value, buffer = _reduce(x), torch.cat([x, x])
    torch.ops._C.fused_add_rms_norm(value, buffer[:TOKENS], w, 1e-6)
    return value, buffer


def scale_a_column(x: torch.Tensor, w: torch.Tensor) -> Any:
    codes = torch.empty(TOKENS, HIDDEN, dtype=torch.float8_e4m3fn)
    torch.ops._C.rms_norm_static_fp8_quant(codes, _reduce(x), w, torch.ones(HIDDEN), 1e-6)
    return codes


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (added_to_itself, "adds .* to itself$"),
        (weight_of_rows, r"is no \[hidden\] vector"),
        (reduced_weight, "and not as the rows that it normalises"),
        (sum_alone, "nobody reads the norm of"),
        (residual_in_part, "is a part of"),
        (scale_a_column, "has no scale of one element"),
    ],
)
def test_a_norm_that_no_kernel_is(world: None, fn: Any, words: str) -> None:
    """Contract *sound*: an engine's norm op, called as the engine may call it, and as the fused op cannot be."""
    engine_ops.register_vllm()
    module = captured(fn, [torch.randn(TOKENS, HIDDEN).bfloat16(), torch.ones(HIDDEN).bfloat16()])
    assert re.search(words, str(check_unchanged(module).missed[0].reason))


def _quantised(op: Any, *rest: Any, codes: torch.dtype = torch.float8_e4m3fn, more: int = 0) -> Any:
    """A quantiser that writes its codes behind a norm."""

    def fn(x: torch.Tensor, w: torch.Tensor) -> Any:
        norm = vllm_norm(_reduce(x), w)
        out = torch.empty(TOKENS + more, HIDDEN, dtype=codes)
        op(out, norm, *(each.clone() if isinstance(each, torch.Tensor) else each for each in rest))
        return out, norm

    return fn


def scales_alone(x: torch.Tensor, w: torch.Tensor) -> Any:
    norm, scales = vllm_norm(_reduce(x), w), torch.empty(TOKENS, 1)
    codes = torch.empty(TOKENS, HIDDEN, dtype=torch.float8_e4m3fn)
    torch.ops._C.dynamic_per_token_scaled_fp8_quant(codes, norm, scales, None)
    return norm, scales


def norm_as_scale(x: torch.Tensor, w: torch.Tensor) -> Any:
    norm = vllm_norm(_reduce(x), w)
    return norm, torch.ops.vllm_ir.static_quant_fp8(x, norm, torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("case", "note"),
    [
        ("padded codes", "has another number of rows than"),
        ("AMD's codes", "holds torch.float8_e4m3fnuz, no codes of FP8"),
        ("a scale of many", "has no scale of one element"),
        ("a scale of 16 bits", "is torch.bfloat16, expected float32"),
        ("scales alone", "nobody reads the codes of"),
        ("norm as scale", "and not as what it quantises"),
    ],
)
def test_a_quantiser_that_no_kernel_is(world: None, case: str, note: str) -> None:
    """Contract *sound*, and *clear*: the norm is fused, the quantiser stays, and the report says why."""
    engine_ops.register_vllm()
    static = torch.ops._C.static_scaled_fp8_quant
    fn = {
        "padded codes": _quantised(static, torch.ones(1), None, more=2),
        "AMD's codes": _quantised(static, torch.ones(1), None, codes=torch.float8_e4m3fnuz),
        "a scale of many": _quantised(static, torch.ones(HIDDEN), None),
        "a scale of 16 bits": _quantised(static, torch.ones(1).bfloat16(), None),
        "scales alone": scales_alone,
        "norm as scale": norm_as_scale,
    }[case]
    module = captured(fn, [torch.randn(TOKENS, HIDDEN).bfloat16(), torch.ones(HIDDEN).bfloat16()])
    _, report = fused_copy(module)
    assert [site.pattern for site in report.sites] == ["AllReduceRMSNorm"], str(report)
    assert note in str(report.fused[0].note)


def test_what_a_quantising_norm_adds_to_is_either_operand(world: None) -> None:
    """As with a norm that does not quantise, the reduced tensor may stand where the residual does."""
    engine_ops.register_vllm()

    def fn(x: torch.Tensor, w: torch.Tensor) -> Any:
        value, codes = _reduce(x), torch.empty(TOKENS, HIDDEN, dtype=torch.float8_e4m3fn)
        torch.ops._C.fused_add_rms_norm_static_fp8_quant(codes, x, value, w, torch.ones(1), 1e-6)
        return codes, value

    module = captured(fn, [torch.randn(TOKENS, HIDDEN).bfloat16(), torch.ones(HIDDEN).bfloat16()])
    report = check_fused(module, 1)
    assert report.fused[0].pattern == "AllReduceFusedAddRMSNormStaticQuantFP8"


def test_a_quantiser_in_place_outside_auto_functionalized(world: None) -> None:
    engine_ops.register_sglang()
    engine_ops.register_vllm()
    builder = Builder()
    value, weight, scale = builder.reduced(), builder.input(HIDDEN), builder.input(1, dtype=torch.float32)
    codes = builder.input(TOKENS, HIDDEN, dtype=torch.float8_e4m3fn)
    norm = builder.call(torch.ops.vllm_ir.rms_norm.default, value, weight, 1e-6)
    builder.call(torch.ops.sgl_kernel.sgl_per_tensor_quant_fp8.default, norm, codes, scale, True, val=())
    _, report = fused_copy(builder.module(codes))
    assert report.fused[0].quantiser is None
    assert "writes in place, outside auto_functionalized" in str(report.fused[0].note)


def test_rounding_of_vllm_kernels_by_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """``_C``'s norms with a mandatory weight (vLLM 0.19 and before) round before it; with an optional one they do not,
    nor do the quantising norms of a library whose plain norm takes an optional one."""
    from arfusion_pass.dialects import vllm

    builder = Builder()
    x, weight = builder.input(TOKENS, HIDDEN), builder.input(HIDDEN)
    schema = "(Tensor x, {} weight, float epsilon) -> Tensor"
    for name, kind in (("old_norm", "Tensor"), ("new_norm", "Tensor?")):
        engine_ops.define(f"arfusion_test::{name}", schema.format(kind), engine_ops.like, engine_ops.like)
    old, new = (
        OpCall(builder.call(getattr(torch.ops.arfusion_test, name).default, x, weight, 1e-6))
        for name in ("old_norm", "new_norm")
    )

    def flags(call: OpCall) -> Flags:
        return vllm._kernel_flags(call, torch.bfloat16, torch.bfloat16, True)

    monkeypatch.setattr(vllm, "_weight_in_fp32", lambda: False)
    assert (flags(old), flags(new)) == (Flags.ROUND_BEFORE_WEIGHT, Flags.NONE)
    monkeypatch.setattr(vllm, "_weight_in_fp32", lambda: True)
    assert flags(old) == Flags.NONE
