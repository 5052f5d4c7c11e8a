"""The eager API's workspace: whose group a call runs in, on which backend, in which symmetric memory.

    with create_allreduce_fusion_workspace(group=group, max_token_num=2048, hidden_dim=7168, dtype=dtype) as ws:
        allreduce_fusion(input=x, workspace=ws, pattern=AllReduceFusionPattern.kAllReduce)

A workspace has symmetric memory of its own (under a group name of its own), so that destroying it, or making a larger
one, never pulls memory from under a captured graph or a compiled model that uses the same process group. On a device
without CUDA there is nothing to allocate: the reference exchanges through the process group itself.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist

from arfusion_pass.groups import forget_private, register_private
from arfusion_pass.ops.checks import INPUT_DTYPES
from arfusion_pass.ops.flashinfer_enums import MNNVLAllreduceFusionStrategy
from arfusion_pass.ops.spec import Flags
from arfusion_pass.runtime import flashinfer, native, workspace

OUR_BACKENDS = ("auto", "native", "reference", "flashinfer")
FLASHINFER_BACKENDS = ("trtllm", "mnnvl")
"""FlashInfer's backend names; here they mean ``"auto"``, so that a call keeps working with only its import changed."""

_made: collections.Counter[str] = (
    collections.Counter()
)  # workspaces made, by process group: names them alike on all ranks


