"""Residual chains: runs of fused calls in which nobody but the next call reads a call's residual.

::

    norm_0, residual_0 = fused(x_0, residual)          # residual may be sharded on its way out
    norm_1, residual_1 = fused(x_1, residual_0)        # ... in and out
    norm_2             = fused(x_2, residual_1)        # ... in

Inside a chain a token's residual may live on its owner alone, the rank ``token mod world``: that rank sums, adds,
normalises and quantises, and what crosses the link behind it is only what the next GEMM reads. The graph keeps its
shapes; a call's flags merely allow it (``Flags.RESIDUAL_IN_SHARDED``, ``RESIDUAL_OUT_SHARDED``), and whether it happens
is decided when the call runs, by a function of tokens, hidden size, world and dtype: the same for all members.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from arfusion_pass.config import FusionConfig
from arfusion_pass.graph import dtype_of, is_call, is_pure, keeps_rows, last_dim, only_user, same_shape, tensor_of
from arfusion_pass.ops.layouts import group_count
from arfusion_pass.ops.schema import OUTPUT_NAMES, SCATTERING_OP
from arfusion_pass.ops.spec import Flags, QuantFormat, QuantSpec
from arfusion_pass.patterns.chains import auto_functionalized

Chain = tuple[fx.Node, ...]


def find_chains(calls: Sequence[fx.Node], config: FusionConfig) -> list[Chain]:
    """The maximal chains of at least two calls among the fused calls of a graph, in graph order.

    A chain that would send more bytes sharded than replicated is none: in one of two FP8 calls whose last residual is
    read elsewhere, say, that residual costs what the codes save.

    Args:
        calls: ``auto_functionalized`` nodes as they stand in the user's graph, in any order.
        config: FlashInfer decides for each call by itself, and a forced ``oneshot`` or ``twoshot`` stays what it is: no
            chains there.
    """
    if config.backend == "flashinfer" or config.strategy in ("oneshot", "twoshot"):
        return []
    members = {call for call in calls if _may_shard(call)}
    following: dict[fx.Node, fx.Node] = {}
    taken: set[fx.Node] = set()
    for call in sorted(members):
        after = _next(call)
        if after in members and after not in taken and _alike(call, after):
            following[call] = after
            taken.add(after)
    chains = []
    for call in sorted(following):
        if call not in taken:
            chain = [call]
            while chain[-1] in following:
                chain.append(following[chain[-1]])
            if _pays(chain):
                chains.append(tuple(chain))
    return chains


def mark_chains(chains: Sequence[Chain]) -> None:
    """Allow every call of each chain to leave its residual, and to take it, sharded."""
    for chain in chains:
        for call in chain:
            flags = call.kwargs["flags"]
            assert isinstance(flags, int)
            flags |= Flags.RESIDUAL_IN_SHARDED if call is not chain[0] else 0
            flags |= Flags.RESIDUAL_OUT_SHARDED if call is not chain[-1] else 0
            call.update_kwarg("flags", int(flags))


def _may_shard(call: fx.Node) -> bool:
    """Whether a call's rows can be finished by their owner alone: it gives the norm or its codes, and a residual. In
    sequence parallelism the model has sharded it already."""
    kwargs = call.kwargs
    if kwargs.get("addend") is not None or kwargs.get("factor") is not None:
        return False  # each rank adds, or takes, its own for every row, and an owner's would stand for all
    if call.args[0] is getattr(torch.ops.arfusion, SCATTERING_OP).default:
        return False
    return kwargs["allreduce_out"] is None and (kwargs["norm_out"] is not None or kwargs["quant_out"] is not None)


def _next(call: fx.Node) -> fx.Node | None:
    """The fused call that takes a call's residual sum as its residual, directly or over steps within a row, if nothing
    else reads either."""
    node = _result(call, "residual_out")
    while node is not None:
        reader = only_user(node)
        if reader is None:
            return None
        if is_call(reader, auto_functionalized):
            takes = [name for name, value in reader.kwargs.items() if value is node]
            return reader if takes == ["residual"] else None
        if not _within_rows(reader, node):
            return None
        node = reader
    return None


def _result(call: fx.Node, role: str) -> fx.Node | None:
    """The node that holds one of a call's outputs; None where there is none, or several."""
    index = 1 + OUTPUT_NAMES.index(role)
    found = [user for user in call.users if is_call(user, operator.getitem) and user.args[1] == index]
    return found[0] if len(found) == 1 and call.kwargs[role] is not None else None


def _within_rows(step: fx.Node, value: fx.Node) -> bool:
    """Whether each row of ``step`` is computed from the same row of ``value`` (and of what else it reads)."""
    if keeps_rows(step):
        return step.args[0] is value
    pointwise = isinstance(step.target, torch._ops.OpOverload) and torch.Tag.pointwise in step.target.tags
    return pointwise and is_pure(step) and same_shape(step, value)


def _alike(call: fx.Node, after: fx.Node) -> bool:
    """Whether two calls always decide alike: one group, dtype of what is reduced, hidden size, dtype of the residual.
    Their token counts are equal, because ``after`` takes the rows of ``call``."""
    written, read = call.kwargs["residual_out"], after.kwargs["residual"]
    return (
        call.kwargs["group_name"] == after.kwargs["group_name"]
        and dtype_of(_reduced(call)) == dtype_of(_reduced(after))
        and last_dim(written) == last_dim(read)
        and dtype_of(written) == dtype_of(read)
    )


def _reduced(call: fx.Node) -> fx.Node:
    """The tensor whose dtype is the call's."""
    return next(node for name in ("x", "expert_x", "permuted_x") if isinstance(node := call.kwargs.get(name), fx.Node))


def _pays(chain: Sequence[fx.Node]) -> bool:
    """Whether less is sent than replicated, where every sum goes to all ranks; as much will do if no whole residual is
    in it, as each rank then reads, writes and computes less."""
    hidden = last_dim(chain[0].kwargs["residual_out"])
    assert hidden is not None
    results = sum(_result_bytes(call, hidden) for call in chain)
    last = chain[-1].kwargs["residual_out"]
    whole = 0 if last is None else _row_bytes(last)
    sums = sum(_row_bytes(_reduced(call)) for call in chain)
    return results + whole < sums or (not whole and results == sums)


def _result_bytes(call: fx.Node, hidden: int) -> int:
    """Bytes of a token that its owner sends for the norm, or for its codes and scales."""
    if call.kwargs["norm_out"] is not None:
        return _row_bytes(call.kwargs["norm_out"])
    quant = call.kwargs["quant"]
    assert isinstance(quant, int)
    spec = QuantSpec.unpack(quant)
    groups = 0 if spec.is_static else group_count(hidden, spec)
    return _row_bytes(call.kwargs["quant_out"]) + int(groups) * (1 if spec.format == QuantFormat.NVFP4 else 4)


def _row_bytes(buffer: object) -> int:
    """Bytes of a token's row of ``[..., width]``."""
    tensor = tensor_of(buffer)
    assert tensor is not None
    return int(tensor.shape[-1]) * tensor.dtype.itemsize
