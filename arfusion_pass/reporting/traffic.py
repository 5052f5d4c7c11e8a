"""How many bytes of its own memory a rank moves for one site, unfused and fused.

A kernel reads each tensor that it takes once and writes each value that somebody else reads once::

    bytes(kernel) = sum(numel * itemsize of its distinct inputs) + sum(numel * itemsize of its outputs read elsewhere)

*Unfused*, the kernels of a site are its all-reduce, every custom op, and for each run of plain aten ops between those
one kernel, into which Inductor fuses them. *Fused*, there is one. Views move nothing. What ranks send each other is the
same in both and counted in neither, as are Inductor's temporary buffers and rereading beyond a cache.

Llama's site, ``T`` tokens of ``H`` bf16 values: unfused ``2TH`` (all-reduce) ``+ 2TH + H + 2TH`` values (reads the sum
and the residual and the weight; writes residual and norm); fused ``2TH + H + 2TH``: a third less.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from arfusion_pass.graph import VIEWS, is_call, mutated_arguments, value_of

_FUSABLE = ("aten", "prims")
"""Namespaces of the ops that Inductor fuses with their neighbours."""


def hint(size: Any) -> int | None:
    """A size as a number: of a symbolic one, the value it had when it was traced."""
    if isinstance(size, int):
        return size
    try:
        return int(size.node.hint)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None


def tensor_bytes(value: Any) -> int | None:
    """Bytes of a tensor, 0 for anything that is none, None where a size is unknown."""
    if not isinstance(value, torch.Tensor):
        return 0
    elements = hint(value.numel())
    return None if elements is None else elements * value.dtype.itemsize


def unfused(nodes: Iterable[fx.Node]) -> int | None:
    """Bytes that a site's nodes move as they stand in the graph."""
    return _total(_kernel(part) for part in _kernels(sorted(nodes)))


def fused(call: fx.Node, outputs: Iterable[str]) -> int | None:
    """Bytes that a written call moves. ``outputs`` are the arguments that it writes, and does not read."""
    written = set(outputs)
    given = {name: value for name, value in call.kwargs.items() if isinstance(value, fx.Node)}
    read = {_storage(node) for name, node in given.items() if name not in written}
    stores = [node for name, node in given.items() if name in written]
    return _total(tensor_bytes(value_of(node)) for node in (*read, *stores))


def _kernels(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """The nodes by kernel: a custom op or collective alone, with the results taken from it; aten ops between them."""
    kernels: list[list[fx.Node]] = []
    plain: list[fx.Node] | None = None
    by_node: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        follows = node.all_input_nodes[0] if node.all_input_nodes else None
        if follows in by_node and not _fusable(node) and _is_result(node):
            kernel = by_node[follows]
        elif _fusable(node):
            if plain is None:
                kernels.append(plain := [])
            kernel = plain
        else:
            kernels.append(kernel := [])
            plain = None
        kernel.append(node)
        by_node[node] = kernel
    return kernels


def _kernel(nodes: list[fx.Node]) -> int | None:
    inside = set(nodes)
    reads, writes = set(), set()
    for node in nodes:
        if is_call(node, *VIEWS):
            continue
        reads |= {base for source in node.all_input_nodes if (base := _storage(source)) not in inside}
        # A buffer that is only there to be written is no input; what an op writes in place is an output too.
        writes |= set(mutated_arguments(node))
        if any(reader not in inside for reader in _readers(node)):
            writes.add(node)
    reads = {node for node in reads if not str(node.target).startswith("aten.empty")}
    return _total(tensor_bytes(value_of(node)) for node in (*reads, *writes))


def _fusable(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", None) in _FUSABLE


def _is_result(node: fx.Node) -> bool:
    """Whether a node only hands on what the op before it computed: a wait, or one of several results."""
    name = str(node.target)
    return "wait_tensor" in name or getattr(node.target, "__name__", "") == "getitem"


def _storage(node: fx.Node) -> fx.Node:
    """What a view is a view of."""
    while is_call(node, *VIEWS) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _readers(node: fx.Node) -> Iterable[fx.Node]:
    """Who reads a value, through views of it."""
    views = [node]
    while views:
        for user in views.pop().users:
            if is_call(user, *VIEWS):
                views.append(user)
            else:
                yield user


def _total(parts: Iterable[int | None]) -> int | None:
    total = 0
    for part in parts:
        if part is None:
            return None
        total += part
    return total
