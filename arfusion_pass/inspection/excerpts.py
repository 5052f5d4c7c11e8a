"""One site's part of a readable graph (:mod:`arfusion_pass.reporting.printing`): its lines of code, and a drawing.

::

    # model.py:13 in forward: r = r + y
    add: "bf16[8, 64]" = torch.ops.aten.add.Tensor(arg2_1, wait_tensor)
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable

import markupsafe

_ASSIGNMENT = re.compile(
    r'^ {4}(?P<name>\w+)(?:: "(?P<type>[^"]*)")? = (?P<value>.*?)(?:;  (?P<freed>[\w ]+(?:= \w+ )*= None))?$'
)
_COMMENT = re.compile(r"^ {4}# File: (?P<file>.*):(?P<line>\d+) in (?P<function>.*?), code: (?P<code>.*)$")
_NAME = re.compile(r"\b[a-z_]\w*\b")
_OP = re.compile(r"(?:torch\.ops\.)?((?:\w+\.)+\w+)\(")

ROW, LEFT, BOW = 22, 70, 12
"""Pixels of the drawing: between two nodes, from the left edge to the nodes, of an edge's bow a node that it passes."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One node: ``name = value``, its type as printed (``bf16[8, 64]``), and the comment in front of it."""

    name: str
    value: str
    type: str
    comment: str

    @property
    def label(self) -> str:
        """The op without its namespace's ceremony: ``aten.add.Tensor``; of a fused call the op that it wraps."""
        wrapped = re.search(r"auto_functionalized\w*\(torch\.ops\.([\w.]+)", self.value)
        found = wrapped or _OP.match(self.value)
        return found[1].removesuffix(".default") if found else self.value


def lines(code: str) -> dict[str, Line]:
    """The nodes of a readable graph by name, in order."""
    found: dict[str, Line] = {}
    comment = ""
    for text in code.splitlines():
        if match := _COMMENT.match(text):
            place = f"{os.path.basename(match['file'])}:{match['line']}"
            comment = f"# {place} in {match['function']}: {match['code']}"
        elif match := _ASSIGNMENT.match(text):
            found[match["name"]] = Line(match["name"], match["value"], match["type"] or "", comment)
    return found


def replaced(before: dict[str, Line], names: Iterable[str]) -> list[Line]:
    """The nodes called ``names``, in the graph's order."""
    wanted = set(names)
    return [line for name, line in before.items() if name in wanted]


def written(after: dict[str, Line], call: str | None) -> list[Line]:
    """A fused call, the buffers that it fills, and what is taken out of it."""
    line = after.get(call or "")
    if line is None:
        return []
    read = set(_NAME.findall(line.value))
    buffers = [other for other in after.values() if other.name in read and "aten.empty" in other.value]
    return [*buffers, line, *(other for other in after.values() if other.value.startswith(f"{call}["))]


def code_of(part: Iterable[Line]) -> str:
    """The lines as code, each comment once."""
    text: list[str] = []
    comment = ""
    for line in part:
        if line.comment and line.comment != comment:
            text.append(line.comment)
        comment = line.comment
        annotation = f': "{line.type}"' if line.type else ""
        text.append(f"{line.name}{annotation} = {line.value}")
    return "\n".join(text)


def drawing(part: list[Line]) -> markupsafe.Markup:
    """The lines as SVG: a column of nodes in order, an arc for each value that one of them reads from another."""
    place = {line.name: index for index, line in enumerate(part)}
    shapes = []
    for index, line in enumerate(part):
        for name in dict.fromkeys(_NAME.findall(line.value)):
            if place.get(name, index) < index:
                start, end = (place[name] + 0.5) * ROW, (index + 0.5) * ROW
                bow = LEFT - min(LEFT - 4, BOW * (index - place[name]))
                shapes.append(f'<path d="M{LEFT} {start} C{bow} {start} {bow} {end} {LEFT} {end}"/>')
    for index, line in enumerate(part):
        y = (index + 0.5) * ROW
        label = markupsafe.escape(line.label)
        shape = markupsafe.escape(line.type)
        shapes.append(
            f'<circle cx="{LEFT}" cy="{y}" r="4"/><text x="{LEFT + 12}" y="{y + 4}">{label}'
            f' <tspan class="type">{shape}</tspan></text>'
        )
    width = LEFT + 24 + 8 * max((len(line.label) + len(line.type) for line in part), default=0)
    return markupsafe.Markup(
        f'<svg width="{width}" height="{ROW * len(part)}" role="img">{"".join(map(str, shapes))}</svg>'
    )
