"""What a node stands for: its value, dtype and sizes, as far as they are known for sure. Nothing here adds a guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true


def value_of(node: Any) -> Any:
    """``meta["val"]`` of a node, or None; a literal is its own value."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def tensor_of(node: Any) -> torch.Tensor | None:
    """The fake tensor that a node stands for, or None."""
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) else None


def holds_tensors(node: Any) -> bool:
    """Whether a node stands for a tensor, or for a list of some."""
    value = value_of(node)
    return any(isinstance(each, torch.Tensor) for each in (value if isinstance(value, (list, tuple)) else [value]))


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of a node's tensor, or None where it is no tensor."""
    tensor = tensor_of(node)
    return None if tensor is None else tensor.dtype


def last_dim(node: Any) -> int | None:
    """The size of the last dimension as a plain int; None if there is none or it is symbolic."""
    tensor = tensor_of(node)
    if tensor is None or tensor.dim() == 0:
        return None
    size = tensor.shape[-1]
    return size if isinstance(size, int) else None


def statically_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for sure; adds no guard."""
    return statically_known_true(a == b)


def is_one(size: Any) -> bool:
    return statically_known_true(size == 1)


def same_shape(a: Any, b: Any) -> bool:
    """Whether two nodes' tensors have the same shape for sure; adds no guard."""
    ta, tb = tensor_of(a), tensor_of(b)
    if ta is None or tb is None or ta.dim() != tb.dim():
        return False
    return all(map(statically_equal, ta.shape, tb.shape))


def same_rows(a: Any, b: Any) -> bool:
    """Whether two nodes' tensors have the same shape for sure, but for leading dimensions of size 1; adds no guard."""
    ta, tb = tensor_of(a), tensor_of(b)
    if ta is None or tb is None:
        return False
    sizes = [list(tensor.shape) for tensor in (ta, tb)]
    for shape in sizes:
        while shape and len(shape) > 1 and is_one(shape[0]):
            del shape[0]
    return len(sizes[0]) == len(sizes[1]) and all(map(statically_equal, *sizes))


def same_size(a: Any, b: Any) -> bool:
    """Whether two nodes' tensors have as many elements for sure; adds no guard."""
    ta, tb = tensor_of(a), tensor_of(b)
    return ta is not None and tb is not None and statically_equal(ta.numel(), tb.numel())


def known_contiguous(tensor: torch.Tensor) -> bool:
    """Whether a tensor is contiguous for sure; adds no guard."""
    expected: Any = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not statically_known_true(size == 1) and not statically_known_true(stride == expected):
            return False
        expected = expected * size
    return True


def same_geometry(shape: Sequence[Any], strides: Sequence[Any], tensor: torch.Tensor) -> bool:
    """Whether a tensor has this shape for sure, and these strides where a dimension is not 1."""
    if len(shape) != tensor.dim():
        return False
    known = statically_known_true
    return all(
        known(size == its_size) and (known(size == 1) or known(stride == its_stride))
        for size, its_size, stride, its_stride in zip(shape, tensor.shape, strides, tensor.stride(), strict=True)
    )


def is_last(dims: Sequence[int], tensor: torch.Tensor) -> bool:
    """Whether ``dims`` are the last dimension of ``tensor`` alone. One without dimensions, of which torch says that it
    has dimension -1, has none."""
    return tensor.dim() > 0 and [dim % tensor.dim() for dim in dims] == [tensor.dim() - 1]
