"""Plan: from a graph's sites to the calls that could be written for them; the graph is only read.

Every site is planned before anything is written: where its call can stand (after its latest input and its all-reduce,
before the first reader of anything it writes), that no mutation comes between, and what shape each buffer has. A site
that fails its plan keeps its nodes and gets a reason.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from arfusion_pass.config import FusionConfig
from arfusion_pass.graph import (
    describe,
    is_pure,
    is_returned,
    mutated_arguments,
    owners,
    says_nothing,
    tensor_of,
    viewed,
)
from arfusion_pass.ops.checks import FusedCall, check_call
from arfusion_pass.ops.schema import OUTPUT_NAMES
from arfusion_pass.rewrite.buffers import Buffer, SizeSource, plan_buffer
from arfusion_pass.rewrite.pass_manager import fuse_shadow
from arfusion_pass.rewrite.raised import RaisedSite
from arfusion_pass.rewrite.shadow import Shadow, build_shadow


@dataclasses.dataclass
class Plan:
    """How one fused call enters the user's graph.

    Attributes:
        site: the site.
        call: its ``auto_functionalized`` node in the shadow graph.
        anchor: the node of the user's graph that the new nodes come after.
        position: the anchor's.
        moved: pure nodes (a weight's or a scale's computation) that must come before the call and stand later.
        buffers: role to the buffer that is allocated for it, in schema order.
    """

    site: RaisedSite
    call: fx.Node
    anchor: fx.Node
    position: int
    moved: list[fx.Node]
    buffers: dict[str, Buffer]


def planned(graph: fx.Graph, sites: list[RaisedSite], config: FusionConfig) -> list[Plan]:
    """The calls for ``sites`` of ``graph``, in an order in which each one's inputs exist; a site that gets none has a
    reason then."""
    if all(site.reason is not None for site in sites):
        return []
    shadow = build_shadow(sites)
    calls = fuse_shadow(shadow, config)
    matched = {call.meta["site"] for call in calls}
    for index, site in enumerate(sites):
        if site.reason is None and index not in matched:
            site.reason = "no registered pattern matches what was recognised behind it"
    return _Planner(graph, shadow, calls).plan()


class _Planner:
    """Plans the fused calls of one graph."""

    def __init__(self, graph: fx.Graph, shadow: Shadow, calls: list[fx.Node]) -> None:
        self.calls = {call.meta["site"]: call for call in calls}
        self.sites = shadow.sites
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self.order = list(graph.nodes)
        self.mutations = [
            (index, node, written, owners(written))
            for index, node in enumerate(self.order)
            for written in mutated_arguments(node)
        ]
        placeholders = [node for node in self.order if node.op == "placeholder"]
        self.last_placeholder = placeholders[-1] if placeholders else None
        self.sizes = SizeSource(self.order)
        self.plans: dict[int, Plan] = {}
        self.writer: dict[fx.Node, int] = {}
        self.earlier: dict[fx.Node, int] = {}  # of what one site writes and another reduces in place
        for index in sorted(self.calls):
            for value in held(self.sites[index]):
                if value in self.writer:
                    self.earlier[value] = self.writer[value]
                self.writer[value] = index
        self.planning: list[int] = []
        self.fakes = Fakes(graph)

    def plan(self) -> list[Plan]:
        """Plan every site; those that cannot be written get a reason."""
        for index in self.calls:
            self._plan(index)
        return list(self.plans.values())

    def _plan(self, index: int) -> None:
        if index in self.plans or self.sites[index].reason is not None:
            return
        site = self.sites[index]
        if index in self.planning:
            site.reason = "it and another site would each need the other's result first"
            return
        self.planning.append(index)
        try:
            self._plan_after_inputs(index, site)
        finally:
            self.planning.pop()

    def _plan_after_inputs(self, index: int, site: RaisedSite) -> None:
        call = self.calls[index]
        inputs = list(dict.fromkeys(origin for origin in origins(call)))
        for node in inputs:
            writers = (self.writer.get(node), self.earlier.get(node))
            writer = next((each for each in writers if each not in (None, index)), None)
            if writer is not None:
                self._plan(writer)
        if site.reason is not None:
            return
        own = {*site.nodes, *held(site)}
        others = [node for role, node in site.inputs.items() if role != "x"]
        circular = next((node for node in others if node in own), None)
        if circular is not None:
            site.reason = f"{describe(circular)} is both an input and a result of the fused call"
            return
        # What another site would replace counts as a reader, too: that site may yet be refused.
        readers = [user for users in site.outside_readers.values() for user in users]
        first = min((self.position[user] for user in readers), default=len(self.order))
        anchor = max([self._defined(node) for node in inputs] + [self.position[site.node]])
        moved: list[fx.Node] = []
        if anchor >= first:
            moved_and_anchor = self._hoist(others, site, own, first)
            if site.reason is not None:
                return
            if moved_and_anchor is None:
                late = max(inputs, key=self._defined)
                early = self.order[first]
                site.reason = (
                    f"{describe(early)} reads a value of the norm before {describe(late)}, an input of the fused "
                    "call, is computed"
                )
                return
            moved, anchor = moved_and_anchor
        if self.last_placeholder is not None:
            anchor = max(anchor, self.position[self.last_placeholder])
        site.reason = _returned_twice(site) or self._mutation(site, inputs, moved, anchor)
        if site.reason is not None:
            return
        buffers: dict[str, Buffer] = {}
        for role in OUTPUT_NAMES:
            if call.kwargs[role] is not None:
                buffer = plan_buffer(role, site, self.sizes, self.position, anchor, inputs)
                if isinstance(buffer, str):
                    site.reason = buffer
                    return
                buffers[role] = buffer
        site.reason = self._refused(call, buffers)
        if site.reason is not None:
            return
        self.position.update(dict.fromkeys(moved, anchor))
        self.plans[index] = Plan(site, call, self.order[anchor], anchor, moved, buffers)

    def _defined(self, node: fx.Node) -> int:
        """Where a value exists: a value of a planned site where its call will stand."""
        writer = self.writer.get(node)
        if writer is not None and writer in self.plans:
            return max(self.position[node], self.plans[writer].position)
        return self.position[node]

    def _hoist(
        self, inputs: Iterable[fx.Node], site: RaisedSite, own: set[fx.Node], first: int
    ) -> tuple[list[fx.Node], int] | None:
        """The pure nodes to move up so that every input stands before position ``first``, and the anchor then."""
        moved: set[fx.Node] = set()
        anchor = self.position[site.node]
        stack = list(inputs)
        while stack:
            node = stack.pop()
            if node in own:
                site.reason = (
                    f"an input of the fused call is computed from {describe(node)}, which the call itself would produce"
                )
                return None
            if node in self.writer:
                self._plan(self.writer[node])
            if self._defined(node) < first:
                anchor = max(anchor, self._defined(node))
            elif node in self.writer or not is_pure(node):
                return None
            elif node not in moved:
                moved.add(node)
                stack.extend(node.all_input_nodes)
        return (sorted(moved), anchor) if anchor < first else None

    def _mutation(self, site: RaisedSite, inputs: list[fx.Node], moved: list[fx.Node], anchor: int) -> str | None:
        """A reason if memory that the site reads or writes is written between its first and its last node.

        The call reads each input in its own place. The graph reads it where the site does, or earlier: in a cast, a
        view or a ``weight + 1`` in front of it that was looked through, or later, in what is moved up.
        """
        if not self.mutations:
            return None
        nodes = site.nodes
        since: dict[fx.Node, int] = {}
        for node in (*nodes, *_looked_through(nodes, inputs), *moved):
            begin = min(self.position[node], anchor)
            for owner in owners(node).union(*map(owners, node.all_input_nodes)):
                since[owner] = min(since.get(owner, begin), begin)
        own = set(nodes)
        shared = set[fx.Node]().union(*map(_in_one_memory, site.holders.values()))
        end = max(self.position[nodes[-1]], anchor)
        begin = 0 if shared else bisect.bisect_left(self.mutations, min(since.values()), key=operator.itemgetter(0))
        for at, node, written, memory in itertools.islice(self.mutations, begin, None):
            if at > end and not shared:
                break  # a graph's caches may be written at its end, as many times as it has layers
            if node in own:
                continue  # an all-reduce in place
            if any(since.get(owner, end + 1) <= at <= end for owner in memory):
                writes = "may write" if says_nothing(node) else "writes"
                return (
                    f"{describe(node)} {writes} to {describe(written)} between the reduction and the end of "
                    "what would be fused, or what is read for it in front"
                )
            if not shared.isdisjoint(memory):
                return f"{describe(node)} writes to {describe(written)}, whose memory would become another value's too"
        return None

    def _refused(self, call: fx.Node, buffers: dict[str, Buffer]) -> str | None:
        """The reason for which the fused op would refuse a call, by its own check on the values that the graph
        promises."""
        op: torch._ops.OpOverload = call.args[0]  # type: ignore[assignment]
        try:
            inputs = {name: value for name, value in call.kwargs.items() if name not in OUTPUT_NAMES}
            arguments = {name: self.fakes.of(value) for name, value in inputs.items()} | dict.fromkeys(OUTPUT_NAMES)
        except RuntimeError:  # a view of symbolic sizes that cannot be worked out here: the op checks it later
            return None
        arguments.update((role, buffer.like) for role, buffer in buffers.items())
        try:
            check_call(FusedCall.bind(op._opname, arguments), eager=False, certain=True)
        except ValueError as error:
            return f"the fused op refuses the call: {error}"
        return None


class Fakes:
    """What a shadow graph's nodes are on the fake values of the user's graph."""

    def __init__(self, graph: fx.Graph) -> None:
        fakes = (tensor for node in graph.nodes if isinstance(tensor := tensor_of(node), FakeTensor))
        self.mode = next((fake.fake_mode for fake in fakes), None)

    def of(self, argument: Any) -> Any:
        """The fake value of an input of a shadow graph's call; what is no node as it is."""
        if not isinstance(argument, fx.Node):
            return argument
        if "origin" in argument.meta:
            return argument.meta["origin"].meta["val"]
        return self.computed(argument, fx.map_arg(argument.args, self.of))

    def computed(self, node: fx.Node, args: tuple[Any, ...]) -> Any:
        """The fake value of a shadow graph's node on fake values; what it makes of numbers alone is fake as well."""
        with self.mode or contextlib.nullcontext():
            return node.target(*map(self._as_fake, args), **node.kwargs)  # type: ignore[operator]

    def _as_fake(self, value: Any) -> Any:
        """A value as one of the graph's fakes: a constant's may be the tensor itself."""
        if self.mode is None or not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        return self.mode.from_tensor(value, static_shapes=True)


