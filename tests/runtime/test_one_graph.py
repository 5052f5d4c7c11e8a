"""Ranks whose graphs differ end in an error that names ranks, all-reduces and reasons; ranks that agree pay nothing."""

from __future__ import annotations

import datetime
import functools
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc

import arfusion_pass as arf
from arfusion_pass.ops import marks
from arfusion_pass.ops.marks import MARK_SHIFT, Step, mark_of
from arfusion_pass.runtime import agreement, one_graph
from arfusion_pass.runtime.one_graph import difference
from tests.helpers import run_ranks
from tests.post_grad import compiled

FUSED = Step(True, "bfloat16 [..., 4096] flags 0x0", "all_reduce")
WIDER = Step(True, "bfloat16 [..., 8192] flags 0x0", "all_reduce")
MISSED = Step(False, "", "all_reduce_1: mean reads a value of the norm")


def rows(*steps: Step) -> list[list[str]]:
    return [[step.key, step.text] for step in steps]


def test_a_mark_follows_what_ranks_have_in_common() -> None:
    """Fused or missed, in order, and the message; not names, nor reasons. It fits beside every flag, in an int64."""
    other_text = Step(True, FUSED.message, "all_reduce_7")
    assert mark_of([FUSED, MISSED]) == mark_of([other_text, Step(False, "", "another reason")])
    different = [[FUSED], [WIDER], [MISSED], [FUSED, MISSED], [MISSED, FUSED], [FUSED, FUSED]]
    assert len({mark_of(steps) for steps in different}) == len(different)
    for steps in different:
        flags = 3 | mark_of(steps) << MARK_SHIFT
        assert 0 < flags < 1 << 63
        assert (marks.without_mark(flags), marks.mark_in(flags)) == (3, mark_of(steps))


@pytest.mark.parametrize(
    ("everyone", "problem"),
    [
        ([rows(FUSED, FUSED), rows(FUSED)], None),  # a graph that ends elsewhere
        ([rows(FUSED, MISSED), rows(FUSED)], None),
        (
            [rows(FUSED, MISSED), rows(FUSED, FUSED)],
            "all-reduce 2 of the graph is not the same on all of them (rank 0: missed, all_reduce_1: mean reads a "
            "value of the norm; rank 1: fused bfloat16 [..., 4096] flags 0x0, all_reduce)",
        ),
        ([rows(FUSED), rows(FUSED), rows(WIDER)], "all-reduce 1 of the graph"),
        ([rows(FUSED), None], "rank 1 loaded its graph from Inductor's cache"),
    ],
)
def test_difference(everyone: list[list[list[str]] | None], problem: str | None) -> None:
    found = difference(everyone)
    assert found == problem or (problem is not None and problem in str(found))


def _agree(name: str, steps: list[Step], reduced: str = "bfloat16 [4, 4096]") -> str:
    """What a first call with these steps comes to: "" or the error."""
    mark = mark_of(steps)
    marks.remember(name, mark, steps)
    try:
        one_graph.agree(name, mark, lambda: reduced)
    except RuntimeError as error:
        return str(error)
    return ""


def _call(name: str, tokens: int) -> str:
    """What a fused call of a graph comes to on the reference: "" or the error."""
    x, weight = torch.ones(tokens, 32), torch.ones(32)
    flags = mark_of([FUSED]) << MARK_SHIFT
    try:
        torch.ops.arfusion.allreduce_rms_norm(
            x, None, weight, None, name, 1e-6, 0.0, flags, 0, 0.0, 1.0,
            allreduce_out=None, residual_out=None, norm_out=torch.empty_like(x), quant_out=None, scale_out=None,
        )  # fmt: skip
    except RuntimeError as error:
        return str(error)
    return ""


def _compare(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    groups = [dist.new_group(list(range(world)), timeout=datetime.timedelta(seconds=3)) for _ in range(5)]
    names = [group.group_name for group in groups]
    calls = []
    exchange = agreement.exchange

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1])
        return exchange(*args, **kwargs)

    agreement.exchange = counted  # type: ignore[assignment]
    results["same"] = [_agree(names[0], [FUSED]), _agree(names[0], [FUSED]), _agree(names[0], [FUSED, MISSED])]
    results["calls"] = len(calls)
    results["differ"] = [_agree(names[1], [FUSED, FUSED if rank else MISSED]) for _ in range(2)]
    results["other group"] = _agree(names[0], [WIDER])
    results["ends elsewhere"] = [
        _agree(names[2], [FUSED] * (1 + rank)),
        _agree(names[2], [FUSED, *[MISSED] * (1 + rank)]),
    ]
    results["other shape"] = [_call(names[4], tokens) for tokens in (4 + 2 * rank, 4)]
    began = time.monotonic()
    if rank == 0:  # it stands in the all-reduce that it missed, in front of the one that it fused: it never comes
        marks.remember(names[3], mark_of([MISSED, FUSED]), [MISSED, FUSED])
        dist.barrier()
    else:
        agreement.PATIENCE = datetime.timedelta(seconds=0.5)
        said: list[str] = []
        agreement.log.addFilter(lambda record: said.append(record.getMessage()) or True)  # type: ignore[func-returns-value]
        results["alone"] = _agree(names[3], [FUSED])
        results["said"] = list(said)
        dist.barrier()
    results["seconds"] = time.monotonic() - began
    one_graph._groups.clear()
    if rank:  # the other has the pass off, and no note of its own
        store = dist.distributed_c10d._get_process_group_store(groups[3])
        store.delete_key(one_graph._note(names[3], 0))
        results["off there"] = _agree(names[3], [FUSED])
    dist.barrier()
    os.environ["ARFUSION_AGREEMENT"] = "0"
    results["off"] = _agree(names[3], [WIDER] * (1 + rank))
    dist.barrier()
    return results


