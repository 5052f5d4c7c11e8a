"""What ranks do to each other: late, stopped, without memory or peer access for a workspace.

The work goes on and is right, or goes through NCCL on all ranks by agreement; then a workspace is made anew, and the
same processes work. A rank that dies is in :mod:`tests.gpu.failures`, as its process does not survive it.
"""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import time
from collections.abc import Callable

import torch

from arfusion_pass.runtime import workspace
from arfusion_pass.runtime.agreement import Backend
from tests.gpu.calls import Config, Result, allocate, launch, rank_input, run, shared_inputs, verify, with_strategy
from tests.gpu.harness import Env, case

BOUND = 1.0  # seconds, of a wait inside a kernel


def make(env: Env, bound: float = BOUND) -> None:
    """New workspaces on all ranks."""
    torch.cuda.synchronize()
    env.barrier()
    workspace.destroy()
    env.barrier()
    made = workspace.prepare(env.group, 512, 8192, timeout=datetime.timedelta(seconds=bound))
    assert made.decision.backend is Backend.NATIVE, made.decision


class Call:
    """A call with its tensors, to be made any number of times."""

    def __init__(self, env: Env, config: Config):
        self.env, self.config = env, config
        self.x, self.shared = rank_input(config, env.rank, env.device), shared_inputs(config, env.device)
        self.result: Result = allocate(config, env.device)
        torch.cuda.synchronize()

    def __call__(self) -> None:
        launch(self.config, self.env, self.x, self.shared, self.result)

    def verify(self) -> None:
        verify(self.config, self.env, self.result)


def recovered(env: Env, notes: list[str]) -> None:
    """A new workspace works in the same process."""
    env.barrier()
    make(env)
    for tokens in (3, 100):
        config = Config(tokens, 4096, seed=tokens)
        verify(config, env, run(config, env))
    env.note("; ".join(notes)[:400])


def is_last(env: Env) -> bool:
    return env.rank == env.world - 1


def stop_self(seconds: float) -> None:
    """SIGSTOP for this process; a child continues it."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def _goes_on(env: Env, delay: Callable[[], None]) -> None:
    make(env, bound=6.0)
    for tokens, strategy in ((5, "oneshot"), (200, "twoshot")):
        call = Call(env, with_strategy(Config(tokens, 4096, seed=tokens), strategy))
        env.barrier()
        if is_last(env):
            delay()
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        workspace.check()
        call.verify()


@case("faults", "late", worlds=(2, 3, 4))
def late(env: Env) -> None:
    """A rank comes seconds late, within the bound: right on all."""
    _goes_on(env, lambda: time.sleep(2.0))


@case("faults", "stopped-shorter", worlds=(2, 3, 4))
def stopped_shorter(env: Env) -> None:
    """A rank is stopped by SIGSTOP for less than the bound: right on all."""
    _goes_on(env, lambda: stop_self(1.5))


@case("faults", "no-memory", worlds=(2, 3, 4))
def no_memory(env: Env) -> None:
    """The last rank's GPU is full when the workspace is made: a fallback on all, by agreement; later a native one."""
    run(Config(4, 4096), env)
    torch.distributed.all_reduce(torch.ones(1, device=env.device))  # NCCL's own buffers
    torch.cuda.synchronize()
    env.barrier()
    workspace.destroy()
    torch.cuda.empty_cache()
    env.barrier()
    hog = None
    if is_last(env):
        hog = torch.empty(torch.cuda.mem_get_info()[0] - (96 << 20), dtype=torch.uint8, device=env.device)
    env.barrier()
    made = workspace.prepare(env.group, timeout=datetime.timedelta(seconds=BOUND))
    assert made.decision.backend is Backend.FALLBACK, made.decision
    assert f"rank {env.world - 1}" in made.decision.reason, made.decision
    assert "symmetric memory failed" in made.decision.reason, made.decision
    config = Config(8, 4096, payload="integers")
    result = run(config, env)
    torch.cuda.synchronize()
    del hog
    torch.cuda.empty_cache()
    verify(config, env, result)
    recovered(env, [made.decision.reason])


@case("faults", "no-p2p", worlds=(2, 3, 4))
def no_p2p(env: Env) -> None:
    """The last rank's GPU refuses peer access: a fallback on all, with the reason; later a native one."""
    torch.cuda.synchronize()
    env.barrier()
    workspace.destroy()
    env.barrier()
    ask = workspace.agreement.unreachable_devices
    if is_last(env):
        others = tuple(workspace.agreement.device_uuid(i) for i in range(torch.cuda.device_count()) if i != env.rank)
        workspace.agreement.unreachable_devices = lambda index: others
    try:
        made = workspace.prepare(env.group, 64, 4096)
    finally:
        workspace.agreement.unreachable_devices = ask
    assert made.decision.backend is Backend.FALLBACK, made.decision
    assert "P2P" in made.decision.reason, made.decision
    config = Config(8, 4096, payload="integers")
    verify(config, env, run(config, env))
    recovered(env, [made.decision.reason])


@case("faults", "give-back", worlds=(2, 3, 4))
def give_back(env: Env) -> None:
    """Leaves a workspace of the default bound to the suites that follow."""
    torch.cuda.synchronize()
    env.barrier()
    workspace.destroy()
    env.barrier()
    verify(Config(4, 4096), env, run(Config(4, 4096), env))
