"""The diff page."""

from __future__ import annotations

import html
from html.parser import HTMLParser
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

from arfusion_pass import testing
from arfusion_pass.inspection.dump import write_reports
from arfusion_pass.inspection.html import diff_page, index_page
from arfusion_pass.reporting.reports import FusionReport, Reports
from arfusion_pass.reporting.sites import Site


class Two(torch.nn.Module):
    """One site that fuses, one that is clamped before its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(64, eps=1e-6)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        reduced = funcol.all_reduce(x, "sum", dist.group.WORLD)
        residual = residual + reduced
        hidden = self.norm(residual)
        clamped = funcol.all_reduce(hidden, "sum", dist.group.WORLD).clamp(-1, 1)
        return self.norm(residual + clamped), residual


LINE = "  %{0} [call_func] aten.{0}.default(x)  -> float32[1]  users=1\n"


def page() -> str:
    before = "".join(LINE.format(name) for name in ("neg", *(f"same{i}" for i in range(20)), "cos"))
    after = before.replace("neg", "abs")
    site = Site("all_reduce", "0", fused=False, reason="the group is <unknown> & unregistered")
    return diff_page([FusionReport((site,), before=before, after=after), FusionReport(note="one rank")])


def test_it_is_well_formed_and_asks_for_nothing() -> None:
    """Links stay on the page, and what is drawn or run lies in it."""
    opened: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = dict(attrs)
            assert "src" not in given
            assert (given.get("href") or "#").startswith("#")
            assert tag not in ("link", "img", "iframe")
            if tag not in ("meta", "col", "input", "path", "circle"):
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("path", "circle"):
                assert opened.pop() == tag

    Parser().feed(page())
    assert opened == []
    assert "http" not in page()


def test_a_site_unfolds_to_its_subgraph(world: None) -> None:
    """What stood there, with the user's line, and the call that stands there now, drawn; a missed site says why."""
    (report,) = testing.capture(Two(), torch.ones(4, 64), torch.ones(4, 64)).reports
    fused, missed = report.sites
    text = diff_page([report], replays={(0, fused.name): "exact"})
    body = text.partition(f'id="graph-0-{fused.name}"')[2].partition("</details>")[0]
    assert "residual = residual + reduced" in html.unescape(body)
    assert "torch.ops.arfusion.allreduce_rms_norm.default" in body
    assert body.count("<svg") == 2
    assert ">exact<" in body
    other = text.partition(f'id="graph-0-{missed.name}"')[2].partition("</details>")[0]
    assert missed.reason in html.unescape(other)
    assert "torch.ops.arfusion" not in other


def test_the_index_tells_ranks_apart(tmp_path: Path) -> None:
    """One row a rank, and a sentence where they did not fuse alike."""
    for rank, fused in enumerate((True, True, False)):
        folder = tmp_path / f"rank{rank}"
        folder.mkdir()
        write_reports(folder, Reports([FusionReport((Site("all_reduce", "0", fused=fused, reason="so"),))]))
        text = index_page(tmp_path)
        assert ("fused alike" in text) == ("did not" not in text)
        assert ("did not fuse alike" in text) == (rank == 2)
        assert f"rank{rank}/diff.html" in text


def test_graphs_that_say_the_same_say_it_once() -> None:
    """A start from a cache has a report for each graph and no graph: eighty are one line, and no empty sections."""
    text = diff_page([FusionReport(cached=True, graph=number) for number in range(80)])
    assert text.count("From a compile cache") == 1
    assert "Graphs 0-79: From" in text
    assert "<h2" not in text
    broken = diff_page([FusionReport(graph_break="a.py:1")])
    assert "Graph 0: The graph was not recorded. A graph break: a.py:1." in broken


def test_differences_are_marked_and_gaps_counted() -> None:
    text = page()
    assert '<td class="del">  %neg' in text
    assert '<td class="add">  %abs' in text
    assert "18 unchanged lines" in text
    assert "%cos" not in text


def test_text_is_escaped() -> None:
    assert "&lt;unknown&gt; &amp; unregistered" in page()


def test_a_graph_without_recording_says_why() -> None:
    assert "one rank" in page()
    assert "was not recorded" in diff_page([FusionReport()])
