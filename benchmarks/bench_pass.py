"""What the pass costs at compile time: a decoder's graph of N layers, two sites a layer, each with a quantiser.

Sites alternate between two epsilons and two quantisers (static FP8, FP8 per token); the first half of the layers is
bf16, the second fp16. A graph is traced against a fake process group. Every run is a fresh process's first use of the
pass, so that its patterns are registered in it.

    python -m benchmarks.bench_pass [--runs 5] [--write]
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor.lowering  # the pass runs inside Inductor, which has loaded this long before
import torch.distributed as dist
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

LAYERS = (10, 20, 40, 80, 160)
HIDDEN = 64
RESULTS = Path(__file__).parent / "results" / "pass.md"

Tensor = torch.Tensor


def _norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _fp8(x: Tensor) -> Tensor:
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def model(layers: int) -> Callable[..., tuple[Tensor, ...]]:
    """``layers`` layers as a function: a site with a static quantiser and one with a quantiser per token in each."""

    def forward(x: Tensor, r: Tensor, w: Tensor, s: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        for layer in range(layers):
            if layer == layers // 2:
                x, r, w, m = x.half(), r.half(), w.half(), m.half()
            for eps in (1e-6, 1e-5):
                y = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", "0"))
                r = r + y
                h = _norm(r, w, eps).float()
                if eps == 1e-6:
                    x = _fp8(h / s).to(r.dtype) @ m
                else:
                    scales = h.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448.0
                    x = (_fp8(h / scales).float() * scales).to(r.dtype) @ m
        return x, r

    return forward


def measure(layers: int) -> tuple[int, int, float, float]:
    """Nodes, sites, seconds of the pass by the clock and of CPU time, on a fresh graph."""
    import arfusion_pass as arf

    # As Inductor calls it, which makes the code of the graph itself, later.
    fusion = arf.AllReduceFusionPass(arf.FusionConfig(raise_errors=True))
    shapes = ((8, HIDDEN), (8, HIDDEN), (HIDDEN,), (1,), (HIDDEN, HIDDEN))
    example = [torch.empty(shape, dtype=torch.float32 if shape == (1,) else torch.bfloat16) for shape in shapes]
    graph = make_fx(model(layers), tracing_mode="fake", decomposition_table=select_decomp_table())(*example)
    nodes = len(graph.graph.nodes)
    start, cpu = time.perf_counter(), time.process_time()
    fusion(graph.graph)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    (report,) = fusion.reports
    quantised = sum(site.quantiser is not None for site in report.fused)
    if (report.matched_count, quantised) != (2 * layers, 2 * layers):
        raise SystemExit(f"{layers} layers: {report.matched_count} sites fused, {quantised} with a quantiser")
    return nodes, report.matched_count, seconds, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="fresh processes a row; the median counts")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:  # a row's process: its layers
        torch.set_num_threads(1)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        print(*measure(arguments.one))
        dist.destroy_process_group()
        return
    rows = [
        "| layers | sites | nodes | seconds | CPU seconds | ms a site (CPU) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for layers in LAYERS:
        runs = [_in_process(layers) for _ in range(arguments.runs)]
        nodes, sites = runs[0][:2]
        seconds, cpu = (statistics.median(run[column] for run in runs) for column in (2, 3))
        rows.append(f"| {layers} | {sites} | {nodes} | {seconds:.2f} | {cpu:.2f} | {1000 * cpu / sites:.1f} |")
        print(rows[-1], file=sys.stderr, flush=True)
    heading = (
        f"# The pass's own time\n\n{datetime.date.today()}, {os.cpu_count()} CPU cores (load average "
        f"{os.getloadavg()[0]:.1f}), torch {torch.__version__}, Python {sys.version.split()[0]}; `python -m "
        f"benchmarks.bench_pass`: median of {arguments.runs} fresh\nprocesses a row, registration included, "
        "imports not.\n\n"
    )
    text = heading + "\n".join(rows) + "\n"
    print(text)
    if arguments.write:
        RESULTS.write_text(text)


def _in_process(layers: int) -> tuple[int, int, float, float]:
    command = [sys.executable, "-m", "benchmarks.bench_pass", "--one", str(layers)]
    nodes, sites, seconds, cpu = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(nodes), int(sites), float(seconds), float(cpu)


if __name__ == "__main__":
    main()
