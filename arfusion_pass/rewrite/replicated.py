"""Which values all ranks of a group share, as far as a graph says: a factor that is taken before an all-reduce must be.

    %gate = sigmoid(mm(norm(add(%residual, wait_tensor(all_reduce(%y)))), %w))       # [T, 1], %w a graph input [H, 1]
    %step = mul(%gate, wait_tensor(all_reduce(%x)))

Two assumptions, which ``FusionConfig(reassociate=True)`` documents: graph inputs of one element and of ``[H]`` are
weights that all ranks hold whole, and so is the residual stream, to which all-reduces are added. What was computed
from anything else, a matrix for instance, may be one rank's own.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import fx

from arfusion_pass.dialects import Norm, Reduced
from arfusion_pass.dialects.reading.operands import is_row_factor
from arfusion_pass.graph import (
    CASTS,
    aten,
    constant,
    dtype_of,
    is_call,
    is_pure,
    is_written,
    last_dim,
    peel,
    same_rows,
    source_of,
    statically_equal,
    tensor_of,
    value_of,
    without_views,
)


class Reductions(dict[fx.Node, Reduced]):
    """A graph's all-reduces that could be fused, by the nodes that hold the result.

    Attributes:
        nodes: the all-reduces' own, in graph order.
        ahead: what :mod:`arfusion_pass.rewrite.hindrances` keeps: for all-reduces of one group and of rows of the same
            lengths, the norm behind each node that it looked at.
    """

    def __init__(self, reductions: Iterable[Reduced]) -> None:
        super().__init__()
        self.nodes: list[fx.Node] = []
        self.ahead: dict[Hashable, dict[fx.Node, Norm | None]] = {}
        for reduced in reductions:
            self.nodes.append(reduced.node)
            self.add(reduced)

    def add(self, reduced: Reduced) -> None:
        self.update(dict.fromkeys(reduced.values, reduced))

    def remove(self, reduced: Reduced) -> None:
        for value in reduced.values:
            self.pop(value, None)


PARTS = (aten.select.int, aten.slice.Tensor)

_COMBINE = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.linear.default,
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.expand.default,
)
"""Beside steps by element what a gate is computed with. None takes a part that a rank could choose for itself."""

_SIZES = (aten.sym_size.int, operator.add, operator.mul, operator.sub, operator.floordiv)

FARTHEST = 256
"""Nodes from a factor to the all-reduces and weights that it comes from; a norm, a projection and a gate have 20."""


def is_factor(node: Any, operand: fx.Node, group: str, reductions: Reductions) -> bool:
    """Whether ``node`` is one element, an ``[H]`` vector or one element for each row of ``operand``, and the same on
    all ranks of ``group``."""
    hidden = last_dim(operand)
    return is_shaped_like_one(node, operand) and (
        is_learned(node, hidden) or is_replicated(node, hidden, group, reductions)
    )


def is_shaped_like_one(node: Any, operand: fx.Node) -> bool:
    """Whether ``node`` is one element, an ``[H]`` vector or one element for each row of ``operand``."""
    tensor = tensor_of(node)
    sizes = [] if tensor is None else [size for size in tensor.shape if not statically_equal(size, 1)]
    return tensor is not None and (sizes in ([], [last_dim(operand)]) or is_row_factor(node, operand))


def is_learned(node: Any, hidden: int | None) -> bool:
    """Whether ``node`` is one element or an ``[H]`` vector that comes from the graph's inputs alone, over views, parts
    and steps by element: a weight or a buffer, which the ranks share, and nothing that was computed from their own
    values."""
    stack, seen = [node], set[fx.Node]()
    while stack:
        current = stack.pop()
        tensor = tensor_of(current)
        if tensor is None or current in seen:
            if tensor is None:
                return False
            continue
        seen.add(current)
        sizes = [size for size in tensor.shape if size != 1]
        if sizes not in ([], [hidden]) or is_written(current):
            return False
        known = _is_by_element(current) or is_call(current, *CASTS, *PARTS) or source_of(current) is not None
        if current.op not in ("placeholder", "get_attr") and not known:
            return False
        stack += current.all_input_nodes
    return True


def is_replicated(node: fx.Node, hidden: int | None, group: str, reductions: Reductions) -> bool:
    """Whether ``node`` was computed, by ops that give all ranks the same, from nothing but all-reduces of ``group``,
    sums with one, and learned numbers and vectors."""
    stack, seen, reduced = [node], set[fx.Node](), False
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if len(seen) > FARTHEST or is_written(current):
            return False
        found = reductions.get(current)
        if found is not None:
            if found.group != group:
                return False
            reduced = True
        elif isinstance(value_of(current), torch.SymInt):
            if current.op != "placeholder" and not is_call(current, *_SIZES):
                return False
            stack += () if is_call(current, aten.sym_size.int) else current.all_input_nodes
        elif constant(current, finite=False) is None and not is_learned(current, hidden):
            if not _is_same_for_same(current):
                return False
            stack += _what_decides(current, hidden, reductions)
    return reduced


def _is_by_element(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) and is_pure(node)


def _is_same_for_same(node: fx.Node) -> bool:
    """Whether an op gives the same for the same tensors, whatever rank it runs on."""
    return _is_by_element(node) or is_call(node, *CASTS, *_COMBINE) or source_of(node) is not None


def _what_decides(node: fx.Node, hidden: int | None, reductions: Reductions) -> list[fx.Node]:
    """The inputs of an op that must be the same for its result to be: of the residual stream's sum with an all-reduce,
    or with what was computed from one, that alone."""
    inputs = node.all_input_nodes
    stream = is_call(node, aten.add.Tensor) and len(inputs) == 2 and last_dim(node) == hidden
    if not stream or not same_rows(*inputs) or dtype_of(node) is None:
        return inputs
    direct = [each for each in inputs if without_views(peel(each)) in reductions]
    return direct[:1] or sorted(inputs)[-1:]
