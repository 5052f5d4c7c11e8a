"""Sequence parallelism: what follows the norm of a reduce-scatter, and whether all ranks' rows of it are gathered.

    %shard = wait(reduce_scatter(%x)); %sum = add(%residual, %shard); %norm = rms_norm(%sum)        # T / world rows
    %whole = wait(all_gather(%norm))                                                                # T rows

The quantiser may stand on either side of the all-gather: it reads one row at a time, so its codes are the same. The sum
and the residual stay this rank's rows. The norm must be read through all-gathers alone.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator

from torch import fx

from arfusion_pass.dialects import DIALECTS, Gathered, Norm, Quantised, Refused, Rows, Scattered
from arfusion_pass.dialects.reading.pieces import size_of
from arfusion_pass.graph import (
    aten,
    describe,
    is_call,
    last_dim,
    path,
    row_views,
    same_shape,
    source_of,
    statically_equal,
    views_of,
)
from arfusion_pass.ops.spec import ScaleLayout


@dataclasses.dataclass(frozen=True)
class Gathering:
    """All ranks' rows behind a reduce-scatter's norm.

    Attributes:
        rows: what is reduced, as the fused call takes it.
        norms: the nodes that hold the gathered norm; none where only its codes are gathered.
        quant: the quantiser whose codes are gathered, with the gathered codes and scales as its own; or None.
        nodes: the nodes between the norm and ``norms``, the latter included.
    """

    rows: Rows
    norms: tuple[fx.Node, ...]
    quant: Quantised | None
    nodes: tuple[fx.Node, ...]


@dataclasses.dataclass(frozen=True)
class _Reading:
    """An all-gather of a value: the views in front of it, and the gather."""

    views: tuple[fx.Node, ...]
    gather: Gathered

    def rows(self, scattered: Rows) -> Rows | None:
        """All rows, in the order in which the reduce-scatter deals them out."""
        return next((rows for rows in self.gather.rows if _same_block(rows, scattered)), None)

    def nodes(self, scattered: Rows) -> tuple[fx.Node, ...]:
        """The nodes between the value and those rows, the latter included."""
        rows = self.rows(scattered)
        return (*self.views, *self.gather.nodes, *(() if rows is None else rows.nodes))


def gathering(scattered: Scattered, norm: Norm) -> Gathering | Refused:
    """What gathers the rows of ``norm``, the norm behind ``scattered``; the reason if that cannot be fused."""
    quant, norms = norm.quant, list[_Reading]()
    if norm.norm is not None:
        norms = list(_readings(norm.norm))
        quants = [each for each in _quantisers(norm.norm) if any(_readings(each.codes))]
        if len(quants) > 1:
            one, other = quants[0].codes, quants[1].codes
            return Refused(f"{describe(other)} is gathered as well as {describe(one)}", other)
        quant = quants[0] if quants else None
        refused = _read_as_shard(norm.norm, norms, () if quant is None else quant.nodes)
        if refused is not None:
            return refused
    codes = [] if quant is None else list(_readings(quant.codes))
    scales = [] if quant is None or quant.scales is None else list(_readings(quant.scales, views_of))
    if quant is not None:
        refused = _gathered_quantiser(quant, codes, scales)
        if refused is not None:
            return refused
    readings = [*norms, *codes, *scales]
    for reading in readings:
        gather = reading.gather
        if (gather.group, gather.world) != (scattered.group, scattered.world):
            return Refused(f"{describe(gather.node)} gathers over another group than the reduce-scatter's", gather.node)
    rows = next((rows for rows in scattered.rows if all(each.rows(rows) is not None for each in readings)), None)
    if rows is None:
        node = readings[0].gather.node
        return Refused(f"{describe(node)} puts rows in another order than the reduce-scatter deals them out in", node)
    if quant is not None:
        nodes = (*quant.nodes, *(node for each in (*codes, *scales) for node in each.nodes(rows)))
        whole = [None if not found else found[0].rows(rows) for found in (codes, scales)]
        assert whole[0] is not None
        held = None if whole[1] is None else whole[1].node
        quant = dataclasses.replace(quant, codes=whole[0].node, scales=held, nodes=nodes)
    held_norms = tuple(each.node for reading in norms if (each := reading.rows(rows)) is not None)
    for node in held_norms:
        if not same_shape(node, held_norms[0]):
            return Refused(f"{describe(node)} gathers the norm in another shape than {describe(held_norms[0])}", node)
    return Gathering(rows, held_norms, quant, tuple(node for each in norms for node in each.nodes(rows)))


def uneven(scattered: Scattered) -> Refused | None:
    """The reason where the rows that are scattered are padded, which all ranks see alike. They then share the tokens
    unevenly, as DTensor does: one cuts its rows before it normalises them, and another has nothing to cut."""
    stack, seen = [scattered.x], set[fx.Node]()
    while stack:
        node = stack.pop()
        made = node.op == "call_function" and not node.all_input_nodes  # zeros to put behind the rows
        if made or is_call(node, aten.constant_pad_nd.default):
            return Refused(
                f"{describe(node)} pads the rows that are scattered: the ranks share the tokens unevenly", node
            )
        if node not in seen and (is_call(node, *_DEALT) or source_of(node) is not None):
            stack += node.all_input_nodes
        seen.add(node)
    return None


_DEALT = (aten.cat.default, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor, operator.getitem)
"""How rows are cut, and put behind one another, before they are scattered."""


def _readings(value: fx.Node, views: Callable[[fx.Node], Iterable[fx.Node]] = row_views) -> Iterator[_Reading]:
    """The all-gathers of a value's rows. Scales may be gathered in any shape, one block a rank: a token has as many."""
    for view in views(value):
        for dialect in DIALECTS:
            for gather in dialect.all_gathers(view):
                if last_dim(view) != last_dim(value):
                    gather = dataclasses.replace(gather, rows=tuple(rows for rows in gather.rows if rows.block is None))
                yield _Reading(path(value, view), gather)


