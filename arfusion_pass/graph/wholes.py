"""Questions of whole graphs: what one is for, and which others it runs."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator


def trains(graph: fx.Graph) -> bool:
    """Whether a graph is half of a training step: AOT autograd names its inputs so."""
    return any(node.name.startswith(("primals_", "tangents_")) for node in graph.find_nodes(op="placeholder"))


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
