"""The buffers that a fused call writes to: their shapes as graph nodes, and the views that give a result its shape.

Token counts are symbolic and stay so: a size is a plain int, a node of the graph that already holds that symbol, a
``sym_size`` of one of the call's inputs, or arithmetic on such (tokens rounded up to 4).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._sympy.functions import FloorDiv

from arfusion_pass.graph import VIEWS, describe, is_call, known_contiguous, tensor_of
from arfusion_pass.ops.layouts import codes_dtype, codes_shape
from arfusion_pass.rewrite.edits import is_erased
from arfusion_pass.rewrite.output_views import Layout, Step, codes_layout, scale_layout
from arfusion_pass.rewrite.raised import RaisedSite

aten = torch.ops.aten
prims = torch.ops.prims
Insert = Callable[..., fx.Node]


@dataclasses.dataclass(frozen=True)
class Size:
    """One size of a buffer: a number, a node that holds it, dimension ``dim`` of a node's tensor, or ``operator`` of
    other sizes."""

    value: Any
    node: fx.Node | None = None
    dim: int | None = None
    operator: Callable[[Any, Any], Any] | None = None
    operands: tuple[Size, ...] = ()

    def emit(self, insert: Insert) -> Any:
        """The argument for an op call."""
        if self.operator is not None:
            return insert(self.operator, tuple(size.emit(insert) for size in self.operands), None, self.value)
        if self.node is None:
            return self.value
        if self.dim is None:
            return self.node
        return insert(aten.sym_size.int, (self.node, self.dim), None, self.value)


class SizeSource:
    """Which nodes of a graph hold which symbolic sizes."""

    def __init__(self, order: list[fx.Node]) -> None:
        self.nodes: dict[Any, list[fx.Node]] = {}
        for node in order:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and not is_erased(node):
                self.nodes.setdefault(value.node.expr, []).append(node)

    def find(self, value: Any, position: dict[fx.Node, int], anchor: int, inputs: list[fx.Node]) -> Size | None:
        """Where ``value`` can be read at ``anchor``, or how it is computed there; None where it cannot be."""
        if isinstance(value, int):
            return Size(value)
        expression = value.node.expr
        if expression.is_number:
            return Size(int(expression))
        for node in self.nodes.get(expression, ()):
            if position[node] <= anchor:
                return Size(value, node)
        for node in inputs:
            tensor = tensor_of(node)
            for dim, size in enumerate(tensor.shape if tensor is not None else ()):
                if isinstance(size, torch.SymInt) and size.node.expr == expression:
                    return Size(value, node, dim)
        combine = _OPERATORS.get(type(expression))
        if combine is None or len(expression.args) < 2:
            return None
        symbol = functools.partial(value.node.shape_env.create_symintnode, hint=None)
        parts = (int(part) if part.is_number else symbol(part) for part in expression.args)
        first, *rest = (self.find(part, position, anchor, inputs) for part in parts)
        for part in rest:
            if first is None or part is None:
                return None
            first = Size(combine(first.value, part.value), operator=combine, operands=(first, part))
        return first


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    FloorDiv: operator.floordiv,
}


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One contiguous ``torch.empty``, and the views of it that stand for the graph's value."""

    sizes: tuple[Size, ...]
    like: torch.Tensor
    steps: tuple[tuple[Step, tuple[Size, ...]], ...] = ()

    def emit(self, insert: Insert) -> fx.Node:
        """Insert the allocation."""
        sizes = [size.emit(insert) for size in self.sizes]
        return insert(
            aten.empty.memory_format,
            (sizes,),
            {"dtype": self.like.dtype, "layout": torch.strided, "device": self.like.device, "pin_memory": False},
            self.like,
        )

    def view(self, insert: Insert, result: fx.Node) -> fx.Node:
        """Insert what turns the op's result into the graph's value."""
        for step, sizes in self.steps:
            val = _empty(self.like, step.shape, step.dtype, step.strides)
            if step.op == "permute":
                result = insert(aten.permute.default, (result, [1, 0]), None, val)
            elif step.op == "slice":
                result = insert(aten.slice.Tensor, (result, 0, 0, sizes[0].emit(insert)), None, val)
            elif step.op == "dtype":
                result = insert(aten.view.dtype, (result, step.dtype), None, val)
            elif step.op == "narrow":
                result = insert(prims.convert_element_type.default, (result, step.dtype), None, val)
            else:
                result = insert(aten.reshape.default, (result, [size.emit(insert) for size in sizes]), None, val)
        return result


