"""What a graph without an all-reduce has in its place: sequence parallelism's reduce-scatter, an all-to-all, ...

%scattered = _c10d_functional.reduce_scatter_tensor.default(%x, "sum", 2, "0")
"""

from __future__ import annotations

import re

from torch import fx

from arfusion_pass.graph import describe

_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem")


def other_collectives(graph: fx.Graph) -> str | None:
    """One sentence on the collectives of a graph that has no all-reduce; None where it has none at all."""
    found = [node for node in graph.nodes if _is_collective(node)]
    if not found:
        return None
    listed = ", ".join(dict.fromkeys(str(node.target) for node in found))
    return f"no all-reduce: its collectives are {listed} (first {describe(found[0])}), and only all-reduces are fused"


def _is_collective(node: fx.Node) -> bool:
    namespace, _, op = getattr(getattr(node.target, "_schema", None), "name", "").partition("::")
    if node.op != "call_function" or "wait" in op or namespace == "arfusion":
        return False
    return namespace in _NAMESPACES or re.search(r"all_?reduce|reduce_?scatter|all_?gather", op) is not None
