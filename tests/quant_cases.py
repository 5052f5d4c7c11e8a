"""Quantisers as people write them in plain torch, each behind an all-reduce and a norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc

FP8 = torch.float8_e4m3fn
Tensor = torch.Tensor
HIDDEN = 256


# Norms ----------------------------------------------------------------------------------------------------------------


def llama(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return w * h.to(x.dtype)


def torch_norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), w, eps)


def gemma(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * (1.0 + w.float())).to(x.dtype)


# Quantisers -----------------------------------------------------------------------------------------------------------


def static_div(h: Tensor, s: Tensor) -> Tensor:
    return (h / s).clamp(-448, 448).to(FP8)


def static_div_f32(h: Tensor, s: Tensor) -> Tensor:
    return (h.float() / s).clamp(-448.0, 448.0).to(FP8)


def static_reciprocal(h: Tensor, s: Tensor) -> Tensor:
    return (h.float() * s.reciprocal()).clamp(min=-448.0, max=448.0).to(FP8)


def static_encode(h: Tensor, s: Tensor) -> Tensor:
    return (h.float() * s).clamp(-448.0, 448.0).to(FP8)


def static_max_first(h: Tensor, s: Tensor) -> Tensor:
    return (h.float() / s).clamp_max(448.0).clamp_min(-448).to(FP8)


def static_no_clamp(h: Tensor, s: Tensor) -> Tensor:
    return (h.float() / s).to(FP8)


def static_number(h: Tensor, s: Tensor) -> Tensor:
    return (h / 0.0517).clamp(-448, 448).to(FP8)


def static_number_mul(h: Tensor, s: Tensor) -> Tensor:
    return (h.float() * 7.3).clamp(-448, 448).to(FP8)


def static_expanded(h: Tensor, s: Tensor) -> Tensor:
    return (h.float() / s.expand(h.shape[0], 1)).clamp(-448, 448).to(FP8)


def static_unscaled(h: Tensor, s: Tensor) -> Tensor:
    return h.to(FP8)


def static_clamped_alone(h: Tensor, s: Tensor) -> Tensor:
    return h.clamp(-448, 448).to(FP8)


def static_detour(h: Tensor, s: Tensor) -> Tensor:
    return (h / s).float().clamp(-448, 448).to(torch.bfloat16).to(FP8)


def token(h: Tensor) -> tuple[Tensor, Tensor]:
    v = h.float()
    s = v.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448.0
    return (v / s).clamp(-448.0, 448.0).to(FP8), s


def token_vllm(h: Tensor) -> tuple[Tensor, Tensor]:
    amax = h.abs().amax(-1).unsqueeze(-1).float()
    s = (amax / 448.0).clamp(min=1.0 / (448.0 * 512.0))
    return (h.float() * s.reciprocal()).clamp(-448.0, 448.0).to(FP8), s


def token_torchao(h: Tensor) -> tuple[Tensor, Tensor]:
    s = (h.abs().amax(1, keepdim=True) / 448.0).float()
    return (h.float() / s).clamp(-448.0, 448.0).to(FP8), s


def token_ends(h: Tensor) -> tuple[Tensor, Tensor]:
    """compressed-tensors' largest magnitude, from both ends of a row."""
    low, high = h.amin(-1, keepdim=True), h.amax(-1, keepdim=True)
    low, high = torch.min(low, torch.zeros_like(low)), torch.max(high, torch.zeros_like(high))
    s = torch.max(low.abs(), high.abs()).float().clamp(min=1e-12) / 448.0
    return (h.float() / s).clamp(-448.0, 448.0).to(FP8), s


