"""Graphs in which nothing may fuse: they stay node for node as they were, and each all-reduce says why."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import arfusion_pass as arf
from arfusion_pass import fusion_pass
from arfusion_pass.dialects import DIALECTS
from arfusion_pass.inspection.replay import recording
from arfusion_pass.ops.marks import without_mark
from arfusion_pass.ops.spec import Flags
from arfusion_pass.rewrite import raising
from arfusion_pass.rewrite.buffers import Buffer
from arfusion_pass.rewrite.edits import Edits
from tests import mutants
from tests.models import Tensor, llama, reduce, weightless
from tests.simulate import (
    STRICT,
    aten,
    c10d,
    check_fused,
    check_same,
    check_unchanged,
    copied,
    fused_copy,
    symbolic,
    tensors,
    trace,
)

HIDDEN = 32
X, W = (4, HIDDEN), (HIDDEN,)
EPS = 1e-6

pytestmark = pytest.mark.usefixtures("world")


def mean_over_tokens(x: Tensor, w: Tensor) -> Tensor:
    h = reduce(x).float()
    return (h * torch.rsqrt(h.pow(2).mean(0, keepdim=True) + EPS) * w).to(x.dtype)


def mean_over_everything(x: Tensor, w: Tensor) -> Tensor:
    h = reduce(x).float()
    return (h * torch.rsqrt(h.pow(2).mean((0, 1), keepdim=True) + EPS) * w).to(x.dtype)


def part_of_the_hidden_size(x: Tensor, w: Tensor) -> Tensor:
    h = reduce(x).float()
    return (h * torch.rsqrt(h[:, : HIDDEN // 2].pow(2).mean(-1, keepdim=True) + EPS) * w).to(x.dtype)


def norm_of_heads(x: Tensor, w: Tensor) -> Tensor:
    return llama(reduce(x).view(4, 4, HIDDEN // 4), w[: HIDDEN // 4], EPS).view(4, HIDDEN)


def average(x: Tensor, w: Tensor) -> Tensor:
    return llama(reduce(x, op="avg"), w, EPS)


def maximum(x: Tensor, w: Tensor) -> Tensor:
    return llama(reduce(x, op="max"), w, EPS)


def interior_value_read(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = reduce(x).float()
    root = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * root * w).to(x.dtype), root


def matmul(x: Tensor, w: Tensor) -> Tensor:
    return reduce(x) @ w.expand(4, HIDDEN).t()


def layer_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(reduce(x), (HIDDEN,), w)


def read_before_the_wait(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    pending = c10d.all_reduce(x, "sum", "0")
    early = pending + 1
    return llama(c10d.wait_tensor(pending), w, EPS), early


def double(x: Tensor, w: Tensor) -> Tensor:
    return llama(reduce(x.double()), w.double(), EPS)


def integers(x: Tensor, w: Tensor) -> Tensor:
    return weightless(reduce(x.int()), None, EPS)


def broadcast_residual(x: Tensor, w: Tensor) -> Tensor:
    return llama(reduce(x) + x.amax(-1, keepdim=True), w, EPS)


def broadcast_all_reduce(x: Tensor, w: Tensor) -> Tensor:
    return llama(reduce(w) + x, w, EPS)


def scaled(x: Tensor, w: Tensor) -> Tensor:
    return llama(x + reduce(x) / 3, w, EPS)


def divided(x: Tensor, w: Tensor) -> Tensor:
    return llama(x / reduce(x), w, EPS)


def scaled_residual(x: Tensor, w: Tensor) -> Tensor:
    return llama(torch.add(x, reduce(x), alpha=2), w, EPS)


def other_weight_dtype(x: Tensor, w: Tensor) -> Tensor:
    return llama(reduce(x), w.half(), EPS)


def weight_per_token(x: Tensor, w: Tensor) -> Tensor:
    h = reduce(x).float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * w[:4].view(4, 1) + w


def other_root(x: Tensor, w: Tensor) -> Tensor:
    y, z = reduce(x), x * 2
    return (z.float() * torch.rsqrt(y.float().pow(2).mean(-1, keepdim=True) + EPS) * w).to(x.dtype)


def cube(x: Tensor, w: Tensor) -> Tensor:
    h = reduce(x).float()
    return (h * torch.rsqrt(h.pow(3).mean(-1, keepdim=True) + EPS) * w).to(x.dtype)


def cropped(x: Tensor, w: Tensor) -> Tensor:
    return llama(reduce(x)[:2], w, EPS)


def one_of_two_pieces(x: Tensor, w: Tensor) -> Tensor:
    return llama(reduce(x).split(2)[0], w, EPS)


def row_of_the_sum(x: Tensor, w: Tensor) -> Tensor:
    return llama((x + reduce(x)).unbind()[1], w, EPS)


def pair(x: Tensor, w: Tensor) -> Tensor:
    value, _ = reduce(x).view(2, 2, HIDDEN).max(0)
    return llama(value, w, EPS)


def transposed(x: Tensor, w: Tensor) -> Tensor:
    return llama(reduce(x.expand(4, HIDDEN)).t().reshape(4, HIDDEN), w, EPS)


def added_to_a_product(x: Tensor, w: Tensor) -> Tensor:
    """Cohere 2 MoE: an expert that is not reduced, in one op with the sum; what follows is still this layer's."""
    return F.layer_norm(torch.addmm(reduce(x), x @ x.t(), x), (HIDDEN,), w)


