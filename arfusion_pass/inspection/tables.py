"""The report as text: which all-reduces were fused, which were missed, and why.

Sites that differ only in their names share a row, so that eighty layers are a handful of lines. The same text is
printed on a terminal and into a pipe: no colour, no control codes.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from arfusion_pass.report import FusionReport, Site

NO_GRAPH = (
    "AllReduce fusion: the pass has seen no graph.\n"
    "Nothing was compiled while it was on, or a compile cache answered (on a hit the pass is not called; "
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 shows every graph)."
)


def report_table(reports: Sequence[FusionReport], width: int | None = None) -> str:
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

    fused = _group(reports, lambda site: site.fused, _fused_key)
    if fused:
        table = _table("fused", ["graph", "sites", "pattern", "dtype", "epsilon", "quantiser", "outputs", "group"])
        for (number, *cells), names in fused.items():
            table.add_row(*_row(number, str(len(names)), *cells, _short(names)))
        console.print(table)

    missed = _group(reports, lambda site: not site.fused, _missed_key)
    if missed:
        table = _table("missed", ["graph", "sites", "why", "dtype", "group"])
        for (number, *cells), names in missed.items():
            table.add_row(*_row(number, str(len(names)), *cells, _short(names)))
        console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).rstrip()


def _summary(reports: Sequence[FusionReport]) -> str:
    total = sum(len(report.sites) for report in reports)
    matched = sum(report.matched_count for report in reports)
    seconds = sum(report.seconds for report in reports)
    graphs = "1 graph" if len(reports) == 1 else f"{len(reports)} graphs"
    if not total:
        return f"AllReduce fusion: no all-reduce in {graphs} ({seconds:.2f} s)"
    missed = f"{total - matched} missed" if total > matched else "none missed"
    return f"AllReduce fusion: {matched} of {total} sites fused, {missed}, in {graphs} ({seconds:.2f} s)"


def _table(title: str, headers: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="", pad_edge=False)
    for header in headers:
        right = header in ("graph", "sites")
        table.add_column(header, justify="right" if right else "left", no_wrap=right, overflow="fold")
    table.add_column("all-reduce", overflow="fold")
    return table


def _fused_key(site: Site) -> tuple[str, ...]:
    epsilon = "" if site.epsilon is None else f"{site.epsilon:.6g}"
    outputs = ", ".join(name.removesuffix("_out") for name in site.outputs)
    return (site.pattern or "", site.dtype or "", epsilon, site.quantiser or "-", outputs, site.group)


def _missed_key(site: Site) -> tuple[str, ...]:
    return (site.reason or "no reason given", site.dtype or "", site.group)


def _group(
    reports: Sequence[FusionReport], wanted: Callable[[Site], bool], key: Callable[[Site], tuple[str, ...]]
) -> dict[tuple[str, ...], list[str]]:
    """(graph number, *cells) -> names of the all-reduces that share them, in graph order."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for number, report in enumerate(reports):
        for site in report.sites:
            if wanted(site):
                groups.setdefault((str(number), *key(site)), []).append(site.name)
    return groups


def _short(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} ... {names[-1]}"


def _row(*cells: str) -> list[Text]:
    return [Text(cell) for cell in cells]  # Text: a "[...]" in a reason is no markup
