"""What the user can change so that a missed site fuses: one sentence, from what stands in its way.

Whether a reason is true is decided where it is found; here is only what to do about it.
"""

from __future__ import annotations

import torch
from torch import fx

from arfusion_pass.compilation import GraphBreak, inference_leaf, runs_as_part
from arfusion_pass.dialects import NO_NORM
from arfusion_pass.graph import (
    PRODUCTS,
    aten,
    describe,
    is_call,
    is_cast,
    last_dim,
    only_user,
    other_operand,
    peel,
    tensor_of,
    trains,
    viewed,
)

NO_GRAD = (
    "this is a training graph: call the model under torch.no_grad() or torch.inference_mode(), or freeze it with "
    "model.requires_grad_(False)"
)
LEAF = "{leaf} was made under torch.inference_mode(), and torch saves no such tensor for a backward"
ONE_RANK = "before the all-reduce, on one rank alone, as a row-parallel linear with its bias on rank 0 does"
BEFORE = f"add the bias {ONE_RANK}"
BIAS = f"add the bias in the tensor's dtype, or {ONE_RANK}"
AVERAGE = "reduce by 'sum' and divide by the group's size before the all-reduce"
FUNCTIONAL = "make the graph functional first: ExportedProgram.run_decompositions() does, and so does AOT autograd"
ROWS = "take those rows before the all-reduce: it need not sum the others"
WHOLE = "compile the module that holds the norm in the same graph as the all-reduce"
BREAK = (
    "the graph ends there, at a graph break: {where}; take that out of the compiled region, or put it behind the norm"
)

PART = (
    "the all-reduce lies in a graph of its own, that of {where}, and what is fused lies in one graph: call the norm in "
    "there as well, or the all-reduce outside"
)


def advise(all_reduce: fx.Node, culprit: fx.Node | None, reason: str, broken: GraphBreak | None) -> str | None:
    """Advice on a missed site, or None.

    Args:
        all_reduce: the site.
        culprit: the node that its reason speaks of, or None.
        reason: the sentence itself.
        broken: the graph break at which the graph ends, or None.
    """
    if trains(all_reduce.graph) and (culprit is None or _reaches_output(culprit) or "output" in reason):
        leaf = inference_leaf()
        return NO_GRAD if leaf is None else f"{NO_GRAD}; {LEAF.format(leaf=leaf)}"
    if "reduces by 'avg'" in reason:
        return None if last_dim(all_reduce) == 1 else AVERAGE  # a norm's statistic, of rows split over the ranks
    if is_call(all_reduce, torch.ops._c10d_functional.all_reduce_.default) and " in place" in reason:
        return FUNCTIONAL
    if culprit is None:
        return None
    if is_call(culprit, aten.copy_.default) and culprit.args[0].op == "call_function":  # type: ignore[union-attr]
        return FUNCTIONAL
    if culprit.op == "output" or is_call(culprit, aten.copy_.default) or (NO_NORM in reason and _leaves(all_reduce)):
        part = runs_as_part(all_reduce.graph)
        if part is not None:
            return PART.format(where=describe(part))
        if _is_projected(all_reduce):
            return None
        return WHOLE if broken is None else BREAK.format(where=broken)
    if takes_rows(culprit, all_reduce):
        return ROWS
    if adds_bias(culprit):
        return BIAS if "reassociate" in reason else BEFORE
    return None


def adds_bias(node: fx.Node) -> bool:
    """Whether ``node`` adds a vector to every row: one operand has one dimension, of the rows' size."""
    if not is_call(node, aten.add.Tensor):
        return False
    for operand in node.all_input_nodes:
        vector, rows = tensor_of(peel(operand)), other_operand(node, operand)
        if vector is not None and vector.dim() == 1 and tensor_of(rows) is not None:
            return tensor_of(rows).dim() > 1 and last_dim(rows) == last_dim(operand)  # type: ignore[union-attr]
    return False


def takes_rows(node: fx.Node, all_reduce: fx.Node) -> bool:
    """Whether ``node`` takes some rows of an all-reduce's result, whose others nobody reads."""
    if not is_call(node, *_TAKES) or last_dim(node) != last_dim(node.all_input_nodes[0]):
        return False
    source = node.all_input_nodes[0]
    while only_user(source) is not None:
        if source is all_reduce:
            return True
        above = viewed(source)
        if not above:
            return False
        source = above[0]
    return False


_TAKES = (aten.slice.Tensor, aten.select.int, aten.index.Tensor, aten.index_select.default)


def _is_projected(all_reduce: fx.Node) -> bool:
    """Whether what an all-reduce gives is multiplied as it is: the model has no norm there, in this graph or another,
    as behind the embedding of one that normalises behind its layers (OLMo 2, EXAONE 4)."""
    stack = [all_reduce]
    while stack:
        node = stack.pop()
        if any(is_call(user, *PRODUCTS) for user in node.users):
            return True
        stack += [user for user in node.users if is_cast(user) or node in viewed(user)]
    return False


def _leaves(all_reduce: fx.Node) -> bool:
    """Whether what an all-reduce gives leaves the graph, as it is or behind one sum, the residual add."""
    stack = [(all_reduce, False)]
    while stack:
        node, added = stack.pop()
        for user in node.users:
            adds = is_call(user, aten.add.Tensor)
            if user.op == "output":
                return True
            if is_cast(user) or node in viewed(user) or (adds and not added):
                stack.append((user, added or adds))
    return False


def _reaches_output(node: fx.Node) -> bool:
    return node.op == "output" or any(user.op == "output" for user in node.users)
