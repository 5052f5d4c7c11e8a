"""Runs GPU cases in one process a rank, many cases in one process group, because starting ranks costs seconds.

    python -m tests.gpu --world 2 --select epilogues,graphs --timeout 110      # a short table; exit status 1 on failure

A case is a function of :class:`Env`, registered by :func:`case`. It launches first and asserts afterwards, so that a
wrong result on one rank does not leave the others waiting; :meth:`Env.same` notes tensors that must have the same bits
on every rank. After every case the ranks exchange verdicts over gloo. Nothing waits without a limit: the parent ends
all ranks when a case, or the whole run, takes too long, and says which case it was.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GROUP_TIMEOUT = 12.0  # seconds: a lost rank ends a case in this time, not in NCCL's ten minutes

SHARE_GPU = os.environ.get("ARFUSION_TEST_SHARE_GPU") == "1"

ENVIRONMENT = {
    "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1" if SHARE_GPU else "0",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "OMP_NUM_THREADS": "4",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One test: ``suite`` groups cases for selection, ``worlds`` are the world sizes it makes sense on."""

    suite: str
    name: str
    run: Callable[[Env], None]
    worlds: tuple[int, ...]

    @property
    def id(self) -> str:
        return f"{self.suite}/{self.name}"


CASES: list[Case] = []


def case(suite: str, name: str, worlds: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)) -> Callable:
    """Register a case."""

    def register(run: Callable[[Env], None]) -> Callable[[Env], None]:
        CASES.append(Case(suite, name, run, worlds))
        return run

    return register


