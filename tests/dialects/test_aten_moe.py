"""MoE combinations in plain torch in front of an all-reduce: which fuse with it, and what keeps one out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import moe_cases
from tests.models import Tensor, llama, reduce
from tests.simulate import captured, check_fused, fused_copy, run, trace

TOKENS, ROWS, SLOTS, HIDDEN, EPS = 6, 9, 4, 32, 1e-6

pytestmark = pytest.mark.usefixtures("world")


def finalize_inputs(dtype: torch.dtype) -> list[Tensor]:
    """permuted, index (with -1 and -2 in it), weights, shared, residual and weight."""
    generator = torch.Generator().manual_seed(3)

    def rand(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    index = torch.randint(-1, ROWS, (TOKENS, SLOTS), generator=generator)
    index[0, 0], index[1, 1] = -1, -2
    rows = [rand(TOKENS, HIDDEN) for _ in range(2)]
    return [rand(ROWS, HIDDEN), index, rand(TOKENS, SLOTS), *rows, rand(HIDDEN)]


def in_front(combine: moe_cases.Combine) -> Callable[..., Any]:
    def model(p: Tensor, index: Tensor, weights: Tensor, shared: Tensor, r: Tensor, w: Tensor) -> Any:
        total = r + reduce(combine(p, index, weights, shared))
        return llama(total, w, EPS), total

    return model


def fused(model: Callable[..., Any], inputs: list[Tensor]) -> list[str | None]:
    """The patterns that a compiled model's sites become; the outputs agree bit for bit on ``inputs``."""
    module = captured(model, inputs)
    copy, report = fused_copy(module)
    left, given = list(inputs), []
    for node in module.graph.find_nodes(op="placeholder"):  # in order of first use
        value = node.meta["val"]
        matching = (i for i, x in enumerate(left) if (x.dtype, x.shape) == (value.dtype, value.shape))
        given.append(left.pop(next(matching)))
    for a, b in zip(run(module, given), run(copy, given), strict=True):
        assert torch.equal(a, b), str(report)
    return [site.pattern for site in report.sites]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", moe_cases.FINALIZE)