def post_norm(x: Tensor, w: Tensor) -> Tensor:
    """OLMo 2: an embedding that nobody normalises, to which normalised values are added."""
    h = reduce(x)
    for _ in range(2):
        h = h + llama((h @ w[:, None]) * w, w, EPS)
    return llama(h, w, EPS)


def dropped(x: Tensor, w: Tensor) -> Tensor:
    reduce(x)
    return w * 2


CASES: dict[Callable[..., Any], str] = {
    mean_over_tokens: "mean over dimensions [0]",
    mean_over_everything: "mean over dimensions [0, 1]",
    part_of_the_hidden_size: "rsqrt (aten.rsqrt.default) belongs to no known RMSNorm",
    norm_of_heads: f"normalises rows of {HIDDEN // 4}",
    average: "reduces by 'avg'",
    maximum: "reduces by 'max'",
    interior_value_read: "rsqrt (aten.rsqrt.default), a value inside the RMSNorm, is also read by the graph's output",
    matmul: "aten.mm",
    layer_norm: "(aten.var_mean.correction) belongs to a LayerNorm",
    read_before_the_wait: "before it is waited for",
    double: "torch.float64",
    integers: "torch.int32",
    broadcast_residual: "(aten.add.Tensor) stands between it and the norm",
    scaled: "stands between it and the norm mul_1 (aten.mul.Tensor); FusionConfig(reassociate=True) takes that before",
    divided: "(aten.div.Tensor) stands between it and the norm mul_1 (aten.mul.Tensor)",
    broadcast_all_reduce: "aten.add.Tensor",
    scaled_residual: "aten.add.Tensor",
    other_root: "belongs to no known RMSNorm",
    cube: "belongs to no known RMSNorm",
    cropped: "aten.slice.Tensor",
    one_of_two_pieces: "split (aten.split.Tensor) stands between it and the norm",
    row_of_the_sum: "unbind (aten.unbind.int) stands between it and the norm",
    pair: "max_1 (aten.max.dim) stands between it and the norm",
    transposed: "aten.permute.default",
    added_to_a_product: "(aten.var_mean.correction) belongs to a LayerNorm",
    post_norm: "(aten.add.Tensor) is the first of 2 sums between it and the nearest norm",
    dropped: "nobody reads",
}


@pytest.mark.parametrize("model", CASES, ids=lambda model: model.__name__)
def test_unchanged(model: Callable[..., Any]) -> None:
    """Contract *sound*: not a node changes, and the reason names what stood in the way."""
    report = check_unchanged(trace(model, *tensors(X, W)))
    assert len(report.missed) == 1
    assert CASES[model] in report.missed[0].reason