def held(site: RaisedSite) -> set[fx.Node]:
    """Every node that holds a value which the fused call of a site could write."""
    return {node for nodes in site.holders.values() for node in nodes}


def origins(call: fx.Node) -> list[fx.Node]:
    """The nodes of the user's graph that a fused call of the shadow graph takes, through what it computes of them."""
    return [
        origin
        for node in call.all_input_nodes
        for origin in ([node.meta["origin"]] if "origin" in node.meta else origins(node))
    ]


def _returned_twice(site: RaisedSite) -> str | None:
    """A reason if two tensors that hold one value, each in memory of its own, leave the graph: whoever gets them may
    write to one."""
    for held in site.holders.values():
        held = _no_views(held)
        returned = {frozenset(owners(node)): node for node in held if len(held) > 1 and is_returned(node)}
        if len(returned) > 1:
            first, second, *_ = sorted(returned.values())
            return (
                f"{describe(first)} and {describe(second)} leave the graph, and the fused op writes one tensor for both"
            )
    return None


def _in_one_memory(holders: Sequence[fx.Node]) -> set[fx.Node]:
    """The owners of the memory of nodes that hold one value, where each has its own, as twins and casts do, and will
    have one; none where they are views of one."""
    memories = {frozenset(owners(node)) for node in _no_views(holders)}
    return set[fx.Node]().union(*memories) if len(memories) > 1 else set()


def _no_views(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Those of ``nodes`` that are no views of others among them, as all waits for one value but the first are."""
    among = set(nodes)
    return tuple(node for node in nodes if among.isdisjoint(viewed(node)))


def _looked_through(nodes: Iterable[fx.Node], inputs: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes between a fused call's inputs and the site's own ``nodes``."""
    behind, own, given = set[fx.Node](), set(nodes), set(inputs)
    stack = [node for each in own for node in each.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in own and node not in given and node not in behind:
            behind.add(node)
            stack += node.all_input_nodes
    found = set[fx.Node]()
    stack = list(given)
    while stack:
        reached = [user for user in stack.pop().users if user in behind and user not in found]
        found.update(reached)
        stack += reached
    return found