def test_finalize(name: str, dtype: torch.dtype) -> None:
    """Each spelling is one call with the all-reduce, to the same bits, negative indices included."""
    model = in_front(moe_cases.FINALIZE[name])
    assert fused(model, finalize_inputs(dtype)) == ["MoEFinalizeAllReduceFusedAddRMSNorm"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", moe_cases.REDUCE)
def test_reduce(name: str, dtype: torch.dtype) -> None:
    """The sum over local experts, with and without the token's own input."""

    def model(experts: Tensor, scales: Tensor, token: Tensor, w: Tensor) -> Any:
        return llama(reduce(moe_cases.REDUCE[name](experts, scales, token)), w, EPS)

    inputs = [torch.randn(shape).to(dtype) for shape in ((3, TOKENS, HIDDEN), (3, TOKENS), (TOKENS, HIDDEN), (HIDDEN,))]
    assert fused(model, inputs) == ["MoEReduceAllReduceRMSNorm"]


def permuted_weights(p: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    return (p[index] * weights.flip(1).unsqueeze(-1)).sum(1) * weights.amax(1, keepdim=True)


def averaged(p: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    return (p[index] * weights.unsqueeze(-1)).mean(1)


def masked_elsewhere(p: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    return torch.where((index >= 1).unsqueeze(-1), p[index.clamp(min=0)] * weights.unsqueeze(-1), 0.0).sum(1)


def masked_to_one(p: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    return torch.where((index >= 0).unsqueeze(-1), p[index.clamp(min=0)] * weights.unsqueeze(-1), 1.0).sum(1)


def clamped_above(p: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    return torch.where((index >= 0).unsqueeze(-1), p[index.clamp(min=0, max=3)] * weights.unsqueeze(-1), 0.0).sum(1)


def some_slots(p: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    return p[index[:, 0]] * weights[:, 0:1] + p[index[:, 1]] * weights[:, 1:2]


def slots_in_another_order(p: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    total = p[index[:, 1]] * weights[:, 1:2]
    for k in (0, 2, 3):
        total = total + p[index[:, k]] * weights[:, k : k + 1]
    return total


def another_slot_weight(p: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    total = p[index[:, 0]] * weights[:, 1:2]
    for k in range(1, SLOTS):
        total = total + p[index[:, k]] * weights[:, k : k + 1]
    return total


def columns_weighted(p: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    return (p[index] * shared.unsqueeze(1)).sum(1)


def factor_by_row(p: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    return (p[index] * weights.unsqueeze(-1)).sum(1) * shared[:, :1]


LOOK_ALIKES = (
    permuted_weights,
    averaged,
    masked_elsewhere,
    masked_to_one,
    clamped_above,
    some_slots,
    slots_in_another_order,
    another_slot_weight,
    columns_weighted,
    factor_by_row,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("combine", LOOK_ALIKES, ids=lambda combine: combine.__name__)
def test_look_alikes(combine: moe_cases.Combine, dtype: torch.dtype) -> None:
    """What is no such combination stays in front of a fused all-reduce."""
    assert fused(in_front(combine), finalize_inputs(dtype)) == ["AllReduceFusedAddRMSNorm"]


def one_weight_an_expert(x: Tensor, scales: Tensor) -> Tensor:
    return (x * scales[:, :1].unsqueeze(-1)).sum(0)


def one_weight_a_token(x: Tensor, scales: Tensor) -> Tensor:
    return (x * scales[:1].unsqueeze(-1)).sum(0)


def scales_of_another_order(x: Tensor, scales: Tensor) -> Tensor:
    return (x * scales.t().reshape(*scales.shape, 1)).sum(0)


def one_row_an_expert(x: Tensor, scales: Tensor) -> Tensor:
    return (x[:, :1] * scales.unsqueeze(-1)).sum(0)


def one_weight_a_slot(x: Tensor, scales: Tensor) -> Tensor:
    index = scales.float().abs().mul(9).long() % x.shape[1]
    total = x[0][index[0]] * scales[:1, 0].reshape(1, 1)
    for k in range(1, scales.shape[0]):
        total = total + x[0][index[k]] * scales[:1, k].reshape(1, 1)
    return total


BROADCAST = (
    one_weight_an_expert,
    one_weight_a_token,
    scales_of_another_order,
    one_row_an_expert,
    one_weight_a_slot,
)


@pytest.mark.parametrize("dynamic", [None, TOKENS])
@pytest.mark.parametrize("combine", BROADCAST, ids=lambda combine: combine.__name__)
def test_broadcast(combine: Callable[[Tensor, Tensor], Tensor], dynamic: int | None) -> None:
    """Scales or rows that broadcast are no operands of the fused op: the combination stays in front of it."""

    def model(x: Tensor, scales: Tensor, w: Tensor) -> Any:
        return llama(reduce(combine(x, scales)), w, EPS)

    inputs = [torch.randn(SLOTS, TOKENS, HIDDEN), torch.rand(SLOTS, TOKENS), torch.ones(HIDDEN)]
    if dynamic is None:
        assert fused(model, inputs) == ["AllReduceRMSNorm"]
    else:
        _, report = fused_copy(captured(model, inputs, dynamic))
        assert [site.pattern for site in report.sites] == ["AllReduceRMSNorm"]


def test_read_by_others() -> None:
    """A combination that others read as well is not computed inside the call."""

    def model(p: Tensor, index: Tensor, weights: Tensor, shared: Tensor, r: Tensor, w: Tensor) -> Any:
        x = moe_cases.weighted(p, index, weights, shared)
        return llama(r + reduce(x), w, EPS), x

    def partly(p: Tensor, index: Tensor, weights: Tensor, shared: Tensor, r: Tensor, w: Tensor) -> Any:
        product = p[index] * weights.unsqueeze(-1)
        return llama(r + reduce(product.sum(1)), w, EPS), product

    for each in (model, partly):
        assert fused(each, finalize_inputs(torch.bfloat16)) == ["AllReduceFusedAddRMSNorm"]


def test_written_over() -> None:
    """Contract *sound*: what a combination's tensor was overwritten with is no combination."""

    def model(p: Tensor, index: Tensor, weights: Tensor, shared: Tensor, r: Tensor, w: Tensor) -> Any:
        x = moe_cases.weighted(p, index, weights, shared)
        return llama(r + reduce(torch.ops.aten.copy(x, shared)), w, EPS)

    module = trace(model, *finalize_inputs(torch.bfloat16))
    report = check_fused(module, 1)
    assert [site.pattern for site in report.sites] == ["AllReduceFusedAddRMSNorm"]
