"""The statistic of a norm in aten ops: from the squares of a row to what the row is multiplied by, or divided by.

    %square = aten.pow.Tensor_Scalar(%wide, 2)          # or mul(wide, wide), of abs(wide) too; pow.Tensor_Tensor
    %mean   = aten.mean.dim(%square, [-1], True)        # or a sum over H, or a magnitude's square over H
    %plus   = aten.add.Tensor(%mean, 1e-06)             # absent: epsilon is 0
    %rsqrt  = aten.rsqrt.default(%plus)                 # or pow(-0.5), or sqrt (or pow(0.5)) and its reciprocal

A dimension that was dropped may come back anywhere in between. What is nearly such a statistic is refused with what
it does instead: an epsilon beside the root, a floor in its place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import fx

from arfusion_pass.dialects.reading.base import Refused
from arfusion_pass.dialects.reading.operands import epsilon_of, epsilon_reason
from arfusion_pass.graph import (
    argument,
    constant,
    describe,
    dtype_of,
    is_call,
    is_last,
    keeps_rows,
    last_dim,
    other_operand,
    peel,
    same_shape,
    source_of,
    statically_equal,
    tensor_of,
    users_of,
    widens,
)
from arfusion_pass.ops.spec import Flags

aten = torch.ops.aten

_FLOORS = (aten.clamp_min.default, aten.clamp.default, aten.maximum.default)


@dataclasses.dataclass(frozen=True)
class Statistic:
    """``(factor * mean of a row's squares) ** power`` at ``node``, with the nodes from the squares to it."""

    node: fx.Node
    factor: float
    power: float
    nodes: tuple[fx.Node, ...]


@dataclasses.dataclass(frozen=True)
class Inverse:
    """``1 / sqrt(mean of squares + epsilon)`` at ``node``, or the root itself where rows are divided by it; ``plus``
    adds epsilon. ``root``: none for an ``rsqrt``, else the flag of how the root is taken and met."""

    node: fx.Node
    epsilon: float | fx.Node
    root: Flags
    nodes: tuple[fx.Node, ...]
    plus: fx.Node | None = None

    @property
    def divides(self) -> bool:
        """Whether rows are divided by ``node``."""
        return self.root == Flags.DIVIDE_BY_ROOT


def inverses(root: fx.Node) -> Iterator[Inverse | Refused]:
    """Everything that the rows of ``root`` may be normalised by, computed from their own squares."""
    for statistic in _statistics(root):
        if isinstance(statistic, Refused):
            yield statistic
        elif math.isclose(statistic.factor, 1.0, rel_tol=1e-6):
            yield from _inverses(statistic, root)
        else:
            yield from _floored(statistic, root)
            yield from _of_no_mean(statistic, root)


def squares(root: fx.Node) -> Iterator[tuple[fx.Node, ...]]:
    """The nodes to each square of ``root``: other lossless casts of the same value among them."""
    stack: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(root, ())]
    while stack:
        node, before = stack.pop()
        for user in list(node.users):
            power = power_of(user)
            if is_call(user, aten.abs.default) or (keeps_rows(user) and source_of(user) is node):
                stack.append((user, (*before, user)))
            elif power == 2.0 or is_call(user, aten.square.default):
                yield (*before, user)
            elif is_call(user, aten.mul.Tensor) and dtype_of(user) == dtype_of(node):
                operands = list(dict.fromkeys(user.args))
                if all(peel(operand) is peel(node) for operand in operands):
                    casts = (operand for operand in operands if isinstance(operand, fx.Node) and operand is not node)
                    yield (*before, *casts, user)


def power_of(node: fx.Node) -> float | None:
    """The number that a node raises to, also where it is a tensor without dimensions; None where it raises to none."""
    return constant(node.args[1]) if is_call(node, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor) else None


def is_rooted(mean: fx.Node) -> bool:
    """Whether a root of a mean plus something follows: it is a norm's, and no magnitude's."""
    plus = users_of(mean, aten.add.Tensor, aten.add.Scalar)
    widened = [user for each in plus for user in each.users if widens(user) or dtype_of(user) == torch.float32]
    return any(next(_roots(each), None) is not None for each in (*plus, *widened))


def _statistics(root: fx.Node) -> Iterator[Statistic | Refused]:
    """What is a power of a multiple of the mean of a row's squares, over every step that keeps it one."""
    stack: list[Statistic] = []
    for nodes in squares(root):
        for user in list(nodes[-1].users):
            first = _reduced(user, nodes)
            if isinstance(first, Refused):
                yield first
            elif first is not None:
                stack.append(first)
    stack += [magnitude for user in list(root.users) if (magnitude := _magnitude(user, root)) is not None]
    while stack:
        current = stack.pop()
        yield current
        stack += [after for user in list(current.node.users) if (after := _step(current, user)) is not None]


