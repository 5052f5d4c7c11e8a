"""Whose memory a node's value lies in, who writes to it, and which calls write to nothing at all.

A schema says it of most calls. Of the others the worst is taken: they write to all that they are given.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from arfusion_pass.graph.calls import c10d
from arfusion_pass.graph.values import value_of
from arfusion_pass.graph.views import VIEWS
from arfusion_pass.graph.wholes import parts_of


def is_pure(node: fx.Node) -> bool:
    """Whether ``node`` only computes a value: it may be moved, repeated or dropped."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or node.is_impure() or mutated_arguments(node):
        return False
    if isinstance(node.target, HigherOrderOperator) and not _is_functional(node):
        return False  # there may be a collective in its graphs
    return torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())


FUNCTIONAL = ("auto_functionalized", "auto_functionalized_v2", "triton_kernel_wrapper_functional")
"""Names of the higher-order ops that copy what they would write to. By name: torch defines some on first use."""


def _is_functional(node: fx.Node) -> bool:
    return isinstance(node.target, HigherOrderOperator) and node.target.name() in FUNCTIONAL


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory a call writes to, or may write to: of a call that does not say so, all of its inputs.

    ``auto_functionalized`` calls write to none: they copy.
    """
    if says_nothing(node):
        return _given(node)
    if node.op != "call_function" or _is_functional(node):
        return []
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        if isinstance(node.target, HigherOrderOperator):
            return [] if _only_reads(node) else list(node.all_input_nodes)
        return list(node.all_input_nodes) if node.target in IN_PLACE_OPERATORS else []
    if not schema.is_mutable:
        acts = not schema.returns and not schema.name.startswith(READERS)
        return list(node.all_input_nodes) if acts else []
    written: list[fx.Node] = []
    for index, parameter in enumerate(schema.arguments):
        if parameter.alias_info is not None and parameter.alias_info.is_write:
            written += _nodes(node, parameter.name, index)
    return written


def says_nothing(node: fx.Node) -> bool:
    """Whether nothing says what a call writes to and what it gives: of a method, a module or a Python function, and of
    an op that is named like one in place and whose schema does not admit it (c10d's collectives)."""
    return node.op in ("call_method", "call_module") or (node.op == "call_function" and _is_silent(node.target))


@functools.cache
def _is_silent(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    if schema is None:
        return not isinstance(target, HigherOrderOperator) and getattr(target, "__module__", "") not in _PURE_MODULES
    return not schema.is_mutable and schema.name.endswith("_") and not schema.name.endswith("__")


_PURE_MODULES = ("_operator", "math")
"""Of Python's functions those write to nothing, but for ``operator``'s in place, and give no views, but for getitem."""


def _given(node: fx.Node) -> list[fx.Node]:
    """The nodes that a call takes, without those that surely are numbers."""
    numbers = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    return [each for each in node.all_input_nodes if not isinstance(value_of(each), numbers)]


def _only_reads(node: fx.Node) -> bool:
    """Whether a higher-order op surely writes to nothing that it is given: its graphs write to memory of their own
    alone, or it keeps in order an op that writes to nothing."""
    parts = parts_of(node)
    if parts:
        written = (each for part in parts for inner in part.graph.nodes for each in mutated_arguments(inner))
        return not any(owner.op == "placeholder" for each in written for owner in owners(each))
    op = node.args[1] if node.target.name() == "with_effects" else None  # type: ignore[union-attr]
    if isinstance(op, HigherOrderOperator):
        return op.name() == "print"
    return isinstance(op, torch._ops.OpOverload) and not op._schema.is_mutable and bool(op._schema.returns)


READERS = ("aten::_assert", "aten::sym_constrain_range", "_c10d_functional::wait_tensor", "prims::_sink_tokens")
"""Names of ops that return nothing and write nothing."""

IN_PLACE_OPERATORS: frozenset[Any] = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul",
                 "ilshift", "irshift", "setitem", "delitem")
)  # fmt: skip


def _nodes(node: fx.Node, name: str, index: int) -> list[fx.Node]:
    """The nodes in one argument of a call, which may be a list."""
    value = node.kwargs.get(name, node.args[index] if index < len(node.args) else None)
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, fx.Node)]


def viewed(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory the result of ``node`` may be: what it is a view of; none for fresh memory."""
    if says_nothing(node):
        return _given(node)
    if node.op != "call_function" or _is_functional(node):
        return []
    if node.target in VIEWS or node.target in (operator.getitem, c10d.wait_tensor.default):
        return [each for each in node.args[:1] or node.kwargs.values() if isinstance(each, fx.Node)]
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        unknown = node.target in IN_PLACE_OPERATORS or isinstance(node.target, HigherOrderOperator)
        return list(node.all_input_nodes) if unknown else []
    if all(result.alias_info is None for result in schema.returns):
        return _given(node) if schema.name in MAY_BE_VIEWS else []
    shared: list[fx.Node] = []
    for index, parameter in enumerate(schema.arguments):
        if parameter.alias_info is not None:
            shared += _nodes(node, parameter.name, index)
    return shared


MAY_BE_VIEWS = frozenset(
    f"aten::{name}"
    for name in ("alpha_dropout", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "cartesian_prod",
                 "conj_physical", "dropout", "einsum", "feature_alpha_dropout", "feature_dropout",
                 "flatten_dense_tensors", "lift", "meshgrid", "sum_to_size", "to_dense", "type_as", "unsafe_chunk",
                 "unsafe_split", "unsafe_split_with_sizes")
)  # fmt: skip
"""Names of ops that often give what they are given, or a view of it, which their schemas do not say. Found by running
torch's own samples of every op; Inductor's decompositions leave few of them."""


def owners(node: fx.Node) -> set[fx.Node]:
    """The nodes that own the memory of ``node``: views are followed to what they view."""
    found, seen, stack = set[fx.Node](), set[fx.Node](), [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        sources = viewed(current)
        stack += sources
        if not sources:
            found.add(current)
    return found


def is_written(node: fx.Node) -> bool:
    """Whether anybody writes to the memory of ``node``, by itself or by a view of it."""
    return any(name in mutated_arguments(user) for name, user in _readers(node))


def is_returned(node: fx.Node) -> bool:
    """Whether the memory of ``node`` leaves the graph, by itself or by a view of it."""
    return any(user.op == "output" for _, user in _readers(node))


def _readers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Everyone who reads the memory of ``node``, by itself or by a view of it: that name of it, and who reads it."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        for user in current.users:
            yield current, user
            if user not in seen and current in viewed(user):
                seen.add(user)
                stack.append(user)
