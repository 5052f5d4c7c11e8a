"""``torch.distributed._functional_collectives``: what plain torch, DTensor and ``tp_plan`` models compile to.

    %all_reduce  = _c10d_functional.all_reduce.default(%x, "sum", "0")
    %wait_tensor = _c10d_functional.wait_tensor.default(%all_reduce)

``dist.all_reduce`` under Dynamo gives the same two nodes. Who waits again for what was waited for (SGLang behind
DTensor) gets the same tensor. Sequence parallelism (DTensor's ``SequenceParallel``) has two halves::

    %reduce_scatter_tensor  = _c10d_functional.reduce_scatter_tensor.default(%x, "sum", world, "0")     and its wait
    %all_gather_into_tensor = _c10d_functional.all_gather_into_tensor.default(%norm, world, "0")        and its wait

with :mod:`arfusion_pass.dialects.reading.pieces` around them for a dimension other than the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed._functional_collectives
from torch import fx

from arfusion_pass.dialects.reading.base import Dialect, Gathered, Reduced, Refused, Rows, Scattered
from arfusion_pass.dialects.reading.pieces import cut, joined
from arfusion_pass.graph import argument, describe, is_call, users_of, viewed

c10d = torch.ops._c10d_functional


class FunctionalCollectives(Dialect):
    """``_c10d_functional``'s all-reduce and its wait."""

    name = "functional_collectives"

    def all_reduce(self, node: fx.Node) -> Reduced | Refused | None:
        """The all-reduce with its waits; other reduce ops and the coalesced form are refused."""
        if is_call(node, c10d.all_reduce_coalesced.default, c10d.all_reduce_coalesced_.default):
            return Refused(
                f"{describe(node)} reduces several tensors at once (coalesced); reduce them one by one", node
            )
        if not is_call(node, c10d.all_reduce.default, c10d.all_reduce_.default):
            return None
        reduce_op = argument(node, "reduce_op")
        if reduce_op != "sum":
            return Refused(f"{describe(node)} reduces by {reduce_op!r}; only 'sum' is fused", node)
        group = argument(node, "group_name")
        x = argument(node, "input")
        if not isinstance(group, str) or not isinstance(x, fx.Node):
            return Refused(f"{describe(node)} names its group by {group!r}, not by a string", node)
        if is_call(node, c10d.all_reduce_.default):
            return _in_place(node, x, group)
        waits = _waits(node)
        if isinstance(waits, Refused):
            return waits
        return Reduced(node, waits[0], x, group, nodes=(node, *waits), aliases=tuple(waits[1:]))

    def reduce_scatter(self, node: fx.Node) -> Scattered | Refused | None:
        """The reduce-scatter with its waits; other reduce ops and the coalesced form are refused."""
        if is_call(node, c10d.reduce_scatter_tensor_coalesced.default):
            return Refused(f"{describe(node)} reduces several tensors at once (coalesced)", node)
        if not is_call(node, c10d.reduce_scatter_tensor.default):
            return None
        reduce_op = argument(node, "reduce_op")
        if reduce_op != "sum":
            return Refused(f"{describe(node)} reduces by {reduce_op!r}; only 'sum' is fused", node)
        x, world, group = (argument(node, name) for name in ("input", "group_size", "group_name"))
        if not isinstance(group, str) or not isinstance(x, fx.Node) or not isinstance(world, int):
            return Refused(f"{describe(node)} names its group by {group!r}, {world!r}", node)
        waits = _waits(node)
        if isinstance(waits, Refused):
            return waits
        before = cut(x, world)
        return Scattered(
            node,
            waits[0],
            x,
            group,
            nodes=(node, *waits),
            aliases=tuple(waits[1:]),
            world=world,
            rows=(*([] if before is None else [before]), Rows(x)),
        )

    def all_gathers(self, shard: fx.Node) -> Iterable[Gathered]:
        """The all-gathers with their waits."""
        for node in users_of(shard, c10d.all_gather_into_tensor.default):
            world, group = argument(node, "group_size"), argument(node, "group_name")
            waits = _waits(node)
            if not isinstance(waits, Refused) and isinstance(group, str) and isinstance(world, int):
                value, *others = waits
                behind = None if others else joined(value, world)
                rows = (*([] if behind is None else [behind]), *map(Rows, waits))
                yield Gathered(node, group, world, rows, (node, *waits))


def _waits(node: fx.Node) -> list[fx.Node] | Refused:
    """The waits for a collective's result, which nobody reads before."""
    waits = users_of(node, c10d.wait_tensor.default)
    others = [user for user in node.users if user not in waits]
    if others:
        return Refused(f"{describe(node)} is read by {describe(others[0])} before it is waited for", others[0])
    if not waits:
        return Refused(f"{describe(node)} is never waited for", node)
    return [*waits, *(again for wait in waits for again in waited_again(wait))]


def _in_place(node: fx.Node, x: fx.Node, group: str) -> Reduced | Refused:
    """An all-reduce that writes its result over ``x``: after functionalisation's end, or where there was none. Like the
    other one where nothing but ``x``, what it returns and their waits holds that memory afterwards."""
    owner, chain = x, {x}
    while len(sources := viewed(owner)) == 1:
        (owner,) = sources
        chain.add(owner)
    if owner.op != "call_function" or sources:
        return Refused(f"{describe(node)} reduces {describe(owner)} in place, which others hold as well", node)
    values = [node]
    for value in (node, x):  # a wait for x in front of this gives what is reduced
        waits = [wait for wait in users_of(value, c10d.wait_tensor.default) if wait > node]
        values += [again for wait in waits for again in (wait, *waited_again(wait))]
    early = late = False
    aliases = [owner]
    while aliases:
        alias = aliases.pop()
        for user in alias.users:
            if user in values or user in chain:
                aliases += [user] if user in chain else []
            elif alias in viewed(user) and user < node:
                aliases.append(user)
            elif alias is x:
                early, late = early or user < node, late or user > node
            elif user > node:
                return Refused(
                    f"{describe(node)} reduces in place what {describe(user)} reads through another view", user
                )
    if early and late:
        return Refused(f"{describe(node)} reduces {describe(x)} in place, which is read before it and after it", node)
    waits = sorted(value for value in values if value is not node)
    held = [*waits, node, *([x] if late else [])]
    return Reduced(node, held[0], x, group, nodes=(node, *waits), aliases=tuple(held[1:]))


def waited_again(value: fx.Node) -> Iterator[fx.Node]:
    """The waits for what was waited for already: each gives its tensor back."""
    values = [value]
    while values:
        waits = users_of(values.pop(), c10d.wait_tensor.default)
        yield from waits
        values += waits


DIALECT = FunctionalCollectives()
