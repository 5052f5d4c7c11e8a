"""A site: one all-reduce, or reduce-scatter, and what was recognised around it."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from arfusion_pass.dialects import Norm, Prologue, Quantised, Reduced
from arfusion_pass.graph import (
    describe,
    is_cast,
    last_dim,
    source_of,
    tensor_of,
)
from arfusion_pass.rewrite.gathering import Gathering
from arfusion_pass.rewrite.hindrances import (
    Hindrance,
)


@dataclasses.dataclass
class RaisedSite:
    """One all-reduce, or reduce-scatter, with what was recognised behind it.

    Attributes:
        reduced: the collective; None where it was refused at once.
        node: the node that names the site.
        prologue, norm, quant: the stages, or None.
        scatters: whether it is a reduce-scatter's.
        gathered: what gathers the norm's rows behind a reduce-scatter; None for an all-reduce.
        twins: quantisers of the same norm that compute what ``quant`` does: its outputs serve their readers too.
        note: why a quantiser behind the norm is left alone, or None.
        reason: why nothing can be fused, or None so far.
        culprit: the node that the reason speaks of, whose line of code the report shows; None where there is none.
        hindrance: the step that could be taken before the all-reduce (:mod:`arfusion_pass.rewrite.reassociate`), or
            None. A sum of two all-reduces that a norm reads hinders one of them alone.
        dialects: the names of the dialects that spelled the stages.
        values: role (``allreduce_out``, ``residual_out``, ``norm_out``, ``quant_out``, ``scale_out``) to the node of
            the user's graph that holds it.
        inputs: role (``x`` or the prologue's argument names, ``residual``, ``addend``, ``factor``, ``weight``,
            ``epsilon_tensor``, ``scale``) to the node of the user's graph.
    """

    node: fx.Node
    group: str = ""
    reduced: Reduced | None = None
    prologue: Prologue | None = None
    norm: Norm | None = None
    gathered: Gathering | None = None
    quant: Quantised | None = None
    twins: tuple[Quantised, ...] = ()
    note: str | None = None
    reason: str | None = None
    culprit: fx.Node | None = None
    hindrance: Hindrance | None = None
    dialects: tuple[str, ...] = ()
    scatters: bool = False

    @property
    def norms(self) -> tuple[fx.Node, ...]:
        """The nodes that hold the norm of all rows."""
        if self.gathered is not None:
            return self.gathered.norms
        return () if self.norm is None or self.norm.norm is None else (self.norm.norm,)

    @property
    def rows(self) -> torch.Tensor:
        """A tensor of the shape ``[..., H]`` that a norm of all rows has."""
        tensor = tensor_of(self.norms[0] if self.norms else self.reduced.x)  # type: ignore[union-attr]
        assert tensor is not None
        return tensor

    @property
    def holders(self) -> dict[str, tuple[fx.Node, ...]]:
        """Role to every node of the user's graph that holds the value: several where quantisers are twins."""
        holders: dict[str, tuple[fx.Node | None, ...]] = {}
        if self.reduced is not None:
            holders["allreduce_out"] = self.reduced.values
        if self.norm is not None:
            holders["residual_out"] = (self.norm.total,)
            holders["norm_out"] = self.norms
        if self.quant is not None:
            quantisers = (self.quant, *self.twins)
            holders["quant_out"] = tuple(quant.codes for quant in quantisers)
            holders["scale_out"] = tuple(quant.scales for quant in quantisers)
        held = {role: tuple(node for node in nodes if node is not None) for role, nodes in holders.items()}
        return {role: tuple(dict.fromkeys(nodes)) for role, nodes in held.items() if nodes}

    @property
    def values(self) -> dict[str, fx.Node]:
        return {role: nodes[0] for role, nodes in self.holders.items()}

    @property
    def inputs(self) -> dict[str, fx.Node]:
        inputs: dict[str, fx.Node | None] = {}
        if self.prologue is not None:
            inputs.update(self.prologue.inputs)
        elif self.reduced is not None:
            inputs["x"] = self.reduced.x
        if self.gathered is not None and isinstance(self.gathered.rows.block, fx.Node):
            inputs["block"] = self.gathered.rows.block
        if self.norm is not None:
            inputs["residual"] = self.norm.residual
            inputs["addend"] = self.norm.addend
            if isinstance(self.norm.factor, fx.Node):
                inputs["factor"] = self.norm.factor
            inputs["weight"] = self.norm.weight
            if isinstance(self.norm.epsilon, fx.Node):
                inputs["epsilon_tensor"] = self.norm.epsilon
        if self.quant is not None:
            inputs["scale"] = self.quant.scale
        return {role: node for role, node in inputs.items() if node is not None}

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Every node that the fused call would stand for, in graph order."""
        stages = (self.prologue, self.reduced, self.norm, self.gathered, self.quant, *self.twins)
        return tuple(sorted({node for stage in stages if stage is not None for node in stage.nodes}))

    @property
    def replaced(self) -> set[fx.Node]:
        """The nodes that go: all of them, but for a cast or view that somebody outside reads. That one stays and
        reads the value that the kernel writes."""
        nodes = self.nodes
        gone, values = set(nodes), {node for held in self.holders.values() for node in held}
        for node in reversed(nodes):
            read = node not in values and any(user not in gone for user in node.users)
            if read and (is_cast(node) or source_of(node) is not None):
                gone.discard(node)
        return gone

    @property
    def outside_readers(self) -> dict[str, list[fx.Node]]:
        """Role of a value to the nodes outside the site that read it, in graph order."""
        gone = self.replaced
        return {
            role: sorted({user for node in nodes for user in node.users if user not in gone})
            for role, nodes in self.holders.items()
        }


def read_inside(nodes: tuple[fx.Node, ...], values: set[fx.Node | None], what: str) -> str | None:
    """A reason if a value inside a match, which the fused kernel does not produce, is read outside of it."""
    inside = set(nodes)
    for node in nodes:
        if node in values or is_cast(node) or source_of(node) is not None:
            continue  # produced by the kernel, or computed from what it produces
        for user in node.users:
            if user not in inside:
                kept = user.op == "output" and what == "RMSNorm" and last_dim(node) == 1  # a row's statistic
                training = "; a training graph keeps such values for its backward" if kept else ""
                return f"{describe(node)}, a value inside the {what}, is also read by {describe(user)}{training}"
    return None
