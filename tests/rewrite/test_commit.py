"""Writing fused calls into a graph: order, liveness, aliasing, mutation. Each case was, or could be, a wrong graph."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

from arfusion_pass.graph import mutated_arguments
from arfusion_pass.ops.checks import FusedCall
from arfusion_pass.rewrite import planning
from tests.models import Tensor, fp32_result, gemma, llama, reduce
from tests.simulate import (
    aten,
    c10d,
    calls,
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


# Which values are written -------------------------------------------------------------------------------------------


def test_value_returned_twice() -> None:
    """A value may be read by any number of readers, the output several times."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total = r + reduce(x)
        norm = llama(total, w, EPS)
        return norm, total, norm.relu(), norm @ norm.t(), norm, total

    report = check_fused(trace(model, *tensors(X, X, W)), 1)
    assert report.fused[0].outputs == ("residual_out", "norm_out")


def test_dead_residual() -> None:
    """The last layer's residual is read by nobody: it is not written."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return llama(r + reduce(x), w, EPS)

    assert check_fused(trace(model, *tensors(X, X, W)), 1).fused[0].outputs == ("norm_out",)


@pytest.mark.parametrize("dead", [False, True])
def test_dead_quantiser(dead: bool) -> None:
    """A quantiser that nobody reads, in a graph whose dead code stands, is no part of the site; one beside it is."""

    def model(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        norm = llama(r + reduce(x), w, EPS)
        _ = (norm.float() / s).to(torch.float8_e4m3fn)
        return (norm,) if dead else (norm, (norm.float() * s).to(torch.float8_e4m3fn))

    outputs = check_fused(trace(model, *tensors(X, X, W, (1,))), 1).fused[0].outputs
    assert outputs == (("norm_out",) if dead else ("norm_out", "quant_out"))


def test_dropout_of_a_graph_before_decompositions() -> None:
    """``torch.export`` leaves dropout in a model that does not train: it gives what it is given."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = reduce(x)
        total = r + y
        return llama(total, w, EPS), total

    module = trace(model, *tensors(X, X, W))
    wait = module.graph.find_nodes(op="call_function", target=c10d.wait_tensor.default)[0]
    for trains in (False, True):
        with module.graph.inserting_after(wait):
            dropout = module.graph.call_function(aten.dropout.default, (wait, 0.1, trains))
        dropout.meta["val"] = wait.meta["val"]
        wait.replace_all_uses_with(dropout, delete_user_cb=lambda user, own=dropout: user is not own)
        if trains:
            assert "aten.dropout.default) stands between" in check_unchanged(module).missed[0].reason
        else:
            check_fused(module, 1)


def test_nobody_reads() -> None:
    """A site that nobody reads (dead code) has nothing to write; the op refuses such a call, so it is not made."""
    module = trace(lambda x, w: (x * 2, llama(reduce(x), w, EPS)), *tensors(X, W))
    output = module.graph.output_node()
    output.args = ((output.args[0][0],),)  # type: ignore[index]
    assert "nobody reads" in check_unchanged(module).missed[0].reason


