"""Sequence parallelism: which reduce-scatters fuse with the norm behind them and its all-gather, and why not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx

import arfusion_pass as arf
from arfusion_pass.dialects.reading.pieces import cut
from arfusion_pass.ops.marks import mark_in
from tests import quant_cases as q
from tests.dialects.engine_ops import register_vllm
from tests.models import Tensor, fp32_result, gemma, llama, reduce, torch_norm
from tests.sequence_parallel import block, c10d, gather, scatter, vllm_like
from tests.simulate import (
    STRICT,
    calls,
    captured,
    check_same,
    check_unchanged,
    fake_world,
    fused_copy,
    symbolic,
    tensors,
    trace,
)

ON, OFF = STRICT, dataclasses.replace(STRICT, sequence_parallel=False)
WORLD = 2
HIDDEN = q.HIDDEN
ROWS, SHARD = (6, HIDDEN), (3, HIDDEN)
FUSED = torch.ops.higher_order.auto_functionalized
COLLECTIVES = (c10d.reduce_scatter_tensor.default, c10d.all_gather_into_tensor.default, c10d.wait_tensor.default)


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with fake_world(WORLD):
        yield


def static(h: Tensor) -> Tensor:
    return q.static_number_mul(h, h)


def traced(fn: Callable[..., Any], *shapes: Any) -> fx.GraphModule:
    """A graph of ``fn(x, residual, weight)``, of six tokens where nothing else is said."""
    return trace(fn, *tensors(*(shapes or (ROWS, SHARD, (HIDDEN,)))))


def check(module: fx.GraphModule, *patterns: str, **symbols: int) -> fx.GraphModule:
    """Fuses with these patterns, none missed, leaves no collective, and keeps every bit."""
    fused, report = fused_copy(module, ON)
    assert ([site.pattern for site in report.fused], report.missed) == (list(patterns), ()), str(report)
    assert calls(fused, *COLLECTIVES) == 0
    check_same(module, fused, **symbols)
    return fused


def reason(fn: Callable[..., Any], config: arf.FusionConfig = ON, *shapes: Any) -> str:
    """Why the one reduce-scatter of ``fn`` is left alone, node for node."""
    (site,) = check_unchanged(traced(fn, *shapes), config).sites
    return str(site.reason)


ADD, PLAIN = "ReduceScatterFusedAddRMSNormAllGather", "ReduceScatterRMSNormAllGather"


@pytest.mark.parametrize("norm", [llama, torch_norm, fp32_result])
@pytest.mark.parametrize("dim", [0, 1])
def test_add_norm(norm: Any, dim: int) -> None:
    """Rows of either dimension; residual and sum stay this rank's rows, and no ``cat`` or ``split`` is left."""
    shapes = [ROWS, SHARD] if dim == 0 else [(2, *ROWS), (2, *SHARD)]
    fused = check(traced(lambda x, r, w: block(x, r, w, WORLD, norm, dim), *shapes, (HIDDEN,)), ADD)
    assert calls(fused, torch.ops.aten.cat.default, torch.ops.aten.split.Tensor) == 0
    (call,) = fused.graph.find_nodes(op="call_function", target=FUSED)
    assert call.kwargs["block"] == (0 if dim == 0 else 3)


