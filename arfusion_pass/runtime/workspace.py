"""The symmetric-memory workspace of each (process group, device): made once, by all ranks or by none.

A fused op on CUDA tensors needs one. It is made on first use outside CUDA-graph capture (the op library calls back
into :func:`on_first_use`), or ahead of it::

    arf.prepare(group, max_token_num=2048, hidden_dim=7168, dtype=torch.bfloat16)     # collective

Making it: the ranks agree on a backend (:mod:`arfusion_pass.runtime.agreement`), allocate symmetric memory through
``torch.distributed._symmetric_memory`` without NVLink multicast, fill it with the sentinel of an unwritten word, vote
that all have it, and register it with the op library. Where they cannot, the group is marked as fallback, on all ranks,
with the reason. A wait inside a kernel is bounded by the process group's timeout; :func:`check` raises
:class:`ExchangeTimeout` once one has expired, or :class:`ExchangeOverlap` once two launches of a workspace ran at the
same time on a rank, and the workspace refuses work until it is made anew.
"""

from __future__ import annotations

import atexit
import contextlib
import copyreg
import ctypes
import dataclasses
import datetime
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from arfusion_pass.groups import find_group, registered_groups, resolve_group
from arfusion_pass.runtime import agreement, c_api, native, thresholds
from arfusion_pass.runtime.agreement import Backend, Decision, Facts
from arfusion_pass.runtime.aside import aside

log = logging.getLogger("arfusion_pass")

DEFAULT_MAX_BYTES = 128 << 20
"""Symmetric memory a rank by default: messages of up to 32 MiB in one two-shot piece; FlashInfer takes 512 MiB."""

LEAST_CTAS = 40
"""Of a launch's grid that :func:`prepare` may ask for: 32 CTAs may do nothing but push."""

