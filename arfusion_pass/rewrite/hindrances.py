"""What is linear between an all-reduce and the norm that would fuse with it: the steps that
:mod:`arfusion_pass.rewrite.reassociate` can take out of the way.

    %reduced = all_reduce(%x); %step = mul(%reduced, 0.22); %sum = add(%residual, %step); norm(%sum)
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from arfusion_pass.dialects import Norm, Reduced, Refused, norms_of
from arfusion_pass.graph import (
    aten,
    by_position,
    constant,
    dtype_of,
    is_call,
    is_cast,
    is_pure,
    is_written,
    known_contiguous,
    last_dim,
    only_user,
    other_operand,
    peel,
    same_rows,
    same_shape,
    source_of,
    tensor_of,
    views_of,
    views_of_all,
    widens,
    without_views,
)
from arfusion_pass.rewrite.reductions import in_whole_rows, row_lengths
from arfusion_pass.rewrite.replicated import Reductions, is_factor


class Kind(enum.Enum):
    """Of a linear step, and what is done with it."""

    SCALE = "product"
    """With a number, a one-element tensor, an ``[H]`` vector or one element a row, the same on all ranks
    (:mod:`arfusion_pass.rewrite.replicated`): goes before the all-reduce."""
    SUM = "sum over leading dimensions"
    """So does this."""
    MERGE = "sum of two all-reduces"
    """One all-reduce of the sum."""
    ADDEND = "sum"
    """With a tensor beside the residual: goes into what is added next, or behind a product that follows."""
    COMPOSITE = "several steps in one op"
    """``add`` with an alpha, ``sub``, ``neg``, ``addcmul``, ``addmm``: written as those steps, which then move."""


@dataclasses.dataclass(frozen=True)
class Hindrance:
    """A linear step that alone stands between an all-reduce and a norm, and nobody else reads what is before it.

    Attributes:
        kind: of step.
        step: the node.
        operand: the all-reduce's value, or the view of it that the step reads.
        other: the second all-reduce and the operand that it is, where two are merged.
    """

    kind: Kind
    step: fx.Node
    operand: fx.Node
    other: tuple[Reduced, fx.Node] | None = None


def find_hindrance(reduced: Reduced, reductions: Reductions) -> tuple[Hindrance | None, Norm | None]:
    """What hinders an all-reduce that no norm reads, where that could be moved, and the norm behind it; else None."""
    readers = dict(readers_of(*reduced.values))
    for reader in list(readers):
        if widens(reader):  # steps in fp32, on values of 16 bits
            readers |= dict(readers_of(reader))
    for reader, operand in readers.items():
        hindrance = hindrance_of(reduced, reader, operand, reductions)
        norm = None if hindrance is None else _norm_behind(reader, reduced, reductions)
        if norm is not None:
            return hindrance, norm
    return None, None


def sum_before(norm: Norm, reduced: Reduced, reductions: Reductions) -> Hindrance | None:
    """The sum of two all-reduces that a norm reads: with one of them fused the other is its residual."""
    if norm.total is None or norm.operand not in norm.total.all_input_nodes:
        return None
    hindrance = hindrance_of(reduced, norm.total, norm.operand, reductions)
    return hindrance if hindrance is not None and hindrance.other is not None else None


def hindrance_of(reduced: Reduced, step: fx.Node, operand: fx.Node, reductions: Reductions) -> Hindrance | None:
    """``step`` as a hindrance; None where it is not linear, or where others read what it reads."""
    kind = linear(step, operand, reduced.group, reductions)
    if kind is None or not only_read_by(step, operand, reduced):
        return None
    if kind == Kind.MERGE:
        other = reductions[without_views(other_operand(step, operand))]
        if other.group != reduced.group or dtype_of(other.x) != dtype_of(reduced.x):
            return None
        if mergeable(step, operand, reductions) and _in_one(reduced, other):
            return Hindrance(kind, step, operand, (other, other_operand(step, operand)))
        kind = Kind.ADDEND  # the other one is read elsewhere too, or one of them reduces what cannot be replaced
    if kind in (Kind.SCALE, Kind.SUM) and not _takes_another_input(reduced):
        return None
    if kind == Kind.SCALE and needed_before(other_operand(step, operand), operand, reduced) is None:
        return None
    return Hindrance(kind, step, operand) if kind != Kind.ADDEND or _may_join(step, reduced.group, reductions) else None


def needed_before(factor: Any, operand: fx.Node, reduced: Reduced) -> list[fx.Node] | None:
    """What would move in front of an all-reduce (:func:`computed_late`) with a factor of ``operand``, which then is one
    of what is reduced; None where it cannot be."""
    tensor = tensor_of(factor)
    rows = tensor is None or tensor.numel() == 1 or last_dim(operand) == last_dim(reduced.x)
    return computed_late(factor, reduced) if rows else None


def computed_late(factor: Any, reduced: Reduced) -> list[fx.Node] | None:
    """The nodes behind an all-reduce that a factor of its result is computed by, in order: they could stand in front of
    it. None where one of them could not, as another all-reduce."""
    late, stack = set[fx.Node](), [factor] if isinstance(factor, fx.Node) else []
    while stack:
        node = stack.pop()
        if not node < reduced.node and node not in late:
            own = getattr(node.target, "namespace", None)
            if own not in (None, "aten", "prims") or not is_pure(node) or any(map(is_written, node.all_input_nodes)):
                return None
            late.add(node)
            stack += node.all_input_nodes
    return sorted(late)


def _takes_another_input(reduced: Reduced) -> bool:
    """Whether the all-reduce is a functional op on a contiguous tensor, whose result is laid out like any other."""
    schema = getattr(reduced.node.target, "_schema", None)
    x = tensor_of(reduced.x)
    functional = schema is not None and not schema.is_mutable
    return _is_direct(reduced) and functional and x is not None and known_contiguous(x)


def _is_direct(reduced: Reduced) -> bool:
    """Whether the all-reduce itself reads what is reduced, and no permuted or widened form of it."""
    return reduced.x in reduced.node.all_input_nodes


def _in_one(a: Reduced, b: Reduced) -> bool:
    """Whether the later one of two all-reduces could take the sum of both inputs."""
    first, second = (a, b) if a.node < b.node else (b, a)
    return _is_direct(first) and _takes_another_input(second)


def merges(hindrance: Hindrance | None, reduced: Reduced, reductions: Reductions) -> bool:
    """Whether moving a hindrance ends in one all-reduce for two: their sum is it, or stands behind what moves there."""
    if hindrance is None or hindrance.kind != Kind.ADDEND:
        return hindrance is not None and hindrance.kind == Kind.MERGE
    step, operand = hindrance.step, hindrance.operand
    if narrowed(step) is None or _summed(step, operand) not in reductions:
        behind = following(step)
        if behind is None or linear(*behind, reduced.group, reductions) != Kind.MERGE:
            return False
        step, operand = behind
    other = reductions[_summed(step, operand)]
    alike = other.group == reduced.group and dtype_of(other.x) == dtype_of(reduced.x)
    return alike and mergeable(step, operand, reductions) and _in_one(reduced, other)


def _summed(step: fx.Node, operand: fx.Node) -> Any:
    """What a sum adds to ``operand``, without views and lossless casts."""
    node, inner = other_operand(step, operand), None
    while inner is not node:
        inner, node = node, without_views(peel(node))
    return node


def _may_join(step: fx.Node, group: str, reductions: Reductions) -> bool:
    """Whether what a sum adds has a place to go: the linear step behind it, or the 16 bits that it is rounded to."""
    behind = following(step)
    return behind is not None and (linear(*behind, group, reductions) is not None or narrowed(step) is not None)


def narrowed(step: fx.Node) -> fx.Node | None:
    """The cast to 16 bits that alone reads an fp32 step, or None."""
    reader = only_user(step)
    low = reader is not None and dtype_of(step) == torch.float32 and is_cast(reader) and not widens(reader)
    return reader if low and dtype_of(reader) in (torch.bfloat16, torch.float16) else None


def mergeable(step: fx.Node, operand: fx.Node, reductions: Reductions) -> bool:
    """Whether nobody but ``step`` reads the all-reduce that it adds to ``operand``."""
    return only_read_by(step, other_operand(step, operand), reductions[_summed(step, operand)])


def linear(step: fx.Node, operand: fx.Node, group: str, reductions: Reductions) -> Kind | None:
    """What kind of linear step ``step`` is in ``operand``, which all-reduces of ``group`` give; None where it is none,
    or rounds to a lower dtype."""
    if dtype_of(step) not in (dtype_of(operand), torch.float32) or tensor_of(step) is None or not by_position(step):
        return None
    if _scales(step, operand, group, reductions):
        return Kind.SCALE
    if is_call(step, aten.sum.dim_IntList, aten.mean.dim) and step.args[0] is operand and not step.kwargs:
        return Kind.SUM if _over_leading(step, operand) else None
    other = other_operand(step, operand)
    if is_call(step, aten.add.Tensor) and not step.kwargs and isinstance(other, fx.Node) and same_rows(step, operand):
        return Kind.MERGE if without_views(other) in reductions else Kind.ADDEND
    return Kind.COMPOSITE if _is_composite(step, operand, group, reductions) else None


def _is_composite(step: fx.Node, operand: fx.Node, group: str, reductions: Reductions) -> bool:
    """Whether ``step`` is several linear steps in ``operand``, of its shape and dtype."""
    if step.op != "call_function" or not same_shape(step, operand) or dtype_of(step) != dtype_of(operand):
        return False
    first, *others = step.args
    if step.target in (aten.add.Tensor, aten.sub.Tensor):
        alpha = constant(step.kwargs.get("alpha", 1))
        return alpha is not None and tensor_of(other_operand(step, operand)) is not None
    if step.target in (aten.addmm.default, aten.baddbmm.default):
        return is_call(step, step.target) and first is operand and operand not in others
    if step.target is aten.addcmul.default:
        if step.args.count(operand) != 1 or constant(step.kwargs.get("value", 1)) is None:
            return False
        factors = [factor for factor in others if factor is not operand]
        return first is operand or is_factor(factors[0], operand, group, reductions)
    return is_call(step, aten.neg.default)


def _scales(step: fx.Node, operand: fx.Node, group: str, reductions: Reductions) -> bool:
    """Whether ``step`` multiplies ``operand`` by something that is the same on all ranks, or divides it by that."""
    product = is_call(step, aten.mul.Tensor, aten.mul.Scalar)
    quotient = is_call(step, aten.div.Tensor, aten.div.Scalar) and step.args[0] is operand
    if not (product or quotient) or step.kwargs:
        return False
    factor = other_operand(step, operand)
    if constant(factor) is not None:
        return True
    return same_shape(step, operand) and is_factor(factor, operand, group, reductions)


def _over_leading(step: fx.Node, operand: fx.Node) -> bool:
    tensor = tensor_of(operand)
    dims = step.args[1] if len(step.args) > 1 else None
    if tensor is None or tensor.dim() == 0 or not isinstance(dims, (list, tuple)) or not dims:
        return False
    return all(isinstance(dim, int) and dim % tensor.dim() != tensor.dim() - 1 for dim in dims)


def following(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What alone reads ``node``, over views, and the view of ``node`` in it."""
    operand = node
    while (reader := only_user(operand)) is not None and source_of(reader) is operand:
        operand = reader
    return None if reader is None or reader.op == "output" else (reader, operand)


