"""Residual chains: which calls are marked, and that nothing depends on rows of a residual that a rank does not own."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx

import arfusion_pass as arf
from arfusion_pass.ops.marks import mark_in
from arfusion_pass.ops.spec import SHARDED_FLAGS, Flags
from arfusion_pass.patterns.chains import auto_functionalized
from arfusion_pass.reporting.tables import report_table
from tests import moe_cases
from tests import quant_cases as q
from tests.models import fp32_result, gemma, llama, reduce, torch_norm
from tests.printed_graphs import PrintedGraph
from tests.sharded import check_sharded
from tests.simulate import STRICT, fake_world, fused_copy, random_inputs, run, symbolic, tensors, trace

Tensor = torch.Tensor
GRAPHS = pathlib.Path(__file__).parents[1] / "graphs"
HIDDEN = q.HIDDEN
IN, OUT = Flags.RESIDUAL_IN_SHARDED, Flags.RESIDUAL_OUT_SHARDED


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with fake_world(3):
        yield


def block(x: Tensor, r: Tensor, w: Tensor, norm: Callable[..., Tensor] = llama) -> tuple[Tensor, Tensor]:
    total = r + reduce(x)
    return norm(total, w, 1e-6), total


def marks(module: fx.GraphModule) -> list[Flags]:
    """The chain's flags of each fused call, in graph order."""
    nodes = module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.auto_functionalized)
    return [Flags(node.kwargs["flags"]) & SHARDED_FLAGS for node in nodes]


def traced(fn: Callable[..., Any], tokens: int | str = 7) -> fx.GraphModule:
    make: Any = symbolic if isinstance(tokens, str) else tensors
    return trace(fn, *make((tokens, HIDDEN), (tokens, HIDDEN), (HIDDEN,)))


def fused_marks(fn: Callable[..., Any], config: arf.FusionConfig = STRICT, tokens: int | str = 7) -> list[Flags]:
    """Fuse ``fn(x, residual, weight)``, check it sharded, and give its calls' marks."""
    module = traced(fn, tokens)
    fused, report = fused_copy(module, config)
    assert not report.missed
    inputs = random_inputs(module, tokens=7)
    check_sharded(fused, run(module, inputs), inputs)
    found = marks(fused)
    assert [site.chain is not None for site in report.sites] == [bool(mark) for mark in found]
    return found


def stack(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """A chain whose last residual nobody reads."""
    h, codes = x, x
    for _ in range(4):
        h, r = block(h, r, w)
        codes, s = q.token(h)
        h = codes.to(x.dtype) * s.to(x.dtype)
    return codes, h


def test_a_whole_stack_is_one_chain() -> None:
    assert fused_marks(stack) == [OUT, IN | OUT, IN | OUT, IN]
    assert fused_marks(stack, tokens="s") == [OUT, IN | OUT, IN | OUT, IN]


def test_the_report_says_which_chain_and_how_long() -> None:
    _, report = fused_copy(traced(stack))
    assert [(site.chain, site.chain_length) for site in report.sites] == [(1, 4)] * 4
    assert " chain " in report_table([report], width=240)


def test_a_chain_s_mark_follows_what_its_calls_write() -> None:
    """An owner sends what its call writes, so ranks have to write alike there; who finishes rows by itself may write
    what it likes."""

    def chain(statistic: bool) -> Callable[..., Any]:
        def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            h, r = block(x, r, w)
            h, _ = block(q.static_div(h, w.amax()).to(h.dtype), r, w)
            return (q.static_div(h, w.amax()), *([h] if statistic else []))

        return fn

    def compared(config: arf.FusionConfig) -> set[int]:
        fused = [fused_copy(traced(chain(statistic)), config)[0] for statistic in (False, True)]
        nodes = [module.graph.find_nodes(op="call_function", target=auto_functionalized) for module in fused]
        assert [len(calls) for calls in nodes] == [2, 2]
        return {mark_in(calls[0].kwargs["flags"]) for calls in nodes}

    assert len(compared(STRICT)) == 2
    assert len(compared(dataclasses.replace(STRICT, strategy="twoshot"))) == 1


def test_two_chains_in_one_graph() -> None:
    """A residual that is read in the middle ends one chain; the next begins with a whole residual."""

    def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h, r = block(x, r, w)
        h, r = block(h, r, w)
        h, r = block(q.static_div(h, w.amax()).to(h.dtype), r, w)
        skipped = r.relu()
        h, r = block(q.static_div(h, w.amax()).to(h.dtype), r, w)
        h, r = block(q.static_div(h, w.amax()).to(h.dtype), r, w)
        h, r = block(q.static_div(h, w.amax()).to(h.dtype), r, w)
        return skipped, q.static_div(h, w.amax())

    module = traced(fn)
    fused, report = fused_copy(module)
    assert [site.chain for site in report.sites] == [None, None, None, 1, 1, 1]
    assert marks(fused) == [0, 0, 0, OUT, IN | OUT, IN]
    inputs = random_inputs(module)
    check_sharded(fused, run(module, inputs), inputs)


ENDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "an output": lambda r, h: r,
    "a second reader": lambda r, h: r.relu(),
    "a view": lambda r, h: r.reshape(-1),
    "a part of it": lambda r, h: r[:1].clone(),
    "a step across rows": lambda r, h: r.amax(0),
    "a product": lambda r, h: h.t() @ r,
}


