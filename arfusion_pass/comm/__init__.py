"""FlashInfer's fused all-reduce API on this package's kernels: change the import, keep the call.

    from arfusion_pass import comm                     # instead of: from flashinfer import comm

    ws = comm.create_allreduce_fusion_workspace(group=group, max_token_num=2048, hidden_dim=7168, dtype=torch.bfloat16)
    comm.allreduce_fusion(input=x, workspace=ws, pattern=comm.AllReduceFusionPattern.kARResidualRMSNorm, ...)

Works on GPUs through the native kernels and on CPU through the reference, with the same meaning.
"""

from __future__ import annotations

from arfusion_pass.comm.api import allreduce_fusion
from arfusion_pass.comm.fusion_workspace import (
    AllReduceFusionWorkspace,
    MNNVLAllReduceFusionWorkspace,
    create_allreduce_fusion_workspace,
)
from arfusion_pass.comm.mnnvl import (
    trtllm_mnnvl_allreduce,
    trtllm_mnnvl_fused_allreduce_add_rmsnorm,
    trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant,
)
from arfusion_pass.comm.moe import trtllm_moe_allreduce_fusion, trtllm_moe_finalize_allreduce_fusion
from arfusion_pass.ops.flashinfer_enums import (
    AllReduceFusionPattern,
    MNNVLAllreduceFusionStrategy,
    MNNVLQuantType,
    QuantizationSFLayout,
)
from arfusion_pass.runtime import workspace as workspace  # comm.workspace.destroy, .find, .Watchdog

__all__ = [
    "AllReduceFusionPattern",
    "AllReduceFusionWorkspace",
    "MNNVLAllReduceFusionWorkspace",
    "MNNVLAllreduceFusionStrategy",
    "MNNVLQuantType",
    "QuantizationSFLayout",
    "allreduce_fusion",
    "create_allreduce_fusion_workspace",
    "trtllm_mnnvl_allreduce",
    "trtllm_mnnvl_fused_allreduce_add_rmsnorm",
    "trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant",
    "trtllm_moe_allreduce_fusion",
    "trtllm_moe_finalize_allreduce_fusion",
]
