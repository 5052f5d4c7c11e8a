"""The difference that the pass made to a graph, as text.

:func:`graph_diff` compares two graphs as :func:`arfusion_pass.reporting.printing.print_graph` prints them: a table of
op counts, then a unified diff. Both are deterministic, so that golden files can hold them.
"""

from __future__ import annotations

import collections
import difflib
import re

from arfusion_pass.reporting.printing import print_graph as print_graph

_LINE = re.compile(r"^\s*%(?P<name>\S+) \[call_func\] (?P<target>[^(]+)\((?P<args>.*)\)  -> ")


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
        before: a graph as :func:`print_graph` prints it (``FusionReport.before``).
        after: the same after the pass (``FusionReport.after``).
        context: unchanged lines around each change.
    """
    if before == after:
        return "no change\n"
    return f"{op_table(before, after)}\n{unified(before, after, context)}"


def _without_users(line: str) -> str:
    return line.rsplit("  users=", 1)[0]
