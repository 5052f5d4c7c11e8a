"""``arfusion explain``: run somebody's script with the pass on, then print what it did to each all-reduce."""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from arfusion_pass.cli.streams import ended_by_signals
from arfusion_pass.install import HOOK
from arfusion_pass.reporting.reports import Reports

MISSED = 3
"""Exit status of ``--fail-on-missed`` where a site was missed, or there was none."""
NO_RANKS = 2
"""Exit status where the script asks for ranks that it was not given."""

_HINTS = {
    "Default process group has not been initialized": "call torch.distributed.init_process_group(...) before the model",
    "Unsupported group type: <class 'NoneType'>": (
        "call torch.distributed.init_process_group(...) first: before it dist.group.WORLD is None"
    ),
    "Either mode or options can be specified": (
        "torch.compile takes no mode beside options: arf.inductor_options(mode=...) gives both"
    ),
}
"""What to do about errors of torch that do not say it, by what they say."""

_WANTS_RANKS = re.compile(
    r"environment variable (RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT) expected|^'?(LOCAL_RANK|RANK|WORLD_SIZE)'?$"
)


def run_script(
    script: str,
    arguments: list[str],
    *,
    as_json: bool = False,
    dump: str | None = None,
    output: str | None = None,
    fail_on_missed: bool = False,
    verdict: str | None = None,
) -> int:
    """Run ``script`` as ``python script arguments...`` would, with everything that it compiles fused.

    The report is printed by rank 0 (by the environment's ``RANK``), also when the script fails or is interrupted.

    Args:
        script: path of a Python file; runs as ``__main__``.
        arguments: its command line.
        as_json: JSON instead of the table; what the script prints goes to stderr, so that stdout is JSON alone.
        dump: folder for :func:`arfusion_pass.inspection.debug_dump`, or None.
        output: file for the report, or None for stdout.
        fail_on_missed: give :data:`MISSED` where a site was missed, or none was fused.
        verdict: file that rank 0 writes that status into, to give 0 itself (torchrun makes 1 of every status); or None.

    Returns:
        the script's exit status; 1 if it raised, 130 if it was interrupted (Ctrl-C), 143 and 129 if it was told to end
        (SIGTERM, SIGHUP), :data:`NO_RANKS`, :data:`MISSED`.
    """
    import arfusion_pass as arf

    known = len(arf.reports())
    argv, path, stdout = sys.argv, list(sys.path), sys.stdout
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    status, failure = 0, None
    try:
        with contextlib.ExitStack() as stack:
            if as_json and output is None:
                stack.enter_context(_stdout_to_stderr())
            stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
            if dump is not None:
                stack.enter_context(arf.inspection.debug_dump(dump))
            stack.enter_context(arf.enable())
            stack.enter_context(_in_threads_too())
            stack.enter_context(ended_by_signals())
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Exception as error:
        failure, status = error, 1
    finally:
        sys.argv, sys.path[:], sys.stdout = argv, path, stdout if not stdout.closed else sys.stderr
    if failure is not None and _WANTS_RANKS.search(str(failure)) and "RANK" not in os.environ:
        print(f"{script} wants ranks: start it with `arfusion explain -n 2 {script} ...`", file=sys.stderr)
        return NO_RANKS
    if failure is not None:
        _print_traceback(failure, script)
        for hint in (hint for words, hint in _HINTS.items() if words in str(failure)):
            print(f"To do: {hint}", file=sys.stderr)
    if os.environ.get("RANK", "0") != "0":
        return status
    reports = Reports(arf.reports()[known:])
    if failure is not None and not reports:
        print(f"{script} failed before anything was compiled", file=sys.stderr)
        if not as_json:
            return status
    text = json.dumps([report.to_dict() for report in reports], indent=2) if as_json else str(reports)
    try:
        if output is not None:
            Path(output).write_text(text + "\n", encoding="utf-8")
    except OSError as error:  # what a long run has found is not lost
        print(f"{output} cannot be written ({error}): the report goes to stdout", file=sys.stderr)
        output, status = None, status or 1
    if output is None:
        print(text)
    if fail_on_missed and status == 0 and (reports.missed or not reports.matched_count):
        if verdict is None:
            return MISSED
        Path(verdict).write_text(str(MISSED))
    return status


@contextlib.contextmanager
def _in_threads_too() -> Iterator[None]:
    """Threads that start inside, such as a server's workers, compile as this one does: torch's settings are each
    thread's own (in 2.13 and 2.15; not in 2.11)."""
    start = threading.Thread.start
    settings = {name: getattr(torch._inductor.config, name) for name in (HOOK, "fx_graph_cache")}

    def start_inside(thread: threading.Thread) -> None:
        run = thread.run

        def inside() -> None:
            here = getattr(torch._inductor.config, HOOK) is settings[HOOK]
            with contextlib.nullcontext() if here else torch._inductor.config.patch(settings):
                run()

        thread.run = inside  # type: ignore[method-assign]
        start(thread)

    threading.Thread.start = start_inside  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        threading.Thread.start = start  # type: ignore[method-assign]


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What is written to stdout inside, by whomever, goes to stderr."""
    stdout = sys.stdout  # which the script may close or replace
    stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        if not stdout.closed:
            stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _print_traceback(error: BaseException, script: str) -> None:
    """The error with the script's frames, without those that started it."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename != script:
        frame = frame.tb_next
    traceback.print_exception(type(error), error, frame or error.__traceback__)
