"""What stands around a norm in aten ops, whoever spelled the norm itself: the residual add in front, and its weight.

    %total  = aten.add.Tensor(%residual, %value)                # either operand order, in the tensor's dtype or fp32
    %weight = aten.add.Tensor(convert_element_type(%w, f32), 1.0)   # Gemma; or any [H] vector, viewed or widened

Every dialect of norms uses these, so that aten's add may be followed by an engine's norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from arfusion_pass.dialects.base import Norm
from arfusion_pass.graph import (
    VIEWS,
    argument,
    constant,
    dtype_of,
    is_call,
    is_cast,
    last_dim,
    other_operand,
    peel,
    row_views,
    same_shape,
    tensor_of,
    users_of,
    widens,
)
from arfusion_pass.ops.spec import Flags

aten = torch.ops.aten

EPSILON_ADVICE = (
    "epsilon is a graph input ({node}), as torch.compile(dynamic=True) makes it; mark the token dimension dynamic "
    "with torch._dynamo.mark_dynamic instead, so that epsilon stays a number"
)


@dataclasses.dataclass(frozen=True)
class Sum:
    """What a norm may read: the reduced value itself, or its sum with a residual.

    Attributes:
        start: the node that the norm reads.
        nodes: the nodes between the value and ``start``, ``start`` included; empty for the value itself.
        residual: the other operand, without lossless casts.
        total: the node that stands for the sum.
        flags: ``UNROUNDED_SUM`` where ``start`` is the fp32 sum.
    """

    start: fx.Node
    nodes: tuple[fx.Node, ...] = ()
    residual: fx.Node | None = None
    total: fx.Node | None = None
    flags: Flags = Flags.NONE


@dataclasses.dataclass(frozen=True)
class Weight:
    """A norm's ``[H]`` weight and what is added to it in fp32."""

    node: fx.Node
    bias: float = 0.0


def sums(value: fx.Node) -> Iterator[Sum]:
    """The adds of ``value`` with a residual of its shape, in its dtype or in fp32."""
    wide = [user for user in value.users if widens(user) and user is not value]
    for operand in (value, *wide):
        for add in users_of(operand, aten.add.Tensor):
            other = other_operand(add, operand)
            if not isinstance(other, fx.Node) or argument(add, "alpha", 1) != 1:
                continue
            residual = peel(other)
            if not same_shape(add, value) or not same_shape(residual, add):
                continue
            casts = () if operand is value else (operand,)
            if dtype_of(residual) not in (dtype_of(value), torch.float32):
                continue
            if dtype_of(add) == dtype_of(value):
                yield Sum(add, (*casts, add), residual, add)
            elif dtype_of(add) == torch.float32:
                yield Sum(add, (*casts, add), residual, add, Flags.UNROUNDED_SUM)
                for rounded in users_of(add, torch.ops.prims.convert_element_type.default):
                    # An fp32 residual whose sum is rounded before the norm is no form that the kernels have.
                    if dtype_of(rounded) == dtype_of(value) == dtype_of(residual):
                        yield Sum(rounded, (*casts, add, rounded), residual, rounded)


def readable_total(candidate: Sum, chain: Norm) -> fx.Node | None:
    """The node that stands for the sum: an fp32 sum that others read only rounded is written rounded."""
    total = candidate.total
    if total is None or not candidate.flags & Flags.UNROUNDED_SUM:
        return total
    outside = [user for user in total.users if user not in chain.nodes and user not in _path_views(total, chain)]
    narrow = [user for user in outside if is_cast(user) and not widens(user)]
    if len(outside) == 1 and narrow:
        return narrow[0]
    return total


def _path_views(start: fx.Node, chain: Norm) -> set[fx.Node]:
    return {view for view in row_views(start) if any(user in chain.nodes for user in view.users)}


def path(start: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
    """The views between ``start`` and ``end``, ``end`` included."""
    nodes: list[fx.Node] = []
    node = end
    while node is not start:
        nodes.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return tuple(reversed(nodes))


def weight_of(node: Any, hidden: int | None, dtype: torch.dtype | None) -> Weight | None:
    """The ``[H]`` weight that stands in a multiplication, Gemma's ``weight + 1`` in fp32 taken apart.

    Args:
        node: the operand; an fp32 one is given back without lossless casts.
        hidden: ``H``.
        dtype: ``T``, the dtype of the tensor that is reduced.
    """
    node = _vector(node)
    tensor = tensor_of(node)
    if tensor is None or tensor.dim() != 1 or last_dim(node) != hidden:
        return None
    if is_call(node, aten.add.Tensor, aten.add.Scalar) and dtype_of(node) == torch.float32:
        first, second = node.args[0], node.args[1]
        if argument(node, "alpha", 1) == 1:
            for base, number in ((first, second), (second, first)):
                bias = constant(number)
                base = _vector(peel(base))
                if bias is not None and dtype_of(base) in (dtype, torch.float32) and last_dim(base) == hidden:
                    return Weight(base, bias)
    base = _vector(peel(node))
    if dtype_of(base) in (dtype, torch.float32) and last_dim(base) == hidden:
        return Weight(base)
    return Weight(node) if dtype_of(node) == torch.float32 else None


def _vector(node: Any) -> Any:
    """``node`` without views of a ``[H]`` tensor as ``[1, ..., H]``."""
    while is_call(node, *VIEWS, aten.expand.default) and isinstance(node.args[0], fx.Node):
        inner = tensor_of(node.args[0])
        if inner is None or inner.dim() == 0 or last_dim(node.args[0]) != last_dim(node):
            break
        if tensor_of(node).dim() == 1 and inner.dim() == 1:  # type: ignore[union-attr]
            break
        node = node.args[0]
    return node
