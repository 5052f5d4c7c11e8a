"""What to say of an all-reduce that no norm reads: where the nearest one is, and what stands in front of it.

%reduced = all_reduce(%x); %step = tanh(%reduced); norm(%step)           # "%step stands between it and the norm"
"""

from __future__ import annotations

import collections
import re
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree

from arfusion_pass.compilation import known
from arfusion_pass.dialects import NO_NORM, Norm, Reduced, Refused
from arfusion_pass.dialects.reading.mean_squares import power_of
from arfusion_pass.dialects.reading.op_calls import op_name
from arfusion_pass.graph import (
    aten,
    describe,
    dtype_of,
    holds_tensors,
    is_call,
    is_cast,
    last_dim,
    other_operand,
    parts_of,
    peel,
    same_rows,
    widens,
    without_views,
)
from arfusion_pass.rewrite.hindrances import (
    Hindrance,
    Kind,
    computed_late,
    find_hindrance,
    narrowed,
    only_read_by,
    readers_of,
    whole_norms,
)
from arfusion_pass.rewrite.reductions import row_lengths
from arfusion_pass.rewrite.replicated import Reductions, is_factor, is_shaped_like_one

PROJECTIONS = (aten.mm.default, aten.addmm.default, aten.linear.default, aten._scaled_mm.default)
"""Behind one of these another layer begins."""

DEVIATIONS = (aten.var_mean.correction, aten.var.correction, aten.native_layer_norm.default)

ROOTS = (aten.rsqrt.default, aten.sqrt.default)

FARTHEST = 24
"""Nodes between an all-reduce and a norm, from which on the norm is somebody else's."""

FARTHEST_SQUARE = 8
"""Nodes between the root of a norm and what it squares; there are three or four."""

_ADVICE = {
    Kind.ADDEND: "; FusionConfig(reassociate=True) moves that, and rounds elsewhere",
    Kind.SCALE: "; FusionConfig(reassociate=True) takes that before the all-reduce",
    Kind.SUM: "; FusionConfig(reassociate=True) takes that before the all-reduce",
    Kind.MERGE: "; FusionConfig(reassociate=True) takes that before the all-reduce",
    Kind.COMPOSITE: "; FusionConfig(reassociate=True) takes that apart",
}


def why_no_norm(reduced: Reduced, reductions: Reductions, moved: bool) -> tuple[Hindrance | None, str, fx.Node | None]:
    """What hinders an all-reduce that no norm reads, where that could be moved; one sentence on what reads it; and the
    node that the sentence speaks of.

    Args:
        reduced: the all-reduce.
        reductions: all of its graph.
        moved: what can be moved was moved: nobody is told to have it moved.
    """
    hindrance, norm = find_hindrance(reduced, reductions)
    if hindrance is not None and norm is not None:
        step = hindrance.step
        advice = "" if moved else _ADVICE[hindrance.kind]
        inexact = _why_inexact(step, hindrance.operand, reduced)
        reason = f"{describe(step)} stands between it and the norm {describe(norm.result)}{inexact}{advice}"
        return hindrance, reason, step
    readers = dict(readers_of(*reduced.values))
    if not readers:
        return None, "nobody reads its result", None
    found = _nearest_norm(reduced, reductions)
    if found is not None:
        reason, culprit = found
        stays = "" if culprit not in readers else _why_it_stays(culprit, readers[culprit], reduced, reductions)
        return None, reason + stays, culprit
    described = list(dict.fromkeys(map(describe, readers)))
    listed = ", ".join(described[:3]) + (", ..." if len(described) > 3 else "")
    reason = f"its result is read by {listed}: {NO_NORM}, with or without a residual add"
    return None, reason, next(iter(readers))


def leads_to_norm(reduced: Reduced, reductions: Reductions) -> bool:
    """Whether a norm reads ``reduced``, or stands somewhere behind it as :func:`why_no_norm` would say."""
    lengths = row_lengths(reduced.x)
    if any(True for value in reduced.values for _ in whole_norms(value, lengths)):
        return True
    return find_hindrance(reduced, reductions)[1] is not None or _nearest_norm(reduced, reductions) is not None


