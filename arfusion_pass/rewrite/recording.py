"""Who watches the rewrites: the pass shows its recorder each plan before it is written, and each call after.

:func:`arfusion_pass.inspection.recording` is the one that replays fused sites; :class:`Printed` keeps the graphs alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from torch import fx

from arfusion_pass.rewrite.planning import Plan


class Recorder(Protocol):
    """What the pass asks of a recorder, in this order, for each graph."""

    def take(self, plan: Plan) -> Any:
        """Copy what a plan is about to replace, while it still stands in the graph."""

    def mark(self, taken: list[Any], calls: list[fx.Node]) -> None:
        """See the written calls, one for each plan taken."""

    def add(self, report: Any, taken: list[Any]) -> None:
        """Keep the graph's :class:`arfusion_pass.FusionReport`."""


class Printed:
    """A recorder of reports with their graphs, and of nothing that the graphs run on.

    Attributes:
        reports: one for each graph.
    """

    def __init__(self) -> None:
        self.reports: list[Any] = []

    def take(self, plan: Plan) -> None:
        """Nothing of a plan is kept."""

    def mark(self, taken: list[Any], calls: list[fx.Node]) -> None:
        """No call is marked: none is observed when it runs."""

    def add(self, report: Any, taken: list[Any]) -> None:
        """Keep a graph's report."""
        self.reports.append(report)


_active: list[Recorder] = []


@contextlib.contextmanager
def watching(recorder: Recorder) -> Iterator[None]:
    """Show ``recorder`` every rewrite inside. Inductor's caches do not keep such graphs."""
    _active.append(recorder)
    try:
        yield
    finally:
        _active.remove(recorder)


def active() -> Recorder | None:
    """The innermost recorder, or None."""
    return _active[-1] if _active else None
