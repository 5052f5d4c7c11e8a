"""Questions of whole graphs: what one is for, and which others it runs."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._ops import HigherOrderOperator


def trains(graph: fx.Graph) -> bool:
    """Whether a graph is half of a training step: AOT autograd names its inputs so."""
    return any(node.name.startswith(("primals_", "tangents_")) for node in graph.find_nodes(op="placeholder"))


def put_in_order(graph: fx.Graph) -> None:
    """Let every node stand behind what it reads, as Inductor does once more behind its custom passes: what is read and
    written in between is told by places. A pass in front may have put a replacement in front of its inputs, as vLLM's
    ``AddRMSNormFusionPass`` does with a norm whose weight is computed. A graph in order stays as it is."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if not seen.issuperset(node.all_input_nodes):
            stable_topological_sort(graph)
            return
        seen.add(node)


def parts_of(node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that a node runs: the branches of ``torch.cond``, the region of ``invoke_subgraph``, or the module
    that it calls, such as a piece of a graph that a back-end has split."""
    module = node.graph.owning_module
    if node.op == "call_module" and module is not None:
        called: Any = module.get_submodule(str(node.target))
        return [called] if isinstance(called, fx.GraphModule) else []
    parts = [
        getattr(node.graph.owning_module, str(operand.target), None)
        for operand in node.all_input_nodes
        if isinstance(node.target, HigherOrderOperator) and operand.op == "get_attr"
    ]
    return [part for part in parts if isinstance(part, fx.GraphModule)]
