"""Look at what the pass did: the report as a table, graph diffs, dumps, and replays of every fused site.

Public names are imported when they are first used, so that the pass itself does not pay for them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Imported here, because a submodule that is imported later would take the function's name.
from arfusion_pass.inspection.graph_diff import graph_diff as graph_diff
from arfusion_pass.inspection.graph_diff import print_graph as print_graph

if TYPE_CHECKING:
    from arfusion_pass.inspection.dump import debug_dump as debug_dump
    from arfusion_pass.inspection.html import diff_page as diff_page
    from arfusion_pass.inspection.replay import recording as recording
    from arfusion_pass.reporting.tables import report_table as report_table

_HOMES = {
    "debug_dump": "arfusion_pass.inspection.dump",
    "diff_page": "arfusion_pass.inspection.html",
    "recording": "arfusion_pass.inspection.replay",
    "report_table": "arfusion_pass.reporting.tables",
}

__all__ = ["debug_dump", "diff_page", "graph_diff", "print_graph", "recording", "report_table"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'arfusion_pass.inspection' has no attribute {name!r}")
