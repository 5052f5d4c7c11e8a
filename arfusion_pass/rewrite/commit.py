"""Commit: write the planned calls into the user's graph, in the place of what they stand for.

All of it goes through one log of edits (:mod:`arfusion_pass.rewrite.edits`): the graph is as it came, or every planned
call is in it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from arfusion_pass.graph import is_pure, known_contiguous, tensor_of
from arfusion_pass.ops.schema import OUTPUT_NAMES
from arfusion_pass.patterns.chains import auto_functionalized
from arfusion_pass.rewrite.buffers import Insert, empty_like
from arfusion_pass.rewrite.edits import Edits, is_erased, meta_of
from arfusion_pass.rewrite.planning import Fakes, Plan, held, origins
from arfusion_pass.rewrite.raised import RaisedSite

aten = torch.ops.aten


def commit(edits: Edits, plans: list[Plan]) -> list[tuple[Plan, fx.Node]]:
    """Write the planned calls and erase what they replace; gives each with its node in the user's graph."""
    for plan in plans:
        _read_result(plan.site, edits)
    writer = _Writer(edits)
    written = [(plan, writer.write(plan)) for plan in plans]
    for plan in plans:
        _erase(plan.site, edits)
    return written


class _Writer:
    """Writes fused calls into one graph, one after the other.

    Attributes:
        tail: the last node that was written behind each anchor.
        replaced: what each value of the graph that a call now gives has become.
        shared: what is computed of the graph's inputs alone, once for all calls, by its node in the shadow graph.
    """

    def __init__(self, edits: Edits) -> None:
        self.edits = edits
        self.fakes = Fakes(edits.graph)
        self.tail: dict[fx.Node, fx.Node] = {}
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.shared: dict[fx.Node, fx.Node] = {}

    def write(self, plan: Plan) -> fx.Node:
        """Write one plan's call behind its anchor, and let it be read instead of what it stands for."""
        readers = plan.site.outside_readers
        last = self.tail.get(plan.anchor, plan.anchor)
        for node in plan.moved:
            self.edits.move_after(last, node)
            last = node
        # An input may have been moved, or written behind the same anchor, since this was planned.
        last = max([last, *(self.replaced.get(node, node) for node in origins(plan.call))])
        call, last, values = self._insert(plan, last)
        self.tail[plan.anchor] = last
        for role, old_values in plan.site.holders.items():
            outside = set(readers[role])
            for old in old_values if role in values else ():
                self.edits.replace(old, values[role], among=outside.__contains__)
                self.replaced[old] = values[role]
        return call

    def _insert(self, plan: Plan, last: fx.Node) -> tuple[fx.Node, fx.Node, dict[str, fx.Node]]:
        """Insert buffers, call and results after ``last``; gives the call, the last new node, and role to result."""
        meta = meta_of(plan.site.node)

        def insert(
            target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, val: Any = None
        ) -> fx.Node:
            nonlocal last
            current = fx.map_arg(args, lambda node: self.replaced.get(node, node))
            last = self.edits.insert_after(last, target, current, {**meta, "val": val}, kwargs)
            return last

        buffers = {role: buffer.emit(insert) for role, buffer in plan.buffers.items()}
        kwargs: dict[str, Any] = {}
        for name, argument in plan.call.kwargs.items():
            if name in OUTPUT_NAMES:
                kwargs[name] = buffers.get(name)
            elif isinstance(argument, fx.Node):
                kwargs[name] = self._input(argument, insert)
            else:
                kwargs[name] = argument
        vals = tuple(None if role not in buffers else buffers[role].meta["val"] for role in OUTPUT_NAMES)
        call = insert(auto_functionalized, plan.call.args, kwargs, (None, *vals))
        values: dict[str, fx.Node] = {}
        results = {
            role: insert(operator.getitem, (call, 1 + OUTPUT_NAMES.index(role)), None, buffers[role].meta["val"])
            for role in plan.buffers
        }
        for role, buffer in plan.buffers.items():
            values[role] = buffer.view(insert, results[role])
        return call, last, values

    def _input(self, node: fx.Node, insert: Insert) -> fx.Node:
        """An input of a fused call in the user's graph: what it stands for, or what it computes from that."""
        if "origin" in node.meta:
            origin = self.replaced.get(node.meta["origin"], node.meta["origin"])
            fake = tensor_of(origin)
            if fake is None or known_contiguous(fake):
                return origin
            # Inductor would copy it by itself; another back-end would hand it to the op as it is.
            return insert(aten.clone.default, (origin,), {"memory_format": torch.contiguous_format}, empty_like(fake))
        if node.meta.get("once") and all(origin.op == "placeholder" for origin in origins(node)):
            return self._shared(node)
        args = fx.map_arg(node.args, lambda inner: self._input(inner, insert))
        vals = fx.map_arg(args, lambda inner: inner.meta["val"])
        return insert(node.target, args, node.kwargs, self.fakes.computed(node, vals))

    def _shared(self, node: fx.Node) -> fx.Node:
        """What is computed of the graph's inputs alone, and needed by many calls: once, behind the inputs."""
        if node not in self.shared:
            made = [self.edits.graph.find_nodes(op="placeholder")[-1], *self.shared.values()]

            def insert(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], val: Any) -> fx.Node:
                made.append(self.edits.insert_after(max(made), target, args, {"val": val}, kwargs))
                return made[-1]

            args = fx.map_arg(node.args, lambda inner: self._input(inner, insert))
            vals = fx.map_arg(args, lambda inner: inner.meta["val"])
            self.shared[node] = insert(node.target, args, node.kwargs, self.fakes.computed(node, vals))
        return self.shared[node]


def _read_result(site: RaisedSite, edits: Edits) -> None:
    """Let those who read what an all-reduce in place wrote by the tensor's name read its result instead: the fused call
    reads that tensor as it was, and writes another."""
    x = site.inputs.get("x") if site.prologue is None else site.prologue.x
    if x is None or x not in held(site):
        return
    edits.replace(x, site.node, among=lambda user: site.node < user)


def _erase(site: RaisedSite, edits: Edits) -> None:
    """Erase a site's nodes, and what only they read, from the last to the first."""
    feeding: list[fx.Node] = []
    for node in reversed(site.nodes):
        if not node.users:
            feeding += node.all_input_nodes
            edits.erase(node)
    while feeding:
        node = feeding.pop()
        if not is_erased(node) and not node.users and is_pure(node):
            feeding += node.all_input_nodes
            edits.erase(node)
