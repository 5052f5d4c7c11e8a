"""What the eager API must compute, in numpy, sharing no code with the package; quantisers: ``tests.ops.oracle``."""

from __future__ import annotations

import numpy as np
import torch

from tests.ops import oracle as quantisers
from tests.ops.oracle import F32, round_to

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def array(tensor: torch.Tensor) -> np.ndarray:
    """fp32 values of a float tensor, the integers of an int tensor, the bytes of any other."""
    if tensor.dtype in NAMES:
        return tensor.detach().float().numpy()
    return tensor.detach().numpy() if tensor.itemsize > 1 else tensor.detach().view(torch.uint8).numpy()


def reduced(inputs: list[np.ndarray], dtype: torch.dtype) -> np.ndarray:
    """Sum in rank order in fp32, rounded once."""
    total = inputs[0].astype(F32)
    for part in inputs[1:]:
        total = total + part
    return round_to(total, NAMES[dtype])


def normed(total: np.ndarray, gamma: np.ndarray, epsilon: float, bias: float, dtype: torch.dtype) -> np.ndarray:
    """RMSNorm with the mean and root in float64: at most one value off where fp32 rounds otherwise."""
    wide = total.astype(np.float64)
    scale = 1.0 / np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon)
    return round_to((wide * scale * (bias + gamma.astype(np.float64))).astype(F32), NAMES[dtype])


def moe_reduced(rows: np.ndarray, scales: np.ndarray, token_input: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Pattern 6's local sum: ``rows`` [E, T, H], ``scales`` [E, T]; fp32, one rounding."""
    total = np.zeros(token_input.shape, F32)
    for expert in range(rows.shape[0]):
        total = total + rows[expert] * scales[expert][:, None]
    return round_to(total + token_input, NAMES[dtype])


def moe_finalized(
    rows: np.ndarray,
    index: np.ndarray,
    weights: np.ndarray | None,
    shared: np.ndarray | None,
    factor: float,
    dtype: torch.dtype,
) -> np.ndarray:
    """Pattern 7's local sum, token by token."""
    total = np.zeros((index.shape[0], rows.shape[1]), F32)
    for token in range(index.shape[0]):
        for k in range(index.shape[1]):
            if index[token, k] >= 0:
                weight = F32(1) if weights is None else F32(weights[token, k])
                total[token] = total[token] + rows[index[token, k]] * weight
    total = total * F32(factor)
    return round_to(total if shared is None else total + shared, NAMES[dtype])


def static_fp8(norm: np.ndarray, scale: float) -> np.ndarray:
    """``e4m3_satfinite(norm * (1 / scale))``, bytes."""
    return quantisers.e4m3_codes(norm * (F32(1) / F32(scale)))


def token_fp8(norm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales [T, 1]) with ``scale = max(amax / 448, 1 / (448 * 512))``."""
    scale = np.maximum(np.abs(norm).max(-1, keepdims=True) / F32(448), F32(1 / (448 * 512)))
    return quantisers.e4m3_codes(norm / scale), scale


def packed_group_fp8(norm: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes, int32 words [T, ceil(G / 4)]) with UE8M0 scales, four to a word, the first in the low byte."""
    tokens, hidden = norm.shape
    grouped = norm.reshape(tokens, hidden // group, group)
    scale = quantisers.power_of_two_up(np.maximum(np.abs(grouped).max(-1) / F32(448), F32(1e-10)))
    codes = quantisers.e4m3_codes((grouped / scale[..., None]).reshape(tokens, hidden))
    exponents = np.zeros((tokens, -(-scale.shape[1] // 4) * 4), np.uint32)
    exponents[:, : scale.shape[1]] = np.frexp(scale)[1] - 1 + 127
    quads = exponents.reshape(tokens, exponents.shape[1] // 4, 4)
    words = quads[..., 0] | quads[..., 1] << 8 | quads[..., 2] << 16 | quads[..., 3] << 24
    return codes, words.astype(np.uint32).view(np.int32)


def nvfp4(norm: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(bytes [T, H / 2], e4m3 bytes [T, H / 16])."""
    return quantisers._nvfp4(norm, F32(scale))


def mxfp8(norm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes [T, H], UE8M0 bytes [T, H / 32]): ``amax / 448`` rounded up to a power of two."""
    grouped = norm.reshape(norm.shape[0], -1, 32)
    exponents, scale = quantisers.e8m0(np.abs(grouped).max(-1) / F32(448))
    return quantisers.e4m3_codes(np.clip(grouped / scale[..., None], -448, 448).reshape(norm.shape)), exponents


def unswizzled(buffer: np.ndarray, tokens: int, groups: int, layout: int) -> tuple[np.ndarray, np.ndarray]:
    """(scales [T, G], every padding byte) of a flat buffer in FlashInfer's layout 0, 1 or 2, by reshaping tiles."""
    flat, columns = buffer.reshape(-1), -(-groups // 4) * 4
    if layout == 2:
        return flat.reshape(tokens, groups), flat[:0]
    if layout == 0:
        rows = -(-tokens // 128) * 128
        tiles = flat.reshape(rows // 128, columns // 4, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    else:
        rows = -(-tokens // 8) * 8
        tiles = flat.reshape(rows // 8, columns // 4, 8, 4).transpose(0, 2, 1, 3)
    full = tiles.reshape(rows, columns)
    mask = np.ones_like(full, bool)
    mask[:tokens, :groups] = False
    return full[:tokens, :groups], full[mask]


def steps_apart(a: np.ndarray, b: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """How many values of ``dtype`` lie between ``a`` and ``b``, element by element."""

    def ordinal(value: np.ndarray) -> np.ndarray:
        bits = value.astype(F32).view(np.int32).astype(np.int64)
        if dtype == torch.float16:
            bits = value.astype(np.float16).view(np.int16).astype(np.int64)
            return np.where(bits < 0, -(bits & 0x7FFF), bits)
        ordered = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
        return ordered >> 16 if dtype == torch.bfloat16 else ordered

    return np.abs(ordinal(a) - ordinal(b))
