"""The report as text: which all-reduces were fused, which were missed, and why.

Sites that differ only in their names, their graph or a layer's number share a row, so that eighty layers are a handful
of lines. The same text is printed on a terminal and into a pipe: no colour, no control codes.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Sequence
from typing import Protocol

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from arfusion_pass.reporting.sites import Site


class GraphReport(Protocol):
    """What the text needs of an :class:`arfusion_pass.FusionReport`."""

    @property
    def sites(self) -> Sequence[Site]: ...
    @property
    def matched_count(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def note(self) -> str | None: ...
    @property
    def cached(self) -> bool: ...
    @property
    def graph_break(self) -> str | None: ...


NO_GRAPH = (
    "AllReduce fusion: the pass has seen no graph.\n"
    "Nothing was compiled while it was on (torch.compile compiles at the first call; a process that the program starts "
    "has it on where it enters arf.enable() itself), or a compile cache answered that "
    "holds no report (TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 compiles every graph again). Inductor runs the pass; "
    "another back-end's graphs are given to arf.fuse()."
)


def report_table(reports: Sequence[GraphReport], width: int | None = None) -> str:
    """The reports of any number of graphs as one text: a summary line, the fused sites, the missed sites and why.

    Args:
        reports: one per graph, numbered from 0 in the order given.
        width: columns; None: the terminal's, 120 where there is none.
    """
    if not reports:
        return NO_GRAPH
    out = io.StringIO()
    columns = width or shutil.get_terminal_size((120, 24)).columns
    console = Console(file=out, width=max(columns, 60), color_system=None, force_terminal=False, emoji=False)
    console.print(Text(_summary(reports)))
    for number, report in enumerate(reports):
        if report.note:
            console.print(Text(f"graph {number}: {report.note}"))
    for where in _breaks(reports):
        console.print(Text(f"graph break: {where}"))

    for title, wanted, columns_of in (("fused", True, _FUSED), ("missed", False, _MISSED)):
        rows = _rows(reports, wanted, columns_of)
        if rows:
            console.print(_table(title, ["graph", "where", *columns_of], rows, console.width))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).rstrip()


COMMON = ("tensor", "epsilon")
"""Columns that are said once, above the table, where all rows say the same."""
SENTENCE, FIRST, GAP = 36, len(" sites "), 3
"""The least width of a column of sentences; the first column's with the table's edges; what parts two columns."""

_NODE = re.compile(r"\w+ \(([\w.]+)\)")
"""``name (target)``: the target alone is the same in every layer."""
_Columns = dict[str, Callable[[Site], str]]


def _tensor(site: Site) -> str:
    """With a space, so that a narrow column breaks there."""
    return f"{site.dtype or ''} [{','.join(map(str, site.shape))}]" if site.shape else site.dtype or ""


def _pattern(site: Site) -> str:
    """The pattern, its quantiser and its strategy, each on lines of its own."""
    return "\n".join(filter(None, (site.pattern, site.quantiser, (site.strategy or "").replace(", ", ",\n"))))


def _why(site: Site) -> str:
    reason = site.reason or "no reason given"
    return f"{reason}\nTo do: {site.advice}" if site.advice else reason


_FUSED: _Columns = {
    "pattern": lambda site: _pattern(site),
    "tensor": _tensor,
    "epsilon": lambda site: "a value" if site.epsilon_input else "" if site.epsilon is None else f"{site.epsilon:.6g}",
    "quantiser left alone": lambda site: "" if site.note is None else _NODE.sub(r"\1", site.note),
    "moved": lambda site: "; ".join(_NODE.sub(r"\1", step) for step in site.moved),
    "outputs": lambda site: ", ".join(name.removesuffix("_out") for name in site.outputs),
    "chain": lambda site: "" if site.chain_length is None else str(site.chain_length),
    "bytes": lambda site: _bytes(site),
    "group": lambda site: site.group,
}
_MISSED: _Columns = {
    "why": _why,
    "tensor": _tensor,
    "group": lambda site: site.group,
}


def _summary(reports: Sequence[GraphReport]) -> str:
    total = sum(len(report.sites) for report in reports)
    matched = sum(report.matched_count for report in reports)
    seconds = sum(report.seconds for report in reports if not report.cached)
    cached = sum(report.cached for report in reports)
    graphs = "1 graph" if len(reports) == 1 else f"{len(reports)} graphs"
    took = "cached" if cached == len(reports) else f"{seconds:.2f} s{f', {cached} cached' if cached else ''}"
    if not total:
        return f"AllReduce fusion: no all-reduce in {graphs} ({took})"
    missed = f"{total - matched} missed" if total > matched else "none missed"
    return f"AllReduce fusion: {matched} of {total} sites fused, {missed}, in {graphs} ({took})"


def _breaks(reports: Sequence[GraphReport]) -> list[str]:
    """The graph breaks that a reader looks for: where something was missed, or there is no all-reduce at all."""
    total = sum(len(report.sites) for report in reports)
    wanted = not total or any(len(report.sites) > report.matched_count for report in reports)
    return [*dict.fromkeys(report.graph_break for report in reports if report.graph_break)] if wanted else []


def _bytes(site: Site) -> str:
    """What a call moves, and by how much that is less than the unfused ops move."""
    if not site.bytes_fused or not site.bytes_unfused:
        return ""
    return f"{_short_bytes(site.bytes_fused)} ({site.bytes_fused / site.bytes_unfused - 1:+.0%})"


def _short_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def layers(module: str) -> str:
    """A module's path without the numbers in it: ``layers.*.mlp``."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def place(sites: Sequence[Site]) -> str:
    """Where sites of one row stand: their module and line; their all-reduces' names where neither is known."""
    modules = [*dict.fromkeys(site.module for site in sites)]
    module = (modules[0] if len(modules) == 1 else layers(modules[0] or "")) or ""
    source = sites[0].source
    if source is None:
        return f"{module}\n{_short([site.name for site in sites])}".strip()
    return f"{module}\n{source.place}".strip()


