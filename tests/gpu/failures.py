"""A rank is killed in mid-run: the others stop with the named error in the set time, their outputs NaN, CUDA alive.

Runs ranks of its own, because they do not survive it: ``python -m tests.gpu --select failures``.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.harness import ENVIRONMENT, ROOT, SHARE_GPU, Outcome, _free_port, device_index, share_gpu

TIMEOUT = 3.0  # seconds, of a wait inside a kernel
LIMIT = 60.0


def run(world: int) -> list[Outcome]:
    """One outcome: rank ``world - 1`` dies, each of the others reports."""
    if world < 2:
        return []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        command = [sys.executable, "-m", "tests.gpu.failures", str(world), str(_free_port()), folder]
        ranks = [subprocess.Popen([*command, str(rank)], env=environment, cwd=ROOT) for rank in range(world)]
        try:
            while any(process.poll() is None for process in ranks) and time.monotonic() - start < LIMIT:
                time.sleep(0.1)
            hung = [rank for rank, process in enumerate(ranks) if process.poll() is None]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        reports = {}
        for rank in range(world - 1):
            path = Path(folder) / str(rank)
            reports[rank] = json.loads(path.read_text()) if path.exists() else {"error": "no report"}
    problems = [f"rank {rank}: {report['error']}" for rank, report in reports.items() if report.get("error")]
    if hung:
        problems.append(f"ranks {hung} did not end in {LIMIT:.0f} s")
    notes = [f"rank {rank} stopped after {report.get('seconds', 0):.1f} s" for rank, report in reports.items()]
    state = "failed" if problems else "passed"
    return [Outcome("failures/killed-rank", state, round(time.monotonic() - start, 2), "; ".join(problems or notes))]


def _rank_main(world: int, port: int, folder: Path, rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(device_index(rank))
    if SHARE_GPU:
        share_gpu(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:gloo" if SHARE_GPU else "cpu:gloo,cuda:nccl",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=40),
    )
    from arfusion_pass.runtime import workspace

    workspace.prepare(None, 64, 4096, timeout=datetime.timedelta(seconds=TIMEOUT))
    x = torch.ones(16, 4096, dtype=torch.bfloat16, device="cuda")
    norm = torch.zeros_like(x)
    name = dist.group.WORLD.group_name

    def call() -> None:
        torch.ops.arfusion.allreduce_rms_norm(x, None, None, None, name, norm_out=norm)

    for _ in range(20):
        call()
    torch.cuda.synchronize()
    dist.barrier()
    if rank == world - 1:
        os.kill(os.getpid(), 9)
    report: dict = {"error": ""}
    seen: list[workspace.ExchangeTimeout] = []
    try:
        with workspace.Watchdog(0.05, seen.append):
            start = time.monotonic()
            call()
            torch.cuda.synchronize()
            report["seconds"] = time.monotonic() - start
            time.sleep(0.3)
        assert TIMEOUT * 0.8 < report["seconds"] < TIMEOUT + 2, f"the wait took {report['seconds']:.2f} s"
        assert bool(torch.isnan(norm).all()), "the outputs are not NaN"
        assert len(seen) == 1, f"the watchdog saw {len(seen)} errors"
        assert seen[0].peer == world - 1, f"it blames rank {seen[0].peer}"
        _expect(workspace.ExchangeTimeout, workspace.check, f"rank {world - 1}")
        _expect(RuntimeError, call, f"rank {world - 1}")
        assert float((x + 1).sum()) == 2 * x.numel(), "CUDA no longer works"
        workspace.destroy()
        torch.ops.arfusion.allreduce_rms_norm(x, None, None, None, "", norm_out=norm)
        assert bool(torch.isfinite(norm).all()), "the survivor's own kernels no longer work"
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}"
    (folder / str(rank)).write_text(json.dumps(report))
    os._exit(0)


def _expect(kind: type[Exception], action: Callable[[], None], text: str) -> None:
    with pytest.raises(kind, match=text):
        action()


if __name__ == "__main__":
    _rank_main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
