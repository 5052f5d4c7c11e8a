"""Copies by which a graph makes its scales column-major, so that the fused op can write them so in the first place.

%t = aten.permute.default(%scale, [1, 0])                    # views (squeeze, reshape) may stand before it
%c = aten.clone.default(%t, memory_format=contiguous_format)                     -> COLUMN
  or aten.constant_pad_nd.default(%t, [0, pad4(T) - T], 0.0)                     -> COLUMN_TMA
  or aten.copy.default(%empty, %scale), where %empty has strides (1, T) or (1, pad4(T))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from arfusion_pass.graph import VIEWS, argument, is_call, is_cast, tensor_of
from arfusion_pass.ops.layouts import round_up
from arfusion_pass.ops.spec import ScaleLayout

aten = torch.ops.aten

LONGEST = 8
"""Nodes between the scales and their copy; the real ones have one or two."""

TRANSPOSES = (aten.permute.default, aten.transpose.int, aten.t.default)


def column_copy(scale: fx.Node, inside: set[fx.Node]) -> tuple[fx.Node, ScaleLayout, list[fx.Node]] | None:
    """The node that holds ``scale`` column-major, its layout, and the nodes up to it, itself included.

    None where anybody outside ``inside`` reads the scales as they are, or where the copy is of no layout that there is.

    Args:
        scale: row-major, the groups in the last dimension that is not 1.
        inside: the nodes that go when the quantiser is fused.
    """
    sizes = _sizes(scale)
    if len(sizes) != 2:
        return None
    tokens, groups = sizes
    transposed, node = False, scale
    path: list[fx.Node] = []
    while len(path) < LONGEST:
        readers = [user for user in node.users if user not in inside]
        if len(readers) != 1:
            return None
        reader, source = readers[0], node
        path.append(reader)
        node = reader
        if is_call(node, *TRANSPOSES):
            swapped = _transposes(source, node)
            if swapped is None:
                return None
            transposed ^= swapped
        elif is_call(node, *VIEWS) or is_cast(node, torch.float32):
            if not _same(_sizes(node), (groups, tokens) if transposed else (tokens, groups)):
                return None
        else:
            break
    layout = _layout(node, source, transposed, tokens, groups)
    return None if layout is None else (node, layout, path)


def _sizes(node: Any) -> tuple[Any, ...]:
    """The dimensions of a tensor that are not 1."""
    tensor = tensor_of(node)
    return () if tensor is None else tuple(size for size in tensor.shape if not statically_known_true(size == 1))


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def _transposes(source: fx.Node, node: fx.Node) -> bool | None:
    """Whether a permutation swaps the two dimensions that are not 1; None where it cannot be told."""
    tensor = tensor_of(source)
    if tensor is None:
        return None
    rank = tensor.dim()
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [dim % rank for dim in argument(node, "dims")]
    elif rank == 2 or node.target is aten.transpose.int:
        a, b = (argument(node, name, index) % rank for index, name in enumerate(("dim0", "dim1")))
        order[a], order[b] = b, a
    kept = [dim for dim in order if not statically_known_true(tensor.shape[dim] == 1)]
    return kept[0] > kept[1] if len(kept) == 2 else None


def _layout(node: fx.Node, source: fx.Node, transposed: bool, tokens: Any, groups: Any) -> ScaleLayout | None:
    """The layout that a copy of ``source`` has."""
    tensor = tensor_of(node)
    if tensor is None or tensor.dtype != torch.float32:
        return None
    padded = round_up(tokens, 4)
    if is_call(node, aten.constant_pad_nd.default):
        pad, value = list(argument(node, "pad")), argument(node, "value", 0)
        if not transposed or value != 0 or any(p != 0 for p in (pad[0], *pad[2:])) or tensor.dim() < 1:
            return None
        tokens_now = tensor.shape[-1]
        if not _same(_sizes(node)[:1], (groups,)) or not tensor.is_contiguous():
            return None
        return ScaleLayout.COLUMN_TMA if statically_known_true(tokens_now == padded) else None
    if is_call(node, aten.clone.default):
        pass
    elif is_call(node, aten.copy.default):
        if node.args[1] is not source or node.args[0] is source:
            return None
    else:
        return None
    if not _same(_sizes(node), (groups, tokens) if transposed else (tokens, groups)):
        return None
    strides = [
        stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if not statically_known_true(size == 1)
    ]
    by_token, by_group = (strides[1], strides[0]) if transposed else strides
    if not statically_known_true(by_token == 1):
        return None
    if statically_known_true(by_group == tokens):
        return ScaleLayout.COLUMN
    return ScaleLayout.COLUMN_TMA if statically_known_true(by_group == padded) else None
