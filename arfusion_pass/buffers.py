"""The buffers that a fused call writes to: their shapes as graph nodes, and the views that give a result its shape.

Token counts are symbolic and stay so: a size is a plain int, a node of the graph that already holds that symbol, or
a ``sym_size`` of one of the call's inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from arfusion_pass.graph import VIEWS, describe, is_call, known_contiguous, tensor_of
from arfusion_pass.raising import RaisedSite

aten = torch.ops.aten
Insert = Callable[..., fx.Node]


@dataclasses.dataclass(frozen=True)
class Size:
    """One size of a buffer: a number, a node that holds it, or dimension ``dim`` of a node's tensor."""

    value: Any
    node: fx.Node | None = None
    dim: int | None = None

    def emit(self, insert: Insert) -> Any:
        """The argument for an op call."""
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
            if isinstance(value, torch.SymInt):
                self.nodes.setdefault(value.node.expr, []).append(node)

    def find(
        self, value: Any, position: dict[fx.Node, int], anchor: int, inputs: list[fx.Node]
    ) -> Size | None:
        """Where ``value`` can be read at ``anchor``; None where nothing holds it."""
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
        return None


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One ``torch.empty`` and the value that stands for it: contiguous, of the old value's shape and dtype."""

    sizes: tuple[Size, ...]
    like: torch.Tensor

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
    origin = site.values[role]
    like = tensor_of(origin)
    if like is None:
        return f"{describe(origin)} has no meta['val']"
    reader = None if known_contiguous(like) else _as_strided_reader(origin)
    if reader is not None:
        return f"{describe(reader)} reads {describe(origin)} by its strides, and the fused op writes contiguous tensors"
    sizes = [source.find(size, position, anchor, inputs) for size in like.shape]
    if any(size is None for size in sizes):
        missing = next(value for value, size in zip(like.shape, sizes, strict=True) if size is None)
        return f"the size {missing} of {describe(origin)} is not computed before the fused call would run"
    return Buffer(tuple(size for size in sizes if size is not None), _empty(like, [*like.shape], like.dtype))


def _as_strided_reader(node: fx.Node) -> fx.Node | None:
    """A node that reads ``node``, or a view of it, at explicit strides."""
    for user in node.users:
        if is_call(user, aten.as_strided.default, aten.as_strided_scatter.default):
            return user
        if is_call(user, *VIEWS) and (reader := _as_strided_reader(user)) is not None:
            return reader
    return None


def empty_like(like: torch.Tensor) -> torch.Tensor:
    """A contiguous fake tensor of the same shape and dtype."""
    return _empty(like, [*like.shape], like.dtype)


def _empty(like: torch.Tensor, shape: list[Any], dtype: torch.dtype) -> torch.Tensor:
    """A fake tensor as contiguous as a fresh allocation."""
    if isinstance(like, FakeTensor):
        with like.fake_mode:
            return torch.empty(shape, dtype=dtype, device=like.device)
    return torch.empty(shape, dtype=dtype, device="meta")


