"""Each quantiser as real graphs spell it, in plain torch, against the spec that names it.

Codes and scales must be those of the eager graph, bit for bit: that is what a rewrite promises its user.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from arfusion_pass.ops.quantisers import quantise
from arfusion_pass.ops.spec import Apply, Bound, QuantFormat, QuantSpec, ScaleLayout, ScaleRound, ScaleRule

FP8 = torch.float8_e4m3fn
E4M3 = QuantFormat.FP8
Quantised = tuple[torch.Tensor, torch.Tensor | None]


def clamp_cast(value: torch.Tensor) -> torch.Tensor:
    return value.clamp(-448.0, 448.0).to(FP8)


def static_divide(h: torch.Tensor) -> Quantised:
    """``(h / s)`` with a scale of shape [1], fp32: the division promotes."""
    return clamp_cast(h / torch.tensor([0.0371])), None


def static_reciprocal(h: torch.Tensor) -> Quantised:
    """vLLM native: ``h.float() * s.reciprocal()``."""
    return clamp_cast(h.float() * torch.tensor([0.0371]).reciprocal()), None


def static_encode(h: torch.Tensor) -> Quantised:
    """The graph holds the encode scale and multiplies."""
    return clamp_cast(h.float() * torch.tensor([0.0371])), None


def static_0dim(h: torch.Tensor) -> Quantised:
    """A 0-dim scale in the tensor's dtype: divides in it, clamps and casts from it."""
    return clamp_cast(h / torch.tensor(0.0371, dtype=h.dtype)), None


def static_python_float(h: torch.Tensor) -> Quantised:
    """A Python float: divides in the tensor's dtype by an fp32 value."""
    return clamp_cast(h / 0.0371), None


def token(h: torch.Tensor) -> Quantised:
    """Plain torch: amax bounded, both divisions in fp32."""
    h32 = h.float()
    scale = h32.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448.0
    return clamp_cast(h32 / scale), scale


def token_vllm(h: torch.Tensor) -> Quantised:
    """vLLM native: bound after the division, applied by a reciprocal's multiplication."""
    scale = (h.abs().amax(-1).unsqueeze(-1).float() / 448.0).clamp(min=1.0 / (448.0 * 512.0))
    return clamp_cast(h.float() * scale.reciprocal()), scale


def token_torchao(h: torch.Tensor) -> Quantised:
    """torchao per row: amax and its division in the tensor's dtype, then fp32."""
    scale = (h.abs().amax(1, keepdim=True) / 448.0).float()
    return clamp_cast(h.float() / scale), scale


def token_inverse(h: torch.Tensor) -> Quantised:
    """``1 / (448 / amax)`` for the scale, ``448 / amax`` for the value."""
    amax = h.float().abs().amax(-1, keepdim=True)
    return clamp_cast(h.float() * (448.0 / amax)), 1.0 / (448.0 / amax)


def group_plain(h: torch.Tensor) -> Quantised:
    """Groups of 128, amax bounded, clamped."""
    grouped = h.reshape(h.shape[0], -1, 128).float()
    scale = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return clamp_cast(grouped / scale).reshape(h.shape), scale.squeeze(-1)


def group_deepseek(h: torch.Tensor) -> Quantised:
    """DeepSeek-V3: ``x * (448 / amax)`` without a clamp; the scale is ``amax / 448``."""
    grouped = h.view(h.shape[0], -1, 128)
    amax = grouped.abs().float().amax(2).view(h.shape[0], -1).clamp(1e-4)
    return (grouped * (448.0 / amax.unsqueeze(2))).to(FP8).view(h.shape), amax / 448.0