def test_first_and_gemma() -> None:
    """Without a residual the sum itself is what the next site adds to; Gemma's weight."""

    def fn(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        total = scatter(x, WORLD)
        first = gather(gemma(total, w, 1e-6), WORLD)
        return block(y * first, total, w, WORLD, gemma)[0]

    check(traced(fn, ROWS, ROWS, (HIDDEN,)), "ReduceScatterGemmaRMSNormAllGather", ADD.replace("RMS", "GemmaRMS"))


@pytest.mark.parametrize("order", [(1, 0), (0, 0)], ids=["swapped", "repeated"])
@pytest.mark.parametrize("where", ["cut", "joined"])
def test_other_pieces(where: str, order: tuple[int, int]) -> None:
    """Pieces that are not one of each rank in order: what the collective itself takes, or gives, is fused."""

    def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        pieces = x.split(3, 1)
        pieces = tuple(pieces[i] for i in order) if where == "cut" else pieces
        total = r + scatter(torch.cat(pieces), WORLD)
        parts = gather(llama(total, w, 1e-6), WORLD).split(2)
        return torch.cat([parts[i] for i in order] if where == "joined" else parts, 1), total

    fused = check(traced(fn, (2, *ROWS), (2, *SHARD), (HIDDEN,)), ADD)
    (call,) = fused.graph.find_nodes(op="call_function", target=FUSED)
    assert call.kwargs["block"] == 0


def two_of_three_pieces(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = r[:, :2] + scatter(torch.cat(x.split(2, 1)[:2]), WORLD)
    return gather(llama(total, w, 1e-6), WORLD, 1), total


def pieces_of_two(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = r + scatter(torch.cat([x.split(3, 1)[0], x.neg().split(3, 1)[1]]), WORLD)
    return gather(llama(total, w, 1e-6), WORLD, 1), total


def pieces_of_batches(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Which are in order as they are; as rows of the second dimension they would be dealt out one by one."""
    total = r[:1, :2] + scatter(torch.cat(x[:, :2].contiguous().split(1)), WORLD)
    return gather(llama(total, w, 1e-6).view(2, 1, HIDDEN), WORLD, 1), total


def joined_by_columns(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    parts = gather(llama(r + scatter(x, WORLD, 1), w, 1e-6), WORLD).split(2)
    return torch.cat(parts, 2), r


def a_part_read(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    parts = gather(llama(r + scatter(x, WORLD, 1), w, 1e-6), WORLD).split(2)
    return torch.cat(parts, 1), parts[1].relu()


@pytest.mark.parametrize("fn", [two_of_three_pieces, pieces_of_two, pieces_of_batches, joined_by_columns, a_part_read])
def test_pieces_that_are_not_one_of_each_rank(fn: Any) -> None:
    """Contract *sound*: what is cut or joined otherwise stays in the graph, around the fused call."""
    fused = check(traced(fn, (2, *ROWS), (2, *SHARD), (HIDDEN,)), ADD)
    (call,) = fused.graph.find_nodes(op="call_function", target=FUSED)
    assert call.kwargs["block"] == 0
    assert calls(fused, torch.ops.aten.cat.default) >= 1


def test_some_of_the_pieces() -> None:
    """Two of four ranks' pieces are not what four ranks deal out."""
    module = trace(lambda x: (torch.cat(x.split(2, 1)[:2]), torch.cat(x.split(2, 1))), *tensors((2, 8, HIDDEN)))
    two, four = module.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    assert cut(two, 4) is None
    assert cut(four, 4) is not None


@pytest.mark.parametrize("dim", [0, 1])
def test_symbolic_tokens(dim: int) -> None:
    """One graph for all token counts: no size is fixed."""

    def fn(mine: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return block(gather(mine, WORLD, dim), r, w, WORLD, llama, dim)

    shape = ("s", HIDDEN) if dim == 0 else (2, "s", HIDDEN)
    module = trace(fn, *symbolic(shape, shape, (HIDDEN,)))
    fused, report = fused_copy(module, ON)
    assert [site.pattern for site in report.sites] == [ADD], str(report)
    for tokens in (1, 4, 5):
        check_same(module, fused, tokens=tokens)


def test_one_sequence_is_one_block() -> None:
    """With one sequence both ways of dealing rows are the same: no block in the call, whatever the dimension."""
    fused = check(traced(lambda x, r, w: block(x, r, w, WORLD, llama, 1), (1, *ROWS), (1, *SHARD), (HIDDEN,)), ADD)
    (call,) = fused.graph.find_nodes(op="call_function", target=FUSED)
    assert call.kwargs["block"] == 0


def test_several_gathers() -> None:
    """Three projections that each gather for themselves read one fused call."""

    def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        norm = llama(r + scatter(x, WORLD), w, 1e-6)
        return gather(norm, WORLD), gather(norm, WORLD).relu(), gather(norm.view(3, HIDDEN), WORLD).neg()

    check(traced(fn), ADD)


@pytest.mark.parametrize("before", [False, True], ids=["behind", "before"])
@pytest.mark.parametrize("quantise", [static, q.token, q.group])
def test_quantiser(quantise: Any, before: bool) -> None:
    """On either side of the all-gather, the same codes and scales: bytes cross, not the norm."""

    def fn(x: Tensor, r: Tensor, w: Tensor) -> Any:
        norm, total = llama(r + scatter(x, WORLD), w, 1e-6), r
        parts = quantise(norm) if before else quantise(gather(norm, WORLD))
        parts = parts if isinstance(parts, tuple) else (parts,)
        return (*(gather(part, WORLD) if before else part for part in parts), total)

    label = {"static": "Static", "token": "Token", "group": "Group"}[quantise.__name__]
    fused = check(traced(fn), f"ReduceScatterFusedAddRMSNorm{label}QuantFP8AllGather")
    (call,) = fused.graph.find_nodes(op="call_function", target=FUSED)
    assert call.kwargs["norm_out"] is None and call.kwargs["quant_out"] is not None


def test_vllm() -> None:
    """What vLLM's sequence-parallel pass leaves, tokens symbolic: codes gathered, and the norm."""
    register_vllm()
    assert dist.group.WORLD is not None
    arf.register_group("tp", dist.group.WORLD)
    square = torch.randn(HIDDEN, HIDDEN).bfloat16()
    inputs = [torch.randn(8, HIDDEN).bfloat16(), torch.ones(HIDDEN).bfloat16(), torch.ones(1), square, square.clone()]
    module = captured(vllm_like(WORLD), inputs, dynamic=8)
    fused, report = fused_copy(module, ON)
    quantised = "ReduceScatterFusedAddRMSNormStaticQuantFP8AllGather"
    assert [site.pattern for site in report.sites] == [PLAIN, quantised, ADD], str(report)
    for tokens in (4, 6):
        check_same(module, fused, tokens=tokens)


def test_off() -> None:
    """The report says what switches it off."""
    assert "sequence_parallel=False" in reason(lambda x, r, w: block(x, r, w, WORLD, llama), OFF)


def test_no_norm() -> None:
    """A reduce-scatter that no norm follows is no site."""

    def fn(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return gather(scatter(x, WORLD).relu(), WORLD)

    assert check_unchanged(traced(fn)).sites == ()


def test_bias_in_between() -> None:
    """A bias is an addend of this rank's rows. ``reassociate`` moves nothing behind a reduce-scatter, and no reason
    says that it would."""

    def biased(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return gather(llama(r + (scatter(x, WORLD) + w), w, 1e-6), WORLD)

    def fn(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return gather(llama(r + scatter(x, WORLD) * w, w, 1e-6), WORLD)

    module = traced(biased)
    fused, report = fused_copy(module, ON)
    assert report.fused[0].pattern == "ReduceScatterFusedTwoAddsRMSNormAllGather"
    check_same(module, fused)
    why = reason(fn, dataclasses.replace(ON, reassociate=True))
    assert "stands between it and the norm" in why and "reassociate" not in why


def shard_only(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return llama(r + scatter(x, WORLD), w, 1e-6).relu()


def shard_as_well(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    norm = llama(r + scatter(x, WORLD), w, 1e-6)
    return gather(norm, WORLD), norm.relu()


def other_shape(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    norm = llama(r + scatter(x, WORLD), w, 1e-6)
    return gather(norm, WORLD), gather(norm.view(1, 3, HIDDEN), WORLD)


def codes_as_well(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    codes = static(llama(r + scatter(x, WORLD), w, 1e-6))
    return gather(codes, WORLD), codes


def other_order(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    norm = llama(r.view(2, 3, HIDDEN) + scatter(x.view(2, 6, HIDDEN), WORLD, 1), w, 1e-6)
    return gather(norm.permute(1, 0, 2).contiguous(), WORLD)


def other_group(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return gather(llama(r + scatter(x, WORLD), w, 1e-6), WORLD, group="other")


def average(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return gather(llama(r + scatter(x, WORLD, op="avg"), w, 1e-6), WORLD)


def padded(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    """Five tokens as DTensor pads them: the last rank's rows are cut before the add, and padded again."""
    mine = scatter(torch.nn.functional.pad(x[:5], (0, 0, 0, 1)), WORLD)[:2]
    norm = llama(r[:2] + mine, w, 1e-6)
    return gather(torch.nn.functional.pad(norm, (0, 0, 0, 1)), WORLD)[:5]


def padded_first(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    """The same on the first rank, whose share is whole."""
    mine = scatter(torch.nn.functional.pad(x[:5], (0, 0, 0, 1)), WORLD)
    return gather(llama(r + mine, w, 1e-6), WORLD)[:5]


def padded_rows(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    """Uneven rows of the second dimension, as DTensor cuts, pads and joins them, on the first rank."""
    first, second = x.view(2, 3, HIDDEN).split(2, 1)
    rows = torch.cat([first, torch.nn.functional.pad(second, (0, 0, 0, 1))], 1)
    return gather(llama(r.view(2, 2, HIDDEN) + scatter(rows, WORLD, 1), w, 1e-6), WORLD, 1)[:, :3]


def zeros_behind(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    rows = torch.cat([x[:5], torch.zeros(1, HIDDEN, dtype=x.dtype)])
    return gather(llama(r + scatter(rows, WORLD), w, 1e-6), WORLD)[:5]


def other_world(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return gather(llama(r[:2] + scatter(x, 3), w, 1e-6), 3)


def read_before_the_wait(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    pending = c10d.reduce_scatter_tensor(x, "sum", WORLD, "0")
    early = pending + 1
    return gather(llama(r + c10d.wait_tensor(pending), w, 1e-6), WORLD), early


def coalesced(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    (mine,) = c10d.reduce_scatter_tensor_coalesced([x], "sum", WORLD, "0")
    return gather(llama(r + c10d.wait_tensor(mine), w, 1e-6), WORLD)


def both_codes(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    norm = llama(r + scatter(x, WORLD), w, 1e-6)
    return gather(static(norm), WORLD), gather(q.int8_token(norm)[0], WORLD)


def codes_twice(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    codes = static(llama(r + scatter(x, WORLD), w, 1e-6))
    return gather(codes, WORLD), gather(codes, WORLD).float()


def scales_in_tiles(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    register_vllm()
    norm = llama(r + scatter(x, WORLD), w, 1e-6)
    codes, scales = torch.ops._C.scaled_fp4_quant(norm, torch.ones(1), True)
    return gather(codes, WORLD), gather(scales, WORLD)


def rows_then_columns(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    """vLLM's ops, along one dimension there and along another back."""
    register_vllm()
    mine = torch.ops.vllm.reduce_scatter(x.view(4, 3, HIDDEN), 0, WORLD, "0")
    return torch.ops.vllm.all_gather(llama(mine, w, 1e-6), 1, WORLD, "0")


def hidden_scattered(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return torch.ops.vllm.all_gather(llama(torch.ops.vllm.reduce_scatter(x, 1, WORLD, "0"), w, 1e-6), 1, WORLD, "0")


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (shard_only, "without an all-gather: only this rank's rows of the norm are used"),
        (shard_as_well, "as well as gathered"),
        (codes_as_well, "as well as gathered"),
        (other_shape, "in another shape"),
        (other_order, "(aten.relu|aten.clone|aten.permute).*without an all-gather"),
        (other_group, "over another group"),
        (both_codes, "is gathered as well as"),
        (codes_twice, "is gathered more than once"),
        (scales_in_tiles, "scales laid out as SWIZZLED_128X4, are gathered: only rows can be"),
        (rows_then_columns, "puts rows in another order than the reduce-scatter deals them out in"),
        (other_world, "scatters to 3 ranks, and the group has 2"),
        (average, "reduces by 'avg'"),
        (read_before_the_wait, "is read by .*aten.add.* before it is waited for"),
        (coalesced, "reduces several tensors at once"),
        (padded, "aten.slice.Tensor"),
        (padded_first, "aten.constant_pad_nd.*the ranks share the tokens unevenly"),
        (padded_rows, "aten.constant_pad_nd.*the ranks share the tokens unevenly"),
        (zeros_behind, "aten.full.*the ranks share the tokens unevenly"),
    ],
)
def test_refused(fn: Any, words: str) -> None:
    """Left alone, node for node, with the true reason."""
    twelve = ((12, HIDDEN), (6, HIDDEN), (HIDDEN,))
    shapes = {other_order: twelve, rows_then_columns: twelve, padded_rows: ((6, HIDDEN), (4, HIDDEN), (HIDDEN,))}
    assert re.search(words, reason(fn, ON, *shapes.get(fn, ()))), words


def test_a_norm_that_quantises() -> None:
    """vLLM's norm that gives codes alone: those are gathered, and there is no norm to gather."""
    register_vllm()

    def fn(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        codes = torch.empty(3, HIDDEN, dtype=torch.float8_e4m3fn)
        torch.ops._C.rms_norm_static_fp8_quant(codes, scatter(x, WORLD), w, s, 1e-6)
        return gather(codes, WORLD)

    inputs = [torch.randn(*ROWS).bfloat16(), torch.ones(HIDDEN).bfloat16(), torch.ones(1)]
    module = captured(fn, inputs)
    fused, report = fused_copy(module, ON)
    assert [site.pattern for site in report.sites] == ["ReduceScatterRMSNormStaticQuantFP8AllGather"], str(report)
    check_same(module, fused)


def test_columns_of_symbolic_length() -> None:
    """vLLM's op along the second dimension of a symbolic number of rows: no block that the call could be given."""
    register_vllm()

    def fn(x: Tensor, w: Tensor) -> Tensor:
        norm = llama(torch.ops.vllm.reduce_scatter(x, 1, WORLD, "0"), w, 1e-6)
        return torch.ops.vllm.all_gather(norm, 1, WORLD, "0")

    module = trace(fn, *symbolic((2, "s", HIDDEN), (HIDDEN,)))
    assert "scatters a dimension of symbolic length" in str(check_unchanged(module, ON).sites[0].reason)


@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("group", ["0", "nobody's"])
def test_no_norm_behind(op: str, group: str) -> None:
    """A reduce-scatter behind which no norm stands is no site, whatever else speaks against it: a gradient's, say."""
    module = traced(lambda x, r, w: (r * w + scatter(x, WORLD, group=group, op=op)).relu())
    assert not check_unchanged(module, ON).sites


def test_refused_hidden() -> None:
    """vLLM's op along the hidden size: the norm reads a part of each row."""
    register_vllm()
    module = traced(hidden_scattered, ROWS, SHARD, (HIDDEN // 2,))
    assert "scatters the last dimension" in str(check_unchanged(module, ON).sites[0].reason)


def test_quantisers_off() -> None:
    """Codes that are gathered cannot be left to the graph."""
    fn = lambda x, r, w: gather(static(llama(r + scatter(x, WORLD), w, 1e-6)), WORLD)  # noqa: E731
    assert "quantisers=False" in reason(fn, dataclasses.replace(ON, quantisers=False))


def test_beside_all_reduces() -> None:
    """A graph with both kinds: each site is what it is, and no chain of sharded residuals has a reduce-scatter."""

    def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        whole, mine = block(x, r, w, WORLD, llama)
        total = whole + reduce(x)
        return llama(total, w, 1e-6), total, mine

    check(traced(fn), ADD, "AllReduceFusedAddRMSNorm")


def test_no_part_in_the_mark() -> None:
    """Ranks whose reduce-scatters are left alone, and may differ, still agree on what they fused."""

    def marks(fn: Callable[..., Any]) -> list[Any]:
        fused, _ = fused_copy(traced(fn))
        return [call.kwargs["flags"] for call in fused.graph.find_nodes(op="call_function", target=FUSED)]

    def alone(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return llama(reduce(x), w, 1e-6)

    def beside(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return alone(x, r, w), gather(scatter(x, WORLD).relu(), WORLD)

    assert marks(alone) == marks(beside) != []


def test_what_is_sent_is_in_the_mark() -> None:
    """Ranks send one another the rows that they write of all tokens, so those have to be the same ones; who reads a
    rank's own rows as well is its own affair."""

    def marked(*read: int) -> int:
        def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            whole, mine = block(x, r, w, WORLD, llama)
            values = (static(whole), whole, mine)
            return tuple(values[index] for index in read)

        (call,) = fused_copy(traced(fn))[0].graph.find_nodes(op="call_function", target=FUSED)
        return mark_in(call.kwargs["flags"])

    assert marked(0) == marked(0, 2) != marked(0, 1) == marked(0, 1, 2)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    share=st.integers(1, 4),
    dim=st.sampled_from([0, 1]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    norm=st.sampled_from([llama, torch_norm, gemma]),
    quantise=st.sampled_from([None, static, q.token, q.group]),
    wide=st.booleans(),
    factor=st.sampled_from((None, 0.22, "rows")),
    seed=st.integers(0, 3),
)
def test_any(
    batch: int, share: int, dim: int, dtype: torch.dtype, norm: Any, quantise: Any, wide: bool, factor: Any, seed: int
) -> None:
    """Any shape, dtype, norm, quantiser and factor: one fused call, the same bits."""
    shape = [batch, 2 * share, HIDDEN] if dim else [2 * batch, share, HIDDEN]

    def fn(x: Tensor, r: Tensor, w: Tensor) -> Any:
        mine = scatter(x, WORLD, dim)
        if factor is not None:
            mine = mine * (r[..., :1].to(dtype).sigmoid() if factor == "rows" else factor)
        total = r + mine
        whole = gather(norm(total, w, 1e-5).to(dtype), WORLD, dim)
        parts = whole if quantise is None else quantise(whole.view(-1, HIDDEN))
        return (*(parts if isinstance(parts, tuple) else (parts,)), total)

    own = [batch, share, HIDDEN]
    x, w = tensors(shape, (HIDDEN,), dtype=dtype)
    (r,) = tensors(own, dtype=torch.float32 if wide else dtype)
    module = trace(fn, x, r, w)
    fused, report = fused_copy(module, ON)
    assert report.matched_count == 1, str(report)
    check_same(module, fused, seed)