_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
_OPS = ("allreduce_rms_norm", "moe_reduce_allreduce_rms_norm", "moe_finalize_allreduce_rms_norm")
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class ExchangeError(RuntimeError):
    """What a kernel found wrong with the exchange of its group, after which the group's workspace takes no more work.

    Args:
        group: name of the process group.
        record: what the kernel wrote.
        beside: the other groups whose waits on this GPU have expired.
    """

    def __init__(self, group: str, record: c_api.ErrorRecord, beside: Sequence[str] = ()):
        self.group, self.rank = group, int(record.rank)
        self.op = _OPS[record.op] if record.op < len(_OPS) else f"op {record.op}"
        self.generation = int(record.generation)
        super().__init__(
            f"arfusion::{self.op}: rank {self.rank} of group {group!r} {self._what(record)} The workspace takes no "
            f"more work: {self._remedy}, then call arfusion_pass.comm.workspace.destroy(group) and "
            f"arfusion_pass.prepare(group, ...) on every rank.{self._also(beside)}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the record: a worker's error is pickled on its way to whoever waits for the worker."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    _remedy = ""

    def _what(self, record: c_api.ErrorRecord) -> str:
        raise NotImplementedError

    def _also(self, beside: Sequence[str]) -> str:
        return ""


class ExchangeTimeout(ExchangeError):
    """A rank waited for a peer inside a fused kernel longer than the group's timeout; the outputs are NaN."""

    _remedy = "find out what happened to that rank"

    def _what(self, record: c_api.ErrorRecord) -> str:
        self.peer, self.token = int(record.peer), int(record.token)
        self.strategy = c_api.Strategy(record.strategy).name.lower() if record.strategy <= 4 else str(record.strategy)
        return (
            f"waited in vain for rank {self.peer} (launch {self.generation}, {self.strategy}, token {self.token}); the "
            "outputs of that call are NaN."
        )

    def _also(self, beside: Sequence[str]) -> str:
        if not beside:
            return ""
        return (
            f" So waited group {' and group '.join(map(repr, beside))} on this GPU. If graphs of theirs are replayed "
            "on two streams, each may have filled the GPU with CTAs that wait for the other's: prepare(group, ..., "
            "max_ctas=...) with half of the multiprocessors for each leaves room."
        )


class ExchangeOverlap(ExchangeError):
    """A fused kernel found another one of its group running on the same rank: CUDA graphs that share a group were
    replayed at once, or one beside an eager call. What both computed is undefined."""

    _remedy = "replay graphs that share a group one after the other, and not beside eager calls"

    def _what(self, record: c_api.ErrorRecord) -> str:
        return f"ran two launches at once (launch {self.generation}); what both computed is undefined."


def _error(workspace: Workspace, record: c_api.ErrorRecord) -> ExchangeError:
    kind = ExchangeOverlap if record.state == c_api.RecordState.OVERLAPPED else ExchangeTimeout
    others = [other for other in workspaces() if other is not workspace and other.device == workspace.device]
    waited = [other.name for other in others if (its := _expired(other)) and its.state == c_api.RecordState.WAITED]
    return kind(workspace.name, record, waited)


@dataclasses.dataclass(eq=False)
class Workspace:
    """What a group uses on a device. ``tensor`` and ``handle`` are None unless ``decision`` is native."""

    name: str
    group: dist.ProcessGroup
    device: int
    decision: Decision
    bytes: int = 0
    tensor: torch.Tensor | None = None
    handle: object | None = None
    timeout: datetime.timedelta = datetime.timedelta(minutes=10)


_workspaces: dict[tuple[str, int], Workspace] = {}
_lock = threading.RLock()
_told: set[str] = set()
_watchdog: Watchdog | None = None


def prepare(
    group: dist.ProcessGroup | str | None = None,
    max_token_num: int | None = None,
    hidden_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    device: int | torch.device | None = None,
    max_bytes: int | None = None,
    timeout: datetime.timedelta | None = None,
    max_ctas: int | None = None,
) -> Workspace:
    """Make the workspace of ``group`` now, for instance before CUDA-graph capture. Collective over the group.

    Args:
        group: a process group, the name that the fused ops call it by, or None for the default group. A process group
            that an engine registered under names of its own (``register_group``) is prepared under those names.
        max_token_num: tokens of the largest call to come; more go in pieces, always. Default: the whole of
            ``max_bytes``.
        hidden_dim: its hidden size.
        dtype: its dtype.
        device: CUDA device; default: the current one.
        max_bytes: upper limit of the symmetric memory a rank; default 128 MiB, or ``ARFUSION_WORKSPACE_MIB``.
        timeout: of a wait inside a kernel, from the next launch on; default: the process group's for a new workspace.
        max_ctas: of a launch, from :data:`LEAST_CTAS` on, so that kernels beside it find room; 0: as many as pay (the
            default of a new workspace). Two groups' graphs that are replayed on two streams at once, in an order of
            their own on each rank, need half of the multiprocessors each: larger launches can each fill a GPU with
            CTAs that wait for the other group's. (Eager calls, and those of one graph, are seen to leave room.)

    Returns:
        The workspace; ``.decision`` says which backend the group uses and why.

    Raises:
        ValueError: an unknown group, a bad size or timeout.
        RuntimeError: called during stream capture, or a rank did not answer within the group's timeout.
    """
    if (max_token_num is None) != (hidden_dim is None):
        raise ValueError("prepare: give both max_token_num and hidden_dim, or neither")
    message = None
    if max_token_num is not None and hidden_dim is not None:
        if max_token_num <= 0 or hidden_dim <= 0:
            raise ValueError(
                f"prepare: max_token_num and hidden_dim must be positive, got {max_token_num} and {hidden_dim}"
            )
        if dtype not in _DTYPES:
            raise ValueError(f"prepare: dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
        message = max_token_num * hidden_dim * dtype.itemsize
    if timeout is not None and timeout <= datetime.timedelta():
        raise ValueError(f"prepare: timeout must be positive, got {timeout}")
    if max_ctas is not None and max_ctas != 0 and max_ctas < LEAST_CTAS:
        raise ValueError(f"prepare: max_ctas must be 0 or at least {LEAST_CTAS}, got {max_ctas}")
    index = _device_index(device)
    names = _names(group)
    with _lock:
        made = [_prepare(name, index, message, hidden_dim, max_bytes, timeout) for name in names]
        for workspace in made:
            if workspace.decision.backend is not Backend.NATIVE:
                continue
            if max_ctas is not None:
                c_api.check(native.load(), "arf_set_max_ctas", workspace.name.encode(), index, max_ctas)
            if timeout is not None:  # of one that was made before, too
                c_api.check(native.load(), "arf_set_timeout", workspace.name.encode(), index, _nanoseconds(timeout))
                workspace.timeout = timeout
    return made[0]


def find(group: dist.ProcessGroup | str, device: int | torch.device | None = None) -> Workspace | None:
    """The workspace of ``group`` on ``device``, or None where it was not made yet."""
    return next(
        (ws for name in _names(group) if (ws := _workspaces.get((name, _device_index(device)))) is not None), None
    )


def workspaces() -> list[Workspace]:
    """All that exist in this process."""
    return list(_workspaces.values())


def destroy(group: dist.ProcessGroup | str | None = None) -> None:
    """Free the workspaces of ``group``, or all. Not collective: a peer keeps the memory that it has mapped.

    Call it on every rank before the workspace is made anew, and not while other threads launch on it.
    """
    names = None if group is None else set(_names(group))
    with _lock:
        for key, workspace in list(_workspaces.items()):
            if names is None or workspace.name in names:
                _release(workspace)
                del _workspaces[key]


def check(group: dist.ProcessGroup | str | None = None) -> None:
    """Raise an :class:`ExchangeError` if a wait of ``group``'s workspace (default: any) has expired, or launches of it
    ran at once."""
    names = None if group is None else set(_names(group))
    for workspace in list(_workspaces.values()):
        if (names is None or workspace.name in names) and (record := _expired(workspace)) is not None:
            raise _error(workspace, record)


class Watchdog:
    """A thread that looks for errors of exchanges and reports the first one of each workspace, until :meth:`stop`.

    Args:
        interval: seconds between looks.
        on_error: called once a workspace, in the watchdog's thread, with the error; default: log it. What it raises is
            logged, and the thread goes on looking.
    """

    def __init__(self, interval: float = 1.0, on_error: Callable[[ExchangeError], None] | None = None):
        if interval <= 0:
            raise ValueError(f"Watchdog: interval must be positive, got {interval}")
        self._interval, self._on_error = interval, on_error or (lambda error: log.error("%s", error))
        self._reported: weakref.WeakSet[Workspace] = weakref.WeakSet()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="arfusion-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            for workspace in workspaces():
                if workspace not in self._reported and (record := _expired(workspace)) is not None:
                    self._reported.add(workspace)
                    try:
                        self._on_error(_error(workspace, record))
                    except Exception:
                        log.exception("arfusion: a Watchdog's on_error failed on group %r", workspace.name)


def on_first_use(name: str, device: int, tokens: int, hidden: int, dtype: int) -> Workspace:
    """The op library's call on a group without a workspace: make one of the default size. Collective.

    ``tokens``, ``hidden`` and ``dtype`` are the first call's; later ones may be larger: the size does not follow them.
    """
    with _lock:
        return _prepare(name, device, None, hidden, None, None)


def without_library(name: str, device: int, reason: str) -> Backend:
    """What a rank that has no kernel library does for ``group``'s op, agreed with the other ranks. Collective once."""
    with _lock:
        if (workspace := _workspaces.get((name, device))) is None:
            workspace = _agree(name, device, reason, 0, None)[0]
            _workspaces[name, device] = workspace
        return workspace.decision.backend


def _names(group: dist.ProcessGroup | str | None) -> list[str]:
    """The names by which fused ops call ``group``."""
    if isinstance(group, str):
        resolve_group(group)
        return [group]
    if group is None:
        if not dist.is_initialized():
            raise ValueError("arfusion: torch.distributed is not initialised, and no process group was given")
        group = dist.group.WORLD
    assert group is not None
    aliases = [name for name, registered in registered_groups().items() if registered is group]
    return aliases or [group.group_name]


def _device_index(device: int | torch.device | None) -> int:
    if isinstance(device, torch.device):
        if device.type != "cuda":
            raise ValueError(f"arfusion: a workspace lives on a CUDA device, got {device}")
        device = device.index
    if not torch.cuda.is_available():
        raise ValueError(
            "arfusion: a workspace lives on a CUDA device, and there is none; the CPU reference needs no workspace"
        )
    return torch.cuda.current_device() if device is None else device


def _prepare(
    name: str,
    device: int,
    message: int | None,
    hidden: int | None,
    max_bytes: int | None,
    timeout: datetime.timedelta | None,
) -> Workspace:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"arfusion: the workspace of group {name!r} cannot be made while a CUDA graph is captured. Call "
            "arfusion_pass.prepare(group, max_token_num, hidden_dim, dtype) before the capture."
        )
    library = native.try_load()
    wanted = 0 if library is None else _size(library, resolve_group(name).size(), message, hidden, device, max_bytes)
    old = _workspaces.get((name, device))
    if old is not None and old.group is find_group(name) and old.bytes >= wanted and _expired(old) is None:
        return old
    if old is not None:
        _release(old)
        del _workspaces[name, device]
    workspace, everyone = _agree(name, device, native.failure() if library is None else None, wanted, timeout)
    if workspace.decision.backend is Backend.NATIVE:
        aside(lambda: _allocate(workspace, everyone), device)
    if library is not None and workspace.decision.backend is not Backend.NATIVE:
        c_api.check(library, "arf_mark_fallback", name.encode(), device)
    _workspaces[name, device] = workspace
    if workspace.decision.backend is Backend.NATIVE:
        _watch()
    _tell(workspace)
    return workspace


def _watch() -> None:
    """From the first workspace on, a thread logs what a kernel reports: a replay makes no call that could raise it, and
    an engine may decode for hours from graphs alone."""
    global _watchdog
    if _watchdog is None:
        _watchdog = Watchdog()
        atexit.register(_watchdog.stop)


def _agree(
    name: str, device: int, lacking: str | None, wanted: int, timeout: datetime.timedelta | None
) -> tuple[Workspace, list[Facts]]:
    """Exchange facts with the other ranks and decide."""
    group = resolve_group(name)
    capability = torch.cuda.get_device_capability(device)
    table, world = thresholds.load(), (thresholds.arch_name(capability), group.size())
    # The built-in tables are the library's own: nothing to set.
    own = table is thresholds.BUILT_IN
    rows = [] if own else table.by_hidden(*world)
    sharded = [] if own else table.sharded_by_hidden(*world)
    facts = Facts(
        host=agreement.host_identity(),
        device=agreement.device_uuid(device),
        capability=".".join(map(str, capability)),
        unreachable=agreement.unreachable_devices(device),
        library=lacking,
        bytes=wanted,
        thresholds=tuple((group.size(), hidden, size) for hidden, size in rows),
        sharded=tuple((group.size(), hidden, size) for hidden, size in sharded),
    )
    everyone = [Facts.from_json(data) for data in agreement.exchange(group, f"{name}/facts", facts.to_json())]
    workspace = Workspace(name, group, device, agreement.decide(everyone))
    workspace.timeout = timeout or agreement.group_timeout(group)
    return workspace, everyone


def _size(
    library: ctypes.CDLL, world: int, message: int | None, hidden: int | None, device: int, max_bytes: int | None
) -> int:
    """Bytes of symmetric memory: what the largest message needs by its own strategy, within the limit."""
    if max_bytes is None:
        max_bytes = default_bytes()
    if not 2 <= world <= c_api.MAX_WORLD:
        return 0
    if message is None:
        return max_bytes
    arch = thresholds.arch_name(torch.cuda.get_device_capability(device))
    one_shot = min(message, thresholds.load().oneshot_max_bytes(arch, world, hidden or 0))
    needed = max(
        library.arf_workspace_bytes(world, one_shot, int(c_api.Strategy.ONESHOT)),
        library.arf_workspace_bytes(world, message, int(c_api.Strategy.TWOSHOT)),
    )
    return int(min(needed, max_bytes))


def default_bytes() -> int:
    """``ARFUSION_WORKSPACE_MIB``, or 128 MiB.

    Raises:
        ValueError: the variable holds no positive integer.
    """
    given = os.environ.get("ARFUSION_WORKSPACE_MIB") or str(DEFAULT_MAX_BYTES >> 20)
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"ARFUSION_WORKSPACE_MIB must be a positive integer, got {given!r}. Correct or unset it.")
    return int(given) << 20


