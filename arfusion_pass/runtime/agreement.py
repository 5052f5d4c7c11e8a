"""How the ranks of a group agree on one backend: gather every rank's facts, decide by the same rule on all of them.

The facts travel through the process group's own store, so that agreeing needs no GPU, launches nothing and never waits
longer than the group's timeout::

    everyone = exchange(group, "tp:0", facts)        # one entry a rank, in rank order, the same list on every rank
    decision = decide(everyone)                      # native, fallback or reference, and why
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import logging
import socket
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger("arfusion_pass")

MAX_WORLD = 8
PATIENCE = datetime.timedelta(seconds=30)
"""How long a rank waits for another in silence."""


class Backend(enum.Enum):
    """What runs the fused ops of a group."""

    NATIVE = "native"
    """Our exchange kernels, in a symmetric workspace."""
    FALLBACK = "fallback"
    """The process group's all-reduce, then one local fused kernel."""
    REFERENCE = "reference"
    """Torch ops."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a group uses and why, the same on every rank."""

    backend: Backend
    reason: str


@dataclasses.dataclass(frozen=True)
class Facts:
    """What one rank knows before it agrees with the others.

    Args:
        host: identifies the machine (boot id and host name).
        device: UUID of its GPU.
        capability: compute capability, such as ``"9.0"``.
        unreachable: UUIDs of GPUs visible to this process that its own cannot access directly.
        library: why this rank has no kernel library, or None where it has one.
        bytes: the workspace that it wants.
        thresholds: the strategy table that it would use, as rows.
        sharded: its table of sharded residuals, likewise.
    """

    host: str
    device: str
    capability: str
    unreachable: tuple[str, ...] = ()
    library: str | None = None
    bytes: int = 0
    thresholds: tuple[tuple[int, int, int], ...] = ()
    sharded: tuple[tuple[int, int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain data for the store."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Facts:
        """The inverse of :meth:`to_json`."""
        tables = {
            name: tuple((int(world), int(hidden), int(size)) for world, hidden, size in data[name])
            for name in ("thresholds", "sharded")
        }
        return Facts(**{**data, "unreachable": tuple(data["unreachable"]), **tables})


def decide(everyone: list[Facts]) -> Decision:
    """The backend of a group whose ranks have these facts. A pure function: all ranks come to the same answer."""
    lacking = [rank for rank, facts in enumerate(everyone) if facts.library is not None]
    if len(lacking) == len(everyone):
        return Decision(Backend.REFERENCE, f"no rank has the kernel library: {everyone[0].library}")
    if lacking:
        why = everyone[lacking[0]].library
        return Decision(Backend.FALLBACK, f"rank {lacking[0]} has no kernel library: {why}")
    if len(everyone) > MAX_WORLD:
        return Decision(
            Backend.FALLBACK, f"the group has {len(everyone)} ranks, the exchange kernels take {MAX_WORLD} at most"
        )
    hosts = {facts.host for facts in everyone}
    if len(hosts) > 1:
        return Decision(Backend.FALLBACK, f"the group spans {len(hosts)} hosts")
    devices = [facts.device for facts in everyone]
    if len(set(devices)) < len(devices):
        return Decision(Backend.FALLBACK, "two ranks of the group share a GPU")
    if len({facts.capability for facts in everyone}) > 1:
        return Decision(Backend.FALLBACK, "the GPUs of the group have different compute capabilities")
    for rank, facts in enumerate(everyone):
        for peer, device in enumerate(devices):
            if peer != rank and device in facts.unreachable:
                return Decision(
                    Backend.FALLBACK, f"the GPU of rank {rank} cannot access that of rank {peer} directly (no P2P)"
                )
    return Decision(Backend.NATIVE, f"{len(everyone)} GPUs of one host with P2P access")


class NoAnswerError(RuntimeError):
    """A rank did not come to an exchange in time; the message names it."""


_rounds: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, int]] = weakref.WeakKeyDictionary()
_threads = threading.local()


