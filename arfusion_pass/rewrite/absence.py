"""Why a graph with nothing to fuse has no all-reduce: another collective in its place, or Dynamo's graph breaks at one.

y = dist.all_reduce(x, async_op=True)       # breaks the graph: neither part holds the all-reduce
"""

from __future__ import annotations

import re

from torch import fx
from torch._dynamo.utils import counters

from arfusion_pass.graph import aten, describe, is_call

_COLLECTIVE = re.compile(
    r"collective|all_?reduce|reduce_?scatter|all_?gather|process_?group|c10d|async_op", re.IGNORECASE
)
_ROOTS = (aten.rsqrt.default, aten._fused_rms_norm.default, aten.rms_norm.default)
_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem")


def why_no_all_reduce(graph: fx.Graph) -> str | None:
    """One sentence for a graph without an all-reduce; None where nothing in it or around it has to do with one."""
    others = [node for node in graph.nodes if _is_collective(node)]
    if others:
        listed = ", ".join(dict.fromkeys(str(node.target) for node in others))
        return f"no all-reduce: its collectives are {listed} (first {describe(others[0])}); only all-reduces are fused"
    if not any(is_call(node, *_ROOTS) or "rms_norm" in str(node.target) for node in graph.nodes):
        return None
    breaks = [_short(reason) for reason in counters["graph_break"] if _COLLECTIVE.search(reason)]
    if breaks:
        return (
            "no all-reduce in this graph, which has a norm: Dynamo broke the graph at a collective: "
            + "; ".join(breaks[:3])
            + ". torch.compile(fullgraph=True) shows where; an all-reduce that is not asynchronous stays in the graph"
        )
    return None


def _is_collective(node: fx.Node) -> bool:
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    namespace, _, op = name.partition("::")
    if node.op != "call_function" or "wait" in op or namespace == "arfusion":
        return False
    return namespace in _NAMESPACES or re.search(r"all_?reduce|reduce_?scatter|all_?gather", op) is not None


def _short(reason: str) -> str:
    """Dynamo's reason without its hints: what broke the graph, and the explanation's line."""
    head, _, rest = reason.partition("\n")
    explanation = re.search(r"Explanation: (.*)", rest)
    text = head if explanation is None else f"{head} ({explanation.group(1)})"
    return re.sub(r" at 0x[0-9a-f]+", "", text)[:240]
