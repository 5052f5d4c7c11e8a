"""The reports of vLLM's graphs, kept with the compiled graphs in vLLM's cache: a start from there tells them too.

vLLM asks no pass for a graph that it has. It keeps them in two ways, and the reports go along in each:

* a folder of graphs by compile range and index: :func:`keep_beside_graphs` keeps their reports in ``arfusion/`` of that
  folder, under the same names;
* one "mega" artefact, whose bytes hold every graph: :func:`keep_in_artefact` appends the reports to these bytes.

A graph that is equal to an earlier one vLLM compiles no second time. Its report is the earlier one's with the places of
its own layer, ``shared``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arfusion_pass import publishing
from arfusion_pass.compilation import known
from arfusion_pass.reporting.reports import FusionReport
from arfusion_pass.source import module_of

_Places = list[str | None]
"""The module of each node of a graph."""

_MARK = b"arfusion reports"


@dataclasses.dataclass
class _Kept:
    """What one ``CompilerManager`` has compiled or loaded."""

    reports: list[FusionReport] = dataclasses.field(default_factory=list)
    by_code: dict[int, tuple[Any, list[FusionReport], _Places]] = dataclasses.field(default_factory=dict)


_kept: weakref.WeakKeyDictionary[Any, _Kept] = weakref.WeakKeyDictionary()


def keep_beside_graphs(manager: type) -> None:
    """Wrap ``compile`` of vLLM's ``CompilerManager``, which compiles a graph, loads it or takes an equal one's code.

    Calling it again changes nothing; so with :func:`keep_in_artefact`.
    """
    compile_graph = manager.compile  # type: ignore[attr-defined]
    if hasattr(compile_graph, "arfusion"):
        return
    signature = inspect.signature(compile_graph)

    @functools.wraps(compile_graph)
    def compile_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = known(lambda: signature.bind(self, *args, **kwargs).arguments) or {}
        places = known(lambda: _places(call)) or []  # before the compiler takes the graph apart
        before = len(publishing.all_reports)
        with publishing.kept_elsewhere():
            code = compile_graph(self, *args, **kwargs)
        known(lambda: _keep(self, call, places, code, publishing.all_reports[before:]))
        return code

    compile_and_tell.arfusion = True  # type: ignore[attr-defined]
    manager.compile = compile_and_tell  # type: ignore[attr-defined]


def keep_in_artefact(function: type) -> None:
    """Wrap both ends of ``VllmSerializableFunction``, what vLLM writes into and reads from an AOT artefact."""
    serialize = function.serialize_compile_artifacts.__func__  # type: ignore[attr-defined]
    deserialize = function.deserialize_compile_artifacts.__func__  # type: ignore[attr-defined]
    if hasattr(serialize, "arfusion"):
        return

    @functools.wraps(serialize)
    def serialize_with_reports(cls: type, compiled: Any) -> bytes:
        data: bytes = serialize(cls, compiled)
        return data + (known(lambda: _packed(_kept[compiled.vllm_backend.compiler_manager].reports)) or b"")

    @functools.wraps(deserialize)
    def deserialize_with_reports(cls: type, data: bytes) -> Any:
        data, reports = _unpacked(data)
        compiled = deserialize(cls, data)
        if reports:
            known(lambda: _tell_at_first_call(compiled, reports))
        return compiled

    serialize_with_reports.arfusion = True  # type: ignore[attr-defined]
    function.serialize_compile_artifacts = classmethod(serialize_with_reports)  # type: ignore[attr-defined]
    function.deserialize_compile_artifacts = classmethod(deserialize_with_reports)  # type: ignore[attr-defined]


def _keep(manager: Any, call: Mapping[str, Any], places: _Places, code: Any, new: list[FusionReport]) -> None:
    """Store what the passes reported of a graph; where none was called, find out what they did when it was compiled."""
    kept = _kept.setdefault(manager, _Kept())
    path = None if manager.disable_cache else _path(manager, call)
    if new:
        if path is not None:
            publishing.store(path, new)
    elif path is not None and (stored := known(lambda: publishing.load(path))):
        new = publishing.recall(stored)
    elif id(code) in kept.by_code:
        _, reports, theirs = kept.by_code[id(code)]
        new = [_moved(report, dict(zip(theirs, places, strict=False))) for report in reports]
        for report in new:
            publishing.publish(report)
        if path is not None:
            publishing.store(path, new)
    kept.reports += new
    kept.by_code.setdefault(id(code), (code, new, places))  # holds the code, so that its id stays its own


def _path(manager: Any, call: Mapping[str, Any]) -> Path:
    sizes = call["compile_range"]
    return Path(manager.cache_dir) / "arfusion" / f"{sizes.start}_{sizes.end}_{call.get('graph_index', 0)}.json"


def _places(call: Mapping[str, Any]) -> _Places:
    return [module_of(node) for node in call["graph"].graph.nodes]


def _moved(report: FusionReport, modules: dict[str | None, str | None]) -> FusionReport:
    """The report of an equal graph whose nodes stand in other modules."""
    sites = tuple(dataclasses.replace(site, module=modules.get(site.module, site.module)) for site in report.sites)
    return dataclasses.replace(report, sites=sites, shared=True, seconds=0.0, graph=len(publishing.all_reports))


def _packed(reports: list[FusionReport]) -> bytes:
    text = json.dumps([report.to_dict() for report in reports]).encode()
    return text + len(text).to_bytes(8, "big") + _MARK


def _unpacked(data: bytes) -> tuple[bytes, list[FusionReport]]:
    """The bytes as vLLM wrote them, and the reports behind them: none where they are not ours, or cannot be read."""
    if not data.endswith(_MARK):
        return data, []
    end = len(data) - len(_MARK) - 8
    start = end - int.from_bytes(data[end : end + 8], "big")
    reports = known(lambda: [FusionReport.from_dict(each) for each in json.loads(data[start:end])])
    return data[:start], reports or []


def _tell_at_first_call(compiled: Any, reports: list[FusionReport]) -> None:
    """Publish ``reports`` once the graphs that were loaded run: vLLM may yet discard them for a changed source file, or
    compile or load them one by one and so report them itself."""
    call = compiled.optimized_call

    def first_call(*args: Any, **kwargs: Any) -> Any:
        if compiled.optimized_call is first_call:
            compiled.optimized_call = call
        before = len(publishing.all_reports)
        out = call(*args, **kwargs)
        if len(publishing.all_reports) == before:
            known(lambda: publishing.recall(reports))
        return out

    compiled.optimized_call = first_call