def exchange(
    group: dist.ProcessGroup,
    tag: str,
    payload: Any,
    timeout: datetime.timedelta | None = None,
    doing: str = "setting up its workspace",
    why_absent: Callable[[int], str] = lambda peer: "",
) -> list[Any]:
    """Every rank's ``payload`` (plain data), in rank order. Collective; waits at most ``timeout`` (the group's), and
    says so after half a minute.

    Args:
        tag: the group's name and what for, ``"tp:0/facts"``: each has rounds of its own.
        doing: what it is for, for the error.
        why_absent: what is known of a rank that does not come.

    Raises:
        NoAnswerError: naming the rank that did not come in time.
    """
    rank, world = group.rank(), group.size()
    if world == 1:
        return [payload]
    store = _connection(group)
    timeout = timeout or group_timeout(group)
    rounds = _rounds.setdefault(group, {})  # of this group, not of an earlier one at its address
    number = rounds[tag] = rounds.get(tag, 0) + 1
    prefix, name = f"arfusion/{tag}/{number}", tag.rpartition("/")[0] or tag
    store.set(f"{prefix}/{rank}", json.dumps(payload))
    result = []
    for peer in range(world):
        key = f"{prefix}/{peer}"
        try:
            left = timeout
            if timeout > PATIENCE and not _arrives(store, key):
                why = why_absent(peer)
                log.warning("arfusion: rank %d waits for rank %d of group %r, %s%s", rank, peer, name, doing, why)
                left = timeout - PATIENCE
            store.wait([key], left)
        except Exception as error:  # DistStoreError, or the store's own: the peer is gone, or never came
            raise NoAnswerError(
                f"arfusion: rank {peer} of group {name!r} did not answer rank {rank}, which is {doing}, within "
                f"{timeout.total_seconds():.0f} s ({error}){why_absent(peer)}"
            ) from error
        result.append(json.loads(store.get(key)))
    _clear(store, prefix, world)
    return result


def _connection(group: dist.ProcessGroup) -> dist.Store:
    """This thread's own connection to the store of ``group``. A wait holds the one that it waits on, which all groups
    of a process share: another thread, or torch, could not say meanwhile what a rank waits for that this one waits for.

    One for all rounds: a connection may cost a look-up of names, and seconds where no resolver answers.
    """
    kept = _threads.__dict__.setdefault("stores", weakref.WeakKeyDictionary())
    if group not in kept:
        from torch.distributed.distributed_c10d import _get_process_group_store

        store = _get_process_group_store(group)
        try:
            kept[group] = store.clone()  # type: ignore[attr-defined]
        except RuntimeError:  # a store that is written in Python need not have it
            kept[group] = store
    return kept[group]  # type: ignore[no-any-return]


def _clear(store: dist.Store, prefix: str, world: int) -> None:
    """Once all ranks have read a round, the last of them takes it out of the store.

    A store may outlive its groups, as torchrun's does: a world that is destroyed and initialised again has its names
    and counts its rounds anew, and would read what a rank said in the world before.
    """
    try:
        if store.add(f"{prefix}/read", 1) == world:
            for key in (*map(str, range(world)), "read"):
                store.delete_key(f"{prefix}/{key}")
    except Exception as error:  # a store that cannot, or that went with its rank: everybody has been answered
        log.debug("arfusion: %s stays in the store: %s", prefix, error)


def _arrives(store: dist.Store, key: str) -> bool:
    try:
        store.wait([key], PATIENCE)
    except Exception:  # not yet, or never: the wait that follows says
        return False
    return True


def group_timeout(group: dist.ProcessGroup) -> datetime.timedelta:
    """The timeout of ``group``: its back-end's, or torch's default."""
    for device in ("cuda", "cpu"):
        try:
            value = group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
        if isinstance(value, datetime.timedelta) and value.total_seconds() > 0:
            return value
    return dist.distributed_c10d.default_pg_timeout


def host_identity() -> str:
    """This machine: containers of one host share the boot id, hosts with one name do not."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def device_uuid(index: int) -> str:
    """A GPU's UUID, the same in every process, whatever its index there."""
    return str(torch.cuda.get_device_properties(index).uuid)


def unreachable_devices(index: int) -> tuple[str, ...]:
    """UUIDs of visible GPUs that GPU ``index`` has no P2P access to."""
    others = (other for other in range(torch.cuda.device_count()) if other != index)
    return tuple(device_uuid(other) for other in others if not torch.cuda.can_device_access_peer(index, other))
