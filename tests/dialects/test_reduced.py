"""What may stand around an all-reduce and computes nothing: waits, views, copies, casts there and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import fx
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from tests import simulate
from tests.models import Tensor, llama, reduce
from tests.simulate import STRICT, c10d, captured, check_fused, check_unchanged, copied, tensors, trace

aten = torch.ops.aten
BATCH, TOKENS, HIDDEN, INNER = 2, 6, 32, 16

pytestmark = pytest.mark.usefixtures("world")


def inputs(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """``x``, the row-parallel weight, the residual, gamma."""
    return tensors((BATCH, TOKENS, INNER), (HIDDEN, INNER), (BATCH, TOKENS, HIDDEN), (HIDDEN,), dtype=dtype)


def ending(y: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    total = r + y
    return llama(total, g, 1e-6), total


# Views ---------------------------------------------------------------------------------------------------------------


def einsum(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = torch.einsum("bsk,hk->bsh", x, w)
    dist.all_reduce(y)
    return ending(y, r, g)


def matrix_times_vector(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = torch.bmm(w.expand(BATCH, HIDDEN, INNER), x[:, :1].transpose(1, 2))
    dist.all_reduce(y)  # [B, H, 1]
    return ending(y.squeeze(-1), r[:, 0], g)


def squeezed(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = torch.bmm(w.expand(BATCH, HIDDEN, INNER), x[:, :1].transpose(1, 2)).squeeze(-1)
    dist.all_reduce(y)
    return ending(y, r[:, 0], g)


def flat(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = F.linear(x, w)
    dist.all_reduce(y.view(-1))
    return ending(y, r, g)


def flat_rows(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = F.linear(x, w)
    rows = y.flatten(1)
    dist.all_reduce(rows)
    return *ending(y, r, g), rows


def heads(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return ending(reduce(F.linear(x, w).view(BATCH, -1, 4, HIDDEN // 4)).view(r.shape), r, g)


def first_of_one(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return ending(reduce(F.linear(x[:1], w)[0]), r[:1], g)


def residual_without_batch(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return ending(reduce(F.linear(x[:1], w)), r[0], g)


def one_chunk(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    (y,) = torch.chunk(reduce(F.linear(x, w)), 1)
    return ending(y, *r.split(BATCH), g)


def unbound(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    (total,) = (r[:1] + reduce(F.linear(x[:1], w))).unbind()
    return llama(total, g, 1e-6), total


def one_part_reduced(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    (y,) = F.linear(x, w).split_with_sizes([HIDDEN], -1)
    dist.all_reduce(y)
    return ending(y, r, g)


VIEWED = [
    einsum,
    matrix_times_vector,
    squeezed,
    flat,
    flat_rows,
    heads,
    first_of_one,
    residual_without_batch,
    one_chunk,
    unbound,
    one_part_reduced,
]


@pytest.mark.parametrize("dynamic", [None, TOKENS], ids=["static", "dynamic"])
@pytest.mark.parametrize("model", VIEWED, ids=lambda model: model.__name__)
def test_views(model: Callable[..., Any], dynamic: int | None) -> None:
    """Contract *exact*: through another last dimension and back to the same rows, and with leading dimensions of 1."""
    check_fused(captured(model, inputs(), dynamic=dynamic), 1)


def test_list_of_one_part() -> None:
    """Contract *exact*: a list of the whole sum that others read as well stays, and holds what the kernel writes."""

    def model(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        total = r + reduce(F.linear(x, w))
        parts = torch.split(total, TOKENS, 1)
        return llama(parts[0], g, 1e-6), torch.cat([*parts, parts[0]])

    check_fused(trace(model, *inputs()), 1)


def test_rows_that_move() -> None:
    """A transposition moves rows: what the norm reads has another order than what is reduced."""

    def model(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return ending(reduce(F.linear(x, w)).transpose(0, 1), r.transpose(0, 1), g)

    check_unchanged(captured(model, inputs()))


def permuted(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return ending(reduce(F.linear(x, w).permute(2, 0, 1)).permute(1, 2, 0), r, g)


def permuted_copy(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = F.linear(x, w).transpose(0, 1).contiguous()
    dist.all_reduce(y)
    return ending(y.transpose(0, 1), r, g)


@pytest.mark.parametrize("model", [permuted, permuted_copy], ids=lambda model: model.__name__)
def test_permuted_and_back(model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract *exact*: ranks are summed element by element, so the order that a sum is taken in and out of is none."""
    monkeypatch.setattr(simulate, "all_reduce", lambda x, group: x + x * 0.5)  # the other one moves elements
    check_fused(captured(model, inputs()), 1)


