"""What a node calls, and with which arguments: no call is recognised whose arguments are not all understood."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives  # defines _c10d_functional
from torch import fx

from arfusion_pass.graph.values import dtype_of, tensor_of, value_of

aten = torch.ops.aten

prims = torch.ops.prims

c10d = torch.ops._c10d_functional


def is_call(node: Any, *targets: Any) -> bool:
    """Whether ``node`` calls one of ``targets``, with no argument that its readers would not understand."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets and understood(node)


def _same_dtype(node: fx.Node, value: Any) -> bool:
    return value is None or value == dtype_of(node.args[0])


def _keeps_layout(node: fx.Node, value: Any) -> bool:
    return value in (None, torch.contiguous_format, torch.preserve_format)


_READ: dict[Any, tuple[str, ...]] = {
    aten.mean.dim: ("keepdim",),
    aten.sum.dim_IntList: ("keepdim",),
    aten.linalg_vector_norm.default: ("ord", "dim", "keepdim"),
    aten.amax.default: ("dim", "keepdim"),
    aten.amin.default: ("dim", "keepdim"),
    aten.max.dim: ("keepdim",),
    aten.clamp.default: ("min", "max"),
    aten.slice.Tensor: ("dim", "start", "end"),
    aten.cat.default: ("dim",),
    aten.split.Tensor: ("dim",),
    aten.constant_pad_nd.default: ("value",),
    aten.flatten.using_ints: ("start_dim", "end_dim"),
    aten.embedding.default: ("scale_grad_by_freq", "sparse"),
    aten.expand.default: ("implicit",),
    aten.clone.default: ("memory_format",),
    aten._to_copy.default: ("dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format"),
    aten.to.dtype: ("non_blocking", "copy"),
    aten.copy.default: ("non_blocking",),
    aten.rms_norm.default: ("weight", "eps"),
    aten.full.default: ("dtype", "layout", "device", "pin_memory"),
    aten.scalar_tensor.default: ("dtype", "layout", "device", "pin_memory"),
    aten.empty.memory_format: ("dtype", "layout", "device", "pin_memory", "memory_format"),
}
"""Optional arguments of aten ops that whoever recognises the op reads, or that change no value and no shape. Every
other one must be at its default for the op to be recognised: ``mean(dtype=bfloat16)`` is not the mean of a norm."""

_ALLOWED: dict[Any, dict[str, Callable[[fx.Node, Any], bool]]] = {
    aten.mean.dim: {"dtype": _same_dtype},
    aten.sum.dim_IntList: {"dtype": _same_dtype},
    aten.to.dtype: {"memory_format": _keeps_layout},
}
"""Optional arguments with other values than the default that change nothing."""


def by_position(node: fx.Node) -> bool:
    """Whether a call of an aten or prims op gives its operands by position, as every tracer does. A pass that wrote the
    graph may have given them by name, ``permute(x, dims=[1, 0])``: none such is recognised."""
    return len(node.args) >= _operands(node.target)[0]


def understood(node: fx.Node) -> bool:
    """Whether a call of an aten or prims op gives its operands by position, and no optional argument that its
    recogniser does not read a value other than the default; and whether it is known what the call gives. Of other ops'
    arguments their dialects know."""
    positional, optional = _operands(node.target)
    if not by_position(node) or (positional and value_of(node) is None):
        return False
    args, kwargs = node.args, node.kwargs
    for name, index, default, allowed in optional:
        value = kwargs.get(name, args[index] if index < len(args) else default)
        if value is default:
            continue
        if isinstance(value, fx.Node) or (value != default and not (allowed is not None and allowed(node, value))):
            return False
    return True


@functools.cache
def _operands(target: Any) -> tuple[int, tuple[tuple[str, int, Any, Callable[[fx.Node, Any], bool] | None], ...]]:
    """What :func:`understood` asks of an op: how many operands a call gives by position, and each optional argument
    that no recogniser reads: its name, place and default, and which other values change nothing."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.name.startswith(("aten::", "prims::")):
        return 0, ()
    read, allowed = _READ.get(target, ()), _ALLOWED.get(target, {})
    required = [
        index
        for index, parameter in enumerate(schema.arguments)
        if not parameter.has_default_value() and not parameter.kwarg_only
    ]
    optional = [
        (parameter.name, index, parameter.default_value, allowed.get(parameter.name))
        for index, parameter in enumerate(schema.arguments)
        if parameter.has_default_value() and parameter.name not in read
    ]
    return max(required, default=-1) + 1, tuple(optional)


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """One argument of an op call by its schema's name, however the call spells it."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return default
    for index, parameter in enumerate(schema.arguments):
        if parameter.name == name:
            if index < len(node.args):
                return node.args[index]
            return parameter.default_value if parameter.has_default_value() else default
    return default


def users_of(node: fx.Node, *targets: Any) -> list[fx.Node]:
    """The users of ``node`` that call one of ``targets``, in graph order."""
    return [user for user in node.users if is_call(user, *targets)]


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of ``node``, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def other_operand(node: fx.Node, operand: fx.Node) -> Any:
    """The other operand of a binary call; None unless ``operand`` is exactly one of the two."""
    if len(node.args) < 2 or (node.args[0] is operand) == (node.args[1] is operand):
        return None
    return node.args[1] if node.args[0] is operand else node.args[0]


PRODUCTS: frozenset[Any] = frozenset(
    {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.linear.default}
)
"""Of matrices."""

CASTS: frozenset[Any] = frozenset(
    {prims.convert_element_type.default, aten._to_copy.default, aten.to.dtype, aten.type_as.default}
)


def is_cast(node: Any, dtype: torch.dtype | None = None) -> bool:
    """Whether ``node`` only changes its input's dtype (to ``dtype``, where given)."""
    if not is_call(node, *CASTS):
        return False
    if not _same_device(node, node.args[0]):
        return False
    if dtype_of(node) is None or (dtype is not None and dtype_of(node) != dtype):
        return False
    if node.target is aten._to_copy.default:
        source, kept = tensor_of(node.args[0]), {"dtype", "non_blocking"}
        if source is not None:  # type_as says what stays as well
            kept |= {key for key in ("device", "layout") if node.kwargs.get(key) == getattr(source, key)}
        said = {key for key, value in node.kwargs.items() if value not in (None, False, torch.preserve_format)}
        return said <= kept
    return True


def _same_device(a: Any, b: Any) -> bool:
    one, other = tensor_of(a), tensor_of(b)
    return one is None or other is None or one.device == other.device


def widens(node: Any) -> bool:
    """Whether ``node`` is a cast that loses nothing (bf16 or fp16 to fp32)."""
    return is_cast(node, torch.float32) and dtype_of(node.args[0]) in (torch.bfloat16, torch.float16, torch.float32)


def peel(node: Any) -> Any:
    """``node`` without the lossless casts around it."""
    while widens(node):
        node = node.args[0]
    return node
