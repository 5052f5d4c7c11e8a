"""A graph as text, and the difference that the pass made to it.

:func:`print_graph` writes one line a node; :func:`graph_diff` compares two such texts: a table of op counts, then a
unified diff. Both are deterministic (no addresses, no times), so that golden files can hold them.
"""

from __future__ import annotations

import collections
import difflib
import operator
import re
import types
from typing import Any

import torch
import torch.fx

from arfusion_pass.ops.marks import without_mark

_LINE = re.compile(r"^\s*%(?P<name>\S+) \[call_func\] (?P<target>[^(]+)\((?P<args>.*)\)  -> ")


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


def _shown(name: str, value: Any) -> Any:
    """A fused call's flags without its graph's mark, which every other all-reduce of the graph has a part in."""
    return without_mark(value) if name == "flags" and isinstance(value, int) else value


def op_counts(printed: str) -> collections.Counter[str]:
    """How often each op is called in a graph printed by :func:`print_graph`. ``auto_functionalized`` calls count
    under the op that they wrap; ``getitem`` is left out."""
    counts: collections.Counter[str] = collections.Counter()
    for line in printed.splitlines():
        match = _LINE.match(line)
        if match is None or match["target"] == "getitem":
            continue
        target = match["target"]
        if target.startswith("auto_functionalized"):
            target = match["args"].split(",")[0]
        counts[target] += 1
    return counts


def changed_ops(before: str, after: str) -> list[tuple[str, int, int]]:
    """(op, calls before, calls after) of every op whose number of calls changed, largest loss first."""
    old, new = op_counts(before), op_counts(after)
    changed = [(name, old[name], new[name]) for name in old.keys() | new.keys() if old[name] != new[name]]
    return sorted(changed, key=lambda row: (row[2] - row[1], row[0]))


def op_table(before: str, after: str) -> str:
    """:func:`changed_ops` as a table, and the totals."""
    rows = [*changed_ops(before, after), ("all calls", op_counts(before).total(), op_counts(after).total())]
    width = max(len("op"), *(len(name) for name, _, _ in rows))
    lines = [f"{'op':<{width}}  before  after  change"]
    lines += [f"{name:<{width}}  {b:>6}  {a:>5}  {a - b:>+6}" for name, b, a in rows]
    return "\n".join(lines) + "\n"


def line_matcher(before: list[str], after: list[str]) -> difflib.SequenceMatcher[str]:
    """Which lines of two printed graphs are the same. The number of a value's users is no difference of its line."""
    return difflib.SequenceMatcher(None, [*map(_without_users, before)], [*map(_without_users, after)], autojunk=False)


def unified(before: str, after: str, context: int = 2) -> str:
    """The unified diff of two printed graphs."""
    old, new = before.splitlines(), after.splitlines()
    lines = []
    for group in line_matcher(old, new).get_grouped_opcodes(context):
        first, last = group[0], group[-1]
        lines.append(f"@@ -{first[1] + 1},{last[2] - first[1]} +{first[3] + 1},{last[4] - first[3]} @@")
        for tag, a0, a1, b0, b1 in group:
            if tag == "equal":
                lines += [" " + line for line in new[b0:b1]]
            else:
                lines += ["-" + line for line in old[a0:a1]]
                lines += ["+" + line for line in new[b0:b1]]
    return "\n".join(lines) + "\n" if lines else ""


def graph_diff(before: str, after: str, context: int = 2) -> str:
    """What the pass changed: the table of op counts, an empty line, the unified diff.

    Args:
        before, after: graphs as :func:`print_graph` prints them (``FusionReport.before``, ``.after``).
        context: unchanged lines around each change.
    """
    if before == after:
        return "no change\n"
    return f"{op_table(before, after)}\n{unified(before, after, context)}"


def _without_users(line: str) -> str:
    return line.rsplit("  users=", 1)[0]


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
