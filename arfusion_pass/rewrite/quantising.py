"""Which quantiser behind a site's norm is fused, and which others it serves; the reason where none is."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from arfusion_pass.dialects import DIALECTS, Quantised, Refused
from arfusion_pass.dialects.reading.op_calls import op_name
from arfusion_pass.graph import (
    describe,
    dtype_of,
    is_cast,
    is_returned,
    path,
    row_views,
    same_shape,
    source_of,
    tensor_of,
    value_of,
    views_of,
)
from arfusion_pass.ops.layouts import CODE_DTYPES
from arfusion_pass.ops.spec import group_fits
from arfusion_pass.rewrite.output_views import codes_layout, scale_layout
from arfusion_pass.rewrite.raised import RaisedSite, read_inside


def find_quantiser(site: RaisedSite) -> None:
    """The first quantiser of a site's norm that can be fused, with those that compute the same; the others go on
    reading the norm."""
    assert site.norm is not None
    assert site.reduced is not None
    if site.quant is not None:
        return  # gathered behind a reduce-scatter
    if site.norm.norm is None:
        assert site.norm.quant is not None
        site.quant, site.reason = site.norm.quant, why_unfit(site.norm.quant, site)
        return
    dtype = dtype_of(site.reduced.x)
    alike: dict[Hashable, list[tuple[Quantised, str]]] = {}
    codes: set[fx.Node] = set()
    for norm, value in [(each, value) for each in site.norms for value in row_views(each)]:
        for dialect in DIALECTS:
            for quant in dialect.quantisers(value):
                if isinstance(quant, Refused):
                    site.note = site.note or quant.reason
                elif not any(node.users for node in (quant.codes, quant.scales) if node is not None):
                    continue  # nobody reads it: a graph whose dead code nobody removed
                elif (unfit := why_unfit(quant, site)) is not None:
                    site.note = site.note or unfit
                elif quant.codes not in codes:
                    codes.add(quant.codes)
                    views = path(norm, value)
                    quant = dataclasses.replace(quant, nodes=(*views, *quant.nodes))
                    if dtype == torch.float32 and quant.spec.unrounded:
                        spec = dataclasses.replace(quant.spec, unrounded=False)  # the same, and one kernel less
                        quant = dataclasses.replace(quant, spec=spec)
                    key = (quant.op, quant.spec, quant.scale, quant.scale_value, quant.scale_dtype)
                    alike.setdefault(key, []).append((quant, dialect.name))
    for quants in alike.values():
        first, dialect_name = quants[0]
        twins = _twins(first, [quant for quant, _ in quants[1:]])
        for group in ([first, *twins], [first]):
            reason = fuse_quantisers(site, group)
            if reason is None:
                site.note = None
                site.dialects += (dialect_name,)
                return
            site.note = site.note or reason
    site.note = site.note or _unknown_op(site)


def _unknown_op(site: RaisedSite) -> str | None:
    """What to say of an op of somebody's own that reads the norm and gives codes."""
    for user in sorted({user for norm in site.norms for view in views_of(norm) for user in view.users}):
        name = op_name(user) or str(user.target)
        if user.op != "call_function" or not user.users or name.startswith(("aten::", "prims::")):
            continue
        given = {each.dtype for each in pytree.tree_leaves(value_of(user)) if isinstance(each, torch.Tensor)}
        if codes := sorted(map(str, given.intersection(_CODES))):
            return (
                f"{describe(user)} gives {codes[0]}, as a quantiser does, and is an op that the pass does not know; it "
                "knows quantisers written in torch, and the engines' ops in docs/recognised.md"
            )
    return None


_CODES = {dtype for dtypes in CODE_DTYPES.values() for dtype in dtypes} | {torch.float8_e5m2}


