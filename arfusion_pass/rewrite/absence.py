"""What a graph without an all-reduce has in its place: sequence parallelism's reduce-scatter, an all-to-all, or the
graph break at which Dynamo left it.

%scattered = _c10d_functional.reduce_scatter_tensor.default(%x, "sum", 2, "0")
"""

from __future__ import annotations

import re

from torch import fx
from torch._ops import OpOverloadPacket

from arfusion_pass.compilation import breaks_at_collectives, raised_at_collectives
from arfusion_pass.graph import aten, describe, is_call

_ROOTS = (aten.rsqrt.default, aten.sqrt.default, aten._fused_rms_norm.default, aten.rms_norm.default)
MET = (
    "no all-reduce: Dynamo broke the graph at a collective:",
    "no all-reduce; in this process Dynamo left a function to Python at a collective:",
)
"""How the sentences begin on what Dynamo met in this process, which no later process should repeat."""

_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem")


def why_no_all_reduce(graph: fx.Graph) -> str | None:
    """One sentence on the collectives of a graph that has no all-reduce, or on where that of its norm went; None where
    it has neither."""
    found = [node for node in graph.nodes if _is_collective(node)]
    if not found:
        early = next((node for node in graph.nodes if _is_before_autograd(node)), None)
        if early is not None:
            return (
                f"no all-reduce: {describe(early)} is a call as Dynamo traces it; give the pass the graph behind AOT "
                "autograd, as aot_autograd(fw_compiler=...) of torch._dynamo.backends.common and torch.export do"
            )
        norm = any(is_call(node, *_ROOTS) or "rms_norm" in str(node.target) for node in graph.nodes)
        return met_by_dynamo() if norm else None
    eager = [node for node in found if node.target._schema.name == "c10d::allreduce_"]  # type: ignore[union-attr]
    if eager:
        return (
            f"no functional all-reduce: {describe(eager[0])} was traced as it runs eagerly, in place; call "
            "torch.distributed._functional_collectives.all_reduce, or let torch.compile trace the call"
        )
    own = [node for node in found if _is_own_all_reduce(node)]
    if own:
        return (
            f"no all-reduce that the pass knows: {describe(own[0])} is an op of its own; "
            "call torch.distributed._functional_collectives.all_reduce"
        )
    listed = ", ".join(dict.fromkeys(str(node.target) for node in found))
    return f"no all-reduce: its collectives are {listed} (first {describe(found[0])}), and only all-reduces are fused"


def _is_before_autograd(node: fx.Node) -> bool:
    """Whether a node calls a collective without saying which of its overloads."""
    target = node.target
    return isinstance(target, OpOverloadPacket) and target._qualified_op_name.partition("::")[0] in _NAMESPACES


def _is_own_all_reduce(node: fx.Node) -> bool:
    """Whether a collective is somebody's op named like an all-reduce, and not like one that is fused already."""
    name = str(node.target)
    return node.target.namespace not in _NAMESPACES and re.search(r"all_?reduce(?!.*norm)", name) is not None  # type: ignore[union-attr]


def met_by_dynamo() -> str | None:
    """Where the all-reduce of the graph that Dynamo compiles may have gone; None where nothing is known of one."""
    stays = "a blocking call of it, or the functional one, stays in the graph"
    if breaks := breaks_at_collectives():
        return f"{MET[0]} {'; '.join(breaks[:3])}; {stays}"
    if raised := raised_at_collectives():
        return f"{MET[1]} {'; '.join(raised[:3])}"
    return None


def _is_collective(node: fx.Node) -> bool:
    namespace, _, op = getattr(getattr(node.target, "_schema", None), "name", "").partition("::")
    if node.op != "call_function" or "wait" in op or namespace == "arfusion":
        return False
    return namespace in _NAMESPACES or re.search(r"all_?reduce|reduce_?scatter|all_?gather", op) is not None
