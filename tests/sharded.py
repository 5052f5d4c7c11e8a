"""Graphs with residual chains on several simulated ranks at once, sharded as the flags of their calls allow.

What a rank's kernel may leave undefined is made NaN here: a row of ``residual_out`` that another rank owns. A fused
call then takes each row of its residual from the row's owner, as the owner alone would have finished it; everything
else in the graph runs on each rank by itself. So an output equal to the replicated graph's depends on no such row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from arfusion_pass.ops.schema import OUTPUT_NAMES
from arfusion_pass.ops.spec import Flags
from tests.simulate import Interpreter, simulated_ranks

fused = torch.ops.higher_order.auto_functionalized
RESIDUAL_OUT = 1 + OUTPUT_NAMES.index("residual_out")


def run_sharded(module: fx.GraphModule, inputs: Sequence[Any]) -> list[list[Any]]:
    """The outputs of ``module`` on every rank of the world, its marked calls sharded, followed by the inputs as they
    were left (as :func:`tests.simulate.run` gives them)."""
    world = dist.get_world_size()
    own = [[value.clone() if isinstance(value, torch.Tensor) else value for value in inputs] for _ in range(world)]
    ranks = [Interpreter(module) for _ in range(world)]
    for rank, arguments in zip(ranks, own, strict=True):
        rank.args_iter = iter(arguments)
    with simulated_ranks():
        for node in module.graph.nodes:
            marks = node.kwargs["flags"] if node.op == "call_function" and node.target is fused else 0
            assert isinstance(marks, int)
            if marks & Flags.RESIDUAL_IN_SHARDED:
                whole = _from_owners([rank.env[node.kwargs["residual"]] for rank in ranks])
            for number, rank in enumerate(ranks):
                kept = rank.env.get(node.kwargs.get("residual"))
                if marks & Flags.RESIDUAL_IN_SHARDED:
                    rank.env[node.kwargs["residual"]] = whole
                value = rank.run_node(node)
                if marks & Flags.RESIDUAL_IN_SHARDED:
                    rank.env[node.kwargs["residual"]] = kept
                if marks & Flags.RESIDUAL_OUT_SHARDED:
                    rows = value[RESIDUAL_OUT].view(-1, value[RESIDUAL_OUT].shape[-1])
                    rows[torch.arange(len(rows)) % world != number] = float("nan")
                rank.env[node] = value
    results = [rank.env[next(iter(module.graph.find_nodes(op="output")))] for rank in ranks]
    outputs = [list(result) if isinstance(result, (list, tuple)) else [result] for result in results]
    return [[*output, *arguments] for output, arguments in zip(outputs, own, strict=True)]


def _from_owners(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    rows = torch.stack([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])
    token = torch.arange(rows.shape[1])
    return rows[token % len(tensors), token].view(tensors[0].shape)


def check_sharded(module: fx.GraphModule, wanted: Sequence[Any], inputs: Sequence[Any], what: str = "") -> None:
    """Every rank's outputs of the fused ``module`` have the bits of ``wanted``, the replicated graph's."""
    for rank, got in enumerate(run_sharded(module, inputs)):
        assert len(got) == len(wanted)
        for index, (a, b) in enumerate(zip(wanted, got, strict=True)):
            same = torch.equal(_bytes(a), _bytes(b)) if isinstance(a, torch.Tensor) else a == b
            assert same, f"rank {rank}, output {index}: {what}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
