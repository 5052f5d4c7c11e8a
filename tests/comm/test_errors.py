"""Every wrong argument is a ``ValueError`` that names the argument, what was given and what is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from arfusion_pass import comm

T, H = 6, 64
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


@pytest.fixture
def workspace() -> Iterator[comm.AllReduceFusionWorkspace]:
    """A world of one rank, without torch.distributed."""
    with comm.create_allreduce_fusion_workspace(
        world_size=1, rank=0, max_token_num=8, hidden_dim=H, dtype=BF16, device="cpu"
    ) as made:
        yield made


def rows(hidden: int = H, tokens: int = T, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(tokens, hidden, dtype=dtype)


def strided() -> torch.Tensor:
    return torch.zeros(T, 2 * H, dtype=BF16)[:, ::2]


BASE: dict[str, Any] = {"residual_in": rows(), "rms_gamma": torch.ones(H, dtype=BF16)}
GOOD: dict[int, dict[str, Any]] = {
    0: {},
    1: BASE,
    2: {**BASE, "scale_factor": 0.5},
    3: {**BASE, "scale_factor": 0.5, "scale_out": torch.zeros(128 * 4, dtype=torch.uint8)},
    4: {**BASE, "scale_factor": 0.5, "quant_out": rows(dtype=FP8)},
    6: {
        **BASE,
        "norm_out": rows(),
        "moe_reduction_device_num_experts": 3,
        "moe_reduction_scale_input": torch.zeros(3, T),
        "moe_reduction_active_experts_token_input": torch.zeros(3 * T, H, dtype=BF16),
        "moe_reduction_token_input": rows(),
    },
    7: {**BASE, "norm_out": rows(), "expanded_idx_to_permuted_idx": torch.zeros(T, 2, dtype=torch.int32)},
    8: {**BASE, "block_quant_group_size": 16, "scale_out": torch.empty_strided((T, 1), (1, 8), dtype=torch.int32)},
    10: {**BASE, "scale_out": torch.zeros(T, 1)},
}
WRONG: list[tuple[int, dict[str, Any], str]] = [
    (0, {"input": None}, r"input is needed, a tensor \[token_num, hidden_dim\], got None"),
    (0, {"input": torch.zeros(H)}, r"input must be \[token_num, hidden_dim\], got \[64\]"),
    (0, {"input": strided()}, r"input must be contiguous, got shape \[6, 64\] strides \[128, 2\]"),
    (0, {"input": torch.zeros(T, H, dtype=torch.int32)}, "input must be bfloat16, float16 or float32, got int32"),
    (0, {"input": torch.zeros(T, H, device="meta")}, "input must be on cpu as the workspace is, got meta"),
    (0, {"output": rows(H, T + 1)}, r"output must be \[token_num, hidden_dim\] = \[6, 64\], got \[7, 64\]"),
    (0, {"output": rows(T, H)}, r"output must be .* = \[6, 64\], got \[64, 6\]"),
    (0, {"output": rows(dtype=torch.float32)}, "output must be bfloat16, got float32"),
    (0, {"output": strided()}, "output must be contiguous"),
    (0, {"workspace": None}, "workspace must be an AllReduceFusionWorkspace made by .*, got NoneType"),
    (0, {"pattern": 15}, "pattern must be an AllReduceFusionPattern, 0 to 14, got 15"),
    (0, {"pattern": 12}, r"pattern 12 \(kMoEFinalizeARResidualRMSNormFP8Quant\) is not taken; use pattern 7"),
    (1, {"residual_in": None}, r"residual_in is needed, a tensor bfloat16 or float32 \[6, 64\], got None"),
    (1, {"residual_in": rows(H, 5)}, r"residual_in must be .* \[6, 64\], got \[5, 64\]"),
    (1, {"residual_in": rows(dtype=torch.float16)}, "residual_in must be bfloat16 or float32, got float16"),
    (1, {"residual_in": torch.zeros(T, H, dtype=BF16, device="meta")}, "residual_in must be on cpu .*, got meta"),
    (1, {"without_residual": True}, "without_residual=True, but residual_in was given"),
    (1, {"residual_out": rows(H, 5)}, r"residual_out must be .*, got \[5, 64\]"),
    (1, {"norm_out": rows(H, 5)}, r"norm_out must be .*, got \[5, 64\]"),
    (1, {"norm_out": rows(dtype=torch.float16)}, "norm_out must be bfloat16 or float32, got float16"),
    (1, {"rms_gamma": None}, r"rms_gamma is needed, a tensor bfloat16 or float32 \[64\], got None"),
    (1, {"rms_gamma": torch.ones(H + 1, dtype=BF16)}, r"rms_gamma must be \[hidden_dim\] = \[64\], got \[65\]"),
    (1, {"rms_gamma": torch.ones(H, dtype=torch.float16)}, "rms_gamma must be bfloat16 or float32, got float16"),
    (1, {"rms_eps": -1.0}, "epsilon must be finite in fp32 and not negative, got -1.0"),
    (1, {"rms_eps": None}, "the epsilon must be a number, got None"),
    (1, {"weight_bias": "1"}, "weight_bias must be a number, got '1'"),
    (2, {"scale_factor": None}, r"scale_factor is needed \(the dequantisation scale\), a float or a tensor of one"),
    (2, {"scale_factor": 0.0}, "scale_factor must be positive and finite .*, got 0.0"),
    (2, {"scale_factor": 2.0**-150}, "scale_factor must be positive and finite in fp32 .*, got 7.0"),
    (2, {"scale_factor": float("nan")}, "scale_factor must be positive and finite .*, got nan"),
    (2, {"scale_factor": torch.ones(2)}, r"scale_factor must have one element .*, got shape \[2\]"),
    (2, {"scale_factor": torch.ones(1, dtype=torch.int32)}, "scale_factor must be .*, got int32"),
    (2, {"scale_factor": torch.ones(1, device="meta")}, "scale_factor must be on cpu .*, got meta"),
    (2, {"quant_out": rows(dtype=torch.uint8)}, "quant_out must be float8_e4m3fn, got uint8"),
    (2, {"quant_out": rows(H // 2, dtype=FP8)}, r"quant_out must be .* \[6, 64\], got \[6, 32\]"),
    (3, {"scale_factor": None}, r"scale_factor is needed \(NVFP4's global encode scale 448 \* 6 / amax\)"),
    (3, {"scale_out": None}, "scale_out is needed, a tensor of at least 512 bytes, .* for SWIZZLED_128X4, got None"),
    (3, {"scale_out": torch.zeros(511, dtype=torch.uint8)}, r"scale_out must be of at least 512 bytes.*got \[511\]"),
    (3, {"layout_code": 3}, "layout_code must be a QuantizationSFLayout .*, got 3"),
    (3, {"quant_out": rows(dtype=torch.uint8)}, r"quant_out must hold 192 bytes, such as \[6, 32\] uint8"),
    (4, {"quant_out": None}, r"quant_out is needed, a tensor float8_e4m3fn \[6, 64\], got None"),
    (6, {"norm_out": None}, "at least one output is needed: output, residual_out, norm_out or quant_out"),
    (6, {"moe_reduction_device_num_experts": None}, "moe_reduction_device_num_experts is needed, .*, got None"),
    (6, {"moe_reduction_device_num_experts": 4}, r"moe_reduction_scale_input must be .* = \[4, 6\] .*, got \[3, 6\]"),
    (6, {"moe_reduction_scale_input": None}, r"moe_reduction_scale_input is needed, a tensor float32 \[3, 6\]"),
    (6, {"moe_reduction_scale_input": torch.zeros(3, T, dtype=BF16)}, "moe_reduction_scale_input must be float32"),
    (6, {"moe_reduction_active_experts_token_input": None}, "moe_reduction_active_experts_token_input is needed"),
    (
        6,
        {"moe_reduction_active_experts_token_input": rows()},
        r"moe_reduction_active_experts_token_input must be .* = \[18, 64\] or \[3, 6, 64\], got \[6, 64\]",
    ),
    (6, {"moe_reduction_token_input": None}, r"moe_reduction_token_input is needed, a tensor \[token_num"),
    (6, {"residual_in": None}, "residual_in is needed"),
    (6, {"rms_gamma": None}, "rms_gamma is needed"),
    (7, {"norm_out": None}, "at least one output is needed"),
    (7, {"input": torch.zeros(H)}, r"input must be a tensor \[permuted rows, hidden_dim\], got \[64\]"),
    (7, {"expanded_idx_to_permuted_idx": None}, r"expanded_idx_to_permuted_idx must be a tensor int32 \[token_num"),
    (7, {"expanded_idx_to_permuted_idx": torch.zeros(T, 2, dtype=torch.int64)}, "must be int32, got int64"),
    (7, {"expert_scale_factor": torch.zeros(T, 3)}, r"expert_scale_factor must be .* = \[6, 2\], got \[6, 3\]"),
    (7, {"expert_scale_factor": torch.zeros(T, 2).half()}, "expert_scale_factor must be bfloat16 or float32, got"),
    (7, {"shared_expert_output": rows(H, 5)}, r"shared_expert_output must be .*, got \[5, 64\]"),
    (7, {"routed_scaling_factor": float("inf")}, "routed_scaling_factor must be finite, got inf"),
    (7, {"moe_finalize_backend": "x"}, "moe_finalize_backend must be 'trtllm' or 'cake' .*, got 'x'"),
    (7, {"quant_out": rows(dtype=FP8)}, "scale_factor is needed"),
    (8, {"block_quant_group_size": None}, "block_quant_group_size is needed, a positive integer, got None"),
    (8, {"block_quant_group_size": 0}, "block_quant_group_size is needed, a positive integer, got 0"),
    (8, {"block_quant_group_size": 48}, "hidden_dim=64 is no multiple of block_quant_group_size=48"),
    (8, {"block_quant_group_size": 4}, "block_quant_group_size must be a power of two from 8 to 256 .*, got 4"),
    (8, {"scale_out": None}, r"scale_out is needed, a tensor int32 \[6, 1\] with strides \(1, 8\), got None"),
    (8, {"scale_out": torch.zeros(T, 1)}, r"scale_out must be int32 \[6, 1\] with strides .*, got float32"),
    (8, {"scale_out": torch.zeros(T, 2, dtype=torch.int32)}, r"scale_out must be .*, got int32 \[6, 2\]"),
    (10, {"scale_out": None}, r"scale_out is needed, a tensor float32 \[6, 1\], got None"),
    (10, {"scale_out": torch.zeros(T, 2)}, r"scale_out must be \[token_num, 1\] = \[6, 1\], got \[6, 2\]"),
    (10, {"scale_out": torch.zeros(T, 1).half()}, "scale_out must be float32, got float16"),
]


@pytest.mark.parametrize(("pattern", "change", "message"), WRONG, ids=lambda value: None)
def test_wrong_argument(
    workspace: comm.AllReduceFusionWorkspace, pattern: int, change: dict[str, Any], message: str
) -> None:
    """The unified call without the change works; with it, a ``ValueError`` says what is wrong."""
    good = {"input": rows(), "workspace": workspace, "pattern": pattern, **GOOD[pattern]}
    comm.allreduce_fusion(**good)
    with pytest.raises(ValueError, match=r"^(allreduce_fusion|arfusion::allreduce_rms_norm): .*" + message):
        comm.allreduce_fusion(**{**good, **change})


def test_wrong_group_strides(workspace: comm.AllReduceFusionWorkspace) -> None:
    """Packed scales of several words need FlashInfer's strides (1, round_up(T, 4))."""
    x, gamma = rows(256), torch.ones(256, dtype=BF16)
    arguments = {"residual_in": x, "rms_gamma": gamma, "block_quant_group_size": 16}
    for strides in ((4, 1), (1, T)):
        scales = torch.empty_strided((T, 4), strides, dtype=torch.int32)
        with pytest.raises(ValueError, match=r"scale_out must be int32 \[6, 4\] with strides \(1, 8\), got int32"):
            comm.allreduce_fusion(x, workspace, 8, scale_out=scales, **arguments)


