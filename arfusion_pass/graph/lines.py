"""A node in the words of the user's code."""

from __future__ import annotations

from torch import fx

from arfusion_pass.source import Source, line_of

_FARTHEST_READER = 4
"""Nodes between an input and a line that is said of it: a cast, an add and a view have none of their own."""


def describe(node: fx.Node) -> str:
    """A node for a reason's sentence: ``model.py:10 "return y + self.bias" (aten.add.Tensor)``, or ``name (target)``
    where nobody recorded its line. An input of the graph is known by the line that reads it."""
    if node.op == "output":
        return "the graph's output"
    source = line_of(node)
    if source is None and node.op == "placeholder":
        reader = nearest_line(node)
        return f"{node.name} ({node.target})" if reader is None else f"the input read by {reader}"
    return f"{node.name if source is None else source} ({node.target})"


def nearest_line(node: fx.Node) -> Source | None:
    """The user's line of the nearest reader that has one: a cast that a compiler put in has none."""
    readers, seen = [node], {node}
    for _ in range(_FARTHEST_READER):
        readers = [user for reader in readers for user in reader.users if user not in seen]
        seen.update(readers)
        if (line := next(filter(None, map(line_of, readers)), None)) is not None:
            return line
    return None
