"""From the contiguous buffer that a fused op writes to the tensor that the graph had: its shape, strides and dtype.

The steps are views, and nothing is copied but scales that the graph holds in 16 bits. With a column-major scale of 6
tokens and 2 groups, padded for TMA::

    buffer = empty([2, 8])                          # what the op fills: group by group, tokens padded to 8
    permute(buffer, [1, 0]) -> [8, 2], (1, 8); slice(0, 0, 6) -> [6, 2], (1, 8)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from arfusion_pass.graph import same_geometry
from arfusion_pass.ops import layouts
from arfusion_pass.ops.layouts import Size
from arfusion_pass.ops.spec import QuantSpec, ScaleLayout, ScaleRound


@dataclasses.dataclass(frozen=True)
class Step:
    """One view op and the tensor after it.

    Attributes:
        op: ``permute`` (two dimensions swapped), ``slice`` (the first ``shape[0]`` rows), ``reshape`` (to ``shape``),
            ``dtype`` (the same bytes) or ``narrow`` (the same values in 16 bits, which they have room in).
        shape, strides, dtype: after the step.
    """

    op: str
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Layout:
    """A contiguous buffer and the views from it to the graph's tensor."""

    shape: tuple[Size, ...]
    dtype: torch.dtype
    steps: tuple[Step, ...] = ()

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The steps on a real buffer."""
        for step in self.steps:
            if step.op == "permute":
                buffer = buffer.permute(1, 0)
            elif step.op == "slice":
                buffer = buffer[: step.shape[0]]
            elif step.op == "dtype":
                buffer = buffer.view(step.dtype)
            elif step.op == "narrow":
                buffer = buffer.to(step.dtype)
            else:
                buffer = buffer.view(step.shape)
        return buffer


def codes_layout(shape: Sequence[Size], spec: QuantSpec, target: torch.Tensor) -> Layout | None:
    """The buffer of quantised ``[..., H]`` rows that ``target`` is a view of; None where it can be none.

    Args:
        shape: of the norm.
        spec: the quantiser.
        target: what the graph has.
    """
    wanted = layouts.codes_shape(shape, spec)
    if target.dtype in layouts.CODE_DTYPES[spec.format] and target.dim() > 0 and _equal(target.shape[-1], wanted[-1]):
        wanted = tuple(target.shape)
        return Layout(wanted, target.dtype) if _contiguous(target) else None
    return _reach(wanted, _first(layouts.CODE_DTYPES[spec.format], target.dtype), target)


def scale_layout(shape: Sequence[Size], spec: QuantSpec, target: torch.Tensor | None) -> Layout | None:
    """The same for the scales of ``[..., H]`` rows; ``target`` None where nobody reads them."""
    tokens, hidden = layouts.token_count(shape), shape[-1]
    allocation = layouts.scale_allocation(tokens, hidden, spec)
    if allocation is None:
        return None
    buffer, dtype = allocation
    if target is None:
        return Layout(buffer, dtype)
    dtype = _first(layouts.scale_dtypes(spec), target.dtype)
    if dtype == torch.float32 and target.dtype in (torch.bfloat16, torch.float16):
        return _narrowed(buffer, spec, target)
    if spec.layout in layouts.COLUMN_MAJOR:
        sizes = [size for size in target.shape if not _equal(size, 1)]
        if _all_equal(sizes, [size for size in buffer if not _equal(size, 1)]) and _contiguous(target):
            return _reach(buffer, dtype, target)  # the graph has the transpose itself
        return _columns(buffer, dtype, tokens, target)
    groups = layouts.group_count(hidden, spec)
    rows = spec.layout not in layouts.SWIZZLED and target.dim() > 0 and _equal(target.shape[-1], groups)
    if rows and target.dtype == dtype and _contiguous(target):
        return Layout(tuple(target.shape), dtype)
    return _reach(buffer, dtype, target)


def _narrowed(shape: tuple[Size, ...], spec: QuantSpec, target: torch.Tensor) -> Layout | None:
    """Row-major scales that the quantiser rounds to the 16 bits which the graph holds them in."""
    if spec.scale_round != ScaleRound.TENSOR or spec.layout != ScaleLayout.ROW or not _contiguous(target):
        return None
    wanted, strides = tuple(target.shape), tuple(target.stride())
    if not _equal(math.prod(shape), math.prod(wanted)):
        return None
    steps = [] if _all_equal(shape, wanted) else [Step("reshape", wanted, strides, torch.float32)]
    return Layout(shape, torch.float32, (*steps, Step("narrow", wanted, strides, target.dtype)))


def _first(allowed: tuple[torch.dtype, ...], dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in allowed else allowed[0]


def _equal(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def _all_equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))


def _contiguous_strides(shape: Sequence[Size]) -> tuple[Size, ...]:
    strides: list[Size] = []
    step: Size = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step = step * size
    return tuple(strides)


def _contiguous(tensor: torch.Tensor) -> bool:
    return same_geometry(tuple(tensor.shape), _contiguous_strides(tensor.shape), tensor)


def _reach(shape: tuple[Size, ...], dtype: torch.dtype, target: torch.Tensor) -> Layout | None:
    """A contiguous buffer of ``shape`` viewed as a contiguous target of as many bytes."""
    if not _contiguous(target):
        return None
    steps: list[Step] = []
    now, old, new = shape, dtype.itemsize, target.dtype.itemsize
    if dtype != target.dtype:
        if old != new:
            last = now[-1] * old
            if not _equal(last % new, 0):
                return None
            now = (*now[:-1], last // new)
        steps.append(Step("dtype", now, _contiguous_strides(now), target.dtype))
    if not _equal(math.prod(now), math.prod(target.shape)):
        return None
    if not _all_equal(now, target.shape):
        wanted = tuple(target.shape)
        steps.append(Step("reshape", wanted, _contiguous_strides(wanted), target.dtype))
    return Layout(shape, dtype, tuple(steps))


def _columns(shape: tuple[Size, ...], dtype: torch.dtype, tokens: Size, target: torch.Tensor) -> Layout | None:
    """The transpose ``[G, ld]`` viewed as ``[T, G]`` with strides ``(1, ld)``, also with the tokens in several
    dimensions or with dimensions of 1."""
    groups, ld = shape
    if target.dtype != dtype:
        return None
    steps = [Step("permute", (ld, groups), (1, ld), dtype)]
    if not _equal(ld, tokens):
        steps.append(Step("slice", (tokens, groups), (1, ld), dtype))
    if same_geometry((tokens, groups), (1, ld), target):
        return Layout(shape, dtype, tuple(steps))
    have = _collapse(list(zip(target.shape, target.stride(), strict=True)))
    want = _collapse([(tokens, 1), (groups, ld)])
    if _all_equal([x for dim in have for x in dim], [x for dim in want for x in dim]):
        steps.append(Step("reshape", tuple(target.shape), tuple(target.stride()), dtype))
        return Layout(shape, dtype, tuple(steps))
    return None


def _collapse(dims: list[tuple[Size, Size]]) -> list[tuple[Size, Size]]:
    """(size, stride) without dimensions of 1, neighbours that lie evenly in memory merged."""
    merged: list[tuple[Size, Size]] = []
    for size, stride in dims:
        if _equal(size, 1):
            continue
        if merged and _equal(merged[-1][1], stride * size):
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


__all__ = ["Layout", "Step", "codes_layout", "scale_layout"]
