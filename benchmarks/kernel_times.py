"""Which kernels a step's GPU time goes into: torch's profiler around replays, kernels by name.

What the sites take is the time of their kernels: of the pass's, or where a model runs without it of the all-reduces'
(NCCL's) and of the Triton kernels that hold an RMSNorm, each with what it waits for the other ranks. Kernels that
overlap count twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

FUSED = ("fused_kernel", "sharded_kernel")
"""The pass's, in the namespace ``arf``."""
NORM_OPS = ("rsqrt", "_mean_", "_pow_")
"""Ops that only the norms of a Llama have, one of which is in the name that Inductor gives their kernel."""


def kernel_times(play: Callable[[], object], times: int) -> dict[str, float]:
    """µs of GPU time by kernel name in one ``play()``, the mean of ``times``; empty where nothing may be profiled. What
    lines the ranks up (:meth:`benchmarks.timing.Timer.launch`) is left out."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            play()
        torch.cuda.synchronize()
    found: dict[str, float] = defaultdict(float)
    for event in profile.events():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        if on_gpu and "spin_kernel" not in event.name:
            found[event.name] += event.self_device_time_total / times
    return dict(found)


def kind(name: str) -> str | None:
    """``"fused"``, ``"all-reduce"`` or ``"norm"`` for a kernel of a site, by its name; None for another."""
    if "arf" in name and any(fused in name for fused in FUSED):
        return "fused"
    if name.startswith("nccl") and "AllReduce" in name:
        return "all-reduce"
    if name.startswith("triton") and any(op in name for op in NORM_OPS):
        return "norm"
    return None


def by_kind(times: dict[str, float]) -> dict[str, float]:
    """µs of ``fused``, ``all-reduce``, ``norm`` and ``all``."""
    found = {"fused": 0.0, "all-reduce": 0.0, "norm": 0.0, "all": sum(times.values())}
    for name, time in times.items():
        if (which := kind(name)) is not None:
            found[which] += time
    return found