def _quantisers(norm: fx.Node) -> Iterator[Quantised]:
    for view in row_views(norm):
        for dialect in DIALECTS:
            for quant in dialect.quantisers(view):
                if isinstance(quant, Quantised):
                    yield dataclasses.replace(quant, nodes=(*path(norm, view), *quant.nodes))


def _read_as_shard(value: fx.Node, readings: list[_Reading], inside: Iterable[fx.Node]) -> Refused | None:
    """The reason where somebody reads this rank's rows of a value themselves."""
    gone = {*inside, *(node for each in readings for node in (*each.views, each.gather.node))}
    readers = [user for view in views_of(value) for user in view.users if source_of(user) is not view]
    reader = next((user for user in sorted(readers) if user not in gone), None)
    if reader is None:
        return None if readers else Refused(f"nobody reads {describe(value)}", value)
    if len(readers) > 1 and any(user in gone for user in readers):
        gathered = "as well as gathered" if readings else "as well as quantised and gathered"
        return Refused(f"{describe(reader)} reads this rank's rows of {describe(value)}, {gathered}", reader)
    return Refused(
        f"{describe(reader)} reads {describe(value)} without an all-gather: only this rank's rows of the norm are used",
        reader,
    )


def _gathered_quantiser(quant: Quantised, codes: list[_Reading], scales: list[_Reading]) -> Refused | None:
    """The reason against a quantiser of this rank's rows."""
    parts = [(quant.codes, codes), *([] if quant.scales is None else [(quant.scales, scales)])]
    for value, readings in parts:
        refused = _read_as_shard(value, readings, quant.nodes)
        if refused is not None:
            return refused
        if len(readings) > 1:
            return Refused(f"{describe(value)} is gathered more than once", value)
    if quant.scales is not None and quant.spec.layout not in (ScaleLayout.ROW, ScaleLayout.LINEAR):
        return Refused(
            f"{describe(quant.scales)}, scales laid out as {quant.spec.layout.name}, are gathered: only rows can be",
            quant.scales,
        )
    return None


def _same_block(a: Rows, b: Rows) -> bool:
    if a.block is None or b.block is None:
        return a.block is b.block
    return statically_equal(size_of(a.block), size_of(b.block))