def group_vllm(h: torch.Tensor) -> Quantised:
    """vLLM native: ``max`` along the group, clamp after the division."""
    grouped = h.reshape(-1, h.shape[1] // 128, 128)
    scale = (grouped.abs().max(dim=-1, keepdim=True)[0].float() / 448.0).clamp(min=1e-10)
    return clamp_cast(grouped / scale).reshape(h.shape), scale.squeeze(-1)


def group_ue8m0(h: torch.Tensor) -> Quantised:
    """vLLM native with ``use_ue8m0``: ``exp2(ceil(log2(scale)))``."""
    grouped = h.reshape(-1, h.shape[1] // 128, 128)
    raw = (grouped.abs().max(dim=-1, keepdim=True)[0].float() / 448.0).clamp(min=1e-10)
    scale = torch.exp2(torch.ceil(torch.log2(raw)))
    return clamp_cast(grouped / scale).reshape(h.shape), scale.squeeze(-1)


def int8_token(h: torch.Tensor) -> Quantised:
    """INT8 per token."""
    scale = h.float().abs().amax(-1, keepdim=True) / 127.0
    return torch.round(h.float() / scale).clamp(-128, 127).to(torch.int8), scale


DIALECTS: list[tuple[Callable[[torch.Tensor], Quantised], QuantSpec]] = [
    (static_divide, QuantSpec(E4M3)),
    (static_reciprocal, QuantSpec(E4M3, apply=Apply.RECIPROCAL)),
    (static_encode, QuantSpec(E4M3, apply=Apply.MULTIPLY)),
    (static_0dim, QuantSpec(E4M3, in_dtype=True)),
    (static_python_float, QuantSpec(E4M3, in_dtype=True)),
    (token, QuantSpec(E4M3, -1, bound_on=Bound.AMAX, bound=1e-12)),
    (token_vllm, QuantSpec(E4M3, -1, bound_on=Bound.SCALE, bound=1 / (448 * 512), apply=Apply.RECIPROCAL)),
    (token_torchao, QuantSpec(E4M3, -1, scale_round=ScaleRound.TENSOR)),
    (token_inverse, QuantSpec(E4M3, -1, scale_rule=ScaleRule.RECIPROCAL, apply=Apply.MAX_OVER_AMAX)),
    (group_plain, QuantSpec(E4M3, 128, bound_on=Bound.AMAX, bound=1e-10)),
    (group_deepseek, QuantSpec(E4M3, 128, bound_on=Bound.AMAX, bound=1e-4, apply=Apply.MAX_OVER_AMAX, clamp=False)),
    (group_vllm, QuantSpec(E4M3, 128, bound_on=Bound.SCALE, bound=1e-10)),
    (
        group_ue8m0,
        QuantSpec(E4M3, 128, bound_on=Bound.SCALE, bound=1e-10, scale_round=ScaleRound.POW2_LOG2),
    ),
    (int8_token, QuantSpec(QuantFormat.INT8, -1)),
]


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("spelled", "spec"), DIALECTS, ids=lambda value: getattr(value, "__name__", ""))
def test_spec_is_the_graph(spelled: Callable[[torch.Tensor], Quantised], spec: QuantSpec, dtype: torch.dtype) -> None:
    """The spec computes what the eager graph does; magnitudes from 1e-6 to 1e4."""
    torch.manual_seed(1)
    magnitudes = torch.logspace(-6, 3 if dtype == torch.float16 else 4, 48).unsqueeze(1)
    h = (torch.randn(48, 512) * magnitudes).to(dtype)
    value = 0.0371
    if spelled is static_0dim:
        value = torch.tensor(value, dtype=dtype).item()
    codes, scales = quantise(h, spec, None, value, dtype)
    wanted_codes, wanted_scales = spelled(h)
    assert same(codes, wanted_codes)
    assert (scales is None) == (wanted_scales is None)
    if scales is not None and wanted_scales is not None:
        assert same(scales, wanted_scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_unrounded_reads_the_fp32_norm(dtype: torch.dtype) -> None:
    """``unrounded`` (what torch 2.11 folds a graph to) quantises the fp32 norm, without it the norm rounded to T."""
    norm = torch.randn(8, 256) * 3
    spec = QuantSpec(E4M3, -1)
    rounded, _ = quantise(norm, spec, None, 1.0, dtype)
    unrounded, _ = quantise(norm, QuantSpec(E4M3, -1, unrounded=True), None, 1.0, dtype)
    assert same(unrounded, token(norm)[0])
    assert same(rounded, token(norm.to(dtype))[0])


@pytest.mark.parametrize("clamp", [True, False])
def test_beyond_the_range(clamp: bool) -> None:
    """Clamped, more than 448 saturates; not clamped, it is whatever this torch's own cast makes of it."""
    norm = torch.tensor([[448.0, 449.0, 464.0, 465.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan, -0.0]])
    codes, _ = quantise(norm, QuantSpec(E4M3, clamp=clamp), None, 1.0, torch.float32)
    wanted = (norm.clamp(-448, 448) if clamp else norm).to(FP8)
    assert same(codes, wanted)
    assert codes.float()[0, 8].isnan()
    assert codes.view(torch.uint8)[0, 9] == 0x80, "-0.0 keeps its sign"
    if clamp:
        assert codes.float()[0, :8].tolist() == [448, 448, 448, 448, 448, -448, 448, -448]


def test_all_zero_group_follows_the_formula() -> None:
    """0 / 0 is NaN without a bound, 0 with one; INT8's NaN becomes 0; MX and NVFP4 blocks of zeros are zeros."""
    zeros = torch.zeros(1, 64)

    def codes(spec: QuantSpec) -> torch.Tensor:
        return quantise(zeros, spec, None, 1.0, torch.bfloat16)[0]

    assert codes(QuantSpec(E4M3, -1)).float().isnan().all()
    assert (codes(QuantSpec(E4M3, -1, bound_on=Bound.AMAX, bound=1e-12)).float() == 0).all()
    assert (codes(QuantSpec(E4M3, -1, bound_on=Bound.SCALE, bound=1e-12)).float() == 0).all()
    assert codes(QuantSpec(E4M3, -1, apply=Apply.RECIPROCAL)).float().isnan().all()
    assert (codes(QuantSpec(QuantFormat.INT8, -1)) == 0).all()
    assert (codes(QuantSpec(QuantFormat.MXFP8, 32, ScaleLayout.LINEAR)).float() == 0).all()
    assert (codes(QuantSpec(QuantFormat.NVFP4, 16, ScaleLayout.LINEAR)) == 0).all()


def test_nvfp4_decodes_close() -> None:
    """Codes times block scale over global scale give the input back within e2m1's step (the convention is sane)."""
    norm = torch.randn(16, 128)
    encode = torch.tensor([448.0 * 6.0 / norm.abs().max()])
    codes, scales = quantise(norm, QuantSpec(QuantFormat.NVFP4, 16, ScaleLayout.LINEAR), encode, 1.0, torch.float32)
    assert scales is not None
    nibbles = torch.stack((codes & 15, codes >> 4), -1).view(16, 128).long()
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = table[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
    block = scales.float() / encode
    decoded = values * block.repeat_interleave(16, 1)
    assert ((decoded - norm).abs() <= 1.1 * block.repeat_interleave(16, 1)).all()
