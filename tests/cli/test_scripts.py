"""What ``arfusion explain`` says of the scripts in ``tests/scripts``: where, why and what to do, for each way in which
a model fuses or does not. Every answer names the user's line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tests" / "scripts"


def arfusion(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "arfusion_pass", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)


def explain(script: str, *options: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    done = arfusion("explain", "--json", *options, str(SCRIPTS / f"{script}.py"))
    return done, json.loads(done.stdout)  # JSON alone


def sites(graphs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [site for graph in graphs for site in graph["sites"]]


def place(source: dict[str, Any] | None) -> str | None:
    return None if source is None else f"{Path(source['file']).name}: {source['code']}"


def test_all_fused(tmp_path: Path) -> None:
    """Both layers, their module and line, and less traffic; what the script prints is not in the way."""
    report = tmp_path / "report.json"
    done = arfusion("explain", "--json", "--fail-on-missed", "-o", str(report), str(SCRIPTS / "fused.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the script's own line\n"
    found = sites(json.loads(report.read_text()))
    assert [(site["fused"], site["module"], place(site["source"])) for site in found] == [
        (True, "layers.0", "model.py: dist.all_reduce(y)"),
        (True, "layers.1", "model.py: dist.all_reduce(y)"),
    ]
    assert all(site["bytes_fused"] < site["bytes_unfused"] and site["shape"] == [4, 64] for site in found)


@pytest.mark.parametrize(
    ("script", "obstacle", "advice"),
    [
        ("gradients", "model.py: return self.weight * h.to(x.dtype)", "no_grad()"),
        ("average", "average.py: dist.all_reduce(y, op=dist.ReduceOp.AVG)", "divide by the group's size"),
        (
            "fp32_bias",
            "fp32_bias.py: return (y + 0.1 * block.bias.float()).to(y.dtype)",
            "add the bias in the tensor's dtype, or before the all-reduce",
        ),
        ("graph_break", "graph_break.py: dist.all_reduce(y)", 'graph_break.py:10 "print("reduced")"'),
    ],
)
def test_a_missed_site_says_where_and_what_to_do(script: str, obstacle: str | None, advice: str) -> None:
    done, graphs = explain(script, "--fail-on-missed")
    assert done.returncode == 3, done.stderr
    found = sites(graphs)
    assert found
    for site in found:
        assert not site["fused"]
        assert place(site["obstacle"]) == obstacle
        assert advice in site["advice"]
        assert f"{site['reason']} {site['advice']}".count("reassociate") <= 1, "said once"
        assert (site["dtype"], site["shape"]) == ("bfloat16", [4, 64])
        assert ".py:" in site["reason"], "the reason quotes a line, and names no node"
    assert len({site["reason"] for site in found}) == 1, "layers of one kind say the same, so that they share a row"


def test_thirty_two_layers_are_one_row() -> None:
    done = arfusion("explain", str(SCRIPTS / "scaled.py"))
    assert done.returncode == 0, "missed sites alone are no failure"
    (row,) = (line for line in done.stdout.splitlines() if "32   " in line)
    assert "layers.*" in row
    assert 'scaled.py:10 "return y * block.scale"' in row


@pytest.mark.parametrize(
    ("script", "adds", "input_epsilon"),
    [("bias", "TwoAdds", False), ("buffer_epsilon", "Add", True), ("dynamic", "Add", True)],
)
def test_a_bias_and_an_epsilon_that_is_a_value_fuse(script: str, adds: str, input_epsilon: bool) -> None:
    done, graphs = explain(script, "--fail-on-missed")
    assert done.returncode == 0, done.stderr
    for site in sites(graphs):
        assert site["pattern"] == f"AllReduceFused{adds}RMSNorm"
        assert (site["epsilon"] is None) == (site["epsilon_input"] is not None) == input_epsilon
        assert "self.epsilon" in site["epsilon_source"]["code"]


def test_an_async_all_reduce_ends_the_graph_and_the_line_is_named() -> None:
    """Dynamo leaves it to Python: no graph holds it, so the graph break is all there is to tell."""
    done = arfusion("explain", str(SCRIPTS / "async_op.py"))
    assert "no all-reduce" in done.stdout
    assert 'graph break: async_op.py:9 "work = dist.all_reduce(y, async_op=True)"' in done.stdout
    text = " ".join(done.stdout.split())
    assert "at a collective: async_op=True for distributed collectives; a blocking call of it, or" in text, "said once"


def test_a_script_that_wants_ranks_is_told_so() -> None:
    done = arfusion("explain", str(SCRIPTS / "torchrun.py"))
    assert done.returncode == 2
    assert "arfusion explain -n 2" in done.stderr
    assert "Traceback" not in done.stderr
    assert "cache" not in done.stdout


def test_on_ranks_the_status_comes_through() -> None:
    """torchrun makes 1 of every exit status; the verdict goes around it."""
    done = arfusion("explain", "-n", "2", "--fail-on-missed", str(SCRIPTS / "torchrun.py"))
    assert done.returncode == 0, done.stderr
    assert "2 of 2 sites fused" in done.stdout
    done = arfusion("explain", "-n", "2", "--fail-on-missed", str(SCRIPTS / "average.py"))
    assert done.returncode == 3, done.stderr


def test_an_error_of_the_script_is_shown_without_our_frames(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("def f():\n    raise KeyError('mine')\n\nf()\n")
    done = arfusion("explain", str(script))
    assert done.returncode == 1
    assert "KeyError: 'mine'" in done.stderr
    assert "runpy" not in done.stderr
    assert "failed before anything was compiled" in done.stderr


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("import torch.distributed as dist; dist.get_rank()", "call torch.distributed.init_process_group(...) before"),
        (
            "import torch, torch.distributed as dist; "
            "dist._functional_collectives.all_reduce(torch.ones(4), 'sum', dist.group.WORLD)",
            "call torch.distributed.init_process_group(...) first",
        ),
        ("import torch; torch.compile(print, mode='default', options={})", "torch.compile takes no mode"),
    ],
)
def test_an_error_of_torch_that_does_not_say_what_to_do(tmp_path: Path, code: str, hint: str) -> None:
    (tmp_path / "script.py").write_text(f"{code}\n")
    done = arfusion("explain", str(tmp_path / "script.py"))
    assert done.returncode == 1
    assert 'script.py", line 1' in done.stderr
    assert f"To do: {hint}" in done.stderr


def test_a_missing_folder_is_a_line_before_the_work(tmp_path: Path) -> None:
    missing = str(tmp_path / "none" / "file")
    for arguments in (["demo", "--html", missing], ["explain", "-o", missing, str(SCRIPTS / "fused.py")]):
        done = arfusion(*arguments)
        assert done.returncode == 2
        assert "there is no folder" in done.stderr


@pytest.mark.slow
def test_hugging_face_tp_plan() -> None:
    """``tp_plan="auto"``: the all-reduces are in a library's hooks; the module's path says where."""
    pytest.importorskip("transformers")
    done = arfusion("explain", "-n", "2", "--json", str(SCRIPTS / "tp_plan.py"))
    assert done.returncode == 0, done.stderr
    found = sites(json.loads(done.stdout))
    assert [site["fused"] for site in found].count(True) >= 4
    modules = {site["module"] for site in found}
    assert {"model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"} <= modules
