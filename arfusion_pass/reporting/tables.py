"""The report as text: which all-reduces were fused, which were missed, and why.

Sites that differ only in their names share a row, so that eighty layers are a handful of lines. The same text is
printed on a terminal and into a pipe: no colour, no control codes.
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


NO_GRAPH = (
    "AllReduce fusion: the pass has seen no graph.\n"
    "Nothing was compiled while it was on, or a compile cache answered (on a hit the pass is not called; "
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 shows every graph)."
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

    for title, wanted, columns_of in (("fused", True, _FUSED), ("missed", False, _MISSED)):
        rows = _rows(reports, wanted, columns_of)
        if rows:
            console.print(_table(title, [*columns_of], rows))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).rstrip()


_NODE = re.compile(r"\w+ \(([\w.]+)\)")
"""``name (target)``: the target alone is the same in every layer."""
_Columns = dict[str, Callable[[Site], str]]
_FUSED: _Columns = {
    "pattern": lambda site: site.pattern or "",
    "dtype": lambda site: site.dtype or "",
    "epsilon": lambda site: "" if site.epsilon is None else f"{site.epsilon:.6g}",
    "quantiser": lambda site: site.quantiser or "",
    "quantiser left alone": lambda site: "" if site.note is None else _NODE.sub(r"\1", site.note),
    "outputs": lambda site: ", ".join(name.removesuffix("_out") for name in site.outputs),
    "chain of": lambda site: "" if site.chain_length is None else str(site.chain_length),
    "group": lambda site: site.group,
}
_MISSED: _Columns = {
    "why": lambda site: site.reason or "no reason given",
    "dtype": lambda site: site.dtype or "",
    "group": lambda site: site.group,
}


def _summary(reports: Sequence[GraphReport]) -> str:
    total = sum(len(report.sites) for report in reports)
    matched = sum(report.matched_count for report in reports)
    seconds = sum(report.seconds for report in reports)
    graphs = "1 graph" if len(reports) == 1 else f"{len(reports)} graphs"
    if not total:
        return f"AllReduce fusion: no all-reduce in {graphs} ({seconds:.2f} s)"
    missed = f"{total - matched} missed" if total > matched else "none missed"
    return f"AllReduce fusion: {matched} of {total} sites fused, {missed}, in {graphs} ({seconds:.2f} s)"


def _rows(reports: Sequence[GraphReport], fused: bool, columns: _Columns) -> dict[tuple[str, ...], list[str]]:
    """(graph number, *cells) -> names of the all-reduces that share them, in graph order."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for number, report in enumerate(reports):
        for site in report.sites:
            if site.fused == fused:
                cells = (str(number) if len(reports) > 1 else "", *(cell(site) for cell in columns.values()))
                rows.setdefault(cells, []).append(site.name)
    return rows


def _table(title: str, headers: list[str], rows: dict[tuple[str, ...], list[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="", pad_edge=False)
    table.add_column("sites", justify="right", no_wrap=True)
    table.add_column("all-reduce", overflow="fold")
    shown = [index for index in range(len(headers) + 1) if any(cells[index] for cells in rows)]
    for index in shown:
        header = "graph" if index == 0 else headers[index - 1]
        table.add_column(header, overflow="fold", no_wrap=header in ("pattern", "dtype", "epsilon"))
    for cells, names in rows.items():
        # Text, not str: a "[...]" in a reason is no markup
        table.add_row(Text(str(len(names))), Text(_short(names)), *(Text(cells[index]) for index in shown))
    return table


def _short(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} ... {names[-1]}"
