"""The calls of FlashInfer's documentation (seeds 000, 001, 004) on two gloo ranks, with only the import changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.comm import oracle
from tests.comm.test_patterns import BF16, values
from tests.helpers import run_ranks

WORLD, TOKENS, HIDDEN, TOP_K = 2, 6, 4096, 8

EXAMPLE = """
from IMPORT import (
    AllReduceFusionPattern, MNNVLAllReduceFusionWorkspace, allreduce_fusion, create_allreduce_fusion_workspace,
    trtllm_mnnvl_allreduce, trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant,
)

workspace = create_allreduce_fusion_workspace(
    backend="auto", world_size=world_size, rank=rank, max_token_num=2048, hidden_dim=4096, dtype=torch.bfloat16,
)

prenorm = torch.empty_like(hidden_states)
normed = torch.empty_like(hidden_states)
output = allreduce_fusion(
    input=hidden_states, workspace=workspace, pattern=AllReduceFusionPattern.kARResidualRMSNorm, launch_with_pdl=True,
    residual_out=prenorm, norm_out=normed, residual_in=residual, rms_gamma=norm_weight,
)
save("norm", output, output is normed, normed, prenorm)

normed = torch.empty_like(hidden_states)
quant = torch.empty_like(hidden_states, dtype=torch.float8_e4m3fn)
scales = torch.empty(token_num * hidden_dim // 16, dtype=torch.float16)
output = allreduce_fusion(
    input=hidden_states, workspace=workspace, pattern=AllReduceFusionPattern.kARResidualRMSNormFP8Quant,
    norm_out=normed, quant_out=quant, scale_out=scales, residual_in=residual, rms_gamma=norm_weight,
    scale_factor=scale_tensor,
)
save("fp8", output, output is quant, normed, quant)

normed = torch.empty(token_num, hidden_dim, dtype=torch.bfloat16)
residual_updated = torch.empty_like(residual)
output = allreduce_fusion(
    input=permuted_expert_output, workspace=workspace,
    pattern=AllReduceFusionPattern.kMoEFinalizeARResidualRMSNorm, launch_with_pdl=True, residual_in=residual,
    residual_out=residual_updated, norm_out=normed, rms_gamma=norm_weight, rms_eps=1e-6,
    expanded_idx_to_permuted_idx=idx_mapping, expert_scale_factor=router_weights,
    shared_expert_output=shared_expert_out,
)
save("moe", output, output is normed, normed, residual_updated)

assert workspace.is_buffer_size_sufficient(world_size, token_num, hidden_dim, torch.bfloat16)
workspace.destroy()

workspace = MNNVLAllReduceFusionWorkspace(mapping, 2048, 4096, torch.bfloat16)
save("allreduce", trtllm_mnnvl_allreduce(hidden_states, workspace, True))
save("mnnvl fp8", *trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant(
    hidden_states, residual, norm_weight, workspace, output_scale=scale_tensor, quant_type=1))
workspace.destroy()
"""


def tensors(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        "hidden_states": values(rank, (TOKENS, HIDDEN), BF16),
        "residual": values(7, (TOKENS, HIDDEN), BF16),
        "norm_weight": values(9, (HIDDEN,), BF16, 1.0),
        "scale_tensor": torch.tensor([0.03]),
        "permuted_expert_output": values(20 + rank, (TOKENS * TOP_K + 5, HIDDEN), BF16),
        "idx_mapping": torch.randint(-1, TOKENS * TOP_K, (TOKENS, TOP_K), generator=generator, dtype=torch.int32),
        "router_weights": values(30 + rank, (TOKENS, TOP_K), BF16, 1.0),
        "shared_expert_out": values(40 + rank, (TOKENS, HIDDEN), BF16),
    }


def rank_main(rank: int, world: int) -> dict[str, tuple[Any, ...]]:
    saved: dict[str, tuple[Any, ...]] = {}
    scope = {
        "torch": torch,
        "rank": rank,
        "world_size": world,
        "token_num": TOKENS,
        "hidden_dim": HIDDEN,
        "mapping": type("Mapping", (), {"tp_size": world, "tp_rank": rank}),
        "save": lambda name, *results: saved.update({name: results}),
        **tensors(rank),
    }
    exec(EXAMPLE.replace("IMPORT", "arfusion_pass.comm"), scope)
    return saved


@pytest.fixture(scope="module")
def results() -> list[dict[str, tuple[Any, ...]]]:
    return run_ranks(WORLD, rank_main)


def chain(parts: list[np.ndarray], epsilon: float = 1e-6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(all-reduce result, sum, norm) of the examples' residual and weight."""
    total = oracle.reduced(parts, BF16)
    added = oracle.round_to(total + oracle.array(tensors(0)["residual"]), "bf16")
    return total, added, oracle.normed(added, oracle.array(tensors(0)["norm_weight"]), epsilon, 0.0, BF16)


def assert_norm(got: torch.Tensor, norm: np.ndarray) -> None:
    assert oracle.steps_apart(oracle.array(got), norm, BF16).max() <= 1


def test_all_reduce_residual_norm(results: list) -> None:
    """The first example: the output is the norm, in the caller's buffer; the sum in the other."""
    _, added, norm = chain([oracle.array(tensors(rank)["hidden_states"]) for rank in range(WORLD)])
    output, same, normed, prenorm = results[0]["norm"]
    assert same
    assert torch.equal(output, normed)
    assert_norm(normed, norm)
    np.testing.assert_array_equal(oracle.array(prenorm), added)


def test_fp8(results: list) -> None:
    """The second: no residual_out, a scale_out of another dtype that static FP8 does not use, a norm_out that is
    written although the pattern returns the codes."""
    _, _, norm = chain([oracle.array(tensors(rank)["hidden_states"]) for rank in range(WORLD)])
    _, same, normed, quant = results[0]["fp8"]
    assert same
    assert_norm(normed, norm)
    np.testing.assert_array_equal(oracle.array(quant), oracle.static_fp8(oracle.array(normed), 0.03))


def test_moe_finalize(results: list) -> None:
    """The third: gather, weights, shared expert, all-reduce, norm."""
    parts = []
    for rank in range(WORLD):
        t = tensors(rank)
        rows, weights, shared = (
            oracle.array(t[name]) for name in ("permuted_expert_output", "router_weights", "shared_expert_out")
        )
        parts.append(oracle.moe_finalized(rows, t["idx_mapping"].numpy(), weights, shared, 1.0, BF16))
    _, added, norm = chain(parts)
    _, same, normed, residual = results[0]["moe"]
    assert same
    assert_norm(normed, norm)
    np.testing.assert_array_equal(oracle.array(residual), added)


def test_mnnvl(results: list) -> None:
    """Seeds 001 and 004: the sum; and (codes, None, sum, None) with epsilon from the dtype."""
    parts = [oracle.array(tensors(rank)["hidden_states"]) for rank in range(WORLD)]
    total, added, norm = chain(parts, torch.finfo(BF16).eps)
    np.testing.assert_array_equal(oracle.array(results[0]["allreduce"][0]), total)
    codes, scales, residual, output = results[0]["mnnvl fp8"]
    assert scales is None
    assert output is None
    np.testing.assert_array_equal(oracle.array(residual), added)
    assert (oracle.array(codes) != oracle.static_fp8(norm, 0.03)).mean() < 0.01
