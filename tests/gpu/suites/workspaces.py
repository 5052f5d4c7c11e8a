"""The workspace's life: size, no multicast, made anew, fallback, reference on the same group."""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from pathlib import Path

import torch

from arfusion_pass.ops.spec import Flags, QuantFormat, QuantSpec
from arfusion_pass.runtime import c_api, native, thresholds, workspace
from arfusion_pass.runtime.agreement import Backend, Decision
from tests.gpu.calls import Config, run, verify
from tests.gpu.compare import assert_bits
from tests.gpu.harness import Env, case

CYCLES = int(os.environ.get("ARFUSION_TEST_CYCLES", "1000"))


@case("workspaces", "default", worlds=(2, 3, 4, 5, 6, 7, 8))
def default_workspace(env: Env) -> None:
    """Made by the first call; at most 128 MiB; no multicast object; found again by every name of the group."""
    workspace.destroy()
    env.barrier()
    before = torch.cuda.mem_get_info()[0]
    config = Config(4, 4096)
    verify(config, env, run(config, env))
    torch.cuda.synchronize()
    used = before - torch.cuda.mem_get_info()[0]
    made = workspace.find(env.group)
    assert made is not None
    assert made.decision.backend is Backend.NATIVE, made.decision
    assert made.bytes <= 128 << 20, made.bytes
    assert not made.handle.multicast_ptr, "an NVLink multicast object exists"
    assert workspace.find(env.group_name) is made
    assert workspace.prepare(env.group, 16, 4096) is made, "a smaller request keeps it"
    env.note(f"{made.bytes / 2**20:.0f} MiB symmetric, {used / 2**20:.0f} MiB in all on first use")


@case("workspaces", "made-anew", worlds=(2, 3, 4))
def made_anew(env: Env) -> None:
    """Destroyed and made again, ten times: it works, and the memory comes back."""
    config = Config(100, 7168)
    free = []
    for step in range(10):
        torch.cuda.synchronize()
        env.barrier()
        workspace.destroy()
        env.barrier()
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])
        made = workspace.prepare(env.group, 128 << step % 3, 7168)
        assert made.decision.backend is Backend.NATIVE, made.decision
        run(config, env)
    verify(config, env, run(config, env))
    assert free[-1] >= free[1] - (8 << 20), f"memory is lost: {[f >> 20 for f in free]} MiB free"


@case("workspaces", "empty", worlds=(2, 3, 4))
def made_on_a_side_stream(env: Env) -> None:
    """Every word is empty, whatever stream it is made on: torch's own zeroing of the memory has come before."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(10):
            env.barrier()
            workspace.destroy()
            made = workspace.prepare(env.group)
            assert made.tensor is not None
            filled = int((made.tensor.view(torch.int64) != -1).sum())
            assert filled == 0, f"{filled} words are not empty"


@case("workspaces", "a-thousand", worlds=(2, 3, 4))
def a_thousand_workspaces(env: Env) -> None:
    """1,000 made and destroyed, each used once: device memory, file descriptors and host memory come back."""
    x = torch.ones(16, 4096, dtype=torch.bfloat16, device=env.device)
    out = torch.empty_like(x)
    seen: dict[int, tuple[int, int, int]] = {}
    start = time.monotonic()
    for cycle in range(CYCLES + 1):
        torch.cuda.synchronize()
        env.barrier()
        workspace.destroy()
        if cycle in (CYCLES // 10, CYCLES):
            gc.collect()
            torch.cuda.empty_cache()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen[cycle] = (
                torch.cuda.mem_get_info()[0],
                len(os.listdir("/proc/self/fd")),
                pages * os.sysconf("SC_PAGESIZE"),
            )
            if cycle == CYCLES:
                break
        workspace.prepare(env.group, 16, 4096)
        torch.ops.arfusion.allreduce_rms_norm(x, None, None, None, env.group_name, allreduce_out=out)
    assert bool((out == env.world).all())
    (free, files, host), (free_now, files_now, host_now) = seen.values()
    cycles = CYCLES - CYCLES // 10
    env.note(
        f"{CYCLES} in {time.monotonic() - start:.0f} s; over the last {cycles}: device {(free - free_now) >> 10} KiB, "
        f"{files_now - files} files, host {(host_now - host) / cycles / 1024:.2f} KiB a cycle"
    )
    assert free - free_now <= 4 << 20, f"{(free - free_now) >> 20} MiB of device memory are lost"
    assert files_now <= files, f"{files_now - files} file descriptors are lost"
    assert host_now - host < cycles * 8192, f"{(host_now - host) >> 20} MiB of host memory are lost"


@case("workspaces", "fallback", worlds=(2, 3, 4))
def fallback_group(env: Env) -> None:
    """A group marked as fallback goes through NCCL and the local kernel, in the same op; integers sum exactly."""
    workspace.destroy()
    env.barrier()
    decide = workspace.agreement.decide
    workspace.agreement.decide = lambda everyone: Decision(Backend.FALLBACK, "a test")
    try:
        for number, spec in enumerate((QuantSpec(), QuantSpec(QuantFormat.FP8, 128), QuantSpec(QuantFormat.INT8, -1))):
            outputs = ("allreduce_out", "residual_out", "norm_out", *(("quant_out",) if spec.pack() else ()))
            for tokens in (0, 1, 33):
                config = Config(tokens, 4096, payload="integers", spec=spec, outputs=outputs, seed=number)
                verify(config, env, run(config, env))
                verify(config, env, run(dataclasses.replace(config, outputs=outputs[1:]), env))
        found = workspace.find(env.group)
        assert found is not None
        assert found.decision == Decision(Backend.FALLBACK, "a test")
    finally:
        workspace.agreement.decide = decide
        torch.cuda.synchronize()
        env.barrier()
        workspace.destroy()


@case("workspaces", "reference-flag", worlds=(1, 2, 3, 4))
def reference_by_flag(env: Env) -> None:
    """``Flags.REFERENCE`` runs the torch ops on the same tensors; the kernel's sum has the same bits."""
    config = Config(17, 4096, outputs=("allreduce_out", "residual_out", "norm_out"))
    fast = run(config, env).snapshot()
    slow = run(dataclasses.replace(config, flags=int(Flags.REFERENCE)), env).snapshot()
    assert_bits("allreduce_out", fast["allreduce_out"], slow["allreduce_out"])
    assert_bits("residual_out", fast["residual_out"], slow["residual_out"])


def rows_of(read) -> list[tuple[int, int, int]]:
    """A table in force."""
    count = read(None, 0)
    rows = (c_api.Threshold * count)()
    read(rows, count)
    return sorted((row.world, row.hidden, row.oneshot_max_bytes) for row in rows)


@case("workspaces", "library", worlds=(1, 2, 3, 4))
def one_copy_of_the_library(env: Env) -> None:
    """Loaded once; the two sides' op lists and constants agree."""
    run(Config(4, 4096), env)
    library = native.load()
    assert native.load() is library
    from arfusion_pass.ops.schema import SCHEMAS

    for read, table in (
        (library.arf_get_thresholds, thresholds.BUILT_IN.oneshot),
        (library.arf_get_sharded_thresholds, thresholds.BUILT_IN.sharded),
    ):
        assert rows_of(read) == sorted(
            (int(world), 0 if hidden == "*" else int(hidden), limit)
            for world, by_hidden in table["*"].items()
            for hidden, limit in by_hidden.items()
        )
    lines = library.arf_schemas().decode().split("\n")
    assert sorted(line for line in lines if line) == sorted(name + schema for name, schema in SCHEMAS.items())
