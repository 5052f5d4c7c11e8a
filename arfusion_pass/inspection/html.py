"""One self-contained HTML page a rank: every site, its subgraph before and after, and each graph side by side.

No request to anywhere; opens from a file, light and dark, on a phone too. jinja2 fills the templates beside this file,
difflib finds the differences.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from arfusion_pass.inspection import excerpts
from arfusion_pass.inspection.graph_diff import changed_ops, line_matcher
from arfusion_pass.reporting.reports import FusionReport, Reports
from arfusion_pass.reporting.sites import Site
from arfusion_pass.reporting.tables import ranges, report_table

CONTEXT = 3
"""Unchanged lines shown around a change."""

UNRECORDED = "The graph was not recorded."
CACHED = "From a compile cache, which kept the report and not the graph."

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
)


@dataclasses.dataclass(frozen=True)
class _Row:
    """One line of the side-by-side view; ``gap`` > 0 stands for that many unchanged lines."""

    old: str = ""
    new: str = ""
    old_number: str = ""
    new_number: str = ""
    old_class: str = ""
    new_class: str = ""
    gap: int = 0


def diff_page(reports: Sequence[FusionReport], replays: Mapping[tuple[int, str], str] | None = None) -> str:
    """The page as text. Graphs appear where they were recorded (``FusionReport.before`` and ``.after``).

    Args:
        reports: one a graph.
        replays: what a replay of a site found (``"exact"``, or what differs), by graph's place and site's name.
    """
    graphs: list[dict[str, Any]] = []
    sites: list[dict[str, Any]] = []
    notes: dict[str, list[int]] = {}
    for number, report in enumerate(reports):
        before, after = report.before or "", report.after or ""
        changed = changed_ops(before, after)
        graphs.append(
            {
                "number": number,
                "note": report.note or (None if report.before else CACHED if report.cached else UNRECORDED),
                "shown": bool(report.before or report.note),
                "counts": changed,
                "rows": _rows(_lines_of(before), _lines_of(after)) if changed else [],
            }
        )
        sites += _sites(number, report, replays or {})
        said = [graphs[-1]["note"], report.graph_break and f"A graph break: {report.graph_break}."]
        notes.setdefault(" ".join(filter(None, said)), []).append(number)
    summary = report_table(reports, width=140).partition("\n")[0]
    template = _TEMPLATES.get_template("page.html.jinja")
    told = [
        f"{'Graph' if len(which) == 1 else 'Graphs'} {ranges(which)}: {note}" for note, which in notes.items() if note
    ]
    return template.render(summary=summary, notes=told, graphs=graphs, sites=sites)


def index_page(folder: Path) -> str:
    """A page over the ranks' folders below ``folder``: those that hold a ``report.json`` and a ``diff.html``."""
    rows = []
    for path in sorted(folder.glob("*/report.json"), key=lambda path: (len(path.parent.name), path.parent.name)):
        reports = Reports(FusionReport.from_dict(data) for data in json.loads(path.read_text()))
        rows.append(
            {
                "name": path.parent.name,
                "page": f"{path.parent.name}/diff.html",
                "graphs": len(reports),
                "sites": len(reports.fused) + len(reports.missed),
                "fused": len(reports.fused),
            }
        )
    alike = len({(row["graphs"], row["sites"], row["fused"]) for row in rows}) <= 1
    summary = "All ranks fused alike." if alike else "The ranks did not fuse alike: they run different graphs."
    return _TEMPLATES.get_template("index.html.jinja").render(summary=summary, rows=rows)


def _sites(number: int, report: FusionReport, replays: Mapping[tuple[int, str], str]) -> Iterator[dict[str, Any]]:
    before, after = excerpts.lines(report.before_code or ""), excerpts.lines(report.after_code or "")
    for site in report.sites:
        halves = [("before", excerpts.replaced(before, (site.name, *site.nodes)))]
        if site.fused:
            halves.append(("after", excerpts.written(after, site.call)))
        yield {
            "id": f"graph-{number}-{site.name}",
            "fused": site.fused,
            "verdict": "fused" if site.fused else "missed",
            "layer": site.module or site.name,
            "place": site.source.place if site.source else "",
            "tensor": f"{site.dtype or ''}[{', '.join(map(str, site.shape))}]" if site.shape else site.dtype or "",
            "bytes": _bytes(site),
            "replay": replays.get((number, site.name), ""),
            "lines": _lines(site),
            "halves": [
                {"title": title, "code": excerpts.code_of(part), "drawing": excerpts.drawing(part)}
                for title, part in halves
                if part
            ],
        }


def _bytes(site: Site) -> str:
    if site.bytes_unfused is None or site.bytes_fused is None:
        return ""
    return f"{site.bytes_unfused / 1e3:,.1f} to {site.bytes_fused / 1e3:,.1f} kB"


def _lines(site: Site) -> list[str]:
    """What the unfolded site says in sentences."""
    if not site.fused:
        return [line for line in (site.reason, site.advice) if line]
    facts = [site.pattern or "", f"writes {', '.join(name.removesuffix('_out') for name in site.outputs)}"]
    place = "" if site.epsilon_source is None else f" ({site.epsilon_source.place})"
    facts += [f"epsilon {site.epsilon:.6g}{place}"] if site.epsilon is not None else []
    facts += [f"epsilon of {site.epsilon_input}{place}"] if site.epsilon_input else []
    facts += [site.quantiser] if site.quantiser else []
    facts += [site.strategy] if site.strategy else []
    facts += [f"site of chain {site.chain}, {site.chain_length} long"] if site.chain is not None else []
    return [line for line in ("; ".join(facts) + ".", site.note) if line]


def _lines_of(printed: str) -> list[str]:
    """The printed graph's lines without what each of them says: that it is a call."""
    return printed.replace(" [call_func]", "").replace("[placehold]", "[placeholder]").splitlines()


def _rows(old: list[str], new: list[str]) -> list[_Row]:
    rows: list[_Row] = []
    seen = 0
    for group in line_matcher(old, new).get_grouped_opcodes(CONTEXT):
        if group[0][1] > seen:
            rows.append(_Row(gap=group[0][1] - seen))
        for tag, a0, a1, b0, b1 in group:
            for offset in range(max(a1 - a0, b1 - b0)):
                a, b = a0 + offset, b0 + offset
                rows.append(
                    _Row(
                        old=old[a] if a < a1 else "",
                        new=new[b] if b < b1 else "",
                        old_number=str(a + 1) if a < a1 else "",
                        new_number=str(b + 1) if b < b1 else "",
                        old_class="del" if tag != "equal" and a < a1 else "",
                        new_class="add" if tag != "equal" and b < b1 else "",
                    )
                )
        seen = group[-1][2]
    if len(old) > seen:
        rows.append(_Row(gap=len(old) - seen))
    return rows