@contextlib.contextmanager
def _no_multicast() -> Iterator[None]:
    """torch's rendezvous makes multicast objects where the machine can, unless this variable is set."""
    before = os.environ.get(_MULTICAST)
    os.environ[_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_MULTICAST]
        else:
            os.environ[_MULTICAST] = before


def _allocate(workspace: Workspace, everyone: list[Facts]) -> None:
    """Symmetric memory on every rank, or a fallback decision on every rank."""
    name, group, device = workspace.name, workspace.group, workspace.device
    size = max(facts.bytes for facts in everyone)
    failed: str | None = None
    tensor = handle = None
    with _no_multicast():
        from torch._C._distributed_c10d import _SymmetricMemory

        try:
            tensor = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, torch.device("cuda", device))
            torch.cuda.synchronize(device)  # torch zeroes it on the legacy stream, which ours does not wait for
            tensor.fill_(0xFF)  # the sentinel of an unwritten word, before any peer can write
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            failed = f"allocating {size >> 20} MiB of symmetric memory failed: {_first_line(error)}"
        failed = _vote(workspace, "allocated", failed)
        if failed is None:
            assert tensor is not None
            try:
                handle = _SymmetricMemory.rendezvous(tensor, group.group_name)
                assert handle is not None
                if handle.multicast_ptr:
                    failed = "torch made an NVLink multicast object although it was told not to"
            except RuntimeError as error:
                failed = f"the rendezvous of symmetric memory failed: {_first_line(error)}"
            failed = _vote(workspace, "mapped", failed)
    if failed is not None:
        workspace.decision = Decision(Backend.FALLBACK, failed)
        return
    assert tensor is not None
    assert handle is not None
    _use_thresholds(everyone)
    desc = c_api.WorkspaceDesc(
        group=name.encode(),
        device=device,
        rank=group.rank(),
        world=group.size(),
        bytes=size,
        timeout_ns=_nanoseconds(workspace.timeout),
    )
    for rank, pointer in enumerate(handle.buffer_ptrs):
        desc.peers[rank] = pointer
    c_api.check(native.load(), "arf_register_workspace", ctypes.byref(desc))
    workspace.tensor, workspace.handle, workspace.bytes = tensor, handle, size


