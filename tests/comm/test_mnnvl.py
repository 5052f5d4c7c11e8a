"""``trtllm_mnnvl_*`` on two gloo ranks, against a numpy oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from arfusion_pass import comm
from arfusion_pass.comm import MNNVLAllreduceFusionStrategy as Strategy
from arfusion_pass.comm import MNNVLQuantType, QuantizationSFLayout
from tests.comm import oracle
from tests.comm.test_patterns import BF16, FP16, values
from tests.helpers import run_ranks

WORLD, TOKENS = 2, 5
CASES: dict[str, dict[str, Any]] = {
    "fp8": {"quant_type": MNNVLQuantType.FP8, "output_scale": 0.05},
    "fp8-tensor": {"quant_type": 1, "output_scale": torch.tensor([0.05]), "with_output": True},
    "fp8-no-scale": {"quant_type": 1, "with_output": True},
    "fp8-given": {"quant_type": 1, "output_scale": 0.05, "given": True, "with_output": True},
    "nvfp4": {"quant_type": MNNVLQuantType.NVFP4, "output_scale": 61.0, "with_output": True},
    "nvfp4-linear": {"quant_type": 2, "output_scale": 61.0, "layout_code": QuantizationSFLayout.LINEAR, "hidden": 2880},
    "nvfp4-8x4": {"quant_type": 2, "output_scale": torch.tensor(61.0), "layout_code": 1, "with_output": True},
    "nvfp4-given": {"quant_type": 2, "output_scale": 61.0, "given": True, "with_output": True},
    "dynamic": {"quant_type": MNNVLQuantType.DYNAMIC_FP8, "with_output": True},
    "mxfp8": {"quant_type": MNNVLQuantType.MXFP8, "with_output": True},
    "mxfp8-linear": {"quant_type": 4, "layout_code": 2, "hidden": 160, "with_output": True},
    "gemma": {"quant_type": 1, "weight_bias": 1.0, "with_output": True, "dtype": FP16},
    "epsilon": {"quant_type": 1, "epsilon": 0.5, "with_output": True},
    "twoshot": {"quant_type": 1, "strategy": Strategy.TWOSHOT, "with_output": True},
}


def inputs(case: dict[str, Any], rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype, hidden = case.get("dtype", BF16), case.get("hidden", 1024)
    x, residual = values(100 + rank, (TOKENS, hidden), dtype), values(7, (TOKENS, hidden), dtype)
    return x, residual, values(9, (hidden,), dtype, 1.0)


def rank_main(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    mapping = type("Mapping", (), {"tp_size": world, "tp_rank": rank})
    workspace = comm.MNNVLAllReduceFusionWorkspace(mapping, 64, 4096, BF16)
    known = ("quant_type", "output_scale", "layout_code", "weight_bias", "epsilon", "strategy")
    for name, case in CASES.items():
        x, residual, gamma = inputs(case, rank)
        rest = {key: case[key] for key in known if key in case}
        if case.get("with_output"):
            rest["output"] = torch.empty_like(x)
        if case.get("given"):
            nvfp4 = case["quant_type"] == 2
            shape = (TOKENS, x.shape[1] // 2) if nvfp4 else tuple(x.shape)
            rest["quant_out"] = torch.empty(shape, dtype=torch.uint8 if nvfp4 else torch.float8_e4m3fn)
            rest["scale_out"] = torch.full((128 * x.shape[1] // 16 + 9,), 0x5A, dtype=torch.uint8)
            rest["residual_out"] = torch.empty_like(residual)
        got = comm.trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant(x, residual, gamma, workspace, **rest)
        expected = [rest.get(key) for key in ("quant_out", "scale_out", "residual_out", "output")]
        same = [mine is None or mine is theirs for mine, theirs in zip(expected, got, strict=True)]
        results[name] = {"got": got, "same": same}
    x, residual, gamma = inputs({}, rank)
    out = torch.empty_like(x)
    strategies = (*Strategy, 0, type("FlashInfers", (), {"value": 1}))
    plain = [comm.trtllm_mnnvl_allreduce(x, workspace, True, strategy=strategy) for strategy in strategies]
    results["allreduce"] = [*plain, comm.trtllm_mnnvl_allreduce(x, workspace, False, out)]
    results["in_place"] = comm.trtllm_mnnvl_allreduce(x, workspace, False, x)
    x, _, _ = inputs({}, rank)
    results["norm"] = comm.trtllm_mnnvl_fused_allreduce_add_rmsnorm(x, residual, gamma, workspace)
    workspace.destroy()
    return results


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(WORLD, rank_main)


def chain(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(sum with the residual, norm); epsilon defaults to the dtype's own."""
    dtype = case.get("dtype", BF16)
    total = oracle.reduced([oracle.array(inputs(case, rank)[0]) for rank in range(WORLD)], dtype)
    _, residual, gamma = inputs(case, 0)
    added = oracle.round_to(total + oracle.array(residual), oracle.NAMES[dtype])
    epsilon = case.get("epsilon", torch.finfo(dtype).eps)
    return added, oracle.normed(added, oracle.array(gamma), epsilon, case.get("weight_bias", 0.0), dtype)


