"""A graph as text, one line a node, deterministic (no addresses, no times), so that golden files can hold it."""

from __future__ import annotations

import operator
import re
import types
from typing import Any

import torch
import torch.fx

from arfusion_pass.ops.marks import without_mark


def print_graph(graph: torch.fx.Graph) -> str:
    """One line a node: ``%name [op] target(args) -> dtype[shape] users=N``.

    >>> print_graph(graph)                                                              # doctest: +SKIP
      %all_reduce [call_func] _c10d_functional.all_reduce.default(mm, sum, 0)  -> bfloat16[8,64]  users=1
      %wait_tensor [call_func] _c10d_functional.wait_tensor.default(all_reduce)  -> bfloat16[8,64]  users=2
      return (wait_tensor,)
    """
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"  return {_argument(node.args[0])}")
            continue
        arguments = [_argument(argument) for argument in node.args]
        arguments += [f"{name}={_argument(_shown(name, value))}" for name, value in node.kwargs.items()]
        call = f"{_target(node.target)}({', '.join(arguments)})"
        lines.append(
            f"  %{node.name} [{node.op[:9]}] {call}  -> {_value(node.meta.get('val'))}  users={len(node.users)}"
        )
    return "\n".join(lines) + "\n"


def readable(graph: torch.fx.Graph) -> str:
    """The graph as Python, with the user's lines as comments."""
    return str(graph.python_code("self", verbose=True).src)


def _shown(name: str, value: Any) -> Any:
    """A fused call's flags without its graph's mark, which every other all-reduce of the graph has a part in."""
    return without_mark(value) if name == "flags" and isinstance(value, int) else value


def _target(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target is operator.getitem:
        return "getitem"
    return getattr(target, "__name__", type(target).__name__)


def _argument(value: Any) -> str:
    if isinstance(value, torch.fx.Node):
        return value.name
    if isinstance(value, tuple):
        return f"({', '.join(map(_argument, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(_argument, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_argument(item)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return f"slice({_argument(value.start)}, {_argument(value.stop)}, {_argument(value.step)})"
    if isinstance(value, (torch._ops.OperatorBase, types.FunctionType, types.BuiltinFunctionType)):
        return _target(value)
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _value(value: Any) -> str:
    """``meta["val"]`` in short: ``bfloat16[8,64]``, tuples in brackets, anything else by its type."""
    if isinstance(value, torch.Tensor):
        shape = ",".join(str(size) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_value, value))})"
    if value is None:
        return "None"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"{type(value).__name__}:{value}"
    return type(value).__name__
