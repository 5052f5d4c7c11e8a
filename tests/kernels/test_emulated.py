"""The kernels themselves, without a GPU: their sources compiled for the CPU and run on an emulated GPU
(``kernels/tests/emulated``), where interleavings are drawn from a seed and pushes arrive word by word in any order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from arfusion_pass.runtime import build
from kernels.tests.emulated import translate

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.find_cxx() is None, reason="needs a C++ compiler"),
]

UNITS = tuple(f"{dtype}_{kind}" for dtype in ("bf16", "fp16", "fp32") for kind in ("simulated", "sharded"))

# A mistake each, of the kinds that the exchange's invariants (kernels/README.md) exclude.
FAULTS = {
    "the first word tells a vector's arrival": {
        "exchange.cuh": ("return max(max(v.x, v.y), max(v.z, v.w));", "return v.x;"),
    },
    "one generation instead of two": {
        "exchange.cuh": ("(link.generation & 1u) * p.generation_bytes", "0"),
    },
    "slots are not emptied": {
        "exchange.cuh": ("  if (link.dead) return;\n  const uint64_t priority", "  return;\n  const uint64_t priority"),
    },
    "generations are rotated before all threads have read them": {
        "kernels.cuh": ("    __syncthreads(); /* all have read the pair", "    /* all have read the pair"),
    },
    "a warp without a tile is not waited for": {
        "kernels.cuh": (" || at.part.count > 1) __syncthreads();", ") __syncthreads();"),
    },
    "a launch does not wait for the one in front": {
        "kernels.cuh": ("    wait_for_previous_kernel();\n    stamp(kWaited);", "    stamp(kWaited);"),
    },
}


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A test program of ``kernels/tests`` in a process of its own: the emulated GPU aborts at a deadlock."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", f"kernels.tests.{program}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(translate.build(tmp_path_factory.mktemp("emulated"), (*UNITS, "bf16_two", "bf16_any")))


def test_every_epilogue_on_three_ranks(library: str) -> None:
    """One-shot and two-shot, every quantiser, MoE prologues: the reference's bits on every rank; buffers left empty."""
    done = run("simulated", library, "--quick")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert " 0 failures" in done.stdout


def test_a_sharded_residual_on_three_ranks(library: str) -> None:
    """Two-shot's bits, in codes of nothing but the sentinel's bytes too; rows of other owners are not touched."""
    done = run("simulated_sharded", library, "--quick")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert " 0 failures" in done.stdout


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_drift_apart(library: str, world: int) -> None:
    """A rank a launch ahead of the others, launches that overlap, grids that change: every output is right."""
    done = run("emulated.chains", library, "--seeds", "12", "--world", str(world))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert f"12 chains of 24 calls, {world} ranks: all as the reference" in done.stdout


def test_launches_at_once_are_found(library: str) -> None:
    """Two graphs of a group replayed at the same time end in an error that says so, not in wrong results."""
    done = run("emulated.chains", library, "--seeds", "12", "--beside")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "12 times two launches at once: found each time" in done.stdout


def test_two_groups_at_once_leave_each_other_room(library: str) -> None:
    """Launches that each would fill a GPU, on two streams, whichever of them begins first on a rank."""
    done = run("emulated.chains", library, "--seeds", "12", "--groups")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "12 times two groups at once: both ended" in done.stdout


@pytest.mark.parametrize("world", [2, 3])
def test_blocks_of_tokens_in_pieces(library: str, world: int) -> None:
    """Sequence parallelism's calls: one or several blocks a rank, more than the workspace holds; two-shot's bits."""
    done = run("emulated.chains", library, "--seeds", "25", "--blocks", "--world", str(world))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "25 calls of blocks: as two-shot" in done.stdout


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_broken_exchange_is_seen(fault: str, tmp_path: Path) -> None:
    """The test above fails where an invariant of the exchange is broken."""
    library = translate.build(tmp_path, ("bf16_two", "bf16_any", "bf16_sharded"), FAULTS[fault])
    tileless = ("--twoshot", "1", "2304", "--calls", "8", "--seeds", "200") if "tile" in fault else ("--seeds", "30")
    done = run("emulated.chains", str(library), *tileless)
    assert done.returncode != 0 and "no kernel" not in done.stderr


def test_an_unknown_instruction_is_an_error() -> None:
    """Whoever adds one to the kernels hears of it here, and not from a wrong result."""
    with pytest.raises(ValueError, match=r"teach kernels/tests/emulated this instruction: bar\.sync 1, 64;"):
        translate.translate('asm volatile("bar.sync 1, 64;" ::: "memory");')
