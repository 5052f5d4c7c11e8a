"""MoE combinations as models write them in front of an all-reduce, in plain torch.

Finalize: ``(permuted [P, H], index [T, K], weights [T, K], shared [T, H]) -> [T, H]``. An index below zero counts from
the end, as torch's indexing does, but in the masked forms, where it stands for no expert.
Reduce: ``(experts [E, T, H], scales [E, T], token [T, H]) -> [T, H]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensor = torch.Tensor
Combine = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
FACTOR = 2.3


def plain(permuted: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    """Without weights."""
    return permuted[index].sum(1)


def weighted(permuted: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    """Products and their sum in the tensor's dtype."""
    return (permuted[index] * weights.unsqueeze(-1)).sum(dim=1)


def weighted_fp32(permuted: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    """fp32 throughout, one rounding."""
    return (permuted[index].float() * weights.float().unsqueeze(-1)).sum(dim=1).to(permuted.dtype)


def promoted(permuted: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    """A router in fp32, which makes the products fp32."""
    return (permuted[index] * weights.float().cos().unsqueeze(-1)).sum(dim=1).to(permuted.dtype)


def scaled(permuted: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    return weighted(permuted, index, weights, shared) * FACTOR


def shared_last(permuted: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    return weighted(permuted, index, weights, shared) * FACTOR + shared


def shared_first(permuted: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    return shared + weighted(permuted, index, weights, shared)


def shared_fp32(permuted: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    """fp32 up to the shared expert."""
    routed = (permuted[index].float() * weights.float().unsqueeze(-1)).sum(dim=1)
    return (routed * FACTOR + shared.float()).to(permuted.dtype)


def selected(permuted: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    """Gathered by the flat index."""
    rows = permuted.index_select(0, index.clamp(min=0).reshape(-1)).reshape(*index.shape, permuted.shape[-1])
    return (weights.unsqueeze(-1) * rows).sum(dim=1)


def masked(permuted: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    product = permuted[index.clamp(min=0)] * weights.unsqueeze(-1)
    return torch.where((index >= 0).unsqueeze(-1), product, 0.0).sum(dim=1)


def masked_shared(permuted: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    return masked(permuted, index, weights, shared) + shared


def masked_at_minus_one(permuted: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    """Only -1 stands for no expert; other negative ones count from the end."""
    return torch.where((index != -1).unsqueeze(-1), permuted[index] * weights.unsqueeze(-1), 0.0).sum(dim=1)


def masked_and_clamped(permuted: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    """Only -1 stands for no expert; other negative ones are row 0."""
    product = permuted[index.clamp(min=0)] * weights.unsqueeze(-1)
    return torch.where((index != -1).unsqueeze(-1), product, 0.0).sum(dim=1)


def masked_above_minus_one(permuted: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    return torch.where((index > -1).unsqueeze(-1), permuted[index] * weights.unsqueeze(-1), 0.0).sum(dim=1)


def one_by_one(permuted: Tensor, index: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    """Every partial sum in the tensor's dtype."""
    total = permuted[index[:, 0]] * weights[:, 0:1]
    for k in range(1, index.shape[1]):
        total = total + permuted[index[:, k]] * weights[:, k : k + 1]
    return total


FINALIZE: dict[str, Combine] = {
    "plain": plain,
    "weighted": weighted,
    "weighted_fp32": weighted_fp32,
    "promoted": promoted,
    "scaled": scaled,
    "shared_last": shared_last,
    "shared_first": shared_first,
    "shared_fp32": shared_fp32,
    "selected": selected,
    "masked": masked,
    "masked_shared": masked_shared,
    "masked_at_minus_one": masked_at_minus_one,
    "masked_and_clamped": masked_and_clamped,
    "masked_above_minus_one": masked_above_minus_one,
    "one_by_one": one_by_one,
}


def reduced(experts: Tensor, scales: Tensor, token: Tensor) -> Tensor:
    return (experts * scales.unsqueeze(-1)).sum(dim=0)


def reduced_fp32(experts: Tensor, scales: Tensor, token: Tensor) -> Tensor:
    return (experts.float() * scales.float().unsqueeze(-1)).sum(dim=0).to(experts.dtype)


def reduced_promoted(experts: Tensor, scales: Tensor, token: Tensor) -> Tensor:
    """Scales in fp32."""
    return (scales.float().cos().unsqueeze(-1) * experts).sum(dim=0).to(experts.dtype)


def reduced_token(experts: Tensor, scales: Tensor, token: Tensor) -> Tensor:
    return reduced(experts, scales, token) + token


REDUCE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "reduced": reduced,
    "reduced_fp32": reduced_fp32,
    "reduced_promoted": reduced_promoted,
    "reduced_token": reduced_token,
}
