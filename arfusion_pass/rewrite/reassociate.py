"""Opt-in (``FusionConfig(reassociate=True)``): a linear step between an all-reduce and its norm goes in front of it.

    residual + c * all_reduce(x)                -> residual + all_reduce(c * x)     Granite, MiniCPM, Gemma's embedding
    residual + (all_reduce(a) + all_reduce(b))  -> residual + all_reduce(a + b)     routed and shared experts

Equal in exact arithmetic, rounded elsewhere: each rank rounds its share of the product or sum before the all-reduce,
not the result after it. The ranks are taken to run one graph, as their collectives require anyway.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from arfusion_pass.config import FusionConfig
from arfusion_pass.dialects import Reduced
from arfusion_pass.graph import (
    aten,
    constant,
    known_contiguous,
    last_dim,
    mutated_arguments,
    other_operand,
    owners,
    path,
    same_shape,
    statically_equal,
    tensor_of,
)
from arfusion_pass.ops.layouts import token_count
from arfusion_pass.rewrite.buffers import SizeSource
from arfusion_pass.rewrite.commit import META_KEYS
from arfusion_pass.rewrite.hindrances import Hindrance, factor_behind
from arfusion_pass.rewrite.raising import RaisedSite, find_sites


def reassociate(graph: fx.Graph, config: FusionConfig) -> None:
    """Move every step that hinders an all-reduce of ``graph`` (:class:`arfusion_pass.rewrite.hindrances.Hindrance`) and
    can be moved, and then what stood behind it. A graph without such a step is not touched."""
    moved = True
    while moved:
        changed: set[fx.Node] = set()
        for site in find_sites(graph, config):
            # What was found of a site is stale where an earlier move of this sweep changed it: the next one sees it.
            if changed.isdisjoint(named := _named(site)):
                changed |= _move(graph, site, named)
        moved = bool(changed)


def _named(site: RaisedSite) -> set[fx.Node]:
    """Every node that a move of what hinders a site would read, replace or erase."""
    if site.hindrance is None or site.reduced is None:
        return set()
    named = {site.hindrance.step, site.hindrance.operand}
    for reduced, operand in filter(None, ((site.reduced, site.hindrance.operand), site.hindrance.other)):
        named |= {reduced.node, reduced.value, reduced.x, operand, *reduced.nodes, *path(reduced.value, operand)}
    return named


def _move(graph: fx.Graph, site: RaisedSite, named: set[fx.Node]) -> set[fx.Node]:
    """Move what hinders one site; gives the nodes that this changed, none where it cannot be moved."""
    if site.hindrance is None or site.reduced is None or not _takes_another_input(site.reduced):
        return set()
    if site.hindrance.other is None:
        return named | _scale(graph, site.reduced, site.hindrance)
    first = site.hindrance.other[0]  # the sum is seen from both: from the later one both inputs exist
    merged = (
        first.node < site.node
        and not _written_between(graph, first, site.node)
        and _merge(graph, site.reduced, site.hindrance, first)
    )
    return named if merged else set()


def _written_between(graph: fx.Graph, first: Reduced, second: fx.Node) -> bool:
    """Whether anybody writes, between two all-reduces, to what the first one reads."""
    read = owners(first.x)
    node = first.node
    while node is not second:
        if any(not read.isdisjoint(owners(written)) for written in mutated_arguments(node)):
            return True
        node = node.next
    return False


def _takes_another_input(reduced: Reduced) -> bool:
    """Whether the all-reduce is a functional op on a contiguous tensor, whose result is laid out like any other."""
    schema = getattr(reduced.node.target, "_schema", None)
    x = tensor_of(reduced.x)
    return schema is not None and not schema.is_mutable and x is not None and known_contiguous(x)


def _scale(graph: fx.Graph, reduced: Reduced, hindrance: Hindrance) -> set[fx.Node]:
    """``c * all_reduce(x)`` to ``all_reduce(c * x)``, and so on with the factors behind it; gives the old products."""
    step, operand, x, gone = hindrance.step, hindrance.operand, reduced.x, set[fx.Node]()
    while True:
        scaled = _insert(graph, reduced, step.target, (x, constant(other_operand(step, operand))))
        reduced.node.replace_input_with(x, scaled)
        step.replace_all_uses_with(operand)
        graph.erase_node(step)
        gone.add(step)
        following = factor_behind(operand)
        if following is None:
            return gone
        x, (step, operand) = scaled, following


def _merge(graph: fx.Graph, reduced: Reduced, hindrance: Hindrance, first: Reduced) -> bool:
    """``all_reduce(a) + all_reduce(b)`` to ``all_reduce(a + b)`` in the place of the second; whether it was done."""
    assert hindrance.other is not None
    a = _shaped_like(graph, first, reduced) if same_shape(hindrance.operand, hindrance.step) else None
    if a is None:
        return False
    total = _insert(graph, reduced, aten.add.Tensor, (a, reduced.x))
    reduced.node.replace_input_with(reduced.x, total)
    hindrance.step.replace_all_uses_with(hindrance.operand)
    views = path(first.value, hindrance.other[1])
    for node in (hindrance.step, *reversed(views), *reversed(first.nodes)):
        graph.erase_node(node)
    return True


def _shaped_like(graph: fx.Graph, first: Reduced, second: Reduced) -> fx.Node | None:
    """The first all-reduce's input as a tensor of the second's shape, in front of the second; None where their rows
    are not the same for sure."""
    if same_shape(first.x, second.x):
        return first.x
    a, b = tensor_of(first.x), tensor_of(second.x)
    if a is None or b is None or not known_contiguous(a) or last_dim(first.x) != last_dim(second.x):
        return None
    if not statically_equal(token_count(a.shape), token_count(b.shape)):
        return None
    order = list(graph.nodes)
    position = {node: index for index, node in enumerate(order)}
    source = SizeSource(order)
    sizes = [source.find(size, position, position[second.node] - 1, [second.x]) for size in b.shape]
    if any(size is None for size in sizes):
        return None

    def insert(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, val: Any = None) -> fx.Node:
        return _insert(graph, second, target, args, val)

    shape = [size.emit(insert) for size in sizes if size is not None]
    return _insert(graph, second, aten.view.default, (first.x, shape), a.view(b.shape))


def _insert(graph: fx.Graph, reduced: Reduced, target: Any, args: tuple[Any, ...], val: Any = None) -> fx.Node:
    """A node in front of an all-reduce, with its metadata; the value by the op itself where it is not given."""
    with graph.inserting_before(reduced.node):
        node = graph.call_function(target, args)
    meta = {key: reduced.node.meta[key] for key in META_KEYS if key in reduced.node.meta}
    value = val if val is not None else target(*fx.map_arg(args, lambda arg: arg.meta["val"]))
    node.meta.update(meta, val=value)
    return node