class Env:
    """What a case has: its rank, its device, the process group's name, and the means to compare across ranks."""

    def __init__(self, rank: int, world: int):
        import torch
        import torch.distributed as dist

        self.rank, self.world = rank, world
        self.device = torch.device("cuda", device_index(rank))
        self.group = dist.group.WORLD if world > 1 else None
        self.group_name = self.group.group_name if self.group else ""
        self.gloo = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=120)) if world > 1 else None
        self.notes: list[str] = []
        self.problems: list[str] = []
        self._sums: list[torch.Tensor] = []

    def same(self, *tensors) -> None:
        """These have to have the same bits on every rank; compared when the case ends."""
        from tests.gpu.compare import checksum

        self._sums += [checksum(tensor) for tensor in tensors]

    def attempt(self, check: Callable[[], None], what: object) -> None:
        """Run ``check``; if it fails, remember that and go on, so that this rank keeps launching with the others."""
        try:
            check()
        except AssertionError as error:
            self.problems.append(f"{error}\n  in {what}")

    def note(self, text: str) -> None:
        """A remark for the table."""
        self.notes.append(text)

    def checker(self, number: int) -> bool:
        """Whether this rank compares item ``number`` with the reference: the work is shared among ranks."""
        return number % self.world == self.rank

    def barrier(self) -> None:
        """All ranks, on the CPU."""
        if self.gloo is not None:
            import torch.distributed as dist

            dist.barrier(group=self.gloo)

    def agree(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank; all ranks ask."""
        if self.gloo is None:
            return flag
        import torch
        import torch.distributed as dist

        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.gloo)
        return bool(flags.item())

    def verdicts(self, error: str | None) -> list[str | None]:
        """Exchange this case's outcome; adds an error where tensors noted by :meth:`same` differ."""
        import torch
        import torch.distributed as dist

        sums: list[int] = []
        try:
            sums = torch.stack(self._sums).tolist() if self._sums else []
        except RuntimeError as failure:
            error = error or f"{failure}"
        self._sums = []
        if self.gloo is None:
            return [error]
        everyone: list = [None] * self.world
        dist.all_gather_object(everyone, (error, sums), group=self.gloo)
        errors = [entry[0] for entry in everyone]
        if not any(errors):
            for rank, (_, other) in enumerate(everyone):
                if other != everyone[0][1]:
                    pairs = zip(other, everyone[0][1], strict=False)
                    where = next((i for i, (a, b) in enumerate(pairs) if a != b), "count")
                    errors[rank] = f"tensor {where} of {len(other)} differs from rank 0's"
        return errors


@dataclasses.dataclass
class Outcome:
    """A case's result: ``passed``, ``failed``, ``hung`` or ``not run``."""

    id: str
    state: str
    seconds: float = 0.0
    message: str = ""


def select(world: int, patterns: list[str]) -> list[Case]:
    """Registered cases for ``world`` whose id starts with, or whose suite is, one of ``patterns`` (none: all)."""
    from tests.gpu import suites

    suites.load()
    chosen = [c for c in CASES if world in c.worlds]
    if patterns:
        chosen = [c for c in chosen if any(c.suite == p or c.id.startswith(p) for p in patterns)]
    return chosen


def run(world: int, patterns: list[str], timeout: float, case_timeout: float = 60.0) -> list[Outcome]:
    """Run the chosen cases on ``world`` ranks; never longer than ``timeout`` seconds."""
    ids = [c.id for c in select(world, patterns)]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        results.touch()
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        start = [sys.executable, "-m", "tests.gpu.rank"]
        rest = [str(world), str(_free_port()), str(results), *patterns]
        ranks = [subprocess.Popen([*start, str(rank), *rest], env=environment, cwd=ROOT) for rank in range(world)]
        try:
            why = _watch(ranks, results, time.monotonic() + timeout, case_timeout)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return _outcomes(ids, results, why)


def _watch(ranks: list[subprocess.Popen], results: Path, deadline: float, case_timeout: float) -> str:
    """Wait for the ranks; returns why they were ended, or an empty string. The first result may take start-up time."""
    size, changed, limit = 0, time.monotonic(), max(case_timeout, 90.0)
    while any(process.poll() is None for process in ranks):
        time.sleep(0.05)
        now = time.monotonic()
        if results.stat().st_size != size:
            size, changed, limit = results.stat().st_size, now, case_timeout
        if any(process.poll() not in (None, 0) for process in ranks):
            time.sleep(3)
            return "a rank died: exit codes " + ", ".join(str(process.poll()) for process in ranks)
        if now - changed > limit:
            return f"no end after {limit:.0f} s"
        if now > deadline:
            return "the run's time was up"
    return ""


def _outcomes(ids: list[str], results: Path, why: str) -> list[Outcome]:
    done = [Outcome(**json.loads(line)) for line in results.read_text().splitlines()]
    missing = [identity for identity in ids if identity not in {outcome.id for outcome in done}]
    for place, identity in enumerate(missing):
        done.append(Outcome(identity, "hung" if place == 0 and why else "not run", message=why if place == 0 else ""))
    return done


def table(outcomes: list[Outcome], world: int) -> str:
    """One line a case, failures with their message."""
    lines = [f"--- {world} ranks"]
    for outcome in outcomes:
        lines.append(f"{outcome.state:>8} {outcome.seconds:7.2f} s  {outcome.id}  {outcome.message}"[:1500])
    counts = {state: sum(o.state == state for o in outcomes) for state in ("passed", "failed", "hung", "not run")}
    lines.append(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    return "\n".join(lines)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def rank_main(rank: int, world: int, port: int, results: Path, patterns: list[str]) -> None:
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(device_index(rank))
    torch.backends.cuda.matmul.allow_tf32 = False
    if SHARE_GPU:
        share_gpu(rank)
    if world > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:gloo" if SHARE_GPU else "nccl",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=GROUP_TIMEOUT),
            device_id=None if SHARE_GPU else torch.device("cuda", rank),
        )
    from arfusion_pass.runtime import workspace

    env = Env(rank, world)
    for chosen in select(world, patterns):
        start, error = time.monotonic(), None
        env.notes.clear()
        env.problems.clear()
        try:
            chosen.run(env)
            torch.cuda.synchronize()
            workspace.check()
        except Exception as failure:
            text = str(failure) or traceback.format_exc(limit=-3)
            error = f"{type(failure).__name__}: {text}"[:800]
            if os.environ.get("ARFUSION_TEST_TRACEBACK"):
                traceback.print_exc()
        if env.problems:
            error = "; ".join([*([error] if error else []), f"{len(env.problems)} wrong", *env.problems[:2]])
        errors = env.verdicts(error)
        if rank == 0:
            _write(results, chosen, errors, time.monotonic() - start, env.notes)
        if any(errors):
            _recover(env)
    sys.stdout.flush()
    os._exit(0)  # destructors of CUDA objects have nothing left to do


def device_index(rank: int) -> int:
    """The GPU of a rank."""
    import torch

    return rank % torch.cuda.device_count() if SHARE_GPU else rank


def share_gpu(rank: int) -> None:
    """Several ranks on a GPU, which switches between their kernels: slow, but the whole path runs, even with one GPU.

    NCCL refuses that, so the group is gloo's; the workspace's own refusal and torch's are lifted here.
    """
    from arfusion_pass.runtime import agreement

    uuid = agreement.device_uuid(device_index(rank))
    agreement.device_uuid = lambda index: f"{uuid} of rank {rank}"


def _write(results: Path, chosen: Case, errors: list[str | None], seconds: float, notes: list[str]) -> None:
    failed = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error]
    outcome = Outcome(chosen.id, "failed" if failed else "passed", round(seconds, 2), "; ".join(failed or notes))
    with results.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
    print(f"[{outcome.state}] {outcome.seconds:.2f} s {outcome.id} {outcome.message}"[:1500], flush=True)


def _recover(env: Env) -> None:
    """After a failure: new workspaces, so that one expired wait does not fail every later case."""
    import torch

    from arfusion_pass.runtime import workspace

    torch.cuda.synchronize()
    env.barrier()
    workspace.destroy()
    env.barrier()
