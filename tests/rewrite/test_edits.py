"""The undo log: whatever was done to a graph, taken back it is node for node what it was; kept, it is what was done."""

from __future__ import annotations

import random
from typing import Any

import pytest
from torch import fx

from arfusion_pass.reporting.printing import print_graph
from arfusion_pass.rewrite.edits import Edits, is_erased
from tests.simulate import aten, tensors, trace


def graph_of_sums() -> fx.Graph:
    return trace(lambda a, b: ((c := a + b) * a, c - b, (c + c).relu()), *tensors((2, 4), (2, 4))).graph


def state(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """All that a graph says of its nodes, the nodes themselves and the order of their readers among it."""
    return [
        (node, node.name, node.op, node.target, node.args, node.kwargs, list(node.users), dict(node.meta))
        for node in graph.nodes
    ]


def edit(edits: Edits, choose: random.Random) -> None:
    """One change of any kind, between two of the nodes that still stand."""
    first, second = sorted(choose.sample([node for node in edits.graph.nodes if not is_erased(node)], 2))
    if first.op != "call_function" or second.op != "call_function":
        return
    kind, meta = choose.randrange(8), {"val": first.meta["val"]}
    if kind == 0:
        edits.insert_before(second, aten.add.Tensor, (first, first), meta)
    elif kind == 1:
        edits.insert_after(second, aten.sub.Tensor, (first, second), meta, {"alpha": 2})
    elif kind == 2:
        edits.replace(first, second, among=lambda user: user > second)
    elif kind == 3 and first in second.all_input_nodes:
        edits.replace_input(second, first, first.all_input_nodes[0])
    elif kind == 4:
        edits.set_inputs(second, (first, first), {})
    elif kind == 5:
        edits.set_value(first, second.meta["val"])
    elif kind == 6:
        edits.move_after(second, first) if first.next is second else edits.move_before(second, first)
    elif not first.users:
        edits.erase(first)


@pytest.mark.parametrize("seed", range(40))
def test_taken_back(seed: int) -> None:
    """Contract *sound*: to a mark, and then to the beginning, node for node."""
    choose, graph = random.Random(seed), graph_of_sums()
    came = state(graph)
    with Edits(graph) as edits:
        for _ in range(choose.randrange(20)):
            edit(edits, choose)
        middle, mark = state(graph), edits.mark()
        for _ in range(20):
            edit(edits, choose)
        edits.restore(mark)
        assert state(graph) == middle
        for _ in range(choose.randrange(20)):
            edit(edits, choose)
    assert state(graph) == came


def test_kept() -> None:
    """What is kept stays, what was erased is gone, and nothing is taken back afterwards."""
    graph = graph_of_sums()
    relu = graph.find_nodes(op="call_function", target=aten.relu.default)[0]
    with Edits(graph) as edits:
        made = edits.insert_before(relu, aten.neg.default, relu.args, {"val": relu.meta["val"]})
        edits.replace(relu, made)
        edits.erase(relu)
        assert is_erased(relu) and not relu.all_input_nodes
        edits.keep()
    graph.lint()
    assert relu not in list(graph.nodes)
    assert "aten.neg.default(add_1)" in print_graph(graph)


def test_erased_while_it_is_read() -> None:
    """A node that somebody reads cannot be erased, and is not."""
    graph = graph_of_sums()
    came = state(graph)
    with Edits(graph) as edits, pytest.raises(RuntimeError, match="is read by"):
        edits.erase(graph.find_nodes(op="call_function", target=aten.relu.default)[0])
    assert state(graph) == came
