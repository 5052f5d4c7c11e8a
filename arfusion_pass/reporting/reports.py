"""What the pass did to each graph: its :class:`Site` list, as data, as JSON and, printed, as a table."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from arfusion_pass.reporting.sites import Site

SCHEMA = 1
"""Version of a report's JSON. It changes where a key goes or means something else; a new key changes nothing."""


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """All all-reduces of one graph, in graph order.

    Attributes:
        sites: one entry for every all-reduce.
        seconds: what the pass took.
        note: why the whole graph was left alone (an unexpected error), or the other collectives of one without an
            all-reduce; else None.
        graph: number of the graph among those that the pass has seen in this process, from 0.
        compile_id: torch's own name of the compilation (``"0/0"``), as in its logs and in tlparse; None outside of one.
        graph_break: the line at which Dynamo ended the graph before its function ended, and why; None where it did not.
        rank: of the process in the default group; None where there is no group.
        cached: whether the graph came from a compile cache and this is the report that was stored with it.
        shared: whether an engine gave this graph the code of an equal one before it, whose report this is but for the
            modules: the pass was called once for both.
        before, after: the graph as printed before and after; filled only where recording is on
            (:func:`arfusion_pass.inspection.recording`).
        before_code, after_code: the same as Python, with the user's lines as comments.
    """

    sites: tuple[Site, ...] = ()
    seconds: float = 0.0
    note: str | None = None
    graph: int = 0
    compile_id: str | None = None
    rank: int | None = None
    cached: bool = False
    shared: bool = False
    graph_break: str | None = None
    before: str | None = dataclasses.field(default=None, repr=False)
    after: str | None = dataclasses.field(default=None, repr=False)
    before_code: str | None = dataclasses.field(default=None, repr=False)
    after_code: str | None = dataclasses.field(default=None, repr=False)

    @property
    def fused(self) -> tuple[Site, ...]:
        """The sites that were replaced."""
        return tuple(site for site in self.sites if site.fused)

    @property
    def missed(self) -> tuple[Site, ...]:
        """The sites that were left alone, each with a reason."""
        return tuple(site for site in self.sites if not site.fused)

    @property
    def matched_count(self) -> int:
        """How many all-reduces were replaced."""
        return len(self.fused)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: ``version`` (:data:`SCHEMA`), the attributes but the graphs, the sites in full."""
        return {
            "version": SCHEMA,
            "graph": self.graph,
            "compile_id": self.compile_id,
            "rank": self.rank,
            "cached": self.cached,
            "shared": self.shared,
            "graph_break": self.graph_break,
            "matched_count": self.matched_count,
            "seconds": self.seconds,
            "note": self.note,
            "sites": [dataclasses.asdict(site) for site in self.sites],
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> FusionReport:
        """The report that :meth:`to_dict` wrote. Keys that this package does not know are ignored.

        Raises:
            ValueError: where it was written by a later version of the package, whose keys mean something else.
        """
        if data.get("version", SCHEMA) > SCHEMA:
            raise ValueError(f"a report of version {data['version']}; this package reads versions up to {SCHEMA}")
        known = {field.name for field in dataclasses.fields(FusionReport)}
        values: dict[str, Any] = {name: value for name, value in data.items() if name in known}
        return FusionReport(**{**values, "sites": tuple(Site.from_dict(site) for site in data.get("sites", ()))})

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        from arfusion_pass.reporting.tables import report_table

        return report_table([self])


class Reports(tuple[FusionReport, ...]):
    """The reports of several graphs; prints as one table."""

    @property
    def fused(self) -> tuple[Site, ...]:
        """The fused sites of all graphs."""
        return tuple(site for report in self for site in report.fused)

    @property
    def missed(self) -> tuple[Site, ...]:
        """The missed sites of all graphs."""
        return tuple(site for report in self for site in report.missed)

    @property
    def matched_count(self) -> int:
        """How many all-reduces were replaced over all graphs."""
        return len(self.fused)

    def __str__(self) -> str:
        from arfusion_pass.reporting.tables import report_table

        return report_table(list(self))