def plan_buffer(
    role: str,
    site: RaisedSite,
    source: SizeSource,
    position: dict[fx.Node, int],
    anchor: int,
    inputs: list[fx.Node],
) -> Buffer | str:
    """The buffer for one output of a site, or the reason why there can be none."""
    assert site.reduced is not None
    origin = site.values.get(role)
    like = tensor_of(site.reduced.x if origin is None else origin)
    what = role if origin is None else describe(origin)
    if like is None:
        return f"{what} has no meta['val']"
    layout: Layout | None = Layout(tuple(like.shape), like.dtype)
    if role == "allreduce_out" and site.norm is not None and like.shape[-1:] != (rows := _rows_of(site)).shape[-1:]:
        step = Step("reshape", tuple(like.shape), tuple(like.stride()), like.dtype)
        layout = Layout(tuple(rows.shape), like.dtype, (step,))
    if role in ("quant_out", "scale_out"):
        assert site.norm is not None
        assert site.quant is not None
        shape = site.rows.shape
        if role == "quant_out":
            layout = codes_layout(shape, site.quant.spec, like) if origin is not None else _codes(shape, site)
        else:
            layout = scale_layout(shape, site.quant.spec, None if origin is None else like)
    elif origin is not None and not known_contiguous(like) and (reader := _as_strided_reader(origin)) is not None:
        return f"{describe(reader)} reads {what} by its strides, and the fused op writes contiguous tensors"
    if layout is None:
        return f"{what} is no view of what the fused call writes"

    def find(sizes: Sequence[Any]) -> tuple[Size, ...] | str:
        places = [source.find(size, position, anchor, inputs) for size in sizes]
        for size, place in zip(sizes, places, strict=True):
            if place is None:
                return f"the size {size} of {what} is not computed before the fused call would run"
        return tuple(place for place in places if place is not None)

    sizes = find(layout.shape)
    if isinstance(sizes, str):
        return sizes
    steps: list[tuple[Step, tuple[Size, ...]]] = []
    for step in layout.steps:
        wanted = find(step.shape if step.op == "reshape" else step.shape[:1] if step.op == "slice" else ())
        if isinstance(wanted, str):
            return wanted
        steps.append((step, wanted))
    return Buffer(sizes, _empty(like, layout.shape, layout.dtype), tuple(steps))


def _rows_of(site: RaisedSite) -> torch.Tensor:
    """The reduced tensor as the rows that the norm reads."""
    rows = tensor_of(site.norm.operand)  # type: ignore[union-attr]
    assert rows is not None
    return rows


def _codes(shape: Sequence[Any], site: RaisedSite) -> Layout:
    """The buffer of codes that nobody reads."""
    assert site.quant is not None
    return Layout(codes_shape(shape, site.quant.spec), codes_dtype(site.quant.spec))


STRIDED_READERS = (aten.as_strided.default, aten.as_strided_scatter.default, aten._reshape_alias.default)


def _as_strided_reader(node: fx.Node) -> fx.Node | None:
    """A node that reads ``node``, or a view of it, at explicit strides."""
    views = [node]
    while views:
        for user in views.pop().users:
            if user.target in STRIDED_READERS:
                return user
            if is_call(user, *VIEWS):
                views.append(user)
    return None


def empty_like(like: torch.Tensor) -> torch.Tensor:
    """A contiguous fake tensor of the same shape and dtype."""
    return _empty(like, like.shape, like.dtype)


def _empty(
    like: torch.Tensor, shape: Sequence[Any], dtype: torch.dtype, strides: Sequence[Any] | None = None
) -> torch.Tensor:
    """A fake tensor, contiguous as a fresh allocation is or with ``strides``."""
    with unset_fake_temporarily():
        if strides is None:
            empty = torch.empty(tuple(shape), dtype=dtype, device="meta")
        else:
            empty = torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device="meta")
    # Asked for under the fake mode, one costs 60 us in place of 13: a seventh of the pass's time.
    return FakeTensor(like.fake_mode, empty, like.device) if isinstance(like, FakeTensor) else empty
