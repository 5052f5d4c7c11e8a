"""Readers that ask a value for a size alone: no reason to have the value. They get it from the graph's inputs.

    %mine = vllm.reduce_scatter(%x, ...); %rows = sym_size.int(%mine, 0)                    # floordiv(%tokens, world)

Passes leave them behind, vLLM's sequence parallelism one at every site. For them a fused call would have to write
``%mine``, and where they read a value inside of a norm there could be none.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx

from arfusion_pass.graph import aten, set_inputs, value_of
from arfusion_pass.rewrite.buffers import SizeSource


class SizesOfInputs:
    """From :meth:`give` on gives those who ask for a size in ``graph`` one of its inputs, until :meth:`restore` or
    :meth:`keep`. Whichever of the two comes second does nothing."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._undo = contextlib.ExitStack()
        self._idle: list[fx.Node] = []

    def give(self) -> None:
        """Let them ask the inputs."""
        graph = self.graph
        inputs = list(graph.find_nodes(op="placeholder"))
        source, position = SizeSource(inputs), dict.fromkeys(inputs, 0)
        for target in (aten.sym_size.int, aten.sym_numel.default):
            for node in graph.find_nodes(op="call_function", target=target):
                if node.all_input_nodes[0] in position or not isinstance(value_of(node), torch.SymInt):
                    continue
                if (size := source.find(value_of(node), position, 0, inputs)) is None:
                    continue

                def insert(target: Any, args: tuple[Any, ...], _: None, value: Any, before: fx.Node = node) -> fx.Node:
                    with graph.inserting_before(before):
                        made = graph.call_function(target, args)
                    made.meta["val"] = value
                    self._undo.callback(graph.erase_node, made)
                    return made

                found = size.emit(insert)
                for user in list(node.users):
                    self._undo.callback(set_inputs, user, user.args, user.kwargs)
                    user.replace_input_with(node, found)
                self._undo.callback(set_inputs, node, node.args, node.kwargs)
                set_inputs(node, (), {})
                self._idle.append(node)

    def keep(self) -> None:
        """Leave the graph as it now is."""
        self._undo.pop_all()
        while self._idle:
            node = self._idle.pop()
            node.graph.erase_node(node)

    def restore(self) -> None:
        """Leave the graph node for node as it was."""
        self._undo.close()
        self._idle.clear()
