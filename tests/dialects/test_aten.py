"""What the aten recogniser knows: every spelling of RMSNorm, its rounding points, and what only looks like one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from arfusion_pass.config import canonical_epsilon
from tests.models import NORMS, OTHER_ROOTS, Tensor, fp32_result, llama, reduce, torch_norm, unrounded_sum
from tests.simulate import STRICT, aten, check_fused, check_unchanged, tensors, trace

HIDDEN, EPS = 32, 1e-6
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

pytestmark = pytest.mark.usefixtures("world")


def rows(*count: int) -> tuple[int, ...]:
    return (*count, HIDDEN)


def normalised(h: Tensor, epsilon: Any = 1e-6) -> Tensor:
    """fp32, without weight."""
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + epsilon)


@pytest.mark.parametrize("residual_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NORMS)
def test_spelling(name: str, dtype: torch.dtype, residual_first: bool) -> None:
    """Contract *exact*: each spelling, over each epsilon, with the residual on either side, fuses to the same bits.

    A root that is no ``rsqrt`` may differ from ``rsqrt`` by the 4 ulp that the contract grants an fp32 norm.
    """
    epsilons = [1e-5, 1e-6, 3e-6, 1.1920928955078125e-07]

    def model(x: Tensor, r: Tensor, w: Tensor) -> list[Tensor]:
        results = []
        for epsilon in epsilons:
            y = reduce(x)
            total = r + y if residual_first else y + r
            results += [NORMS[name](total, w, epsilon), total]
        return results

    module = trace(model, *tensors(rows(4), rows(4), rows(), dtype=dtype))
    ulps = 0 if name not in OTHER_ROOTS else 4 if dtype == torch.float32 else 1
    report = check_fused(module, len(epsilons), ulps=ulps)
    assert [site.epsilon for site in report.fused] == [canonical_epsilon(epsilon) for epsilon in epsilons]
    assert {site.outputs for site in report.fused} == {("residual_out", "norm_out")}
    assert {site.dtype for site in report.fused} == {str(dtype).removeprefix("torch.")}


@pytest.mark.parametrize("name", NORMS)
def test_no_residual(name: str) -> None:
    """Without an add; the all-reduce's own result is produced where it is read, and only there."""

    def model(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y, z = reduce(x), reduce(x * 2)
        return NORMS[name](y, w, 1e-6), NORMS[name](z, w, 1e-6), z

    report = check_fused(trace(model, *tensors(rows(4), rows())), 2)
    assert [site.outputs for site in report.fused] == [("norm_out",), ("allreduce_out", "norm_out")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [None, torch.float32])
def test_weight_dtype(dtype: torch.dtype, gamma: torch.dtype | None) -> None:
    """An fp32 weight is taken with any tensor dtype; so is no weight."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = r + reduce(x)
        return torch_norm(total, None if gamma is None else w, 1e-6).to(dtype), total

    inputs = [*tensors(rows(4), rows(4), dtype=dtype), *tensors(rows(), dtype=torch.float32)]
    check_fused(trace(model, *inputs), 1)


def test_epsilon_none() -> None:
    """``eps=None`` is float32's machine epsilon."""
    module = trace(lambda x, w: torch_norm(reduce(x), w, None), *tensors(rows(4), rows()))
    assert check_fused(module, 1).fused[0].epsilon == torch.finfo(torch.float32).eps


def test_fp32_sum() -> None:
    """The sum taken in fp32, read unrounded by the norm and rounded once as the next residual."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return unrounded_sum(reduce(x), r, w, 1e-6, fp32_result)

    module = trace(model, *tensors(rows(4), rows(4), rows()))
    assert check_fused(module, 1).fused[0].outputs == ("residual_out", "norm_out")


def test_fp32_sum_read_rounded_and_not() -> None:
    """An fp32 sum that others read in fp32 as well is written in fp32, and rounded for those that want it so."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total = reduce(x).float() + r.float()
        return fp32_result(total, w, 1e-6).to(x.dtype), total, total.to(x.dtype), total.to(torch.float16)

    check_fused(trace(model, *tensors(rows(4), rows(4), rows())), 1)


def test_fp32_sum_read_through_a_view() -> None:
    """A view of the fp32 sum that others read reads the fp32 sum, not the rounded one (it was taken for produced)."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total = reduce(x).float() + r.float()
        view = total.view(2, 2, HIDDEN)
        return fp32_result(view, w, 1e-6).to(x.dtype), total.to(x.dtype), view.relu()

    check_fused(trace(model, *tensors(rows(4), rows(4), rows())), 1)


def test_widened_residual() -> None:
    """A bf16 residual that is widened for an fp32 tensor is taken as fp32."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return llama(r.float() + reduce(x.float()), w, 1e-6)

    check_fused(trace(model, *tensors(rows(4), rows(4), rows())), 1)


def test_fp32_residual() -> None:
    """A residual kept in fp32 beside a bf16 tensor: the sum is fp32, the norm reads it unrounded."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = r + reduce(x)
        return fp32_result(total, w, 1e-6).to(x.dtype), total

    inputs = [*tensors(rows(4)), *tensors(rows(4), dtype=torch.float32), *tensors(rows())]
    check_fused(trace(model, *inputs), 1)


@pytest.mark.parametrize("shape", [rows(), rows(6), rows(2, 3), rows(1, 2, 3)])
def test_rank_of_tensor(shape: tuple[int, ...]) -> None:
    """Tensors of one to four dimensions."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = r + reduce(x)
        return llama(total, w, 1e-6), total

    check_fused(trace(model, *tensors(shape, shape, rows())), 1)


def test_views_between() -> None:
    """Views that keep rows may stand between all stages, and nothing is written that only they read."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total = r + reduce(x).view(2, 3, HIDDEN)
        return llama(total.reshape(6, HIDDEN), w, 1e-6), total

    report = check_fused(trace(model, *tensors(rows(6), rows(2, 3), rows())), 1)
    assert report.fused[0].outputs == ("residual_out", "norm_out")


def test_bias_instead_of_a_residual() -> None:
    """A bias behind the all-reduce is its residual, as a tensor of its own."""

    def model(x: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total = reduce(x).view(2, 2, HIDDEN) + b
        return llama(total, w, 1e-6), total

    check_fused(trace(model, *tensors(rows(4), rows(), rows())), 1)
    check_fused(trace(model, *tensors(rows(4), rows(1, 1), rows())), 1)
    check_fused(trace(lambda x, b, w: llama(b + reduce(x), w, 1e-6), *tensors(rows(1), rows(), rows())), 1)


def test_bias_of_another_dtype() -> None:
    """A bias that is widened for an fp32 sum is as it is; one in fp32 is no row in the tensor's dtype."""

    def model(x: Tensor, b: Tensor, w: Tensor) -> Tensor:
        return fp32_result(reduce(x) + b.float(), w, 1e-6).to(x.dtype)

    check_fused(trace(model, *tensors(rows(4), rows(), rows())), 1)
    check_unchanged(trace(model, *tensors(rows(4)), *tensors(rows(), dtype=torch.float32), *tensors(rows())))


def test_weight_as_a_row() -> None:
    """A weight that a module keeps, or views, as ``[1, H]``."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        return (normalised(reduce(x).float()) * w.view(1, HIDDEN)).to(x.dtype)

    check_fused(trace(model, *tensors(rows(4), rows())), 1)


def test_rounded_then_fp32_weight() -> None:
    """Rounded, then times a widened weight, and kept in fp32: the product is not rounded (it was)."""

    def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        kept = normalised(reduce(x).float()).to(x.dtype) * w.float()
        rounded = normalised(reduce(x * 2).float()).to(x.dtype) * w.float()
        return kept, rounded.to(x.dtype)

    check_fused(trace(model, *tensors(rows(4), rows())), 2)


def test_alpha_of_epsilon() -> None:
    """``add(mean, epsilon, alpha=2)`` adds two epsilons: no number in the graph is its epsilon."""
    module = trace(lambda x: normalised(reduce(x).float()), *tensors(rows(4)))
    plus = next(node for node in module.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    plus.kwargs = {"alpha": 2}
    check_unchanged(module)


def test_epsilon_of_a_lower_dtype() -> None:
    """An epsilon that the graph holds as a bf16 constant has bf16's value."""

    def model(x: Tensor) -> Tensor:
        epsilon = torch.ops.aten.full.default([], 0.301, dtype=torch.bfloat16)
        return normalised(reduce(x).float(), epsilon)

    report = check_fused(trace(model, *tensors(rows(4))), 1)
    assert report.fused[0].epsilon == torch.tensor(0.301, dtype=torch.bfloat16).item()


@pytest.mark.parametrize("epsilon", [-1e-6, 1e39, float("inf"), float("nan")])
def test_impossible_epsilon(epsilon: float) -> None:
    """An epsilon that the ops refuse is refused by the pass, not when the graph runs."""
    module = trace(lambda x, w: llama(reduce(x), w, epsilon), *tensors(rows(4), rows()))
    report = check_unchanged(module, STRICT)
    assert "epsilon" in report.missed[0].reason


def test_infinite_weight_bias() -> None:
    """A number that is no bias the ops take stays part of the weight."""
    bias = float("inf")
    module = trace(
        lambda x, w: (normalised(reduce(x).float()) * (w.float() + bias)).to(x.dtype), *tensors(rows(4), rows())
    )
    check_fused(module, 1)


@pytest.mark.parametrize("target", ["mean", "mean's dtype", "add", "sum of residuals"])
def test_optional_arguments(target: str) -> None:
    """An argument that a recogniser does not read must be at its default: nothing is taken for what it is not."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        alpha = {"alpha": 2} if target == "sum of residuals" else {}
        total = aten.add.Tensor(r, reduce(x), **alpha)
        wide = total.float()
        dtype = {"mean": torch.bfloat16, "mean's dtype": torch.float64}.get(target)
        mean = aten.mean.dim(wide * wide, [-1], True, dtype=dtype)
        plus = aten.add.Tensor(mean, torch.full((), EPS), alpha=2 if target == "add" else 1)
        return (wide * torch.rsqrt(plus)).to(x.dtype) * w, total

    check_unchanged(trace(model, *tensors(rows(4), rows(4), rows())))


def test_optional_arguments_that_change_nothing() -> None:
    """A mean of fp32 that says so is a mean."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        wide = reduce(x).float()
        mean = aten.mean.dim(wide * wide, [-1], True, dtype=torch.float32)
        return w * (wide * torch.rsqrt(mean + EPS)).to(x.dtype)

    check_fused(trace(model, *tensors(rows(4), rows())), 1)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (32,), (1, 32)], ids=str)
def test_a_bias_of_any_rank(shape: tuple[int, ...]) -> None:
    """One element or one row, also a 0-dim tensor, added where a residual would be."""
    module = trace(lambda x, r, w: llama(reduce(x) + r, w, 1e-6), *tensors((4, 32), shape, (32,)))
    check_fused(module, 1, STRICT)
