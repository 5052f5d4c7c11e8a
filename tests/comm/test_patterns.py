"""Patterns 0 to 5, 8 to 11, 13 and 14 on two gloo ranks, against a numpy oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from arfusion_pass import comm
from arfusion_pass.comm import AllReduceFusionPattern as Pattern
from tests.comm import oracle
from tests.helpers import run_ranks

WORLD = 2
EPSILON = 1e-3
Case = tuple[int, torch.dtype, int, int, dict[str, Any]]  # pattern, dtype, tokens, hidden, options

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES: dict[str, Case] = {
    "0-bf16": (0, BF16, 5, 256, {}),
    "0-fp16-oneshot": (0, FP16, 5, 2880, {"use_oneshot": True}),
    "0-fp32-twoshot": (0, FP32, 1, 1024, {"use_oneshot": False, "fp32_acc": True}),
    "0-empty": (0, BF16, 0, 256, {}),
    "1-bf16": (1, BF16, 5, 2048, {"launch_with_pdl": True}),
    "1-fp16": (1, FP16, 16, 4096, {"trigger_completion_at_end": False, "launch_with_pdl": True}),
    "1-fp32": (1, FP32, 3, 256, {}),
    "1-gemma": (1, BF16, 8, 2048, {"weight_bias": 1.0}),
    "1-fp32-gamma": (1, BF16, 5, 256, {"gamma": FP32}),
    "1-3d": (1, BF16, 6, 256, {"lead": (2, 3)}),
    "1-flat": (1, BF16, 6, 256, {"flat": True}),
    "1-empty": (1, BF16, 0, 256, {}),
    "2-tensor": (2, BF16, 5, 1024, {"scale": 0.037, "as_tensor": FP32}),
    "2-float": (2, FP16, 5, 1024, {"scale": 0.037}),
    "2-saturates": (2, BF16, 5, 256, {"scale": 0.002}),
    "2-bf16-scale": (2, BF16, 5, 1024, {"scale": 0.25, "as_tensor": BF16}),
    "3-128x4": (3, BF16, 5, 1024, {"scale": 61.0, "layout_code": 0, "as_tensor": FP32}),
    "3-8x4": (3, FP16, 13, 1088, {"scale": 61.0, "layout_code": 1}),
    "3-linear": (3, BF16, 5, 1024, {"scale": 61.0, "layout_code": 2}),
    "3-default-layout": (3, BF16, 130, 256, {"scale": 61.0}),
    "4-float": (4, BF16, 5, 7168, {"scale": 0.037}),
    "5-128x4": (5, BF16, 5, 1088, {"scale": 61.0, "layout_code": 0}),
    "5-8x4": (5, BF16, 9, 1024, {"scale": 61.0, "layout_code": 1}),
    "5-linear": (5, FP32, 5, 1024, {"scale": 61.0, "layout_code": 2}),
    "8-7168": (8, BF16, 5, 7168, {"block_quant_group_size": 128}),
    "8-7200": (8, FP16, 6, 7200, {"block_quant_group_size": 32}),
    "8-960": (8, BF16, 1, 960, {"block_quant_group_size": 64}),
    "8-640": (8, BF16, 7, 640, {"block_quant_group_size": 16}),
    "8-tiny": (8, BF16, 5, 256, {"block_quant_group_size": 32, "tiny": True}),
    "9-4096": (9, BF16, 4, 4096, {"block_quant_group_size": 256}),
    "9-768": (9, FP16, 3, 768, {"block_quant_group_size": 128}),
    "9-624": (9, BF16, 3, 624, {"block_quant_group_size": 8}),
    "9-one-word": (9, BF16, 3, 384, {"block_quant_group_size": 128}),
    "9-empty": (9, BF16, 0, 384, {"block_quant_group_size": 128}),
    "10-bf16": (10, BF16, 5, 4096, {}),
    "10-fp16": (10, FP16, 1, 8192, {}),
    "11-bf16": (11, BF16, 16, 1024, {}),
    "11-tiny": (11, BF16, 4, 256, {"tiny": True}),
    "13-default-layout": (13, BF16, 130, 64, {}),
    "13-linear": (13, FP32, 5, 160, {"layout_code": 2}),
    "14-8x4": (14, FP16, 9, 320, {"layout_code": 1}),
}
"""One process group runs them all. Shapes are those of FlashInfer's own tests where a CPU takes them."""


GROUP = {3: 16, 5: 16, 13: 32, 14: 32}
"""Elements to a scale of one byte."""


