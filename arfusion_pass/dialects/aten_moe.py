"""MoE combinations in front of an all-reduce, in plain torch: gather, weight and sum over experts.

Finalize (``permuted [P, H]``, ``index [T, K]``, ``weight [T, K]``)::

    %rows    = aten.index.Tensor(%permuted, [%index])      # or index_select, embedding, of the flat index and reshaped
    %product = aten.mul.Tensor(%rows, unsqueeze(%weight, -1))           # in T or in fp32; absent without weights
    %kept    = aten.where.self(unsqueeze(ge(%index, 0), -1), %product, 0)    # where -1 stands for "no expert"
    %routed  = aten.sum.dim_IntList(%kept, [1])            # or the K products added one by one
    %scaled  = aten.mul.Tensor(%routed, 2.5)               # routed_scaling_factor; may be absent
    %x       = aten.add.Tensor(%scaled, %shared)           # shared expert, either side; may be absent

Reduce (``expert_x [E, T, H]``, ``scale [E, T]``): ``sum(mul(expert_x, unsqueeze(scale, -1)), [0]) + token_input``.

Casts between the steps become rounding flags. The order in which ``aten.sum`` adds is the back-end's own; ours is
expert order, in fp32. An index of the graph wraps around below zero as torch's indexing does, so it is wrapped before
the kernel sees it, unless the graph masks such entries itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from arfusion_pass.dialects.reading.base import Dialect, Prologue, Refused
from arfusion_pass.graph import (
    VIEWS,
    argument,
    constant,
    dtype_of,
    is_call,
    is_cast,
    keeps_rows,
    peel,
    same_shape,
    source_of,
    statically_equal,
    tensor_of,
)
from arfusion_pass.ops.spec import Flags

aten = torch.ops.aten

_INTEGERS = (torch.int32, torch.int64)


@dataclasses.dataclass(frozen=True)
class _Routed:
    """The sum over experts, with what was found inside of it."""

    op: str
    inputs: dict[str, fx.Node]
    flags: Flags
    nodes: tuple[fx.Node, ...]
    wraps: bool = False
    sentinel: bool = False


class AtenMoE(Dialect):
    """``moe_finalize`` and ``moe_reduce`` in aten ops."""

    name = "aten_moe"

    def prologues(self, x: fx.Node) -> Iterable[Prologue | Refused]:
        """The combination that ``x`` is, if it is one."""
        views: list[fx.Node] = []
        while keeps_rows(x) and (source := source_of(x)) is not None:
            views.append(x)
            x = source
        found = _combination(x, dtype_of(x))
        if found is not None:
            yield dataclasses.replace(found, nodes=(*found.nodes, *views))


def _combination(x: fx.Node, dtype: torch.dtype | None) -> Prologue | None:
    """``x`` as a sum over experts, scaled, with another tensor added."""
    node, nodes = x, [x]
    if is_cast(x, dtype) and dtype_of(x.args[0]) == torch.float32 != dtype:
        node = x.args[0]  # type: ignore[assignment]
        nodes.insert(0, node)
    if is_call(node, aten.add.Tensor) and argument(node, "alpha", 1) == 1:
        for one, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
                continue
            added = peel(other)
            if dtype_of(added) != dtype or not same_shape(added, node) or not same_shape(one, node):
                continue
            routed = _scaled(one, dtype, rounded=dtype_of(node) == dtype != torch.float32)
            if routed is not None:
                parts, factor = routed
                role = "shared" if parts.op == "moe_finalize" else "token_input"
                return _prologue(x, parts, factor, nodes, {role: added})
    routed = _scaled(node, dtype, rounded=False)
    if routed is None:
        return None
    parts, factor = routed
    return _prologue(x, parts, factor, nodes, {})


def _prologue(
    x: fx.Node, parts: _Routed, factor: float, nodes: list[fx.Node], added: dict[str, fx.Node]
) -> Prologue | None:
    if parts.op == "moe_reduce" and factor != 1.0:
        return None  # the reduce form has no factor
    return Prologue(
        op=parts.op,
        x=x,
        inputs={**parts.inputs, **added},
        flags=parts.flags,
        routed_scaling_factor=factor,
        wraps=parts.wraps,
        sentinel=parts.sentinel,
        nodes=tuple(dict.fromkeys((*parts.nodes, *nodes))),
    )


def _scaled(node: fx.Node, dtype: torch.dtype | None, rounded: bool) -> tuple[_Routed, float] | None:
    """The routed sum under an optional factor and casts. ``rounded``: ``node`` itself is a value in ``T``."""
    nodes: list[fx.Node] = []
    low = dtype_of(node) == dtype != torch.float32  # in T from here on, until a cast from fp32
    if is_cast(node, dtype) and low:
        nodes.append(node)
        node = node.args[0]  # type: ignore[assignment]
        rounded = True
        low = False
    factor = 1.0
    flags = Flags.NONE
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        number = constant(node.args[1], operation=node)
        if number is not None:
            factor = number
            nodes.append(node)
            if rounded or low:
                flags |= Flags.MOE_ROUND_SCALED
            node = node.args[0]  # type: ignore[assignment]
            if is_cast(node, dtype) and dtype_of(node) != torch.float32:
                nodes.append(node)
                node = node.args[0]  # type: ignore[assignment]
                flags |= Flags.MOE_ROUND_SUM
            elif low:
                flags |= Flags.MOE_ROUND_SUM
            rounded = False
    if rounded or (low and factor == 1.0):
        flags |= Flags.MOE_ROUND_SUM
    routed = _sum(node, dtype) or _loop(node, dtype)
    if routed is None:
        return None
    if dtype == torch.float32:
        flags = Flags.NONE
    return dataclasses.replace(routed, flags=routed.flags | flags, nodes=(*routed.nodes, *reversed(nodes))), factor


def _sum(node: fx.Node, dtype: torch.dtype | None) -> _Routed | None:
    """``sum`` over the expert dimension of weighted rows."""
    if not is_call(node, aten.sum.dim_IntList) or argument(node, "keepdim", False):
        return None
    product = node.args[0]
    tensor = tensor_of(product)
    dims = argument(node, "dim")
    if tensor is None or tensor.dim() != 3 or not dims or len(dims) != 1 or not isinstance(product, fx.Node):
        return None
    if dtype_of(node) not in (dtype, torch.float32) or dtype_of(product) != dtype_of(node):
        return None
    if dims[0] % 3 == 1:
        return _gathered(product, node, dtype)
    if dims[0] % 3 == 0:
        return _stacked(product, node, dtype)
    return None


def _weighted(
    product: fx.Node, dtype: torch.dtype | None
) -> tuple[fx.Node, fx.Node | None, Flags, tuple[fx.Node, ...]]:
    """Rows and ``[T, K]`` (or ``[E, T]``) weights of a product; the product itself as rows where it is none."""
    if is_call(product, aten.mul.Tensor):
        for rows, other in ((product.args[0], product.args[1]), (product.args[1], product.args[0])):
            weight = peel(other)
            lifted = is_call(weight, aten.unsqueeze.default) or is_call(weight, *VIEWS)
            shape = tensor_of(weight)
            if not lifted or shape is None or shape.dim() != 3 or shape.shape[-1] != 1 or not isinstance(rows, fx.Node):
                continue
            inner = weight.args[0]
            flat = tensor_of(inner)
            if flat is None or flat.dim() != 2 or dtype_of(peel(inner)) not in (dtype, torch.float32):
                continue
            lead = tensor_of(product).shape[:2]  # type: ignore[union-attr]
            if not all(map(statically_equal, (*flat.shape, *shape.shape[:2]), (*lead, *lead))):
                continue  # one weight for several rows: broadcast, or reshaped from another order
            if not same_shape(rows, product):
                continue
            flags = Flags.MOE_ROUND_PRODUCT if dtype_of(product) == dtype != torch.float32 else Flags.NONE
            return rows, peel(inner), flags, (*_between(other, peel(inner)), product)
    return product, None, Flags.NONE, ()


def _between(end: Any, start: Any) -> tuple[fx.Node, ...]:
    """The chain of single-input nodes from ``start`` (left out) to ``end``."""
    nodes: list[fx.Node] = []
    while isinstance(end, fx.Node) and end is not start:
        nodes.insert(0, end)
        end = end.args[0]
    return tuple(nodes)


def _gathered(product: fx.Node, total: fx.Node, dtype: torch.dtype | None) -> _Routed | None:
    """``moe_finalize`` from the ``[T, K, H]`` tensor that is summed over K."""
    nodes: tuple[fx.Node, ...] = (total,)
    mask, sentinel = None, False
    if is_call(product, aten.where.self) and constant(product.args[2]) == 0.0:
        nodes = (product, *nodes)
        mask, sentinel = _masked_index(product.args[0])
        product = product.args[1]  # type: ignore[assignment]
        if mask is None or not isinstance(product, fx.Node):
            return None
    rows, weight, flags, inner = _weighted(product, dtype)
    gather = _gather(peel(rows))
    if gather is None or dtype_of(gather[0]) != dtype:
        return None
    permuted, index, path = gather
    if mask is None:
        wraps = not _at_least_0(index)  # and if so, never negative
    elif peel_integer(index) is mask:
        wraps, index = sentinel, mask
    elif _at_least_0(index) and peel_integer(index.args[0]) is mask:
        wraps, index = False, mask
    else:
        return None
    inputs = {"permuted_x": permuted, "index": index}
    if weight is not None:
        if not same_shape(weight, index):
            return None
        inputs["expert_scale"] = weight
    return _Routed("moe_finalize", inputs, flags, (*path, *_between(rows, peel(rows)), *inner, *nodes), wraps, sentinel)


def peel_integer(node: Any) -> Any:
    """``node`` without casts between int32 and int64."""
    while is_cast(node) and dtype_of(node) in (torch.int32, torch.int64):
        if dtype_of(node.args[0]) not in (torch.int32, torch.int64):
            break
        node = node.args[0]
    return node


def _at_least_0(index: Any) -> bool:
    """Whether ``index`` is clamped from below by 0, and not from above."""
    if not is_call(index, aten.clamp_min.default, aten.clamp.default):
        return False
    return constant(argument(index, "min")) == 0.0 and argument(index, "max") is None


def _masked_index(mask: Any) -> tuple[fx.Node | None, bool]:
    """The index ``[T, K]`` of ``unsqueeze(index >= 0, -1)``, and whether -1 is the only negative one that is masked."""
    if not is_call(mask, aten.unsqueeze.default) or mask.args[1] not in (-1, 2):
        return None, False
    test = mask.args[0]
    for target, bound in ((aten.ge.Scalar, 0.0), (aten.gt.Scalar, -1.0), (aten.ne.Scalar, -1.0)):
        if is_call(test, target) and constant(test.args[1]) == bound and dtype_of(test.args[0]) in _INTEGERS:
            return peel_integer(test.args[0]), target is aten.ne.Scalar
    return None, False


def _gather(rows: Any) -> tuple[fx.Node, fx.Node, tuple[fx.Node, ...]] | None:
    """(permuted ``[P, H]``, index ``[T, K]``, nodes) of gathered rows ``[T, K, H]``."""
    nodes: list[fx.Node] = []
    shape = tensor_of(rows)
    if is_call(rows, *VIEWS):
        nodes.append(rows)
        rows = rows.args[0]
    if is_call(rows, aten.index.Tensor) and len(rows.args[1]) == 1:
        permuted, index = rows.args[0], rows.args[1][0]
    elif is_call(rows, aten.index_select.default) and rows.args[1] == 0:
        permuted, index = rows.args[0], rows.args[2]
    elif is_call(rows, aten.embedding.default) and argument(rows, "padding_idx", -1) == -1:
        permuted, index = rows.args[0], rows.args[1]
    else:
        return None
    nodes.insert(0, rows)
    index = peel_integer(index)
    if is_call(index, *VIEWS) and tensor_of(index).dim() == 1:  # type: ignore[union-attr]
        index = peel_integer(index.args[0])
    source, places = tensor_of(permuted), tensor_of(index)
    if source is None or places is None or shape is None or source.dim() != 2 or places.dim() != 2:
        return None
    if places.dtype not in (torch.int32, torch.int64) or not isinstance(permuted, fx.Node):
        return None
    if shape.dim() != 3 or not all(map(statically_equal, places.shape, shape.shape[:2])):
        return None
    return permuted, index, tuple(nodes)


def _stacked(product: fx.Node, total: fx.Node, dtype: torch.dtype | None) -> _Routed | None:
    """``moe_reduce`` from the ``[E, T, H]`` tensor that is summed over E."""
    rows, scale, flags, inner = _weighted(product, dtype)
    experts = peel(rows)
    if scale is None or dtype_of(experts) != dtype or not isinstance(experts, fx.Node):
        return None
    inputs = {"expert_x": experts, "expert_scale": scale}
    return _Routed("moe_reduce", inputs, flags, (*_between(rows, experts), *inner, total))


def _loop(node: fx.Node, dtype: torch.dtype | None) -> _Routed | None:
    """The K weighted rows added one by one in ``T``, each ``mul(index(permuted, [index[:, k]]), weight[:, k:k+1])``."""
    terms: list[fx.Node] = []
    sums: list[fx.Node] = []
    while is_call(node, aten.add.Tensor) and argument(node, "alpha", 1) == 1 and dtype_of(node) == dtype:
        sums.insert(0, node)
        left, right = node.args[0], node.args[1]
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return None
        terms.insert(0, right)
        node = left
    terms.insert(0, node)
    found: list[tuple[fx.Node, fx.Node, fx.Node | None]] = []
    nodes: list[fx.Node] = []
    for k, term in enumerate(terms):
        part = _term(term, k, dtype)
        if part is None:
            return None
        found.append(part[:3])
        nodes += part[3]
    permuted, index, weight = found[0]
    slots = tensor_of(index).shape[1]  # type: ignore[union-attr]
    if any(part != found[0] for part in found) or slots != len(terms) or slots < 2:
        return None
    if weight is not None and not same_shape(weight, index):
        return None  # one weight for all tokens
    inputs = {"permuted_x": permuted, "index": index}
    flags = Flags.NONE if dtype == torch.float32 else Flags.MOE_ROUND_PARTIAL
    if weight is not None:
        inputs["expert_scale"] = weight
        flags |= Flags.NONE if dtype == torch.float32 else Flags.MOE_ROUND_PRODUCT
    return _Routed("moe_finalize", inputs, flags, (*nodes, *sums), wraps=True)


def _term(
    term: Any, k: int, dtype: torch.dtype | None
) -> tuple[fx.Node, fx.Node, fx.Node | None, list[fx.Node]] | None:
    """(permuted, index, weight, nodes) of the ``k``-th weighted row."""
    nodes = [term]
    rows, weight = term, None
    if is_call(term, aten.mul.Tensor):
        for gathered, other in ((term.args[0], term.args[1]), (term.args[1], term.args[0])):
            if is_call(other, aten.slice.Tensor) and list(other.args[1:4]) == [1, k, k + 1]:
                weight = other.args[0]
                nodes.insert(0, other)
            elif is_call(other, aten.unsqueeze.default) and _selects(other.args[0], k):
                weight = other.args[0].args[0]
                nodes[:0] = [other.args[0], other]
            if weight is not None:
                rows = gathered
                break
        else:
            return None
    if not is_call(rows, aten.index.Tensor) or len(rows.args[1]) != 1 or dtype_of(rows) != dtype:
        return None
    column = peel_integer(rows.args[1][0])
    if not _selects(column, k) or dtype_of(weight) not in (None, dtype):
        return None
    if rows is not term:
        nodes.insert(0, rows)
    nodes.insert(0, column)
    return rows.args[0], peel_integer(column.args[0]), weight, nodes


def _selects(node: Any, k: int) -> bool:
    return is_call(node, aten.select.int) and node.args[1] == 1 and node.args[2] == k


DIALECT = AtenMoE()