def test_two_norms_of_one_all_reduce() -> None:
    """One norm is fused, the other reads the all-reduce that the call writes."""

    def model(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        y = reduce(x)
        return llama(y, w, EPS), gemma(y, v, 1e-5)

    assert check_fused(trace(model, *tensors(X, W, W)), 1).fused[0].outputs == ("allreduce_out", "norm_out")


def test_norm_of_the_sum_and_of_the_all_reduce() -> None:
    """Both follow one all-reduce; whichever is fused, the other's input is written."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = reduce(x)
        total = y + r
        return llama(y, w, EPS), gemma(total, w, 1e-5), total

    check_fused(trace(model, *tensors(X, X, W)), 1)


def test_add_of_two_all_reduces() -> None:
    """Only one of them can be fused; the other says so and stays, as the residual."""

    def model(x: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = reduce(x) + reduce(z)
        return llama(total, w, EPS), total

    module = trace(model, *tensors(X, X, W))
    fused, report = fused_copy(module)
    assert (report.matched_count, calls(fused, c10d.all_reduce.default)) == (1, 1)
    assert "is fused with" in report.missed[0].reason
    check_same(module, fused)


def test_embedding_and_attention() -> None:
    """Hugging Face's first layer: the embedding's all-reduce has a norm of its own and is the residual of the next."""

    def model(x: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        embedded = reduce(x)
        hidden = llama(embedded, w, EPS)
        total = embedded + reduce(z * hidden)
        return llama(total, w, EPS), total

    check_fused(trace(model, *tensors(X, X, W)), 2)


def test_all_reduce_of_a_norm() -> None:
    """A site whose tensor is another's norm, with symbolic token counts that no node of the graph holds."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = r + reduce(x)
        again = total + reduce(llama(total, w, EPS))
        return llama(again, w, EPS), again

    for tokens in (4, 1):
        check_fused(trace(model, *symbolic(("s", HIDDEN), ("s", HIDDEN), W)), 2, tokens=tokens)


def test_cast_that_others_read_stays() -> None:
    """A cast inside the site that others read stays, and reads what the call writes."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = (r + reduce(x)).float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * w).to(x.dtype), h.relu()

    check_fused(trace(model, *tensors(X, X, W)), 1)


# Order ---------------------------------------------------------------------------------------------------------------


def test_pure_input_is_hoisted() -> None:
    """A weight that is computed late, but from what is there early, moves up to the call."""

    def model(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        total = r + reduce(x)
        early = total.relu()
        return llama(total, (w + v).tanh(), EPS), early

    check_fused(trace(model, *tensors(X, X, W, W)), 1)


def test_hoisted_for_two_sites() -> None:
    """A late weight of two sites moves to the first of them (it went to the second, behind the first's call)."""

    def model(x: Tensor, r: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        first = r + reduce(x)
        a = first.relu()
        second = reduce(z) + a
        b = second.relu()
        late = w * 3
        return llama(first, late, EPS), llama(second, late, EPS), a, b

    check_fused(trace(model, *tensors(X, X, X, W)), 2)


def test_neighbour_that_fails() -> None:
    """A site that counted on a neighbour, whose plan then fails, is planned anew (it was written behind a reader)."""

    def model(x: Tensor, r: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        first = r + reduce(x)
        second = first + reduce(z)  # goes with the second site, if that is fused
        early = second.relu()
        weight = early.sum(0)  # but its weight is computed from its own sum
        return llama(first, weight * w, EPS), llama(second, weight, EPS)

    module = trace(model, *tensors(X, X, X, W))
    fused, report = fused_copy(module)
    assert len(report.missed) == 2
    check_same(module, fused)


def test_circular_input() -> None:
    """A residual that is computed from the all-reduce itself."""
    module = trace(lambda x, w: llama((y := reduce(x)).relu() + y, w, EPS), *tensors(X, W))
    assert "would produce" in check_unchanged(module).missed[0].reason


def test_all_reduce_added_to_itself() -> None:
    """Both operands are the all-reduce: there is no residual."""
    check_unchanged(trace(lambda x, w: llama((y := reduce(x)) + y, w, EPS), *tensors(X, W)))


def test_reader_before_late_input() -> None:
    """A weight that only another reader of the sum makes possible: refused, the reader is named."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = r + reduce(x)
        early = total.relu()
        return llama(total, early.amax(0) + w, EPS), early

    assert check_unchanged(trace(model, *tensors(X, X, W))).missed[0].reason


def test_random_numbers_keep_their_order() -> None:
    """A random weight that stands late is not moved before another random number."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total = r + reduce(x)
        early, other = total.relu(), torch.rand_like(w)
        return llama(total, torch.rand_like(w), EPS), early, other

    check_unchanged(trace(model, *tensors(X, X, W)))


def test_circle_through_two_sites() -> None:
    """Each site's call would need the other's result first: at most one is fused, in a valid order."""

    def model(x: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        a, b = reduce(x), reduce(z)
        first, second = a + b.relu(), b + a.relu()
        return llama(first, w, EPS), llama(second, w, EPS), first, second

    module = trace(model, *tensors(X, X, W))
    fused, report = fused_copy(module)
    assert report.matched_count + len(report.missed) == 2
    assert calls(fused, c10d.all_reduce.default) == len(report.missed)
    check_same(module, fused)


# Memory --------------------------------------------------------------------------------------------------------------


def mutated(fn: Any, *shapes: tuple[int, ...]) -> fx.GraphModule:
    """A graph with in-place ops, whose later readers read the memory itself, not the in-place op's result."""
    module = trace(fn, *tensors(*shapes), functional=False)
    for node in module.graph.nodes:
        if mutated_arguments(node):
            node.replace_all_uses_with(node.args[0])
    return module


def test_copies_back_to_inputs() -> None:
    """``dist.all_reduce`` on a graph input: ``copy_`` after everything reads what the call writes."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        y = reduce(x)
        total = r + y
        norm = llama(total, w, EPS)
        aten.copy_.default(x, y)
        aten.copy_.default(r, total)
        return norm

    module = mutated(model, X, X, W)
    assert check_fused(module, 1).fused[0].outputs == ("allreduce_out", "residual_out", "norm_out")


@pytest.mark.parametrize("what", ["x", "residual", "weight", "sum"])
def test_mutation_in_between(what: str) -> None:
    """An input or a value of the site that is written between its first and its last node: refused."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = reduce(x)
        total = r + y
        aten.add_.Tensor({"x": x, "residual": r, "weight": w, "sum": total}[what], 1.0)
        return llama(total, w, EPS), total

    assert "writes to" in check_unchanged(mutated(model, X, X, W)).missed[0].reason


@pytest.mark.parametrize("what", ["residual", "weight", "Gemma's weight", "scale", "input of the experts"])
def test_mutation_behind_what_is_looked_through(what: str) -> None:
    """A cast, a view or ``weight + 1`` in front of the site reads what is written afterwards: the call would read the
    new value in its own place."""

    def model(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        wide, gamma, scale = r.float(), w.float(), s.float()
        if what == "Gemma's weight":
            gamma = gamma + 1.0
        if what == "input of the experts":
            experts = x.view(2, 4, HIDDEN).float() * s.float().reshape(2, 1, 1)
            aten.mul_.Tensor(x, 2)
            return (llama(reduce(experts.sum(0).to(x.dtype)), w, EPS),)
        written = {"residual": r, "weight": w, "Gemma's weight": w, "scale": s}[what]
        aten.mul_.Tensor(written, 2)
        total = wide + reduce(x)
        root = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)
        norm = (total * root * gamma).to(x.dtype)
        return total, (norm.float() / scale).to(torch.float8_e4m3fn)

    experts = what == "input of the experts"
    module = mutated(model, (8, HIDDEN) if experts else X, X, W, (2,) if experts else (1,))
    fused, report = fused_copy(module)
    assert report.matched_count == 0 or what in ("scale", "input of the experts")
    check_same(module, fused)


def test_mutated_constant() -> None:
    """A tensor that holds a number, until somebody adds to it, is no constant: it is read when the call runs."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        epsilon = aten.full.default([], 1e-6, dtype=torch.float32)
        aten.add_.Tensor(epsilon.view(1), 1.0)
        wide = reduce(x).float()
        return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)

    assert check_fused(mutated(model, X, W), 1).fused[0].epsilon is None


UNSAID: dict[str, Any] = {
    "resize_storage_bytes_": lambda call, r: call(torch.ops.inductor.resize_storage_bytes_.default, (r, 0)),
    "c10d.allreduce_": lambda call, r: call(torch.ops.c10d.allreduce_.default, ([r], None, None, None)),
    "c10d.recv_": lambda call, r: call(torch.ops.c10d.recv_.default, ([r], None, 0, 0)),
    "relu_": lambda call, r: call(torch.relu_, (r,)),
    "function relu": lambda call, r: call(torch.nn.functional.relu, (r, True)),
    "aten.mul_": lambda call, r: call(aten.mul_, (r, 2)),
}
"""Calls that write to what they are given, and say so nowhere."""


@pytest.mark.parametrize("what", UNSAID)
def test_write_that_no_schema_admits(what: str) -> None:
    """Contract *sound*: c10d's own collectives write in place, and their schemas do not say so."""
    module = trace(lambda x, r, w: llama(r.float() + reduce(x), w, EPS), *tensors(X, X, W), functional=False)
    graph = module.graph
    residual = list(graph.nodes)[1]
    wait = graph.find_nodes(op="call_function", target=c10d.wait_tensor.default)[0]
    with graph.inserting_after(wait):
        UNSAID[what](graph.call_function, residual)
    reason = check_unchanged(module).missed[0].reason
    assert what in reason and ("may write to" in reason or what.startswith("resize")), reason


@pytest.mark.parametrize("view", ["dropout", "unsafe_chunk", "einsum", "by name"])
def test_write_by_a_view_that_no_schema_admits(view: str) -> None:
    """Contract *sound*: dropout that drops nothing gives its input, and chunks share its memory."""
    module = trace(lambda x, r, w: llama(r.float() + reduce(x), w, EPS), *tensors(X, X, W), functional=False)
    graph = module.graph
    wait = graph.find_nodes(op="call_function", target=c10d.wait_tensor.default)[0]
    residual = list(graph.nodes)[1]
    call = graph.call_function
    with graph.inserting_before(wait.next):
        if view == "dropout":
            part = call(aten.dropout.default, (residual, 0.5, False))
        elif view == "unsafe_chunk":
            part = call(operator.getitem, (call(aten.unsafe_chunk.default, (residual, 2)), 0))
        elif view == "einsum":
            part = call(aten.einsum.default, ("ij->ji", [residual]))
        else:
            part = call(aten._unsafe_view.default, (), {"size": [-1], "self": residual})
        call(aten.mul_.Tensor, (part, 2))
    assert "writes to" in check_unchanged(module).missed[0].reason


def test_casts_that_leave_the_graph() -> None:
    """Two casts of one fp32 sum are two tensors: returned both, they must not become one."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        wide = reduce(x.float())
        low = wide.to(x.dtype)
        return llama(low + r, w, EPS), low, wide.to(x.dtype)

    assert "one tensor for both" in check_unchanged(trace(model, *tensors(X, X, W))).missed[0].reason


def test_write_to_what_was_reduced_in_place() -> None:
    """What was reduced in place is written behind the norm: in the memory that the fused call wrote, as before."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        own = x.clone()
        y = c10d.wait_tensor(c10d.all_reduce_(own, "sum", "0"))
        norm = llama(y + r, w, EPS)
        aten.mul_.Tensor(own, 2)
        return norm, y, own

    module = mutated(model, X, X, W)
    fused, report = fused_copy(module)
    assert report.matched_count == 1, str(report)
    check_same(module, fused)


def reduced_in_place(y: Tensor) -> Tensor:
    return c10d.wait_tensor(c10d.all_reduce_(y, "sum", "0"))


def read_by_name(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    own = x.clone()
    return llama(reduced_in_place(own) + r, w, EPS), own, own.sum()


def norm_reduced_in_place(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    norm = llama(reduce(x) + r, w, EPS)
    return llama(reduced_in_place(norm) + x, w, EPS), norm


def late_residual(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    own = x.clone()
    first, y = reduced_in_place(own), c10d.all_reduce(r, "sum", "0")
    gamma = w * r.sum()
    return llama(first, gamma, EPS), llama(c10d.wait_tensor(y) + own, w, EPS)


def its_own_residual(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    own = x.clone()
    return llama(reduced_in_place(own) + own, w, EPS)


def its_own_weight(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    own = x.clone()
    return llama(reduced_in_place(own) + r, own[0] + w, EPS)


@pytest.mark.parametrize(
    ("model", "fused"),
    [(read_by_name, 1), (norm_reduced_in_place, 2), (late_residual, 2), (its_own_residual, 0), (its_own_weight, 0)],
)
def test_reduced_in_place_and_read_by_name(model: Any, fused: int) -> None:
    """What was reduced in place is read by the tensor's own name afterwards: the call reads the tensor as it was, and
    everybody else the sum (the graph was no graph any more, or a residual was this rank's share of it)."""
    module = mutated(model, X, X, W)
    copy, report = fused_copy(module)
    assert report.matched_count == fused, str(report)
    check_same(module, copy)


def test_call_that_may_write() -> None:
    """A higher-order op that is not known to copy may write to whatever it is given."""
    module = trace(lambda x, r, w: llama(r + reduce(x), w, EPS), *tensors(X, X, W))
    graph = module.graph
    residual = list(graph.nodes)[1]
    wait = graph.find_nodes(op="call_function", target=c10d.wait_tensor.default)[0]
    with graph.inserting_after(wait):
        kwargs = {"kernel_idx": 0, "constant_args_idx": 0, "grid": [], "kwargs": {"out": residual}}
        graph.call_function(torch.ops.higher_order.triton_kernel_wrapper_mutation, (), kwargs)
    assert "triton_kernel_wrapper_mutation" in check_unchanged(module).missed[0].reason


def test_call_that_keeps_an_order() -> None:
    """``with_effects`` writes to what the op that it calls writes to: printing writes to nothing."""
    module = trace(lambda x, r, w: llama(r + reduce(x), w, EPS), *tensors(X, X, W))
    graph = module.graph
    for op, count in ((torch.ops.higher_order.print, 1), (aten.add_.Tensor, 0)):
        residual = list(graph.nodes)[1]
        wait = graph.find_nodes(op="call_function", target=c10d.wait_tensor.default)[0]
        with graph.inserting_after(wait):
            call = graph.call_function(torch.ops.higher_order.with_effects, (None, op, "{}", residual))
        assert fused_copy(module)[1].matched_count == count
        graph.erase_node(call)


def test_mutation_afterwards() -> None:
    """What is written after the site's last node sees, and changes, the written values as it did the old ones."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total = r + reduce(x)
        norm = llama(total, w, EPS)
        view = total.view(-1)
        total.add_(1)
        r.mul_(2)
        return norm, total, view

    check_fused(mutated(model, X, X, W), 1)


@pytest.mark.parametrize("piece", ["split", "select", "slice", "transpose"])
def test_residual_that_views_what_is_mutated(piece: str) -> None:
    """Views are followed to what owns the memory, through tuples as well (``split``'s pieces were taken for owners)."""

    def model(x: Tensor, big: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        if piece == "split":
            r = aten.split.Tensor(big, 4)[0]
        elif piece == "select":
            r = aten.select.int(big.view(2, 4, HIDDEN), 0, 1)
        elif piece == "slice":
            r = aten.slice.Tensor(big, 0, 0, 4)
        else:
            r = aten.slice.Tensor(aten.permute.default(big, [1, 0]).t(), 0, 0, 4)
        y = reduce(x)
        aten.mul_.Tensor(big, 2)
        total = r + y
        return llama(total, w, EPS), total

    check_unchanged(mutated(model, X, (8, HIDDEN), W))


def test_nothing_is_hoisted_over_a_mutation() -> None:
    """A late weight is computed from memory that is written in between: it must not move up."""

    def model(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        total = r + reduce(x)
        early = total.relu()
        aten.copy_.default(w, v)
        return llama(total, w * 3, EPS), early

    assert "writes to" in check_unchanged(mutated(model, X, X, W, W)).missed[0].reason


# Strides -------------------------------------------------------------------------------------------------------------


def test_strided_inputs() -> None:
    """Strided tensors, residuals and weights are copied for the op, which takes contiguous ones (it raised)."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = r.t() + reduce(x.t())
        return llama(total, w[:, 0], EPS), total

    check_fused(trace(model, *tensors((HIDDEN, 4), (HIDDEN, 4), (HIDDEN, 2))), 1)


def test_reader_by_strides() -> None:
    """``as_strided`` of a strided sum would read other elements of a contiguous one."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = r.t() + reduce(x.t())
        return llama(total, w, EPS), aten.as_strided.default(total, [HIDDEN, 4], [4, 1])

    module = trace(model, *tensors((HIDDEN, 4), (HIDDEN, 4), W))
    assert "strides" in check_unchanged(module).missed[0].reason


# Sizes ---------------------------------------------------------------------------------------------------------------


def test_no_tokens() -> None:
    """Zero tokens."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = r + reduce(x)
        return llama(total, w, EPS), total

    check_fused(trace(model, *tensors((0, HIDDEN), (0, HIDDEN), W)), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_are_no_multiple_of_16_bytes(dtype: torch.dtype) -> None:
    """The kernels move 16 bytes at a time: other rows are refused with their size."""
    module = trace(lambda x, w: llama(reduce(x), w, EPS), *tensors((4, 33), (33,), dtype=dtype))
    assert "multiple of 16" in check_unchanged(module).missed[0].reason


def test_weight_is_also_the_tensor() -> None:
    """One node in several roles: tensor and residual, and one weight for all sites."""

    def model(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        first = x + reduce(x)
        norm = llama(first, w, EPS)
        second = first + reduce(norm)
        return fp32_result(second, w, EPS), second

    check_fused(trace(model, *tensors(X, W)), 2)


def test_one_row_is_its_own_weight() -> None:
    """A one-dimensional tensor that is at once what is reduced, residual and weight."""
    check_fused(trace(lambda x: llama(x + reduce(x), x, EPS), *tensors(W)), 1)


def test_copied_graph_is_equal() -> None:
    """The suite's own copy of a graph means the same, so that the comparisons above compare what they should."""
    module = trace(lambda x, w: llama(reduce(x), w, EPS), *tensors(X, W))
    check_same(module, copied(module))


# Calls that the fused op itself refuses ------------------------------------------------------------------------------


def test_weight_that_enlarges_the_norm() -> None:
    """A weight of more dimensions makes three norms of one: the norm is fused without it."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        return llama(reduce(x), w.expand(3, 1, HIDDEN), EPS)

    module = trace(model, *tensors(X, W))
    fused, report = fused_copy(module)
    assert report.matched_count == 1
    check_same(module, fused)


@pytest.mark.parametrize("number", [1e39, float("inf"), float("nan")])
def test_scale_beyond_fp32(number: float) -> None:
    """A static scale that fp32 does not hold stays in the graph, behind the fused norm."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        return (llama(reduce(x), w, EPS) / number).to(torch.float8_e4m3fn)

    report = check_fused(trace(model, *tensors(X, W)), 1)
    assert report.fused[0].pattern == "AllReduceRMSNorm"


def test_refused_by_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the op's own check raises, it raises while the site is planned: the site is missed for that reason."""

    def refuse(call: FusedCall, eager: bool, certain: bool = False) -> None:
        raise ValueError("rows of 32 are not liked today")

    monkeypatch.setattr(planning, "check_call", refuse)
    module = trace(lambda x, w: llama(reduce(x), w, EPS), *tensors(X, W))
    report = check_unchanged(module)
    assert report.missed[0].reason == "the fused op refuses the call: rows of 32 are not liked today"
