"""``FusionConfig(reassociate=True)``: what is moved before an all-reduce computes what a graph written so computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._inductor.decomposition import select_decomp_table

from tests.simulate import (
    STRICT,
    c10d,
    calls,
    check_fused,
    check_same,
    check_unchanged,
    fused_copy,
    random_inputs,
    run,
    symbolic,
    tensors,
    trace,
)

Tensor = torch.Tensor
MOVING = dataclasses.replace(STRICT, reassociate=True)
HIDDEN = 32


pytestmark = pytest.mark.usefixtures("world")


def reduce(x: Tensor, group: str = "0") -> Tensor:
    return c10d.wait_tensor(c10d.all_reduce(x, "sum", group))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


# Each pair: a graph that does not fuse, and the one that it must compute the same bits as.


def scaled(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r + reduce(x) * 0.22
    return norm(total, w), total


def scaled_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r + reduce(x * 0.22)
    return norm(total, w), total


def scaled_before_a_view(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r.view(1, *r.shape) + (0.22 * reduce(x)).view(1, *x.shape), w),)


def divided(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(reduce(x) / 3.0, w),)


def divided_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(reduce(x / 3.0), w),)


def embedding(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    h = 5.65 * reduce(x).view(1, *x.shape)
    return norm(h, w), h + 1


def embedding_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    h = reduce(5.65 * x).view(1, *x.shape)
    return norm(h, w), h + 1


def experts(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r + (reduce(x) + reduce(y))
    return norm(total, w), total


def experts_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r + reduce(x + y)
    return norm(total, w), total


def experts_in_fp32(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Hunyuan's: 16-bit values that are added in fp32 and rounded, as one add in 16 bits does."""
    total = r + (reduce(x).float() + reduce(y).view(1, *y.shape).float().view(y.shape)).to(x.dtype)
    return norm(total, w), total


def experts_in_fp32_as_rows(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """The same where the second one is an addend already, without the setting."""
    rows = r.view(1, *r.shape)
    total = rows + (reduce(x).float() + reduce(y).float()).to(x.dtype).view(rows.shape)
    return norm(total, w), total


def experts_3d(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    rows = r.view(1, *r.shape)
    total = rows + (reduce(y.view(1, *y.shape)) + reduce(x).view(1, *x.shape))
    return norm(total, w), total


def experts_3d_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = (r + reduce(y + x)).view(1, *r.shape)
    return norm(total, w), total


def norm_of_experts(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = reduce(x) + reduce(y)
    return norm(total, w), r + total


def norm_of_experts_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = reduce(x + y)
    return norm(total, w), r + total


def granite_moe(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r.view(1, *r.shape) + 0.22 * (reduce(x) * 2.5 + reduce(y)).view(1, *x.shape), w),)


def granite_moe_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm((r + reduce(0.22 * (x * 2.5 + y))).view(1, *x.shape), w),)


def biased(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r + (reduce(x) + w)
    return norm(total, w), total


def biased_last(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = (r + reduce(x)) + w
    return norm(total, w), total


def biased_alone(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = reduce(x) + w.view(1, HIDDEN)
    return norm(total, w), total


def biased_by_one_element(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r + (reduce(x) + w[:1])
    return norm(total, w), total


def biased_twice(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = (w.exp() + reduce(x)) + w
    return norm(total, w), total


def biased_beside_fp32(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = (reduce(x) + w) + r.float().exp()
    return norm(total, w).to(x.dtype), total


def shared_expert_everywhere(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + (reduce(x) * 2.5 + y), w),)


def shared_expert_everywhere_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + (reduce(x * 2.5) + y), w),)


def shared_expert_as_rows(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r.view(1, *r.shape) + (reduce(x) + y).view(1, *r.shape), w),)


def layer_scale(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r + w * reduce(x)
    return norm(total, w), total


def layer_scale_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r + reduce(w * x)
    return norm(total, w), total


def layer_scale_of_bias(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + w * (reduce(x) + (1.0 + w)), w),)


def layer_scale_of_bias_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + (reduce(w * x) + w * (1.0 + w)), w),)


def bias_between_two(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + ((reduce(x) + w) + reduce(y)), w),)


def bias_between_two_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + (reduce(x + y) + w), w),)


