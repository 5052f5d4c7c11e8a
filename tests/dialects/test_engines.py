"""SGLang's, FlashInfer's, TensorRT-LLM's and symmetric memory's ops under their schemas, through torch.compile on two
ranks; the ops compute here what their kernels do."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.dialects import engine_calls, engine_ops
from tests.dialects.cases import EPSILON, HIDDEN, Case, run, standard, verify

ADD, PLAIN = "AllReduceFusedAddRMSNorm", "AllReduceRMSNorm"
GEMMA = "AllReduceFusedAddGemmaRMSNorm"
fp8 = torch.float8_e4m3fn


def register() -> None:
    import arfusion_pass as arf

    engine_ops.register_sglang()
    engine_ops.register_flashinfer()
    engine_ops.register_tensorrt_llm()
    engine_ops.register_symm_mem()
    engine_ops.register_vllm()
    arf.register_group("trtllm:0,1", dist.group.WORLD)  # type: ignore[arg-type]


def sglang(x):  # type: ignore[no-untyped-def]
    return torch.ops.sglang.outplace_all_reduce(x, "tp:0", "ca")


def sgl_add(x, r, w):  # type: ignore[no-untyped-def]
    torch.ops.sgl_kernel.fused_add_rmsnorm(x, r, w, EPSILON, False)
    return x, r


def f_sgl_plain(x, r, w):  # type: ignore[no-untyped-def]
    y = sglang(x)
    out = torch.empty_like(y)
    torch.ops.sgl_kernel.rmsnorm(out, y, w, EPSILON, False)
    return out


def f_sgl_gemma_plain(x, r, w):  # type: ignore[no-untyped-def]
    y = sglang(x)
    out = torch.empty_like(y)
    torch.ops.sgl_kernel.gemma_rmsnorm(out, y, w, EPSILON, True)
    return out, y


def f_sgl_add(x, r, w):  # type: ignore[no-untyped-def]
    return sgl_add(sglang(x), r.clone(), w)


def f_sgl_gemma(x, r, w):  # type: ignore[no-untyped-def]
    y, total = sglang(x), r.clone()
    torch.ops.sgl_kernel.gemma_fused_add_rmsnorm(y, total, w, EPSILON, False)
    return y, total


def f_sgl_inplace(x, r, w):  # type: ignore[no-untyped-def]
    y = x.clone()
    torch.ops.sglang.inplace_all_reduce(y, "tp:0")
    return sgl_add(y, r.clone(), w)


def f_sgl_wrong_weight(x, r, w):  # type: ignore[no-untyped-def]
    return sgl_add(sglang(x), r.clone(), w.float())


def f_sgl_fp32_sum(x, r, w):  # type: ignore[no-untyped-def]
    total = sglang(x) + r.float()
    out = torch.empty_like(total)
    torch.ops.sgl_kernel.rmsnorm(out, total, w, EPSILON, False)
    return out


def f_sgl_static(x, r, w, s):  # type: ignore[no-untyped-def]
    norm, total = sgl_add(sglang(x), r.clone(), w)
    codes = torch.empty_like(norm, dtype=fp8)
    torch.ops.sgl_kernel.sgl_per_tensor_quant_fp8(norm, codes, s.clone(), True)
    return codes, total


def f_sgl_token(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = sgl_add(sglang(x), r.clone(), w)
    codes, scale = torch.empty_like(norm, dtype=fp8), torch.empty(norm.shape[0], 1)
    torch.ops.sgl_kernel.sgl_per_token_quant_fp8(norm, codes, scale)
    return codes, scale, total


def f_sgl_group(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = sgl_add(sglang(x), r.clone(), w)
    codes, scale = torch.empty_like(norm, dtype=fp8), torch.empty(norm.shape[0], HIDDEN // 128)
    torch.ops.sgl_kernel.sgl_per_token_group_quant_8bit(norm, codes, scale, 128, 1e-10, -448.0, 448.0, False)
    return codes, scale, total


def f_sgl_group_v2(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = sgl_add(sglang(x), r.clone(), w)
    codes, scale = torch.empty_like(norm, dtype=fp8), torch.empty(norm.shape[0], HIDDEN // 128)
    torch.ops.sgl_kernel.sgl_per_token_group_quant_8bit_v2(
        norm, codes, scale, 128, 1e-10, -448.0, 448.0, False, False, None
    )
    return codes, scale, total


def _sgl_quant(name):  # type: ignore[no-untyped-def]
    """A quantiser of SGLang's own namespace behind SGLang's FlashInfer all-reduce."""

    def f(x, r, w):  # type: ignore[no-untyped-def]
        norm, total = sgl_add(torch.ops.sglang.flashinfer_allreduce(x, "tp:0"), r.clone(), w)
        return *engine_calls.QUANTISERS[name](norm, norm.new_full((), 3.0, dtype=torch.float32)), total

    return f


def f_sgl_padding_read(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = sgl_add(sglang(x), r.clone(), w)
    codes, buffer = torch.empty_like(norm, dtype=fp8), torch.zeros(HIDDEN // 128, 8)
    torch.ops.sglang.per_token_group_quant(norm, codes, buffer.t()[: x.shape[0]], 128)
    return codes, buffer, total


def f_sgl_group_fp16(x, r, w):  # type: ignore[no-untyped-def]
    return _sgl_quant("sgl_group_packed")(x, r, w)


def f_sgl_group_eps(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = sgl_add(sglang(x), r.clone(), w)
    codes, scale = torch.empty_like(norm, dtype=fp8), torch.empty(norm.shape[0], HIDDEN // 128)
    torch.ops.sglang.per_token_group_quant_8bit_v2(norm, codes, scale, 128, 1e-4, -448.0, 448.0)
    return codes, scale, total


def f_fi_add(x, r, w):  # type: ignore[no-untyped-def]
    y, total = torch.ops.vllm.all_reduce(x, "tp:0"), r.clone()
    torch.ops.flashinfer.fused_add_rmsnorm(y, total, w)
    return y, total


def f_fi_add_quant(x, r, w, s):  # type: ignore[no-untyped-def]
    y, total, out = torch.ops.vllm.all_reduce(x, "tp:0"), r.clone(), torch.empty_like(x, dtype=fp8)
    torch.ops.flashinfer.fused_add_rmsnorm_quant(out, y, total, w, s)
    return out, total


def trt(x, op=0):  # type: ignore[no-untyped-def]
    return torch.ops.trtllm.allreduce(x, None, None, None, None, None, [0, 1], 3, op, EPSILON, True)[0]


def f_trt_plain(x, r, w):  # type: ignore[no-untyped-def]
    return torch.ops.trtllm.flashinfer_rmsnorm(trt(x), w, EPSILON)


def f_trt_add(x, r, w):  # type: ignore[no-untyped-def]
    y, total = trt(x), r.clone()
    torch.ops.trtllm.flashinfer_fused_add_rmsnorm(y, total, w, EPSILON)
    return y, total


def f_trt_static(x, r, w, s):  # type: ignore[no-untyped-def]
    norm = torch.ops.trtllm.flashinfer_rmsnorm(trt(x), w, EPSILON)
    return torch.ops.tensorrt_llm.static_quantize_e4m3_per_tensor(norm, s)[0]


def f_trt_fused(x, r, w):  # type: ignore[no-untyped-def]
    return torch.ops.trtllm.flashinfer_rmsnorm(trt(x, op=1), w, EPSILON)


def f_symm(x, r, w):  # type: ignore[no-untyped-def]
    y = torch.ops.symm_mem.one_shot_all_reduce(x, "sum", "0")
    return torch.ops.vllm_ir.rms_norm(y + r, w, EPSILON)


def halves() -> tuple[torch.Tensor, ...]:
    return tuple(tensor.half() for tensor in standard())


def with_scale() -> tuple[torch.Tensor, ...]:
    return (*standard(), torch.tensor([0.02]))


CASES = {
    "sgl_plain": Case(f_sgl_plain, standard, (PLAIN,)),
    "sgl_gemma_plain": Case(f_sgl_gemma_plain, standard, ("AllReduceGemmaRMSNorm",)),
    "sgl_add": Case(f_sgl_add, standard, (ADD,)),
    "sgl_gemma": Case(f_sgl_gemma, standard, (GEMMA,)),
    "sgl_inplace": Case(f_sgl_inplace, standard, missed=("out-of-place all-reduce",)),
    "sgl_wrong_weight": Case(f_sgl_wrong_weight, standard, missed=("takes only torch.bfloat16",)),
    "sgl_fp32_sum": Case(f_sgl_fp32_sum, standard, missed=("round to torch.bfloat16 in front of it",)),
    "sgl_static": Case(f_sgl_static, with_scale, (ADD + "StaticQuantFP8",)),
    "sgl_token": Case(f_sgl_token, standard, (ADD + "TokenQuantFP8",)),
    "sgl_group": Case(f_sgl_group, standard, (ADD + "GroupQuantFP8",)),
    "sgl_group_v2": Case(f_sgl_group_v2, standard, (ADD + "GroupQuantFP8",)),
    "sgl_padding_read": Case(f_sgl_padding_read, standard, (ADD,)),
    "sgl_group_fp16": Case(f_sgl_group_fp16, halves, (ADD,), note="rounds its multiplier to float16"),
    "sgl_group_eps": Case(f_sgl_group_eps, standard, (ADD,), note="asks for a lower bound of 0.0001"),
    "sgl_own_group": Case(_sgl_quant("sgl_group_v3"), standard, (ADD + "GroupQuantFP8",)),
    "sgl_own_packed": Case(_sgl_quant("sgl_group_packed"), standard, (ADD + "GroupQuantFP8",)),
    "sgl_own_powers": Case(_sgl_quant("sgl_group_v2"), standard, (ADD + "GroupQuantFP8",)),
    "sgl_own_nvfp4": Case(_sgl_quant("sgl_nvfp4"), standard, (ADD + "QuantNVFP4",)),
    "sgl_own_mxfp8": Case(_sgl_quant("sgl_mxfp8"), standard, (ADD + "QuantMXFP8",)),
    "fi_add": Case(f_fi_add, standard, (ADD,)),
    "fi_add_quant": Case(f_fi_add_quant, with_scale, (ADD + "StaticQuantFP8",)),
    "trt_plain": Case(f_trt_plain, standard, (PLAIN,)),
    "trt_add": Case(f_trt_add, standard, (ADD,)),
    "trt_static": Case(f_trt_static, with_scale, (PLAIN + "StaticQuantFP8",)),
    "trt_fused": Case(f_trt_fused, standard, missed=("RESIDUAL_RMS_NORM",)),
    "symm": Case(f_symm, standard, (ADD,)),
}


BOTH = [name for name in CASES if name != "sgl_padding_read"]


@pytest.fixture(scope="module", params=[False, True], ids=["v1", "v2"])
def outcomes(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    return run(__name__, BOTH, request.param)


def test_padding_that_is_read() -> None:
    """Under v2 a graph may read more of a buffer than the op was handed: that is left alone unless the rest was never
    written. (Under v1 the op's result is written into the buffer by the graph itself.)"""
    verify(CASES["sgl_padding_read"], run(__name__, ["sgl_padding_read"], True)["sgl_padding_read"])


@pytest.mark.parametrize("name", BOTH)
def test_case(outcomes, name: str) -> None:  # type: ignore[no-untyped-def]
    """Each engine's spelling fuses, or is refused with its reason, under both versions of auto_functionalized; no
    all-reduce is left of a fused site, and every fused value is within the contract of the ops it replaced."""
    verify(CASES[name], outcomes[name])
