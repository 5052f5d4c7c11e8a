"""The numbers that a graph holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from arfusion_pass.graph.calls import aten, is_call
from arfusion_pass.graph.memory import is_written
from arfusion_pass.graph.values import dtype_of, tensor_of

FP32_MAX = torch.finfo(torch.float32).max


def constant(node: Any, finite: bool = True, operation: fx.Node | None = None) -> float | None:
    """The number that an argument is: a Python number, or a node that holds a constant; else None.

    Args:
        node: the argument.
        finite: None for NaN and for what is beyond fp32 as well: no kernel computes with those.
        operation: the call that it is an operand of. Beside a 16-bit tensor CUDA rounds a 0-dim tensor to 16 bits
            first, and CPU does not: then only a number that this leaves as it is.
    """
    value = None
    if isinstance(node, (int, float)) and not isinstance(node, bool):
        value = float(node)
    elif is_call(node, aten.full.default) and not node.args[0]:
        value = _as_dtype(node.args[1], dtype_of(node))
    elif is_call(node, aten.scalar_tensor.default):
        value = _as_dtype(node.args[0], dtype_of(node))
    if isinstance(node, fx.Node):
        if value is None or is_written(node):
            return None
        low = dtype_of(operation)
        if low in (torch.bfloat16, torch.float16) and _as_dtype(value, low) != value:
            return None
    return value if value is not None and (abs(value) <= FP32_MAX or not finite) else None


def multiplies_instead(node: fx.Node) -> bool:
    """Whether eager torch divides this node's tensor by a Python number by multiplying with its reciprocal: everywhere
    but on a CPU."""
    tensor = tensor_of(node)
    return tensor is not None and tensor.device.type != "cpu"


def _as_dtype(value: Any, dtype: torch.dtype | None) -> float | None:
    """A number as an element of ``dtype``."""
    if not isinstance(value, (int, float)) or dtype is None or dtype.is_complex:
        return None
    if dtype.is_floating_point and dtype.itemsize < 4:
        with unset_fake_temporarily():
            return torch.tensor(value, dtype=dtype, device="cpu").item()
    return float(value) if dtype.is_floating_point else float(int(value))
