"""The diff page."""

from __future__ import annotations

from html.parser import HTMLParser

from arfusion_pass.inspection.html import diff_page
from arfusion_pass.reporting.reports import FusionReport
from arfusion_pass.reporting.sites import Site

LINE = "  %{0} [call_func] aten.{0}.default(x)  -> float32[1]  users=1\n"


def page() -> str:
    before = "".join(LINE.format(name) for name in ("neg", *(f"same{i}" for i in range(20)), "cos"))
    after = before.replace("neg", "abs")
    site = Site("all_reduce", "0", fused=False, reason="the group is <unknown> & unregistered")
    return diff_page([FusionReport((site,), before=before, after=after), FusionReport(note="one rank")])


def test_it_is_well_formed_and_asks_for_nothing() -> None:
    opened: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert not {"src", "href"} & {name for name, _ in attrs}
            assert tag not in ("script", "link", "img", "iframe")
            if tag not in ("meta", "col"):
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Parser().feed(page())
    assert opened == []


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