def _rows(reports: Sequence[GraphReport], fused: bool, columns: _Columns) -> dict[tuple[str, ...], list[Site]]:
    """Cells of a row -> the sites that share them, in graph order; graphs and places are put in front of the cells."""
    grouped: dict[tuple[str, ...], tuple[list[Site], list[int]]] = {}
    for number, report in enumerate(reports):
        for site in report.sites:
            if site.fused == fused:
                where = (layers(site.module or ""), "" if site.source is None else site.source.place)
                cells = (*where, *(cell(site) for cell in columns.values()))
                sites, numbers = grouped.setdefault(cells, ([], []))
                sites.append(site)
                numbers.append(number)
    return {
        (ranges(numbers) if len(reports) > 1 else "", place(sites), *cells[2:], str(index)): sites
        for index, (cells, (sites, numbers)) in enumerate(grouped.items())
    }


def ranges(numbers: list[int]) -> str:
    """``0-3, 7`` for graphs 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _table(title: str, headers: list[str], rows: dict[tuple[str, ...], list[Site]], width: int) -> Table:
    """Rows as columns where every word of them fits into ``width``, else as paragraphs: no word is ever cut."""
    cells = [[row[index] for row in rows] for index in range(len(headers))]
    shown = [i for i, values in enumerate(cells) if any(values) and (headers[i] != "group" or len(set(values)) > 1)]
    common = [i for i in shown if headers[i] in COMMON and len(rows) > 1 and len(set(cells[i])) == 1]
    shown = [index for index in shown if index not in common]
    if common:
        title += ", all with " + ", ".join(f"{headers[index]} {cells[index][0]}" for index in common)
    counts = [str(len(sites)) for sites in rows.values()]
    widths = _widths([headers[index] for index in shown], [cells[index] for index in shown], width - FIRST)
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="", pad_edge=False)
    table.add_column("sites", justify="right", no_wrap=True)
    if widths is None:
        table.add_column("")
        for count, row in zip(counts, rows, strict=True):
            table.add_row(Text(count), Text(_paragraph({headers[index]: row[index] for index in shown})))
        return table
    for index, column in zip(shown, widths, strict=True):
        table.add_column(headers[index], width=column)
    for count, row in zip(counts, rows, strict=True):
        table.add_row(Text(count), *(Text(row[index]) for index in shown))  # Text, not str: "[...]" is no markup
    return table


def _widths(headers: list[str], cells: list[list[str]], width: int) -> list[int] | None:
    """Of each column: that of its longest word, more where there is room, up to its longest line; None where even the
    words do not fit."""
    texts = [[header, *values] for header, values in zip(headers, cells, strict=True)]
    least = [max(len(word) for text in column for word in text.split()) for column in texts]
    least = [max(SENTENCE, size) if header == "why" else size for header, size in zip(headers, least, strict=True)]
    most = [max(len(line) for text in column for line in text.split("\n")) for column in texts]
    spare = width - sum(least) - GAP * len(headers)
    if spare < 0:
        return None
    widths = list(least)
    for index in sorted(range(len(headers)), key=lambda index: most[index]):  # a sentence takes what is left
        extra = max(0, min(spare, most[index] - least[index]))
        widths[index] += extra
        spare -= extra
    return widths


def _paragraph(row: dict[str, str]) -> str:
    """The cells of a row below one another: where, then what or why, then everything else that has a value."""
    where = row.pop("where").replace("\n", "  ")
    what = row.pop("why") if "why" in row else row.pop("pattern").replace(",\n", ", ").replace("\n", ", ")
    rest = "; ".join(value if header == "tensor" else f"{header} {value}" for header, value in row.items() if value)
    return "\n".join(filter(None, (where, what, rest)))


def _short(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} ... {names[-1]}"