def _reduced(node: fx.Node, nodes: tuple[fx.Node, ...]) -> Statistic | Refused | None:
    """The mean or the sum of squares over the whole last dimension; Refused for a mean over others."""
    if not is_call(node, aten.mean.dim, aten.sum.dim_IntList) or dtype_of(node) != dtype_of(nodes[-1]):
        return None
    tensor, dims = tensor_of(nodes[-1]), argument(node, "dim")
    if tensor is None or dims is None:
        return None
    is_mean = node.target is aten.mean.dim
    if not is_last(dims, tensor):
        return (
            Refused(
                f"{describe(node)} takes the mean over dimensions {list(dims)}; only a norm over the whole last "
                "dimension is fused",
                node,
            )
            if is_mean
            else None
        )
    return Statistic(node, 1.0 if is_mean else last_dim(nodes[-1]) or math.nan, 1.0, (*nodes, node))


def _magnitude(node: fx.Node, root: fx.Node) -> Statistic | None:
    """The root of the sum of a row's squares as one op, in graphs without Inductor's decompositions."""
    if not is_call(node, aten.linalg_vector_norm.default) or dtype_of(node) != dtype_of(root):
        return None
    tensor, dims = tensor_of(root), argument(node, "dim")
    if constant(argument(node, "ord", 2)) != 2.0 or tensor is None or dims is None:
        return None
    return Statistic(node, last_dim(root) or math.nan, 0.5, (node,)) if is_last(dims, tensor) else None


def _step(current: Statistic, user: fx.Node) -> Statistic | None:
    """``user`` as a statistic: a view of ``current``, a multiple, its root or its square."""
    nodes = (*current.nodes, user)
    if source_of(user) is current.node:
        return dataclasses.replace(current, node=user, nodes=nodes)
    if dtype_of(user) != dtype_of(current.node):
        return None
    power = power_of(user)
    if current.power == 1.0 and (is_call(user, aten.sqrt.default) or power == 0.5):
        return Statistic(user, current.factor, 0.5, nodes)
    if current.power == 0.5:
        itself = is_call(user, aten.mul.Tensor) and user.args[0] is user.args[1]
        if power == 2.0 or is_call(user, aten.square.default) or itself:
            return Statistic(user, current.factor, 1.0, nodes)
    if is_call(user, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        number = constant(other_operand(user, current.node))
        divides = is_call(user, aten.div.Tensor, aten.div.Scalar)
        if number is None or number <= 0 or (divides and user.args[0] is not current.node):
            return None
        factor = (1 / number if divides else number) ** (1 / current.power)
        return Statistic(user, current.factor * factor, current.power, nodes)
    return None


def _inverses(mean: Statistic, root: fx.Node) -> Iterator[Inverse | Refused]:
    """From a mean of squares, or its root, over epsilon and the reciprocal root."""
    yield from _floored(mean, root)
    if mean.power == 0.5:
        for inverse, nodes, flag in _reciprocals(mean.node):
            yield from _in_rows(Inverse(inverse, 0.0, flag, (*mean.nodes, *nodes)), root)
    for plus in users_of(mean.node, aten.add_.Tensor, aten.add_.Scalar):
        if next(_roots(plus), None) is not None:
            yield Refused(
                f"{describe(plus)} adds epsilon in place, as a composite op was traced: functionalise the graph as AOT "
                "autograd does, or decompose aten.rms_norm before",
                plus,
            )
    for plus in users_of(mean.node, aten.add.Tensor, aten.add.Scalar):
        other = other_operand(plus, mean.node)
        if argument(plus, "alpha", 1) != 1:
            continue
        epsilon = constant(other, finite=False)  # one that is out of range has a reason of its own
        value = epsilon_of(other) if epsilon is None else epsilon
        if mean.power == 0.5:
            if _divides_by(plus, root):
                yield Refused(
                    f"{describe(plus)} adds to the root of the mean of squares; the fused op adds epsilon to the mean, "
                    "under the root",
                    plus,
                )
        elif value is not None and dtype_of(plus) == dtype_of(mean.node):
            for inverse, nodes, flag in _roots(plus):
                yield from _in_rows(Inverse(inverse, value, flag, (*mean.nodes, plus, *nodes), plus), root)
        elif isinstance(other, fx.Node) and not statically_equal(last_dim(plus), last_dim(root)):
            yield Refused(epsilon_reason(other), other)
    if mean.power == 1.0:
        for inverse, nodes, flag in _roots(mean.node):
            yield from _in_rows(Inverse(inverse, 0.0, flag, (*mean.nodes, *nodes)), root)


def _in_rows(inverse: Inverse, root: fx.Node) -> Iterator[Inverse | Refused]:
    """The views of an inverse that hold one element for each row of ``root``, in the shape that rows are multiplied, or
    that element as often as the row is long (``expand_as``)."""
    stack, rows = [inverse], tensor_of(root)
    assert rows is not None
    while stack:
        current = stack.pop()
        tensor = tensor_of(current.node)
        same_rank = tensor is not None and tensor.dim() == rows.dim()
        if same_rank and all(map(statically_equal, tensor.shape, (*rows.shape[:-1], 1))):  # type: ignore[union-attr]
            yield current
            for expand in users_of(current.node, aten.expand.default):
                if same_shape(expand, root):
                    yield dataclasses.replace(current, node=expand, nodes=(*current.nodes, expand))
        for user in list(current.node.users):
            if source_of(user) is current.node:
                stack.append(dataclasses.replace(current, node=user, nodes=(*current.nodes, user)))
            elif dtype_of(user) in (torch.bfloat16, torch.float16) and is_call(
                user, torch.ops.prims.convert_element_type.default
            ):
                yield Refused(
                    f"{describe(user)} rounds the reciprocal root of a norm to {dtype_of(user)}; the fused op "
                    "multiplies by it in float32",
                    user,
                )


def _roots(plus: fx.Node) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...], Flags]]:
    """What the value is multiplied by, or divided by: the node, all nodes to it, and the flag for it.

    torch takes ``pow(-0.5)`` as ``rsqrt`` and ``pow(0.5)`` as ``sqrt``; its ``sqrt``, fp32 division and reciprocal are
    correctly rounded on a GPU, as the kernels' are.
    """
    stack: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(plus, ())]
    while stack:
        node, before = stack.pop()
        for user in list(node.users):
            if source_of(user) is node:
                stack.append((user, (*before, user)))
            power = power_of(user)
            if is_call(user, aten.rsqrt.default) or power == -0.5:
                yield user, (*before, user), Flags.NONE
            elif is_call(user, aten.sqrt.default) or power == 0.5:
                for inverse, nodes, flag in _reciprocals(user):
                    yield inverse, (*before, user, *nodes), flag