def experts_summed(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + reduce(torch.stack([x, y])).sum(0), w),)


def experts_summed_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + reduce(torch.stack([x, y]).sum(0)), w),)


def bias_behind_an_embedding(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    h = y + reduce(x)
    return (norm(h + (reduce(norm(h, w)) + w), w),)


def lora_in_one_op(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + torch.addmm(reduce(x), y[:, :8], w.repeat(8, 1)), w),)


def lora_in_one_op_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + (reduce(x) + torch.mm(y[:, :8], w.repeat(8, 1))), w),)


def alphas(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = torch.add(r, torch.add(reduce(x), w, alpha=2), alpha=0.5)
    return norm(total, w), total


def alphas_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r + (reduce(x * 0.5) + (w * 2) * 0.5)
    return norm(total, w), total


def subtracted(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r - (reduce(x) - w), w),)


def subtracted_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + (reduce(x * -1) + (w * -1) * -1), w),)


def layer_scale_in_one_op(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(torch.addcmul(r, -reduce(x), w, value=0.5), w),)


def layer_scale_in_one_op_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + reduce(((x * -1) * w) * 0.5), w),)


def gate(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + torch.tanh(w[:1]) * reduce(x), w),)


def gate_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + reduce(torch.tanh(w[:1]) * x), w),)


def scaled_in_fp32(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + (reduce(x).float() * w.float()).to(x.dtype), w),)


def scaled_in_fp32_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + reduce((x.float() * w.float()).to(x.dtype)), w),)


def bias_in_fp32(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + (reduce(x) + w.float().exp()).to(x.dtype), w),)


def bias_in_fp32_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + (reduce(x) + w.float().exp().to(x.dtype)), w),)


def bias_in_an_fp32_sum(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r.float() + (reduce(x).float() + w.float())
    return norm(total, w).to(x.dtype), total


def bias_in_an_fp32_sum_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = (r.float() + w.float()) + reduce(x)
    return norm(total, w).to(x.dtype), total


def experts_summed_in_views(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + reduce(torch.cat([x, y])).view(2, -1, HIDDEN).sum(0, keepdim=True)[0], w),)


def experts_summed_in_views_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + reduce(torch.cat([x, y]).view(2, -1, HIDDEN).sum(0)), w),)


def one_row_for_all(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + (reduce(x) + y[:, :1]), w),)


def one_row_for_all_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm((r + y[:, :1]) + reduce(x), w),)


def alpha_of_the_second(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + torch.add(reduce(x), reduce(y), alpha=2), w),)


def alpha_of_the_second_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + reduce(x + y * 2), w),)


