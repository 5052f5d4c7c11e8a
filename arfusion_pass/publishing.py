"""What becomes of a report: it is kept for ``arf.reports()``, logged, put into torch's trace, written to a folder, and
stored beside Inductor's cache, where a warm start finds it (vLLM's: :mod:`arfusion_pass.engines.vllm_reports`).

Nothing here may stop a compilation: what fails is left out.

* The logger ``arfusion_pass``: one line a graph at INFO on rank 0 (DEBUG on the others). ``ARFUSION_LOG=info`` shows
  it on stderr.
* ``TORCH_TRACE``: the report as artefact ``arfusion_report``, as text and as JSON; tlparse shows both.
* ``ARFUSION_DUMP=DIR``: everything that :mod:`arfusion_pass.inspection.dump` writes, in a folder a rank.
* ``arfusion/`` in Inductor's cache folder (``TORCHINDUCTOR_CACHE_DIR``): the reports of each graph that Dynamo hands
  over, and of each that AOT autograd makes of it, by a hash of that graph and of the pass's own cache key.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import importlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from arfusion_pass.compilation import (
    GraphBreak,
    compile_id,
    graph_break,
    graph_key,
    inner_key,
    known,
    on_compile_end,
)
from arfusion_pass.provenance import rank
from arfusion_pass.reporting.advice import BREAK, NO_GRAD, WHOLE
from arfusion_pass.reporting.reports import FusionReport
from arfusion_pass.reporting.tables import place
from arfusion_pass.rewrite.absence import MET, met_by_dynamo
from arfusion_pass.runtime.files import replace_by_text

log = logging.getLogger("arfusion_pass")

all_reports: list[FusionReport] = []
"""Of every graph that any pass of this process has seen, cached ones included."""

_LEVELS = ("debug", "info", "warning", "error")
_DUMPER = "arfusion_pass.inspection.dump"  # imported when it is needed: it draws pages
_warned: set[str] = set()


def publish(report: FusionReport) -> None:
    """Keep a report and tell everybody who listens."""
    all_reports.append(report)
    for tell in (_log, _trace, _dump):
        known(lambda tell=tell: tell(report))  # type: ignore[misc]


def dumping() -> bool:
    """Whether reports go to a folder, so that graphs have to be printed."""
    return bool(os.environ.get("ARFUSION_DUMP"))


def log_line(report: FusionReport) -> str:
    """One line on one graph: ``64 of 65 sites fused in graph 3 (0.4 s); 1 missed: ...``."""
    took = "cached" if report.cached else "shared" if report.shared else f"{report.seconds:.1f} s"
    line = f"{report.matched_count} of {len(report.sites)} sites fused in graph {report.graph} ({took})"
    missed = report.missed
    if missed:
        reasons = [*dict.fromkeys(site.reason for site in missed)]
        more = f" (and {len(reasons) - 1} other reasons)" if len(reasons) > 1 else ""
        first = [site for site in missed if site.reason == reasons[0]]
        where = " ".join(place(first).split())
        line += f"; {len(missed)} missed: {where}: {reasons[0]}{more}"
    return line


def speak() -> None:
    """Show the log on stderr where ``ARFUSION_LOG`` names a level."""
    if (problem := misread_level()) is not None:
        log.warning("arfusion: %s", problem)
        return
    level = os.environ.get("ARFUSION_LOG", "").lower()
    if not level:
        return
    log.setLevel(level.upper())
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(message)s", "%m-%d %H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False


def misread_level() -> str | None:
    """What is wrong with ``ARFUSION_LOG``, or None."""
    level = os.environ.get("ARFUSION_LOG", "").lower()
    return f"ARFUSION_LOG={level} is none of {', '.join(_LEVELS)}" if level and level not in _LEVELS else None


def speak_through(name: str) -> None:
    """Let the log follow the level and the handlers of the logger ``name``: an engine's, which shows no others."""
    log.parent = logging.getLogger(name)


def _log(report: FusionReport) -> None:
    level = logging.INFO if report.sites and report.rank in (None, 0) else logging.DEBUG
    log.log(level, "arfusion: %s", log_line(report))
    if report.rank in (None, 0) and NO_GRAD not in _warned and (advice := _training(report)):
        _warned.add(NO_GRAD)  # said aloud once: the pass was asked for, and does nothing
        log.warning("arfusion: all-reduces not fused: %d; %s", len(report.missed), advice)


def _training(report: FusionReport) -> str | None:
    """The advice of a site that was missed because its graph trains."""
    return next((site.advice for site in report.missed if (site.advice or "").startswith(NO_GRAD)), None)


def _trace(report: FusionReport) -> None:
    from torch._logging import trace_structured

    for name, encoding, text in (("arfusion_report", "string", str), ("arfusion_report_json", "json", _json)):
        trace_structured(
            "artifact",
            metadata_fn=lambda name=name, encoding=encoding: {"name": name, "encoding": encoding},  # type: ignore[misc]
            payload_fn=lambda text=text: text(report),  # type: ignore[misc]
            expect_trace_id=False,
        )


def _json(report: FusionReport) -> str:
    return report.to_json()


def _dump(report: FusionReport) -> None:
    if not dumping():
        return
    asked = os.environ["ARFUSION_DUMP"]
    folder = Path(asked) / (f"process{os.getpid()}" if report.rank is None else f"rank{report.rank}")
    try:
        importlib.import_module(_DUMPER).follow(folder, all_reports)
    except OSError as error:
        if "ARFUSION_DUMP" not in _warned:
            _warned.add("ARFUSION_DUMP")
            log.warning("arfusion: ARFUSION_DUMP=%s is not complete: %s", asked, error)


