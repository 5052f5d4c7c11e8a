"""Property: whatever a graph's sites are drawn from, what is fused means the same and what is not says why.

Here every graph is captured from ``torch.compile`` and fused in this process, on simulated ranks; a few are compiled
whole on two gloo ranks. By environment variable: ``ARFUSION_FUZZ_GRAPHS`` graphs (50 in CI, 500 and more at night)
within ``ARFUSION_FUZZ_SECONDS``, others than CI's by ``ARFUSION_FUZZ_SEED``; ``ARFUSION_FUZZ_COMPILED`` of them whole.
``pytest -s`` prints the counts.
"""

from __future__ import annotations

import collections
import os
import random
import time
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch._inductor import config as inductor_config

import arfusion_pass as arf
from arfusion_pass import groups
from arfusion_pass.dialects import DIALECTS
from arfusion_pass.inspection import replay
from arfusion_pass.inspection.graph_diff import print_graph
from tests import random_sites as rs
from tests.helpers import run_ranks
from tests.models import OTHER_ROOTS
from tests.simulate import STRICT, Interpreter, captured, copied, fake_world, shared_memory, simulated_ranks

GRAPHS = int(os.environ.get("ARFUSION_FUZZ_GRAPHS", "50"))
SECONDS = float(os.environ.get("ARFUSION_FUZZ_SECONDS", "120"))
COMPILED = int(os.environ.get("ARFUSION_FUZZ_COMPILED", "8"))
SEED = os.environ.get("ARFUSION_FUZZ_SEED")
WORLD = 3


@pytest.fixture
def engine_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fake world of three ranks that has the engine's ops and its name for the group."""
    monkeypatch.setattr(groups, "_registered", {})
    rs.register()
    with fake_world(WORLD):
        register_groups(WORLD)
        yield


def register_groups(world: int) -> None:
    """The engines' names for the group of all ranks."""
    for name in (rs.ENGINE_GROUP, f"trtllm:{','.join(map(str, range(world)))}"):
        arf.register_group(name, dist.group.WORLD)


def few(check: replay.SiteCheck) -> bool:
    """Whether nothing but a few elements of the norm differ: the contract's 0.1 % is less than two elements of graphs
    this small, and a norm by division differs in one of some thousands."""
    rare = {role for role, found in check.checks.items() if found.mismatched <= 4}
    return {role for role, found in check.checks.items() if found.mismatched} <= rare & {"norm_out"}


def run(module: torch.fx.GraphModule, inputs: list[Any]) -> list[Any]:
    """The outputs on the simulated ranks."""
    own = [value.clone() if isinstance(value, torch.Tensor) else value for value in inputs]
    with simulated_ranks(), torch.no_grad():
        return list(Interpreter(module).run(*own))


def graph_inputs(module: torch.fx.GraphModule, graph: rs.Graph, tokens: int) -> list[Any]:
    """:func:`random_sites.example_inputs` in the order of a captured graph's placeholders: of first use."""
    made = rs.example_inputs(graph, tokens=tokens)

    def key(value: torch.Tensor, count: int) -> tuple[Any, ...]:
        return value.dtype, tuple(size if isinstance(size, int) and size != count else -1 for size in value.shape)

    found: list[Any] = []
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):  # of two alike, the first is used first
            wanted = key(value, rs.TOKENS)
            found.append(made.pop(next(i for i, each in enumerate(made) if key(each, tokens) == wanted)))
        else:
            found.append(tokens)
    return found


