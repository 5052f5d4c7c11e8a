"""Measure where one-shot stops being faster than two-shot on this machine, and from where a chain's residual is better
sharded, and write the strategy table.

    table = tune(group)                       # collective over the group, a few seconds
    python -m arfusion_pass.cli.tune 4   # starts four ranks, writes thresholds.json into the cache folder

For each hidden size the message doubles from 16 KiB on; each strategy is timed as back-to-back calls in one CUDA graph,
median over replays, maximum over ranks. The threshold is the geometric middle of the two sizes between which a change
of strategy loses least over all sizes. A sharded residual is measured with a norm alone, which wins least by it. All
ranks take the same decisions, because they compare the same maxima.
"""

from __future__ import annotations

import datetime
import itertools
import math
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from arfusion_pass.ops.spec import Flags
from arfusion_pass.runtime import agreement, thresholds, workspace
from arfusion_pass.runtime.thresholds import ThresholdTable

HIDDEN = (2048, 4096, 7168, 8192)
SMALLEST, LARGEST = 16 << 10, 16 << 20
CALLS, REPLAYS = 50, 7
LAUNCH_CYCLES = 400_000
"""Of the GPU's clock, some 200 µs: longer than the launch of a graph takes the host."""
MIDDLE = Flags.SHARDED | Flags.RESIDUAL_IN_SHARDED | Flags.RESIDUAL_OUT_SHARDED
"""A call inside a chain, its residual sharded."""


def tune(group: dist.ProcessGroup | None = None, hidden: Sequence[int] = HIDDEN) -> ThresholdTable:
    """The table in force with this group's world size and this architecture measured anew. Collective.

    Raises:
        RuntimeError: the group does not use the exchange kernels.
    """
    group = group or dist.group.WORLD
    assert group is not None
    made = workspace.prepare(group)
    if made.decision.backend is not agreement.Backend.NATIVE:
        raise RuntimeError(f"nothing to tune: {made.decision.reason}")
    arch = thresholds.arch_name(torch.cuda.get_device_capability())
    table = thresholds.load()
    for size in hidden:
        table = table.with_measurement(arch, group.size(), size, _crossover(group, size, Flags.ONESHOT, Flags.TWOSHOT))
    for size in hidden:  # against the table in force
        table = table.with_sharded(arch, group.size(), size, _crossover(group, size, Flags.NONE, MIDDLE))
    name = f"measured on {group.size()} x {torch.cuda.get_device_name()}, {datetime.date.today().isoformat()}"
    return ThresholdTable(table.oneshot, name, table.sharded)


def _crossover(group: dist.ProcessGroup, hidden: int, small: Flags, large: Flags) -> int:
    """Largest message in bytes for calls with the flags ``small``; beyond it those with ``large`` are faster."""
    sizes: list[int] = []
    losses: list[float] = []
    message = SMALLEST
    while message <= LARGEST:
        tokens = max(1, message // (2 * hidden))
        first = _microseconds(group, tokens, hidden, small)
        second = _microseconds(group, tokens, hidden, large)
        sizes.append(tokens * hidden * 2)
        losses.append(math.log(first / second))
        message *= 2
    return limit(sizes, losses)


def limit(sizes: Sequence[int], losses: Sequence[float]) -> int:
    """The threshold under which all sizes together lose least, so that one noisy figure does not decide it.

    Args:
        sizes: bytes, rising.
        losses: at each, the logarithm of the first way's time over the second's.
    """
    sums = [0.0, *itertools.accumulate(losses)]
    count = sums.index(min(sums))  # sizes for the first way
    if count == len(sizes):
        return thresholds.ALWAYS  # what is for small messages was faster at every size measured
    return math.isqrt(sizes[count - 1] * sizes[count]) if count else 0


def _microseconds(group: dist.ProcessGroup, tokens: int, hidden: int, flags: Flags) -> float:
    """One call in a graph of many, the same number on every rank."""
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    residual, weight, norm = torch.randn_like(x), torch.ones(hidden, device=device).bfloat16(), torch.empty_like(x)
    op = torch.ops.arfusion.allreduce_rms_norm.default

    def call() -> None:
        op(x, residual, weight, None, group.group_name, flags=int(flags), residual_out=residual, norm_out=norm)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for replay in range(REPLAYS + 2):
        agreement.exchange(group, "tune", None)  # lines the ranks up
        torch.cuda._sleep(LAUNCH_CYCLES)  # until the host has launched the graph, which would count otherwise
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if replay >= 2:
            times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return max(agreement.exchange(group, "tune", statistics.median(times)))


def run(world: int, path: Path | None = None, timeout: float = 300.0) -> Path:
    """Start ``world`` ranks that tune, one GPU each, and return the file that they wrote (default: the cache folder's).

    Raises:
        RuntimeError: too few GPUs, or a rank failed; its output is on stderr.
    """
    if world > torch.cuda.device_count():
        raise RuntimeError(f"tuning for {world} ranks needs as many GPUs, there are {torch.cuda.device_count()}")
    path = path or thresholds.tuned_path()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", "arfusion_pass.cli.tune", str(world), str(path)]
    ranks = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(world)]
    try:
        codes = [process.wait(timeout) for process in ranks]
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"tuning did not end within {timeout:.0f} s") from None
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    if any(codes):
        raise RuntimeError(f"tuning failed: exit codes {codes}")
    return path


def _rank_main(path: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", timeout=datetime.timedelta(seconds=60), device_id=torch.device("cuda", rank))
    table = tune()
    if rank == 0:
        table.save(path)
    dist.barrier()
    torch.cuda.synchronize()
    os._exit(0)


if __name__ == "__main__":
    if "RANK" in os.environ:
        _rank_main(Path(sys.argv[2]))
    elif len(sys.argv) == 2 and sys.argv[1].isdigit():
        try:
            print(run(int(sys.argv[1])))
        except RuntimeError as error:
            sys.exit(f"tune: {error}")
    else:
        sys.exit(__doc__)
