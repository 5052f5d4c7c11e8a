"""Which nodes give the elements of which others: all of them, in the same order, in whatever shape."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx

from arfusion_pass.graph.calls import aten, by_position, c10d, is_cast
from arfusion_pass.graph.lines import describe
from arfusion_pass.graph.values import (
    dtype_of,
    is_one,
    last_dim,
    same_rows,
    same_shape,
    statically_equal,
    tensor_of,
    value_of,
)

VIEWS: frozenset[Any] = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.flatten.using_ints,
        aten.alias.default,
        aten.detach.default,
    }
)
"""Ops that give the same elements in the same order another shape."""

_CLONES: frozenset[Any] = frozenset({aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default})

_PARTS: frozenset[Any] = frozenset(
    {
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.expand.default,
    }
)
"""Ops that may leave elements out, repeat them or move them, and often do not."""

_SPLITS: frozenset[Any] = frozenset(
    {
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.tensor_split.sections,
        aten.tensor_split.indices,
        aten.unbind.int,
    }
)
"""Ops that give a list of parts: a list of one has all elements."""


def source_of(node: Any) -> fx.Node | None:
    """What ``node`` gives the elements of: all of them, in the same order and dtype, in whatever shape. None if it
    computes anything, leaves elements out or moves them. Such a node is a view, a ``permute`` that moves dimensions of
    size 1 only, a wait for what was waited for already, a clone, the functional ``copy`` that a tensor reduced in place
    leaves, dropout that does not train, or a split into one part, which is a list, with the ``getitem`` of it."""
    if not (isinstance(node, fx.Node) and node.op == "call_function" and node.args and by_position(node)):
        return None
    target = node.target
    source: Any = node.args[0]
    if target is aten.copy.default and len(node.args) > 1:
        source = node.args[1]
        if not (isinstance(source, fx.Node) and dtype_of(source) == dtype_of(node) and same_shape(source, node)):
            return None
    elif target is c10d.wait_tensor.default:
        if isinstance(source, fx.Node) and getattr(source.target, "namespace", "") == c10d.name:
            return source if source.target is target else None
    elif target is operator.getitem:
        return source if _is_list_of_one(source) else None
    elif target is aten.dropout.default:
        if node.args[2] is not False:
            return None
    elif target in _SPLITS:
        if not _is_list_of_one(node):
            return None
    elif target in _PARTS:
        if not _moves_nothing(node, source):
            return None
    elif target not in VIEWS and target not in _CLONES:
        return None
    return source if isinstance(source, fx.Node) and tensor_of(source) is not None else None


def _moves_nothing(node: fx.Node, source: Any) -> bool:
    """Whether a permute, select, slice or expand keeps all elements in order."""
    before, after = tensor_of(source), tensor_of(node)
    if before is None or after is None:
        return False
    arguments: Any = node.args
    if node.target is aten.select.int:
        return is_one(before.shape[arguments[1]])
    if node.target in (aten.slice.Tensor, aten.expand.default):
        return same_rows(node, source)
    dims = list(range(before.dim()))
    if node.target is aten.permute.default:
        dims = [dim % before.dim() for dim in arguments[1]]
    elif before.dim() > 1:
        first, second = arguments[1:3] if node.target is aten.transpose.int else (0, 1)
        dims[first], dims[second] = dims[second], dims[first]
    kept = [dim for dim in dims if not is_one(before.shape[dim])]
    return kept == sorted(kept)


def _is_list_of_one(node: Any) -> bool:
    parts = value_of(node)
    return isinstance(node, fx.Node) and node.target in _SPLITS and isinstance(parts, (list, tuple)) and len(parts) == 1


def keeps_rows(node: Any) -> bool:
    """Whether ``node`` gives its source's elements (:func:`source_of`) with the same last dimension."""
    source = source_of(node)
    return source is not None and last_dim(node) is not None and last_dim(node) == last_dim(source)


def views_of(node: fx.Node) -> Iterator[fx.Node]:
    """``node`` and everything that gives its elements (:func:`source_of`) in whatever shape, in no special order."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        stack.extend(user for user in current.users if source_of(user) is current)


def views_of_all(nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each of the :func:`views_of` any of ``nodes``, once, with the first of them that it is a view of: of a chain of
    waits each one holds the tensor, and is a view of all before it."""
    seen = set[fx.Node]()
    for node in nodes:
        if node not in seen:
            for view in views_of(node):
                if view not in seen:
                    seen.add(view)
                    yield node, view


def row_views(node: fx.Node) -> Iterator[fx.Node]:
    """Those of its :func:`views_of` that have its last dimension; views of another may lie between."""
    hidden = last_dim(node)
    for view in views_of(node):
        if view is node or (hidden is not None and last_dim(view) == hidden):
            yield view


def without_views(node: Any) -> Any:
    """What ``node`` gives the elements of, through any number of views; itself where it is no view."""
    while (source := source_of(node)) is not None:
        node = source
    return node


def path(start: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
    """The views between ``start`` and ``end`` (one of its :func:`views_of`), ``end`` included."""
    views: list[fx.Node] = []
    node: fx.Node | None = end
    while node is not start:
        if node is None:
            raise ValueError(f"{describe(end)} is no view of {describe(start)}")
        views.append(node)
        node = source_of(node)
    return tuple(reversed(views))


def as_many_rows(a: Any, b: Any) -> bool:
    """Whether two nodes' ``[..., H]`` tensors have the same number of rows for sure; adds no guard.

    A view with the last dimension of its source, or a cast, has as many rows as that, however its sizes are called:
    where ``y.view(r.shape)`` was guarded on, the sizes of ``y`` and those of ``r`` have other symbols, and the product
    of the former is known to be that of the latter, but not that of the view's.
    """
    return any(statically_equal(rows, others) for rows in _row_counts(a) for others in _row_counts(b))


def _row_counts(node: Any) -> list[Any]:
    """How many rows a node has, by its own shape and by that of everything that it is a view or a cast of."""
    counts: list[Any] = []
    hidden = last_dim(node)
    while (tensor := tensor_of(node)) is not None and tensor.dim() > 0:
        if last_dim(node) == hidden and (hidden is not None or not counts):
            counts.append(math.prod(tensor.shape[:-1]))
        node = node.args[0] if is_cast(node) else source_of(node)
    return counts
