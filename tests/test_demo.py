"""The main job: two gloo ranks, a tensor-parallel model, every site fused and exact."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import arfusion_pass
from arfusion_pass.cli.streams import ended_by_signals
from arfusion_pass.demo import run
from arfusion_pass.demo.model import NORMS, Decoder, ModelConfig, initialise
from arfusion_pass.demo.run import Options, Result
from arfusion_pass.demo.text import Comparison, comparison_table
from arfusion_pass.inspection.replay import OutputCheck, SiteCheck
from arfusion_pass.reporting.reports import FusionReport, Reports
from arfusion_pass.reporting.sites import Site

CPU = Options(device="cpu", layers=1, hidden=64, tokens=8)


def test_two_ranks_fuse_everything_exactly(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run.main(dataclasses.replace(CPU, layers=2, diff=True, html=str(page))) == 0
    text = capsys.readouterr().out
    assert "5 of 5 sites fused, none missed, in 1 graph" in text
    assert re.search(r"_c10d_functional.all_reduce.default +5 +0 +-5", text)
    assert re.search(r"arfusion.allreduce_rms_norm.default +0 +5 +\+5", text)
    assert text.count(" yes\n") == 5
    assert "PASSED" in text
    assert re.search(
        r"sites fused +5 of 5\ncalls exact +5 of 5\na step, unfused +[\d.]+ ms\na step, fused +[\d.]+ ms", text
    )
    assert page.read_text().count(">exact</span>") == 5, "the page shows what each site's replay found"


def _waits(rank: int, options: Options, folder: str) -> None:
    """A rank in a collective whose peer never comes."""
    Path(options.html or "", f"rank{rank}").write_text(str(os.getpid()))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which it gets when its parent dies: C code does not see it
    time.sleep(300)


def test_whoever_ends_the_demo_ends_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM, as `timeout` sends it: no rank and no folder is left behind."""
    monkeypatch.setattr(run, "_rank_main", _waits)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def end() -> None:
        while len([file for file in tmp_path.glob("rank*") if file.read_text()]) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(SystemExit) as ended, ended_by_signals():
        run.main(dataclasses.replace(CPU, html=str(tmp_path)))
    assert ended.value.code == 128 + signal.SIGTERM
    for file in tmp_path.glob("rank*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
    assert not list(tmp_path.glob("arfusion-demo-*"))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_dynamic_token_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(dataclasses.replace(CPU, norm="torch", dtype="float16", dynamic=True, diff=False)) == 0
    first, second = capsys.readouterr().out.split("torch.compile(dynamic=True)")
    assert "3 of 3 sites fused, none missed, in 1 graph" in first, "one graph serves both token counts"
    assert first.count(" yes\n") == 6, "each site is checked for both"
    assert "3 of 3 sites fused, none missed, in 1 graph" in second, "epsilon is read when the call runs"


def refuse_every_epsilon(rank: int, options: Options, folder: str) -> None:
    """A rank whose pass is configured to miss every site."""
    config = arfusion_pass.FusionConfig(epsilons=(0.5,))
    run._Demo._inductor_options = lambda self: arfusion_pass.inductor_options(config)  # type: ignore[method-assign]
    run._rank_main(rank, options, folder)


def test_a_missed_site_fails_the_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = run.mp.spawn
    monkeypatch.setattr(run.mp, "spawn", lambda _, *args, **kwargs: spawn(refuse_every_epsilon, *args, **kwargs))
    assert run.main(dataclasses.replace(CPU, diff=False)) == 1
    text = capsys.readouterr().out
    assert "FAILED" in text
    assert "all_reduce was not fused: " in text
    assert "0 sites were fused, expected 3" in text


def write_results(*results: Result) -> Any:
    """A stand-in for ``mp.spawn`` whose ranks found this."""

    def spawn(_: object, args: tuple[Options, str], **__: object) -> None:
        for rank, result in enumerate(results):
            (Path(args[1]) / f"rank{rank}.json").write_text(json.dumps(dataclasses.asdict(result)))

    return spawn


def test_one_rank_that_complains_is_enough(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.mp, "spawn", write_results(Result(["text"]), Result([], ["site x is not exact"])))
    assert run.main(CPU) == 1
    assert "* site x is not exact" in capsys.readouterr().out
    monkeypatch.setattr(run.mp, "spawn", write_results(Result(["text"]), Result()))
    assert run.main(CPU) == 0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"world": 1}, "at least two ranks"),
        ({"dynamic": True, "tokens": 1}, "two or more"),
        ({"device": "cuda", "world": 99}, "GPU\\(s\\) visible"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        run.main(dataclasses.replace(CPU, **changes))


class TestVerdicts:
    """What counts as a failure, on made-up findings."""

    site = Site("all_reduce", "0", fused=True, pattern="AllReduceRMSNorm")

    @pytest.fixture
    def demo(self) -> run._Demo:
        demo = run._Demo.__new__(run._Demo)
        demo.options, demo.rank, demo.result, demo.expected_sites = CPU, 0, Result(), 3
        return demo

    def test_too_few_sites(self, demo: run._Demo) -> None:
        demo._expect_all_fused(Reports([FusionReport((self.site,))]))
        assert demo.result.failures == ["1 sites were fused, expected 3 (2 * layers + 1)"]

    @pytest.mark.parametrize(("fused", "fails"), [(1.0, False), (1.1, False), (1.11, True), (float("nan"), True)])
    def test_whole_model_error(self, demo: run._Demo, fused: float, fails: bool) -> None:
        demo._whole_model(Comparison("e", 1.0, 1.0), Comparison("c", 9.0, 9.0), Comparison("f", fused, 1.0))
        assert bool(demo.result.failures) == fails

    def test_a_page_that_cannot_be_written(self, demo: run._Demo, tmp_path: Path) -> None:
        demo.options = dataclasses.replace(CPU, html=str(tmp_path))
        demo._print_graphs(Reports(), [])
        assert demo.result.failures == [f"the page {tmp_path} cannot be written: Is a directory"]

    def test_table_shows_what_differs(self) -> None:
        check = SiteCheck(self.site, False, "residual_out: 2 of 10", {"residual_out": OutputCheck(2, 10, 7)})
        table = comparison_table([check])
        assert "residual 2/10 (<= 7 ulp)" in table
        assert "NO: residual_out: 2 of 10" in table


@pytest.mark.parametrize("norm", NORMS)
def test_model_norms_agree_with_the_textbook(norm: Any) -> None:
    config = ModelConfig.for_ranks(2, layers=1, hidden=64, norm=norm)
    model = Decoder(config)
    initialise(model, seed=1)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    weight = model.norm.weight.detach() + (1 if norm == "gemma" else 0)
    wanted = x * (x.square().mean(-1, keepdim=True) + config.epsilon).rsqrt() * weight
    torch.testing.assert_close(model.norm(x).detach(), wanted)


@pytest.mark.parametrize("world", [2, 3, 5, 8])
def test_model_is_divisible(world: int) -> None:
    config = ModelConfig.for_ranks(world, layers=1, hidden=72, norm="llama")
    assert config.heads % world == config.vocab % world == config.intermediate % world == 0


def test_error_is_relative() -> None:
    exact = torch.full((2, 2), 10.0)
    found = Comparison.of("x", exact + 1, exact)
    assert found.error == pytest.approx(0.1)
    assert found.largest == pytest.approx(1.0)
