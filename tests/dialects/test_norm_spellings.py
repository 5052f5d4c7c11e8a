"""Norms as people write them beside those of :mod:`tests.models`, and what is nearly one: fused, or a true reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from tests.models import Tensor, llama, reduce
from tests.simulate import calls, check_fused, check_unchanged, fused_copy, tensors, trace

HIDDEN = 48  # no power of two: a sum over H is no mean by a mere shift
EPS = 1e-6

pytestmark = pytest.mark.usefixtures("world")

# Statistics: what rows are multiplied by ------------------------------------------------------------------------------


def sum_over_hidden(h: Tensor) -> Tensor:
    return torch.rsqrt((h * h).sum(-1, keepdim=True) / h.shape[-1] + EPS)


def sum_times_share(h: Tensor) -> Tensor:
    return torch.rsqrt((h * h).sum(-1, keepdim=True) * (1 / h.shape[-1]) + EPS)


def dropped_and_back(h: Tensor) -> Tensor:
    return torch.rsqrt(h.square().mean(-1) + EPS).unsqueeze(-1)


def dropped_and_back_earlier(h: Tensor) -> Tensor:
    return torch.rsqrt((h.square().mean(-1) + EPS)[..., None])


def square_of_magnitude(h: Tensor) -> Tensor:
    return torch.rsqrt(h.norm(dim=-1, keepdim=True).pow(2) / h.shape[-1] + EPS)


def vector_norm(h: Tensor) -> Tensor:
    root = torch.linalg.vector_norm(h, dim=-1, keepdim=True) * h.shape[-1] ** -0.5
    return (root * root + EPS).sqrt().reciprocal()


def of_absolutes(h: Tensor) -> Tensor:
    return h.abs().pow(2).mean(-1, keepdim=True).add(EPS).pow(0.5).pow(-1)


def by_tensors(h: Tensor) -> Tensor:
    """Keras on torch, which makes tensors of all numbers."""
    two, half = torch.full((), 2.0), torch.full((), -0.5)
    return (h.pow(two).mean(-1, keepdim=True) + torch.full((), EPS)).pow(half)


def of_all_columns(h: Tensor) -> Tensor:
    """vLLM's norm with a ``variance_size`` of the whole row."""
    return torch.rsqrt(h[..., : h.shape[-1]].pow(2).mean(-1, keepdim=True) + EPS)


def expanded(h: Tensor) -> Tensor:
    return torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS).expand_as(h)


def without_epsilon(h: Tensor) -> Tensor:
    return h.pow(2).mean(-1, keepdim=True).rsqrt()


def root_without_epsilon(h: Tensor) -> Tensor:
    return 1 / (h.norm(dim=-1, keepdim=True) / h.shape[-1] ** 0.5)


STATISTICS = [
    sum_over_hidden,
    sum_times_share,
    dropped_and_back,
    dropped_and_back_earlier,
    square_of_magnitude,
    vector_norm,
    of_absolutes,
    by_tensors,
    of_all_columns,
    expanded,
    without_epsilon,
    root_without_epsilon,
]


@pytest.mark.parametrize("inverse", STATISTICS, ids=lambda fn: fn.__name__)
def test_statistic(inverse: Callable[[Tensor], Tensor]) -> None:
    """Contract *exact*: the mean of squares by whatever steps, within the ulps that another rounding of it makes."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = r + reduce(x)
        return (total.float() * inverse(total.float()) * w.float()).to(x.dtype), total

    report = check_fused(trace(model, *tensors((4, HIDDEN), (4, HIDDEN), (HIDDEN,))), 1, ulps=1)
    epsilon = 0.0 if "without" in inverse.__name__ else torch.tensor(EPS).item()
    assert report.fused[0].epsilon == epsilon


# Products -------------------------------------------------------------------------------------------------------------


def inverse_of(h: Tensor) -> Tensor:
    return torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


def weight_first(h: Tensor, w: Tensor) -> Tensor:
    return (w.float() * h.float()) * inverse_of(h.float())


def weight_first_divided(h: Tensor, w: Tensor) -> Tensor:
    return (1 + w.float()) * h.float() / torch.sqrt(h.float().pow(2).mean(-1, keepdim=True) + EPS)


def weight_on_inverse(h: Tensor, w: Tensor) -> Tensor:
    return h.float() * (inverse_of(h.float()) * w.float())


def widened_thrice(h: Tensor, w: Tensor) -> Tensor:
    mean = torch.mean(h.float() * h.float(), dim=-1, keepdim=True, dtype=torch.float32)
    return h.float() * torch.rsqrt(mean + EPS) * w.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "norm", [weight_first, weight_first_divided, weight_on_inverse, widened_thrice], ids=lambda fn: fn.__name__
)
def test_product(norm: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    """Contract *exact*: row, inverse and weight multiplied in fp32 in any order; casts of their own go as well."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return norm(r + reduce(x), w).to(x.dtype)

    ulps = 1 if dtype == torch.bfloat16 else 4
    report = check_fused(trace(model, *tensors((4, HIDDEN), (4, HIDDEN), (HIDDEN,), dtype=dtype)), 1, ulps=ulps)
    assert report.fused[0].outputs == ("norm_out",)


