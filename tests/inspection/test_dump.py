"""``debug_dump``: what it writes, and that a warm cache hides nothing from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import arfusion_pass as arf
from tests.simulate import c10d


def block(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """all-reduce, add, norm."""
    residual = residual + c10d.wait_tensor(c10d.all_reduce(x, "sum", "0"))
    return torch.nn.functional.rms_norm(residual, (64,), weight, 1e-6), residual


def compile_block() -> None:
    """Compile and run it afresh, as far as Dynamo is concerned."""
    torch.compiler.reset()
    with torch.no_grad():
        x, weight = torch.randn(4, 64, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
        torch.compile(block, options=arf.inductor_options())(x, x, weight)


@pytest.mark.usefixtures("world")
def test_graphs_page_and_report_are_written(tmp_path: Path) -> None:
    compile_block()
    with arf.inspection.debug_dump(tmp_path / "out") as folder:
        compile_block()
    assert folder == tmp_path / "out" / "rank0"
    (report,) = json.loads((folder / "report.json").read_text())
    assert report["matched_count"] == 1
    assert "1 of 1 sites fused" in (folder / "report.txt").read_text()
    before, after, diff = ((folder / f"graph_0.{name}.txt").read_text() for name in ("before", "after", "diff"))
    assert "_c10d_functional.all_reduce" in before
    assert "_c10d_functional" not in after
    assert "arfusion.allreduce_rms_norm.default" in after
    assert "-  %all_reduce" in diff
    assert "arfusion.allreduce_rms_norm" in (folder / "diff.html").read_text()
    dumped = [path.read_text() for path in (folder / "depyf").rglob("*.py")]
    assert any("torch.ops.arfusion.allreduce_rms_norm" in text for text in dumped), "depyf shows the compiled graph"


@pytest.mark.usefixtures("world")
def test_a_failure_inside_still_leaves_what_was_seen(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="inside"), arf.inspection.debug_dump(tmp_path, depyf=False):
        raise KeyError("inside")
    assert json.loads((tmp_path / "rank0" / "report.json").read_text()) == []
    assert not (tmp_path / "rank0" / "depyf").exists()


def test_a_lone_process_writes_into_the_folder_itself_and_torchrun_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with arf.inspection.debug_dump(tmp_path / "a", depyf=False) as folder:
        assert folder == tmp_path / "a"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with arf.inspection.debug_dump(tmp_path / "a", depyf=False) as folder:
        assert folder == tmp_path / "a" / "rank1"
