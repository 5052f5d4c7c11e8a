"""Runs many small graphs through ``torch.compile`` on two gloo ranks in one go and says what became of each."""

from __future__ import annotations

import dataclasses
import importlib
import re
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._inductor import config as inductor_config

from tests.helpers import run_ranks

TOKENS, HIDDEN = 6, 256
EPSILON = 1e-6
COLLECTIVE = re.compile(r"(?<!\w)(?!arfusion)\w+\.\w*all_?reduce\w*\.default")


@dataclasses.dataclass(frozen=True)
class Case:
    """One graph.

    Attributes:
        fn: of ``inputs``; compiled.
        inputs: made on each rank after seeding with its rank.
        patterns: of the sites that must fuse, in order.
        missed: for each site that must not, a part of its reason.
        note: a part of the first fused site's note on a quantiser left alone.
        config: keywords of ``FusionConfig``.
        dynamic: compile for symbolic token counts (``mark_dynamic`` on the first dimension of the first two inputs).
    """

    fn: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]
    patterns: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()
    note: str | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    dynamic: bool = False


@dataclasses.dataclass
class Outcome:
    """What one rank saw of a case."""

    patterns: list[str]
    dialects: list[str]
    missed: list[str]
    notes: list[str]
    problems: list[str]
    after: str
    differing: float
    error: str | None = None


def bf16(*shape: int) -> torch.Tensor:
    """A bf16 tensor that differs between ranks, after seeding with the rank."""
    return torch.randn(*shape).bfloat16()


def standard() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x``, a residual that all ranks share, and a weight that all ranks share."""
    x = bf16(TOKENS, HIDDEN)
    generator = torch.Generator().manual_seed(7)
    residual = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    weight = (1 + 0.2 * torch.randn(HIDDEN, generator=generator)).bfloat16()
    return x, residual, weight


def run(module: str, names: list[str], functionalized_v2: bool, timeout: float = 400.0) -> dict[str, Outcome]:
    """Run cases of ``module`` (it has ``CASES`` and ``register()``) on two ranks; the first rank's outcomes."""
    results = run_ranks(2, _rank, module, names, functionalized_v2, timeout=timeout)
    return {name: Outcome(**outcome) for name, outcome in results[0].items()}


def _rank(rank: int, world: int, module: str, names: list[str], functionalized_v2: bool) -> dict[str, dict[str, Any]]:
    import arfusion_pass as arf
    from arfusion_pass.inspection import replay

    cases = importlib.import_module(module)
    cases.register()
    arf.register_group("tp:0", dist.group.WORLD)
    outcomes: dict[str, dict[str, Any]] = {}
    for name in names:
        case: Case = cases.CASES[name]
        torch._dynamo.reset()
        torch.manual_seed(rank)
        inputs = case.inputs()
        if case.dynamic:
            for tensor in inputs[:2]:
                torch._dynamo.mark_dynamic(tensor, 0)
        config = arf.FusionConfig(raise_errors=True, **case.config)
        outcome = Outcome([], [], [], [], [], "", 0.0)
        try:
            expected = case.fn(*[value.clone() if isinstance(value, torch.Tensor) else value for value in inputs])
            with (
                inductor_config.patch(enable_auto_functionalized_v2=functionalized_v2, fx_graph_cache=False),
                torch.no_grad(),
                replay.recording() as recorder,
            ):
                actual = torch.compile(case.fn, options=arf.inductor_options(config), fullgraph=True)(*inputs)
            report = recorder.reports[0]
            outcome.patterns = [site.pattern or "" for site in report.fused]
            outcome.dialects = [site.dialect for site in report.sites]
            outcome.missed = [f"{site.name}: {site.reason}" for site in report.missed]
            outcome.notes = [site.note or "" for site in report.fused]
            outcome.problems = [check.detail for check in recorder.checks() if not check.ok]
            outcome.after = report.after or ""
            outcome.differing = max(map(_differing, _tensors(actual), _tensors(expected)), default=0.0)
        except Exception:
            outcome.error = traceback.format_exc()
        outcomes[name] = dataclasses.asdict(outcome)
        dist.barrier()
    return outcomes


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [item for item in value if isinstance(item, torch.Tensor)]


def _differing(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of elements that differ in their bits; 1.0 if shapes, strides or dtypes do."""
    if a.dtype != b.dtype or a.shape != b.shape or a.stride() != b.stride():
        return 1.0
    a, b = a.contiguous(), b.contiguous()
    if a.dtype.itemsize == 1:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return (a != b).float().mean().item() if a.numel() else 0.0


def verify(case: Case, outcome: Outcome) -> None:
    """What every case must show: the expected sites, no collective left of a fused one, results within the contract."""
    assert outcome.error is None, outcome.error
    assert sorted(outcome.patterns) == sorted(case.patterns), (outcome.patterns, outcome.missed, outcome.after)
    assert len(outcome.missed) == len(case.missed), outcome.missed
    for reason, part in zip(outcome.missed, case.missed, strict=True):
        assert part in reason, reason
    assert case.note is None or case.note in outcome.notes[0], outcome.notes
    assert len(COLLECTIVE.findall(outcome.after)) == len(case.missed), outcome.after
    assert not outcome.problems, (outcome.problems, outcome.after)
