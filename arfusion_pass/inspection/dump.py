"""Everything about one compilation, written into a folder.

::

    with arfusion_pass.inspection.debug_dump("out/"):
        torch.compile(model, options=arfusion_pass.inductor_options())(x)

writes (below ``out/rank0``, ``out/rank1``, ... where there are ranks)

* ``report.txt`` and ``report.json``: fused sites, missed sites and why;
* ``graph_0.before.txt``, ``graph_0.after.txt``, ``graph_0.diff.txt``: each graph as the pass found and left it;
* ``diff.html``: every site with its subgraph before and after, and the graphs side by side; beside the ranks' folders
  an ``index.html`` over them;
* ``depyf/``: what depyf writes: Dynamo's bytecode as source, every stage of each graph, Inductor's kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import logging
import multiprocessing.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType
from unittest import mock

import torch
import torch.distributed as dist

from arfusion_pass.fusion_pass import reports
from arfusion_pass.inspection.graph_diff import graph_diff
from arfusion_pass.inspection.html import diff_page, index_page
from arfusion_pass.reporting.reports import FusionReport, Reports
from arfusion_pass.rewrite.recording import Printed, watching
from arfusion_pass.runtime.files import replace_by_text

log = logging.getLogger("arfusion_pass")

GROWTH = 1.25
"""A growing dump's summaries are written anew when it has so many times the graphs, so that the work stays linear."""


@contextlib.contextmanager
def debug_dump(directory: str | os.PathLike[str], *, depyf: bool = True) -> Iterator[Path]:
    """Write what is compiled inside into ``directory``; yields the folder that is written to.

    Inductor's caches are off inside: on a hit the pass would not be called, and there would be nothing to show. What
    was compiled by Dynamo before stays compiled; call ``torch.compiler.reset()`` first to see it again.

    Args:
        directory: made if it is missing; files of an earlier dump are overwritten.
        depyf: also write depyf's dump; without depyf installed a line in the log says so.
    """
    rank = _rank()
    folder = Path(directory) if rank is None else Path(directory) / f"rank{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    known = len(reports())
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
        stack.enter_context(watching(Printed()))
        if depyf:
            stack.enter_context(_depyf_dump(folder))
        try:
            yield folder
        finally:
            write_reports(folder, Reports(reports()[known:]))


@contextlib.contextmanager
def _depyf_dump(folder: Path) -> Iterator[None]:
    """depyf's dump below ``folder``, as far as it comes: what it cannot read, Python 3.13's bytecode above all, stops
    neither the compilation nor the dump."""
    try:
        import depyf  # noqa: F401
        from depyf.explain import enable_debugging
    except ImportError:
        log.warning("arfusion: depyf is not installed, so there is no depyf's dump in %s", folder)
        yield
        return

    class Hook(enable_debugging.DebuggableHook):
        def __call__(self, code: CodeType, new_code: CodeType) -> CodeType | None:
            try:
                return super().__call__(code, new_code)
            except Exception as error:
                self.optimized_code_and_module.pop()  # or it would be read again at the end
                log.warning("arfusion: depyf cannot show the bytecode of %s: %s", code.co_name, _said(error))
                return None

    debug = enable_debugging.prepare_debug(str(folder / "depyf"))
    with mock.patch.object(enable_debugging, "DebuggableHook", Hook):
        debug.__enter__()
    try:
        yield
    finally:
        try:
            debug.__exit__(None, None, None)
        except Exception as error:
            log.warning("arfusion: depyf's dump in %s is not complete: %s", folder, _said(error))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _rank() -> int | None:
    """This process's rank, also before torch.distributed is initialised under torchrun; None for a lone process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if os.environ.get("WORLD_SIZE", "1") != "1" else None


def write_reports(folder: Path, reports: Sequence[FusionReport]) -> None:
    """The report, the graphs and the diff page; see the module's docstring for the files."""
    (folder / "report.json").write_text(
        _HEAD + _JOINT.join(map(FusionReport.to_json, reports)) + _TAIL, encoding="utf-8"
    )
    for number, report in enumerate(reports):
        _write_graph(folder, number, report)
    _write_summaries(folder, reports)


@dataclasses.dataclass
class _Dump:
    """A growing dump: its folder, and of how many reports there is the JSON, and of how many the summaries."""

    folder: Path
    reports: list[FusionReport]
    written: int
    summarised: int


_dumps: dict[Path, _Dump] = {}
_locks: dict[Path, int] = {}


def follow(folder: Path, reports: list[FusionReport]) -> None:
    """:func:`write_reports` for a list that has grown: what is new goes behind what is there.

    ``report.json`` and the graphs are complete at once. The summaries (``report.txt``, the pages) follow when the list
    has grown by a quarter, and when the process ends. Where another process writes to ``folder``, as the same rank of
    another engine does (data parallel replicas), ``folder-2`` is taken, or the next that is free.
    """
    dump = _dumps.get(folder)
    if dump is None or not (dump.folder / "report.json").is_file():  # somebody may have emptied it
        own = _own(folder)
        write_reports(own, reports)
        _dumps[folder] = _Dump(own, reports, len(reports), len(reports))
        multiprocessing.util.Finalize(None, _finish, (folder,), exitpriority=0)  # in multiprocessing's children too
        return
    try:
        for number in range(dump.written, len(reports)):
            _append(dump.folder / "report.json", reports[number].to_json())
            _write_graph(dump.folder, number, reports[number])
    except OSError:
        del _dumps[folder]  # written anew the next time
        raise
    dump.written = len(reports)
    if len(reports) >= GROWTH * dump.summarised:
        _finish(folder)


def _own(folder: Path) -> Path:
    """``folder``, made, or the first of ``folder-2``, ``folder-3``, ... that no other process writes to.

    A lock that ends with the process says so: an earlier process' folder is written anew.
    """
    if (held := _locks.pop(folder, None)) is not None:
        os.close(held)
    for number in itertools.count(1):
        mine = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        mine.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(mine / ".writer", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        except OSError:
            pass  # a file system without locks
        _locks[folder] = descriptor
        return mine
    raise AssertionError


def _finish(folder: Path) -> None:
    dump = _dumps.get(folder)
    if dump is not None and dump.summarised < len(dump.reports) and dump.folder.is_dir():
        dump.summarised = len(dump.reports)
        _write_summaries(dump.folder, dump.reports)


_HEAD, _JOINT, _TAIL = "[\n", ",\n", "\n]\n"
"""``report.json`` is a list that can be written behind."""


def _append(path: Path, item: str) -> None:
    with path.open("r+b") as file:
        file.seek(-len(_TAIL), os.SEEK_END)
        file.write(f"{_JOINT}{item}{_TAIL}".encode())


def _write_graph(folder: Path, number: int, report: FusionReport) -> None:
    if report.before is None or report.after is None:
        return
    (folder / f"graph_{number}.before.txt").write_text(report.before, encoding="utf-8")
    (folder / f"graph_{number}.after.txt").write_text(report.after, encoding="utf-8")
    (folder / f"graph_{number}.diff.txt").write_text(graph_diff(report.before, report.after), encoding="utf-8")


def _write_summaries(folder: Path, reports: Sequence[FusionReport]) -> None:
    (folder / "report.txt").write_text(f"{Reports(reports)}\n", encoding="utf-8")
    (folder / "diff.html").write_text(diff_page(reports), encoding="utf-8")
    if _rank() is not None:
        replace_by_text(folder.parent / "index.html", index_page(folder.parent))  # other ranks write it too