def check_graph(graph: rs.Graph, counts: collections.Counter[str]) -> None:
    """Contracts *sound* and *exact* on one graph; what it held is added to ``counts``."""
    with inductor_config.patch(enable_auto_functionalized_v2=graph.functionalized_v2):
        module = captured(
            rs.Program(graph, WORLD), rs.example_inputs(graph), dynamic=rs.TOKENS if graph.dynamic else None
        )
    rs.undecompose(module.graph)
    numbers = rs.numbered(module.graph)
    assert sorted(numbers.values()) == list(range(len(graph.sites)))
    fused = copied(module)
    with replay.recording() as recorder:
        report = arf.fuse(fused, STRICT)
        fused.graph.lint()
        text = f"{graph}\n{report}\n{print_graph(module.graph)}"
        assert [site.name for site in report.sites] == list(numbers), text
        assert all(site.reason for site in report.missed), text
        assert len(rs.all_reduces(fused.graph)) == len(report.missed), text
        for site in report.fused:
            drawn = graph.sites[numbers[site.name]]
            assert not drawn.unsound or drawn.unsound in rs.IN_PART, text
            if not drawn.unsound and drawn.quantiser in rs.UNSOUND_QUANTISERS and drawn.fan_out != "other quantiser":
                assert site.quantiser is None, text
        for tokens in (rs.TOKENS, 3) if graph.dynamic else (rs.TOKENS,):
            inputs = graph_inputs(module, graph, tokens)
            wanted, got = run(module, inputs), run(fused, inputs)
            assert shared_memory(got) <= shared_memory(wanted), text
            exact = all(site.norm not in OTHER_ROOTS for site in graph.sites)  # its root is spelled otherwise
            for index, (a, b) in enumerate(zip(wanted, got, strict=True)):
                assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()), f"output {index}\n{text}"
                if exact:
                    check = replay.compare(b, a)
                    assert check.mismatched == 0, f"output {index}: {check}\n{text}"
    with simulated_ranks():
        problems = [check.detail for check in recorder.checks() if not check.ok and (exact or not few(check))]
    assert not problems, f"{problems}\n{text}"
    counts.update(graphs=1, sites=len(report.sites), fused=len(report.fused))
    counts["quantised"] += sum(site.quantiser is not None for site in report.fused)
    for site in report.fused:
        counts.update(f"fused: {name}" for name in site.dialect.split("+"))
        drawn = graph.sites[numbers[site.name]]
        expected = drawn.quantiser and not drawn.unsound and drawn.quantiser not in rs.UNSOUND_QUANTISERS
        if expected and site.quantiser is None:
            drawing = f"{drawn.quantiser} {drawn.norm} {drawn.gamma} {drawn.fan_out} {drawn.between} {graph.dtype}"
            counts[f"quantiser left: {drawing} {graph.rank}D v{graph.functionalized_v2 + 1}: {site.note}"] += 1
    for site in report.missed:
        drawn = graph.sites[numbers[site.name]]
        if not drawn.unsound:
            counts["missed though sound"] += 1
            front = f"{drawn.prologue} {drawn.collective} {drawn.around}"
            drawing = f"{front} {drawn.norm} {drawn.residual} {drawn.gamma} {graph.dtype}"
            counts[f"missed: {drawing}: {site.reason}"] += 1


@pytest.mark.slow
def test_captured(engine_world: None) -> None:
    """Graphs drawn by hypothesis, which shrinks what fails; most sites that could fuse do."""
    counts: collections.Counter[str] = collections.Counter()
    start = time.monotonic()

    @settings(
        max_examples=GRAPHS,
        deadline=None,
        derandomize=SEED is None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        graph = rs.draw_graph(lambda options: data.draw(st.sampled_from(options)))
        if time.monotonic() - start < SECONDS:  # after the drawing, which may depend on nothing but the data
            check_graph(graph, counts)

    (check if SEED is None else seed(int(SEED))(check))()
    print("\n" + "\n".join(f"{count:6} {what}" for what, count in counts.most_common()))
    assert counts["fused"] > 4 * counts["missed though sound"]
    drawn = {what.removeprefix("fused: ") for what in counts if what.startswith("fused: ")}
    assert drawn == {dialect.name for dialect in DIALECTS} or counts["sites"] < 400


def _compiled(rank: int, world: int, seeds: list[int]) -> list[tuple[str, int, int, list[str]]]:
    """(error or nothing, sites, fused, problems) of each graph on one rank."""
    rs.register()
    register_groups(world)
    results = []
    for number in seeds:
        graph = rs.draw_graph(random.Random(number).choice, most=3)
        torch._dynamo.reset()
        inputs = rs.example_inputs(graph, rank)
        if graph.dynamic:
            for tensor in inputs:
                for dim, size in enumerate(tensor.shape):
                    if size == rs.TOKENS:
                        torch._dynamo.mark_dynamic(tensor, dim)
        error, problems, sites, fused = "", [], 0, 0
        try:
            with (
                inductor_config.patch(enable_auto_functionalized_v2=graph.functionalized_v2, fx_graph_cache=False),
                torch.no_grad(),
                replay.recording() as recorder,
            ):
                torch.compile(rs.Program(graph, world), options=arf.inductor_options(STRICT), fullgraph=True)(*inputs)
            sites = sum(len(report.sites) for report in recorder.reports)
            fused = sum(report.matched_count for report in recorder.reports)
            problems = [f"{graph}: {check.site.name}: {check.detail}" for check in recorder.checks() if not check.ok]
            problems += [] if sites == len(graph.sites) else [f"{graph}: {sites} sites in the report"]
        except Exception:
            error = f"{graph}\n{traceback.format_exc()}"
        results.append((error, sites, fused, problems))
        dist.barrier()
    return results


def sound(graph: rs.Graph) -> bool:
    """Whether gloo can run a graph (it has no average)."""
    return all(site.unsound not in rs.UNSOUND_OPS for site in graph.sites)


@pytest.mark.slow
def test_compiled() -> None:
    """Graphs compiled whole on two real ranks: each fused call within the contract."""
    seeds = [n for n in range(1000) if sound(rs.draw_graph(random.Random(n).choice, most=3))][:COMPILED]
    for results in run_ranks(2, _compiled, seeds, timeout=900):
        for error, _, _, problems in results:
            assert not error, error
            assert not problems, problems
    assert sum(fused for _, _, fused, _ in results) > 0