@pytest.mark.parametrize("name", ENDS)
def test_another_reader_ends_a_chain(name: str) -> None:
    """Behind three calls whose residual is read, only the other three are a chain."""

    def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Any, ...]:
        h, r = block(x, r, w)
        extra = ENDS[name](r, h)
        for _ in range(3):
            h, r = block(q.static_div(h, w.amax()).to(h.dtype), r, w)
        return extra, q.static_div(h, w.amax())

    assert fused_marks(fn) == [0, OUT, IN | OUT, IN]


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "an addend": lambda r, x: r + x,
    "a bias": lambda r, x: r + x[0],
    "a function": lambda r, x: torch.tanh(r),
    "a factor": lambda r, x: r * 0.5,
    "a view and back": lambda r, x: r.view(1, *r.shape).neg().view(r.shape),
    "itself": lambda r, x: r + r,
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_within_rows_keep_a_chain(name: str) -> None:
    def fn(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        h = x
        for _ in range(3):
            h, r = block(q.static_div(h, w.amax()).to(h.dtype), r, w)
            r = STEPS[name](r, x)
        h, _ = block(h, r, w)
        return q.static_div(h, w.amax())

    assert fused_marks(fn) == [OUT, IN | OUT, IN | OUT, IN]


BREAKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rows mixed": lambda r, x: r.flip(0),
    "columns mixed": lambda r, x: r.view(-1, 2, HIDDEN // 2).transpose(1, 2).reshape(r.shape),
    "normalised over tokens": lambda r, x: r.softmax(0),
    "multiplied": lambda r, x: r @ (x.t() @ x),
}


@pytest.mark.parametrize("name", BREAKS)
def test_other_steps_end_a_chain(name: str) -> None:
    def fn(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        h, r = block(x, r, w)
        r = BREAKS[name](r, x)
        for _ in range(3):
            h, r = block(q.static_div(h, w.amax()).to(h.dtype), r, w)
        return q.static_div(h, w.amax())

    assert fused_marks(fn) == [0, OUT, IN | OUT, IN]


def pair(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Two FP8 calls and the residual: one code and one code beside the residual, or twice the residual."""
    h, r = block(x, r, w)
    h, r = block(q.static_div(h, w.amax()).to(h.dtype), r, w)
    return q.static_div(h, w.amax()), r


@pytest.mark.parametrize("kind", ["finalize", "reduce"])
def test_moe_prologues_are_members(kind: str) -> None:
    """Experts' rows in front of a member's all-reduce, the residual's dtype and rows as in its neighbours."""

    def fn(x: Tensor, r: Tensor, w: Tensor, index: Tensor, router: Tensor) -> Tensor:
        h = x
        for number in range(3):
            h = q.static_div(h, w.amax()).to(h.dtype)
            if number == 1 and kind == "finalize":
                h = moe_cases.weighted(h, index, router, h)
            elif number == 1:
                h = moe_cases.REDUCE["reduced_token"](torch.stack([h, h.neg()]), router.t(), h)
            h, r = block(h, r, w)
        return q.static_div(h, w.amax())

    sizes = ((7, HIDDEN), (7, HIDDEN), (HIDDEN,))
    module = trace(fn, *tensors(*sizes), torch.zeros(7, 2, dtype=torch.int64), *tensors((7, 2)))
    fused, report = fused_copy(module)
    assert [site.chain_length for site in report.sites] == [3] * 3, str(report)
    assert "MoE" in str(report.sites[1].pattern)
    inputs = random_inputs(module)
    inputs[3] = torch.randint(0, 7, (7, 2))
    check_sharded(fused, run(module, inputs), inputs)


def test_what_does_not_pay_is_left_replicated() -> None:
    """Bytes of a token: 256 + 256 + 512 sharded are no fewer than 512 + 512; with an fp32 norm they are more."""
    assert fused_marks(pair) == [0, 0]

    def wide(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        for _ in range(3):
            total = r + reduce(x)
            h, r = fp32_result(total, w, 1e-6), total
            x = h.sin().to(x.dtype)
        return h

    assert fused_marks(wide) == [0, 0, 0]


@pytest.mark.parametrize("change", [{"backend": "flashinfer"}, {"strategy": "oneshot"}, {"strategy": "twoshot"}])
def test_what_decides_otherwise_gets_no_marks(change: dict[str, Any]) -> None:
    fused, _ = fused_copy(traced(stack), dataclasses.replace(STRICT, **change))
    assert not any(marks(fused))


def test_forced() -> None:
    """``strategy="sharded"`` says so in every call; where it is allowed is the graph's matter as before."""
    config = dataclasses.replace(STRICT, strategy="sharded")
    fused, _ = fused_copy(traced(stack), config)
    nodes = fused.graph.find_nodes(op="call_function", target=torch.ops.higher_order.auto_functionalized)
    assert all(node.kwargs["flags"] & Flags.SHARDED for node in nodes)
    assert marks(fused) == [OUT, IN | OUT, IN | OUT, IN]


def test_two_groups_are_no_chain() -> None:
    """Each group decides for itself, and who owns a token differs with the number of ranks."""
    world = torch.distributed.group.WORLD
    assert world is not None
    arf.register_group("other", world)

    def fn(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        h, r = block(x, r, w)
        return llama(r + reduce(h, "other"), w, 1e-6)

    assert fused_marks(fn) == [0, 0]


@pytest.mark.parametrize("name", ["f_dtensor_llama_dynamic", "f_dtensor_nnrms_static", "f_hf_tpplan_llama"])
def test_real_models(name: str) -> None:
    """Two layers of DTensor's and of transformers' Llama: all sites with a residual are one chain."""
    module = PrintedGraph((GRAPHS / f"{name}.txt").read_text()).module()
    fused, report = fused_copy(module)
    assert [site.chain_length for site in report.sites if "FusedAdd" in str(site.pattern)] == [4] * 4
    for node in module.graph.find_nodes(op="placeholder"):
        node.meta["val"] = 0 if node.meta["val"] is None else node.meta["val"]  # a device mesh, which nobody reads
    drawn = random_inputs(module, tokens=7)
    inputs = [v.abs() if isinstance(v, torch.Tensor) and not v.dtype.is_floating_point else v for v in drawn]
    check_sharded(fused, run(module, inputs), inputs)


# Random chains --------------------------------------------------------------------------------------------------------

NORMS = {"torch": torch_norm, "llama": llama, "gemma": gemma}
QUANTISERS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "static": lambda h: (q.static_div(h, h.new_tensor(0.37)),),
    "token": q.token,
    "group": q.group,
    "group_32": q.group_32,
    "int8": q.int8_token,
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One site of a random graph; every field as drawn."""

    norm: str
    quantiser: str
    norm_read: bool
    residual_read: str
    step: str


LAYERS = st.lists(
    st.builds(
        Layer,
        norm=st.sampled_from(list(NORMS)),
        quantiser=st.sampled_from(["", "", *QUANTISERS]),
        norm_read=st.sampled_from((False, False, True)),
        residual_read=st.sampled_from(("",) * 12 + tuple(ENDS)),
        step=st.sampled_from(("",) * 6 + (*STEPS, *BREAKS)),
    ),
    min_size=2,
    max_size=8,
)


class Program:
    """Drawn layers as a function of ``(x, residual, weight)``."""

    def __init__(self, layers: list[Layer], residual_out: bool, wide: bool) -> None:
        self.layers, self.residual_out, self.wide = layers, residual_out, wide

    def __call__(self, x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        h, r = x, r.float() if self.wide else r
        for layer in self.layers:
            y = reduce(h)
            total = r + y
            n = NORMS[layer.norm](total, w.to(total.dtype), 1e-5).to(x.dtype)
            h = torch.tanh(n) if layer.norm_read or not layer.quantiser else x
            if layer.quantiser:
                codes, *scales = QUANTISERS[layer.quantiser](n)
                outputs += [codes, *scales]
                h = h + codes.to(x.dtype) * (scales[0].amax().to(x.dtype) if scales else 0.5)
            r = total
            if layer.residual_read:
                outputs.append(ENDS[layer.residual_read](r, n.to(r.dtype)))
            if layer.step:
                r = {**STEPS, **BREAKS}[layer.step](r, x.to(r.dtype))
        return (*outputs, h, *([r] if self.residual_out else []))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layers=LAYERS, residual_out=st.booleans(), wide=st.booleans(), dynamic=st.booleans())
def test_random_chains(layers: list[Layer], residual_out: bool, wide: bool, dynamic: bool) -> None:
    """Contract *sound*: with NaN in every row that a rank need not have, all ranks have the unfused graph's bits."""
    make: Any = symbolic if dynamic else tensors
    rows = ("tokens" if dynamic else 7, HIDDEN)
    module = trace(Program(layers, residual_out, wide), *make(rows, rows, (HIDDEN,)))
    fused, report = fused_copy(module)
    for tokens in (7, 2) if dynamic else (7,):  # fewer tokens than ranks, too: one owns none
        inputs = random_inputs(module, tokens=tokens)
        check_sharded(fused, run(module, inputs), inputs, f"{tokens} tokens\n{report}")
