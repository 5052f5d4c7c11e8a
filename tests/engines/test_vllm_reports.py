"""Reports kept with vLLM's compiled graphs, on stand-ins for the two classes of vLLM's that are wrapped; with vLLM
itself: ``test_vllm_caches.py``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from torch import fx

from arfusion_pass import compilation, publishing
from arfusion_pass.engines import vllm_reports
from arfusion_pass.reporting.reports import FusionReport
from arfusion_pass.reporting.sites import Site


@dataclasses.dataclass(frozen=True)
class Range:
    start: int = 1
    end: int = 2048


class Code:
    """A compiled graph."""


def managers() -> type:
    """A fresh ``CompilerManager``: a graph is compiled, by a call of the pass, unless its code is given to it."""

    class CompilerManager:
        def __init__(self, folder: Path, disable_cache: bool = False) -> None:
            self.cache_dir, self.disable_cache = str(folder), disable_cache

        def compile(self, graph: Any, inputs: Any, compile_range: Range, graph_index: int = 0, has: Any = None) -> Any:
            if has is None:
                publishing.publish(report(vllm_reports._places({"graph": graph})[0]))
            return has or Code()

    vllm_reports.keep_beside_graphs(CompilerManager)
    vllm_reports.keep_beside_graphs(CompilerManager)
    return CompilerManager


def functions() -> type:
    """A fresh ``VllmSerializableFunction``, whose bytes are those of its name."""

    class VllmSerializableFunction:
        def __init__(self, name: str, manager: Any = None, call: Any = None) -> None:
            self.name, self.optimized_call = name, call or (lambda x: x + 1)
            self.vllm_backend = type("VllmBackend", (), {"compiler_manager": manager})

        @classmethod
        def serialize_compile_artifacts(cls, compiled: Any) -> bytes:
            return bytes(compiled.name.encode())

        @classmethod
        def deserialize_compile_artifacts(cls, data: bytes) -> Any:
            return cls(data.decode())

    vllm_reports.keep_in_artefact(VllmSerializableFunction)
    vllm_reports.keep_in_artefact(VllmSerializableFunction)
    return VllmSerializableFunction


def layer(number: int) -> fx.GraphModule:
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["nn_module_stack"] = {"layer": (f"L['self'].layers.{number}", object)}
    graph.output(node)
    return fx.GraphModule({}, graph)


def report(module: str | None) -> FusionReport:
    return FusionReport((Site("all_reduce", "tp:0", True, pattern="P", module=module),), 0.5)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[FusionReport]:
    """What this process has published."""
    reports: list[FusionReport] = []
    monkeypatch.setattr(publishing, "all_reports", reports)
    return reports


def say(reports: list[FusionReport]) -> list[tuple[str | None, bool, bool]]:
    return [(each.sites[0].module, each.cached, each.shared) for each in reports]


def test_a_folder_of_graphs_keeps_their_reports(tmp_path: Path, told: list[FusionReport]) -> None:
    """Compiled, then equal to the one before, then loaded by a later start: every graph is reported in its own layer,
    once, and as cached where no pass was called."""
    cold, warm = managers()(tmp_path), managers()(tmp_path)
    code = cold.compile(layer(0), [], Range())
    cold.compile(layer(1), [], Range(), graph_index=1, has=code)
    cold.compile(layer(0), [], compile_range=Range(8, 8), graph_index=0)
    assert say(told) == [("layers.0", False, False), ("layers.1", False, True), ("layers.0", False, False)]
    assert [each.graph for each in told[1:2]] == [1]
    told.clear()
    loaded = Code()
    warm.compile(fx.GraphModule({}, fx.Graph()), [], Range(), has=loaded)
    warm.compile(fx.GraphModule({}, fx.Graph()), [], Range(), 1, has=loaded)
    warm.compile(fx.GraphModule({}, fx.Graph()), [], Range(9, 9), 2, has=Code())
    assert say(told) == [("layers.0", True, False), ("layers.1", True, True)], "of the last one nothing is known"


def test_a_disabled_cache_is_not_written_to(tmp_path: Path, told: list[FusionReport]) -> None:
    manager = managers()(tmp_path, disable_cache=True)
    code = manager.compile(layer(0), [], Range())
    manager.compile(layer(1), [], Range(), 1, has=code)
    assert len(told) == 2
    assert not list(tmp_path.iterdir())


def test_an_artefact_carries_its_reports(tmp_path: Path, told: list[FusionReport]) -> None:
    """vLLM reads the bytes that it wrote; the reports are told when the loaded graphs run, once."""
    manager, function = managers()(tmp_path), functions()
    code = manager.compile(layer(0), [], Range())
    manager.compile(layer(1), [], Range(), 1, has=code)
    data = function.serialize_compile_artifacts(function("artefact", manager))
    told.clear()
    loaded = function.deserialize_compile_artifacts(data)
    assert loaded.name == "artefact"
    assert told == [], "vLLM may yet throw it away"
    assert [loaded.optimized_call(1), loaded.optimized_call(2)] == [2, 3]
    assert say(told) == [("layers.0", True, False), ("layers.1", True, True)]


def test_graphs_that_report_themselves_are_not_reported_twice(tmp_path: Path, told: list[FusionReport]) -> None:
    """An artefact without the graphs: vLLM loads or compiles them one by one, at once or at the first call."""
    manager, function = managers()(tmp_path), functions()
    manager.compile(layer(0), [], Range())
    data = function.serialize_compile_artifacts(function("artefact", manager))
    told.clear()
    loaded = function.deserialize_compile_artifacts(data)
    loaded.optimized_call = first = lambda: manager.compile(layer(0), [], Range())
    vllm_reports._tell_at_first_call(loaded, [report("layers.0")])
    loaded.optimized_call()
    assert loaded.optimized_call is first
    assert len(told) == 1


@pytest.mark.parametrize("tail", [b"", b"[]", b"{" + (1).to_bytes(8, "big") + vllm_reports._MARK])
def test_an_artefact_without_reports_is_loaded(tail: bytes, told: list[FusionReport]) -> None:
    """An older one, one with bytes of its own, and one whose reports cannot be read."""
    function = functions()
    loaded = function.deserialize_compile_artifacts(b"artefact" + tail)
    assert loaded.name == "artefact" + ("[]" if tail == b"[]" else "")
    assert loaded.optimized_call(1) == 2
    assert told == []


def test_what_fails_stops_no_compilation(tmp_path: Path, told: list[FusionReport]) -> None:
    """A folder that cannot be written to, a graph that is none, an artefact without a backend."""
    manager, function = managers()(tmp_path / "file"), functions()
    (tmp_path / "file").touch()
    assert isinstance(manager.compile(layer(0), [], Range()), Code)
    assert len(told) == 1
    assert isinstance(managers()(tmp_path).compile(None, [], None, has=Code()), Code)
    compiled = function("artefact")
    compiled.vllm_backend = None
    assert function.serialize_compile_artifacts(compiled) == b"artefact"


def test_an_engines_graphs_are_not_kept_beside_inductors_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a start with Dynamo that loads its graphs from the engine's cache would tell them twice."""
    monkeypatch.setattr(publishing, "compile_id", lambda: "0/0")
    monkeypatch.setattr(publishing, "graph_key", lambda key: key)
    monkeypatch.setattr(compilation, "known", lambda find: None)
    with publishing.kept_elsewhere():
        publishing.expect("key", lambda report: None)
        assert not publishing._compilations
    publishing.expect("key", lambda report: None)
    assert publishing._compilations.pop("0/0").key == "key"