def _nanoseconds(timeout: datetime.timedelta) -> int:
    return int(timeout.total_seconds() * 1e9)


def _vote(workspace: Workspace, stage: str, failed: str | None) -> str | None:
    """None where no rank failed at this stage, else the first failure, the same on every rank. Also a barrier."""
    answers = agreement.exchange(workspace.group, f"{workspace.name}/{stage}", failed)
    return next((f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if answer is not None), None)


def _use_thresholds(everyone: list[Facts]) -> None:
    """All ranks use rank 0's strategy table: the strategy may not depend on a rank's own files."""
    first = everyone[0]
    if any((facts.thresholds, facts.sharded) != (first.thresholds, first.sharded) for facts in everyone):
        _tell_once("arfusion: the ranks have different strategy tables (thresholds.json); rank 0's is used.")
    if first.thresholds:
        native.use_thresholds(first.thresholds)
    if first.sharded:
        native.use_sharded_thresholds(first.sharded)


def _release(workspace: Workspace) -> None:
    library = native.loaded()
    if library is not None:
        torch.cuda.synchronize(workspace.device)
        if (
            c_api.GroupState(library.arf_group_state(workspace.name.encode(), workspace.device))
            != c_api.GroupState.UNKNOWN
        ):
            c_api.check(library, "arf_destroy_workspace", workspace.name.encode(), workspace.device)
    workspace.handle = workspace.tensor = None


def _expired(workspace: Workspace) -> c_api.ErrorRecord | None:
    library = native.loaded()
    if library is None or workspace.tensor is None:
        return None
    record = c_api.ErrorRecord()
    expired = library.arf_read_error(workspace.name.encode(), workspace.device, ctypes.byref(record))
    return record if expired else None


def _tell(workspace: Workspace) -> None:
    """Say once, on rank 0, that a group does not use the exchange kernels."""
    log.info(
        "arfusion: group %r on cuda:%d: %s, %s",
        workspace.name,
        workspace.device,
        workspace.decision.backend.value,
        workspace.decision.reason,
    )
    if workspace.decision.backend is not Backend.NATIVE and workspace.group.rank() == 0:
        what = (
            "NCCL and a local fused kernel"
            if workspace.decision.backend is Backend.FALLBACK
            else "the reference in torch ops"
        )
        _tell_once(f"arfusion: group {workspace.name!r} uses {what}: {workspace.decision.reason}")


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        log.warning("%s", message)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
