"""Where reports go: the log, torch's trace and tlparse, ``ARFUSION_DUMP``, and beside Inductor's cache."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import arfusion_pass as arf
from arfusion_pass import compilation, publishing
from arfusion_pass.cli import verify
from arfusion_pass.compilation import GraphBreak
from arfusion_pass.ops import reference
from arfusion_pass.reporting.advice import BREAK, WHOLE
from arfusion_pass.reporting.reports import FusionReport
from arfusion_pass.reporting.sites import Site
from arfusion_pass.rewrite.absence import MET
from arfusion_pass.source import Source
from tests.models import Tensor, llama, reduce
from tests.simulate import STRICT, all_reduce, fake_world, fused_copy, tensors, trace

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``tests/scripts/options.py`` in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, str(ROOT / "tests" / "scripts" / "options.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def without_time(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in report.items() if key not in ("cached", "seconds")} for report in reports]


@pytest.mark.slow
def test_a_warm_start_reports_what_the_cold_one_did(tmp_path: Path) -> None:
    """The second process compiles nothing, and says of both graphs what the first said: the fused and the missed."""
    cold = run("--json", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    warm = run("--json", TORCHINDUCTOR_CACHE_DIR=str(tmp_path), ARFUSION_LOG="info")
    first, second = json.loads(cold.stdout), json.loads(warm.stdout)
    assert [report["cached"] for report in first] == [False, False]
    assert [report["cached"] for report in second] == [True, True]
    assert [report["matched_count"] for report in second] == [2, 0]
    assert without_time(first) == without_time(second)
    assert " arfusion: 2 of 2 sites fused in graph 0 (cached)" in warm.stderr
    assert "1 missed: model.py" in warm.stderr
    assert "arfusion:" not in cold.stderr, "quiet unless asked"


@pytest.mark.slow
def test_a_dump_is_verified_and_torch_traces_the_report(tmp_path: Path) -> None:
    """``ARFUSION_DUMP`` from a process that knows nothing of it, read by ``arfusion verify``; the real tlparse shows
    our report beside torch's pages."""
    dump, trace, pages = tmp_path / "dump", tmp_path / "trace", tmp_path / "pages"
    run(ARFUSION_DUMP=str(dump), TORCH_TRACE=str(trace), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    files = {path.name for path in (dump / "rank0").iterdir()}
    assert {"report.txt", "report.json", "graph_0.before.txt", "graph_0.after.txt", "graph_1.diff.txt"} <= files
    verdict = verify.read(dump)
    assert (verdict.ranks, verdict.problems, verdict.reports.matched_count) == (("rank0",), (), 2)
    assert "layers.0" in str(verdict)
    (log,) = trace.glob("*.log")
    text = log.read_text()
    assert '"name": "arfusion_report"' in text
    assert '"name": "arfusion_report_json"' in text
    tlparse = shutil.which("tlparse") or shutil.which("tlparse", path=str(Path(sys.executable).parent))
    if tlparse is None:
        pytest.skip("tlparse is not installed")
    subprocess.run([tlparse, str(log), "-o", str(pages), "--no-browser"], check=True, capture_output=True)
    (shown,) = pages.glob("*0_0_0/arfusion_report_[0-9]*.txt")
    assert "2 of 2 sites fused" in shown.read_text()
    assert shown.name in (pages / "index.html").read_text()


def missed_site(name: str, reason: str, module: str) -> Site:
    return Site(name, "0", False, reason=reason, module=module, source=Source("/a/model.py", 9, "dist.all_reduce(y)"))


def test_one_line_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    fused = Site("all_reduce", "0", True, pattern="P")
    missed = [missed_site(f"r{i}", 'model.py:10 "y + b" stands between', f"layers.{i}") for i in range(2)]
    report = FusionReport((fused, *missed), seconds=0.42, graph=3, rank=0)
    line = publishing.log_line(report)
    assert line == (
        '1 of 3 sites fused in graph 3 (0.4 s); 2 missed: layers.* model.py:9: model.py:10 "y + b" stands between'
    )
    with caplog.at_level(logging.DEBUG, logger="arfusion_pass"):
        publishing._log(report)
        publishing._log(FusionReport((fused,), rank=1))
        publishing._log(FusionReport((), rank=0))
    assert [record.levelname for record in caplog.records] == ["INFO", "DEBUG", "DEBUG"]


def test_an_engines_logger_shows_our_line_at_its_own_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM configures the logger ``vllm`` and no other."""
    lines: list[str] = []
    engine = logging.getLogger("some_engine")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(engine, "handlers", [handler])
    monkeypatch.setattr(engine, "propagate", False)
    monkeypatch.setattr(publishing.log, "parent", publishing.log.parent)
    publishing.speak_through("some_engine")
    for level in (logging.WARNING, logging.INFO):
        engine.setLevel(level)
        publishing._log(FusionReport((Site("r", "0", True),), rank=0))
    engine.setLevel(logging.NOTSET)
    assert lines == ["arfusion: 1 of 1 sites fused in graph 0 (0.0 s)"]


@pytest.mark.usefixtures("world")
def test_a_listener_that_fails_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return llama(r + reduce(x), w, 1e-6)

    for name in ("_log", "_trace", "_dump"):
        monkeypatch.setattr(publishing, name, fail)
    monkeypatch.setattr(compilation, "_output", fail)
    known = len(arf.reports())
    report = fused_copy(trace(model, *tensors((4, 32), (4, 32), (32,))), STRICT)[1]
    assert report.matched_count == 1
    assert len(arf.reports()) == known + 1


def test_the_end_of_a_compilation_is_seen_after_a_reset() -> None:
    """``torch._dynamo.reset()`` forgets who asked to be called: each compilation asks again, once."""
    ended: list[int] = []

    def end() -> None:
        ended.append(len(ended))

    for times in (1, 2):
        torch._dynamo.reset()
        compilation.on_compile_end(end)
        compilation.on_compile_end(end)
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
        assert len(ended) == times
    torch._dynamo.reset()
    publishing.expect("key", lambda report: None)
    assert compilation._at_end[publishing.settle] in torch._dynamo.callback.callback_handler.end_callbacks


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str, **_: object) -> None:
        path.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        publishing.store(tmp_path / "key.json", [FusionReport()])
    assert not list(tmp_path.iterdir())


def test_outside_of_dynamo_nothing_waits_and_nothing_is_stored() -> None:
    publishing.expect("key", lambda report: None)
    assert not publishing._compilations
    publishing.called(FusionReport())
    assert compilation.graph_break() is None
    assert compilation.graph_key("key") is None


def test_a_broken_file_beside_the_cache_is_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "arfusion").mkdir()
    (tmp_path / "arfusion" / "key.json").write_text("{not json")
    received: list[FusionReport] = []
    monkeypatch.setitem(publishing._compilations, "0/0", publishing._Waiting("key", received.append))
    publishing.settle()
    assert received == []


@pytest.mark.parametrize("here", [None, GraphBreak("a print", Source("now.py", 2, "print(x)"))])
def test_a_stored_report_of_an_equal_graph_that_ended_elsewhere(
    here: GraphBreak | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two functions may begin alike: the graph comes from the cache, its end is this compilation's own."""
    there = GraphBreak("another", Source("then.py", 1, "work.wait()"))
    site = dataclasses.replace(missed_site("r", "why", "layers.0"), advice=BREAK.format(where=there))
    stored = FusionReport((site,), graph_break=str(there), note=f"{MET[0]} async_op=True")
    received: list[FusionReport] = []
    monkeypatch.setattr(publishing, "load", lambda path: [stored])
    waiting = publishing._Waiting("key", received.append, here, None if here is None else "met here")
    monkeypatch.setitem(publishing._compilations, "0/0", waiting)
    publishing.settle()
    (report,) = received
    assert "then.py" not in str(report)
    assert report.graph_break == (None if here is None else str(here))
    assert report.sites[0].advice == (WHOLE if here is None else BREAK.format(where=here))
    assert report.note == waiting.met


def test_who_asks_from_another_thread_ends_no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's metrics ask for the reports while a worker compiles: what the pass then finds is still stored."""
    waiting = publishing._Waiting("key", lambda report: None)
    monkeypatch.setitem(publishing._compilations, "7/0", waiting)
    monitor = threading.Thread(target=arf.reports)
    monitor.start()
    monitor.join()
    assert publishing._compilations["7/0"] is waiting
    arf.reports()  # from the thread that compiled: it compiles no more
    assert "7/0" not in publishing._compilations


def test_a_report_goes_through_json() -> None:
    site = missed_site("r", "why", "layers.0")
    report = FusionReport((site, Site("s", "0", True, outputs=("norm_out",), shape=(4, "s0"))), 0.5, graph=2, rank=1)
    again = FusionReport.from_dict({**json.loads(report.to_json()), "a_later_field": 1})
    assert again == report


@pytest.mark.parametrize("level", ["info", "LOUD"])
def test_the_environment_sets_the_level(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    logger = logging.Logger("arfusion_pass")
    monkeypatch.setattr(publishing, "log", logger)
    monkeypatch.setenv("ARFUSION_LOG", level)
    publishing.speak()
    assert bool(logger.handlers) == (level == "info")


def write(folder: Path, rank: int, *reports: FusionReport) -> None:
    (folder / f"rank{rank}").mkdir(parents=True)
    (folder / f"rank{rank}" / "report.json").write_text(json.dumps([report.to_dict() for report in reports]))


def test_verify_finds_what_should_not_be(tmp_path: Path) -> None:
    fused = FusionReport((Site("r", "0", True, pattern="P", module="layers.0"),))
    write(tmp_path / "alike", 0, fused)
    write(tmp_path / "alike", 1, fused)
    assert verify.read(tmp_path / "alike").problems == ()
    assert "2 ranks alike" in str(verify.read(tmp_path / "alike"))
    write(tmp_path / "other", 0, fused)
    write(tmp_path / "other", 10, FusionReport((missed_site("r", "why", "layers.0"),)))
    assert verify.read(tmp_path / "other").ranks == ("rank0", "rank10")
    assert "rank10 fused 0 sites" in verify.read(tmp_path / "other").problems[0]
    (tmp_path / "empty").mkdir()
    assert "no report" in verify.read(tmp_path / "empty").problems[0]
    with pytest.raises(ValueError, match="ARFUSION_DUMP"):
        verify.read(tmp_path / "none")
    write(tmp_path / "broken", 0)
    (tmp_path / "broken" / "rank0" / "report.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="no report of this package"):
        verify.read(tmp_path / "broken")


def _fused(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return llama(r + reduce(x), w, 1e-6)


def _checkpointed(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return checkpoint(_fused, x, r, w, use_reentrant=False)


def test_a_graph_that_another_function_left_in_the_cache_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contract *clear*: behind AOT autograd a function with checkpoints is the one without, and Inductor's cache gives
    it that one's graph; the third start has it from AOT autograd's."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(reference, "ordered_all_reduce", all_reduce)
    inputs, cached = tensors((4, 64), (4, 64), (64,)), []
    with fake_world(2), torch.no_grad():
        for function in (_fused, _checkpointed, _checkpointed):
            torch._dynamo.reset()
            options = arf.inductor_options(STRICT)
            torch.compile(function, fullgraph=True, options=options)(*inputs)
            (report,) = options["post_grad_custom_post_pass"].reports
            assert report.matched_count == 1
            cached.append(report.cached)
    assert cached == [False, True, True]
