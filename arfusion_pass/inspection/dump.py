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
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from arfusion_pass.fusion_pass import reports
from arfusion_pass.inspection.graph_diff import graph_diff
from arfusion_pass.inspection.html import diff_page, index_page
from arfusion_pass.inspection.replay import recording
from arfusion_pass.reporting.reports import Reports


@contextlib.contextmanager
def debug_dump(directory: str | os.PathLike[str], *, depyf: bool = True) -> Iterator[Path]:
    """Write what is compiled inside into ``directory``; yields the folder that is written to.

    Inductor's caches are off inside: on a hit the pass would not be called, and there would be nothing to show. What
    was compiled by Dynamo before stays compiled; call ``torch.compiler.reset()`` first to see it again.

    Args:
        directory: made if it is missing; files of an earlier dump are overwritten.
        depyf: also write depyf's dump.
    """
    rank = _rank()
    folder = Path(directory) if rank is None else Path(directory) / f"rank{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    known = len(reports())
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
        stack.enter_context(recording())
        if depyf:
            import depyf as depyf_package

            stack.enter_context(depyf_package.prepare_debug(str(folder / "depyf")))
        try:
            yield folder
        finally:
            write_reports(folder, Reports(reports()[known:]))


def _rank() -> int | None:
    """This process's rank, also before torch.distributed is initialised under torchrun; None for a lone process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if os.environ.get("WORLD_SIZE", "1") != "1" else None


def write_reports(folder: Path, reports: Reports) -> None:
    """The report, the graphs and the diff page; see the module's docstring for the files."""
    (folder / "report.txt").write_text(f"{reports}\n")
    (folder / "report.json").write_text(json.dumps([report.to_dict() for report in reports], indent=2) + "\n")
    for number, report in enumerate(reports):
        if report.before is None or report.after is None:
            continue
        (folder / f"graph_{number}.before.txt").write_text(report.before)
        (folder / f"graph_{number}.after.txt").write_text(report.after)
        (folder / f"graph_{number}.diff.txt").write_text(graph_diff(report.before, report.after))
    (folder / "diff.html").write_text(diff_page(reports))
    if _rank() is not None:
        _replace(folder.parent / "index.html", index_page(folder.parent))


def _replace(path: Path, text: str) -> None:
    """Write a file that other ranks write too: whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)