@pytest.mark.parametrize("group", [2, 3, 4, 6, 12, 24, 48, 512])
def test_group_sizes_that_no_kernel_takes(workspace: comm.AllReduceFusionWorkspace, group: int) -> None:
    """FlashInfer takes any divisor of the hidden size; ours says what it takes, on every device alike."""
    x, gamma = rows(3072), torch.ones(3072, dtype=BF16)
    with pytest.raises(ValueError, match=f"must be a power of two from 8 to 256 for bfloat16, got {group}$"):
        comm.allreduce_fusion(x, workspace, 8, residual_in=x, rms_gamma=gamma, block_quant_group_size=group)


@pytest.mark.parametrize(("pattern", "what", "group"), [(3, "NVFP4", 16), (13, "MXFP8", 32)])
def test_hidden_sizes_of_whole_groups(
    workspace: comm.AllReduceFusionWorkspace, pattern: int, what: str, group: int
) -> None:
    x, gamma = rows(72), torch.ones(72, dtype=BF16)
    with pytest.raises(ValueError, match=f"{what} needs a hidden_dim that is a multiple of {group}, got 72"):
        comm.allreduce_fusion(x, workspace, pattern, residual_in=x, rms_gamma=gamma, scale_factor=1.0)


@pytest.mark.parametrize("device", ["nowhere", 1.5])
def test_a_device_that_is_none(device: Any) -> None:
    with pytest.raises(ValueError, match=f"^create_allreduce_fusion_workspace: device={device!r}: "):
        comm.create_allreduce_fusion_workspace(
            world_size=1, rank=0, max_token_num=8, hidden_dim=H, dtype=BF16, device=device
        )


