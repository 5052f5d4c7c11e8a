"""The command line, without starting ranks (``tests/test_demo.py`` does)."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.metadata
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import arfusion_pass as arf
from arfusion_pass.cli import commands, explain, main
from arfusion_pass.cli.streams import ended_by_signals
from arfusion_pass.demo import run
from arfusion_pass.install import HOOK
from arfusion_pass.runtime import agreement, build

SCRIPT = """\
import sys
import torch

@torch.compile
def double(x):
    return x * 2

double(torch.ones(4))
print("arguments", sys.argv[1:], __name__)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("command", ["demo", "explain", "verify", "doctor", "build", "bench"])
def test_help(command: str) -> None:
    assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0
    assert command in CliRunner().invoke(main, ["--help"]).output


def test_version_in_a_checkout_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package is on the path and not installed, as README's ``python -m arfusion_pass.cli`` runs it."""

    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    done = CliRunner().invoke(main, ["--version"])
    assert (done.exit_code, done.output.split()[-1]) == (0, arf.__version__)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--hidden", "250"], "250 is no multiple of 8"),
        (["--layers", "0"], "--layers"),
        (["--world", "1"], "--world"),
        (["--norm", "layer"], "--norm"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "cpu", "--backend", "native"], "--backend native runs on GPUs"),
    ],
)
def test_demo_refuses_what_cannot_be(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(main, ["demo", *arguments])
    assert result.exit_code == 2
    assert complaint in result.output


def test_a_wrong_setting_is_a_line_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARFUSION_CONFIG", '{"reasociate": true}')
    result = CliRunner().invoke(main, ["explain", __file__])
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert "there is no reasociate" in result.output


@pytest.mark.parametrize("arguments", [["demo", "--world", "999999"], ["explain", "-n", "999999", __file__]])
def test_ranks_that_no_machine_runs_are_not_started(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And as many as the kernels take are, on however few cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "999999 ranks are 999999 processes, for 2 cores" in " ".join(result.output.split())
    assert commands._ranks(None, None, agreement.MAX_WORLD) == commands._KERNELS  # type: ignore[arg-type]


def test_demo_refuses_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    result = CliRunner().invoke(main, ["demo", "--device", "cuda"])
    assert result.exit_code == 2
    assert "1 GPU(s) visible" in result.output


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[run.Options] = []
    monkeypatch.setattr(run, "main", lambda options: seen.append(options) or 1)
    assert CliRunner().invoke(main, ["demo", "--norm", "gemma", "--dynamic", "--diff", "--world", "3"]).exit_code == 1
    assert seen == [run.Options(norm="gemma", dynamic=True, diff=True, world=3)]


def test_doctor_names_a_backend_and_why() -> None:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    assert re.search(r"^torch +2\.\d+", result.output, re.MULTILINE)
    assert re.search(r"^backend +(native|reference).*: \w+", result.output, re.MULTILINE)
    facts = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).output)
    assert facts["backend"].split(",")[0] in ("native", "reference")
    assert facts["reason"]