# Warm starts. On a hit in a compile cache the pass is not called, but it is asked for its key. So each key that is
# asked for waits for its call; one whose compilation ended without a call was answered from a cache: from AOT
# autograd's, by Dynamo's graph, or from Inductor's, by one of the graphs that AOT autograd made of it.


@dataclasses.dataclass
class _Waiting:
    """A compilation that is running.

    Attributes:
        key: of the graph that Dynamo hands over.
        inner: by the key of each graph that Inductor's cache was asked for, what the pass said of it and of its parts.
    """

    key: str
    receive: Callable[[FusionReport], None]
    broken: GraphBreak | None = None
    met: str | None = None
    thread: int = dataclasses.field(default_factory=threading.get_ident)
    reports: list[FusionReport] = dataclasses.field(default_factory=list)
    inner: dict[str, list[FusionReport]] = dataclasses.field(default_factory=dict)


_compilations: dict[str, _Waiting] = {}
"""The compilations that are running, by torch's name for them."""


def expect(pass_key: Any, receive: Callable[[FusionReport], None]) -> None:
    """A cache asks for a pass's key: unless the pass is called, ``receive`` gets the reports stored for this graph."""
    on_compile_end(settle)
    name = compile_id()
    if name is None or _elsewhere.get():
        return
    if name not in _compilations:
        key = graph_key(pass_key)
        if key is None:
            return
        _compilations[name] = _Waiting(key, receive, graph_break(), known(met_by_dynamo))
    inner = inner_key(pass_key)
    if inner is not None:
        _compilations[name].inner.setdefault(inner, [])


_elsewhere: contextvars.ContextVar[bool] = contextvars.ContextVar("arfusion_reports_elsewhere", default=False)


@contextlib.contextmanager
def kept_elsewhere() -> Iterator[None]:
    """Inside, nothing is kept beside Inductor's cache: an engine with a cache of its own keeps the reports there."""
    token = _elsewhere.set(True)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def called(report: FusionReport) -> None:
    """The pass was called: store what it found beside Inductor's cache."""
    waiting = _compilations.get(compile_id() or "")
    if waiting is None:
        return
    waiting.reports.append(report)
    known(lambda: store(_path(waiting.key), waiting.reports))
    if waiting.inner:
        key, reports = list(waiting.inner.items())[-1]  # the one that was asked for last
        reports.append(report)
        known(lambda: store(_path(key), reports))


def settle(thread: int | None = None) -> None:
    """Deliver the stored reports of the graphs, of one thread's compilations or of all, that the pass was not called
    for."""
    for name, waiting in list(_compilations.items()):
        if thread not in (None, waiting.thread) or _compilations.pop(name, None) is None:
            continue
        for report in recall(_ended_here(report, waiting) for report in _stored(waiting)):
            waiting.receive(report)


def _stored(waiting: _Waiting) -> list[FusionReport]:
    """What is known of a compilation's graphs that a cache answered."""

    def stored(key: str) -> list[FusionReport]:
        return known(lambda: load(_path(key))) or []

    if not waiting.reports and (whole := stored(waiting.key)):
        return whole
    found = {key: stored(key) for key, reports in waiting.inner.items() if not reports}
    if any(found.values()):  # AOT autograd's cache knows this graph from now on, and answers by it
        every = [report for key, reports in waiting.inner.items() for report in reports or found[key]]
        known(lambda: store(_path(waiting.key), every))
    return [report for reports in found.values() for report in reports]


def _ended_here(report: FusionReport, waiting: _Waiting) -> FusionReport:
    """A report of an equal graph, which may have ended elsewhere, or nowhere, with the breaks of this compilation."""
    here = WHOLE if waiting.broken is None else BREAK.format(where=waiting.broken)
    advice = {WHOLE: here, BREAK.format(where=report.graph_break): here}
    return dataclasses.replace(
        report,
        graph_break=None if waiting.broken is None else str(waiting.broken),
        note=waiting.met if (report.note or "").startswith(MET) else report.note,
        sites=tuple(
            dataclasses.replace(site, advice=advice.get(site.advice or "", site.advice)) for site in report.sites
        ),
    )


def recall(stored: Iterable[FusionReport]) -> list[FusionReport]:
    """Publish what was stored by an earlier process, as reports of this one; gives them."""
    told = []
    for report in stored:
        told.append(dataclasses.replace(report, cached=True, rank=rank(), graph=len(all_reports)))
        publish(told[-1])
    return told


def settle_ended() -> None:
    """:func:`settle`, for a torch that does not tell when a compilation ends. Nothing while one is running: who asks
    from another thread (a server's metrics) ends no compilation."""
    if compile_id() is None:
        settle(threading.get_ident())


def _path(key: str) -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "arfusion" / f"{key}.json"


def store(path: Path, reports: list[FusionReport]) -> None:
    """Write reports for a later process, whole or not at all.

    Raises:
        OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_by_text(path, json.dumps([report.to_dict() for report in reports]))


def load(path: Path) -> list[FusionReport]:
    """What :func:`store` wrote; of a file that is not there, nothing.

    Raises:
        ValueError: the file is no report, or a later version's.
    """
    return [FusionReport.from_dict(data) for data in json.loads(path.read_text())] if os.path.isfile(path) else []


speak()
