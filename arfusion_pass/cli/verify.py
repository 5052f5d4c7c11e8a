"""``arfusion verify``: read the folder that ``ARFUSION_DUMP`` filled and say, layer by layer, what was fused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

from arfusion_pass.reporting.reports import FusionReport, Reports


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a folder says.

    Attributes:
        reports: of the first rank.
        ranks: the folders that were read, by name.
        problems: sentences on what should not be: no report, nothing fused, ranks that disagree.
    """

    reports: Reports
    ranks: tuple[str, ...]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        if not self.ranks:
            return "\n".join(self.problems)
        who = f"{len(self.ranks)} ranks alike" if len(self.ranks) > 1 and not self.problems else f"of {self.ranks[0]}"
        return "\n".join([f"{self.reports}", f"({who})", *(f"problem: {problem}" for problem in self.problems)])


def read(folder: Path) -> Verdict:
    """The reports in ``folder``: its own, or those of the folders in it, one a rank.

    Raises:
        ValueError: where there is no such folder, or a report in it cannot be read.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"there is no folder {folder}: start the server with ARFUSION_DUMP={folder}")
    files = sorted([*folder.glob("report.json"), *folder.glob("*/report.json")], key=_by_rank)
    found = {str(path.parent.relative_to(folder)): _load(path) for path in files}
    if not found:
        return Verdict(Reports(), (), (f"{folder} holds no report: no graph was compiled with the pass on",))
    names = tuple(found)
    first = found[names[0]]
    problems = []
    if not first.matched_count:
        problems.append("nothing was fused")
    for name in names[1:]:
        if _what(found[name]) != _what(first):
            problems.append(f"{name} fused {found[name].matched_count} sites otherwise than {names[0]} did")
    return Verdict(first, names, tuple(problems))


def _by_rank(path: Path) -> tuple[list[int], str]:
    return [int(digits) for digits in re.findall(r"\d+", path.parent.name)], path.parent.name


def _load(path: Path) -> Reports:
    try:
        return Reports(FusionReport.from_dict(data) for data in json.loads(path.read_text()))
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no report of this package: {error}") from error


def _what(reports: Reports) -> list[tuple[object, ...]]:
    return [(site.module, site.name, site.fused, site.pattern) for report in reports for site in report.sites]