def _nearest_norm(reduced: Reduced, reductions: Reductions) -> tuple[str, fx.Node | None] | None:
    """Of the norms that follow an all-reduce within a few nodes the nearest, and the first step on the way to it that
    no fused call has: the residual add itself is none. What goes through another all-reduce has none of its own."""
    came: dict[fx.Node, fx.Node | None] = dict.fromkeys(reduced.values)
    queue = collections.deque(came)
    lengths = row_lengths(reduced.x)
    other: tuple[str, fx.Node] | None = None
    while queue and len(came) < FARTHEST + len(reduced.values):
        node = queue.popleft()
        if came[node] is not None:
            for norm in whole_norms(node, lengths):
                steps = [node]
                while (previous := came[steps[-1]]) is not None and came[previous] is not None:
                    steps.append(previous)
                return _blame(steps[::-1], norm)
        for reader, view in readers_of(node):
            other = other or _other_norm(reader, reduced) or _norm_inside(reader, view, lengths)
            computes = reader.op == "call_function" and holds_tensors(reader)
            projects = is_call(reader, *PROJECTIONS) and not _is_added_to(reader, view)
            ends = projects or str(getattr(reader.target, "namespace", "")).startswith("_c10d") or reader in reductions
            if computes and not ends and reader not in came:
                came[reader] = node
                queue.append(reader)
    return other


def _is_added_to(product: fx.Node, operand: fx.Node) -> bool:
    """Whether a projection adds its product to ``operand``."""
    return is_call(product, aten.addmm.default) and product.args[0] is operand and operand not in product.args[1:]


def _why_inexact(step: fx.Node, operand: fx.Node, reduced: Reduced) -> str:
    """What the fused op rounds otherwise than a sum in fp32 that stands beside the residual add."""
    dtype = dtype_of(reduced.x)
    if not is_call(step, aten.add.Tensor) or dtype_of(step) != torch.float32 or dtype == torch.float32:
        return ""
    if narrowed(step) is None:
        return f": its sum is float32, and the fused op rounds to {dtype} between two adds"
    added = dtype_of(peel(other_operand(step, operand)))
    return "" if added == dtype else f": it adds what is {added}, and the fused op takes a second tensor in {dtype}"


def _why_it_stays(step: fx.Node, operand: fx.Node, reduced: Reduced, reductions: Reductions) -> str:
    """Why a product that is linear in the all-reduce is not taken before it."""
    if not is_call(step, aten.mul.Tensor, aten.div.Tensor) or not only_read_by(step, operand, reduced):
        return ""
    factor = other_operand(step, operand)
    if not is_shaped_like_one(factor, operand) or (step.target is aten.div.Tensor and step.args[1] is operand):
        return ""
    if not is_factor(factor, operand, reduced.group, reductions):
        return f": nothing says that {describe(factor)} is the same on all ranks"
    late = computed_late(factor, reduced) is None
    return f": {describe(factor)} exists only behind another collective" if late else ""


def _other_norm(node: fx.Node, reduced: Reduced) -> tuple[str, fx.Node] | None:
    """What to say of a norm that is none of ours, from the step that makes it one."""
    instead = "the pass knows RMSNorm written in torch, and the engines' ops in docs/recognised.md"
    if _names_norm(node):
        return f"{describe(node)} is an op that the pass does not know; {instead}", node
    if _NORM.search(kernel := _triton_kernel(node)):
        return f"{describe(node)} launches a Triton kernel, {kernel}, that the pass cannot look into; {instead}", node
    rooted = is_call(node, *ROOTS) or power_of(node) in (0.5, -0.5)
    deviates = node.op == "call_function" and node.target in DEVIATIONS  # with whatever arguments
    if deviates or (rooted and _subtracts_the_mean(node)):
        return f"{describe(node)} belongs to a LayerNorm, which subtracts the mean; RMSNorm is fused", node
    if rooted and last_dim(reduced.x) == 1:
        reason = (
            f"it reduces one number for each row, of which {describe(node)} takes the root: a norm over rows that are "
            "split over the ranks; what is fused is the sum of whole rows in front of a norm"
        )
        return reason, node
    if rooted:
        reason = (
            f"{describe(node)} belongs to no known RMSNorm: x * rsqrt(mean(x * x) + epsilon) over the last "
            "dimension, with or without a weight"
        )
        return reason, node
    return None


