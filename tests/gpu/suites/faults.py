"""What ranks do to each other: late, stopped, without memory or peer access for a workspace.

The work goes on and is right, or goes through NCCL on all ranks by agreement; then a workspace is made anew, and the
same processes work. A rank that dies is in :mod:`tests.gpu.failures`, as its process does not survive it.
"""

from __future__ import annotations

import contextlib
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
from tests.gpu.harness import SHARE_GPU, Env, case

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


@case("faults", "shorter-bound", worlds=(2, 3, 4))
def shorter_bound(env: Env) -> None:
    """A bound that is given later holds from the next launch on: a call that one rank leaves out ends by it."""
    make(env, bound=300.0)
    old = workspace.find(env.group)
    assert workspace.prepare(env.group, 512, 8192, timeout=datetime.timedelta(seconds=BOUND)) is old
    notes = []
    call = Call(env, Config(5, 4096))
    env.barrier()
    if not is_last(env):
        began = time.monotonic()
        call()
        torch.cuda.synchronize()
        try:
            workspace.check(env.group)
        except workspace.ExchangeTimeout:
            notes.append(f"{time.monotonic() - began:.1f} s")
        assert notes and time.monotonic() - began < BOUND + 5
    recovered(env, notes)


def _graph(call: Call, calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def _overlaps(env: Env, strategy: str, tokens: int, beside: Callable[[torch.cuda.CUDAGraph], None]) -> None:
    """A replay with ``beside`` running: an error on every rank within the bound, and of an overlap on one at least."""
    make(env)
    call = Call(env, with_strategy(Config(tokens, 4096, seed=tokens), strategy))
    call()
    torch.cuda.synchronize()
    graphs = [_graph(call, 100) for _ in range(2)]
    env.barrier()
    began = time.monotonic()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(20):
        with torch.cuda.stream(streams[0]):
            graphs[0].replay()
        with torch.cuda.stream(streams[1]):
            beside(graphs[1])
    torch.cuda.synchronize()
    took = time.monotonic() - began
    found: workspace.ExchangeError | None = None
    try:
        workspace.check()
    except workspace.ExchangeError as error:
        found = error
    seen: list[str] = [""] * env.world
    torch.distributed.all_gather_object(seen, type(found).__name__, group=env.gloo)
    assert all(name != "NoneType" for name in seen), seen
    assert "ExchangeOverlap" in seen, seen
    assert took < 5 * BOUND, f"{took:.1f} s"
    recovered(env, [f"{seen}, {took:.2f} s"])


@case("faults", "two-replays", worlds=(2, 3, 4))
def two_replays(env: Env) -> None:
    """Two graphs of one group replayed on two streams at once."""
    for strategy, tokens in (("oneshot", 1), ("oneshot", 64), ("twoshot", 200)):
        _overlaps(env, strategy, tokens, lambda graph: graph.replay())


@case("faults", "replay-beside-eager", worlds=(2, 3, 4))
def replay_beside_eager(env: Env) -> None:
    """A graph replayed on one stream while the group is called eagerly on another."""
    for strategy, tokens in (("oneshot", 1), ("twoshot", 200)):
        call = Call(env, with_strategy(Config(tokens, 4096, seed=1), strategy))

        def eager(graph: torch.cuda.CUDAGraph, call: Call = call) -> None:
            with contextlib.suppress(RuntimeError):  # raised by the call behind the one that found it
                for _ in range(100):
                    call()

        _overlaps(env, strategy, tokens, eager)


@case("faults", "no-memory", worlds=(2, 3, 4))
def no_memory(env: Env) -> None:
    """The last rank's GPU is full when the workspace is made: a fallback on all, by agreement; later a native one."""
    if SHARE_GPU:
        return env.note("skipped, the ranks share a GPU: no rank's can be full alone")
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
    if SHARE_GPU:
        return env.note("skipped, the ranks share a GPU: there is no peer access to refuse")
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
