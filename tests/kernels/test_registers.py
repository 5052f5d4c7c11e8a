"""What a decode step runs holds everything in registers: a spill there is read back from L2, behind the last arrival
(``benchmarks/NOTES.md``)."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
ONE_ROW = re.compile(r"fused_kernelILi\d+ELi\d+ELi(\d)ELi1ELb0ELi([23])EE.*?(\d+) bytes spill stores", re.DOTALL)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("world", "straight", "near"), [("two", "0134567", "01"), ("four", "013456", "")])
def test_one_row_kernels_do_not_spill(world: str, straight: str, near: str, tmp_path: Path) -> None:
    """Plain, static FP8, NVFP4, groups, MXFP8 and per token (of four ranks with one rounding alone) for straight calls,
    plain and static FP8 (of two ranks) for near ones; bf16, sm_90a."""
    command = ["nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-arch=sm_90a", "-cubin", "-Xptxas=-v"]
    command += ["-o", str(tmp_path / "kernels.cubin"), str(KERNELS / f"kernels_bf16_{world}.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    spilt = {(family, calls): int(words) for family, calls, words in ONE_ROW.findall(done.stderr)}
    kernels = {*((family, "2") for family in straight), *((family, "3") for family in near)}
    assert kernels <= spilt.keys(), done.stderr
    assert not {kernel: spilt[kernel] for kernel in kernels if spilt[kernel]}
