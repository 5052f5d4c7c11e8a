"""The fused ops' meaning in torch ops, on CPU or GPU: what the kernels are tested against, and what runs without them.

Every function is pure and takes ``[T, H]`` tensors. ``T`` in a docstring's dtypes is the dtype of the tensor that is
reduced. Arithmetic is fp32 with each rounding written out; nothing is contracted into a fused multiply-add.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from arfusion_pass.ops.quantisers import quantise
from arfusion_pass.ops.spec import NO_QUANT, Flags, QuantFormat, QuantSpec

__all__ = [
    "EpilogueResult",
    "epilogue",
    "fused_add",
    "gather_ranks",
    "gather_rows",
    "moe_finalize",
    "moe_reduce",
    "ordered_all_reduce",
    "quantise",
    "rms_norm",
    "rows_of_owners",
    "scatter_rows",
    "sum_in_rank_order",
]


def gather_ranks(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All ranks' ``x``, ``[world, *x.shape]``, on every rank. Travels as bytes, so any dtype works on any back-end."""
    world = dist.get_world_size(group)
    if x.numel() == 0:
        return x.new_empty((world, *x.shape))
    mine = x.contiguous().view(-1).view(torch.uint8)
    everyone = torch.empty(world * mine.numel(), dtype=torch.uint8, device=x.device)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the old name warns from 2.13 on
    gather(everyone, mine, group=group)
    return everyone.view(x.dtype).view(world, *x.shape)


def sum_in_rank_order(stacked: torch.Tensor) -> torch.Tensor:
    """Sum over dimension 0, in order, in fp32, rounded once.

    ``stacked`` is ``[world, ...]``::

        total = stacked[0].float()
        for part in stacked[1:]: total = total + part.float()
        return total.to(stacked.dtype)
    """
    total = stacked[0].float()
    for part in stacked[1:]:
        total = total + part.float()
    return total.to(stacked.dtype)