class AllReduceFusionWorkspace:
    """What :func:`arfusion_pass.comm.allreduce_fusion` runs in. Make one with
    :func:`create_allreduce_fusion_workspace`, on every rank of the group, in the same order.

    Attributes:
        world_size, rank: of the group (``tp_size``, ``tp_rank`` are the same).
        group: the process group, or None for a world of one rank without one.
        group_name: the name by which the fused ops know this workspace.
        device: where its calls' tensors live.
        max_token_num, hidden_dim, dtype: the size it was made for. Larger calls go in several pieces, with the same
            bits.

    Raises:
        ValueError: a group that does not fit ``world_size`` and ``rank``, a bad size or dtype, a backend that cannot
            be had (the message says why).
        RuntimeError: a rank did not answer within the group's timeout.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        max_token_num: int,
        hidden_dim: int,
        dtype: torch.dtype,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
    ) -> None:
        self._destroyed = True  # until everything below has succeeded
        api = "create_allreduce_fusion_workspace"
        for name, value in (("max_token_num", max_token_num), ("hidden_dim", hidden_dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{api}: {name} must be a positive integer, got {value!r}")
        if dtype not in INPUT_DTYPES:
            raise ValueError(f"{api}: dtype must be torch.bfloat16, torch.float16 or torch.float32, got {dtype!r}")
        if backend == "mnnvl-cutedsl":
            raise ValueError(
                f"{api}: backend='mnnvl-cutedsl' compiles kernels for fixed settings and needs NVLink multicast; it "
                "has no counterpart here. Use backend='auto'."
            )
        if backend not in OUR_BACKENDS + FLASHINFER_BACKENDS:
            raise ValueError(f"{api}: backend must be one of {', '.join(OUR_BACKENDS)}, got {backend!r}")
        self.group = group
        self.world_size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self.max_token_num, self.hidden_dim, self.dtype = max_token_num, hidden_dim, dtype
        self.device = _device(device)
        self.group_name = ""
        if group is not None and self.world_size > 1:
            number = _made[group.group_name]
            _made[group.group_name] += 1
            self.group_name = f"arfusion.comm/{group.group_name}/{number}"
            register_private(self.group_name, group)
        try:
            self._backend, self._flags = self._allocate(backend)
        except BaseException:
            self._release()
            raise
        self._destroyed = False

    def _allocate(self, backend: str) -> tuple[str, int]:
        """(what runs the calls, the flags that say so to the fused ops). Collective."""
        cuda = self.device.type == "cuda"
        if backend == "reference":
            return "reference", int(Flags.REFERENCE)
        if backend in ("native", "flashinfer") and not cuda:
            raise ValueError(f"backend={backend!r} needs a CUDA device, this workspace is on {self.device}")
        if not cuda:
            return "reference", 0
        flags = 0
        if backend == "flashinfer":
            reason = flashinfer.prepare(self.group_name, self.device, self.max_token_num, self.hidden_dim, self.dtype)
            if reason is not None:
                raise ValueError(f"backend='flashinfer' cannot be had: {reason}")
            flags = int(Flags.FLASHINFER)
        # FlashInfer's workspace needs ours beside it: what it gets wrong is handed to us.
        ours, reason = self._prepare_native()
        if backend == "native" and ours != "native":
            raise ValueError(f"backend='native' cannot be had for this group: {reason}")
        return ("flashinfer" if flags else ours), flags

    def _prepare_native(self) -> tuple[str, str]:
        """(``native``, ``fallback`` or ``reference``, why), the same on every rank."""
        if not self.group_name:
            return ("native", "one rank") if native.try_load() else ("reference", native.failure() or "no library")
        made = workspace.prepare(
            self.group_name, self.max_token_num, self.hidden_dim, self.dtype, device=self.device.index
        )
        return made.decision.backend.value, made.decision.reason

    @property
    def backend(self) -> str:
        """What runs a call: ``"native"`` (our exchange kernels), ``"fallback"`` (the group's own all-reduce, then one
        local fused kernel: no P2P, several hosts or more than 8 ranks), ``"reference"`` (torch ops) or
        ``"flashinfer"``."""
        return self._backend

    @property
    def flags(self) -> int:
        """The flags that every call in this workspace carries (its backend)."""
        return self._flags

    @property
    def tp_size(self) -> int:
        """``world_size``."""
        return self.world_size

    @property
    def tp_rank(self) -> int:
        """``rank``."""
        return self.rank

    @property
    def workspace_tensor(self) -> AllReduceFusionWorkspace:
        """This workspace: callers that hand ``workspace.workspace_tensor`` to ``trtllm_moe_*`` need not change."""
        return self

    def is_buffer_size_sufficient(
        self,
        tp_size: int,
        num_tokens: int,
        hidden_dim: int,
        dtype: torch.dtype,
        use_oneshot: Any | None = None,
    ) -> bool:
        """Whether a call of this size fits what the workspace was made for: its bytes, whatever its shape and dtype.

        A call that does not fit still runs, in several pieces. ``use_oneshot`` makes no difference: a forced one-shot
        call goes in pieces where its buffers are smaller.
        """
        if self._destroyed or tp_size != self.world_size:
            return False
        return num_tokens * hidden_dim * dtype.itemsize <= self.max_token_num * self.hidden_dim * self.dtype.itemsize

    def destroy(self) -> None:
        """Free the memory; later calls raise ``ValueError``. Call it on every rank. Again: nothing happens.

        Waits for this device's work first. A CUDA graph captured with this workspace must not be replayed any more.
        """
        if not self._destroyed:
            self._destroyed = True
            self._release()

    def checkpoint_prepare(self) -> None:
        """``NotImplementedError``, as FlashInfer's on torch's symmetric memory: the memory stays where it is."""
        raise NotImplementedError("the workspace lies in torch's symmetric memory, which stays resident: destroy() it")

    def checkpoint_restore(self, comm_backend: Any) -> None:
        """As :meth:`checkpoint_prepare`."""
        self.checkpoint_prepare()

    def _release(self) -> None:
        name = self.group_name
        if not name:
            return
        if self.device.type == "cuda":
            flashinfer.release(name)
            workspace.destroy(name)
        forget_private(name)

    def require_alive(self, api: str) -> None:
        """``ValueError`` if this workspace was destroyed."""
        if self._destroyed:
            raise ValueError(f"{api}: the workspace was destroyed; make a new one with the same call on every rank")

    def __enter__(self) -> AllReduceFusionWorkspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()

    def __del__(self) -> None:
        if not getattr(self, "_destroyed", True) and not sys.is_finalizing():
            warnings.warn(f"{self!r} was never destroyed: call destroy(), or use it in a with", ResourceWarning, 2)
            with contextlib.suppress(Exception):
                self.destroy()

    def __repr__(self) -> str:
        size = f"{self.max_token_num} x {self.hidden_dim} {str(self.dtype).removeprefix('torch.')}"
        state = "destroyed" if self._destroyed else self._backend
        return f"<{type(self).__name__} {self.group_name!r} rank {self.rank} of {self.world_size}, {size}, {state}>"


class MNNVLAllReduceFusionWorkspace(AllReduceFusionWorkspace):
    """The same workspace under FlashInfer's name and constructor. It needs no NVLink multicast.

    Args:
        mapping: anything with ``tp_size`` and ``tp_rank`` (or ``world_size`` and ``rank``): FlashInfer's ``Mapping``.
        max_num_tokens, hidden_dim, dtype: the largest call to come.
        buffer_size_in_bytes: instead of them: a message of that many bytes.
        comm_backend, group: as in :func:`create_allreduce_fusion_workspace`.
    """

    def __init__(
        self,
        mapping: Any,
        max_num_tokens: int | None = None,
        hidden_dim: int | None = None,
        dtype: torch.dtype | None = None,
        buffer_size_in_bytes: int | None = None,
        comm_backend: Any | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
    ) -> None:
        self._destroyed = True
        name = "MNNVLAllReduceFusionWorkspace"
        size = getattr(mapping, "tp_size", getattr(mapping, "world_size", None))
        rank = getattr(mapping, "tp_rank", getattr(mapping, "rank", None))
        if size is None or rank is None:
            raise ValueError(f"{name}: mapping must have tp_size and tp_rank, got {mapping!r}")
        if buffer_size_in_bytes is not None:
            if isinstance(buffer_size_in_bytes, bool) or not isinstance(buffer_size_in_bytes, int):
                raise ValueError(f"{name}: buffer_size_in_bytes must be an integer, got {buffer_size_in_bytes!r}")
            dtype = dtype or torch.bfloat16
            hidden_dim = hidden_dim or 16 // dtype.itemsize
            max_num_tokens = max(1, buffer_size_in_bytes // (hidden_dim * dtype.itemsize))
        if max_num_tokens is None or hidden_dim is None or dtype is None:
            raise ValueError(
                f"{name}: give max_num_tokens, hidden_dim and dtype, or buffer_size_in_bytes; got {max_num_tokens!r}, "
                f"{hidden_dim!r}, {dtype!r} and None"
            )
        found = find_process_group(name, size, rank, comm_backend, group)
        super().__init__(found, max_num_tokens, hidden_dim, dtype, backend, device)

    def is_buffer_size_sufficient(  # FlashInfer calls the last parameter so here
        self,
        tp_size: int,
        num_tokens: int,
        hidden_dim: int,
        dtype: torch.dtype,
        strategy: Any = MNNVLAllreduceFusionStrategy.AUTO,
    ) -> bool:
        """As in the base class; ``strategy`` makes no difference."""
        return super().is_buffer_size_sufficient(tp_size, num_tokens, hidden_dim, dtype)

    @staticmethod
    def get_required_buffer_size_bytes(
        tp_size: int,
        num_tokens: int,
        hidden_dim: int,
        dtype: torch.dtype,
        strategy: Any = MNNVLAllreduceFusionStrategy.AUTO,
    ) -> int:
        """Bytes of a message of this size: what ``buffer_size_in_bytes`` takes here, for every strategy."""
        return num_tokens * hidden_dim * dtype.itemsize


def find_process_group(
    api: str,
    world_size: int | None,
    rank: int | None,
    comm_backend: Any | None,
    group: dist.ProcessGroup | None,
) -> dist.ProcessGroup | None:
    """The process group that these arguments mean; None only for a world of one rank without torch.distributed.

    ``group`` first, then the group of a ``comm_backend`` (FlashInfer's ``TorchDistBackend`` keeps one), then the
    default group. ``ValueError`` where ``world_size`` or ``rank`` say otherwise.
    """
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{api}: group must be a torch.distributed.ProcessGroup of this rank, got {group!r}")
    if group is None and comm_backend is not None:
        for method in ("Get_rank", "Get_size"):
            if not callable(getattr(comm_backend, method, None)):
                raise ValueError(f"{api}: comm_backend must have Get_rank() and Get_size(), got {comm_backend!r}")
        held = getattr(comm_backend, "group", None) or getattr(comm_backend, "_group", None)
        group = held if isinstance(held, dist.ProcessGroup) else None
        world_size = comm_backend.Get_size() if world_size is None else world_size
        rank = comm_backend.Get_rank() if rank is None else rank
    initialised = dist.is_available() and dist.is_initialized()
    if group is None and initialised:
        group = dist.group.WORLD
    if group is None:
        if world_size == 1:
            return None
        raise ValueError(
            f"{api}: torch.distributed is not initialised and no group was given (world_size={world_size!r}): call "
            "torch.distributed.init_process_group first, or pass group="
        )
    for name, given, actual in (("world_size", world_size, group.size()), ("rank", rank, group.rank())):
        if given is not None and (isinstance(given, torch.Tensor) or given != actual):
            raise ValueError(
                f"{api}: {name}={given!r}, but in process group {group.group_name!r} it is {actual}; for a sub-group "
                "pass group="
            )
    return group


def create_allreduce_fusion_workspace(
    backend: str = "auto",
    world_size: int | None = None,
    rank: int | None = None,
    max_token_num: int | None = None,
    hidden_dim: int | None = None,
    dtype: torch.dtype | None = None,
    gpus_per_node: int | None = None,
    comm_backend: Any | None = None,
    force_oneshot_support: bool = False,
    group: dist.ProcessGroup | None = None,
    *,
    top_k: int | None = None,
    rms_eps: float | None = None,
    weight_bias: float | None = None,
    routed_scaling_factor: float | None = None,
    include_shared_expert: bool | None = None,
    add_residual: bool | None = None,
    write_residual_output: bool | None = None,
    apply_rms_norm: bool | None = None,
    output_dtype: torch.dtype | None = None,
    dynamic_fp8: bool | None = None,
    write_norm_output: bool | None = None,
    config: Any | None = None,
    device: torch.device | str | int | None = None,
) -> AllReduceFusionWorkspace:
    """Make the workspace that :func:`arfusion_pass.comm.allreduce_fusion` runs in. Collective over the group.

    FlashInfer's parameters, in its order, with its defaults; ``device`` is ours.

    Args:
        backend: ``"auto"`` (our kernels on CUDA, the reference elsewhere), ``"native"`` (our kernels or an error),
            ``"reference"`` (torch ops), ``"flashinfer"`` (FlashInfer's kernels; what they get wrong goes to ours).
            FlashInfer's own ``"trtllm"`` and ``"mnnvl"`` mean ``"auto"``.
        world_size: of the group; may be left out.
        rank: in the group; may be left out.
        max_token_num: tokens of the largest call to come. One workspace serves every ``(tokens, hidden, dtype)`` that
            ``is_buffer_size_sufficient`` accepts, and larger calls in pieces.
        hidden_dim: its hidden size.
        dtype: its dtype: bf16, fp16 or fp32.
        gpus_per_node: accepted; nothing here depends on it.
        force_oneshot_support: accepted; nothing here depends on it.
        comm_backend: FlashInfer's ``TorchDistBackend`` or the like: its process group is used where ``group`` is None.
        group: the process group; default: ``comm_backend``'s, else the default group. A sub-group is fine: every rank
            of it makes the workspace.
        top_k: as all that follow but ``device``, a setting of FlashInfer's ``mnnvl-cutedsl`` backend, refused as by its
            other backends.
        device: where the calls' tensors live; default: the current CUDA device, or the CPU where there is none.

    Raises:
        ValueError: naming the argument that is missing or does not fit.
    """
    api = "create_allreduce_fusion_workspace"
    cutedsl = {
        "top_k": top_k,
        "rms_eps": rms_eps,
        "weight_bias": weight_bias,
        "routed_scaling_factor": routed_scaling_factor,
        "include_shared_expert": include_shared_expert,
        "add_residual": add_residual,
        "write_residual_output": write_residual_output,
        "apply_rms_norm": apply_rms_norm,
        "output_dtype": output_dtype,
        "dynamic_fp8": dynamic_fp8,
        "write_norm_output": write_norm_output,
        "config": config,
    }
    given = [name for name, value in cutedsl.items() if value is not None]
    if given and backend != "mnnvl-cutedsl":
        raise ValueError(
            f"{api}: {', '.join(given)} can only be given with FlashInfer's backend 'mnnvl-cutedsl'; here every call "
            "says for itself what it computes"
        )
    for name, value in (("max_token_num", max_token_num), ("hidden_dim", hidden_dim), ("dtype", dtype)):
        if value is None:
            raise ValueError(f"{api}: {name} is needed, got None")
    assert max_token_num is not None
    assert hidden_dim is not None
    assert dtype is not None
    found = find_process_group(api, world_size, rank, comm_backend, group)
    if backend == "mnnvl":
        mapping = _Mapping(1 if found is None else found.size(), 0 if found is None else found.rank())
        return MNNVLAllReduceFusionWorkspace(mapping, max_token_num, hidden_dim, dtype, group=found, device=device)
    return AllReduceFusionWorkspace(found, max_token_num, hidden_dim, dtype, backend, device)


class _Mapping:
    """The part of FlashInfer's ``Mapping`` that a workspace reads."""

    def __init__(self, tp_size: int, tp_rank: int) -> None:
        self.tp_size, self.tp_rank = tp_size, tp_rank


def _device(device: torch.device | str | int | None) -> torch.device:
    """``device`` with its index; None: the current CUDA device, or the CPU. ``ValueError`` where it is none."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"create_allreduce_fusion_workspace: device={device!r}: {error}") from None
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    return found