def token_aminmax(h: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(h.float(), dim=-1, keepdim=True)
    s = torch.maximum(high.abs(), low.clamp(max=0.0).abs()).clamp(min=1e-12) / 448.0
    return (h.float() / s).clamp(-448.0, 448.0).to(FP8), s


def token_expanded(h: Tensor) -> tuple[Tensor, Tensor]:
    """A scale for each element, as a view of the token's."""
    s = token(h)[1]
    return (h.float() / s.expand_as(h)).clamp(-448.0, 448.0).to(FP8), s


def token_squeezed(h: Tensor) -> tuple[Tensor, Tensor]:
    q, s = token(h)
    return q, s.squeeze(-1)


def token_low(h: Tensor) -> tuple[Tensor, Tensor]:
    s = h.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448.0
    return (h / s).clamp(-448.0, 448.0).to(FP8), s.float()


def group(h: Tensor, g: int = 128) -> tuple[Tensor, Tensor]:
    t = h.shape[0]
    v = h.reshape(t, h.shape[-1] // g, g).float()
    s = v.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (v / s).clamp(-448.0, 448.0).to(FP8).reshape(t, h.shape[-1]), s.squeeze(-1)


def group_repeated(h: Tensor) -> tuple[Tensor, Tensor]:
    """A scale for each element, copied from the group's."""
    s = h.reshape(h.shape[0], -1, 128).float().abs().amax(-1).clamp(min=1e-10) / 448.0
    return (h.float() / s.repeat_interleave(128, -1)).clamp(-448.0, 448.0).to(FP8), s


def group_64(h: Tensor) -> tuple[Tensor, Tensor]:
    return group(h, 64)


def group_32(h: Tensor) -> tuple[Tensor, Tensor]:
    return group(h, 32)


def group_minus_one(h: Tensor) -> tuple[Tensor, Tensor]:
    v = h.view(h.shape[0], -1, 128)
    amax = v.abs().float().amax(dim=2).view(h.shape[0], -1).clamp(1e-4)
    q = (v * (448.0 / amax.unsqueeze(2))).to(FP8).view(h.shape)
    return q, (amax / 448.0).view(h.shape[0], -1)


def group_vllm(h: Tensor) -> tuple[Tensor, Tensor]:
    v = h.reshape(-1, h.shape[-1] // 128, 128)
    amax = v.abs().max(dim=-1, keepdim=True)[0].float()
    s = (amax / 448.0).clamp(min=1.0 / (448.0 * 512.0))
    return (v / s).clamp(-448.0, 448.0).to(FP8).reshape(h.shape), s.reshape(h.shape[0], -1)


def group_flat(h: Tensor) -> tuple[Tensor, Tensor]:
    v = h.reshape(-1, 128).float()
    s = v.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (v / s).clamp(-448.0, 448.0).to(FP8).view(h.shape), s.view(h.shape[0], -1)


def group_as_is(h: Tensor) -> tuple[Tensor, Tensor]:
    v = h.reshape(h.shape[0], -1, 128).float()
    s = v.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (v / s).clamp(-448.0, 448.0).to(FP8), s


def group_column(h: Tensor) -> tuple[Tensor, Tensor]:
    q, s = group(h)
    return q, s.t().contiguous().t()


def group_transposed(h: Tensor) -> tuple[Tensor, Tensor]:
    q, s = group(h)
    return q, s.permute(1, 0).contiguous()


def group_column_empty(h: Tensor) -> tuple[Tensor, Tensor]:
    q, s = group(h)
    out = torch.empty(s.shape[1], s.shape[0], device=s.device, dtype=s.dtype).t()
    out.copy_(s)
    return q, out


def group_tma(h: Tensor) -> tuple[Tensor, Tensor]:
    q, s = group(h)
    t = h.shape[0]
    return q, torch.nn.functional.pad(s.t(), (0, (t + 3) // 4 * 4 - t)).t()[:t]


def group_tma_strided(h: Tensor) -> tuple[Tensor, Tensor]:
    q, s = group(h)
    t = h.shape[0]
    out = torch.empty_strided((t, s.shape[1]), (1, (t + 3) // 4 * 4), device=s.device, dtype=s.dtype)
    out.copy_(s)
    return q, out


def group_tma_deepgemm(h: Tensor) -> tuple[Tensor, Tensor]:
    q, s = group(h)
    m, n = s.shape
    aligned = torch.empty(1, n, (m + 3) // 4 * 4, device=s.device, dtype=s.dtype).transpose(1, 2)
    aligned[:, :m, :] = s.unsqueeze(0)
    return q, aligned[:, :m, :].squeeze(0)


def _group_pow2(h: Tensor, up: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    v = h.reshape(h.shape[0], -1, 128).float()
    s = up(v.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448.0)
    return (v / s).clamp(-448.0, 448.0).to(FP8).reshape(h.shape), s.squeeze(-1)


def group_pow2_log2(h: Tensor) -> tuple[Tensor, Tensor]:
    return _group_pow2(h, lambda s: torch.exp2(torch.ceil(torch.log2(s))))


def group_pow2_pow(h: Tensor) -> tuple[Tensor, Tensor]:
    return _group_pow2(h, lambda s: torch.pow(2.0, torch.ceil(torch.log2(s.abs()))))


def group_pow2_mask(h: Tensor) -> tuple[Tensor, Tensor]:
    return _group_pow2(h, lambda s: ((s.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32))


def _bits(s: Tensor) -> Tensor:
    bits = s.abs().view(torch.int)
    exponent = ((bits >> 23) & 0xFF) + (bits & 0x7FFFFF).bool().int()
    return (exponent.clamp(1, 254) << 23).view(torch.float)


def group_pow2_bits(h: Tensor) -> tuple[Tensor, Tensor]:
    return _group_pow2(h, _bits)


def int8_token(h: Tensor) -> tuple[Tensor, Tensor]:
    v = h.float()
    s = v.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127.0
    return torch.round(v / s).clamp(-128, 127).to(torch.int8), s


def int8_token_low(h: Tensor) -> tuple[Tensor, Tensor]:
    s = h.abs().amax(-1, keepdim=True).float() / 127
    return (h * (1.0 / s)).clamp(-128, 127).round().to(torch.int8), s


def int8_symmetric(h: Tensor) -> tuple[Tensor, Tensor]:
    """With a bound that keeps the scale normal no element is past 127."""
    v = h.float()
    s = v.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127.0
    return torch.round(v / s).clamp(-127, 127).to(torch.int8), s


def int8_unclamped(h: Tensor) -> tuple[Tensor, Tensor]:
    v = h.float()
    s = v.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127.0
    return torch.round(v * (1.0 / s)).to(torch.int8), s


# Not to be matched ----------------------------------------------------------------------------------------------------


def int8_symmetric_unbounded(h: Tensor) -> tuple[Tensor, Tensor]:
    """1 / scale is infinite for a tiny row: what is clamped at -127 here is -128 in the kernels."""
    s = h.abs().amax(-1, keepdim=True).float() / 127
    return (h * (1.0 / s)).clamp(-127, 127).round().to(torch.int8), s


def int8_static(h: Tensor) -> Tensor:
    return torch.round(h.float() / 0.05).clamp(-128, 127).to(torch.int8)


def int8_group(h: Tensor) -> tuple[Tensor, Tensor]:
    v = h.reshape(h.shape[0], -1, 128).float()
    s = v.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127.0
    return torch.round(v / s).clamp(-128, 127).to(torch.int8).reshape(h.shape), s


def int8_tensor(h: Tensor) -> tuple[Tensor, Tensor]:
    """torchao's with one scale for the tensor, found from both ends."""
    s = torch.maximum(h.amin().abs(), h.amax().abs()).float() / 127.0
    return torch.round(h.float() / s).clamp(-128, 127).to(torch.int8), s


def int8_subnormal(h: Tensor) -> tuple[Tensor, Tensor]:
    """Of an fp32 row of subnormal numbers the scale is rounded to half of what it should be."""
    v = h.float() * 1.0
    s = v.abs().amax(-1, keepdim=True) / 127.0
    return torch.round(v / s).clamp(-127, 127).to(torch.int8), s


def tensor_dynamic(h: Tensor) -> tuple[Tensor, Tensor]:
    s = h.float().abs().max() / 448.0
    return (h.float() / s).clamp(-448.0, 448.0).to(FP8), s


def token_added(h: Tensor) -> tuple[Tensor, Tensor]:
    s = (h.float().abs().amax(-1, keepdim=True) + 1e-6) / 448.0
    return (h.float() / s).clamp(-448.0, 448.0).to(FP8), s


def token_240(h: Tensor) -> tuple[Tensor, Tensor]:
    s = h.float().abs().amax(-1, keepdim=True) / 240.0
    return (h.float() / s).clamp(-240.0, 240.0).to(FP8), s


def token_upper(h: Tensor) -> tuple[Tensor, Tensor]:
    s = h.float().abs().amax(-1, keepdim=True).clamp(max=100.0) / 448.0
    return (h.float() / s).clamp(-448.0, 448.0).to(FP8), s


def group_96(h: Tensor) -> tuple[Tensor, Tensor]:
    return group(h, 16)


def group_of_columns(h: Tensor) -> tuple[Tensor, Tensor]:
    v = h.reshape(h.shape[0], -1, 128).float()
    s = v.abs().amax(1, keepdim=True).clamp(min=1e-10) / 448.0
    return (v / s).clamp(-448.0, 448.0).to(FP8).reshape(h.shape), s


def group_other_scale(h: Tensor) -> tuple[Tensor, Tensor]:
    """The scales of groups of 64 meet groups of 128 by way of a transposition: never a quantiser."""
    v = h.reshape(h.shape[0], 2, 128).float()
    s = (v.abs().amax(-1, keepdim=True) / 448.0).flip(1)
    return (v / s).clamp(-448.0, 448.0).to(FP8).reshape(h.shape), s


def token_compressed(h: Tensor) -> tuple[Tensor, Tensor]:
    """compressed-tensors in full: a scale of 0 is replaced, any other one stays, however small."""
    low, high = h.amin(-1, keepdim=True), h.amax(-1, keepdim=True)
    s = torch.max(low.clamp(max=0.0).abs(), high.clamp(min=0.0).abs()) / 448.0
    s = torch.where(s == 0, torch.tensor(torch.finfo(s.dtype).eps, dtype=s.dtype), s)
    return (h / s).clamp(-448.0, 448.0).to(FP8), s


def token_bounded_twice(h: Tensor) -> tuple[Tensor, Tensor]:
    """The bound on the scale is the smaller one."""
    s = (h.abs().amax(-1, keepdim=True).float().clamp(min=1e-4) / 448.0).clamp(min=1e-12)
    return (h.float() / s).clamp(-448.0, 448.0).to(FP8), s


def token_bounded_more(h: Tensor) -> tuple[Tensor, Tensor]:
    """The bound on the scale is the larger one."""
    s = (h.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448.0).clamp(min=1e-3)
    return (h.float() / s).clamp(-448.0, 448.0).to(FP8), s


def token_max_with_index(h: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's native form; the index that max gives besides is read by nobody."""
    s = (h.abs().max(dim=-1)[0].unsqueeze(-1).float() / 448.0).clamp(min=1 / (448.0 * 512.0))
    return (h.float() * s.reciprocal()).clamp(-448.0, 448.0).to(FP8), s


def token_highest(h: Tensor) -> tuple[Tensor, Tensor]:
    s = h.float().amax(-1, keepdim=True).clamp(min=1e-12) / 448.0
    return (h.float() / s).clamp(-448.0, 448.0).to(FP8), s


def token_lowest(h: Tensor) -> tuple[Tensor, Tensor]:
    s = h.float().amin(-1, keepdim=True).abs().clamp(min=1e-12) / 448.0
    return (h.float() / s).clamp(-448.0, 448.0).to(FP8), s


def int8_torchao(y: Tensor) -> tuple[Tensor, ...]:
    """torchao 0.18's ``Int8DynamicActivationInt8WeightConfig``: 255 steps over both signs."""
    zero = torch.zeros(y.shape[0], 1, dtype=y.dtype, device=y.device)
    low, high = torch.minimum(y.amin(1, keepdim=True), zero), torch.maximum(y.amax(1, keepdim=True), zero)
    scale = (torch.maximum(-low, high) / 127.5).float().clamp(min=torch.finfo(torch.float32).eps).to(y.dtype)
    codes = torch.round(y * (1.0 / scale.float())).clamp(-128, 127).to(torch.int8)
    return codes, scale


def int8_truncated(h: Tensor) -> tuple[Tensor, Tensor]:
    s = h.float().abs().amax(-1, keepdim=True) / 127.0
    return (h.float() / s).clamp(-128, 127).to(torch.int8), s


# Sites ----------------------------------------------------------------------------------------------------------------

Model = Callable[[Tensor, Tensor, Tensor, Tensor], Any]
"""What follows an all-reduce: ``model(y, r, w, s)`` gets the reduced tensor, a residual, a weight, a scale."""


def site(quantiser: Callable[..., Any], norm: Callable[..., Tensor] = llama, residual: str = "add") -> Model:
    """A norm and a quantiser; the residual sum is an output (``add``), nobody's (``dead``) or not there (``none``)."""
    given = quantiser.__name__.startswith("static")

    def model(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
        total = y if residual == "none" else r + y
        h = norm(total, w)
        out = quantiser(h, s) if given else quantiser(h)
        return out if residual == "dead" else (total, out)

    return model


def with_router(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    r = r + y
    h = llama(r, w)
    return r, static_div(h, s), h @ h.t()


def with_output(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    r = r + y
    h = gemma(r, w)
    return r, token(h), h


def with_indexer(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    r = r + y
    h = llama(r, w)
    return r, group(h), torch.nn.functional.linear(h, h[:4])


def with_other_reader(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    r = r + y
    h = llama(r, w)
    return r, group(h), h.relu()


def two_scales(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    h = llama(r + y, w)
    return static_div(h, s), static_div(h, s * 2)


def static_and_token(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    h = llama(r + y, w)
    return static_div_f32(h, s), int8_token(h)


def twins_static(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    h = llama(r + y, w)
    return static_div(h, s), static_div(h.clone(), s).float()


def twins_token(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    """Three linear layers that quantise their input each for itself; one does not read the scales."""
    h = llama(r + y, w)
    codes, scales = token_apart(h)
    return token(h)[0].float(), token(h), codes.float() * scales


def twins_returned(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    """Two of three leave the graph, the last through a view: whoever gets them may write to one."""
    h = llama(r + y, w)
    codes, scales = token_apart(h)
    return token(h)[0].float(), token(h), codes[1:], scales


def token_apart(h: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`token` in other words."""
    s = h.abs().amax(-1).float().clamp_min(1e-12).unsqueeze(-1) / 448.0
    return (h / s).clamp_max(448).clamp_min(-448.0).to(FP8), s


def scale_alone(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    """Codes without their scales."""
    return group(llama(r + y, w))[0]


def low_scales(h: Tensor) -> tuple[Tensor, Tensor]:
    """A scale in the norm's dtype, which the kernel's fp32 one is a widened form of."""
    scale = h.abs().amax(-1, keepdim=True) / 448.0
    return (h / scale).to(torch.float8_e4m3fn), scale


def low_and_wide_scales(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = h.abs().amax(-1) / 448.0
    return (h.float() / scale.unsqueeze(-1).float()).to(torch.float8_e4m3fn), scale, scale.float().unsqueeze(-1)


def low_scales_of_groups(h: Tensor) -> tuple[Tensor, Tensor]:
    v = h.reshape(h.shape[0], -1, 128)
    scale = v.abs().amax(-1, keepdim=True) / 448.0
    return (v / scale).to(torch.float8_e4m3fn).reshape(h.shape), scale


def low_scales_in_columns(h: Tensor) -> tuple[Tensor, Tensor]:
    """Which the kernel could only write in fp32: the copy stays."""
    q, s = low_scales_of_groups(h)
    return q, s.squeeze(-1).t().contiguous()


def inside_read(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    """The largest absolute value is an output: no kernel writes it."""
    h = llama(r + y, w).float()
    amax = h.abs().amax(-1, keepdim=True)
    return (h / (amax / 448.0)).clamp(-448.0, 448.0).to(FP8), amax


def three_dimensional(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    """Tokens in two dimensions, quantised as rows."""
    h = llama(r + y, w).reshape(-1, y.shape[-1])
    return group_column(h), h.shape[0]


def three_dimensional_token(y: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
    return token(llama(r + y, w))


@dataclasses.dataclass(frozen=True)
class Case:
    """A site and what it must become.

    Attributes:
        model: what follows the all-reduce.
        pattern: the pattern's name without ``AllReduce``.
        spec: fields of the fused quantiser's spec that are not the default's; None where none is fused.
        outputs: what the fused call writes, in short: allreduce, residual, norm, quant, scale.
        scale: the scale's value, in the shape that it has.
        shape, dtype, weight: of the reduced tensor, of it, of the weight.
        dynamic: the number of tokens is symbolic.
        counts: token counts that the same compiled graph is run with besides.
        note: a part of the report's sentence on a quantiser that is left.
        folds: the norm ends in a cast that a quantiser beginning with ``.float()`` undoes: torch 2.11 drops both.
        exact: the compiled model's outputs have the eager model's very bits.
    """

    model: Model
    pattern: str
    spec: dict[str, Any] | None = None
    outputs: str = "residual quant scale"
    scale: Any = 0.37
    shape: tuple[int, ...] = (6, HIDDEN)
    dtype: torch.dtype = torch.bfloat16
    weight: torch.dtype | None = None
    dynamic: bool = False
    counts: tuple[int, ...] = (9, 8)
    note: str | None = None
    folds: bool = False
    exact: bool = True


def inputs(case: Case, rank: int) -> tuple[Tensor, ...]:
    """One rank's x, r, w and the scale; the first token is all zero."""
    generator = torch.Generator().manual_seed(7)

    def rand(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    rows = [rand(*case.shape).to(case.dtype) for _ in range(3)]
    for row in rows:
        row.view(-1, case.shape[-1])[0] = 0
    w = (1 + 0.3 * rand(case.shape[-1])).to(case.weight or case.dtype)
    return rows[rank], rows[2], w, torch.tensor(case.scale)


def reduced(model: Model) -> Callable[..., Any]:
    """``model`` behind an all-reduce."""

    def whole(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
        return model(fc.all_reduce(x, "sum", dist.group.WORLD), r, w, s)

    return whole