def ordered_all_reduce(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum of ``x`` over the ranks of ``group``, in rank order, in fp32, rounded once to ``x.dtype``.

    The same bits on every rank and in every run. ``None``, or a world of one rank, gives a copy of ``x``.
    """
    if group is None or dist.get_world_size(group) == 1:
        return x.clone()
    return sum_in_rank_order(gather_ranks(x, group))


def rows_of_owners(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """``[..., H]`` with each token's row from the rank that owns it, ``token mod world``: made whole.

    Collective. ``None``, or a world of one rank, gives ``x``.
    """
    if group is None or dist.get_world_size(group) == 1:
        return x
    everyone = gather_ranks(x, group).flatten(1, -2)
    token = torch.arange(everyone.shape[1], device=x.device)
    return everyone[token % everyone.shape[0], token].view(x.shape)


def scatter_rows(x: torch.Tensor, group: dist.ProcessGroup | None, block: int) -> torch.Tensor:
    """This rank's rows ``[T / world, H]`` of the sum of ``x`` ``[T, H]`` over the ranks: row ``t`` is rank
    ``t // block % world``'s, a ``block`` of 0 stands for ``T / world``.

    Summed as the process group's own reduce-scatter does, in its order and with its roundings: so it has the bits of a
    graph that calls that. ``None``, or a world of one rank, gives a copy of ``x``.
    """
    if group is None or dist.get_world_size(group) == 1:
        return x.clone()
    world, hidden = dist.get_world_size(group), x.shape[-1]
    rows = x.shape[0] // world
    dealt = x.reshape(-1, world, block or max(rows, 1), hidden).transpose(0, 1).contiguous()
    mine = x.new_empty(rows, hidden)
    if mine.numel():
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(mine, dealt.view(x.shape[0], hidden), group=group)
    return mine


def gather_rows(mine: torch.Tensor, group: dist.ProcessGroup | None, block: int) -> torch.Tensor:
    """All ranks' rows ``[T, W]`` from each one's ``[T / world, W]``, of any dtype, in the order in which
    :func:`scatter_rows` deals them out. ``None``, or a world of one rank, gives a copy of ``mine``."""
    if group is None or dist.get_world_size(group) == 1:
        return mine.clone()
    everyone = gather_ranks(mine, group)
    rows = max(mine.shape[0], 1)
    return everyone.view(len(everyone), -1, block or rows, mine.shape[-1]).transpose(0, 1).reshape(-1, mine.shape[-1])


def fused_add(
    reduced: torch.Tensor,
    residual: torch.Tensor | None,
    addend: torch.Tensor | None = None,
    flags: int = 0,
    factor: torch.Tensor | None = None,
    factor_value: float = 1.0,
) -> torch.Tensor:
    """The fp32 sum of ``reduced`` and what is given of ``addend`` and ``residual``, in this order, with ``ADDEND_LAST``
    in the other: rounded to ``reduced.dtype`` between the two adds, unrounded behind the last.

    A factor other than the number 1 multiplies ``reduced``, or with ``ADDEND_SCALED`` the rounded sum of that and
    ``addend``; the product is rounded.

    Args:
        reduced: ``T`` ``[T, H]``.
        residual, addend: that, or one row ``[H]``; ``residual`` may be fp32.
        factor: one element, or ``[T, 1]``, in ``T`` or fp32; None: ``factor_value``, read as fp32.
    """

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return value.to(reduced.dtype).float()

    total = reduced.float()
    if flags & Flags.ADDEND_SCALED and addend is not None:
        total, addend = rounded(total + addend.float()), None
    if factor is not None:
        total = rounded(total * factor.float())
    elif factor_value != 1.0:
        total = rounded(total * factor_value)
    first, last = (residual, addend) if flags & Flags.ADDEND_LAST else (addend, residual)
    if first is not None:
        total = total + first.float()
    if last is not None:
        total = (total if first is None else rounded(total)) + last.float()
    return total


def rms_norm(
    value: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    weight_bias: float,
    flags: int,
    dtype: torch.dtype,
    epsilon_tensor: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm over the last dimension; the result in fp32, for the caller to round once::

        normalised = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + epsilon)   # default
        normalised = value / torch.sqrt(...)                                          # DIVIDE_BY_ROOT
        normalised = value * torch.reciprocal(torch.sqrt(...))                        # RECIPROCAL_ROOT
        normalised * (weight_bias + weight.float())                                   # default
        normalised.to(dtype) * weight                                                 # ROUND_BEFORE_WEIGHT

    With ``ROUND_BEFORE_WEIGHT`` a weight in ``dtype`` and no bias is multiplied in ``dtype``, that is, the product is
    rounded to ``dtype`` as well; an fp32 weight, or a bias, makes the product fp32. A bias of 0 is not added (it would
    turn a weight of -0.0 into +0.0).

    Args:
        value: fp32 ``[..., H]``.
        weight: ``[H]`` in ``dtype`` or fp32, or None.
        epsilon: a number.
        weight_bias: added to the weight in fp32 (Gemma: 1).
        flags: :class:`~arfusion_pass.ops.spec.Flags`.
        dtype: ``T``.
        epsilon_tensor: one element, read as fp32 in place of ``epsilon`` where it is given.
    """
    variance = value.pow(2).mean(-1, keepdim=True)
    variance = variance + (epsilon if epsilon_tensor is None else epsilon_tensor.float().view(()))
    if flags & Flags.DIVIDE_BY_ROOT:
        normalised = value / torch.sqrt(variance)
    elif flags & Flags.RECIPROCAL_ROOT:
        normalised = value * torch.reciprocal(torch.sqrt(variance))
    else:
        normalised = value * torch.rsqrt(variance)
    if flags & Flags.ROUND_BEFORE_WEIGHT:
        low = normalised.to(dtype)
        if weight is not None and weight.dtype == dtype and weight_bias == 0.0:
            return (low * weight).float()
        normalised = low.float()
    if weight is None:
        return normalised
    factor = weight.float()
    return normalised * (factor + weight_bias if weight_bias != 0.0 else factor)


@dataclasses.dataclass(frozen=True)
class EpilogueResult:
    """What an epilogue gives, before each output's own rounding: ``output.copy_(field)`` is all that is left to do.

    Args:
        reduced: ``T`` ``[T, H]``.
        total: fp32 ``[T, H]``, the sum with the residual.
        norm: fp32 ``[T, H]``, None where it was not asked for.
        codes: quantised ``[T, H]`` (NVFP4: uint8 ``[T, H / 2]``), None without a quantiser.
        scales: logical ``[T, G]``, None where none are written.
    """

    reduced: torch.Tensor
    total: torch.Tensor
    norm: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    scales: torch.Tensor | None = None


def epilogue(
    reduced: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    epsilon: float = 1e-6,
    epsilon_tensor: torch.Tensor | None = None,
    weight_bias: float = 0.0,
    flags: int = 0,
    spec: QuantSpec = NO_QUANT,
    scale_value: float = 1.0,
    with_norm: bool = True,
    addend: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    factor_value: float = 1.0,
) -> EpilogueResult:
    """Everything after the all-reduce, shared by the fused ops::

        total = fused_add(reduced, residual, addend, flags, factor, factor_value)
        norm = rms_norm(total if UNROUNDED_SUM else total.to(T).float())
        codes, scales = quantise(norm)

    ``reduced`` and ``residual`` are ``[T, H]``, ``addend`` is that or ``[H]``, ``factor`` one element or ``[T, 1]``;
    ``T`` is ``reduced.dtype``.
    """
    dtype = reduced.dtype
    total = fused_add(reduced, residual, addend, flags, factor, factor_value)
    if not with_norm:
        return EpilogueResult(reduced, total)
    value = total if flags & Flags.UNROUNDED_SUM else total.to(dtype).float()
    norm = rms_norm(value, weight, epsilon, weight_bias, flags, dtype, epsilon_tensor)
    if spec.format == QuantFormat.NONE:
        return EpilogueResult(reduced, total, norm)
    codes, scales = quantise(norm, spec, scale, scale_value, dtype)
    return EpilogueResult(reduced, total, norm, codes, scales)


def _rounded(value: torch.Tensor, flags: int, flag: Flags, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype).float() if flags & flag else value


def moe_reduce(
    expert_x: torch.Tensor, expert_scale: torch.Tensor, token_input: torch.Tensor | None, flags: int
) -> torch.Tensor:
    """Weighted sum over the local experts, in expert order, plus the token's own input; one rounding to ``T``::

        total = zeros
        for e in range(E): total = total + expert_x[e].float() * expert_scale[e].float()
        return (total + token_input.float()).to(expert_x.dtype)

    ``MOE_ROUND_PRODUCT``, ``MOE_ROUND_PARTIAL`` and ``MOE_ROUND_SUM`` round each product, each partial sum (the first
    included) and the sum over experts to ``T``.

    Args:
        expert_x: ``T`` ``[E, tokens, H]``.
        expert_scale: fp32 ``[E, tokens]``.
        token_input: ``T`` ``[tokens, H]`` or None.
    """
    dtype = expert_x.dtype
    total = torch.zeros(expert_x.shape[1:], dtype=torch.float32, device=expert_x.device)
    for x, weight in zip(expert_x, expert_scale, strict=True):
        product = _rounded(x.float() * weight.float().unsqueeze(-1), flags, Flags.MOE_ROUND_PRODUCT, dtype)
        total = _rounded(total + product, flags, Flags.MOE_ROUND_PARTIAL, dtype)
    total = _rounded(total, flags, Flags.MOE_ROUND_SUM, dtype)
    return (total if token_input is None else total + token_input.float()).to(dtype)


def moe_finalize(
    permuted_x: torch.Tensor,
    index: torch.Tensor,
    expert_scale: torch.Tensor | None,
    shared: torch.Tensor | None,
    routed_scaling_factor: float,
    flags: int,
) -> torch.Tensor:
    """Gather each token's expert rows, weight and sum them in ``k`` order, scale, add the shared expert; one rounding::

        total = zeros
        for k in range(K): total = total + permuted_x[index[:, k]].float() * expert_scale[:, k].float()
        return (total * routed_scaling_factor + shared.float()).to(permuted_x.dtype)

    An index outside ``[0, P)`` is skipped. A factor of 1 is not multiplied. ``MOE_ROUND_PRODUCT``,
    ``MOE_ROUND_PARTIAL``, ``MOE_ROUND_SUM`` and ``MOE_ROUND_SCALED`` round each product, partial sum, the sum and the
    scaled sum to ``T``.

    Args:
        permuted_x: ``T`` ``[P, H]``.
        index: int32 ``[tokens, K]``; -1, like everything outside ``[0, P)``, for none.
        expert_scale: fp32 or ``T`` ``[tokens, K]``, or None for plain sums.
        shared: ``T`` ``[tokens, H]`` or None.
    """
    dtype = permuted_x.dtype
    tokens, slots = index.shape
    total = torch.zeros(tokens, permuted_x.shape[-1], dtype=torch.float32, device=permuted_x.device)
    for k in range(slots if permuted_x.shape[0] else 0):
        chosen = index[:, k].long()
        there = (chosen >= 0) & (chosen < permuted_x.shape[0])
        product = permuted_x[torch.where(there, chosen, 0)].float()
        if expert_scale is not None:
            product = product * expert_scale[:, k].float().unsqueeze(-1)
        product = _rounded(product, flags, Flags.MOE_ROUND_PRODUCT, dtype)
        partial = _rounded(total + product, flags, Flags.MOE_ROUND_PARTIAL, dtype)
        total = torch.where(there.unsqueeze(-1), partial, total)
    total = _rounded(total, flags, Flags.MOE_ROUND_SUM, dtype)
    if routed_scaling_factor != 1.0:
        total = _rounded(total * routed_scaling_factor, flags, Flags.MOE_ROUND_SCALED, dtype)
    return (total if shared is None else total + shared.float()).to(dtype)