def test_permuted_another_way() -> None:
    """Contract *sound*: what is read in another order than it had is not the tensor itself."""

    def model(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        y = F.linear(x, w).view(2, 3, 2, HIDDEN)
        back = reduce(y.permute(1, 2, 0, 3)).permute(1, 2, 0, 3)
        return ending(back.reshape(r.shape), r, g)

    check_unchanged(captured(model, inputs()))


# Waits and copies ----------------------------------------------------------------------------------------------------


def wait(y: Tensor) -> Tensor:
    return c10d.wait_tensor(y)


def waited_twice(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = reduce(F.linear(x, w))
    return *ending(wait(y), r, g), y


def waited_apart(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = c10d.all_reduce(F.linear(x, w), "sum", "0")
    first, second = wait(y), wait(y)
    return *ending(second, r, g), first


def waited_as_rows(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = wait(reduce(F.linear(x, w)))
    return *ending(wait(y.view(-1, HIDDEN)).view(r.shape), r, g), y


def copied_back(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = F.linear(x, w)
    return ending(aten.copy(y, reduce(y)), r, g)  # as functionalisation leaves dist.all_reduce


@pytest.mark.parametrize("model", [waited_twice, waited_apart, waited_as_rows, copied_back], ids=lambda m: m.__name__)
def test_waits(model: Callable[..., Any]) -> None:
    """A further wait gives the same tensor, and no wait is left behind; so does the copy of an all-reduce in place."""
    check_fused(trace(model, *inputs()), 1)


# In place ------------------------------------------------------------------------------------------------------------


def in_place(fn: Callable[..., Any], by_name: bool = False) -> fx.GraphModule:
    """A graph whose in-place all-reduces stay; with ``by_name`` the sum is read from the tensor that was written to."""
    module = make_fx(fn, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs())
    if by_name:
        (call,) = module.graph.find_nodes(op="call_function", target=c10d.all_reduce_.default)
        (waited,) = call.users
        waited.replace_all_uses_with(call.args[0])
        module.recompile()
    return module


def reduce_(y: Tensor) -> Tensor:
    return wait(c10d.all_reduce_(y, "sum", "0"))


def result_read(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = F.linear(x, w)
    before = y.relu()
    return *ending(reduce_(y), r, g), before


@pytest.mark.parametrize("by_name", [False, True])
def test_in_place(by_name: bool) -> None:
    """``_c10d_functional.all_reduce_``: what it returns, or the tensor that it wrote to, is the sum."""

    def model(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return ending(reduce_(F.linear(x, w)), r, g)

    check_fused(in_place(model, by_name), 1)
    if not by_name:
        check_fused(in_place(result_read), 1)


def test_in_place_read_before_and_after() -> None:
    """Contract *sound*: one name for the partial sum and the whole one."""
    check_unchanged(in_place(result_read, by_name=True))


def an_input(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> Tensor:
    return llama(reduce_(r), g, 1e-6)


def a_view_that_is_returned(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = F.linear(x, w)
    return *ending(reduce_(y.view(-1, HIDDEN)), r.view(-1, HIDDEN), g), y


def another_view(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = F.linear(x, w)
    return *ending(reduce_(y.view(-1, HIDDEN)), r.view(-1, HIDDEN), g), y.relu()


@pytest.mark.parametrize("model", [an_input, another_view, a_view_that_is_returned], ids=lambda model: model.__name__)
def test_in_place_beside_readers(model: Callable[..., Any]) -> None:
    """Contract *sound*: memory that others hold, or see through another view, is written in any case; a functional
    graph has no such."""
    (site,) = check_unchanged(in_place(model)).missed
    assert "make the graph functional" in str(site.advice)


def waited_for_before(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = c10d.all_reduce(F.linear(x, w), "sum", "0")
    first = ending(wait(y), r, g)
    return *first, reduce_(y)


def test_in_place_waited_for_before() -> None:
    """Contract *sound*: a wait in front of an all-reduce in place gives what it was given, not its sum."""
    check_unchanged(in_place(waited_for_before))


# fp32 around 16-bit values -------------------------------------------------------------------------------------------


def in_fp32(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = F.linear(x, w).float()
    dist.all_reduce(y)
    return ending(y.type_as(x), r, g)


def in_fp32_flat(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = F.linear(x, w).float()
    dist.all_reduce(y.view(-1))
    return ending(y.type_as(x), r, g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", [in_fp32, in_fp32_flat], ids=lambda model: model.__name__)
def test_fp32_reduction(model: Callable[..., Any], dtype: torch.dtype) -> None:
    """An fp32 sum of 16-bit values that is only read rounded is what the fused op computes in the 16-bit dtype."""
    report = check_fused(captured(model, inputs(dtype)), 1)
    assert report.fused[0].dtype == str(dtype).removeprefix("torch.")


def fp32_inside(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return ending(reduce(F.linear(x.float(), w.float())).to(x.dtype), r, g)


def fp32_read(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = reduce(F.linear(x, w).float())
    return *ending(y.to(x.dtype), r, g), y.relu()


@pytest.mark.parametrize("model", [fp32_inside, fp32_read], ids=lambda model: model.__name__)
def test_fp32_reduction_that_stays(model: Callable[..., Any]) -> None:
    """Values that are no 16-bit ones, and an fp32 sum that others read, need the fp32 all-reduce."""
    check_unchanged(trace(model, *inputs()))


def test_fp32_sum_behind_it() -> None:
    """DeepSeek-V3.2: reduced in fp32, rounded, and then added and normalised in fp32."""

    def model(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        total = reduce(F.linear(x, w).float()).type_as(x).float() + r.float()
        unit = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (g.float() * unit).to(x.dtype), total.to(x.dtype)

    module = captured(model, inputs())
    folded = torch.__version__.startswith("2.11.")  # which drops a rounding to 16 bits between two casts
    assert check_fused(copied(module), 1, STRICT).fused[0].dtype == ("float32" if folded else "bfloat16")


# Graphs of other back-ends -------------------------------------------------------------------------------------------


def aot_graph(model: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    """What ``aot_module_simplified`` gives a compiler, without Inductor's decompositions."""
    found: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, example_inputs: Any) -> Any:
        found.append(copied(module))
        return module.forward

    def backend(module: fx.GraphModule, example_inputs: Any) -> Any:
        return aot_module_simplified(module, example_inputs, fw_compiler=keep, inference_compiler=keep)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*args)
    return found[0]


def rounded_in_place(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = F.linear(x, w).float()
    dist.all_reduce(y)
    return ending(y.type_as(x), r, g)


def one_op(x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    y = F.linear(x, w)
    dist.all_reduce(y)
    total = r + y
    return F.rms_norm(total, (HIDDEN,), g, 1e-6), total


@pytest.mark.parametrize("model", [rounded_in_place, one_op], ids=lambda model: model.__name__)
def test_other_back_ends(model: Callable[..., Any]) -> None:
    """``aten.copy`` of a sum in place, ``type_as`` with all that it says, and a norm that is one op."""
    check_fused(aot_graph(model, *inputs()), 1)


def test_exported() -> None:
    """Contract *clear*: an exported program fuses once it is functional, and who gives another one is told so."""

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
            return rounded_in_place(x, w, r, g)

    program = torch.export.export(Model(), tuple(inputs()), strict=False)
    check_fused(copied(program.run_decompositions().graph_module), 1)
    report = check_unchanged(copied(program.graph_module))
    assert "run_decompositions" in str(report.missed[0].advice)


def test_eager_collective() -> None:
    """Contract *clear*: a graph traced by ``make_fx`` holds the eager, in-place collective, and the note says so."""
    module = make_fx(rounded_in_place, tracing_mode="fake")(*inputs())
    assert "c10d.allreduce_.default) was traced as it runs eagerly" in str(check_unchanged(module).note)