def test_another_rows_inverse() -> None:
    """Contract *sound*: the inverse along another dimension of a square tensor scales columns, and is no norm's."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        h = reduce(x).float()
        return h * torch.rsqrt(h.pow(2).mean(-1) + EPS).unsqueeze(0) * w.float()

    check_unchanged(trace(model, *tensors((HIDDEN, HIDDEN), (HIDDEN,))))


def test_sum_of_squares_is_no_mean() -> None:
    """Contract *sound*: without the division by H it is another norm."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        h = reduce(x).float()
        return h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + EPS) * w.float()

    check_unchanged(trace(model, *tensors((4, HIDDEN), (HIDDEN,))))


# What is nearly a norm ------------------------------------------------------------------------------------------------


def beside_the_root(h: Tensor) -> Tensor:
    return h.float() / (h.float().norm(dim=-1, keepdim=True) * h.shape[-1] ** -0.5 + EPS)


def normalize(h: Tensor) -> Tensor:
    return F.normalize(h.float(), dim=-1) * h.shape[-1] ** 0.5


def floor(h: Tensor) -> Tensor:
    return h.float() * h.float().pow(2).mean(-1, keepdim=True).clamp_min(EPS).rsqrt()


def narrow_inverse(h: Tensor) -> Tensor:
    return h * inverse_of(h.float()).to(h.dtype)


def variance(h: Tensor) -> Tensor:
    return h.float() * torch.rsqrt(h.float().var(-1, keepdim=True) + EPS)


def layer_norm(h: Tensor) -> Tensor:
    return F.layer_norm(h, (h.shape[-1],))


def dot(h: Tensor) -> Tensor:
    return h.float() * torch.rsqrt(torch.linalg.vecdot(h.float(), h.float())[..., None] + EPS)


def centred(h: Tensor) -> Tensor:
    """Cohere's: a LayerNorm without a bias, in single steps."""
    centred = h.float() - h.float().mean(-1, keepdim=True)
    return centred * inverse_of(centred)


def centred_twice(h: Tensor) -> Tensor:
    return (h.float() - h.float().mean(-1, keepdim=True)) * inverse_of(h.float() - h.float().mean(-1, keepdim=True))


def l2(h: Tensor) -> Tensor:
    return h.float() * torch.rsqrt(h.float().pow(2).sum(-1, keepdim=True) + EPS)


def half_of_the_mean(h: Tensor) -> Tensor:
    return h.float() / torch.sqrt(h.float().pow(2).mean(-1, keepdim=True) * 0.5)


