"""``debug_dump``: what it writes, and that a warm cache hides nothing from it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import arfusion_pass as arf
from arfusion_pass import publishing
from arfusion_pass.cli import verify
from arfusion_pass.inspection import dump
from arfusion_pass.ops import record
from arfusion_pass.reporting.reports import FusionReport
from arfusion_pass.reporting.sites import Site
from tests.simulate import c10d


def block(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """all-reduce, add, norm."""
    residual = residual + c10d.wait_tensor(c10d.all_reduce(x, "sum", "0"))
    return torch.nn.functional.rms_norm(residual, (64,), weight, 1e-6), residual


def compile_block() -> None:
    """Compile and run it afresh, as far as Dynamo is concerned."""
    torch.compiler.reset()
    with torch.no_grad():
        x, weight = torch.randn(4, 64, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
        torch.compile(block, options=arf.inductor_options())(x, x, weight)


@pytest.mark.usefixtures("world")
def test_graphs_page_and_report_are_written(tmp_path: Path) -> None:
    compile_block()
    with arf.inspection.debug_dump(tmp_path / "out") as folder:
        compile_block()
    assert folder == tmp_path / "out" / "rank0"
    (report,) = json.loads((folder / "report.json").read_text())
    assert report["matched_count"] == 1
    assert "1 of 1 sites fused" in (folder / "report.txt").read_text()
    before, after, diff = ((folder / f"graph_0.{name}.txt").read_text() for name in ("before", "after", "diff"))
    assert "_c10d_functional.all_reduce" in before
    assert "_c10d_functional" not in after
    assert "arfusion.allreduce_rms_norm.default" in after
    assert "-  %all_reduce" in diff
    assert "arfusion.allreduce_rms_norm" in (folder / "diff.html").read_text()
    dumped = [path.read_text() for path in (folder / "depyf").rglob("*.py")]
    assert any("torch.ops.arfusion.allreduce_rms_norm" in text for text in dumped), "depyf shows the compiled graph"


@pytest.mark.usefixtures("world")
def test_what_is_dumped_keeps_no_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dump is of graphs: a model that runs on inside, a server's for hours, is not copied call by call."""

    def observed(*_: object) -> int:
        raise AssertionError("a call is recorded")

    monkeypatch.setattr(record, "observed", observed)
    with arf.inspection.debug_dump(tmp_path, depyf=False):
        compile_block()
    (report,) = json.loads((tmp_path / "rank0" / "report.json").read_text())
    assert report["matched_count"] == 1


@pytest.mark.usefixtures("world")
def test_a_failure_inside_still_leaves_what_was_seen(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="inside"), arf.inspection.debug_dump(tmp_path, depyf=False):
        raise KeyError("inside")
    assert json.loads((tmp_path / "rank0" / "report.json").read_text()) == []
    assert not (tmp_path / "rank0" / "depyf").exists()


@pytest.mark.usefixtures("world")
def test_what_depyf_cannot_read_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the compilation, where it fails on a function's bytecode, as on Python 3.13's, nor the end of a dump."""

    def fail(*_: object, **__: object) -> None:
        raise ValueError("invalid literal for int() with base 10: 'L1'")

    from depyf import decompiler, explain

    monkeypatch.setattr(decompiler.Decompiler, "decompile_and_compile_like", fail)
    with arf.inspection.debug_dump(tmp_path) as folder:
        compile_block()
    assert json.loads((folder / "report.json").read_text())[0]["matched_count"] == 1
    assert any("def call(" in path.read_text() for path in (folder / "depyf").rglob("*.py")), "graphs are shown still"
    assert "cannot show the bytecode of block: ValueError: invalid literal" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(explain, "dump_src", fail)
    with arf.inspection.debug_dump(tmp_path):
        compile_block()
    assert "is not complete: ValueError: invalid literal" in caplog.text


def test_a_lone_process_writes_into_the_folder_itself_and_torchrun_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with arf.inspection.debug_dump(tmp_path / "a", depyf=False) as folder:
        assert folder == tmp_path / "a"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with arf.inspection.debug_dump(tmp_path / "a", depyf=False) as folder:
        assert folder == tmp_path / "a" / "rank1"


def report(number: int) -> FusionReport:
    site = Site(f"r{number}", "0", True, pattern="P")
    return FusionReport((site,), graph=number, before="  %a [call_func] x\n", after="  %b [call_func] y\n")


def test_a_growing_dump_is_complete_and_its_work_linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``ARFUSION_DUMP`` over many graphs: JSON and graphs are whole after each, the pages are drawn now and then."""
    folder, drawn, reports = tmp_path / "rank0", [0], list[FusionReport]()
    monkeypatch.setattr(dump, "diff_page", lambda reports: drawn.append(len(reports)) or f"{len(reports)} graphs")
    for number in range(60):
        reports.append(report(number))
        dump.follow(folder, reports)
        if number in (0, 1, 30, 59):
            assert json.loads((folder / "report.json").read_text()) == [json.loads(each.to_json()) for each in reports]
            assert (folder / f"graph_{number}.diff.txt").is_file()
    assert sum(drawn) < 6 * 60, "a constant times the graphs"
    dump._finish(folder)
    assert (folder / "diff.html").read_text() == "60 graphs"
    assert verify.read(tmp_path).reports.matched_count == 60
    (folder / "report.json").unlink()
    dump.follow(folder, reports)
    assert verify.read(tmp_path).reports.matched_count == 60, "a folder that somebody emptied is filled again"


