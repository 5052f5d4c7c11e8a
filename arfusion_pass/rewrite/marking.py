"""The marks of a graph's fused calls: what became of each all-reduce, in graph order, for each group."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from arfusion_pass.graph import tensor_of
from arfusion_pass.ops import marks
from arfusion_pass.ops.marks import Step
from arfusion_pass.ops.schema import OUTPUT_NAMES
from arfusion_pass.ops.spec import SHARDED_FLAGS, Flags
from arfusion_pass.rewrite.planning import Plan
from arfusion_pass.rewrite.raised import RaisedSite

_PROTOCOL = int(Flags.ONESHOT | Flags.TWOSHOT | Flags.SHARDED | Flags.REFERENCE | Flags.FLASHINFER | SHARDED_FLAGS)
"""The flags that say how ranks exchange: all have to have the same."""


def stamp(sites: list[RaisedSite], written: list[tuple[Plan, fx.Node]]) -> None:
    """Write each fused call's mark into its flags, and tell the runtime what the marks stand for.

    Args:
        sites: all of the graph, in its order, with the reasons of those that were missed.
        written: the fused calls, in the graph, with the flags that they will have.
    """
    calls = {id(plan.site): call for plan, call in written}
    steps: dict[str, list[Step]] = {}
    for site in sites:
        if site.scatters and id(site) not in calls:
            continue  # tokens that ranks share unevenly give them other graphs there, which nothing of ours runs
        steps.setdefault(site.group, []).append(_step(site, calls.get(id(site))))
    taken = {group: marks.mark_of(those) for group, those in steps.items()}
    for plan, call in written:
        call.update_kwarg("flags", _flags(call) | taken[plan.site.group] << marks.MARK_SHIFT)
    for group, those in steps.items():
        marks.remember(group, taken[group] if any(step.fused for step in those) else 0, those)


def _step(site: RaisedSite, call: fx.Node | None) -> Step:
    if call is None:
        return Step(False, "", f"{site.node.name}: {site.reason}")
    value = None if site.reduced is None else tensor_of(site.reduced.x)
    if value is None:
        return Step(True, "", site.node.name)
    width = value.shape[-1] if isinstance(value.shape[-1], int) else "*"
    flags = _flags(call)
    message = f"{_name(value.dtype)} [..., {width}] flags {flags & _PROTOCOL:#x}"
    if site.scatters:
        message += _sent(call, ("norm_out", "quant_out", "scale_out"))
    elif flags & SHARDED_FLAGS:
        message += _sent(call, OUTPUT_NAMES)
    return Step(True, message, site.node.name)


def _sent(call: fx.Node, roles: Iterable[str]) -> str:
    """What the owner of a row sends of it: all that the call writes of other ranks' rows."""
    written = [
        f"{role} {_name(value.dtype)}" for role in roles if (value := tensor_of(call.kwargs.get(role))) is not None
    ]
    return f" writing {', '.join(written)} quantised by {call.kwargs['quant']:#x}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _flags(call: fx.Node) -> int:
    flags = call.kwargs["flags"]
    assert isinstance(flags, int)
    return flags