def of_heads(h: Tensor) -> Tensor:
    heads = h.view(-1, 3, h.shape[-1] // 3).float()
    return heads * inverse_of(heads)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (beside_the_root, "(aten.add.Tensor) adds to the root of the mean of squares"),
        (normalize, "(aten.clamp_min.default) keeps the divisor of a norm from 0"),
        (floor, "(aten.clamp_min.default) keeps the divisor of a norm from 0"),
        (narrow_inverse, "rounds the reciprocal root of a norm to torch.bfloat16"),
        (variance, "(aten.var.correction) belongs to a LayerNorm"),
        (layer_norm, "(aten.var_mean.correction) belongs to a LayerNorm"),
        (dot, "(aten.rsqrt.default) takes the root of the sum of a row's squares"),
        (centred, "(aten.sub.Tensor) belongs to a LayerNorm"),
        (centred_twice, "(aten.rsqrt.default) belongs to a LayerNorm"),
        (l2, "(aten.rsqrt.default) takes the root of the sum of a row's squares, as an L2 norm"),
        (half_of_the_mean, "(aten.sqrt.default) takes the root of 0.5 times the mean of squares"),
        (of_heads, "normalises rows of 16"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_nearly_a_norm(norm: Callable[[Tensor], Tensor], reason: str) -> None:
    """Contract *clear*: the step that makes it another norm is named, and nobody is told that none follows."""

    def model(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        total = r + reduce(x)
        return norm(total).to(x.dtype), total

    report = check_unchanged(trace(model, *tensors((4, HIDDEN), (4, HIDDEN))))
    assert reason in str(report.missed[0].reason)


@pytest.mark.parametrize("op", ["sum", "avg"])
def test_rows_split_over_the_ranks(op: str) -> None:
    """Contract *clear*: a norm whose mean of squares is what is reduced (Mamba 2's gated norm, norms of queries under
    tensor parallelism) is named, and nobody is told to reduce that otherwise."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        mean = reduce(h.pow(2).mean(-1, keepdim=True), op=op) / (2 if op == "sum" else 1)
        return w * (h * torch.rsqrt(mean + EPS)).to(x.dtype)

    (site,) = check_unchanged(trace(model, *tensors((4, HIDDEN), (HIDDEN,)))).missed
    expected = "takes the root: a norm over rows that are split over the ranks" if op == "sum" else "reduces by 'avg'"
    assert expected in str(site.reason) and site.advice is None


def test_rows_in_another_shape_behind_the_cast() -> None:
    """Widened first, viewed as batches then: the norm of the same rows."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = r + reduce(x)
        h = total.float().view(2, 2, HIDDEN)
        return w * (h * inverse_of(h)).to(x.dtype), total

    check_fused(trace(model, *tensors((4, HIDDEN), (4, HIDDEN), (HIDDEN,))), 1)


def test_columns_cut_behind_the_all_reduce() -> None:
    """Rows that were padded in front of it, as vLLM's experts pad theirs: the cut is named, and where it belongs."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        h = (r + reduce(x)[:, :HIDDEN]).float()
        return (h * inverse_of(h) * w.float()).to(x.dtype)

    report = check_unchanged(trace(model, *tensors((4, HIDDEN + 16), (4, HIDDEN), (HIDDEN,))))
    assert f"cuts rows of {HIDDEN} from the reduced ones of {HIDDEN + 16}" in str(report.missed[0].reason)


def test_an_index_that_nobody_reads_blames_nothing() -> None:
    """``max(dim)`` gives two results, and a graph may keep both: no kernel has the bf16 reciprocal behind it."""

    def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = reduce(x).float()
        norm = w * (h * inverse_of(h)).to(x.dtype)
        scale = 127.0 / norm.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
        return (norm * scale).round().clamp(-128, 127).to(torch.int8), scale

    report = check_fused(trace(model, *tensors((4, HIDDEN), (HIDDEN,))), 1)
    assert "aten.reciprocal.default" in str(report.fused[0].note)


def magnitude(h: Tensor) -> Tensor:
    """``aten.linalg_vector_norm`` where nobody decomposes it, as in an exported graph."""
    root = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    return torch.rsqrt(root * root / h.shape[-1] + EPS)


def magnitude_of_order_three(h: Tensor) -> Tensor:
    root = torch.linalg.vector_norm(h, 3, dim=-1, keepdim=True)
    return torch.rsqrt(root * root / h.shape[-1] + EPS)


def magnitude_of_columns(h: Tensor) -> Tensor:
    root = torch.linalg.vector_norm(h, dim=0, keepdim=True)
    return torch.rsqrt(root * root / h.shape[-1] + EPS)


@pytest.mark.parametrize("inverse", [magnitude, magnitude_of_order_three, magnitude_of_columns])
def test_magnitude_as_one_op(inverse: Callable[[Tensor], Tensor]) -> None:
    """Contract *exact*: of the second order, over a whole row."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = r + reduce(x)
        return (total.float() * inverse(total.float()) * w.float()).to(x.dtype), total

    raw = make_fx(torch.func.functionalize(model), tracing_mode="fake")(
        *tensors((HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN,))
    )
    if inverse is magnitude:
        check_fused(raw, 1, ulps=1)
    else:
        assert "belongs to no known RMSNorm" in str(check_unchanged(raw).missed[0].reason)


def test_epsilon_added_in_place() -> None:
    """torch's composite of ``F.rms_norm`` as make_fx alone leaves it: the reason is the write, not another norm."""
    raw = make_fx(lambda x, w: F.rms_norm(reduce(x), (HIDDEN,), w, EPS), tracing_mode="fake")(
        *tensors((4, HIDDEN), (HIDDEN,))
    )
    assert "(aten.add_.Scalar) adds epsilon in place" in str(check_unchanged(raw).missed[0].reason)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_operands_of_16_bits_beside_an_fp32_all_reduce(low: torch.dtype) -> None:
    """Contract *exact*: torch widens a residual and a weight in the op itself; the fused call takes them widened."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = reduce(x) + r
        return total * inverse_of(total) * w, total

    inputs = [*tensors((4, HIDDEN), dtype=torch.float32), *tensors((4, HIDDEN), (HIDDEN,), dtype=low)]
    module = trace(model, *inputs)
    check_fused(module, 1)
    fused, _ = fused_copy(module)
    assert calls(fused, torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor) == 0


def test_an_fp32_all_reduce_that_is_rounded() -> None:
    """Contract *clear*: the rounding in front of the norm is named, and what would go without."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        h = (r + reduce(x).to(r.dtype)).float()
        return (h * inverse_of(h) * w.float()).to(r.dtype)

    inputs = [*tensors((4, HIDDEN), dtype=torch.float32), *tensors((4, HIDDEN), (HIDDEN,))]
    reason = str(check_unchanged(trace(model, *inputs)).missed[0].reason)
    assert "rounds the reduced float32 to torch.bfloat16 in front of the norm" in reason


def test_a_factor_behind_a_norm_is_no_quantiser() -> None:
    """Falcon-H1 scales what its projections read by a number: nothing is quantised there, and no note says so."""

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
        return (llama(reduce(x) + r, w, 1e-6) * 1.25) @ projection

    _, report = fused_copy(trace(model, *tensors((4, 32), (4, 32), (32,), (32, 32))))
    (site,) = report.fused
    assert site.note is None