def test_mnnvl_errors(workspace: comm.AllReduceFusionWorkspace) -> None:
    """The MNNVL functions speak of their own arguments."""
    x, gamma = rows(), torch.ones(H, dtype=BF16)
    fused = comm.trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant
    name = "^trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant: "
    for change, message in (
        ({}, "quant_type=NONE does not quantise"),
        ({"quant_type": 9}, r"quant_type must be a MNNVLQuantType .*, got 9"),
        ({"quant_type": 1, "output_scale": -1.0}, "output_scale must be positive and finite"),
        ({"quant_type": 1, "output": rows(32)}, r"output must be .*, got \[6, 32\]"),
        ({"quant_type": 1, "strategy": 5}, "strategy must be a MNNVLAllreduceFusionStrategy .*, got 5"),
        ({"quant_type": 2, "layout_code": 9}, "layout_code must be"),
        ({"quant_type": 2, "scale_out": torch.zeros(4)}, "scale_out must be of at least 512 bytes"),
    ):
        with pytest.raises(ValueError, match=name + message):
            fused(x, x, gamma, workspace, **change)
    with pytest.raises(ValueError, match=name + r"gamma must be \[hidden_dim\]"):
        fused(x, x, gamma[:3], workspace, quant_type=1)
    with pytest.raises(ValueError, match=name + "residual_in is needed"):
        fused(x, None, gamma, workspace, quant_type=1)
    with pytest.raises(ValueError, match=r"^trtllm_mnnvl_allreduce: output must be"):
        comm.trtllm_mnnvl_allreduce(x, workspace, True, rows(32))


