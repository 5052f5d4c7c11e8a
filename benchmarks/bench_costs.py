"""What a call costs besides the GPU's time: host time of one call, memory of a workspace, the first use.

    python -m benchmarks.bench_costs --out benchmarks/results                 # one GPU: host time
    torchrun --nproc-per-node 2 -m benchmarks.bench_costs                     # and the workspace
    python -m benchmarks.bench_costs --compile                                # and the first build, in a fresh cache

Host time is the median over single calls outside a graph, the GPU never behind; beside it ``torch.add(out=)``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def host_microseconds(call: Callable[[], object], calls: int = 10_000) -> float:
    """Median host time of one call; the queue is drained every hundred calls, so that no launch waits for the GPU."""
    for _ in range(200):
        call()
    torch.cuda.synchronize()
    times = []
    for number in range(calls):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
        if number % 100 == 99:
            torch.cuda.synchronize()
    return statistics.median(times) / 1e3


def host_rows(group_name: str, device: torch.device) -> dict[str, float]:
    """Host time of the op with residual, weight and norm, with group FP8 besides, and of torch.add(out=)."""
    from arfusion_pass.ops.spec import QuantFormat, QuantSpec

    x = torch.randn(4, 4096, device=device, dtype=torch.bfloat16)
    residual, weight = torch.randn_like(x), torch.randn(4096, device=device, dtype=torch.bfloat16)
    residual_out, norm = torch.empty_like(x), torch.empty_like(x)
    codes, scales = torch.empty(4, 4096, device=device, dtype=torch.float8_e4m3fn), torch.empty(4, 32, device=device)
    quant = QuantSpec(QuantFormat.FP8, 128).pack()
    op = torch.ops.arfusion.allreduce_rms_norm
    overload = op.default

    def plain() -> None:
        op(x, residual, weight, None, group_name, residual_out=residual_out, norm_out=norm)

    def direct() -> None:
        overload(x, residual, weight, None, group_name, residual_out=residual_out, norm_out=norm)

    def grouped() -> None:
        out = {"residual_out": residual_out, "quant_out": codes, "scale_out": scales}
        op(x, residual, weight, None, group_name, 1e-6, 0.0, 0, quant, **out)

    rows = {"torch.add(out=)": host_microseconds(lambda: torch.add(x, residual, out=norm))}
    rows["allreduce_rms_norm"] = host_microseconds(plain)
    rows["allreduce_rms_norm.default"] = host_microseconds(direct)
    rows["allreduce_rms_norm + group FP8"] = host_microseconds(grouped)
    return rows


def workspace_row() -> dict[str, Any]:
    """Device memory that the first call takes, and how long making the workspace takes."""
    from arfusion_pass.runtime import workspace

    free = torch.cuda.mem_get_info()[0]
    start = time.perf_counter()
    made = workspace.prepare()
    seconds = time.perf_counter() - start
    used = free - torch.cuda.mem_get_info()[0]
    return {
        "backend": made.decision.backend.value,
        "symmetric MiB": made.bytes / 2**20,
        "device MiB in all": round(used / 2**20, 1),
        "seconds": round(seconds, 3),
    }


def compile_row(arch: str | None) -> dict[str, Any]:
    """Building the library into an empty cache."""
    from arfusion_pass.runtime import build

    steps: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ARFUSION_CACHE_DIR"] = folder
        start = time.perf_counter()
        path = build.build(arch, progress=lambda event: steps.__setitem__(event.name, event.seconds))
        seconds = time.perf_counter() - start
        size = path.stat().st_size
    return {
        "seconds": round(seconds, 1),
        "cores": len(os.sched_getaffinity(0)),
        "compiler seconds": round(sum(steps.values()), 1),
        "slowest unit": max(steps, key=lambda name: steps[name]),
        "slowest unit seconds": round(max(steps.values()), 1),
        "library MB": round(size / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="time a build too")
    parser.add_argument("--arch", help="architecture of that build; default: the device's")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    results: dict[str, Any] = {"world": world}
    if arguments.compile and rank == 0:
        results["first use"] = compile_row(arguments.arch)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
        name = ""
        if world > 1:
            dist.init_process_group("nccl", device_id=device)
            name = dist.group.WORLD.group_name
            results["workspace"] = workspace_row()
        import arfusion_pass.ops  # noqa: F401

        results["host us"] = {key: round(value, 2) for key, value in host_rows(name, device).items()}
    if rank == 0:
        text = json.dumps(results, indent=1)
        print(text, flush=True)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / f"costs-tp{world}.json").write_text(text + "\n")
    if world > 1:
        dist.barrier()
        os._exit(0)


if __name__ == "__main__":
    main()
