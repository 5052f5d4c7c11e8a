"""Shared by the test suites: running a function on several ranks."""

from __future__ import annotations

import datetime
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(
    world: int, fn: Callable[..., Any], *args: Any, backend: str = "gloo", timeout: float = 120.0
) -> list[Any]:
    """Run ``fn(rank, world, *args)`` in ``world`` fresh processes with a process group, and return what each returned.

    Each call has its own directory with a file store, so concurrent calls never meet. The first rank that fails ends
    the others; so does the deadline.

    Args:
        fn: a module-level function; what it returns is saved with ``torch.save`` (tensors on CPU, plain values).
        backend: ``"gloo"``, or ``"nccl"`` with device ``rank`` current.
        timeout: seconds for the whole call, process start included.

    Raises:
        RuntimeError: with the failing rank's traceback.
        TimeoutError: naming the ranks that were still running.
    """
    with tempfile.TemporaryDirectory(prefix="arfusion-ranks-") as directory:
        context = mp.get_context("spawn")
        processes = [
            context.Process(target=_rank_main, args=(rank, world, fn, args, backend, timeout, directory), daemon=True)
            for rank in range(world)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, Path(directory), timeout)
            return [torch.load(Path(directory) / f"result{rank}", weights_only=False) for rank in range(world)]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
            for process in processes:
                if process.pid is not None:
                    process.join()


def _wait(processes: list[Any], directory: Path, timeout: float) -> None:
    """Until all ranks end well, one fails, or the time is up."""
    deadline = time.monotonic() + timeout
    while any(process.exitcode != 0 for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if failed:
            # The first to write its error is the cause: a peer that loses its connection fails after it.
            errors = sorted(directory.glob("error*"), key=lambda path: path.stat().st_mtime_ns)
            rank = int(errors[0].name.removeprefix("error")) if errors else failed[0]
            text = errors[0].read_text() if errors else "no traceback: the process was killed or crashed"
            raise RuntimeError(f"rank {rank} failed with exit code {processes[rank].exitcode or 1}\n{text}")
        if time.monotonic() > deadline:
            running = [rank for rank, process in enumerate(processes) if process.exitcode is None]
            raise TimeoutError(f"ranks {running} were still running after {timeout} s")
        time.sleep(0.01)


def _rank_main(
    rank: int, world: int, fn: Callable[..., Any], args: tuple[Any, ...], backend: str, timeout: float, directory: str
) -> None:
    try:
        torch.set_num_threads(1)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        store = dist.FileStore(f"{directory}/store", world)
        limit = datetime.timedelta(seconds=timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        try:
            torch.save(fn(rank, world, *args), f"{directory}/result{rank}")
            dist.barrier()  # nobody leaves while a peer still reads from it
        except BaseException:
            Path(f"{directory}/error{rank}").write_text(traceback.format_exc())  # before the peers can notice
            raise
        finally:
            dist.destroy_process_group()
    except BaseException:
        if not Path(f"{directory}/error{rank}").exists():
            Path(f"{directory}/error{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None
