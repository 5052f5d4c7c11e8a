"""The method of every figure: back-to-back calls in one CUDA graph, median over replays, maximum over ranks.

Ranks are lined up before each replay by a host barrier and a tiny NCCL all-reduce on the same stream, so that a
replay's time holds no rank's late start; then the GPU waits while the host launches the graph, which would otherwise
stand in the time of the first call. But for that wait the same method measured the peers before ours were written.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

Play = Callable[[], object]
"""Puts work on the current stream: a graph's ``replay``, or calls that no graph holds."""

LAUNCH_CYCLES = 600_000
"""Of the GPU's clock, some 300 µs: longer than the launch of a graph of 200 calls takes the host."""


class Timer:
    """Captures and times calls on one stream of this rank."""

    def __init__(self, device: torch.device, cpu_group: dist.ProcessGroup):
        self.stream = torch.cuda.Stream()
        self._cpu_group = cpu_group
        self._tiny = torch.zeros(64, device=device)
        self._device = device

    def agree(self, ok: bool) -> bool:
        """Logical and over ranks, on the CPU: one rank's Python error must not leave the others waiting on the GPU."""
        flag = torch.tensor([int(ok)], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._cpu_group)
        return bool(flag.item())

    def maximum(self, value: float) -> float:
        """Largest of the ranks' values."""
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._cpu_group)
        return float(tensor.item())

    def mean(self, value: float) -> float:
        """Mean of the ranks' values."""
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, group=self._cpu_group)
        return float(tensor.item()) / dist.get_world_size(self._cpu_group)

    def capture(self, call: Callable[[], object], iterations: int, warm: bool) -> torch.cuda.CUDAGraph:
        """``iterations`` calls as one graph, after ``warm`` eager ones."""
        if warm:
            with torch.cuda.stream(self.stream):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for _ in range(iterations):
                    call()
            finally:
                graph.capture_end()
        torch.cuda.synchronize()
        return graph

    def microseconds(
        self, graph: torch.cuda.CUDAGraph, iterations: int, replays: int, reset: Callable[[], object] | None = None
    ) -> float:
        """Time of one call in the graph: median over ``replays`` (two more warm up), maximum over ranks."""
        times = [self._once(graph.replay, reset) / iterations for _ in range(replays + 2)]
        return self.maximum(statistics.median(times[2:]))

    def alternating(self, plays: Mapping[str, Play], times: int, reset: Play | None = None) -> dict[str, float]:
        """µs of each play, once each, in turn, so many ``times``: median, then maximum over ranks."""
        found: dict[str, list[float]] = {name: [] for name in plays}
        for _ in range(times):
            for name, play in plays.items():
                found[name].append(self._once(play, reset))
        return {name: self.maximum(statistics.median(values)) for name, values in found.items()}

    def launch(self, play: Play, reset: Play | None = None) -> None:
        """One play, untimed, that starts on all ranks at about one time: behind a barrier and that pause."""
        with torch.cuda.stream(self.stream):
            if reset is not None:
                reset()
            torch.cuda.synchronize()
            dist.barrier(group=self._cpu_group)
            torch.cuda._sleep(LAUNCH_CYCLES)
            play()
        torch.cuda.synchronize()

    def _once(self, play: Play, reset: Play | None = None) -> float:
        """µs of one play on this rank, behind a barrier and a pause in which the host launches it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            if reset is not None:
                reset()
            torch.cuda.synchronize()
            dist.barrier(group=self._cpu_group)
            dist.all_reduce(self._tiny)
            torch.cuda._sleep(LAUNCH_CYCLES)
            start.record()
            play()
            end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3


def floor_microseconds(message_bytes: int, world: int) -> float:
    """A bound from below: an empty kernel in a graph, a one-way flag a hop, bytes at 350 GB/s."""
    one_hop = 0.54 + 0.65 + (world - 1) * message_bytes / 350e3
    two_hops = 0.54 + 1.30 + 2 * (world - 1) / world * message_bytes / 350e3
    return min(one_hop, two_hops)
