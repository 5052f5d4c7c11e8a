"""aten's spellings of RMSNorm, with or without a residual add: ``nn.RMSNorm``, Hugging Face Llama and Gemma, and
every hand-written kin of theirs that Inductor's decompositions leave as this chain::

    %total = aten.add.Tensor(%residual, %value)                 # either operand order; absent without a residual
    %wide  = prims.convert_element_type.default(%total, f32)    # absent where the sum is fp32 already
    %pow   = aten.pow.Tensor_Scalar(%wide, 2)                   # or mul(wide, wide)
    %mean  = aten.mean.dim(%pow, [-1], True)                    # -1 or the positive index
    %plus  = aten.add.Tensor(%mean, 1e-06)                      # or add.Scalar
    %rsqrt = aten.rsqrt.default(%plus)                          # or pow(-0.5), or sqrt (or pow(0.5)) and reciprocal
    %y     = aten.mul.Tensor(%wide, %rsqrt)                     # or div(%wide, %root)
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
from collections.abc import Iterable, Iterator

import torch
from torch import fx

from arfusion_pass.dialects.reading.base import Dialect, Norm, Refused
from arfusion_pass.dialects.reading.operands import Sum, epsilon_reason, readable_total, sums, weight_of
from arfusion_pass.graph import (
    argument,
    constant,
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
    tensor_of,
    users_of,
    widens,
)
from arfusion_pass.ops.spec import Flags

aten = torch.ops.aten


class Aten(Dialect):
    """Decomposed RMSNorm in aten and prims ops."""

    name = "aten"

    def norms(self, value: fx.Node) -> Iterable[Norm | Refused]:
        """Direct norms of ``value`` first, then those of its sums with a residual."""
        for candidate in [Sum(value), *sums(value)]:
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
    """The norms that read ``start``: its squares, their mean, and what the reciprocal root multiplies."""
    roots = [start] if dtype_of(start) == torch.float32 else []
    roots += [user for user in start.users if widens(user)]
    if dtype_of(start) != torch.float32:
        for square in _squares(start):
            for low in filter(_is_rooted, users_of(square, aten.mean.dim)):
                yield Refused(
                    f"{describe(low)} belongs to a norm that is computed in {dtype_of(start)} throughout; the fused "
                    "op computes it in float32: widen its input with .float()",
                    low,
                )
    for root in roots:
        for square in _squares(root):
            for user in list(square.users):
                mean = _mean(user, square)
                if mean is None:
                    continue
                if isinstance(mean, Refused):
                    yield mean
                    continue
                head = (root, square, *mean) if root is not start else (square, *mean)
                yield from _after_mean(start, root, dtype, mean[-1], head)


def _is_rooted(mean: fx.Node) -> bool:
    """Whether a root of a mean plus something follows: it is a norm's, and no magnitude's."""
    sums = users_of(mean, aten.add.Tensor, aten.add.Scalar)
    widened = [user for plus in sums for user in plus.users if is_cast(user)]
    return any(next(_roots(plus), None) is not None for plus in (*sums, *widened))


def _squares(root: fx.Node) -> Iterator[fx.Node]:
    for user in list(root.users):
        if (
            (is_call(user, aten.pow.Tensor_Scalar) and constant(user.args[1]) == 2.0)
            or (is_call(user, aten.mul.Tensor) and user.args[0] is root and user.args[1] is root)
            or is_call(user, aten.square.default)
        ):
            yield user


def _mean(node: fx.Node, square: fx.Node) -> tuple[fx.Node, ...] | Refused | None:
    """The nodes from a mean over the last dimension that keeps it; Refused for a mean over others."""
    if not is_call(node, aten.mean.dim):
        return None
    tensor = tensor_of(square)
    dims = argument(node, "dim")
    if tensor is None or dims is None:
        return None
    positive = [d % tensor.dim() for d in dims]
    if positive != [tensor.dim() - 1]:
        return Refused(
            f"{describe(node)} takes the mean over dimensions {list(dims)}; only a norm over the whole last "
            "dimension is fused",
            node,
        )
    if argument(node, "keepdim"):
        return (node,)
    unsqueeze = only_user(node)
    if unsqueeze is not None and is_call(unsqueeze, aten.unsqueeze.default):
        return (node, unsqueeze) if unsqueeze.args[1] in (-1, tensor.dim() - 1) else None
    return None


def _after_mean(
    start: fx.Node, root: fx.Node, dtype: torch.dtype | None, mean: fx.Node, head: tuple[fx.Node, ...]
) -> Iterator[Norm | Refused]:
    """From ``mean`` over epsilon and the reciprocal root to the product with the root, and on to the weight."""
    for plus in users_of(mean, aten.add.Tensor, aten.add.Scalar):
        other = other_operand(plus, mean)
        if argument(plus, "alpha", 1) != 1:
            continue
        epsilon = constant(other, finite=False)  # one that is out of range has a reason of its own
        if epsilon is None:
            if isinstance(other, fx.Node):
                yield Refused(epsilon_reason(other), other)
            continue
        for inverse, nodes, divides in _roots(plus):
            for y in users_of(inverse, aten.div.Tensor if divides else aten.mul.Tensor):
                if peel(other_operand(y, inverse)) is not peel(root) or dtype_of(y) != torch.float32:
                    continue
                if not (divides and y.args[0] is inverse):
                    yield _with_weight(start, y, dtype, epsilon, (*head, plus, *nodes, y))


def _roots(plus: fx.Node) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...], bool]]:
    """What the value is multiplied by, or divided by: the node, all nodes to it, and whether it divides.

    The fused op multiplies by ``rsqrt``. A root and its reciprocal, or a division, round once more or once less, which
    is within the 4 ulp that the contract grants an fp32 norm.
    """
    for user in list(plus.users):
        power = constant(user.args[1]) if is_call(user, aten.pow.Tensor_Scalar) else None
        if is_call(user, aten.rsqrt.default) or power == -0.5:
            yield user, (user,), False
        elif is_call(user, aten.sqrt.default) or power == 0.5:
            yield user, (user,), True
            for inverse in list(user.users):
                one = is_call(inverse, aten.div.Tensor) and inverse.args[1] is user and constant(inverse.args[0]) == 1.0
                if one or is_call(inverse, aten.reciprocal.default):
                    yield inverse, (user, inverse), False
                for product in users_of(inverse, aten.mul.Tensor, aten.mul.Scalar):  # 1 / x as torch writes it
                    if is_call(inverse, aten.reciprocal.default) and constant(other_operand(product, inverse)) == 1.0:
                        yield product, (user, inverse, product), False


def _with_weight(
    start: fx.Node, y: fx.Node, dtype: torch.dtype | None, epsilon: float, nodes: tuple[fx.Node, ...]
) -> Norm:
    """The norm that begins with the normalised value ``y``: with its weight, where one follows, and its last cast."""
    hidden = last_dim(y)
    norm, flags, weight = y, Flags.NONE, None

    user = only_user(y)
    if user is not None and is_cast(user, dtype) and not widens(user):
        norm, nodes = user, (*nodes, user)
        flags = Flags.ROUND_BEFORE_WEIGHT
        user = only_user(norm)
    if is_call(user, aten.mul.Tensor) and same_shape(user, norm):  # a weight of more dimensions would enlarge it
        weight = weight_of(other_operand(user, norm), hidden, dtype)  # type: ignore[arg-type]
    if weight is None:
        flags = Flags.NONE  # the cast was the only rounding
    else:
        assert user is not None
        norm, nodes = user, (*nodes, user)
        last = only_user(norm)
        if last is not None and dtype_of(norm) == torch.float32 and is_cast(last, dtype) and not widens(last):
            norm, nodes = last, (*nodes, last)
        elif flags and dtype != torch.float32 == dtype_of(norm) and weight.bias == 0.0 and weight.wide is not None:
            # A weight in the tensor's dtype means a product in it; this product is fp32 because the weight was widened.
            weight = dataclasses.replace(weight, node=weight.wide)
    return Norm(
        operand=start,
        norm=norm,
        epsilon=epsilon,
        nodes=nodes,
        weight=None if weight is None else weight.node,
        weight_bias=0.0 if weight is None else weight.bias,
        flags=flags,
    )


DIALECT = Aten()
