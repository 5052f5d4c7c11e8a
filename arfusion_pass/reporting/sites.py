"""What the pass did to an all-reduce, or reduce-scatter, of a graph: a :class:`Site`, fused or missed with a reason."""

from __future__ import annotations

import dataclasses
from typing import Any

from arfusion_pass.source import Source

MERGED = "MergedAllReduce"
"""The pattern of an all-reduce whose input is summed with another one's, and reduced there."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One all-reduce of a graph, or one reduce-scatter with a norm behind it.

    Attributes:
        name: the all-reduce's node name in the user's graph.
        group: the process group's name, as the graph spells it.
        fused: whether it was replaced.
        pattern: the pattern class that fused it, or None.
        reason: one sentence that says why it was not fused and, where there is one, what to change; None if fused.
        nodes: names of the nodes that the fused call replaces (if missed: that were recognised), in graph order.
        call: name of the fused call's node; None if missed.
        outputs: which of allreduce_out, residual_out, norm_out, quant_out, scale_out the fused call produces.
        epsilon: of the norm, canonical (a float32's value), or None.
        epsilon_input: where epsilon is no number, the name of the node whose value it is (a buffer, or the graph input
            that ``torch.compile(dynamic=True)`` makes of a Python float), read when the call runs; else None.
        epsilon_source: the user's line that adds epsilon, or that calls the norm's op with it; None where nobody
            recorded it, or where nothing is added.
        dtype: of the reduced tensor, such as ``"bfloat16"``, or None where it is unknown.
        quantiser: the canonical quantiser op's name, or None.
        dialect: which dialects spelled the stages, such as ``"functional_collectives+aten"``.
        moved: the linear steps that ``FusionConfig(reassociate=True)`` moved for it, and where to.
        note: what stood in the way of the quantiser behind a fused norm, one sentence; None where there is nothing
            to say. Of an all-reduce that went into another one's (``pattern`` is ``MERGED`` then), which that is.
        chain: the number, from 1 in each graph, of the chain of sites that the site belongs to: nobody but the next of
            them reads their residual, which may be sharded inside; None where it belongs to none.
        chain_length: how many sites that chain has, or None.
        module: path of the module that the all-reduce was traced in (``"layers.0.mlp.down_proj"``), or None.
        source: the user's line that the all-reduce comes from, or None where nobody recorded it.
        obstacle: if missed, the user's line of what stands in the way, or None.
        advice: what the user can change to have it fused, one sentence, or None.
        shape: of the reduced tensor; a symbolic size is its name. Empty where it is unknown.
        tokens: how many rows it had when it was traced; None where that is unknown.
        strategy: how the kernels exchange a fused site's rows, by the table in force when the graph was compiled:
            ``"oneshot"``, ``"twoshot"`` or ``"sharded"``; of symbolic rows by their number, ``"oneshot to 128 tokens,
            twoshot beyond"``. None where something else runs the call: on a CPU, in a group that the kernels do not
            take, on another back-end.
        bytes_unfused, bytes_fused: memory traffic of one rank at ``tokens``, before and after
            (:mod:`arfusion_pass.reporting.traffic` has the formula); None where it is unknown.
    """

    name: str
    group: str
    fused: bool
    pattern: str | None = None
    reason: str | None = None
    nodes: tuple[str, ...] = ()
    call: str | None = None
    outputs: tuple[str, ...] = ()
    epsilon: float | None = None
    dtype: str | None = None
    quantiser: str | None = None
    dialect: str = ""
    moved: tuple[str, ...] = ()
    note: str | None = None
    chain: int | None = None
    chain_length: int | None = None
    module: str | None = None
    source: Source | None = None
    obstacle: Source | None = None
    advice: str | None = None
    shape: tuple[int | str, ...] = ()
    tokens: int | None = None
    strategy: str | None = None
    bytes_unfused: int | None = None
    bytes_fused: int | None = None
    epsilon_source: Source | None = None
    epsilon_input: str | None = None

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Site:
        """The site whose ``dataclasses.asdict`` went through JSON; keys of another version are ignored."""
        known = {field.name for field in dataclasses.fields(Site)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items() if name in known
        }
        for name in ("source", "obstacle", "epsilon_source"):
            if isinstance(values.get(name), dict):
                values[name] = Source(**values[name])
        return Site(**values)