def test_moe_functions_errors(workspace: comm.AllReduceFusionWorkspace) -> None:
    """FlashInfer's MoE functions: pointers where our workspace is needed, another rank's numbers, a wrong size."""
    x, gamma, none = rows(), torch.ones(H, dtype=BF16), None
    scales, experts = torch.zeros(2, T), torch.zeros(2 * T, H, dtype=BF16)

    def reduce(world: int = 1, tokens: int = T, space: Any = workspace, **rest: Any) -> None:
        comm.trtllm_moe_allreduce_fusion(
            world, 0, tokens, H, space, False, x, gamma, 1e-6, 1.0, 2, scales, experts, x, none, none, x, none, none,
            none, **rest,
        )  # fmt: skip

    reduce()
    name = "^trtllm_moe_allreduce_fusion: "
    with pytest.raises(ValueError, match=name + "workspace_ptrs must be an AllReduceFusionWorkspace .*, got Tensor"):
        reduce(space=torch.zeros(3))
    with pytest.raises(ValueError, match=name + "world_size=2 and world_rank=0 do not fit the workspace"):
        reduce(world=2)
    with pytest.raises(ValueError, match=name + r"moe_reduction_token_input must be .* = \[5, 64\], got \[6, 64\]"):
        reduce(tokens=5)
    with pytest.raises(ValueError, match=name + "backend must be 'trtllm' or 'cake'"):
        reduce(backend="x")
    index = torch.zeros(T, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"norm_weight must be \[hidden_dim\] = \[64\], got \[3\]"):
        comm.trtllm_moe_finalize_allreduce_fusion(
            x, x, gamma[:3], index, x, none, none, none, workspace, False, 0, 1, 1e-6, none, none, none
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_token_num": None}, "max_token_num is needed, got None"),
        ({"hidden_dim": None}, "hidden_dim is needed, got None"),
        ({"dtype": None}, "dtype is needed, got None"),
        ({"max_token_num": 0}, "max_token_num must be a positive integer, got 0"),
        ({"hidden_dim": 7.5}, "hidden_dim must be a positive integer, got 7.5"),
        ({"dtype": torch.int32}, "dtype must be torch.bfloat16, torch.float16 or torch.float32, got torch.int32"),
        ({"backend": "nccl"}, "backend must be one of auto, native, reference, flashinfer, got 'nccl'"),
        ({"backend": "mnnvl-cutedsl"}, "backend='mnnvl-cutedsl' .* Use backend='auto'"),
        ({"backend": "native"}, "backend='native' needs a CUDA device, this workspace is on cpu"),
        ({"backend": "flashinfer"}, "backend='flashinfer' needs a CUDA device"),
        ({"world_size": 2}, r"torch.distributed is not initialised and no group was given \(world_size=2\)"),
        ({"group": "tp"}, "group must be a torch.distributed.ProcessGroup of this rank, got 'tp'"),
        ({"comm_backend": object()}, r"comm_backend must have Get_rank\(\) and Get_size\(\)"),
        ({"top_k": 8}, "top_k can only be given with FlashInfer's backend 'mnnvl-cutedsl'"),
    ],
)
def test_wrong_workspace(change: dict[str, Any], message: str) -> None:
    """Making a workspace with a wrong argument says which one."""
    good = {"world_size": 1, "rank": 0, "max_token_num": 8, "hidden_dim": H, "dtype": BF16, "device": "cpu"}
    with pytest.raises(ValueError, match=message):
        comm.create_allreduce_fusion_workspace(**{**good, **change})


