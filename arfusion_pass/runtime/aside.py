"""What outlives the call that needs it first is made in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Made = TypeVar("Made")


def aside(make: Callable[[], Made], device: int) -> Made:
    """``make()`` in a new thread on that CUDA device, waited for; what it raises is raised here.

    A fused op's first call may come while torch warms up a CUDA graph (``mode="reduce-overhead"``). Whatever the
    calling thread allocates there comes from the graph's own memory pool, and torch refuses what is alive behind the
    run ("tensor(s) in the cudagraph pool not tracked as outputs"). Pools are a thread's: another allocates as ever.
    """

    def run() -> Made:
        # A thread begins on device 0, where this rank may have no context, and needs none.
        torch.cuda.set_device(device)
        return make()

    with ThreadPoolExecutor(1, "arfusion-aside") as thread:
        return thread.submit(run).result()