def _norm_behind(node: fx.Node, reduced: Reduced, reductions: Reductions) -> Norm | None:
    """A norm that reads whole rows of ``node``, or one behind further linear steps and a rounding to 16 bits.

    What was found is kept: each of ``n`` all-reduces that are summed one by one would look through ``n`` sums.
    """
    lengths = row_lengths(reduced.x)
    ahead = reductions.ahead.setdefault((reduced.group, None if lengths is None else frozenset(lengths)), {})
    passed: list[fx.Node] = []
    norm: Norm | None = None
    while node not in ahead:
        passed.append(node)
        norm = next((norm for norm in whole_norms(node, lengths) if isinstance(norm, Norm)), None)
        cast, step = narrowed(node), following(node)
        if norm is not None or (cast is None and (step is None or not linear(*step, reduced.group, reductions))):
            break
        node = cast or step[0]  # type: ignore[index]
    else:
        norm = ahead[node]
    ahead.update(dict.fromkeys(passed, norm))
    return norm


def whole_norms(node: fx.Node, lengths: set[int] | None) -> Iterator[Norm | Refused]:
    for view in views_of(node):
        for norm, _ in norms_of(view):
            yield in_whole_rows(norm, view, lengths)


def readers_of(*nodes: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Everything that reads a node and is no view of it, with the view that it reads. A ``copy`` over it does not."""
    held = set(nodes)
    for _, view in views_of_all(nodes):
        for user in view.users:
            overwrites = is_call(user, aten.copy.default) and view not in user.args[1:]
            if source_of(user) is not view and user not in held and not overwrites:
                yield user, view


def only_read_by(step: fx.Node, operand: fx.Node, reduced: Reduced) -> bool:
    """Whether an all-reduce's value goes through views into ``step`` and nowhere else."""
    chain, node = [step], operand
    while node is not reduced.value:
        chain.append(node)
        source = node.args[0] if widens(node) else source_of(node)
        if not isinstance(source, fx.Node):
            return False
        node = source
    return all(only_user(node) is reader for reader, node in itertools.pairwise([*chain, node]))
