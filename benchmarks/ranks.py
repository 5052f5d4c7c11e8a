"""Starting a benchmark's ranks on this machine's GPUs, and saying in one line what stopped them.

``run`` starts ``python -m MODULE ... --rank R --port P`` once a rank. What a rank writes on stderr goes to a file, of
which a failure quotes the last line: ranks that wait for the one that failed have tracebacks too, and none of use.
"""

from __future__ import annotations

import argparse
import datetime
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# No NVLink multicast: an object of it can put a shared host's GPUs out of service.
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of several ranks takes."""
    parser.add_argument("--world", type=int, default=2, help="ranks, a GPU each")
    parser.add_argument("--kit", default="", help="folder of the FlashInfer kit; default: FlashInfer where installed")
    parser.add_argument("--budget", type=float, default=200, help="seconds, after which no further cell is begun")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=0, help=argparse.SUPPRESS)


def too_few_gpus(world: int) -> str:
    """Why ``world`` ranks cannot be measured here; empty if they can."""
    import torch

    count = torch.cuda.device_count()
    if count >= world:
        return ""
    return f"{world} ranks need a GPU each, and this machine shows {count or 'none'}"


def run(module: str, arguments: list[str], world: int, budget: float) -> str:
    """Runs all ranks to their end; returns what went wrong in one line, or nothing.

    The ranks have ``budget`` seconds and a minute to end by themselves; when one fails the others are stopped.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    started = time.time()
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", module, *arguments, "--port", str(port), "--started", str(started)]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}" for rank in range(world)]
        ranks = []
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                ranks.append(subprocess.Popen([*command, "--rank", str(rank)], env=environment, stderr=file))
        try:
            while any(rank.poll() is None for rank in ranks) and time.time() < started + budget + 60:
                time.sleep(0.2)
                if any(rank.poll() not in (None, 0) for rank in ranks):
                    break
            first = next((r for r, rank in enumerate(ranks) if rank.poll() not in (None, 0)), None)
            late = [r for r, rank in enumerate(ranks) if rank.poll() is None]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if first is not None:
            lines = [line for line in logs[first].read_text(errors="replace").splitlines() if line.strip()]
            status = ranks[first].returncode
            return f"rank {first} failed with status {status}: {lines[-1].strip() if lines else 'it said nothing'}"
        return f"ranks {late} had not ended after {budget + 60:.0f} s" if late else ""


def join(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """In a rank: the NCCL world on its GPU. Returns the device and a gloo group for what the host agrees on."""
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(arguments.rank)
    device = torch.device("cuda", arguments.rank)
    dist.init_process_group(
        "nccl",
        init_method=f"tcp://127.0.0.1:{arguments.port}",
        rank=arguments.rank,
        world_size=arguments.world,
        timeout=datetime.timedelta(seconds=60),
        device_id=device,
    )
    return device, dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=60))


def leave(cpu_group: Any) -> None:
    """In a rank: ends it without tearing peers' workspaces down one by one."""
    import torch
    import torch.distributed as dist

    dist.barrier(group=cpu_group)
    torch.cuda.synchronize()
    sys.stdout.flush()
    os._exit(0)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    from arfusion_pass.runtime import build

    folder, arch, given = build.source_dir(), build.device_arch(), os.environ.get("ARFUSION_LIBRARY")
    key = build.build_key(folder, arch) if folder and arch else None
    return {
        "kernels": Path(given).stem if given else key,  # a library that was named may be of other sources
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "date": datetime.date.today().isoformat(),
    }
