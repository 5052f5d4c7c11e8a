"""What a decode step runs holds everything in registers: a spill there is read back from L2, behind the last arrival
(``benchmarks/NOTES.md``)."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
STRAIGHT = re.compile(r"fused_kernelILi\d+ELi\d+ELi(\d)ELi1ELb0ELi2EE.*?(\d+) bytes spill stores", re.DOTALL)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("world", "families"), [("two", set("0134567")), ("four", set("013456"))])
def test_straight_kernels_do_not_spill(world: str, families: set[str], tmp_path: Path) -> None:
    """Plain, static FP8, NVFP4, groups, MXFP8 and per token (of four ranks with one rounding alone), bf16, sm_90a."""
    command = ["nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-arch=sm_90a", "-cubin", "-Xptxas=-v"]
    command += ["-o", str(tmp_path / "kernels.cubin"), str(KERNELS / f"kernels_bf16_{world}.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    spilt = dict(STRAIGHT.findall(done.stderr))
    assert families <= spilt.keys(), done.stderr
    assert not {family: spilt[family] for family in families if spilt[family] != "0"}
