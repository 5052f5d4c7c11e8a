"""Plan: from a graph's sites to the calls that could be written for them; the graph is only read."""

from __future__ import annotations

from torch import fx

from arfusion_pass.config import FusionConfig
from arfusion_pass.rewrite.commit import Committer
from arfusion_pass.rewrite.pass_manager import FusionPassManager
from arfusion_pass.rewrite.raised import RaisedSite
from arfusion_pass.rewrite.shadow import build_shadow


def planned(graph: fx.Graph, sites: list[RaisedSite], config: FusionConfig) -> Committer:
    """The calls for ``sites`` of ``graph``, planned; a site that gets none has a reason then."""
    shadow = build_shadow(sites)
    calls = FusionPassManager(config).apply(shadow)
    matched = {call.meta["site"] for call in calls}
    for index, site in enumerate(sites):
        if site.reason is None and index not in matched:
            site.reason = "no registered pattern matches what was recognised behind it"
    committer = Committer(graph, shadow, calls)
    committer.plan()
    return committer