def _reciprocals(root: fx.Node) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...], Flags]]:
    """The root itself, which divides, and its reciprocals, which multiply."""
    yield root, (), Flags.DIVIDE_BY_ROOT
    for inverse in list(root.users):
        power = power_of(inverse)
        one = is_call(inverse, aten.div.Tensor) and inverse.args[1] is root and constant(inverse.args[0]) == 1.0
        reciprocal = is_call(inverse, aten.reciprocal.default) or power == -1.0
        if one or reciprocal:
            yield inverse, (inverse,), Flags.RECIPROCAL_ROOT
        for product in users_of(inverse, aten.mul.Tensor, aten.mul.Scalar):  # 1 / x as torch writes it
            if reciprocal and constant(other_operand(product, inverse)) == 1.0:
                yield product, (inverse, product), Flags.RECIPROCAL_ROOT


def _floored(statistic: Statistic, root: fx.Node) -> Iterator[Refused]:
    """A floor under a mean of squares, or under a magnitude, where an epsilon would be added to the mean."""
    for floor in users_of(statistic.node, *_FLOORS):
        under_root = next(_roots(floor), None) is not None if statistic.power == 1.0 else _divides_by(floor, root)
        if under_root:
            yield Refused(
                f"{describe(floor)} keeps the divisor of a norm from 0 by a lower bound; the fused op adds an epsilon "
                "to the mean of squares",
                floor,
            )


def _of_no_mean(statistic: Statistic, root: fx.Node) -> Iterator[Refused]:
    """A root of what is not the mean of squares, such as an L2 norm's of their sum, with or without an epsilon."""
    is_sum = math.isclose(statistic.factor, last_dim(root) or math.nan, rel_tol=1e-6)
    what = "the sum of a row's squares, as an L2 norm" if is_sum else f"{statistic.factor:g} times the mean of squares"
    plus = users_of(statistic.node, aten.add.Tensor, aten.add.Scalar)
    for node in (statistic.node, *plus) if statistic.power == 1.0 else ():
        for inverse, *_ in _roots(node):
            if _divides_by(inverse, root):
                yield Refused(
                    f"{describe(inverse)} takes the root of {what}; the fused op takes that of the mean of squares",
                    inverse,
                )


def _divides_by(node: fx.Node, root: fx.Node) -> bool:
    """Whether ``root`` is divided by ``node``, or by an expansion of it, or multiplied by its reciprocal."""
    stack = [node]
    while stack:
        current = stack.pop()
        for user in list(current.users):
            if is_call(user, aten.expand.default, aten.reciprocal.default) or source_of(user) is current:
                stack.append(user)
            elif is_call(user, aten.div.Tensor, aten.mul.Tensor) and peel(other_operand(user, current)) is peel(root):
                return True
    return False
