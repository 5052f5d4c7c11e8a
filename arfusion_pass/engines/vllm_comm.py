"""vLLM's own calls of FlashInfer's fused all-reduce, on our kernels.

Models that vLLM does not compile call it from their layers (0.33: DeepSeek V3.2, GLM-5, Kimi K3's latent experts and
drafts, MiniMax M3), all through one op; its all-reduce does with ``VLLM_ALLREDUCE_USE_FLASHINFER=1``. The two modules
that make the calls hold FlashInfer's API under one name, ``flashinfer_comm``, and one of them every workspace.

    calls.flashinfer_comm.allreduce_fusion(input=x, workspace=..., pattern=kARResidualRMSNorm, residual_in=residual,
                                           residual_out=x, norm_out=norm, rms_gamma=weight, weight_bias=0.0 or 1.0)
"""

from __future__ import annotations

import functools
import importlib
import logging
import types
from typing import Any

import torch.distributed as dist

from arfusion_pass.compilation import known
from arfusion_pass.engines.starting import after_import

log = logging.getLogger("arfusion_pass")

WORKSPACES = "vllm.distributed.device_communicators.flashinfer_all_reduce"
CALLS = "vllm.compilation.passes.fusion.allreduce_rms_fusion"


def replace_when_imported() -> None:
    """:func:`replace_flashinfer` when vLLM imports either module; the one brings the other, so that no workspace of
    FlashInfer's is made that our calls would get.

    Raises:
        ModuleNotFoundError: this vLLM has no such module.
    """
    for module, do in ((CALLS, replace_flashinfer), (WORKSPACES, _import_calls)):
        after_import(module, "vLLM's calls of FlashInfer", do)


def _import_calls() -> None:
    importlib.import_module(CALLS)


def replace_flashinfer() -> None:
    """Let vLLM's calls of FlashInfer's ``allreduce_fusion`` run on our kernels, from its next workspace on.

    Whether vLLM makes a call at all (its sizes, dtypes and platforms) it decides as before. Call it before the first
    of them; again: nothing changes.

    Raises:
        RuntimeError: this vLLM lacks a name that is replaced or read, or FlashInfer, without which it makes no such
            call.
    """
    from arfusion_pass import comm

    workspaces: Any = importlib.import_module(WORKSPACES)
    calls: Any = importlib.import_module(CALLS)
    parallel = importlib.import_module("vllm.distributed.parallel_state")
    if getattr(calls, "flashinfer_comm", 0) is None:
        raise RuntimeError("replace_flashinfer: FlashInfer cannot be imported, and without it vLLM makes no such call")
    read = {
        workspaces: ("flashinfer_comm", "_fi_ar_workspace", "_fi_ar_quant_workspace", "destroy_fi_ar_workspace"),
        calls: ("flashinfer_comm", "flashinfer_trtllm_fused_allreduce_norm"),
        parallel: ("_groups", "GroupCoordinator"),
    }
    missing = [name for module, names in read.items() for name in names if not hasattr(module, name)]
    if missing:
        raise RuntimeError(
            f"replace_flashinfer: this vLLM has no {', '.join(missing)}: its calls are left to FlashInfer"
        )

    def create_workspace(group: dist.ProcessGroup, backend: str, **arguments: Any) -> comm.AllReduceFusionWorkspace:
        workspace = comm.create_allreduce_fusion_workspace(group=_device_group(parallel, group), **arguments)
        workspace.mc_ptr = True  # type: ignore[attr-defined]  # 0.33 throws one without multicast away
        level = logging.DEBUG if workspace.rank else logging.INFO
        log.log(level, "arfusion: vLLM's fused all-reduces run here, not in FlashInfer: %r", workspace)
        return workspace

    def allreduce_fusion(**call: Any) -> Any:
        return comm.allreduce_fusion(**{**call, "use_oneshot": None})  # vLLM's sizes are those of FlashInfer's kernels

    ours = types.SimpleNamespace(
        AllReduceFusionPattern=comm.AllReduceFusionPattern,
        QuantizationSFLayout=comm.QuantizationSFLayout,
        create_allreduce_fusion_workspace=create_workspace,
        allreduce_fusion=allreduce_fusion,
    )
    workspaces.flashinfer_comm = calls.flashinfer_comm = ours
    _end_workspaces_with_their_group(workspaces, parallel.GroupCoordinator)


def _device_group(parallel: Any, group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group of GPUs beside ``group``, which 0.33 gives as a group of CPUs: FlashInfer only shares handles through
    it, we also fall back to its all-reduce."""
    for reference in list(parallel._groups.values()):
        coordinator = reference()
        if getattr(coordinator, "cpu_group", None) is group:
            return coordinator.device_group  # type: ignore[no-any-return]
    return group


def _end_workspaces_with_their_group(workspaces: Any, coordinator: Any) -> None:
    """vLLM keeps its workspaces until the process ends, also behind the groups of the engine that made them; the next
    engine's are other groups."""
    destroy = getattr(coordinator.destroy, "arfusion", coordinator.destroy)

    def end(group: Any) -> None:
        held = (workspaces._fi_ar_workspace, workspaces._fi_ar_quant_workspace)
        if group is not None and any(getattr(workspace, "group", None) is group for workspace in held):
            workspaces.destroy_fi_ar_workspace()

    @functools.wraps(destroy)
    def destroy_with_workspaces(self: Any, *args: Any, **kwargs: Any) -> None:
        known(lambda: end(getattr(self, "device_group", None)))
        destroy(self, *args, **kwargs)

    destroy_with_workspaces.arfusion = destroy  # type: ignore[attr-defined]
    coordinator.destroy = destroy_with_workspaces