def why_unfit(quant: Quantised, site: RaisedSite) -> str | None:
    """The reason for which a quantiser has no place behind a site's norm."""
    dtype = dtype_of(site.reduced.x)  # type: ignore[union-attr]
    if quant.dtype not in (None, dtype):
        return f"{describe(quant.codes)} rounds to {quant.dtype}, the reduced is {dtype}"
    if quant.spec.group > 0 and not group_fits(quant.spec.group, dtype.itemsize):  # type: ignore[union-attr]
        return f"{describe(quant.codes)} quantises groups of {quant.spec.group}, a size that no kernel has for {dtype}"
    if quant.scale is not None and (cause := _computed_from(quant.scale, site)) is not None:
        return (
            f"the scale {describe(quant.scale)} is computed from {describe(cause)}, which the fused call would produce"
        )
    return None


def _computed_from(node: fx.Node, site: RaisedSite) -> fx.Node | None:
    """The value of a site's all-reduce or norm that ``node`` is computed from, or None."""
    own, seen, stack = set(site.nodes), set[fx.Node](), [node]
    while stack:
        current = stack.pop()
        if current in own:
            return current
        if current not in seen and not current < site.node:  # nothing before the all-reduce comes from it
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return None


def fuse_quantisers(site: RaisedSite, quants: list[Quantised]) -> str | None:
    """Give a site quantisers that compute one thing; the reason if they cannot be fused."""
    assert site.norm is not None
    shape = site.rows.shape
    values: set[fx.Node | None] = {*site.norms}
    nodes: set[fx.Node] = set()
    for quant in quants:
        scales = tensor_of(quant.scales)
        if codes_layout(shape, quant.spec, tensor_of(quant.codes)) is None:  # type: ignore[arg-type]
            return f"{describe(quant.codes)} is no view of rows of codes"
        if scales is not None and scale_layout(shape, quant.spec, scales) is None:
            return f"{describe(quant.scales)} is no view of scales laid out as {quant.spec.layout.name}"  # type: ignore[arg-type]
        values |= {quant.codes, quant.scales}
        nodes.update(quant.nodes)
    for node in sorted(nodes, reverse=True):
        if node not in values and (is_cast(node) or source_of(node) is not None) and not nodes.issuperset(node.users):
            nodes.discard(node)  # others read it too: it stays, and reads what the kernel writes
    reason = read_inside(tuple(sorted(nodes)), values, "quantiser")
    if reason is None:
        site.quant, *twins = (dataclasses.replace(q, nodes=tuple(n for n in q.nodes if n in nodes)) for q in quants)
        site.twins = tuple(twins)
    return reason


def _twins(first: Quantised, others: Iterable[Quantised]) -> list[Quantised]:
    """Those of ``others`` whose readers can have the outputs of ``first``. Of tensors that leave the graph each keeps
    memory of its own: whoever gets two of them may write to one."""
    twins = []
    taken = _returned(first)
    for other in others:
        returned = _returned(other)
        if taken.isdisjoint(returned) and _same_outputs(first, other):
            taken |= returned
            twins.append(other)
    return twins


def _returned(quant: Quantised) -> set[str]:
    """Which of a quantiser's outputs leave the graph."""
    held = {"codes": quant.codes, "scales": quant.scales}
    return {role for role, node in held.items() if node is not None and is_returned(node)}


def _same_outputs(a: Quantised, b: Quantised) -> bool:
    """Whether two quantisers' codes, and their scales where both have readers, have one shape, stride and dtype."""
    pairs = [(a.codes, b.codes)]
    if a.scales is not None and b.scales is not None:
        pairs.append((a.scales, b.scales))
    return all(same_shape(x, y) and dtype_of(x) == dtype_of(y) and _same_strides(x, y) for x, y in pairs)


def _same_strides(a: fx.Node, b: fx.Node) -> bool:
    strides = zip(tensor_of(a).stride(), tensor_of(b).stride(), strict=True)  # type: ignore[union-attr]
    return all(statically_known_true(x == y) for x, y in strides)