def test_ranks_compare_a_mark_once() -> None:
    first, second = run_ranks(2, _compare)
    for result in (first, second):
        assert result["same"] == ["", "", ""]
        assert result["calls"] == 2, "once for each mark"
        assert result["differ"][0] == result["differ"][1]
        assert "do not run one graph: all-reduce 2 of the graph is not the same" in result["differ"][0]
        assert "rank 0: missed, all_reduce_1: mean reads a value of the norm; rank 1: fused" in result["differ"][0]
        assert result["other group"] == ""
        assert result["ends elsewhere"] == ["", ""]
        assert result["off"] == ""
        for said in result["other shape"]:  # and from then on: what was exchanged last is not known
            assert "do not make the same calls: the first of a graph reduces rank 0: float32 [4, 32]; rank 1: " in said
            assert "float32 [6, 32]. All ranks have to call a group in one order, with the same shapes" in said
    assert re.match(r"arfusion: rank 0 of group '\w+' did not", second["alone"])
    assert "did not answer rank 1, which is comparing what the pass fused, within 3 s" in second["alone"]
    missed = "It has compiled a graph in which it left alone all_reduce_1: mean reads a value of the norm"
    assert missed in second["alone"]
    (said,) = second["said"]  # long before
    assert said.startswith("arfusion: rank 1 waits for rank 0 of group")
    assert missed in said
    assert "have to run one graph, with the pass on," in second["off there"]
    assert second["seconds"] < 30


def test_fake_groups_and_a_world_of_one_ask_nobody(world: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked")

    monkeypatch.setattr(agreement, "exchange", nobody)
    assert _agree("0", [FUSED]) == ""
    marks.remember("0", 0, [MISSED])


def _model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, statistic: bool) -> tuple[torch.Tensor, ...]:
    """Two sites; with ``statistic`` the second one's root leaves the graph, and the site is missed."""
    outputs = []
    for last in (False, True):
        r = r + fc.all_reduce(x, "sum", dist.group.WORLD)
        h = r.float()
        root = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        x = w * (h * root).to(x.dtype)
        outputs += [root] if statistic and last else []
    return (x, r, *outputs)


def _compile(rank: int, world: int, statistic_on: int, cache: str | None) -> dict[str, Any]:
    """Compile and run on this rank: up to the post-grad passes, or the whole way through Inductor and its cache."""
    fusion = arf.AllReduceFusionPass(arf.FusionConfig(raise_errors=True))
    fn = functools.partial(_model, statistic=rank == statistic_on)
    if cache is None:
        run = compiled(fn, fusion)
    else:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/{rank}"
        run = torch.compile(fn, options={"post_grad_custom_post_pass": fusion})
    generator = torch.Generator().manual_seed(rank)
    w = torch.ones(32).bfloat16()
    results: dict[str, Any] = {"error": "", "difference": 0.0}
    for tokens in (4, 6) if cache is None else (4,):  # the second shape compiles again
        x, r = (torch.randn(tokens, 32, generator=generator).bfloat16() for _ in range(2))
        with torch.no_grad():
            want = fn(x, r, w)
            try:
                got = run(x, r, w)
            except Exception as error:
                results["error"] = str(error)
                break
        apart = [(a.float() - b.float()).abs().max().item() for a, b in zip(want, got, strict=True)]
        results["difference"] = max(results["difference"], *apart)
    seen = sum(not report.cached for report in fusion.reports)
    return {**results, "graphs": seen, "fused": fusion.reports.matched_count}


def test_one_graph_on_all_ranks() -> None:
    """Right results, recompiled too."""
    for result in run_ranks(2, _compile, -1, None, timeout=300):
        assert result["error"] == ""
        assert result["fused"] == 4
        assert result["difference"] < 0.1


def test_a_statistic_on_one_rank() -> None:
    """Both ranks raise at once, saying which all-reduce rank 0 missed and why."""
    began = time.monotonic()
    for result in run_ranks(2, _compile, 0, None, timeout=300):
        assert "the ranks of group '0' do not run one graph: all-reduce 2 of the graph is not" in result["error"]
        assert "(rank 0: missed, all_reduce_1: " in result["error"]
        assert "; rank 1: fused bfloat16 [..., 32]" in result["error"]
    assert time.monotonic() - began < 250, "not the group's timeout"


def test_a_statistic_on_one_rank_behind_a_cache(tmp_path: Path) -> None:
    """A second process loads both graphs as they were stored, marks and all: both ranks raise again."""
    for expected, graphs in (("rank 0: missed, all_reduce_1: ", 1), ("rank 0, 1 loaded its graph from", 0)):
        for result in run_ranks(2, _compile, 0, str(tmp_path), timeout=500):
            assert "the ranks of group '0' do not run one graph" in result["error"]
            assert expected in result["error"]
            assert result["graphs"] == graphs
