"""Readers that ask a value for a size alone: no reason to have the value. They get it from the graph's inputs.

    %mine = vllm.reduce_scatter(%x, ...); %rows = sym_size.int(%mine, 0)                    # floordiv(%tokens, world)

Passes leave them behind, vLLM's sequence parallelism one at every site. For them a fused call would have to write
``%mine``, and where they read a value inside of a norm there could be none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from arfusion_pass.graph import aten, value_of
from arfusion_pass.rewrite.buffers import SizeSource
from arfusion_pass.rewrite.edits import Edits


def give_sizes(edits: Edits) -> None:
    """Let those who ask for a size in a graph ask its inputs."""
    graph = edits.graph
    inputs = list(graph.find_nodes(op="placeholder"))
    source, position = SizeSource(inputs), dict.fromkeys(inputs, 0)
    for target in (aten.sym_size.int, aten.sym_numel.default):
        for node in graph.find_nodes(op="call_function", target=target):
            if node.all_input_nodes[0] in position or not isinstance(value_of(node), torch.SymInt):
                continue
            if (size := source.find(value_of(node), position, 0, inputs)) is None:
                continue

            def insert(target: Any, args: tuple[Any, ...], _: None, value: Any, before: fx.Node = node) -> fx.Node:
                return edits.insert_before(before, target, args, {"val": value})

            edits.replace(node, size.emit(insert))
            edits.erase(node)
