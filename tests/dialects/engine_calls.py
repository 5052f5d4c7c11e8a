"""Calls of engines' ops as the engines' own Python wrappers make them: what an op writes is allocated and returned.

Norms take ``(x, weight, epsilon)``; with an add ``(x, residual, weight, epsilon)`` and give norm and sum; with a
quantiser they give codes (and scales) in place of the norm. Quantisers take ``(x [T, H], scale)`` and give what they
write. Register the ops first (:mod:`tests.dialects.engine_ops`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor
FP8 = torch.float8_e4m3fn

# All-reduces ---------------------------------------------------------------------------------------------------------


def all_reduce(engine: str, x: Tensor, group: str, world: int) -> Tensor:
    """The sum over ranks by one engine's op; ``group`` is the engine's name for it, ``world`` its size."""
    if engine == "vllm":
        return torch.ops.vllm.all_reduce(x, group)
    if engine == "sglang":
        return torch.ops.sglang.outplace_all_reduce(x, group, "ca")
    if engine == "symm_mem":
        return torch.ops.symm_mem.one_shot_all_reduce(x, "sum", group)
    ranks = list(range(world))
    return torch.ops.trtllm.allreduce(x, None, None, None, None, None, ranks, 3, 0, 1e-6, True)[0]


# Norms ---------------------------------------------------------------------------------------------------------------


def _writes(op: str, *rest: Any) -> Callable[[Tensor, Tensor, float], Tensor]:
    """A norm op that writes to its first argument."""

    def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        result = torch.empty_like(x)
        _op(op)(result, x, weight, epsilon, *rest)
        return result

    return norm


def _adds(op: str, *rest: Any) -> Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    """A norm op that overwrites its input by the norm and the residual by the sum."""

    def norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        total = residual.clone()
        _op(op)(x, total, weight, epsilon, *rest)
        return x, total

    return norm


def _op(name: str) -> Any:
    namespace, op = name.split("::")
    return getattr(getattr(torch.ops, namespace), op)


NORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "ir": lambda x, w, eps: torch.ops.vllm_ir.rms_norm(x, w, eps),
    "c": _writes("_C::rms_norm"),
    "sgl": _writes("sgl_kernel::rmsnorm", False),
    "sgl_gemma": _writes("sgl_kernel::gemma_rmsnorm", True),
    "fi": _writes("flashinfer::rmsnorm", None),
    "fi_gemma": _writes("flashinfer::gemma_rmsnorm", None),
    "trt": lambda x, w, eps: torch.ops.trtllm.flashinfer_rmsnorm(x, w, eps),
}
ADD_NORMS: dict[str, Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "ir_add": lambda x, r, w, eps: torch.ops.vllm_ir.fused_add_rms_norm(x, r, w, eps),
    "c_add": _adds("_C::fused_add_rms_norm"),
    "sgl_add": _adds("sgl_kernel::fused_add_rmsnorm", False),
    "sgl_gemma_add": _adds("sgl_kernel::gemma_fused_add_rmsnorm", False),
    "fi_add": _adds("flashinfer::fused_add_rmsnorm"),
    "fi_gemma_add": _adds("flashinfer::gemma_fused_add_rmsnorm"),
    "trt_add": _adds("trtllm::flashinfer_fused_add_rmsnorm"),
}


# Norms that quantise -------------------------------------------------------------------------------------------------


def c_norm_static(x: Tensor, r: Tensor, w: Tensor, s: Tensor, epsilon: float) -> tuple[list[Tensor], Tensor]:
    codes = torch.empty_like(x, dtype=FP8)
    torch.ops._C.rms_norm_static_fp8_quant(codes, x, w, s, epsilon)
    return [codes], x


def c_add_norm_static(x: Tensor, r: Tensor, w: Tensor, s: Tensor, epsilon: float) -> tuple[list[Tensor], Tensor]:
    codes, total = torch.empty_like(x, dtype=FP8), r.clone()
    torch.ops._C.fused_add_rms_norm_static_fp8_quant(codes, x, total, w, s, epsilon)
    return [codes], total


def c_norm_token(x: Tensor, r: Tensor, w: Tensor, s: Tensor, epsilon: float) -> tuple[list[Tensor], Tensor]:
    codes, total = torch.empty_like(x, dtype=FP8), r.clone()
    scales = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    torch.ops._C.rms_norm_dynamic_per_token_quant(codes, x, w, scales, epsilon, None, total)
    return [codes, scales], total


def c_norm_int8(x: Tensor, r: Tensor, w: Tensor, s: Tensor, epsilon: float) -> tuple[list[Tensor], Tensor]:
    codes, scales = torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)
    torch.ops._C.rms_norm_dynamic_per_token_quant(codes, x, w, scales, epsilon, None, None)
    return [codes, scales], x


def c_norm_block(x: Tensor, r: Tensor, w: Tensor, s: Tensor, epsilon: float) -> tuple[list[Tensor], Tensor]:
    codes, total = torch.empty_like(x, dtype=FP8), r.clone()
    scales = x.new_empty(x.shape[0], x.shape[1] // 64, dtype=torch.float32)
    torch.ops._C.rms_norm_per_block_quant(codes, x, w, scales, epsilon, None, total, 64, False)
    return [codes, scales], total


def fi_add_norm_static(x: Tensor, r: Tensor, w: Tensor, s: Tensor, epsilon: float) -> tuple[list[Tensor], Tensor]:
    codes, total = torch.empty_like(x, dtype=FP8), r.clone()
    torch.ops.flashinfer.fused_add_rmsnorm_quant(codes, x, total, w, s, epsilon)
    return [codes], total


QUANT_NORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[list[Tensor], Tensor]]] = {
    "c_norm_static": c_norm_static,
    "c_add_norm_static": c_add_norm_static,
    "c_norm_token": c_norm_token,
    "c_norm_int8": c_norm_int8,
    "c_norm_block": c_norm_block,
    "fi_add_norm_static": fi_add_norm_static,
}
"""``(x, residual, weight, scale, epsilon)`` to what the op quantised, and the sum."""


# Quantisers ----------------------------------------------------------------------------------------------------------


def _scales(x: Tensor, *sizes: Any) -> Tensor:
    return x.new_empty(*sizes, dtype=torch.float32)


def c_static(x: Tensor, scale: Tensor) -> list[Tensor]:
    codes = torch.empty_like(x, dtype=FP8)
    torch.ops._C.static_scaled_fp8_quant(codes, x, scale.reshape(1), [-1, -1])
    return [codes]


def ir_static(x: Tensor, scale: Tensor) -> list[Tensor]:
    return [torch.ops.vllm_ir.static_quant_fp8(x, scale, FP8)]


def ir_token(x: Tensor, scale: Tensor) -> list[Tensor]:
    return list(torch.ops.vllm_ir.dynamic_quant_fp8(x, True, FP8))


def ir_group(x: Tensor, scale: Tensor) -> list[Tensor]:
    return list(torch.ops.vllm_ir.dynamic_group_quant_fp8(x, [1, 64], False, False, FP8))


def ir_group_column(x: Tensor, scale: Tensor) -> list[Tensor]:
    return list(torch.ops.vllm_ir.dynamic_group_quant_fp8(x, [1, 64], True, False, FP8))


def c_token(x: Tensor, scale: Tensor) -> list[Tensor]:
    codes, scales = torch.empty_like(x, dtype=FP8), _scales(x, x.shape[0], 1)
    torch.ops._C.dynamic_per_token_scaled_fp8_quant(codes, x, scales, None)
    return [codes, scales]


def _c_group(x: Tensor, scales: Tensor, size: int, ue8m0: bool = False) -> list[Tensor]:
    codes = torch.empty_like(x, dtype=FP8)
    torch.ops._C.per_token_group_fp8_quant(x, codes, scales, size, 1e-10, -448.0, 448.0, ue8m0, False, False)
    return [codes, scales]


def c_group(x: Tensor, scale: Tensor) -> list[Tensor]:
    return _c_group(x, _scales(x, x.shape[0], x.shape[1] // 128), 128)


def c_group_column(x: Tensor, scale: Tensor) -> list[Tensor]:
    return _c_group(x, _scales(x, x.shape[1] // 64, x.shape[0]).permute(1, 0), 64)


def c_group_ue8m0(x: Tensor, scale: Tensor) -> list[Tensor]:
    return _c_group(x, _scales(x, x.shape[0], x.shape[1] // 64), 64, True)


def c_packed(x: Tensor, scale: Tensor) -> list[Tensor]:
    codes, tokens, words = torch.empty_like(x, dtype=FP8), x.shape[0], (x.shape[1] // 64 + 3) // 4
    scales = torch.empty_strided((tokens, words), (1, (tokens + 3) // 4 * 4), dtype=torch.int32)
    torch.ops._C.per_token_group_fp8_quant_packed(x, codes, scales, 64, 1e-10, -448.0, 448.0)
    return [codes, scales]


def c_nvfp4(x: Tensor, scale: Tensor) -> list[Tensor]:
    return list(torch.ops._C.scaled_fp4_quant(x, scale.reshape(1), False))


def c_nvfp4_out(x: Tensor, scale: Tensor) -> list[Tensor]:
    codes = x.new_empty(x.shape[0], x.shape[1] // 2, dtype=torch.uint8)
    scales = x.new_empty((x.shape[0] + 127) // 128 * 128, x.shape[1] // 64, dtype=torch.int32)
    torch.ops._C.scaled_fp4_quant.out(x, scale.reshape(1), True, output=codes, output_scale=scales)
    return [codes, scales.view(FP8)]


def c_mxfp8(x: Tensor, scale: Tensor) -> list[Tensor]:
    return list(torch.ops.vllm.mxfp8_quantize(x, True))


def c_mxfp8_linear(x: Tensor, scale: Tensor) -> list[Tensor]:
    return list(torch.ops.vllm.mxfp8_quantize(x))


def sgl_static(x: Tensor, scale: Tensor) -> list[Tensor]:
    codes = torch.empty_like(x, dtype=FP8)
    torch.ops.sgl_kernel.sgl_per_tensor_quant_fp8(x, codes, scale.reshape(1).clone(), True)
    return [codes]


def sgl_token(x: Tensor, scale: Tensor) -> list[Tensor]:
    codes, scales = torch.empty_like(x, dtype=FP8), _scales(x, x.shape[0], 1)
    torch.ops.sgl_kernel.sgl_per_token_quant_fp8(x, codes, scales)
    return [codes, scales]


def sgl_group(x: Tensor, scale: Tensor) -> list[Tensor]:
    codes, scales = torch.empty_like(x, dtype=FP8), _scales(x, x.shape[0], x.shape[1] // 128)
    torch.ops.sgl_kernel.sgl_per_token_group_quant_8bit(x, codes, scales, 128, 1e-10, -448.0, 448.0, False)
    return [codes, scales]


def _tma_columns(x: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """SGLang's column-major scales: rows padded to four, seen from the side."""
    return x.new_empty(columns, (x.shape[0] + 3) // 4 * 4, dtype=dtype).t()[: x.shape[0]]


def sgl_group_v2(x: Tensor, scale: Tensor) -> list[Tensor]:
    codes, scales = torch.empty_like(x, dtype=FP8), _scales(x, x.shape[0], x.shape[1] // 128)
    group_v2 = torch.ops.sglang.per_token_group_quant_8bit_v2
    group_v2(x, codes, scales, 128, 1e-10, -448.0, 448.0, True)
    return [codes, scales]


def sgl_group_v3(x: Tensor, scale: Tensor) -> list[Tensor]:
    codes, scales = torch.empty_like(x, dtype=FP8), _tma_columns(x, x.shape[1] // 128, torch.float32)
    torch.ops.sglang.per_token_group_quant(x, codes, scales, 128)
    return [codes, scales]


def sgl_group_packed(x: Tensor, scale: Tensor) -> list[Tensor]:
    columns = (x.shape[1] // 128 + 3) // 4
    codes, scales = torch.empty_like(x, dtype=FP8), _tma_columns(x, columns, torch.int32)
    torch.ops.sglang.per_token_group_quant(x, codes, scales, 128, True)
    return [codes, scales]


def sgl_nvfp4(x: Tensor, scale: Tensor) -> list[Tensor]:
    return list(torch.ops.sglang.flashinfer_fp4_quantize(x, scale.reshape(1)))


def sgl_mxfp8(x: Tensor, scale: Tensor) -> list[Tensor]:
    return list(torch.ops.sglang.flashinfer_mxfp8_quantize(x, False))


def fi_nvfp4(x: Tensor, scale: Tensor) -> list[Tensor]:
    return list(torch.ops.flashinfer.fp4_quantize_sm100(x, scale.reshape(1), 16, False, True, True))


def fi_mxfp8(x: Tensor, scale: Tensor) -> list[Tensor]:
    return list(torch.ops.flashinfer.mxfp8_quantize_sm100(x, 1, 32))


def trt_static(x: Tensor, scale: Tensor) -> list[Tensor]:
    return [torch.ops.tensorrt_llm.static_quantize_e4m3_per_tensor(x, scale.reshape(1))[0]]


def trt_nvfp4(x: Tensor, scale: Tensor) -> list[Tensor]:
    return list(torch.ops.trtllm.fp4_quantize(x, scale.reshape(1), 16, False, False))


def trt_mxfp8(x: Tensor, scale: Tensor) -> list[Tensor]:
    return list(torch.ops.trtllm.mxfp8_quantize(x))


QUANTISERS: dict[str, Callable[[Tensor, Tensor], list[Tensor]]] = {
    each.__name__: each
    for each in (
        *(ir_static, ir_token, ir_group, ir_group_column),
        *(c_static, c_token, c_group, c_group_column, c_group_ue8m0, c_packed),
        *(c_nvfp4, c_nvfp4_out, c_mxfp8, c_mxfp8_linear),
        *(sgl_group_v2, sgl_group_v3, sgl_group_packed, sgl_nvfp4, sgl_mxfp8),
        *(sgl_static, sgl_token, sgl_group, fi_nvfp4, fi_mxfp8, trt_static, trt_nvfp4, trt_mxfp8),
    )
}
