"""Patterns 6 and 7 on two gloo ranks, by the unified call and by FlashInfer's own functions, against a numpy oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from arfusion_pass import comm
from tests.comm import oracle
from tests.comm.test_patterns import BF16, EPSILON, FP16, FP32, values
from tests.helpers import run_ranks

WORLD = 2
TOKENS, HIDDEN, EXPERTS, TOP_K, ROWS = 5, 512, 4, 3, 24
SCALE = 61.0

REDUCE: dict[str, dict[str, Any]] = {
    "norm": {"outputs": ("residual_out", "norm_out")},
    "all": {"outputs": ("output", "residual_out", "norm_out", "nvfp4"), "scale_factor": SCALE},
    "only-output": {"outputs": ("output",)},
    "only-residual": {"outputs": ("residual_out",)},
    "only-norm-fp16": {"outputs": ("norm_out",), "dtype": FP16},
    "only-nvfp4-tensor-scale": {"outputs": ("nvfp4",), "scale_factor": torch.tensor([SCALE])},
    "nvfp4-linear": {"outputs": ("norm_out", "nvfp4"), "scale_factor": SCALE, "layout_code": 2},
    "nvfp4-8x4": {"outputs": ("norm_out", "nvfp4"), "scale_factor": SCALE, "layout_code": 1},
    "nvfp4-no-scale": {"outputs": ("norm_out", "nvfp4")},
    "fp8-float": {"outputs": ("norm_out", "fp8"), "scale_factor": 0.04},
    "fp8-tensor": {"outputs": ("norm_out", "fp8"), "scale_factor": torch.tensor(0.04)},
    "fp8-dynamic": {"outputs": ("norm_out", "fp8_dynamic")},
    "gemma": {"outputs": ("norm_out",), "weight_bias": 1.0},
    "token-major": {"outputs": ("norm_out", "residual_out"), "order": "token"},
    "flat": {"outputs": ("norm_out", "residual_out"), "order": "flat"},
    "square": {"outputs": ("norm_out", "residual_out"), "tokens": EXPERTS},
    "square-token-major": {"outputs": ("norm_out", "residual_out"), "tokens": EXPERTS, "order": "token"},
    "without-residual": {"outputs": ("norm_out", "residual_out"), "without_residual": True},
    "low-level": {"outputs": ("output", "residual_out", "norm_out", "nvfp4"), "scale_factor": SCALE, "low": True},
}
FINALIZE: dict[str, dict[str, Any]] = {
    "norm": {"outputs": ("residual_out", "norm_out")},
    "shared-and-factor": {"outputs": ("residual_out", "norm_out"), "shared": True, "routed_scaling_factor": 2.5},
    "fp32-weights": {"outputs": ("residual_out", "norm_out"), "weights": FP32, "routed_scaling_factor": 2.5},
    "no-weights": {"outputs": ("residual_out", "norm_out"), "weights": None},
    "fp16": {"outputs": ("output", "residual_out", "norm_out"), "dtype": FP16, "shared": True},
    "fp32": {"outputs": ("output", "residual_out", "norm_out"), "dtype": FP32, "shared": True},
    "only-nvfp4": {"outputs": ("nvfp4",), "scale_factor": torch.tensor([SCALE])},
    "nvfp4-float": {"outputs": ("norm_out", "nvfp4"), "scale_factor": SCALE, "shared": True},
    "fp8": {"outputs": ("norm_out", "fp8"), "scale_factor": 0.04, "routed_scaling_factor": 2.5},
    "only-residual": {"outputs": ("residual_out",)},
    "nothing-routed": {"outputs": ("residual_out", "norm_out"), "nothing": True},
    "low-level": {
        "outputs": ("residual_out", "norm_out", "nvfp4"),
        "scale_factor": torch.tensor([SCALE]),
        "routed_scaling_factor": 2.5,
        "low": True,
    },
    "low-level-fp8": {"outputs": ("output", "fp8"), "scale_factor": 0.04, "low": True},
}


def tensors(case: dict[str, Any], rank: int) -> dict[str, torch.Tensor]:
    """Every input of a case, the same in every process; expert tensors differ between ranks."""
    dtype, tokens = case.get("dtype", BF16), case.get("tokens", TOKENS)
    generator = torch.Generator().manual_seed(rank)
    index = torch.randint(-1, ROWS, (tokens, TOP_K), generator=generator, dtype=torch.int32)
    index[0, 0] = -1
    if case.get("nothing"):
        index.fill_(-1)
    return {
        "rows": values(10 + rank, (EXPERTS, tokens, HIDDEN), dtype),
        "scales": values(20 + rank, (EXPERTS, tokens), FP32, 1.0),
        "token_input": values(30 + rank, (tokens, HIDDEN), dtype),
        "permuted": values(40 + rank, (ROWS, HIDDEN), dtype),
        "index": index,
        "weights": values(50 + rank, (tokens, TOP_K), case.get("weights", dtype) or dtype, 1.0),
        "residual": values(7, (tokens, HIDDEN), dtype),
        "gamma": values(9, (HIDDEN,), dtype, 1.0),
    }


def outputs(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The outputs that the case names, poisoned."""
    dtype, tokens = case.get("dtype", BF16), case.get("tokens", TOKENS)
    given: dict[str, torch.Tensor] = {}
    for name in case["outputs"]:
        if name == "nvfp4":
            size = {0: 128 * HIDDEN // 16, 1: 8 * HIDDEN // 16, 2: tokens * HIDDEN // 16}[case.get("layout_code", 0)]
            given["quant_out"] = torch.full((tokens, HIDDEN // 2), 0x5A, dtype=torch.uint8)
            given["scale_out"] = torch.full((size,), 0x5A, dtype=torch.uint8)
        elif name.startswith("fp8"):
            given["quant_out"] = torch.full((tokens, HIDDEN), 0x5A, dtype=torch.uint8).view(torch.float8_e4m3fn)
            if name == "fp8_dynamic":
                given["scale_out"] = torch.full((tokens, 1), 77.0)
        else:
            given[name] = torch.full((tokens, HIDDEN), 77.0, dtype=dtype)
    return given


def run_reduce(workspace: comm.AllReduceFusionWorkspace, case: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    t, given = tensors(case, workspace.rank), outputs(case)
    rows, scales = t["rows"].view(-1, HIDDEN), t["scales"]
    order = case.get("order")
    if order == "token":
        rows, scales = t["rows"].transpose(0, 1).reshape(-1, HIDDEN), scales.t().contiguous()
    elif order == "flat":
        rows, scales = rows.view(-1), scales.view(-1)
    square = order == "token" and t["scales"].shape[0] == t["scales"].shape[1]
    ours = {"moe_reduction_expert_major": False} if square else {}
    if case.get("low"):
        comm.trtllm_moe_allreduce_fusion(
            workspace.world_size,
            workspace.rank,
            TOKENS,
            HIDDEN,
            workspace.workspace_tensor,
            True,
            t["residual"],
            t["gamma"],
            EPSILON,
            case["scale_factor"],
            EXPERTS,
            scales,
            rows,
            t["token_input"],
            0,
            given["output"],
            given["residual_out"],
            given["norm_out"],
            given["quant_out"],
            given["scale_out"],
        )
        return {**given, "returned": None}
    known = ("scale_factor", "layout_code", "weight_bias", "without_residual")
    returned = comm.allreduce_fusion(
        input=t["token_input"],
        workspace=workspace,
        pattern=6,
        residual_in=None if case.get("without_residual") else t["residual"],
        rms_gamma=t["gamma"],
        rms_eps=EPSILON,
        moe_reduction_device_num_experts=EXPERTS,
        moe_reduction_scale_input=scales,
        moe_reduction_active_experts_token_input=rows,
        moe_reduction_token_input=t["token_input"],
        **given,
        **ours,
        **{name: case[name] for name in known if name in case},
    )
    return {**given, "returned": [name for name, value in given.items() if value is returned]}


def run_finalize(workspace: comm.AllReduceFusionWorkspace, case: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    t, given = tensors(case, workspace.rank), outputs(case)
    weights = None if case.get("weights", True) is None else t["weights"]
    shared = t["token_input"] if case.get("shared") else None
    if case.get("low"):
        comm.trtllm_moe_finalize_allreduce_fusion(
            t["permuted"],
            t["residual"],
            t["gamma"],
            t["index"],
            given.get("norm_out"),
            given.get("residual_out"),
            given.get("quant_out"),
            given.get("scale_out"),
            workspace,
            False,
            workspace.rank,
            workspace.world_size,
            EPSILON,
            shared,
            weights,
            case.get("routed_scaling_factor"),
            scale_factor=case["scale_factor"],
            moe_allreduce_out=given.get("output"),
        )
        return {**given, "returned": None}
    known = ("scale_factor", "routed_scaling_factor")
    returned = comm.allreduce_fusion(
        input=t["permuted"],
        workspace=workspace,
        pattern=7,
        residual_in=t["residual"],
        rms_gamma=t["gamma"],
        rms_eps=EPSILON,
        expanded_idx_to_permuted_idx=t["index"],
        expert_scale_factor=weights,
        shared_expert_output=shared,
        **given,
        **{name: case[name] for name in known if name in case},
    )
    names = [name for name, value in given.items() if value is returned]
    return {**given, "returned": names, "made": None if names else returned}


def rank_main(rank: int, world: int) -> dict[str, dict[str, Any]]:
    with comm.create_allreduce_fusion_workspace(max_token_num=64, hidden_dim=HIDDEN, dtype=BF16) as workspace:
        return {
            **{f"6-{name}": run_reduce(workspace, case) for name, case in REDUCE.items()},
            **{f"7-{name}": run_finalize(workspace, case) for name, case in FINALIZE.items()},
        }


ALL = {**{f"6-{name}": case for name, case in REDUCE.items()}, **{f"7-{name}": case for name, case in FINALIZE.items()}}


@pytest.fixture(scope="module")
def results() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(WORLD, rank_main)


def expected(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(all-reduce result, residual, norm) of a case."""
    case, parts = ALL[name], []
    dtype = case.get("dtype", BF16)
    for rank in range(WORLD):
        t = {key: oracle.array(value) for key, value in tensors(case, rank).items() if key != "index"}
        if name.startswith("6"):
            parts.append(oracle.moe_reduced(t["rows"], t["scales"], t["token_input"], dtype))
        else:
            weights = None if case.get("weights", True) is None else t["weights"]
            shared = t["token_input"] if case.get("shared") else None
            index, factor = tensors(case, rank)["index"].numpy(), case.get("routed_scaling_factor", 1.0)
            parts.append(oracle.moe_finalized(t["permuted"], index, weights, shared, factor, dtype))
    total = oracle.reduced(parts, dtype)
    common = tensors(case, 0)
    added = total
    if not case.get("without_residual"):
        added = oracle.round_to(total + oracle.array(common["residual"]), oracle.NAMES[dtype])
    gamma = oracle.array(common["gamma"])
    return total, added, oracle.normed(added, gamma, EPSILON, case.get("weight_bias", 0.0), dtype)


@pytest.mark.parametrize("name", ALL)
def test_every_given_output(results: list, name: str) -> None:
    """Each output given is written: sums bit-equal to the oracle, the norm at most one value off (fp32: 4 ulp)."""
    got, dtype = results[0][name], ALL[name].get("dtype", BF16)
    total, added, norm = expected(name)
    if "output" in got:
        np.testing.assert_array_equal(oracle.array(got["output"]), total)
    if "residual_out" in got:
        np.testing.assert_array_equal(oracle.array(got["residual_out"]), added)
    written = got.get("norm_out", got.get("made"))
    if written is not None:
        apart = oracle.steps_apart(oracle.array(written), norm, dtype)
        assert apart.max() <= (4 if dtype == FP32 else 1)
        if dtype != FP32:
            assert (apart > 0).sum() <= max(1, apart.size // 1000)


@pytest.mark.parametrize("name", [name for name, case in ALL.items() if any("fp" in out for out in case["outputs"])])
def test_quantised(results: list, name: str) -> None:
    """Codes and scales are the oracle quantiser's on the norm; the global scale counts as float and as tensor."""
    case, got = ALL[name], results[0][name]
    norm = oracle.array(got["norm_out"]) if "norm_out" in got else expected(name)[2]
    scale = float(case.get("scale_factor", 1.0))
    codes, scales = oracle.array(got["quant_out"]), None
    if "nvfp4" in case["outputs"]:
        wanted, scales = oracle.nvfp4(norm, scale)
        tokens, groups = wanted.shape[0], HIDDEN // 16
        written, padding = oracle.unswizzled(got["scale_out"].numpy(), tokens, groups, case.get("layout_code", 0))
        assert not padding.any()
    elif "fp8" in case["outputs"]:
        wanted, written = oracle.static_fp8(norm, scale), None
    else:
        wanted, scales = oracle.token_fp8(norm)
        written = got["scale_out"].numpy()
    if "norm_out" in got:
        np.testing.assert_array_equal(codes, wanted)
        if scales is not None:
            np.testing.assert_array_equal(written, scales)
    else:  # the oracle's norm is a value off in a few places
        assert (codes != wanted).mean() < 0.01


@pytest.mark.parametrize("name", [name for name, case in ALL.items() if not case.get("low")])
def test_returns(results: list, name: str) -> None:
    """The most downstream output given: norm_out, quant_out, residual_out, output; 7 makes a norm before a residual."""
    given = results[0][name]
    order = [key for key in ("norm_out", "quant_out", "residual_out", "output") if key in given]
    if name.startswith("7") and order[0] == "residual_out":
        assert given["returned"] == []
        assert given["made"].shape == (TOKENS, HIDDEN)
    else:
        assert given["returned"] == order[:1]


def test_ranks_agree(results: list) -> None:
    """Every output has the same bits on both ranks."""
    for name in ALL:
        for key in ("output", "residual_out", "norm_out", "quant_out", "scale_out"):
            if key in results[0][name]:
                one, other = (oracle.array(result[name][key]) for result in results)
                np.testing.assert_array_equal(one, other, err_msg=f"{name} {key}")


def test_documented_order_warns_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of FlashInfer's documented shape are read as documented, with one warning about equal counts; of equal
    counts the kernels' order is read; the keyword settles both."""
    monkeypatch.setattr("arfusion_pass.comm.moe._told", set())
    gamma = torch.ones(8, dtype=BF16)
    with comm.create_allreduce_fusion_workspace(
        world_size=1, max_token_num=8, hidden_dim=8, dtype=BF16, device="cpu"
    ) as workspace:

        def total(experts: int, tokens: int, shape: tuple[int, int], **options: bool) -> list[float]:
            """Row t of expert e is 1, so that the sum of token t is the sum of its scales."""
            out, zeros = torch.empty(tokens, 8, dtype=BF16), torch.zeros(tokens, 8, dtype=BF16)
            comm.allreduce_fusion(
                zeros,
                workspace,
                6,
                output=out,
                rms_gamma=gamma,
                moe_reduction_device_num_experts=experts,
                moe_reduction_scale_input=torch.arange(experts * tokens, dtype=torch.float32).view(shape),
                moe_reduction_active_experts_token_input=torch.ones(experts * tokens, 8, dtype=BF16),
                moe_reduction_token_input=zeros,
                **options,
            )
            return out[:, 0].tolist()

        assert total(2, 3, (2, 3)) == [3, 5, 7]
        assert not caplog.records
        assert total(2, 3, (3, 2)) == [1, 5, 9]
        assert total(2, 3, (3, 2)) == [1, 5, 9]
        assert len(caplog.records) == 1
        assert "moe_reduction_expert_major=False" in caplog.text
        assert total(2, 2, (2, 2)) == [2, 4]
        assert total(2, 2, (2, 2), moe_reduction_expert_major=False) == [1, 5]
        with pytest.raises(ValueError, match=r"must be \[num_experts, token_num\] = \[2, 3\]"):
            total(2, 3, (3, 2), moe_reduction_expert_major=True)