def two_addends(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r + ((reduce(x) + w) + y)
    return norm(total, w), total


def two_addends_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r + (reduce(x) + (y + w))
    return norm(total, w), total


MORE = [
    (two_addends, two_addends_before),
    (lora_in_one_op, lora_in_one_op_before),
    (alphas, alphas_before),
    (subtracted, subtracted_before),
    (layer_scale_in_one_op, layer_scale_in_one_op_before),
    (gate, gate_before),
    (scaled_in_fp32, scaled_in_fp32_before),
    (bias_in_fp32, bias_in_fp32_before),
    (bias_in_an_fp32_sum, bias_in_an_fp32_sum_before),
    (experts_summed_in_views, experts_summed_in_views_before),
    (one_row_for_all, one_row_for_all_before),
    (alpha_of_the_second, alpha_of_the_second_before),
]

PAIRS = [
    (shared_expert_everywhere, shared_expert_everywhere_before),
    (layer_scale, layer_scale_before),
    (layer_scale_of_bias, layer_scale_of_bias_before),
    (bias_between_two, bias_between_two_before),
    (experts_summed, experts_summed_before),
    (granite_moe, granite_moe_before),
    (norm_of_experts, norm_of_experts_before),
    (scaled, scaled_before),
    (divided, divided_before),
    (embedding, embedding_before),
    (experts, experts_before),
    (experts_in_fp32, experts_before),
    (experts_in_fp32_as_rows, experts_3d_before),
    (experts_3d, experts_3d_before),
]


CASES = [(*pair, dynamic) for pair in PAIRS for dynamic in (False, True)]
CASES += [(*pair, pair[0] is experts_summed_in_views) for pair in MORE]
if torch.ops.aten.addcmul.default in select_decomp_table():  # torch 2.11: no op of that name reaches the pass
    CASES = [case for case in CASES if case[0] is not layer_scale_in_one_op]


@pytest.mark.parametrize(("model", "moved", "dynamic"), CASES, ids=lambda each: getattr(each, "__name__", None))
def test_moved(model: Callable[..., Any], moved: Callable[..., Any], dynamic: bool) -> None:
    """One fused call and no all-reduce beside it; the bits are those of the graph that takes the step before."""
    shapes = [("tokens", HIDDEN)] * 3 if dynamic else [(4, HIDDEN)] * 3
    make = symbolic if dynamic else tensors
    module = trace(model, *make(*shapes, (HIDDEN,)))
    module.graph.eliminate_dead_code()  # as Inductor does: addmm's decomposition leaves casts that nobody reads
    fused, report = fused_copy(module, MOVING)
    fused_once = [site for site in report.fused if site.pattern != "MergedAllReduce"]
    assert (len(fused_once), len(report.missed)) == (1, 0), str(report)
    assert fused_once[0].moved, str(report)
    assert calls(fused, c10d.all_reduce.default, c10d.wait_tensor.default) == 0
    check_same(trace(moved, *make(*shapes, (HIDDEN,))), fused, tokens=7)


def stream(y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """A residual stream behind attention, and its norm."""
    total = r + reduce(y)
    return total, norm(total, w)


def gated_rows(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total, h = stream(y, r, w)
    total = total + torch.sigmoid(h @ w[:, None]) * reduce(x)
    return norm(total, w), total


def gated_rows_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total, h = stream(y, r, w)
    total = total + reduce(torch.sigmoid(h @ w[:, None]) * x)
    return norm(total, w), total


def gated_shared_expert(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Qwen3-Next: the shared expert is reduced before its gate, and in rows of another shape than the stream's."""
    total, h = stream(y.view(1, *y.shape), r.view(1, *r.shape), w)
    shared, rows = reduce(x), h.view(-1, HIDDEN)
    experts = reduce(rows * 0.5) + torch.sigmoid(rows @ w[:, None]) * shared
    total = total + experts.view(total.shape)
    return norm(total, w), total


def gated_shared_expert_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total, h = stream(y.view(1, *y.shape), r.view(1, *r.shape), w)
    rows = h.view(-1, HIDDEN)
    total = total + reduce(rows * 0.5 + torch.sigmoid(rows @ w[:, None]) * x).view(total.shape)
    return norm(total, w), total


def gated_in_other_rows(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """The gate meets a view of the all-reduce; an fp32 gate beside fp32 values, which is divided by as well."""
    total, h = stream(y, r, w)
    gate = h.float().square().mean(-1).exp()[None, :, None]
    out = (reduce(x).view(1, *x.shape).float() / gate).to(x.dtype)
    return (norm(total + out.view(x.shape), w),)


def gated_in_other_rows_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total, h = stream(y, r, w)
    gate = h.float().square().mean(-1).exp()[:, None]
    return (norm(total + reduce((x.float() / gate).to(x.dtype)), w),)


def scaled_by_a_long_vector(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """A vector of more dimensions than what is reduced makes that no larger."""
    total, _ = stream(y, r, w)
    return (norm(total.view(1, *r.shape) + w.view(1, 1, HIDDEN) * reduce(x).view(1, *x.shape), w),)


def scaled_by_a_long_vector_before(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total, _ = stream(y, r, w)
    return (norm((total + reduce(w * x)).view(1, *r.shape), w),)


ROWS = [
    (gated_rows, gated_rows_before),
    (gated_shared_expert, gated_shared_expert_before),
    (gated_in_other_rows, gated_in_other_rows_before),
    (scaled_by_a_long_vector, scaled_by_a_long_vector_before),
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("model", "moved"), ROWS, ids=lambda each: getattr(each, "__name__", None))
def test_a_factor_of_each_row(model: Callable[..., Any], moved: Callable[..., Any], dynamic: bool) -> None:
    """A gate computed from the residual stream is the same on all ranks: it goes before, and the report names it."""
    shapes = [("tokens", HIDDEN)] * 3 if dynamic else [(4, HIDDEN)] * 3
    make = symbolic if dynamic else tensors
    module = trace(model, *make(*shapes, (HIDDEN,)))
    fused, report = fused_copy(module, MOVING)
    assert not report.missed and report.fused[-1].moved, str(report)
    assert calls(fused, c10d.all_reduce.default, c10d.wait_tensor.default) == 0
    check_same(trace(moved, *make(*shapes, (HIDDEN,))), fused, tokens=7)
    check_same(module, fused_copy(module)[0], tokens=7)


def scaled_and_biased(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + (reduce(x) * 0.22 + w), w),)


def scaled_sum(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r.view(1, *r.shape) + ((reduce(x) + y) * 0.22).view(1, *r.shape)
    return norm(total, w), total


def scaled_beside_fp32(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = reduce(x) * 0.22 + r.float().exp()
    return norm(total, w).to(x.dtype), total


def scaled_by_a_row_in_fp32(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + (torch.sigmoid(y[:, :1].float()) * reduce(x).float()).to(x.dtype), w),)


def divided_by_a_power(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + reduce(x) / 4, w),)


def scaled_by_one(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r + (reduce(x) + y) * 1.0
    return norm(total, w), total


def embedding_by_one(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    h = reduce(x) * 1.0
    return norm(h, w), h


FACTORS = {
    embedding_by_one: "",
    scaled: "ScaledFusedAdd",
    scaled_before_a_view: "ScaledFusedAdd",
    embedding: "Scaled",
    gate: "ScaledFusedAdd",
    scaled_and_biased: "ScaledFusedTwoAdds",
    scaled_sum: "ScaledFusedTwoAdds",
    scaled_beside_fp32: "ScaledFusedAdd",
    scaled_by_a_row_in_fp32: "ScaledFusedAdd",
    divided_by_a_power: "ScaledFusedAdd",
    scaled_by_one: "FusedTwoAdds",
    shared_expert_everywhere: "ScaledFusedTwoAdds",
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("model", FACTORS, ids=lambda f: f.__name__)
def test_a_factor_is_exact_without(model: Callable[..., Any], dynamic: bool) -> None:
    """Without the setting a number, one element or one for each row multiplies what is reduced in the fused call, and
    is rounded where the graph rounds."""
    shapes = [("tokens", HIDDEN)] * 3 if dynamic else [(4, HIDDEN)] * 3
    report = check_fused(trace(model, *(symbolic if dynamic else tensors)(*shapes, (HIDDEN,))), 1, tokens=7)
    assert report.fused[0].moved == ()
    assert report.fused[0].pattern == f"AllReduce{FACTORS[model]}RMSNorm"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("model", [scaled, scaled_sum, embedding, gate], ids=lambda f: f.__name__)
def test_a_factor_in_each_dtype(model: Callable[..., Any], dtype: torch.dtype) -> None:
    """The product is rounded to the tensor's dtype, whichever it is."""
    check_fused(trace(model, *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,), dtype=dtype)), 1)


def biased_in_fp32(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """16-bit values added in fp32 and rounded: one add in 16 bits."""
    total = r + (reduce(x) + w.exp().float()).to(x.dtype)
    return norm(total, w), total


def shared_expert_in_fp32(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = (r.float() + (reduce(x).float() + y.float()).to(x.dtype).float()).to(x.dtype)
    return norm(total, w), total


def residual_in_fp32_first(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = (r.float() + reduce(x).float()).to(x.dtype) + y
    return norm(total, w), total


ADDENDS = [biased, biased_last, biased_alone, biased_by_one_element, biased_beside_fp32, biased_twice,
           shared_expert_as_rows, biased_in_fp32, shared_expert_in_fp32, residual_in_fp32_first]  # fmt: skip


@pytest.mark.parametrize("config", [STRICT, MOVING], ids=["default", "reassociate"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("model", ADDENDS, ids=lambda f: f.__name__)
def test_an_addend_is_exact_without(model: Callable[..., Any], dynamic: bool, config: Any) -> None:
    """One more tensor in the graph's dtype is an input of the fused call, rounded where the graph rounds."""
    shapes = [("tokens", HIDDEN)] * 3 if dynamic else [(4, HIDDEN)] * 3
    report = check_fused(trace(model, *(symbolic if dynamic else tensors)(*shapes, (HIDDEN,))), 1, config, tokens=7)
    assert report.fused[0].moved == ()
    adds = "FusedAdd" if model is biased_alone else "FusedTwoAdds"
    assert report.fused[0].pattern == f"AllReduce{adds}RMSNorm"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_addend_in_each_dtype(dtype: torch.dtype) -> None:
    """The inner sum is rounded to the tensor's dtype, whichever it is."""
    for model in (biased, biased_last):
        check_fused(trace(model, *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,), dtype=dtype)), 1)


INEXACT_SUMS = {
    "fp32 expert": (
        lambda x, y, r, w: norm(r + (reduce(x) + y.float().exp()).to(x.dtype), w),
        "it adds what is torch.float32, and the fused op takes a second tensor in torch.bfloat16",
    ),
    "unrounded": (
        lambda x, y, r, w: norm((r.float() + (reduce(x).float() + y.float())).to(x.dtype), w),
        "its sum is float32, and the fused op rounds to torch.bfloat16 between two adds",
    ),
    "fp16 residual": (
        lambda x, y, r, w: norm((r.half() + reduce(x)).to(x.dtype), w),
        "stands between it and the norm",
    ),
    "fp16 residual, fp32 norm": (
        lambda x, y, r, w: norm(r.half() + reduce(x), w),
        "is torch.float16; expected torch.bfloat16 or float32",
    ),
}


@pytest.mark.parametrize("name", INEXACT_SUMS)
def test_a_sum_that_no_call_rounds(name: str) -> None:
    """Contract *clear*: what the fused op would round otherwise, in so many words."""
    model, reason = INEXACT_SUMS[name]
    report = check_unchanged(trace(model, *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,))))
    assert reason in (report.missed[0].reason or "")


def read_twice(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    h = reduce(x)
    return norm(r + h * 0.22, w), h


def gated(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return norm(r + reduce(x) * y, w)


def divisor(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return norm(2.0 / reduce(x), w)


def squared(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> Tensor:
    h = reduce(x)
    return norm(h * h, w)


def two_dtypes(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return norm(r.float() + (reduce(x) + reduce(y.float())), w)


def bias_read(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    h = reduce(x) + w
    return norm(r + h, w), h


def computed_vector(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return norm(r + y.amax(0) * reduce(x), w)


def gate_of_own_rows(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> Tensor:
    """What each rank has computed by itself may be its own, and so is what it is gated with."""
    return norm(r + torch.sigmoid(y @ w[:, None]) * reduce(x), w)


def gate_by_a_matrix(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> Tensor:
    """A matrix may be one rank's part: what it gives is not known to be the same."""
    return norm(r + (reduce(y).exp() @ r.t())[:, :1] * reduce(x), w)


def gate_by_a_part(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> Tensor:
    """Which element of a row it is may be the rank's choice."""
    return norm(r + reduce(y)[:, 3:4] * reduce(x), w)


def gate_behind_a_later_one(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> Tensor:
    """The gate waits for an all-reduce behind its own: it cannot be there before."""
    early = reduce(x)
    return norm(r + torch.sigmoid(reduce(y).exp() @ w[:, None]) * early, w)


def vector_behind_a_later_one(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> Tensor:
    early = reduce(x)
    return norm(r + reduce(y).exp().amax(0) * early, w)


def computed_number(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return norm(r + reduce(x) / y.amax(), w)


@pytest.mark.parametrize(
    "model",
    [bias_read, computed_vector, computed_number, gated, divisor, squared, two_dtypes,
     vector_behind_a_later_one],
)  # fmt: skip
def test_not_moved(model: Callable[..., Any]) -> None:
    """What is not linear, what others read and what may differ between ranks stays: node for node, no advice."""
    report = check_unchanged(trace(model, *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,))), MOVING)
    assert not any("reassociate" in f"{site.reason}{site.advice}" for site in report.missed), report


def behind_one_alpha(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """A product that the sum does not round: exact as no call's factor."""
    total = torch.add(r, reduce(x), alpha=0.22)
    return norm(total, w), total


def scaled_short_rows(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return norm(torch.add(r[:, :3], reduce(x[:, :3].contiguous()), alpha=0.22), w[:3])


def scaled_in_front_of_a_write(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = torch.add(r, reduce(x), alpha=0.22)
    torch.ops.aten.mul_.Tensor(w, 2)
    return norm(total, w), total


def scaled_for_a_circle(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    value = -reduce(x)
    return norm(value, w * value.sum(0)), value


@pytest.mark.parametrize(
    ("model", "config", "why"),
    [
        (scaled_short_rows, MOVING, "no multiple of 16"),
        (scaled_in_front_of_a_write, MOVING, "writes to"),
        (scaled_for_a_circle, MOVING, "which the call itself would produce"),
        (behind_one_alpha, dataclasses.replace(MOVING, epsilons=(1e-5,)), "not among the epsilons"),
        (behind_one_alpha, dataclasses.replace(MOVING, dtypes=(torch.float32,)), "not among the dtypes"),
    ],
)
def test_nothing_moves_for_nothing(model: Callable[..., Any], config: Any, why: str) -> None:
    """Contract *sound*: the step of a site that would not fuse without it either stays, and the reason says both."""
    module = trace(model, *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,)), functional=False)
    reason = str(check_unchanged(module, config).missed[0].reason)
    assert "stands between" in reason and why in reason, reason


def test_one_moves_and_one_stays() -> None:
    """The step of a site that fuses moves, beside one that would move for nothing."""

    def model(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return *scaled(x, y, r, w), scaled_short_rows(x, y, r, w)

    module = trace(model, *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,)))
    fused, report = fused_copy(module, MOVING)
    assert [len(site.moved) for site in report.sites] == [1, 0]
    inputs = random_inputs(module)
    assert torch.equal(run(module, inputs)[2], run(fused, inputs)[2])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (computed_vector, ": nothing says that amax (aten.amax.default) is the same on all ranks"),
        (vector_behind_a_later_one, ": amax (aten.amax.default) exists only behind another collective"),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_why_a_factor_stays(model: Callable[..., Any], reason: str) -> None:
    """Contract *clear*: a product that is linear and stays all the same says which condition its factor misses."""
    report = check_unchanged(trace(model, *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,))))
    assert reason in str(report.missed[0].reason)


@pytest.mark.parametrize("config", [STRICT, MOVING], ids=["default", "reassociate"])
@pytest.mark.parametrize(
    "model", [read_twice, gate_of_own_rows, gate_by_a_matrix, gate_by_a_part, gate_behind_a_later_one]
)
def test_a_factor_that_stays_is_the_calls(model: Callable[..., Any], config: Any) -> None:
    """What may differ between ranks, comes later or has other readers cannot go before the all-reduce: the fused call
    multiplies behind it, as the graph does."""
    module = trace(model, *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,)))
    fused, report = fused_copy(module, config)
    check_same(module, fused)
    assert (report.matched_count, [site.moved for site in report.sites if site.moved]) == (1, [])
    assert "Scaled" in report.fused[0].pattern


def gate_is_written(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    gate = y[:, :1].clone()
    total = r + reduce(x) * gate
    torch.ops.aten.mul_.Tensor(gate.view(-1), 2)
    return norm(total, w), total


def widened_gate_was_written(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    gate = y[:, :1].clone()
    wide = gate.float()
    torch.ops.aten.mul_.Tensor(gate, 2)
    return (norm(r + (reduce(x).float() * wide).to(x.dtype), w),)


def gate_of_itself(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    value = reduce(x)
    return (norm(r + value * torch.sigmoid(value[:, :1]), w),)


def beyond_fp32(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + reduce(x) * 1e39, w),)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (gate_is_written, "writes to"),
        (widened_gate_was_written, "stands between"),
        (gate_of_itself, "which the call itself would produce"),
        (beyond_fp32, "stands between"),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_a_factor_that_is_no_calls(model: Callable[..., Any], why: str) -> None:
    """Contract *sound*: a factor that changes before the call would read it, that needs the call's own result, or that
    no kernel multiplies by."""
    module = trace(model, *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,)), functional=False)
    assert why in str(check_unchanged(module).missed[0].reason)


def bias_behind_a_reduced_embedding(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    h = reduce(x)
    return (norm(h + (reduce(norm(h, w)) + w), w),)


@pytest.mark.parametrize("model", [bias_behind_an_embedding, bias_behind_a_reduced_embedding])
@pytest.mark.parametrize("config", [STRICT, MOVING], ids=["default", "reassociate"])
def test_bias_behind_a_sum_that_is_read(model: Callable[..., Any], config: Any) -> None:
    """The embedding's all-reduce is a residual with other readers: the biased one behind it fuses as it is."""
    report = check_fused(trace(model, *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,))), 2, config)
    assert [site.moved for site in report.fused] == [(), ()]


def test_two_groups_are_not_merged() -> None:
    """Sums over different ranks have no common all-reduce: one is the other's addend, with the setting or without."""
    group = dist.new_group([0, 1])

    def model(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return norm(r + (reduce(x) + reduce(y, group.group_name)), w)

    module = trace(model, *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,)))
    fused, report = fused_copy(module, MOVING)
    assert (report.matched_count, calls(fused, c10d.all_reduce.default)) == (1, 1)
    assert "reassociate" not in str(report)
    check_same(module, fused)


def test_a_gate_of_another_group_stays() -> None:
    """What the ranks of one group share may differ within another."""
    group = dist.new_group([0, 1]).group_name

    def model(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return norm(r + torch.sigmoid(reduce(y, group).exp() @ w[:, None]) * reduce(x), w)

    module = trace(model, *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,)))
    fused, report = fused_copy(module, MOVING)
    check_same(module, fused)
    assert report.matched_count == 1 and not report.fused[0].moved
    assert "reassociate" not in str(report)


def test_report_of_what_moved() -> None:
    """The steps by the user's names, and a line for the first of two merged all-reduces."""
    _, report = fused_copy(trace(bias_between_two, *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,))), MOVING)
    first, second = report.sites
    assert (first.name, first.pattern, first.fused) == ("all_reduce", "MergedAllReduce", True)
    assert "all_reduce_1" in str(first.note)
    assert second.moved == (
        "add (aten.add.Tensor) behind add_1 (aten.add.Tensor)",
        "add_1 (aten.add.Tensor) before the all-reduce",
    )
    assert "MergedAllReduce" in str(report) and "moved" in str(report)


def parallel_blocks(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Attention and MLP beside one another: the stream meets one after the other."""
    total = r + reduce(x) + reduce(y)
    return norm(total, w), total


@pytest.mark.parametrize("model", [norm_of_experts, experts, experts_3d, parallel_blocks])
def test_one_of_two_fuses_without_it(model: Callable[..., Any]) -> None:
    """A sum of two all-reduces in front of a norm: one is residual or addend of the other, and the reason names the
    setting."""
    module = trace(model, *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,)))
    fused, report = fused_copy(module)
    check_same(module, fused)
    assert report.matched_count == 1
    (missed,) = report.missed
    assert "FusionConfig(reassociate=True)" in str(missed.reason)


@pytest.mark.parametrize(
    "model",
    [
        lambda x, y, r, w: norm(r + reduce(x.t()).t() * w, w),
        lambda x, y, r, w: norm(r + reduce(x.float()).to(x.dtype) * w, w),
        lambda x, y, r, w: norm(r + (reduce(x.t()).t() + reduce(y)), w),
        lambda x, y, r, w: norm(r + (reduce(x) + reduce(y.t()).t()), w),
    ],
    ids=["permuted", "widened", "permuted and another", "another and permuted"],
)
@pytest.mark.parametrize("config", [STRICT, MOVING], ids=["default", "reassociate"])
def test_no_advice_that_moves_nothing(model: Callable[..., Any], config: Any) -> None:
    """An all-reduce of a permuted or widened tensor takes no other input: nobody is told to have a step moved there."""
    report = fused_copy(trace(model, *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,))), config)[1]
    assert report.missed and not any(site.moved for site in report.sites)
    assert "reassociate" not in str(report)


@pytest.mark.parametrize("model", [layer_scale, divided])
def test_off_by_default(model: Callable[..., Any]) -> None:
    """Without the setting nothing moves, and the reason names it."""
    report = check_unchanged(trace(model, *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,))))
    assert all("; FusionConfig(reassociate=True) takes that before" in str(site.reason) for site in report.missed)


# Graphs in which one move changes what was found of another site -----------------------------------------------------


def reduced_again(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = reduce(x) + reduce(y)
    norm_of_total = norm(total, w)
    again = reduce(r) + reduce(total)
    return norm(again, w), norm_of_total, again


def reduced_again_first(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = reduce(x) + reduce(y)
    norm_of_total = norm(total, w)
    again = reduce(total) + reduce(r)
    return norm(again, w), norm_of_total, again


def scaled_and_reduced_again(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    first = reduce(x) * 0.5
    return norm(y + reduce(first) * 0.25, w), norm(r + first, w)


def scaled_inside(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (norm(r + reduce(reduce(x) * 0.5) * 0.25, w),)


@pytest.mark.parametrize(
    "model", [reduced_again, reduced_again_first, scaled_and_reduced_again, scaled_inside], ids=lambda f: f.__name__
)
def test_sites_that_change_each_other(model: Callable[..., Any]) -> None:
    """What a move replaces or erases may be what was found of a later site: that is found anew."""
    module = trace(model, *tensors(*((4, HIDDEN),) * 3, (HIDDEN,), dtype=torch.float32))
    fused, report = fused_copy(module, MOVING)
    assert report.note is None and report.matched_count > 0
    for wanted, got in zip(run(module, inputs := random_inputs(module)), run(fused, inputs), strict=True):
        torch.testing.assert_close(got, wanted)


def test_write_between_two_merged() -> None:
    """The first input is written between the two all-reduces: it is not summed in the second one's place."""

    def model(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        first = reduce(x)
        torch.ops.aten.mul_.Tensor(x, 0.5)
        total = first + reduce(y)
        return norm(total, w), total

    module = trace(model, *tensors(*((4, HIDDEN),) * 3, (HIDDEN,), dtype=torch.float32), functional=False)
    fused, _ = fused_copy(module, MOVING)
    assert calls(fused, c10d.all_reduce.default) == 2
    for wanted, got in zip(run(module, inputs := random_inputs(module)), run(fused, inputs), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("written", ["weight", "stream"])
def test_write_in_front_of_a_gate(written: str) -> None:
    """What a gate reads is written behind the all-reduce that it would have to precede: it stays."""

    def model(x: Tensor, y: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h = reduce(y).exp()
        early = reduce(x)
        torch.ops.aten.mul_.Tensor((w if written == "weight" else h).view(-1), 0.5)
        total = r + torch.sigmoid(h @ w[:, None]) * early
        return norm(total, w), total

    module = trace(model, *tensors(*((4, HIDDEN),) * 3, (HIDDEN,), dtype=torch.float32), functional=False)
    fused, report = fused_copy(module, MOVING)
    assert not any(site.moved for site in report.sites) and "reassociate" not in str(report)
    for wanted, got in zip(run(module, inputs := random_inputs(module)), run(fused, inputs), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_chain_of_more_addends_than_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it hinders the site; the graph computes what it did, and compiling ends."""
    monkeypatch.setattr("arfusion_pass.rewrite.reassociate.ROUNDS", 2)

    def model(x: Tensor, w: Tensor, *addends: Tensor) -> Tensor:
        y = reduce(x)
        for addend in addends:
            y = y + addend
        return norm(y, w)

    shapes = [(4, HIDDEN), (HIDDEN,), *[(4, HIDDEN)] * 8]
    module = trace(model, *tensors(*shapes, dtype=torch.float32))
    fused, report = fused_copy(module, MOVING)
    assert (report.note, report.matched_count) == (None, 0)
    for wanted, got in zip(run(module, inputs := random_inputs(module)), run(fused, inputs), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("config", [STRICT, MOVING], ids=["left", "moved"])
def test_chain_of_many_steps(config: Any) -> None:
    """1,200 factors in a row are no recursion too deep."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        y = reduce(x)
        for _ in range(1200):
            y = y * 1.0009765625
        return norm(y, w)

    module = trace(model, *tensors((4, HIDDEN), (HIDDEN,), dtype=torch.float32))
    _, report = fused_copy(module, config)
    assert report.note is None
    assert report.matched_count == (config is MOVING)
