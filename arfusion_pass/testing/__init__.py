"""For the tests of models and engines: compile a module with the pass on, and assert what it did.

::

    from arfusion_pass import testing

    captured = testing.capture(model, x)                       # on a fake group of two ranks: one process, no GPU
    testing.assert_fused(captured.reports, 2, pattern="AllReduceFusedAddRMSNorm")
    assert captured.after["_c10d_functional.all_reduce.default"] == 0

With ``pytest_plugins = ["arfusion_pass.testing.plugin"]`` in a ``conftest.py``, the fixture ``fusion`` fuses everything
that a test compiles, and ``golden`` compares a text, such as ``captured.diff``, with a file.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from arfusion_pass.config import FusionConfig
from arfusion_pass.inspection.graph_diff import graph_diff, op_counts
from arfusion_pass.install import inductor_options
from arfusion_pass.reporting.reports import FusionReport, Reports
from arfusion_pass.rewrite.recording import Printed, watching

__all__ = ["Capture", "assert_fused", "capture", "fake_group"]


@dataclasses.dataclass(frozen=True)
class Capture:
    """What a compilation was and became.

    Attributes:
        result: what the compiled model returned; on a fake group the shapes count, not the values.
        reports: one for each graph.
    """

    result: Any
    reports: Reports

    @property
    def before(self) -> collections.Counter[str]:
        """How often each op was called before the pass, over all graphs."""
        return sum((op_counts(report.before or "") for report in self.reports), collections.Counter())

    @property
    def after(self) -> collections.Counter[str]:
        """How often each op is called after the pass, over all graphs."""
        return sum((op_counts(report.after or "") for report in self.reports), collections.Counter())

    @property
    def diff(self) -> str:
        """What the pass changed: op counts and a unified diff for each graph, without addresses or times."""
        return "\n".join(graph_diff(report.before or "", report.after or "") for report in self.reports)


def assert_fused(
    report: FusionReport | Reports, count: int, *, pattern: str | None = None, missed: int | None = 0
) -> None:
    """Assert that ``count`` sites are fused, and ``missed`` are not.

    Args:
        report: of one graph, or of several (``arf.reports()``, ``Capture.reports``).
        pattern: count only sites that this pattern fused.
        missed: how many sites may be missed; None: any number.

    Raises:
        AssertionError: with the whole report, and each missed site's reason.
    """
    fused = [site for site in report.fused if pattern in (None, site.pattern)]
    kind = "sites" if pattern is None else f"sites of {pattern}"
    if len(fused) != count:
        raise AssertionError(f"{len(fused)} {kind} are fused, expected {count}\n{report}")
    if missed is not None and len(report.missed) != missed:
        raise AssertionError(f"{len(report.missed)} sites are missed, expected {missed}\n{report}")


def capture(
    model: Callable[..., Any], *inputs: Any, config: FusionConfig | None = None, world: int = 2, **options: Any
) -> Capture:
    """Compile ``model`` with the pass on, run it once on ``inputs`` without gradients, and give what the pass did.

    Where torch.distributed is initialised, its groups are used as they are (gloo, NCCL: every rank calls this). Else a
    fake default group of ``world`` ranks stands for them: its collectives return at once and exchange nothing.

    Args:
        config: of the pass.
        **options: further options of Inductor.
    """
    torch.compiler.reset()
    group = contextlib.nullcontext() if dist.is_initialized() else fake_group(world)
    printed = Printed()
    with group, torch.no_grad(), watching(printed):
        compiled = torch.compile(model, options=inductor_options(config, **options))
        result = compiled(*inputs)
    return Capture(result, Reports(printed.reports))


@contextlib.contextmanager
def fake_group(world: int = 2) -> Iterator[None]:
    """A default group of ``world`` ranks of which this process is the first, and nobody else is there.

    Raises:
        RuntimeError: if torch.distributed is initialised already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("fake_group: torch.distributed is initialised already; use its groups")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