def test_a_growing_dumps_pages_are_finished_when_its_process_ends(tmp_path: Path) -> None:
    """Also where the process is a child of multiprocessing, which runs no ``atexit``."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, sys\nfrom pathlib import Path\nfrom tests.inspection.test_dump import dump, report\n"
        "def child(folder):\n    reports = []\n    for number in range(6):\n"
        "        reports.append(report(number))\n        dump.follow(folder, reports)\n"
        "if __name__ == '__main__':\n    folder = Path(sys.argv[1])\n    child(folder / 'a')\n"
        "    process = multiprocessing.get_context('fork').Process(target=child, args=(folder / 'b',))\n"
        "    process.start()\n    process.join()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}  # the tests are not installed
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    for name in ("a", "b"):
        assert "6 of 6 sites fused" in (tmp_path / name / "report.txt").read_text()


def _engine(folder: Path, turn: Any) -> None:
    reports: list[FusionReport] = []
    for number in range(3):
        turn.recv()
        reports.append(report(number))
        dump.follow(folder, reports)
        turn.send(None)


def test_two_engines_with_one_rank_dump_beside_each_other(tmp_path: Path) -> None:
    """Data parallel replicas are engines whose ranks have the same numbers: each has a folder, and both are read. What
    an earlier process left is written anew."""
    fork = multiprocessing.get_context("fork")
    for folders in (["rank0", "rank0-2"], ["rank0"]):
        pipes = [fork.Pipe() for _ in folders]
        engines = [fork.Process(target=_engine, args=(tmp_path / "rank0", theirs)) for _, theirs in pipes]
        for engine in engines:
            engine.start()
        for _ in range(3):
            for turn, _ in pipes:
                turn.send(None)
                assert turn.poll(60)
                turn.recv()
        for engine in engines:
            engine.join()
        for name in folders:
            assert len(json.loads((tmp_path / name / "report.json").read_text())) == 3
    verdict = verify.read(tmp_path)
    assert (verdict.ranks, verdict.problems) == (("rank0", "rank0-2"), ())


def test_a_full_disk_is_told_and_written_to_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line; once there is room the dump is whole, in the same folder."""
    monkeypatch.setenv("ARFUSION_DUMP", str(tmp_path))
    monkeypatch.setattr(publishing, "all_reports", reports := [report(0)])
    monkeypatch.setattr(publishing, "_warned", set())
    name = f"process{os.getpid()}"
    with monkeypatch.context() as patch:
        patch.setattr(dump, "_write_graph", lambda *args: (_ for _ in ()).throw(OSError("no space left")))
        for _ in range(2):
            publishing._dump(reports[0])
    publishing._dump(reports[0])
    reports.append(report(1))
    with monkeypatch.context() as patch:
        patch.setattr(dump, "_write_graph", lambda *args: (_ for _ in ()).throw(OSError("no space left")))
        publishing._dump(reports[1])
    publishing._dump(reports[1])
    assert [path.name for path in tmp_path.glob("*")] == [name]
    assert len(json.loads((tmp_path / name / "report.json").read_text())) == 2
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line == f"arfusion: ARFUSION_DUMP={tmp_path} is not complete: no space left"


def test_without_depyf_there_is_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "depyf", None)
    with caplog.at_level(logging.WARNING, "arfusion_pass"), arf.inspection.debug_dump(tmp_path) as folder:
        pass
    assert "depyf is not installed" in caplog.text
    assert (folder / "report.json").is_file()