def values(seed: int, shape: tuple[int, ...], dtype: torch.dtype, factor: float = 2.0) -> torch.Tensor:
    """The same numbers in every process."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * factor).to(dtype)


def inputs(case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input of ``rank``, residual, gamma); the residual and gamma are the same on all ranks."""
    _, dtype, tokens, hidden, options = case
    factor = 1e-30 if options.get("tiny") else 2.0
    x = values(100 + rank, (tokens, hidden), dtype, factor)
    residual = values(7, (tokens, hidden), dtype, factor)
    gamma = values(9, (hidden,), options.get("gamma", dtype), 1.0)
    return x, residual, gamma


def outputs(case: Case) -> dict[str, torch.Tensor]:
    """Every output that the pattern names, filled with a value that padding must not keep."""
    pattern, dtype, tokens, hidden, options = case
    given = {"output": torch.full((tokens, hidden), 77.0, dtype=dtype)}
    if pattern == 0:
        return given
    given["residual_out"] = torch.full((tokens, hidden), 77.0, dtype=dtype)
    given["norm_out"] = torch.full((tokens, hidden), 77.0, dtype=dtype)
    if pattern in (3, 5):
        given["quant_out"] = torch.full((tokens, hidden // 2), 0x5A, dtype=torch.uint8)
    if group := GROUP.get(pattern):
        rows = {0: 128, 1: 8, 2: 1}[options.get("layout_code", 0)]
        columns = hidden // group if rows == 1 else -(-hidden // group // 4) * 4
        given["scale_out"] = torch.full((-(-tokens // rows) * rows * columns,), 0x5A, dtype=torch.uint8)
    if pattern > 1 and "quant_out" not in given:
        given["quant_out"] = torch.full((tokens, hidden), 0x5A, dtype=torch.uint8).view(torch.float8_e4m3fn)
    if pattern in (8, 9):
        words, ld = -(-hidden // options["block_quant_group_size"] // 4), -(-tokens // 4) * 4
        storage = torch.full((max(ld * words, 1),), 0x7F7F7F7F, dtype=torch.int32)
        given["scale_out"] = storage.as_strided((tokens, words), (1, max(ld, 1)))
    if pattern in (10, 11):
        given["scale_out"] = torch.full((tokens, 1), 77.0)
    return given


def arguments(case: Case) -> dict[str, Any]:
    """The options as the API's keyword arguments."""
    _, _, _, _, options = case
    known = ("use_oneshot", "fp32_acc", "launch_with_pdl", "trigger_completion_at_end", "weight_bias", "layout_code")
    result = {name: options[name] for name in (*known, "block_quant_group_size") if name in options}
    if "scale" in options:
        dtype = options.get("as_tensor")
        result["scale_factor"] = options["scale"] if dtype is None else torch.tensor([options["scale"]], dtype=dtype)
    return result


def rank_main(rank: int, world: int) -> dict[str, dict[str, Any]]:
    """Run all cases; every output, what was returned, and the same call with only the returned output."""
    results = {}
    with comm.create_allreduce_fusion_workspace(
        world_size=world, rank=rank, max_token_num=64, hidden_dim=8192, dtype=BF16
    ) as workspace:
        for name, case in CASES.items():
            x, residual, gamma = inputs(case, rank)
            given = outputs(case)
            rest = {**arguments(case), "rms_eps": EPSILON, "residual_in": residual, "rms_gamma": gamma}
            shaped = {**given}
            if lead := case[4].get("lead"):
                x, rest["residual_in"] = x.view(*lead, -1), residual.view(*lead, -1)
                shaped = {key: value.view(*lead, -1) for key, value in given.items()}
            if case[4].get("flat"):
                rest["residual_in"] = residual.view(-1)
                shaped = {key: value.view(-1) for key, value in given.items()}
            returned = comm.allreduce_fusion(x, workspace, Pattern(case[0]), **shaped, **rest)
            which = [key for key, value in shaped.items() if value is returned]
            scale_out = outputs(case).get("scale_out")
            lean = comm.allreduce_fusion(
                x,
                workspace,
                case[0],
                scale_out=scale_out,
                quant_out=outputs(case).get("quant_out") if case[0] in (4, 5, 9, 11, 14) else None,
                **rest,
            )
            results[name] = {**given, "returned": which, "lean": lean, "lean_scale": scale_out}
    return results


@pytest.fixture(scope="module")
def results() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(WORLD, rank_main)


@pytest.mark.parametrize("name", CASES)
def test_sum_residual_and_norm(results: list, name: str) -> None:
    """``output`` and ``residual_out`` bit-equal to the oracle, the norm at most one value off in 0.1 % of elements."""
    case = CASES[name]
    ranks = [inputs(case, rank) for rank in range(WORLD)]
    total = oracle.reduced([oracle.array(x) for x, _, _ in ranks], case[1])
    got = results[0][name]
    np.testing.assert_array_equal(oracle.array(got["output"]), total)
    if case[0] == 0:
        return
    added = oracle.round_to(total + oracle.array(ranks[0][1]), oracle.NAMES[case[1]])
    np.testing.assert_array_equal(oracle.array(got["residual_out"]), added)
    norm = oracle.normed(added, oracle.array(ranks[0][2]), EPSILON, case[4].get("weight_bias", 0.0), case[1])
    apart = oracle.steps_apart(oracle.array(got["norm_out"]), norm, case[1])
    assert apart.max(initial=0) <= (4 if case[1] == FP32 else 1)
    if case[1] != FP32:
        assert (apart > 0).sum() <= max(1, apart.size // 1000)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[0] > 1])
def test_codes_and_scales(results: list, name: str) -> None:
    """Codes and scales are bit-equal to the oracle's quantiser on the norm that was written; padding is 0."""
    pattern, _, tokens, hidden, options = CASES[name]
    got = results[0][name]
    norm = oracle.array(got["norm_out"])
    codes = oracle.array(got["quant_out"])
    if pattern in (2, 4):
        expected, scales = oracle.static_fp8(norm, options["scale"]), None
    elif pattern in (3, 5):
        expected, scales = oracle.nvfp4(norm, options["scale"])
    elif pattern in (8, 9):
        expected, scales = oracle.packed_group_fp8(norm, options["block_quant_group_size"])
    elif pattern in (13, 14):
        expected, scales = oracle.mxfp8(norm)
    else:
        expected, scales = oracle.token_fp8(norm) if tokens else (codes, np.zeros((0, 1)))
    np.testing.assert_array_equal(codes, expected)
    if scales is None:
        return
    written = got["scale_out"].numpy()
    if group := GROUP.get(pattern):
        written, padding = oracle.unswizzled(written, tokens, hidden // group, options.get("layout_code", 0))
        assert not padding.any()
    np.testing.assert_array_equal(written, scales)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[0] in (8, 9) and case[2]])
def test_packed_padding(results: list, name: str) -> None:
    """Rows past the last token are 0 in every packed column but the last, whose padding is not the tensor's own."""
    scales = results[0][name]["scale_out"]
    tokens, words = scales.shape
    ld = -(-tokens // 4) * 4
    span = scales.as_strided(((words - 1) * ld + tokens,), (1,))
    full = torch.nn.functional.pad(span, (0, words * ld - span.numel())).view(words, ld)
    assert not full[:, tokens:].any()


@pytest.mark.parametrize("name", CASES)
def test_returns(results: list, name: str) -> None:
    """Returns norm_out if the pattern is one that writes it, else quant_out, else output; made where it was None."""
    pattern = CASES[name][0]
    expected = "output" if pattern == 0 else "norm_out" if pattern in (1, 4, 5, 9, 11, 14) else "quant_out"
    got = results[0][name]
    assert got["returned"] == [expected]
    assert torch.equal(got["lean"].view(torch.uint8).view(-1), got[expected].view(torch.uint8).view(-1))
    if got["lean_scale"] is not None:
        assert torch.equal(got["lean_scale"], got["scale_out"])


def test_ranks_agree(results: list) -> None:
    """Every output has the same bits on every rank."""
    for name in CASES:
        for key in ("output", "residual_out", "norm_out", "quant_out", "scale_out"):
            if key in results[0][name]:
                one, other = (oracle.array(result[name][key]) for result in results)
                np.testing.assert_array_equal(one, other, err_msg=f"{name} {key}")


def test_static_scale_multiplies_by_its_reciprocal() -> None:
    """Static FP8 is ``norm * (1 / scale)``, as FlashInfer and vLLM compute it, not ``norm / scale``: seen at ties."""
    gamma = torch.arange(1, 1 << 12, dtype=torch.int16).view(BF16)[None] * 2.0**120  # every mantissa, many exponents
    gamma = torch.cat([gamma[0], torch.zeros(1, dtype=BF16)])
    ones = torch.ones(1, gamma.numel(), dtype=BF16)  # their norm is gamma itself
    differ = 0
    with comm.create_allreduce_fusion_workspace(
        world_size=1, max_token_num=1, hidden_dim=gamma.numel(), dtype=BF16, device="cpu"
    ) as workspace:
        for scale in (0.3, 0.7, 1.1, 1.3, 2.3, 3.7, 5.3, 7.1):
            codes = comm.allreduce_fusion(
                ones, workspace, 2, residual_in=ones * 0, rms_gamma=gamma, rms_eps=0.0, scale_factor=scale
            )
            norm = oracle.array(gamma)[None]
            np.testing.assert_array_equal(oracle.array(codes), oracle.static_fp8(norm, scale))
            divided = oracle.quantisers.e4m3_codes(norm / np.float32(scale))
            differ += int((oracle.array(codes) != divided).sum())
    assert differ > 0, "no tie among the values: the test shows nothing"