def test_a_terminal_that_knows_latin_letters_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it cannot show is a question mark, and no traceback."""
    monkeypatch.setenv("ARFUSION_CACHE_DIR", str(tmp_path / "cach\u0113"))
    result = CliRunner(charset="latin-1").invoke(main, ["doctor"])
    assert result.exit_code == 0, result.exception
    assert "cach?" in result.output


def test_bench_outside_a_checkout_says_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "arfusion_pass" / "cli" / "commands.py"))
    result = CliRunner().invoke(main, ["bench"])
    assert result.exit_code == 1
    assert "source tree" in result.output


def test_bench_in_a_checkout_runs_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()  # comes before an editable checkout's package
    (tmp_path / "benchmarks" / "bench_allreduce.py").write_text("import sys; sys.exit(len(sys.argv) + 40)")
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "arfusion_pass" / "cli" / "commands.py"))
    (tmp_path / "benchmarks" / "bench_site.py").write_text("import sys; sys.exit(len(sys.argv) + 60)")
    assert CliRunner().invoke(main, ["bench", "--world", "4"]).exit_code == 43
    assert CliRunner().invoke(main, ["bench", "site", "--world", "4"]).exit_code == 63


def test_build_without_a_compiler_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> Path:
        raise build.BuildError("nvcc not found: install it")

    monkeypatch.setattr(build, "build", fail)
    result = CliRunner().invoke(main, ["build", "--arch", "90a"])
    assert result.exit_code == 1
    assert "nvcc not found: install it" in result.output
    assert "Traceback" not in result.output


def test_build_of_several_architectures_goes_into_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, Path]] = []
    monkeypatch.setattr(build, "build", lambda arch, *, output, **_: calls.append((arch, output)) or tmp_path)
    result = CliRunner().invoke(main, ["build", "--arch", "90a", "--arch", "100a", "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert calls == [("90a", tmp_path / "libarfusion-sm90a.so"), ("100a", tmp_path / "libarfusion-sm100a.so")]


def test_explain_runs_the_script_as_main_and_reports(tmp_path: Path) -> None:
    """Arguments and exit status are the script's own; the report comes last, as JSON where that is asked for."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "arfusion_pass.cli", "explain", "--json", str(script), "3", "--json", "x"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.returncode == 3, done.stderr
    assert "arguments ['3', '--json', 'x'] __main__\n" in done.stderr, "stdout is JSON alone"
    assert [graph["matched_count"] for graph in json.loads(done.stdout)] == [0]


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_explain_prints_its_report_when_it_is_ended(number: str, status: int, tmp_path: Path) -> None:
    """By Ctrl-C, or by `timeout 60 arfusion explain server.py`: what was compiled until then is reported, and a second
    signal does not end the report. The exit status is a shell's for the signal."""
    script = tmp_path / "script.py"
    end = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it\n"
        "import atexit; atexit.register(print, 'at exit', file=sys.stderr)\n"
        f"try: os.kill(os.getpid(), signal.{number})\n"
        "finally: signal.getsignal(signal.SIGTERM) == signal.SIG_IGN and os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    script.write_text(SCRIPT.replace("sys.exit(", end + "sys.exit("))
    done = started("explain", "--json", str(script), "3")
    assert done.returncode == status, done.stderr
    assert [graph["matched_count"] for graph in json.loads(done.stdout)] == [0]
    assert "at exit" in done.stderr


def test_a_forked_child_ends_at_once_when_it_is_told_to() -> None:
    """It does not wait, as this process does, for the interpreter's turn, which a child in C code never gives."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with ended_by_signals():
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
            if (child := os.fork()) == 0:
                os._exit(signal.getsignal(signal.SIGTERM) != signal.SIG_DFL)
            assert os.waitpid(child, 0)[1] == 0
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_that_the_script_starts_compiles_with_the_pass() -> None:
    """A server's workers do, and torch's settings are each thread's own; a thread started afterwards does not."""
    seen: list[object] = []

    def look() -> None:
        seen.append(getattr(torch._inductor.config, HOOK))

    def start() -> None:
        threading.Thread(target=look).start()
        concurrent.futures.ThreadPoolExecutor(1).submit(look).result()

    with arf.enable() as fusion, explain._in_threads_too():
        start()
    start()
    assert seen == [fusion, fusion, None, None]


def test_explain_has_the_pass_on_in_a_thread_of_its_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one above holds for scripts that `explain` runs."""
    script = tmp_path / "script.py"
    script.write_text(
        "import threading, torch\n"
        f"look = lambda: print('seen:', torch._inductor.config.{HOOK} is not None)\n"
        "thread = threading.Thread(target=look)\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    assert explain.run_script(str(script), []) == 0
    assert "seen: True" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["sys.stdout = None", "sys.stdout = open('log', 'w')", "sys.stdout.close()"])
def test_a_script_that_leaves_another_stdout_behind(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report goes to this command's own; to stderr where the script closed that."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(f"import sys; {change}")
    for as_json, report in ((False, "the pass has seen no graph"), (True, "[]")):
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            assert explain.run_script(str(script), [], as_json=as_json) == 0, error.getvalue()
        assert report in (error.getvalue() if out.closed else out.getvalue())


def test_a_stdout_that_is_closed_or_full(tmp_path: Path) -> None:
    """`>&-` is nobody who reads; a full disk is one line. Neither is a traceback, and no file gets what is printed."""
    script = tmp_path / "script.py"
    script.write_text("print('said')")
    done = started("explain", "--json", str(script), preexec_fn=lambda: os.close(1), stdout=None)
    assert (done.returncode, done.stderr) == (0, "said\n")
    with open("/dev/full", "w") as full:
        done = started("doctor", stdout=full)
    assert (done.returncode, done.stderr) == (1, "Error: stdout cannot be written: No space left on device\n")


def started(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-m", "arfusion_pass.cli", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    return subprocess.run(command, text=True, check=False, env=environment, timeout=120, **pipes)


STOPPED = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
while True:
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(0.05)
"""


def test_whoever_is_told_to_end_ends_the_ranks_first() -> None:
    """SIGTERM, sent to the command alone, reaches torchrun: no rank is left behind."""
    ignored = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with subprocess.Popen([sys.executable, "-c", STOPPED]) as process:
            assert commands._wait(process) == 5
    finally:
        signal.signal(signal.SIGTERM, ignored)


def test_what_this_command_ignores_it_does_not_pass_on() -> None:
    """Under nohup SIGHUP is ignored: the ranks go on too."""
    told = "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.kill(os.getppid(), signal.SIGHUP)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with subprocess.Popen([sys.executable, "-c", f"{told}; import time; time.sleep(0.3)"]) as process:
            assert commands._wait(process) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_report_that_cannot_be_written_is_printed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("pass")
    result = CliRunner().invoke(main, ["explain", "-o", "/dev/full", str(script)])
    assert result.exit_code == 1
    assert "/dev/full cannot be written" in result.output
    assert "AllReduce fusion: the pass has seen no graph" in result.output


def test_explain_on_several_ranks_starts_itself_under_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    class Process(contextlib.nullcontext[Any]):
        """One that ends with 7, after a Ctrl-C that it got as well."""

        interrupts = 1

        def __init__(self, command: list[str], **_: object) -> None:
            super().__init__(self)
            commands.append(command)

        def wait(self) -> int:
            if self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt
            return 7

    monkeypatch.setattr(subprocess, "Popen", Process)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = CliRunner().invoke(
        main, ["explain", "-n", "3", "--json", "--dump", "out", str(script), "--flag", "-n", "1"]
    )
    assert result.exit_code == 7, result.output
    (command,) = commands
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    inner = ["-m", "arfusion_pass.cli", "explain", "--json", "--dump", "out", str(script), "--flag", "-n", "1"]
    assert command[5:] == inner
