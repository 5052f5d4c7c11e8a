"""What stands around a norm in aten ops, whoever spelled the norm itself: the residual add in front, and its weight.

    %total  = aten.add.Tensor(%residual, %value)                # either operand order, in the tensor's dtype or fp32
    %weight = aten.add.Tensor(convert_element_type(%w, f32), 1.0)   # Gemma; or any [H] vector, viewed or widened

Every dialect of norms uses these, so that aten's add may be followed by an engine's norm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from arfusion_pass.graph import (
    VIEWS,
    argument,
    constant,
    describe,
    dtype_of,
    is_call,
    is_cast,
    last_dim,
    other_operand,
    peel,
    prims,
    row_views,
    same_rows,
    same_shape,
    source_of,
    statically_equal,
    tensor_of,
    users_of,
    value_of,
    widens,
)
from arfusion_pass.ops.checks import EPSILON_DTYPES
from arfusion_pass.ops.spec import Flags

aten = torch.ops.aten


def epsilon_of(node: Any) -> Any:
    """The node whose value an epsilon that is no number is, without casts to fp32 around it: one element of a floating
    dtype or, as ``torch.compile(dynamic=True)`` may leave it, a scalar. None where it is neither."""
    if isinstance(node, fx.Node) and isinstance(value_of(node), (torch.SymFloat, float)):
        inner = node.args[0] if is_call(node, aten._local_scalar_dense.default) else node
        return inner if tensor_of(inner) is None else epsilon_of(inner)
    source = node
    while (is_cast(source, torch.float32) and dtype_of(source.args[0]) in EPSILON_DTYPES) or source_of(source):
        source = source_of(source) or source.args[0]
    tensor = tensor_of(source)
    if tensor is None or tensor.dtype not in EPSILON_DTYPES or not statically_equal(tensor.numel(), 1):
        return None
    return source


def epsilon_reason(node: Any) -> str:
    """Why an epsilon that is no number is not fused."""
    tensor = tensor_of(node)
    if tensor is None:
        return f"epsilon is {describe(node) if isinstance(node, fx.Node) else node}, which is no number"
    if not statically_equal(tensor.numel(), 1):
        return f"epsilon is a tensor of more than one element, {describe(node)}; the fused op takes one for all rows"
    if tensor.dtype == torch.float64:
        return f"epsilon is a float64 tensor of {tensor.dim()} dimensions, {describe(node)}, so the norm is no float32"
    return f"epsilon is the value of a {tensor.dtype} tensor, {describe(node)}; the fused op takes a float"


@dataclasses.dataclass(frozen=True)
class Sum:
    """What a norm may read: the reduced value itself, or its sum with a residual.

    Attributes:
        start: the node that the norm reads.
        nodes: the nodes between the value and ``start``, ``start`` included; empty for the value itself.
        residual: the other operand, without lossless casts.
        total: the node that stands for the sum.
        flags: ``UNROUNDED_SUM`` where ``start`` is the fp32 sum.
        dtype: of the value, where ``start`` is the fp32 sum.
    """

    start: fx.Node
    nodes: tuple[fx.Node, ...] = ()
    residual: fx.Node | None = None
    total: fx.Node | None = None
    flags: Flags = Flags.NONE
    dtype: torch.dtype | None = None


@dataclasses.dataclass(frozen=True)
class Weight:
    """A norm's ``[H]`` weight and what is added to it in fp32; ``wide`` is the fp32 ``[H]`` node that the
    multiplication reads where ``node`` is in a lower dtype."""

    node: fx.Node
    bias: float = 0.0
    wide: fx.Node | None = None


def sums(value: fx.Node) -> Iterator[Sum]:
    """The adds of ``value`` with a residual of its shape, in its dtype or in fp32, or with a bias in its dtype."""
    wide = [user for user in value.users if widens(user) and user is not value]
    for operand in (value, *wide):
        for add in users_of(operand, aten.add.Tensor):
            other = other_operand(add, operand)
            if not isinstance(other, fx.Node) or argument(add, "alpha", 1) != 1:
                continue
            residual = peel(other)
            if dtype_of(residual) not in (dtype_of(value), torch.float32):
                residual = other  # a bf16 residual widened for an fp32 tensor
            if not same_rows(add, value):
                continue
            bias = is_row(residual, last_dim(value)) and dtype_of(residual) == dtype_of(value)
            if not same_rows(residual, add) and not bias:
                continue
            casts = () if operand is value else (operand,)
            if dtype_of(add) == dtype_of(value):
                yield Sum(add, (*casts, add), residual, add)
            elif dtype_of(add) == torch.float32:
                yield Sum(add, (*casts, add), residual, add, Flags.UNROUNDED_SUM, dtype_of(value))
                for rounded in users_of(add, prims.convert_element_type.default):
                    # An fp32 residual whose sum is rounded before the norm is no form that the kernels have.
                    if dtype_of(rounded) == dtype_of(value) == dtype_of(residual):
                        yield Sum(rounded, (*casts, add, rounded), residual, rounded)


@dataclasses.dataclass(frozen=True)
class Product:
    """A value times a factor, in the value's dtype.

    Attributes:
        node: the node that stands for the product.
        nodes: the nodes between the value and the product, that included.
        factor: a number, or the node of one element or of one for each row, without lossless casts.
    """

    node: fx.Node
    nodes: tuple[fx.Node, ...]
    factor: float | fx.Node


def products(value: fx.Node) -> Iterator[Product]:
    """The products of ``value``, in its dtype or rounded to that behind fp32, with what is one for a row: a number, one
    element, or one element for each row; and its quotients by a power of two, which are products as exactly."""
    dtype = dtype_of(value)
    for operand in (value, *(user for user in value.users if widens(user) and user is not value)):
        for step in users_of(operand, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            factor = _factor(step, operand)
            if factor is None or not same_shape(step, operand):
                continue
            casts = () if operand is value else (operand,)
            if dtype_of(step) == dtype:
                if operand is value and (not isinstance(factor, fx.Node) or dtype_of(factor) == dtype):
                    yield Product(step, (*casts, step), factor)
            elif dtype_of(step) == torch.float32:
                for rounded in users_of(step, prims.convert_element_type.default):
                    if dtype_of(rounded) == dtype:
                        yield Product(rounded, (*casts, step, rounded), factor)


def _factor(step: fx.Node, operand: fx.Node) -> float | fx.Node | None:
    """What ``step`` multiplies ``operand`` by; None where that is not one for a row."""
    other = other_operand(step, operand)
    number = constant(other, operation=step)
    if step.target in (aten.div.Tensor, aten.div.Scalar):
        if number is None or step.args[0] is not operand:
            return None
        exact = abs(math.frexp(number)[0]) == 0.5 and 2**-100 < abs(number) < 2**100
        return 1 / number if exact else None
    if number is not None:
        return number
    factor = peel(other)
    tensor, rows = tensor_of(factor), tensor_of(operand)
    if tensor is None or rows is None or tensor.device != rows.device or is_call(factor, aten.rsqrt.default):
        return None  # a root is a norm's own
    if tensor.dtype not in (rows.dtype, torch.float32):
        return None
    return factor if statically_equal(tensor.numel(), 1) or is_row_factor(factor, operand) else None


def is_row_factor(node: Any, operand: fx.Node) -> bool:
    """Whether ``node`` has one element for each row of ``operand``, in the shape that rows are multiplied in."""
    one, rows = tensor_of(node), tensor_of(operand)
    if one is None or rows is None or one.dim() != rows.dim():
        return False
    return all(map(statically_equal, one.shape, (*rows.shape[:-1], 1)))


def is_row(node: Any, hidden: int | None) -> bool:
    """Whether a node is one row of ``hidden`` elements, or one element, that is added to every row: a bias."""
    tensor = tensor_of(node)
    if tensor is None:
        return False
    sizes = [size for size in tensor.shape if not statically_equal(size, 1)]
    return not sizes or (len(sizes) == 1 and statically_equal(tensor.shape[-1], hidden))


def readable_total(candidate: Sum, nodes: tuple[fx.Node, ...]) -> fx.Node | None:
    """The node that stands for the sum: an fp32 sum that others read only rounded is written rounded."""
    total = candidate.total
    if total is None or not candidate.flags & Flags.UNROUNDED_SUM:
        return total
    readers = {
        user for view in row_views(total) if view is total or view in nodes for user in view.users if user not in nodes
    }
    if len(readers) == 1 and is_cast(reader := readers.pop(), candidate.dtype) and reader.args[0] is total:
        return reader
    return total


def weight_of(node: Any, hidden: int | None, dtype: torch.dtype | None) -> Weight | None:
    """The ``[H]`` weight that a multiplication holds, Gemma's ``weight + 1`` in fp32 taken apart.

    Args:
        node: the operand; an fp32 one is given back without lossless casts.
        hidden: ``H``.
        dtype: ``T``, the dtype of the tensor that is reduced.
    """
    node = _vector(node)
    tensor = tensor_of(node)
    if tensor is None or tensor.dim() != 1 or last_dim(node) != hidden:
        return None
    if is_call(node, aten.add.Tensor, aten.add.Scalar) and dtype_of(node) == torch.float32:
        first, second = node.args[0], node.args[1]
        if argument(node, "alpha", 1) == 1:
            for base, number in ((first, second), (second, first)):
                bias = constant(number)
                base = _vector(peel(base))
                if bias is None or not math.isfinite(bias):
                    continue
                if dtype_of(base) in (dtype, torch.float32) and last_dim(base) == hidden:
                    return Weight(base, bias)
    base = _vector(peel(node))
    if dtype_of(base) in (dtype, torch.float32) and last_dim(base) == hidden:
        return Weight(base, wide=node if base is not node else None)
    return Weight(node) if dtype_of(node) == torch.float32 or widens_beside(node, dtype) else None


def widens_beside(node: Any, dtype: torch.dtype | None) -> bool:
    """Whether an operand of 16 bits meets fp32 rows: torch widens it in the op itself, and loses nothing."""
    return dtype == torch.float32 and dtype_of(node) in (torch.bfloat16, torch.float16)


def _vector(node: Any) -> Any:
    """``node`` without views of a ``[H]`` tensor as ``[1, ..., H]``."""
    while is_call(node, *VIEWS, aten.expand.default) and isinstance(node.args[0], fx.Node):
        inner = tensor_of(node.args[0])
        if inner is None or inner.dim() == 0 or last_dim(node.args[0]) != last_dim(node):
            break
        if tensor_of(node).dim() == 1 and inner.dim() == 1:  # type: ignore[union-attr]
            break
        node = node.args[0]
    return node
