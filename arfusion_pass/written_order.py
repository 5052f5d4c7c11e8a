"""A fault of torch before 2.14 that fused calls meet on CPUs, mended in the process that compiles.

Inductor's CPU back-end recomputes the body of a loop to join it with another one, and forgets that a buffer which the
loop reads is written by a custom op in between (pytorch/pytorch issue 185509). It may then order the loop, and whatever
hangs on it, before that op: memory that nobody has written is read in silence. A fused call is such an op, and puts
others into another order. GPUs have another code generator.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def keep() -> None:
    """Let recomputed loops keep what they depend on. Called where a graph on a CPU got a fused call; whatever this
    process compiles from then on, with the pass or without it, is free of the fault."""
    if torch.torch_version.TorchVersion(torch.__version__) >= "2.14":
        return
    from torch._inductor.dependencies import Dep, StarDep, WeakDep
    from torch._inductor.scheduler import SchedulerNode
    from torch.utils._ordered_set import OrderedSet

    recompute = SchedulerNode.recompute_size_and_body

    @functools.wraps(recompute)
    def recompute_and_keep(self: SchedulerNode, *args: Any, **kwargs: Any) -> None:
        added = OrderedSet[Dep](dep for dep in self.read_writes.reads if isinstance(dep, (WeakDep, StarDep)))
        recompute(self, *args, **kwargs)
        self.set_read_writes(self.read_writes.with_read(added).rename(self.mutation_renames))

    SchedulerNode.recompute_size_and_body = recompute_and_keep  # type: ignore[method-assign]
