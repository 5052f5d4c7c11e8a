"""Reports: what they say, as text and as JSON."""

from __future__ import annotations

import json

import pytest
import torch

import arfusion_pass as arf
from arfusion_pass.reporting.reports import Reports
from arfusion_pass.runtime import thresholds
from arfusion_pass.runtime.thresholds import ThresholdTable
from tests import sequence_parallel
from tests.models import Tensor, gemma, llama, reduce
from tests.simulate import STRICT, fused_copy, symbolic, tensors, trace

pytestmark = pytest.mark.usefixtures("world")


def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r + reduce(x)
    norm = gemma(total, w, 1e-5)
    return norm, total, reduce(norm) @ norm.t(), llama(reduce(norm, op="avg"), w, 1e-6)


@pytest.fixture
def report() -> arf.FusionReport:
    return fused_copy(trace(model, *tensors((4, 32), (4, 32), (32,))))[1]


def test_sites(report: arf.FusionReport) -> None:
    """One site for each all-reduce, in graph order, fused or with a reason, never both."""
    assert [(site.name, site.fused) for site in report.sites] == [
        ("all_reduce", True),
        ("all_reduce_1", False),
        ("all_reduce_2", False),
    ]
    assert all((site.reason is None) == site.fused == (site.pattern is not None) for site in report.sites)
    site = report.fused[0]
    assert (site.pattern, site.group, site.dtype) == ("AllReduceFusedAddGemmaRMSNorm", "0", "bfloat16")
    assert (site.outputs, site.dialect) == (("residual_out", "norm_out"), "functional_collectives+aten")
    assert site.nodes[:3] == ("all_reduce", "wait_tensor", "add")
    assert report.matched_count == 1
    assert report.seconds > 0


def test_json(report: arf.FusionReport) -> None:
    """Plain JSON with every field of every site."""
    data = json.loads(report.to_json())
    assert (data["matched_count"], data["note"]) == (1, None)
    assert [site["name"] for site in data["sites"]] == [site.name for site in report.sites]
    assert data["sites"][0]["outputs"] == ["residual_out", "norm_out"]
    assert "avg" in data["sites"][2]["reason"]


def test_text(report: arf.FusionReport) -> None:
    """The table names counts, patterns and reasons; several graphs make one table."""
    text = str(report)
    for word in ("1 of 3 sites fused", "AllReduceFusedAddGemmaRMSNorm", "all_reduce_2", "'avg'"):
        assert word in text
    both = Reports([report, report])
    assert both.matched_count == 2
    assert len(both.missed) == 4
    assert "2 of 6 sites fused" in str(both)
    assert "no" in str(arf.FusionReport()).lower()
    assert str(Reports())


def test_recording_keeps_the_graphs() -> None:
    """While recording, a report holds the graph before and after; otherwise neither."""
    module = trace(model, *tensors((4, 32), (4, 32), (32,)))
    assert fused_copy(module)[1].before is None
    with arf.inspection.recording():
        report = fused_copy(module)[1]
    assert "_c10d_functional.all_reduce" in str(report.before)
    assert "arfusion.allreduce_rms_norm" in str(report.after)


@pytest.mark.parametrize("tokens", [4, 64, "s"])
def test_strategy(monkeypatch: pytest.MonkeyPatch, tokens: int | str) -> None:
    """What the kernels take by the table at static rows, by their number at symbolic ones; nothing on a CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(thresholds, "load", lambda: ThresholdTable({"sm_90": {"2": {"*": 16 * 32 * 2}}}, "test"))
    wanted = {4: "oneshot", 64: "twoshot", "s": "oneshot to 16 tokens, twoshot beyond"}[tokens]

    def strategies(device: str, config: arf.FusionConfig = STRICT) -> list[str | None]:
        x, r, w = symbolic((tokens, 32), (tokens, 32), (32,))
        with x.fake_mode:  # type: ignore[attr-defined]
            given = [torch.empty(each.shape, dtype=each.dtype, device=device) for each in (x, r, w)]
        return [site.strategy for site in arf.fuse(trace(model, *given), config).sites]

    assert strategies("cuda") == [wanted, None, None], "of a fused site alone"
    assert strategies("cuda", arf.FusionConfig(strategy="twoshot")) == ["twoshot", None, None]
    assert strategies("cuda", arf.FusionConfig(backend="reference")) == [None, None, None]
    assert strategies("cpu") == [None, None, None]


def test_no_strategy_of_a_reduce_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process group runs sequence parallelism's op: the kernels' table says nothing of it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    x, r, w = symbolic((4, 32), (2, 32), (32,))
    with x.fake_mode:  # type: ignore[attr-defined]
        given = [torch.empty(each.shape, dtype=each.dtype, device="cuda") for each in (x, r, w)]
    (site,) = arf.fuse(trace(lambda x, r, w: sequence_parallel.block(x, r, w, 2, llama), *given), STRICT).sites
    assert (site.fused, site.strategy) == (True, None)
