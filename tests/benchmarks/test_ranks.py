"""A benchmark that cannot measure says so in one line, exits with 1 and leaves the results that are there alone."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks import bench_allreduce, bench_site, ranks

MODULES = {"bench_allreduce": bench_allreduce, "bench_site": bench_site}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    for name in ("tp2.json", "tp2.md", "site2.json", "site2.md"):
        (folder / name).write_text("as it was")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, name: str, results: Path) -> int:
    monkeypatch.setattr(sys, "argv", [name, "--world", "2", "--out", str(results)])
    return MODULES[name].main()


def assert_one_line(captured: str, name: str, results: Path) -> None:
    assert captured.startswith(f"{name}: ")
    assert captured.count("\n") == 1
    assert {path.read_text() for path in results.iterdir()} == {"as it was"}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("gpus", [0, 1])
def test_too_few_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], results: Path, name: str, gpus: int
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert run(monkeypatch, name, results) == 1
    out = capsys.readouterr().out
    assert_one_line(out, name, results)
    assert f"shows {gpus or 'none'}" in out


@pytest.mark.parametrize("name", MODULES)
def test_a_failing_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], results: Path, name: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(ranks, "run", lambda *_: "rank 1 failed with status 1: RuntimeError: no")
    assert run(monkeypatch, name, results) == 1
    assert_one_line(capsys.readouterr().out, name, results)


def module(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> str:
    (folder / "a_rank.py").write_text(f"import sys, time\nrank = int(sys.argv[sys.argv.index('--rank') + 1])\n{text}\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return "a_rank"


def test_the_first_rank_that_fails_is_quoted_and_the_others_are_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = module(monkeypatch, tmp_path, "if rank: raise ValueError('a reason')\ntime.sleep(600)")
    begun = time.time()
    assert ranks.run(name, [], 2, 300) == "rank 1 failed with status 1: ValueError: a reason"
    assert time.time() - begun < 60


def test_ranks_that_end_well_have_nothing_to_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = module(monkeypatch, tmp_path, "print('noise', file=sys.stderr)")
    assert ranks.run(name, [], 2, 300) == ""


def test_ranks_that_do_not_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = module(monkeypatch, tmp_path, "time.sleep(600 * rank)")
    assert ranks.run(name, [], 2, -57) == "ranks [1] had not ended after 3 s"
