"""How a dimension other than the first is scattered and gathered: cut into a piece for each rank, and joined again.

The collectives deal in blocks of the first dimension. Rows in the second one are brought there and back::

    %pieces = aten.split.Tensor(%x, S / world, 1)               # x [B, S, H]
    %cat    = aten.cat.default([piece 0, piece 1, ...])         # [world * B, S / world, H]: what is reduce-scattered

    %split  = aten.split.Tensor(%gathered, B)                   # gathered [world * B, S / world, H]
    %whole  = aten.cat.default([part 0, part 1, ...], 1)        # [B, S, H]

With one sequence (``B`` = 1) both are views. Pieces that are not known to be equally long are none here: what is
reduce-scattered is then the ``cat`` itself.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from arfusion_pass.dialects.reading.base import Rows
from arfusion_pass.graph import argument, aten, is_call, only_user, statically_equal, tensor_of
from arfusion_pass.ops.layouts import token_count


def cut(node: fx.Node, world: int) -> Rows | None:
    """The tensor whose pieces along its rows' dimension ``node`` puts behind one another."""
    if not is_call(node, aten.cat.default) or argument(node, "dim") != 0:
        return None
    pieces: Any = node.args[0]
    if len(pieces) != world:
        return None
    base: fx.Node | None = None
    size: Any = None
    for index, piece in enumerate(pieces):
        found = _piece(piece)
        if found is None or found[1] != index:
            return None
        split = found[0]
        if base is not None and (split.args[0] is not base or split.args[1] != size):
            return None
        base, size = split.args[0], split.args[1]  # type: ignore[assignment]
        if not _along_rows(split):
            return None
    if base is None or not statically_equal(tensor_of(base).shape[-2], world * size_of(size)):  # type: ignore[union-attr]
        return None
    return Rows(base, None if _one_sequence(base) else size)


def joined(node: fx.Node, world: int) -> Rows | None:
    """The tensor that puts the parts of ``node``, one of each rank, side by side along its rows' dimension."""
    split = only_user(node)
    if not is_call(split, aten.split.Tensor) or argument(split, "dim") != 0:  # type: ignore[arg-type]
        return None
    assert split is not None
    parts = sorted(split.users, key=lambda part: part.args[1] if is_call(part, operator.getitem) else -1)  # type: ignore[arg-type, return-value]
    cat = only_user(parts[0]) if len(parts) == world else None
    if not is_call(cat, aten.cat.default) or list(cat.args[0]) != parts:  # type: ignore[union-attr, arg-type]
        return None
    assert cat is not None
    tensor = tensor_of(node)
    dims = None if tensor is None else tensor.dim()
    if dims is None or dims < 3 or argument(cat, "dim") % dims != dims - 2:
        return None
    assert tensor is not None
    if not all(is_call(part, operator.getitem) and only_user(part) is cat for part in parts):
        return None
    size: Any = tensor.shape[-2]
    return Rows(cat, None if _one_sequence(cat) else size, (split, *parts, cat))


def _piece(node: Any) -> tuple[fx.Node, Any] | None:
    """The split that ``node`` is a piece of, and which."""
    if not is_call(node, operator.getitem) or not is_call(node.args[0], aten.split.Tensor):
        return None
    return node.args[0], node.args[1]


def _along_rows(split: fx.Node) -> bool:
    """Whether a split cuts the dimension in front of the last."""
    tensor = tensor_of(split.args[0])
    return tensor is not None and tensor.dim() >= 2 and argument(split, "dim") % tensor.dim() == tensor.dim() - 2


def _one_sequence(node: fx.Node) -> bool:
    return statically_equal(token_count(tensor_of(node).shape[:-1]), 1)  # type: ignore[union-attr]


def size_of(size: Any) -> Any:
    """A size as its own value, where it may be the node that holds it."""
    return size.meta["val"] if isinstance(size, fx.Node) else size
