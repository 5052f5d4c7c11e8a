"""What stands between an all-reduce and the norm that would fuse with it: a sentence for the report and, where it is
linear, the step that :mod:`arfusion_pass.rewrite.reassociate` can take before the all-reduce.

    %reduced = all_reduce(%x); %step = mul(%reduced, 0.22); %sum = add(%residual, %step); norm(%sum)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import torch
from torch import fx

from arfusion_pass.dialects import DIALECTS, Norm, Reduced
from arfusion_pass.graph import (
    aten,
    constant,
    describe,
    dtype_of,
    is_call,
    keeps_rows,
    only_user,
    other_operand,
    row_views,
    source_of,
    without_views,
)

Reductions = Mapping[fx.Node, Reduced]
"""A graph's all-reduces that could be fused, by the node that holds the result."""


@dataclasses.dataclass(frozen=True)
class Hindrance:
    """A linear step that alone stands between an all-reduce and a norm, and nobody else reads what is before it.

    Attributes:
        step: a product with a constant, or the sum of two all-reduces.
        operand: the all-reduce's value, or the view of it that the step reads.
        other: the second all-reduce and the operand that it is, where the step is a sum.
    """

    step: fx.Node
    operand: fx.Node
    other: tuple[Reduced, fx.Node] | None = None


def why_no_norm(reduced: Reduced, reductions: Reductions) -> tuple[Hindrance | None, str, fx.Node | None]:
    """What hinders an all-reduce that no norm reads, where that could be moved; one sentence on what reads it; and the
    node that the sentence speaks of.

    Args:
        reduced: the all-reduce.
        reductions: all of its graph.
    """
    readers = {user: view for view in row_views(reduced.value) for user in view.users if not keeps_rows(user)}
    for reader, operand in readers.items():
        if torch.Tag.pointwise not in getattr(reader.target, "tags", ()):
            continue
        hindrance = _hindrance(reduced, reader, operand, reductions)
        norm = _norm_behind(reader, reductions if hindrance is not None else None)
        if norm is not None:
            advice = "" if hindrance is None else "; FusionConfig(reassociate=True) takes that before the all-reduce"
            reason = f"{describe(reader)} stands between it and the norm {describe(norm.result)}{advice}"
            return hindrance, reason, reader
    if not readers:
        return None, "nobody reads its result", None
    described = list(dict.fromkeys(map(describe, readers)))
    listed = ", ".join(described[:3]) + (", ..." if len(described) > 3 else "")
    reason = (
        f"its result is read by {listed}: no RMSNorm over its last dimension follows, with or without a residual add"
    )
    return None, reason, next(iter(readers))


def sum_before(norm: Norm, reduced: Reduced, reductions: Reductions) -> Hindrance | None:
    """The sum of two all-reduces that a norm reads: with one of them fused the other is its residual."""
    if norm.total is None or norm.operand not in norm.total.all_input_nodes:
        return None
    hindrance = _hindrance(reduced, norm.total, norm.operand, reductions)
    return hindrance if hindrance is not None and hindrance.other is not None else None


def _hindrance(reduced: Reduced, step: fx.Node, operand: fx.Node, reductions: Reductions) -> Hindrance | None:
    """``step`` as a hindrance; None where it is not linear, or where others read what it reads."""
    if dtype_of(step) != dtype_of(operand) or not _only_read_by(step, operand, reduced):
        return None
    if _scales(step, operand):
        return Hindrance(step, operand)
    other = other_operand(step, operand)
    if not is_call(step, aten.add.Tensor) or step.kwargs or not isinstance(other, fx.Node):
        return None
    second = reductions.get(without_views(other))
    if second is None or not _only_read_by(step, other, second):
        return None
    alike = second.group == reduced.group and dtype_of(second.x) == dtype_of(reduced.x)
    return Hindrance(step, operand, (second, other)) if alike else None


def _scales(step: fx.Node, operand: fx.Node) -> bool:
    """Whether ``step`` multiplies ``operand`` by a constant, or divides it by one."""
    product = is_call(step, aten.mul.Tensor, aten.mul.Scalar)
    quotient = is_call(step, aten.div.Tensor, aten.div.Scalar) and step.args[0] is operand
    return (product or quotient) and not step.kwargs and constant(other_operand(step, operand)) is not None


def factor_behind(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The product with a constant that is all that reads ``node``, over views, and the view of ``node`` in it."""
    operand = node
    while (reader := only_user(operand)) is not None and keeps_rows(reader):
        operand = reader
    if reader is None or dtype_of(reader) != dtype_of(operand) or not _scales(reader, operand):
        return None
    return reader, operand


def _norm_behind(node: fx.Node, reductions: Reductions | None) -> Norm | None:
    """A norm that reads ``node``; with ``reductions`` also one behind further steps that will be moved."""
    while True:
        for view in row_views(node):
            for dialect in DIALECTS:
                for norm in dialect.norms(view):
                    if isinstance(norm, Norm):
                        return norm
        if reductions is None:
            return None
        operand = node
        while (reader := only_user(operand)) is not None and keeps_rows(reader):
            operand = reader
        if reader is None:
            return None
        other = without_views(other_operand(reader, operand))
        while isinstance(other, fx.Node):
            factor = next((each for each in other.all_input_nodes if _scales(other, each)), None)
            if factor is None:
                break
            other = without_views(factor)
        summed = is_call(reader, aten.add.Tensor) and other in reductions
        if not summed and not _scales(reader, operand):
            return None
        node = reader


def _only_read_by(step: fx.Node, operand: fx.Node, reduced: Reduced) -> bool:
    """Whether an all-reduce's value goes through views into ``step`` and nowhere else."""
    chain, node = [step], operand
    while node is not reduced.value:
        chain.append(node)
        source = source_of(node)
        if source is None:
            return False
        node = source
    return all(only_user(node) is reader for reader, node in itertools.pairwise([*chain, node]))
