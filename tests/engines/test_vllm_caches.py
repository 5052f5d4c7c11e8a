"""Second starts of the real vLLM from its own caches: with the plug-in, without it, with another version of it.

Each start is two gloo ranks in fresh processes (``vllm_start.py``). Skipped where vLLM is not installed.
"""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import pytest
import torch

from arfusion_pass.cli import verify
from tests.engines.vllm_start import HIDDEN, LAYERS, TOKENS, start
from tests.helpers import run_ranks

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)


MODULES = [f"layers.{number}" for number in range(LAYERS)]


def told(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """The reports of a start, without what differs from start to start."""
    return [
        {name: value for name, value in report.items() if name not in ("cached", "seconds")}
        for report in outcome["reports"]
    ]


@pytest.mark.parametrize("mega", ["0", "1"])
def test_second_starts(mega: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache root for all: what a start with the plug-in wrote is loaded by the next one, fused throughout and equal
    to the bit, and reported as by the first; no other start ever sees it, nor it theirs. Plain artefacts, and "mega"
    artefacts, which hold everything and are loaded before any pass manager exists."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("VLLM_USE_MEGA_AOT_ARTIFACT", mega)
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "0")

    def run(**environment: str) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            outcomes = run_ranks(2, start, timeout=900.0)
        assert torch.equal(outcomes[0]["out"], outcomes[1]["out"])
        return outcomes[0]

    first = run()
    assert (first["aot_saved"], first["aot_loaded"], first["missed"]) == (1, 0, []), first
    assert first["compiled"] > 0
    assert first["fused_calls"] == LAYERS

    assert [site["module"] for report in first["reports"] for site in report["sites"]] == MODULES

    dump = tmp_path / "dump"
    second = run(ARFUSION_DUMP=str(dump))
    assert (second["aot_saved"], second["aot_loaded"]) == (0, 1), second
    assert second["loaded"] > 0
    assert all(report["cached"] for report in second["reports"])
    assert told(second) == told(first), "each graph is reported as it was when it was compiled"
    verdict = verify.read(dump)
    assert (verdict.ranks, verdict.problems, verdict.reports.matched_count) == (("rank0", "rank1"), (), LAYERS)
    assert second["fused_calls"] == LAYERS, "fused as it was stored, by a group that the plug-in's source found"
    assert torch.equal(second["out"], first["out"])

    upgraded = run(START_SOURCES="another version")
    assert (upgraded["aot_saved"], upgraded["aot_loaded"], upgraded["fused"]) == (1, 0, first["fused"]), upgraded

    off = run(ARFUSION_VLLM="0")
    assert (off["aot_saved"], off["aot_loaded"], off["fused"], off["fused_calls"]) == (1, 0, 0, 0), off

    removed = run(START_PLUGIN="0")  # loads what the start with the plug-in switched off wrote: the same vanilla graph
    assert (removed["plugin"], removed["aot_saved"], removed["aot_loaded"]) == (False, 0, 1), removed
    assert torch.equal(removed["out"], off["out"])
    scale = off["out"].abs().max().item()
    assert (removed["out"] - first["out"]).abs().max().item() < 0.05 * scale

    back = run()  # the cache now holds the others' graphs too
    assert (back["aot_loaded"], back["fused_calls"]) == (1, LAYERS), back
    assert told(back) == told(first)
    assert torch.equal(back["out"], first["out"])


def starts(world: int = 2, **environment: str) -> dict[str, Any]:
    """One start: what its first rank tells, after it was compared with the others."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        outcomes = run_ranks(world, start, timeout=900.0)
    seen = [
        (each["loaded"], each["fused_calls"], [{**report, "rank": None} for report in told(each)]) for each in outcomes
    ]
    assert seen == [seen[0]] * world, "the ranks are of one mind"
    assert all(torch.equal(each["out"], outcomes[0]["out"]) for each in outcomes)
    return outcomes[0]


def loaded(outcome: dict[str, Any]) -> bool:
    """Whether a start took its graphs from a cache: all of them, or none."""
    all_cached = {report["cached"] for report in outcome["reports"]}
    assert len(all_cached) == 1, outcome["reports"]
    return all_cached.pop()


@pytest.mark.parametrize("way", ["plain", "mega", "own folder"])
def test_sizes_on_one_cache(way: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, four, one, two and four again on one cache root, or in one folder that the user names: each size loads
    what it wrote itself, fused throughout, equal to the bit; one rank has nothing to fuse, and sees no other's."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("VLLM_USE_MEGA_AOT_ARTIFACT", str(int(way == "mega")))
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "0")
    if way == "own folder":
        monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "0")
        monkeypatch.setenv("START_CACHE_DIR", str(tmp_path / "named"))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # with AOT artefacts vLLM sets it
    firsts: dict[int, dict[str, Any]] = {}
    for world in (2, 4, 1, 2, 4):
        outcome = starts(world)
        assert outcome["fused_calls"] == (LAYERS if world > 1 else 0)
        assert outcome["missed"] == []
        assert loaded(outcome) == (world in firsts), (world, outcome)
        first = firsts.setdefault(world, outcome)
        assert told(outcome) == told(first)
        assert torch.equal(outcome["out"], first["out"])


def test_settings_on_one_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that changes what is fused is a cache of its own; one that only says how a fused call runs, or what is
    told of it, shares the cache."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("VLLM_USE_MEGA_AOT_ARTIFACT", "1")
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "0")
    first = starts()
    assert (loaded(first), first["fused_calls"]) == (False, LAYERS)
    filtered = starts(ARFUSION_CONFIG='{"epsilons": [1e-5]}')
    assert (loaded(filtered), filtered["fused_calls"], len(filtered["missed"])) == (False, 0, LAYERS), filtered
    moved = starts(ARFUSION_CONFIG='{"reassociate": true}')
    assert (loaded(moved), moved["fused_calls"]) == (False, LAYERS)
    same = starts(ARFUSION_CONFIG="{}", ARFUSION_LOG="info", ARFUSION_LIBRARY="/nowhere.so", ARFUSION_BUILD="0")
    assert (loaded(same), told(same)) == (True, told(first))
    assert torch.equal(same["out"], first["out"])
    again = starts(ARFUSION_CONFIG='{"epsilons": [1e-5]}')
    assert (loaded(again), again["fused_calls"], again["missed"]) == (True, 0, filtered["missed"])


def test_a_quantised_start(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's per-token FP8 quantiser behind each norm goes into the fused call, and each rank gives what plain torch
    does. (Unfused it does not, probably because vLLM's all-reduce returns its input on the CPU.)"""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("START_QUANTISED", "1")
    outcomes = run_ranks(2, start, timeout=900.0)
    sites = [site for report in outcomes[0]["reports"] for site in report["sites"]]
    pattern = "AllReduceFusedAddRMSNormTokenQuantFP8"
    assert [(site["module"], site["pattern"]) for site in sites] == [(module, pattern) for module in MODULES]
    for outcome, expected in zip(outcomes, _quantised(2), strict=True):
        assert outcome["fused_calls"] == LAYERS
        assert (outcome["out"] - expected).abs().max().item() < 0.02 * expected.abs().max().item()


def _quantised(world: int) -> list[torch.Tensor]:
    """What the toy gives on each rank."""
    weights = []
    for rank in range(world):
        torch.manual_seed(rank)
        weights.append([(torch.randn(HIDDEN, HIDDEN) / 8).bfloat16() for _ in range(LAYERS)])
    norm = (1 + torch.rand(HIDDEN, generator=torch.Generator().manual_seed(0))).bfloat16()
    residual = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    xs = [residual] * world
    for layer in zip(*weights, strict=True):
        reduced = sum((x * 0.5 @ weight).float() for x, weight in zip(xs, layer, strict=True))
        total = reduced.bfloat16().float() + residual.float()  # type: ignore[union-attr]
        residual = total.bfloat16()
        x = (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16() * norm
        scale = x.float().abs().amax(-1, keepdim=True) / 448.0
        codes = (x.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        xs = [(codes.float() * scale).bfloat16() @ weight for weight in layer]
    return [(x + residual).float() for x in xs]
