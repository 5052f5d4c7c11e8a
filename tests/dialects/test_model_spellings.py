"""Sites as public model code spells them, one function each: bit for bit, or missed for a true reason.

``FUSED`` names what must fuse whole, ``LEFT`` what must not, with a part of the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.models import Tensor, llama, reduce
from tests.simulate import check_fused, check_same, fused_copy, tensors, trace

BF16 = torch.bfloat16
TOKENS, HIDDEN, EPS = 6, 64, 1e-6

pytestmark = pytest.mark.usefixtures("world")


def inverse(h: Tensor) -> Tensor:
    return torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


def norm32(h: Tensor, w: Tensor) -> Tensor:
    return (h * inverse(h) * w.float()).to(BF16)


# Norms, of (x, residual, weight, one more tensor) ---------------------------------------------------------------------


def litgpt(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = reduce(x) + r
    h = s.to(torch.float32)
    return (h * torch.rsqrt(torch.mean(h * h, dim=-1, keepdim=True) + EPS) * (1 + w).float()).to(s.dtype), s


def t5(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + reduce(x)
    return w * (s * torch.rsqrt(s.to(torch.float32).pow(2).mean(-1, keepdim=True) + EPS)).to(w.dtype), s


def chatglm(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + reduce(x)
    return (w * (s * torch.rsqrt(s.to(torch.float32).pow(2).mean(-1, keepdim=True) + EPS))).to(BF16), s


def olmo_with_bias(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + reduce(x)
    return llama(s, w, EPS) + t[0], s


def olmo2_behind_the_norm(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    return r + F.rms_norm(reduce(x), (HIDDEN,), w, EPS)


def engines_unrounded(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    h = reduce(x).to(torch.float32) + r.to(torch.float32)
    return w * (h * inverse(h)).to(BF16), h.to(BF16)


def vllm_variance_size(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    h = reduce(x).to(torch.float32) + r
    return (h * inverse(h[:, :HIDDEN])).to(BF16) * w, h.to(BF16)


def gemma_as_sum(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + reduce(x)
    h = s.float() * inverse(s.float())
    return torch.addcmul(h, h, w.float()).to(BF16), s


def written_in_place(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    y = reduce(x)
    y += r
    h = y.float()
    return h.mul_(h.pow(2).mean(-1, keepdim=True).add_(EPS).rsqrt_()).to(BF16).mul_(w), y


def weight_of_another_dtype(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + reduce(x)
    return (s.float() * inverse(s.float()) * w.half().float()).to(BF16), s


def dropout_of_nothing(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + F.dropout(reduce(x), 0.0, True)
    return llama(s, w, EPS), s


def two_norms_of_one_sum(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + reduce(x)
    return llama(s, w, EPS), llama(s, w * 2, EPS), s


def two_weights_of_one_norm(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + reduce(x)
    h = (s.float() * inverse(s.float())).to(BF16)
    return w * h, (w * 2) * h, s


def mamba_fp32_stream(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    stream = reduce(x) + r.float()
    return F.rms_norm(stream, (HIDDEN,), w.float(), EPS).to(BF16), stream


def residual_scaled(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r * 3.5 + reduce(x)
    return llama(s, w, EPS), s


def stream_is_written_back(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + reduce(x)
    r.copy_(s)
    return llama(s, w, EPS)


def weight_is_written_later(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + reduce(x)
    n = llama(s, w, EPS)
    w.mul_(2)
    return n, s


# Quantisers -----------------------------------------------------------------------------------------------------------


def quantised(quantise: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def site(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
        s = r + reduce(x)
        return *quantise(llama(s, w, EPS)), s

    site.__name__ = quantise.__name__
    return site


def per_token_cast(h: Tensor) -> Any:
    v = h.view(TOKENS, -1, 32)
    scale = v.abs().float().amax(dim=2).view(TOKENS, -1).clamp(1e-4) / 448.0
    return (v * (1.0 / scale.unsqueeze(2))).to(torch.float8_e4m3fn).view(h.shape), scale


def per_token_cast_packed(h: Tensor) -> Any:
    v = h.view(TOKENS, -1, 32)
    scale = v.abs().float().amax(dim=2).view(TOKENS, -1).clamp(1e-4) / 448.0
    scale = torch.pow(2.0, torch.ceil(torch.log2(scale)))
    return (v * (1.0 / scale.unsqueeze(2))).to(torch.float8_e4m3fn).view(h.shape), scale


def by_vector_norm(h: Tensor) -> Any:
    amax = torch.linalg.vector_norm(h.float(), float("inf"), dim=-1, keepdim=True)
    scale = (amax / 448.0).clamp(min=1e-12)
    return (h.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def dequantised_at_once(h: Tensor) -> Any:
    scale = h.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448.0
    return (((h.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).to(BF16),)


def masked(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + reduce(x) * t[:, :1]
    return llama(s, w, EPS), s


def two_lambdas(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    """The stream and the embedding by learned factors, as speedruns of small models have them."""
    s = w[0] * (r + reduce(x)) + w[1] * t
    return F.rms_norm(s, (HIDDEN,)), s


FUSED = [litgpt, t5, chatglm, olmo_with_bias, olmo2_behind_the_norm, engines_unrounded, vllm_variance_size,
         gemma_as_sum, written_in_place, weight_of_another_dtype, dropout_of_nothing, two_norms_of_one_sum,
         two_weights_of_one_norm, mamba_fp32_stream, residual_scaled, stream_is_written_back, weight_is_written_later,
         masked, two_lambdas,
         *map(quantised, (per_token_cast, per_token_cast_packed, by_vector_norm, dequantised_at_once))]  # fmt: skip


@pytest.mark.parametrize("model", FUSED, ids=lambda f: f.__name__)
def test_fused(model: Callable[..., Any]) -> None:
    """Contract *exact*: one call in its place, the same bits, quantisers included."""
    report = check_fused(trace(model, *tensors(*[(TOKENS, HIDDEN)] * 2, (HIDDEN,), (TOKENS, HIDDEN))), 1)
    assert (report.fused[0].quantiser is not None) == (model in FUSED[-4:]), str(report)


# What is nearly a site ------------------------------------------------------------------------------------------------


def squares_in_16_bits(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + reduce(x)
    return (s.float() * torch.rsqrt(s.pow(2).float().mean(-1, keepdim=True) + EPS) * w.float()).to(BF16), s


def statistic_of_the_unrounded_sum(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    h = r.float() + reduce(x).float()
    return (h.to(BF16).float() * inverse(h) * w.float()).to(BF16), h


def statistic_of_another_row(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + reduce(x)
    return (s.float() * inverse(s.float()).roll(1, 0) * w.float()).to(BF16), s


def statistic_of_one_addend(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    y = reduce(x)
    s = r + y
    return (s.float() * inverse(y.float()) * w.float()).to(BF16), s


def epsilon_of_each_row(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + reduce(x)
    root = torch.rsqrt(s.float().pow(2).mean(-1, keepdim=True) + t[:, :1].float().abs())
    return (s.float() * root * w.float()).to(BF16), s


def root_is_read(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + reduce(x)
    root = inverse(s.float())
    return w * (s.float() * root).to(BF16), s, root


def residual_from_the_all_reduce(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    y = reduce(x)
    s = y + y.relu()
    return llama(s, w, EPS), s


def one_column_added(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + (reduce(x) + t[:, :1])
    return llama(s, w, EPS), s


def last_token_alone(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    return llama((r + reduce(x))[-1:], w, EPS)


def averaged(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    s = r + reduce(x, op="avg")
    return llama(s, w, EPS), s


def hyper_connections(x: Tensor, r: Tensor, w: Tensor, t: Tensor) -> Any:
    streams = torch.stack([r, t]) + t[:2, :1, None] * reduce(x)
    return llama(streams.sum(0), w, EPS), streams


LEFT = {
    squares_in_16_bits: "squares rows in torch.bfloat16",
    statistic_of_the_unrounded_sum: "belongs to no known RMSNorm",
    statistic_of_another_row: "belongs to no known RMSNorm",
    statistic_of_one_addend: "belongs to no known RMSNorm",
    epsilon_of_each_row: "epsilon is a tensor of more than one element",
    root_is_read: "a value inside the RMSNorm, is also read by the graph's output",
    residual_from_the_all_reduce: "which the call itself would produce",
    one_column_added: "(aten.add.Tensor) stands between it and the norm",
    last_token_alone: "(aten.slice.Tensor) stands between it and the norm",
    averaged: "reduces by 'avg'",
    hyper_connections: "(aten.mul.Tensor) stands between it and the norm",
}


@pytest.mark.parametrize("model", LEFT, ids=lambda f: f.__name__)
def test_left_alone(model: Callable[..., Any]) -> None:
    """Contracts *sound* and *clear*: the graph as it was, and the step that stood in the way."""
    module = trace(model, *tensors(*[(TOKENS, HIDDEN)] * 2, (HIDDEN,), (TOKENS, HIDDEN)))
    fused, report = fused_copy(module)
    assert not report.fused
    assert LEFT[model] in str(report.missed[0].reason)
    check_same(module, fused)


SQUARE: dict[Callable[..., Any], int] = {
    lambda x, r, w: llama(r.t() + reduce(x), w, EPS): 1,
    lambda x, r, w: llama(r + reduce(x).t(), w, EPS): 0,
    lambda x, r, w: llama(r[:1] + reduce(x), w, EPS): 1,
    lambda x, r, w: llama(r[:, :1] + reduce(x), w, EPS): 0,
    lambda x, r, w: norm32((r + reduce(x)).float(), w[:, None]): 1,  # weights of rows: a norm without any in front
    lambda x, r, w: (lambda h: h * torch.rsqrt(h.pow(2).mean(0, keepdim=True) + EPS))((r + reduce(x)).float()): 0,
    lambda x, r, w: (lambda h: h * torch.rsqrt(h.pow(2).mean(-1) + EPS))((r + reduce(x)).float()): 0,
    lambda x, r, w: (lambda h: h * inverse(h).expand(h.shape).t())((r + reduce(x)).float()): 0,
    lambda x, r, w: (lambda h: h * inverse(h.t()))((r + reduce(x)).float()): 0,
}


@pytest.mark.parametrize("model", SQUARE, ids=map(str, range(len(SQUARE))))
def test_as_many_rows_as_columns(model: Callable[..., Any]) -> None:
    """Contract *sound*: where ``[T, H]`` is square no shape tells rows from columns, nor a weight from a column."""
    module = trace(model, *tensors(*[(HIDDEN, HIDDEN)] * 2, (HIDDEN,)))
    fused, report = fused_copy(module)
    assert report.matched_count == SQUARE[model], str(report)
    check_same(module, fused)
