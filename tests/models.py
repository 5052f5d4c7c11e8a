"""The spellings of RMSNorm that models use, as plain functions: what the recognisers must know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
Norm = Callable[[Tensor, Any, Any], Tensor]


def reduce(x: Tensor, group: str = "0", op: str = "sum") -> Tensor:
    """``all_reduce`` and its wait, as functional collectives leave them in a graph."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, op, group))


def torch_norm(x: Tensor, w: Tensor | None, eps: float | None) -> Tensor:
    """``nn.RMSNorm``, ``F.rms_norm``."""
    return F.rms_norm(x, (x.shape[-1],), w, eps)


def llama(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Hugging Face Llama: rounded before the weight is multiplied, weight first."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return w * h.to(x.dtype)


def llama_weight_last(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """The same with the weight as the right operand, and the square as a product."""
    h = x.float()
    h = h * torch.rsqrt((h * h).mean(-1, keepdim=True) + eps)
    return h.to(x.dtype) * w


def gemma(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Hugging Face Gemma: ``weight + 1`` in fp32."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * (1.0 + w.float())).to(x.dtype)


def gemma_reversed(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Gemma with both operand orders turned around."""
    h = x.float()
    h = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * h
    return ((w.float() + 1.0) * h).to(x.dtype)


def single_rounding(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Weight in fp32, one rounding, the root as ``1 / sqrt``."""
    h = x.float()
    h = h * torch.reciprocal(torch.sqrt(h.pow(2).mean(-1, keepdim=True) + eps))
    return (h * w.float()).to(x.dtype)


def divided(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Divided by the root."""
    h = x.float()
    return (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * w


def divided_by_power(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Divided by the root as a power, weight in fp32."""
    h = x.float()
    return (h / (h.pow(2).mean(-1, keepdim=True) + eps) ** 0.5 * w.float()).to(x.dtype)


def one_over_root(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """``1 / sqrt``."""
    h = x.float()
    return w * (h * (1 / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def power(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """``** -0.5``."""
    h = x.float()
    return (h * (h.pow(2).mean(-1, keepdim=True) + eps) ** -0.5 * w.float()).to(x.dtype)


def weightless(x: Tensor, w: Tensor | None, eps: float) -> Tensor:
    """No weight."""
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def fp32_result(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """A norm that stays in fp32."""
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * w.float()


NORMS: dict[str, Norm] = {
    "torch": torch_norm,
    "llama": llama,
    "llama_weight_last": llama_weight_last,
    "gemma": gemma,
    "gemma_reversed": gemma_reversed,
    "single_rounding": single_rounding,
    "divided": divided,
    "divided_by_power": divided_by_power,
    "one_over_root": one_over_root,
    "power": power,
    "weightless": weightless,
    "fp32_result": fp32_result,
}


def sum_over_hidden(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """A sum over H instead of a mean."""
    h = x.float()
    return (h * torch.rsqrt((h * h).sum(-1, keepdim=True) / h.shape[-1] + eps) * w.float()).to(x.dtype)


def magnitude(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """The square of a magnitude, whose dimension comes back at the end."""
    h = x.float()
    return w * (h * torch.rsqrt(h.norm(dim=-1).pow(2) / h.shape[-1] + eps)[..., None]).to(x.dtype)


def weight_first(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Weight times row, then the root."""
    h = x.float()
    return (w.float() * h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def weight_on_root(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Weight times root, and casts of their own."""
    return (x.float() * (torch.rsqrt((x.float() * x.float()).mean(-1, keepdim=True) + eps) * w.float())).to(x.dtype)


SPELLINGS: dict[str, Norm] = {
    "sum_over_hidden": sum_over_hidden,
    "magnitude": magnitude,
    "weight_first": weight_first,
    "weight_on_root": weight_on_root,
}
"""Norms that are told apart on one graph each (``dialects/test_norm_spellings.py``), and drawn by random ones."""


OTHER_ROOTS = tuple(SPELLINGS)
"""Norms with other steps than the op has: what fuses is within the contract, and not the same bits."""


def unrounded_sum(y: Tensor, r: Tensor, w: Tensor, eps: float, norm: Norm) -> tuple[Tensor, Tensor]:
    """The sum taken in fp32, read unrounded by the norm and rounded for the next residual (vLLM, SGLang)."""
    total = y.float() + r.float()
    return norm(total, w, eps).to(y.dtype), total.to(y.dtype)
