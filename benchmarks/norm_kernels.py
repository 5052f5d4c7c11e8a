"""One Triton kernel for what follows an unfused all-reduce (add, RMSNorm, a quantiser): the fair unfused baseline."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NONE, STATIC, GROUP128 = 0, 1, 2


@triton.jit
def _add_rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    residual_out_ptr,
    norm_ptr,
    codes_ptr,
    scale_ptr,
    hidden,
    epsilon,
    QUANT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    at = row * hidden + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    total = (x + residual).to(residual_out_ptr.dtype.element_ty)
    tl.store(residual_out_ptr + at, total, mask=inside)
    value = total.to(tl.float32)
    variance = tl.sum(value * value, axis=0) / hidden
    norm = (value * tl.rsqrt(variance + epsilon) * weight).to(norm_ptr.dtype.element_ty)
    if QUANT == 0:
        tl.store(norm_ptr + at, norm, mask=inside)
    elif QUANT == 1:
        scaled = norm.to(tl.float32) / tl.load(scale_ptr)
        scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
        tl.store(codes_ptr + at, scaled.to(codes_ptr.dtype.element_ty), mask=inside)
    else:
        grouped = tl.reshape(norm.to(tl.float32), (BLOCK // 128, 128))
        scale = tl.maximum(tl.max(tl.abs(grouped), axis=1), 1e-10) / 448.0
        scaled = tl.reshape(grouped / scale[:, None], (BLOCK,))
        scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
        tl.store(codes_ptr + at, scaled.to(codes_ptr.dtype.element_ty), mask=inside)
        groups = tl.arange(0, BLOCK // 128)
        tl.store(scale_ptr + row * (hidden // 128) + groups, scale, mask=groups < hidden // 128)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    residual_out: torch.Tensor,
    norm: torch.Tensor,
    codes: torch.Tensor | None,
    scale: torch.Tensor | None,
    quantiser: int,
    epsilon: float = 1e-6,
) -> None:
    """``residual_out = x + residual``; ``norm`` or quantised ``codes`` of it. One program a token."""
    tokens, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    _add_rms_norm[(tokens,)](
        x,
        residual,
        weight,
        residual_out,
        norm,
        codes,
        scale,
        hidden,
        epsilon,
        QUANT=quantiser,
        BLOCK=block,
        num_warps=8 if block >= 4096 else 4,
    )
