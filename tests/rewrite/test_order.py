"""A pass in front of ours may leave nodes in front of what they read; Inductor puts them in order behind us."""

from __future__ import annotations

import pytest
from torch import fx

import arfusion_pass as arf
from arfusion_pass.graph import put_in_order
from arfusion_pass.inspection import print_graph
from arfusion_pass.testing import assert_fused
from tests.models import Tensor, llama, reduce
from tests.simulate import STRICT, aten, check_same, tensors, trace

HIDDEN = 32
SHAPES = (4, HIDDEN), (4, HIDDEN), (HIDDEN,)

pytestmark = pytest.mark.usefixtures("world")


def layer(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """A site whose weight is computed, and a norm of something else whose weight is computed as well."""
    return llama(reduce(x) + r, w * 0.5, 1e-6), llama(x, w * 0.25, 1e-6)


def disordered() -> fx.GraphModule:
    """:func:`layer` as vLLM's ``AddRMSNormFusionPass`` leaves such norms: in front of their weights' computations."""
    module = trace(layer, *tensors(*SHAPES))
    for node in module.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        if node.args[1] in (0.5, 0.25):
            module.graph.output_node().prepend(node)
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        module.graph.lint()
    return module


def test_a_graph_out_of_order_fuses() -> None:
    """It is read in the order in which it will run, printed so, and in order afterwards, fused or not."""
    module, wanted = disordered(), trace(layer, *tensors(*SHAPES))
    assert_fused(arf.fuse(module, STRICT), 1)
    module.graph.lint()
    check_same(wanted, module)


def test_a_graph_in_order_stays_as_it_is() -> None:
    graph = trace(layer, *tensors(*SHAPES)).graph
    nodes, before = list(graph.nodes), print_graph(graph)
    put_in_order(graph)
    assert all(a is b for a, b in zip(nodes, graph.nodes, strict=True))
    assert print_graph(graph) == before