def _norm_inside(node: fx.Node, operand: fx.Node, lengths: set[int] | None) -> tuple[str, fx.Node] | None:
    """What to say of a higher-order op in one of whose graphs a norm reads ``operand``."""
    for part in parts_of(node):
        inputs = part.graph.find_nodes(op="placeholder")
        given = pytree.tree_leaves(node.args)[-len(inputs) :]
        for value, inner in zip(given, inputs, strict=False):
            norm = next(whole_norms(inner, lengths), None) if value is operand else None
            if norm is not None:
                where = norm.result if isinstance(norm, Norm) else norm.node
                said = "" if where is None else f" {describe(where)}"
                reason = (
                    f"its norm{said} lies in a graph of its own, that of {describe(node)}, and what is fused lies in "
                    "one graph: call the all-reduce in there as well, or the norm outside"
                )
                return reason, node
    return None


_NORM = re.compile(r"rms_?(?:layer_?)?norm", re.I)


def _names_norm(node: fx.Node) -> bool:
    """Whether a node calls somebody's op, functionalised or not, that is named like an RMSNorm."""
    name = op_name(node) or ""
    return not name.startswith(("aten::", "prims::")) and _NORM.search(name) is not None


def _triton_kernel(node: fx.Node) -> str:
    """The name of the Triton kernel that a node launches; empty for any other node, or where torch does not tell."""
    target = node.target
    if not isinstance(target, HigherOrderOperator) or not target.name().startswith("triton_kernel_wrapper"):
        return ""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel: Any = known(lambda: kernel_side_table.get_kernel(node.kwargs["kernel_idx"]))  # type: ignore[arg-type]
    while hasattr(kernel, "fn"):  # what tunes it, and what compiles it
        kernel = kernel.fn
    return str(getattr(kernel, "__name__", ""))


def _subtracts_the_mean(root: fx.Node) -> bool:
    """Whether a root is taken of what was computed from ``x - mean(x)``: a LayerNorm in single steps."""
    stack, seen = [root], set[fx.Node]()
    while stack and len(seen) < FARTHEST_SQUARE:
        node = stack.pop()
        if _centres(node):
            return True
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return False


def _centres(step: fx.Node) -> bool:
    """Whether a step subtracts a mean."""
    return is_call(step, aten.sub.Tensor) and is_call(without_views(step.args[1]), aten.mean.dim)


def _blame(steps: list[fx.Node], norm: Norm | Refused) -> tuple[str, fx.Node | None]:
    """What to say of the steps between an all-reduce and a norm, and the one that it is said of."""
    if isinstance(norm, Refused):
        return norm.reason, norm.node
    first, *rest = steps
    added = is_call(first, aten.add.Tensor) and same_rows(first, first.all_input_nodes[0])
    behind = [step for step in (rest if added and rest else steps) if not widens(step)]
    step = behind[0] if behind else first
    sums = [each for each in steps if not widens(each)]
    count = len(sums) + (norm.residual is not None) + (norm.addend is not None)
    if count > 1 and all(is_call(each, aten.add.Tensor) for each in sums):
        nearest = describe(norm.result)
        return f"{describe(first)} is the first of {count} sums between it and the nearest norm, {nearest}", first
    if _centres(step):
        return f"{describe(step)} belongs to a LayerNorm, which subtracts the mean; RMSNorm is fused", step
    if is_cast(step) and added and dtype_of(step.args[0]) == torch.float32:
        reason = (
            f"{describe(step)} rounds the float32 sum to {dtype_of(step)} before the norm "
            f"{describe(norm.result)}, which the fused op would read unrounded"
        )
        return reason, step
    if is_cast(step) and step is first and dtype_of(step.args[0]) == torch.float32:
        reason = (
            f"{describe(step)} rounds the reduced float32 to {dtype_of(step)} in front of the norm "
            f"{describe(norm.result)}; the fused op rounds to what is reduced, so reduce {dtype_of(step)}"
        )
        return reason, step
    return f"{describe(step)} stands between it and the norm {describe(norm.result)}", step
