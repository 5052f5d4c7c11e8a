"""aten's spellings of RMSNorm, with or without a residual add: ``nn.RMSNorm``, Hugging Face Llama and Gemma, and
every hand-written kin of theirs that Inductor's decompositions leave as this chain::

    %total = aten.add.Tensor(%residual, %value)                 # either operand order; absent without a residual
    %wide  = prims.convert_element_type.default(%total, f32)    # absent where the sum is fp32 already
    %pow   = aten.pow.Tensor_Scalar(%wide, 2)                   # or mul(wide, wide)
    %mean  = aten.mean.dim(%pow, [-1], True)                    # :mod:`.reading.mean_squares` has its other spellings
    %plus  = aten.add.Tensor(%mean, 1e-06)
    %rsqrt = aten.rsqrt.default(%plus)
    %y     = aten.mul.Tensor(%wide, %rsqrt)                     # or div(%wide, %root); the weight may come first
    then one of
      weight in fp32:    %mul = aten.mul.Tensor(%y, %weight); %norm = convert_element_type(%mul, bf16)
      Gemma:             the same with %weight = add(convert_element_type(%w, f32), 1.0)
      two roundings:     %y16 = convert_element_type(%y, bf16); %norm = aten.mul.Tensor(%weight, %y16)
      no weight:         %norm = convert_element_type(%y, bf16)

Casts may be missing (fp32 models, torch 2.11's folding of bf16 round trips), views that keep the last dimension
may stand between the stages, and the sum may be taken in fp32 and read unrounded (``Flags.UNROUNDED_SUM``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import fx

from arfusion_pass.dialects.reading.base import Dialect, Norm, Refused
from arfusion_pass.dialects.reading.mean_squares import Inverse, inverses, is_rooted, squares
from arfusion_pass.dialects.reading.operands import Sum, Weight, readable_total, weight_of
from arfusion_pass.graph import (
    describe,
    dtype_of,
    is_call,
    is_cast,
    last_dim,
    only_user,
    other_operand,
    path,
    peel,
    row_views,
    same_shape,
    users_of,
    widens,
)
from arfusion_pass.ops.spec import Flags

aten = torch.ops.aten


class Aten(Dialect):
    """Decomposed RMSNorm in aten and prims ops."""

    name = "aten"

    def norms(self, value: fx.Node, candidates: Sequence[Sum]) -> Iterable[Norm | Refused]:
        """Direct norms of ``value`` first, then those of its sums with a residual."""
        for candidate in candidates:
            for start in row_views(candidate.start):
                for chain in _chains(start, dtype_of(value)):
                    if isinstance(chain, Refused):
                        yield chain
                        continue
                    views = path(candidate.start, start)
                    nodes = (*candidate.nodes, *views, *chain.nodes)
                    total = readable_total(candidate, nodes)
                    yield dataclasses.replace(
                        chain,
                        operand=value,
                        residual=candidate.residual,
                        total=total,
                        flags=chain.flags | candidate.flags,
                        nodes=nodes if total is None or total in nodes else (*nodes, total),
                    )


def _chains(start: fx.Node, dtype: torch.dtype | None) -> Iterator[Norm | Refused]:
    """The norms that read ``start``: its statistic, and what that and the weight multiply."""
    roots: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(start, ())] if dtype_of(start) == torch.float32 else []
    for wide in filter(widens, start.users):
        roots += [(root, (wide, *path(wide, root))) for root in row_views(wide)]
    if dtype_of(start) != torch.float32:
        for *_, square in squares(start):
            for low in filter(is_rooted, users_of(square, aten.mean.dim)):
                yield Refused(
                    f"{describe(low)} belongs to a norm that is computed in {dtype_of(start)} throughout; the fused "
                    "op computes it in float32: give it its input as .float()",
                    low,
                )
            for wide in filter(widens, square.users):
                if any(map(is_rooted, users_of(wide, aten.mean.dim))):
                    yield Refused(
                        f"{describe(square)} squares rows in {dtype_of(start)}; the fused op squares them in float32: "
                        "give it its input as .float()",
                        square,
                    )
    for root, casts in roots:
        for inverse in inverses(root):
            if isinstance(inverse, Refused):
                yield inverse
            else:
                yield from _products(start, root, dtype, inverse, (*casts, *inverse.nodes))


def _products(
    start: fx.Node, root: fx.Node, dtype: torch.dtype | None, inverse: Inverse, head: tuple[fx.Node, ...]
) -> Iterator[Norm]:
    """The products of ``root``, its inverse and a weight, in any order."""
    hidden = last_dim(root)
    for y in users_of(inverse.node, aten.div.Tensor if inverse.divides else aten.mul.Tensor):
        other = other_operand(y, inverse.node)
        if not isinstance(other, fx.Node) or dtype_of(y) != torch.float32 or (inverse.divides and y.args[1] is other):
            continue
        if peel(other) is peel(root):
            casts = () if other is root or not widens(other) else (other,)
            yield _with_weight(start, y, dtype, inverse, (*head, *casts, y))
        elif is_call(other, aten.mul.Tensor) and dtype_of(other) == torch.float32 and same_shape(other, root):
            # (weight * root) * inverse: another order of fp32 products, as far from ours as a division is
            for factor in other.all_input_nodes:
                weight = weight_of(other_operand(other, factor), hidden, dtype)
                if peel(factor) is peel(root) and weight is not None:
                    casts = () if factor is root or not widens(factor) else (factor,)
                    yield _weighted(start, y, dtype, inverse, weight, (*head, *casts, other, y))
        elif not inverse.divides and (weight := weight_of(other, hidden, dtype)) is not None:
            for product in users_of(y, aten.mul.Tensor):
                factor = other_operand(product, y)
                if isinstance(factor, fx.Node) and peel(factor) is peel(root) and same_shape(product, root):
                    casts = () if factor is root or not widens(factor) else (factor,)
                    yield _weighted(start, product, dtype, inverse, weight, (*head, *casts, y, product))


def _weighted(
    start: fx.Node,
    norm: fx.Node,
    dtype: torch.dtype | None,
    inverse: Inverse,
    weight: Weight,
    nodes: tuple[fx.Node, ...],
) -> Norm:
    """The norm whose weight was multiplied in fp32 before ``norm``, with the last cast."""
    if (last := _rounded(norm, dtype)) is not None:
        norm, nodes = last, (*nodes, last)
    return _norm(start, norm, inverse, nodes, weight, Flags.NONE)  # the root meets the product with the weight


def _with_weight(
    start: fx.Node, y: fx.Node, dtype: torch.dtype | None, inverse: Inverse, nodes: tuple[fx.Node, ...]
) -> Norm:
    """The norm that begins with the normalised value ``y``: with its weight, where one follows, and its last cast."""
    hidden = last_dim(y)
    norm, flags, weight = y, Flags.NONE, None

    if (low := _rounded(y, dtype)) is not None:
        norm, nodes = low, (*nodes, low)
        flags = Flags.ROUND_BEFORE_WEIGHT
    user = only_user(norm)
    if is_call(user, aten.mul.Tensor) and same_shape(user, norm):  # a weight of more dimensions would enlarge it
        weight = weight_of(other_operand(user, norm), hidden, dtype)  # type: ignore[arg-type]
    if weight is None:
        flags = Flags.NONE  # the cast was the only rounding
    else:
        assert user is not None
        norm, nodes = user, (*nodes, user)
        last = _rounded(norm, dtype) if dtype_of(norm) == torch.float32 else None
        if last is not None:
            norm, nodes = last, (*nodes, last)
        elif flags and dtype != torch.float32 == dtype_of(norm) and weight.bias == 0.0 and weight.wide is not None:
            # A weight in the tensor's dtype means a product in it; this product is fp32 because the weight was widened.
            weight = dataclasses.replace(weight, node=weight.wide)
    return _norm(start, norm, inverse, nodes, weight, flags)


def _rounded(value: fx.Node, dtype: torch.dtype | None) -> fx.Node | None:
    """The cast of ``value`` to ``dtype`` that alone reads it, where it may round."""
    user = only_user(value)
    return user if user is not None and is_cast(user, dtype) and not widens(user) else None


def _norm(
    start: fx.Node, norm: fx.Node, inverse: Inverse, nodes: tuple[fx.Node, ...], weight: Weight | None, flags: Flags
) -> Norm:
    return Norm(
        operand=start,
        norm=norm,
        epsilon=inverse.epsilon,
        epsilon_at=inverse.plus,
        nodes=nodes,
        weight=None if weight is None else weight.node,
        weight_bias=0.0 if weight is None else weight.bias,
        flags=flags | inverse.root,
    )


DIALECT = Aten()