@pytest.mark.parametrize("model", [weight_per_token, other_weight_dtype], ids=lambda model: model.__name__)
def test_weight_left_outside(model: Callable[..., Any]) -> None:
    """A factor that the op cannot take as its weight is multiplied outside of the fused call."""
    check_fused(trace(model, *tensors(X, W)), 1)


@pytest.mark.parametrize("reassociate", [False, True])
def test_tensor_without_dimensions(reassociate: bool) -> None:
    """Torch takes dimension -1 of a tensor that has none: such a sum hinders nobody else's site."""

    def model(s: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        one = reduce(s)
        wide = aten.sum.dim_IntList(one, [0]).float()
        root = torch.rsqrt(aten.mean.dim(wide.pow(2), [-1], True) + EPS)
        return wide * root, aten.mean.dim(one.float().pow(2), [-1]), one.transpose(-1, 0), llama(reduce(x), w, EPS)

    module = trace(model, *tensors((), (4, 32), (32,)))
    fused, report = fused_copy(module, arf.FusionConfig(raise_errors=True, reassociate=reassociate))
    assert report.matched_count == 1
    assert report.missed[0].reason
    check_same(module, fused)


def test_sequence_parallelism() -> None:
    """``reduce_scatter`` and ``all_gather`` are no all-reduce: a site of another kind, which can be switched off."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        part = c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", 2, "0"))
        return c10d.wait_tensor(c10d.all_gather_into_tensor(llama(part, w, EPS), 2, "0"))

    off = dataclasses.replace(STRICT, sequence_parallel=False)
    (site,) = check_unchanged(trace(model, *tensors(X, W)), off).sites
    assert "sequence_parallel=False" in str(site.reason)


def test_training_graph() -> None:
    """A graph that keeps the reciprocal root for its backward (``a14_grad_train``): the reason says so."""
    report = check_unchanged(trace(interior_value_read, *tensors(X, W)))
    assert "training graph" in report.missed[0].reason


def test_epsilon_as_graph_input() -> None:
    """``dynamic=True`` makes epsilon an fp64 input, which is read when the call runs as a buffer is; where the config
    names epsilons the site is left alone, and so where epsilon is no one number."""

    def model(x: Tensor, w: Tensor, epsilon: Tensor) -> Tensor:
        h = reduce(x).float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + epsilon) * w).to(x.dtype)

    for epsilon in (torch.tensor(1e-6, dtype=torch.float64), torch.tensor([1e-6]), torch.tensor(1e-3).bfloat16()):
        module = trace(model, *tensors(X, W), epsilon)
        (site,) = check_fused(module, 1).fused
        assert (site.epsilon, site.epsilon_input) == (None, "epsilon_1")
        some = dataclasses.replace(STRICT, epsilons=(1e-6,))
        assert "FusionConfig names its epsilons" in str(check_unchanged(module, some).missed[0].reason)
    for epsilon, why in (
        (torch.full((X[0], 1), 1e-6), "a tensor of more than one element"),
        (torch.full((1,), 1e-6, dtype=torch.float64), "the norm is no float32"),
        (torch.tensor(1), "the fused op takes a float"),
    ):
        assert why in str(check_unchanged(trace(model, *tensors(X, W), epsilon)).missed[0].reason)


def test_symbolic_hidden_size() -> None:
    """The hidden size must be a number."""
    module = trace(lambda x, w: llama(reduce(x), w, EPS), *symbolic((4, "h"), ("h",)))
    assert "hidden size must be static" in check_unchanged(module).missed[0].reason


def reason(model: Callable[..., Any], residual: torch.dtype = torch.bfloat16) -> str:
    """Why a graph's one all-reduce is left alone."""
    inputs = [*tensors(X), *tensors(X, dtype=residual), *tensors(W)]
    (site,) = check_unchanged(trace(model, *inputs)).missed
    return str(site.reason)


def test_reasons_past_the_add() -> None:
    """The step that really stands in the way is named, behind the residual add as well."""

    def clamped(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return llama((r + reduce(x)).clamp(-1, 1), w, EPS)

    def one_head(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return llama(reduce(x).view(-1, 4, HIDDEN // 4), w[: HIDDEN // 4], EPS)

    def low(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        h = r + reduce(x)
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * w

    def rounded(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = r + reduce(x)
        return llama(h.to(x.dtype), w, EPS), h

    def streams(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        beta = r[..., :2].sigmoid()
        hyper = torch.stack([r, r * 2], 1) + beta.unsqueeze(-1) * reduce(x).unsqueeze(1)
        return llama((beta.unsqueeze(1) @ hyper).squeeze(1), w, EPS)

    assert "clamp_min" in reason(clamped)
    assert f"normalises rows of {HIDDEN // 4}" in reason(one_head)
    assert "computed in torch.bfloat16 throughout" in reason(low)
    assert "rounds the float32 sum to torch.bfloat16" in reason(rounded, torch.float32)
    assert "aten.mul.Tensor) stands between" in reason(streams)


def test_coalesced_and_in_place_on_an_input() -> None:
    """Several tensors at once, and a graph's input that is written over, are named."""

    def model(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        a, b = c10d.all_reduce_coalesced([x, x * 2], "sum", "0")
        return llama(c10d.wait_tensor(a), w, EPS), c10d.wait_tensor(b)

    assert "coalesced" in check_unchanged(trace(model, *tensors(X, W))).missed[0].reason
    module = trace(lambda x, w: llama(reduce(x), w, EPS), *tensors(X, W))
    for node in module.graph.find_nodes(op="call_function", target=c10d.all_reduce.default):
        node.target = c10d.all_reduce_.default
    assert "in place, which others hold" in check_unchanged(module).missed[0].reason


def test_graph_without_fake_values() -> None:
    """Nodes without ``meta["val"]``: refused with what to do, never a crash."""
    module = trace(lambda x, r, w: llama(r + reduce(x), w, EPS), *tensors(X, X, W))
    for node in module.graph.nodes:
        node.meta.pop("val", None)
    assert "fake-tensor propagation" in check_unchanged(module).missed[0].reason


@pytest.mark.parametrize("step", [c10d.wait_tensor, torch.abs, torch.clone], ids=lambda step: step.__name__)
@pytest.mark.parametrize("place", ["behind the all-reduce", "in the statistic", "returned"])
def test_long_chains(place: str, step: Callable[[Tensor], Tensor]) -> None:
    """Nothing that the pass follows is followed by recursion, at whose limit it would stop on the whole graph."""

    def many(value: Tensor) -> Tensor:
        for _ in range(200):
            value = step(value)
        return value

    def model(x: Tensor, w: Tensor) -> Tensor:
        y = reduce(x) if place == "in the statistic" else many(reduce(x))
        if place == "returned":
            return y
        h = y.float()
        mean = h.pow(2).mean(-1, keepdim=True)
        return (h * torch.rsqrt((many(mean) if place == "in the statistic" else mean) + EPS) * w).to(x.dtype)

    module = trace(model, *tensors(X, W))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 180)
    try:
        report = arf.fuse(module, STRICT)
    finally:
        sys.setrecursionlimit(limit)
    assert report.matched_count == (place != "returned" and step is not torch.abs), str(report)


def test_some_values_missing() -> None:
    """Any one node may lack its ``meta["val"]``: the site is fused or refused, the pass never fails."""
    for victim in range(14):
        module = trace(lambda x, r, w: llama(r + reduce(x), w, EPS), *tensors(X, X, W))
        nodes = list(module.graph.nodes)
        if victim < len(nodes):
            nodes[victim].meta.pop("val", None)
            _, report = fused_copy(module)
            assert all(site.fused or site.reason for site in report.sites)


def test_a_value_missing_in_front_of_the_all_reduce() -> None:
    """The same of an MoE combination, whose weights and rows are compared by their values."""
    original = mutants.original(random.Random(6971))
    for victim in range(len(original.graph.nodes)):
        module = copied(original)
        list(module.graph.nodes)[victim].meta.pop("val", None)
        _, report = fused_copy(module)
        assert all(site.fused or site.reason for site in report.sites)


def test_nothing_to_do() -> None:
    """A graph without an all-reduce gives an empty report."""
    report = check_unchanged(trace(lambda x, w: llama(x, w, EPS), *tensors(X, W)))
    assert (report.sites, report.note) == ((), None)


def test_config_selects() -> None:
    """Epsilons (as float32) and dtypes that the config leaves out are refused by name."""
    module = trace(lambda x, w: llama(reduce(x), w, 9.999999974752427e-07), *tensors(X, W))
    for config, word in (
        (arf.FusionConfig(epsilons=(1e-5,), raise_errors=True), "epsilon"),
        (arf.FusionConfig(dtypes=(torch.float16,), raise_errors=True), "bfloat16"),
    ):
        assert word in check_unchanged(module, config).missed[0].reason
    assert fused_copy(module, arf.FusionConfig(epsilons=(1e-6,), dtypes=(torch.bfloat16,)))[1].matched_count == 1


def test_unexpected_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: never crash the compile. An error inside the pass leaves the graph, and every site says so."""

    def fail(*args: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(fusion_pass, "planned", fail)
    module = trace(lambda x, w: llama(reduce(x), w, EPS), *tensors(X, W))
    report = check_unchanged(module, arf.FusionConfig())
    assert "boom" in str(report.note)
    assert "boom" in report.missed[0].reason
    with pytest.raises(RuntimeError, match="boom"):
        arf.fuse(module, STRICT)


def test_unexpected_error_while_describing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: never crash the compile. A site that cannot even be described leaves the graph and a note."""
    from arfusion_pass import provenance

    def fail(*args: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(provenance, "describe", fail)
    module = trace(lambda x, w: llama(reduce(x), w, EPS), *tensors(X, W))
    report = check_unchanged(module, arf.FusionConfig())
    assert "boom" in str(report.note)


def test_unexpected_error_while_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: never crash the compile. Whichever step of writing fails, the graph is as it came: what was inserted
    is gone, what was moved is back, and every reader reads what it did."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total = r + reduce(x)
        second = total + reduce(llama(total, w, EPS))
        early = second.relu()
        return early, llama(second, w.abs(), EPS), second  # this weight must move up

    commit = fusion_pass.commit
    for owner, name in ((Buffer, "emit"), (Buffer, "view"), (fx.Node, "replace_all_uses_with"), (Edits, "erase")):
        step = getattr(owner, name)
        for succeed in range(4):
            outcomes = iter([True] * succeed + [False])

            def fail(*args: Any, _step: Any = step, _outcomes: Any = outcomes, **kwargs: Any) -> Any:
                if next(_outcomes):
                    return _step(*args, **kwargs)
                raise RuntimeError("boom")

            def commit_and_fail(*args: Any, _where: Any = (owner, name), _fail: Any = fail) -> Any:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(*_where, _fail)
                    return commit(*args)

            module = trace(model, *tensors(X, X, W))
            with monkeypatch.context() as patch:
                patch.setattr(fusion_pass, "commit", commit_and_fail)
                report = check_unchanged(module, arf.FusionConfig())
            assert "left the graph as it was" in str(report.note)
            assert all("boom" in str(site.reason) for site in report.sites)
            check_fused(module, 2)  # and it can still be fused


@pytest.mark.parametrize("step", ["planned", "commit", "find_chains", "mark_chains", "marking.stamp"])
@pytest.mark.parametrize("recorded", [False, True])
def test_unexpected_error_after_moving(monkeypatch: pytest.MonkeyPatch, step: str, recorded: bool) -> None:
    """Contract: never crash the compile. Whatever fails, and however late, what was moved and written is taken back:
    the graph is as it came, and every all-reduce, one that had gone into another too, is missed for that."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return llama(r + (reduce(x) + reduce(x * 2)) * 0.5, w, EPS)

    def fail(*args: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(f"arfusion_pass.fusion_pass.{step}", fail)
    with recording() if recorded else contextlib.nullcontext():
        report = check_unchanged(trace(model, *tensors(X, X, W)), arf.FusionConfig(reassociate=True))
    assert "left the graph as it was" in str(report.note)
    assert len(report.missed) == 2
    assert all("boom" in str(site.reason) and not site.moved for site in report.missed)


def test_waits_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many waits for one all-reduce holds its tensor: norms are looked for behind each value once, not once for
    every wait above it."""
    looked: list[fx.Node] = []
    norms_of = raising.norms_of
    monkeypatch.setattr(raising, "norms_of", lambda node: looked.append(node) or norms_of(node))

    def model(x: Tensor, w: Tensor) -> Tensor:
        value = reduce(x)
        for _ in range(20):
            value = c10d.wait_tensor(value)
        return llama(value, w, EPS)

    check_fused(trace(model, *tensors(X, W)), 1)
    assert len(looked) == len(set(looked))


def test_other_reduce_ops() -> None:
    """Reduce ops of other kinds never reach the pass as ``sum``: the schema's string is compared, not a prefix."""
    module = trace(lambda x, w: llama(reduce(x), w, EPS), *tensors(X, W))
    node = next(iter(module.graph.find_nodes(op="call_function", target=c10d.all_reduce.default)))
    for op in ("SUM", "summa", "premul_sum", "product"):
        node.args = (node.args[0], op, "0")
        assert op in check_unchanged(module).missed[0].reason


def test_different_group_sizes() -> None:
    """A norm behind an all-reduce over a group of this rank alone: nothing to reduce."""
    alone = dist.new_group([0])
    name = alone.group_name
    module = trace(lambda x, w: llama(reduce(x, name), w, EPS), *tensors(X, W))
    assert "one rank" in check_unchanged(module).missed[0].reason


def test_a_long_chain_of_views_is_gone_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not from each of its links: 4,000 views took minutes. The dialects are asked about what computes alone."""
    asked: list[torch.fx.Node] = []
    norms = DIALECTS[0].norms
    monkeypatch.setattr(DIALECTS[0], "norms", lambda value, sums: (asked.append(value), norms(value, sums))[1])

    def model(x: Tensor, w: Tensor) -> Tensor:
        y = reduce(x)
        for _ in range(20):
            y = y.view(-1).view(4, 32)
        return llama(y, w, 1e-6)

    check_fused(trace(model, *tensors((4, 32), (32,))), 1)
    assert len(asked) == 1


class TestEpsilonOfAnotherDevice:
    """What ``dynamic=True`` leaves beside GPU tensors: an epsilon on the CPU, or a scalar."""

    @staticmethod
    def graph(scalar: bool) -> fx.GraphModule:
        """Two norms of one epsilon, on a GPU that is not there."""
        mode = FakeTensorMode(shape_env=ShapeEnv())
        with mode:
            x, w = torch.empty(X, dtype=torch.bfloat16, device="cuda"), torch.empty(W, device="cuda")
            epsilon = torch.empty((), dtype=torch.float64)

        def model(x: Tensor, w: Tensor, epsilon: Tensor) -> Tensor:
            for _ in range(2):
                h = reduce(x).float()
                x = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + epsilon.float()) * w).to(x.dtype)
            return x

        module = trace(model, x, w, epsilon)
        if scalar:
            (given,) = [node for node in module.graph.nodes if node.name == "epsilon_1"]
            given.meta["val"] = mode.shape_env.create_symfloatnode(sympy.Symbol("zf0"), hint=1e-6)
            for cast in list(given.users):
                cast.replace_all_uses_with(given)
                module.graph.erase_node(cast)
        return module

    @pytest.mark.parametrize("scalar", [False, True], ids=["cpu", "scalar"])
    def test_one_kernel_a_graph_brings_it_over(self, scalar: bool) -> None:
        """Rounded to fp32 on the GPU once, behind the inputs, and read by both calls."""
        module = self.graph(scalar)
        report = arf.fuse(module, STRICT)
        module.graph.lint()
        assert report.matched_count == 2, str(report)
        calls = module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.auto_functionalized)
        (epsilon,) = {call.kwargs["epsilon_tensor"] for call in calls}
        assert epsilon.target is (aten.full.default if scalar else aten.mul.Tensor)
        value = epsilon.meta["val"]
        assert (value.shape, value.dtype, value.device.type) == ((1,), torch.float32, "cuda")
        assert all(
            epsilon < node for node in module.graph.find_nodes(op="call_function", target=aten.empty.memory_format)
        )


def test_an_inner_sum_that_others_read() -> None:
    """Neither ``AR + t`` nor ``r + AR`` is an output of the call that adds the other one as well."""

    def inner(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = reduce(x) + w
        return llama(r + y, w, EPS), y.exp()

    def outer(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = r + reduce(x)
        return llama(y + w, w, EPS), y.exp()

    for model in (inner, outer):
        (site,) = check_unchanged(trace(model, *tensors(X, X, W))).missed
        assert "aten.add.Tensor" in str(site.reason)


def test_the_all_reduce_is_read_beside_an_addend() -> None:
    """``allreduce_out`` is the sum over ranks alone; an addend that is computed from it comes too late."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = reduce(x)
        total = r + (y + w)
        return llama(total, w, EPS), total, y

    (site,) = check_fused(trace(model, *tensors(X, X, W)), 1).fused
    assert site.outputs == ("allreduce_out", "residual_out", "norm_out")

    def circular(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        y = reduce(x)
        return llama(r + (y + y.tanh()), w, EPS)

    assert "input of the fused call" in str(check_unchanged(trace(circular, *tensors(X, X, W))).missed[0].reason)


def test_no_chain_through_an_addend() -> None:
    """Every rank adds its own to every row: such a call neither takes nor leaves a sharded residual."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        for bias in (False, False, True, False, False):
            y = reduce(x)
            r = r + (y + w if bias else y)
            x = llama(r, w, EPS)
        return x

    report = check_fused(trace(model, *tensors(X, X, W)), 5)
    assert [site.chain for site in report.fused] == [None, None, None, 1, 1]  # in front of it there would be no gain


@pytest.mark.parametrize(
    ("norm", "flag"),
    [
        (lambda h, e: h * torch.rsqrt(e), Flags.NONE),
        (lambda h, e: h * e**-0.5, Flags.NONE),
        (lambda h, e: h / torch.sqrt(e), Flags.DIVIDE_BY_ROOT),
        (lambda h, e: h / e**0.5, Flags.DIVIDE_BY_ROOT),
        (lambda h, e: h * (1 / torch.sqrt(e)), Flags.RECIPROCAL_ROOT),
        (lambda h, e: h * torch.sqrt(e).reciprocal(), Flags.RECIPROCAL_ROOT),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_root_by_its_steps(norm: Callable[..., Tensor], flag: Flags, dtype: torch.dtype) -> None:
    """Contract *exact*, to the last bit: each spelling of the root has the flag of its own roundings."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        h = reduce(x).float()
        return (norm(h, h.pow(2).mean(-1, keepdim=True) + EPS) * w.float()).to(x.dtype)

    module = trace(model, *tensors(X, W, dtype=dtype))
    check_fused(module, 1)
    (call,) = fused_copy(module)[0].graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.auto_functionalized
    )
    assert without_mark(call.kwargs["flags"]) == flag


@pytest.mark.parametrize("quantised", [False, True], ids=["norm", "FP8"])
def test_rows_whose_sizes_have_other_names(quantised: bool) -> None:
    """Contract *sound*: a residual whose sizes are not the all-reduce's by name has as many rows where the graph's view
    was guarded on it, whatever their numbers were."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total = r + reduce(x.reshape(-1, HIDDEN)).view(r.shape)
        normed = llama(total, w, EPS)
        return (normed.float() / 0.5).clamp(-448, 448).to(torch.float8_e4m3fn) if quantised else normed, total

    hints = {"a": 6, "b": 2, "c": 3, "d": 4}
    module = trace(model, *symbolic(("a", "b", HIDDEN), ("c", "d", HIDDEN), (HIDDEN,), hints=hints))
    fused, report = fused_copy(module)
    assert report.matched_count == 1, str(report)
    check_same(module, fused, a=10, b=3, c=5, d=6)
