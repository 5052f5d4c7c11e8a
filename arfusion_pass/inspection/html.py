"""One self-contained HTML page: the report, and each graph before and after the pass, side by side.

No script and no request to anywhere; opens from a file. jinja2 fills the page, difflib finds the differences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jinja2

from arfusion_pass.inspection.graph_diff import changed_ops, line_matcher
from arfusion_pass.reporting.reports import FusionReport
from arfusion_pass.reporting.tables import report_table

TITLE = "arfusion-pass: graphs before and after"

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
  body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem; color: #1f2328; }
  pre { background: #f6f8fa; padding: 1rem; overflow-x: auto; }
  table { border-collapse: collapse; }
  table.counts td, table.counts th { padding: 0 1rem 0 0; text-align: right; }
  table.counts td:first-child, table.counts th:first-child { text-align: left; font-family: ui-monospace, monospace; }
  table.diff { width: 100%; table-layout: fixed; font: 12px/1.5 ui-monospace, monospace; }
  table.diff td { vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere; padding: 0 .5rem; }
  table.diff td.n { width: 3rem; color: #8c959f; text-align: right; }
  .del { background: #ffebe9; } .add { background: #dafbe1; } .gap td { background: #ddf4ff; color: #57606a; }
</style></head><body>
<h1>{{ title }}</h1>
<pre>{{ table }}</pre>
{% for graph in graphs %}
<h2 id="graph-{{ loop.index0 }}">Graph {{ loop.index0 }}</h2>
{% if not graph.counts %}<p>{{ graph.note or "Unchanged." }}</p>{% else %}
<table class="counts"><tr><th>op</th><th>before</th><th>after</th><th>change</th></tr>
{% for name, before, after in graph.counts %}<tr><td>{{ name }}</td><td>{{ before }}</td><td>{{ after }}</td>\
<td>{{ "%+d" | format(after - before) }}</td></tr>
{% endfor %}</table>
<table class="diff"><colgroup><col style="width:3rem"><col><col style="width:3rem"><col></colgroup>
{% for row in graph.rows %}{% if row.gap %}<tr class="gap"><td colspan="4">{{ row.gap }} unchanged lines</td></tr>
{% else %}<tr><td class="n">{{ row.old_number }}</td><td class="{{ row.old_class }}">{{ row.old }}</td>\
<td class="n">{{ row.new_number }}</td><td class="{{ row.new_class }}">{{ row.new }}</td></tr>
{% endif %}{% endfor %}</table>{% endif %}
{% endfor %}
</body></html>
"""


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


def diff_page(reports: Sequence[FusionReport], title: str = TITLE, context: int = 3) -> str:
    """The page as text. Graphs appear where they were recorded (``FusionReport.before`` and ``.after``)."""
    graphs = []
    for report in reports:
        before, after = report.before or "", report.after or ""
        changed = changed_ops(before, after)
        graphs.append(
            {
                "note": report.note or (None if report.before else "The graph was not recorded."),
                "counts": changed,
                "rows": _rows(before.splitlines(), after.splitlines(), context) if changed else [],
            }
        )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_PAGE).render(title=title, table=report_table(reports, width=140), graphs=graphs)


def _rows(old: list[str], new: list[str], context: int) -> list[_Row]:
    rows: list[_Row] = []
    seen = 0
    for group in line_matcher(old, new).get_grouped_opcodes(context):
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