def test_destroyed_workspace() -> None:
    """A destroyed workspace says so to every function; destroying it again is fine."""
    x, gamma = rows(), torch.ones(H, dtype=BF16)
    workspace = comm.create_allreduce_fusion_workspace(
        world_size=1, max_token_num=8, hidden_dim=H, dtype=BF16, device="cpu"
    )
    workspace.destroy()
    workspace.destroy()
    assert not workspace.is_buffer_size_sufficient(1, 1, 1, BF16)
    with pytest.raises(ValueError, match=r"^allreduce_fusion: the workspace was destroyed; make a new one"):
        comm.allreduce_fusion(x, workspace, 0)
    with pytest.raises(ValueError, match=r"^trtllm_mnnvl_allreduce: the workspace was destroyed"):
        comm.trtllm_mnnvl_allreduce(x, workspace, False)
    with pytest.raises(ValueError, match="the workspace was destroyed"):
        comm.trtllm_mnnvl_fused_allreduce_add_rmsnorm(x, x, gamma, workspace)


def test_checkpoints_of_a_workspace(workspace: comm.AllReduceFusionWorkspace) -> None:
    """What FlashInfer's workspaces raise where their memory cannot leave: vLLM sleeps all the same. It stays usable."""
    with pytest.raises(NotImplementedError, match="stays resident"):
        workspace.checkpoint_prepare()
    with pytest.raises(NotImplementedError, match="stays resident"):
        workspace.checkpoint_restore(None)
    assert workspace.is_buffer_size_sufficient(1, 8, H, BF16)


def test_forgotten_workspace_warns() -> None:
    """A workspace that is dropped without destroy() is freed, with a ResourceWarning."""
    with pytest.warns(ResourceWarning, match="was never destroyed"):
        comm.create_allreduce_fusion_workspace(
            world_size=1, max_token_num=8, hidden_dim=H, dtype=BF16, device="cpu"
        ).__del__()
