"""An all-reduce by itself: the dtype in which it can be fused, how long its rows may be, and what speaks against it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from arfusion_pass.config import DTYPES
from arfusion_pass.dialects import Norm, Reduced, Refused, Scattered
from arfusion_pass.graph import (
    aten,
    describe,
    dtype_of,
    is_call,
    is_cast,
    last_dim,
    path,
    same_shape,
    source_of,
    statically_equal,
    tensor_of,
    views_of_all,
    widens,
    without_views,
)
from arfusion_pass.groups import find_group


def in_its_own_dtype(reduced: Reduced) -> Reduced:
    """An fp32 all-reduce of widened 16-bit values whose sum is only read rounded to their dtype, as one in that dtype:
    the fused op sums in fp32 as well, rounds once, and moves half the bytes::

        %wide = convert_element_type(%x, f32); %sum = all_reduce(%wide); %value = convert_element_type(%sum, bf16)
    """
    wide: fx.Node = without_views(reduced.x)
    if not widens(wide) or dtype_of(wide.args[0]) == torch.float32:
        return reduced
    casts: dict[fx.Node, tuple[fx.Node, ...]] = {}
    inside = set(reduced.nodes)
    for held, view in views_of_all(reduced.values):
        for user in view.users:
            if is_cast(user, dtype_of(wide.args[0])):
                casts[user] = path(held, view)
            elif source_of(user) is not view and user not in inside:
                return reduced
    if not casts or not all(same_shape(min(casts), cast) for cast in casts):
        return reduced
    return _read_behind(reduced, wide.args[0], casts)


def in_its_own_order(reduced: Reduced) -> Reduced:
    """An all-reduce of a permuted tensor whose sum is only read permuted back, as one of the tensor itself::

    %moved = permute(%x, [2, 0, 1]); %sum = all_reduce(%moved); %value = permute(%sum, [1, 2, 0])
    """
    moved: fx.Node = _without_copies(reduced.x)
    order = _order(moved)
    if order is None:
        return reduced
    back: dict[fx.Node, tuple[fx.Node, ...]] = {}
    inside = set(reduced.nodes)
    for held, view in views_of_all(reduced.values):
        same = same_shape(view, held)
        for user in view.users:
            if same and (inverse := _order(user)) is not None and [order[dim] for dim in inverse] == sorted(order):
                back[user] = path(held, view)
            elif source_of(user) is not view and user not in inside:
                return reduced
    if not back:
        return reduced
    return _read_behind(reduced, moved.args[0], back)


def _read_behind(reduced: Reduced, x: Any, values: dict[fx.Node, tuple[fx.Node, ...]]) -> Reduced:
    """``reduced`` as an all-reduce of ``x`` whose sum are ``values``, each with the views that lead to it."""
    value, *others = sorted(values)
    nodes = dict.fromkeys(node for last, views in values.items() for node in (*views, last))
    return dataclasses.replace(reduced, value=value, x=x, nodes=(*reduced.nodes, *nodes), aliases=tuple(others))


def _without_copies(node: fx.Node) -> fx.Node:
    """What ``node`` is a copy of, or a view of in the same shape."""
    while (source := source_of(node)) is not None and same_shape(source, node):
        node = source
    return node


def _order(node: fx.Node) -> list[int] | None:
    """The dimensions that a permutation takes, in its order; None for any other node."""
    tensor = tensor_of(node)
    if tensor is None:
        return None
    dims = list(range(tensor.dim()))
    arguments: Any = node.args
    if is_call(node, aten.permute.default):
        return [dim % len(dims) for dim in arguments[1]]
    if is_call(node, aten.transpose.int):
        first, second = arguments[1:3]
        dims[first], dims[second] = dims[second], dims[first]
        return dims
    return dims[::-1] if is_call(node, aten.t.default) and len(dims) == 2 else None


def check_reduced(reduced: Reduced) -> str | None:
    """What speaks against fusing an all-reduce, whatever follows it; None if nothing does."""
    group = find_group(reduced.group)
    if group is None:
        return (
            f"no process group is called {reduced.group!r}; call arfusion_pass.register_group({reduced.group!r}, "
            "group) before compiling"
        )
    if isinstance(reduced, Scattered) and reduced.world != group.size():
        return f"{describe(reduced.node)} scatters to {reduced.world} ranks, and the group has {group.size()}"
    if group.size() == 1:
        return f"the group {reduced.group!r} has one rank: there is nothing to reduce"
    x = tensor_of(reduced.x)
    if x is None:
        return f"{describe(reduced.x)} has no meta['val']; run fake-tensor propagation over the graph first"
    if x.dtype not in DTYPES:
        return f"{describe(reduced.node)} reduces {x.dtype}; bfloat16, float16 and float32 are fused"
    return None


def row_lengths(x: fx.Node) -> set[int] | None:
    """The lengths that the rows of a reduced tensor may have: its last dimension, or that of what it is a view of.
    None for a tensor of one dimension, which says nothing of rows."""
    lengths: set[int] = set()
    view: fx.Node | None = x
    while view is not None:
        tensor = tensor_of(view)
        sizes = [] if tensor is None else list(tensor.shape)  # a list of one part has none
        while len(sizes) > 1 and statically_equal(sizes[-1], 1):
            sizes.pop()
        if len(sizes) < 2 and view is x:
            return None
        if sizes and isinstance(sizes[-1], int):
            lengths.add(sizes[-1])
        view = source_of(view)
    return lengths


def in_whole_rows(norm: Norm | Refused, value: fx.Node, lengths: set[int] | None) -> Norm | Refused:
    """A norm of ``value``; Refused where it normalises parts of the rows of a reduced tensor, whose rows have one of
    ``lengths``."""
    hidden = last_dim(value)
    if isinstance(norm, Refused) or lengths is None or not isinstance(hidden, int) or hidden in lengths:
        return norm
    cut = without_views(value)
    if is_call(cut, aten.slice.Tensor) and last_dim(cut) == hidden and last_dim(cut.args[0]) in lengths:
        return Refused(
            f"{describe(cut)} cuts rows of {hidden} from the reduced ones of {max(lengths)}: cut them before",
            cut,
        )
    longest = max(lengths, default=0)
    parts = f"such as one head's, parts of the reduced ones of {longest}"
    return Refused(
        f"the norm {describe(norm.result)} normalises rows of {hidden} in {describe(value)}, "
        + (parts if hidden < longest else f"the reduced ones have {longest}"),
        norm.result,
    )