@pytest.mark.parametrize("name", CASES)
def test_fused_quant(results: list, name: str) -> None:
    """(quant_out, scale_out or None, residual_out, output or None), each bit-equal to the oracle's."""
    case, dtype = CASES[name], CASES[name].get("dtype", BF16)
    codes, scales, total, norm = results[0][name]["got"]
    added, expected_norm = chain(case)
    np.testing.assert_array_equal(oracle.array(total), added)
    assert (norm is not None) == case.get("with_output", False)
    if norm is not None:
        apart = oracle.steps_apart(oracle.array(norm), expected_norm, dtype)
        assert apart.max() <= 1
        assert (apart > 0).sum() <= max(1, apart.size // 1000)
        expected_norm = oracle.array(norm)
    scale = float(case.get("output_scale", 1.0))
    if case["quant_type"] == 1:
        wanted, wanted_scales = oracle.static_fp8(expected_norm, scale), None
        assert scales is None
    elif case["quant_type"] in (2, 4):
        mx = case["quant_type"] == 4
        wanted, wanted_scales = oracle.mxfp8(expected_norm) if mx else oracle.nvfp4(expected_norm, scale)
        groups, layout = added.shape[1] // (32 if mx else 16), case.get("layout_code", 0)
        size = {0: 128 * groups, 1: 8 * groups, 2: TOKENS * groups}[layout]
        flat = oracle.array(scales).reshape(-1)
        if case.get("given"):
            assert (flat[size:] == 0x5A).all()  # what the caller has beyond the layout's size is left alone
        else:
            assert flat.size == size
            assert scales.dtype == (torch.uint8 if mx else torch.float8_e4m3fn)
        written, padding = oracle.unswizzled(flat[:size], TOKENS, groups, layout)
        assert not padding.any()
    else:
        wanted, wanted_scales = oracle.token_fp8(expected_norm)
        written = scales.numpy()
    wrong = oracle.array(codes) != wanted
    assert not wrong.any() if norm is not None else wrong.mean() < 0.01
    if wanted_scales is not None and norm is not None:
        np.testing.assert_array_equal(written, wanted_scales)


@pytest.mark.parametrize("name", CASES)
def test_given_buffers_are_returned(results: list, name: str) -> None:
    """A buffer that the caller brought is the one that is written and returned; static FP8 returns no scale_out."""
    same = list(results[0][name]["same"])
    if CASES[name]["quant_type"] == 1:
        same[1] = results[0][name]["got"][1] is None
    assert all(same)


def test_allreduce(results: list) -> None:
    """Every strategy (ours, an integer, FlashInfer's member), an output, in place: one result on all ranks."""
    total = oracle.reduced([oracle.array(inputs({}, rank)[0]) for rank in range(WORLD)], BF16)
    for result in results:
        for got in (*result["allreduce"], result["in_place"]):
            np.testing.assert_array_equal(oracle.array(got), total)


def test_fused_norm(results: list) -> None:
    """The unquantised function returns (norm, sum) with epsilon ``torch.finfo(dtype).eps``."""
    added, expected = chain({})
    norm, total = results[0]["norm"]
    np.testing.assert_array_equal(oracle.array(total), added)
    assert oracle.steps_apart(oracle.array(norm), expected, BF16).max() <= 1
