"""What a report says of a site: taken from the graph's nodes before the rewrite, completed by what became of it.

Nothing here may stop a fusion: what cannot be found out is None.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from arfusion_pass.compilation import GraphBreak, known
from arfusion_pass.config import canonical_epsilon
from arfusion_pass.graph import nearest_line, tensor_of
from arfusion_pass.groups import find_group
from arfusion_pass.ops.layouts import token_count
from arfusion_pass.ops.spec import Flags
from arfusion_pass.reporting import traffic
from arfusion_pass.reporting.advice import advise
from arfusion_pass.reporting.sites import MERGED, Site
from arfusion_pass.rewrite.chains import Chain
from arfusion_pass.rewrite.planning import Plan
from arfusion_pass.rewrite.raised import RaisedSite
from arfusion_pass.rewrite.reassociate import Merged, Moves
from arfusion_pass.runtime import agreement, thresholds
from arfusion_pass.source import Source, line_of, module_of


def describe(site: RaisedSite, moves: Moves) -> Site:
    """A site before the rewrite, while its nodes stand."""
    x = tensor_of(site.node if site.reduced is None else site.reduced.x)
    value = None if site.norm is None else site.norm.epsilon
    return Site(
        name=site.node.name,
        group=site.group,
        fused=False,
        nodes=tuple(node.name for node in site.nodes) or (site.node.name,),
        epsilon=canonical_epsilon(value) if isinstance(value, float) else None,
        epsilon_input=value.name if isinstance(value, fx.Node) else None,
        epsilon_source=None if site.norm is None else _epsilon_source(site.norm.epsilon_at),
        dtype=None if x is None else str(x.dtype).removeprefix("torch."),
        quantiser=None if site.quant is None else site.quant.op,
        dialect="+".join(dict.fromkeys(site.dialects)),
        note=site.note,
        moved=tuple(moves.steps.get(site.node, ())),
        module=known(lambda: module_of(site.node)),
        source=_source(site.node),
        shape=() if x is None else tuple(size if isinstance(size, int) else str(size) for size in x.shape),
        tokens=None if x is None or x.dim() == 0 else traffic.hint(token_count(x.shape)),
        bytes_unfused=None if site.reason is not None else known(lambda: traffic.unfused(site.nodes)),
    )


def merged(gone: Merged, into: Site, failed: str | None) -> Site:
    """An all-reduce that went into another one's; or would have, and ``failed`` says why that was taken back."""
    site = Site(gone.name, gone.group, True, pattern=MERGED, dtype=gone.dtype, nodes=(gone.name,))
    if failed is not None:
        return dataclasses.replace(site, fused=False, pattern=None, reason=failed)
    note = f"reduced together with {into.name}: FusionConfig(reassociate=True) sums their inputs"
    return dataclasses.replace(site, note=note)


def finish(text: Site, plan: Plan, call: fx.Node, chains: list[Chain]) -> Site:
    """A site that was fused: ``call`` is what was written for it, ``chains`` are those of its graph."""
    number, chain = next(((i, chain) for i, chain in enumerate(chains, 1) if call in chain), (None, None))
    return dataclasses.replace(
        text,
        fused=True,
        pattern=plan.call.meta["pattern"],
        call=call.name,
        outputs=tuple(plan.buffers),
        chain=number,
        chain_length=None if chain is None else len(chain),
        bytes_fused=known(lambda: traffic.fused(call, plan.buffers)),
        strategy=known(lambda: strategy(text, plan.site, call.kwargs.get("flags"))),
    )


def strategy(text: Site, site: RaisedSite, flags: Any) -> str | None:
    """What the kernels take for a fused site (:attr:`Site.strategy`); None where they do not run it."""
    x = None if site.reduced is None else tensor_of(site.reduced.x)
    group = find_group(text.group)
    runs_elsewhere = site.scatters or flags & (Flags.REFERENCE | Flags.FLASHINFER)
    if x is None or group is None or x.device.type != "cuda" or runs_elsewhere:
        return None
    if not 2 <= group.size() <= agreement.MAX_WORLD:
        return None
    arch = thresholds.arch_name(torch.cuda.get_device_capability(x.device))
    rows = thresholds.load().strategies(arch, group.size(), int(x.shape[-1]), x.dtype.itemsize, flags)
    tokens = token_count(x.shape)
    if isinstance(tokens, int):
        return [name for start, name in rows if start <= max(tokens, 1)][-1]
    ends = [f" to {start - 1} tokens" for start, _ in rows[1:]] + [" beyond" if len(rows) > 1 else ""]
    return ", ".join(name + end for (_, name), end in zip(rows, ends, strict=True))


def missed(site: RaisedSite, text: Site, note: str | None, broken: GraphBreak | None) -> Site:
    """A site that was left alone; ``note`` says why where the site itself does not, ``broken`` where its graph ends."""
    reason, culprit = site.reason or note, site.culprit
    return dataclasses.replace(
        text,
        moved=(),
        reason=reason,
        obstacle=_source(culprit),
        advice=known(lambda: advise(site.node, culprit, reason or "", broken)),
        bytes_unfused=None,
    )


def rank() -> int | None:
    """This process's rank in the default group; None where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else None


def _epsilon_source(node: fx.Node | None) -> Source | None:
    """The line of an add that a compiler may have written anew (``dynamic=True`` does): then of what reads it."""
    return _source(node) or (None if node is None else known(lambda: nearest_line(node)))


def _source(node: fx.Node | None) -> Source | None:
    return known(lambda: line_of(node))
