"""NaN, infinite, subnormal and all-zero rows through every quantiser in plain torch: the fused graph's codes and scales
are the unfused one's, bit for bit, whether the quantiser was fused or left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import arfusion_pass as arf
from arfusion_pass.ops.spec import QuantSpec, ScaleRule
from tests import quant_cases as q
from tests import random_sites as rs
from tests.dialects import engine_ops
from tests.models import Tensor, reduce
from tests.simulate import fused_copy, run, trace

ROWS = 12
IR = ("ir_static", "ir_token", "ir_group", "ir_group_column")
NAMES = (*rs.STATIC, *rs.DYNAMIC, *rs.UNSOUND_QUANTISERS, "int8_subnormal", "group_pow2_pow", *IR)
WEIGHTS = {"plain": 1.0, "small": 1e-36, "smaller": 3e-40, "NaN": float("nan"), "infinite": float("inf"), "large": 3e38}

pytestmark = pytest.mark.usefixtures("world")


def special_rows(dtype: torch.dtype) -> Tensor:
    """``[2 * ROWS, H]``, the second half the first one's mirror image, so that the simulated ranks mix no two kinds."""
    x = torch.randn(ROWS, q.HIDDEN, generator=torch.Generator().manual_seed(1))
    for row, size in enumerate((1, 0, 1e-42, 2e-43, 1e-38, 1e-36, 1e-41, 0, 0, 1e-33, 1e-30, 5e-43)):
        x[row] *= size
    x[0, 2], x[7, 4], x[8, 5] = float("nan"), 1e-44, 3e-42
    return torch.cat([x, x.flip(0)]).to(dtype)


def special_weight(kind: str, dtype: torch.dtype) -> Tensor:
    weight = torch.ones(q.HIDDEN) * (WEIGHTS[kind] if kind in ("plain", "small", "smaller") else 1.0)
    weight[3], weight[5], weight[7] = weight[3] * 1e-3, weight[5] * 60, 0
    if kind not in ("plain", "small", "smaller"):
        weight[9] = WEIGHTS[kind]
    return weight.to(dtype)


def check(quantise: Callable[[Tensor], Any], dtype: torch.dtype, rows: Tensor | None = None) -> arf.FusionReport:
    """The codes and scales of special rows are those of the unfused graph."""
    rows = special_rows(dtype) if rows is None else rows

    def model(x: Tensor, w: Tensor) -> Any:
        wide = reduce(x).float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return quantise((wide * w.float()).to(x.dtype))

    module = trace(model, torch.empty_like(rows), torch.empty(rows.shape[-1], dtype=dtype))
    fused, report = fused_copy(module)
    assert report.matched_count == 1
    for kind in WEIGHTS:
        inputs = [rows, special_weight(kind, dtype)[: rows.shape[-1]]]
        for a, b in zip(run(module, inputs)[:-2], run(fused, inputs)[:-2], strict=True):
            if a.dtype.is_floating_point:
                assert torch.equal(a.float().nan_to_num(7), b.float().nan_to_num(7)), f"{kind}: {report}"
                assert torch.equal(a.float().signbit() | a.float().isnan(), b.float().signbit() | b.float().isnan())
            else:
                assert torch.equal(a, b), f"{kind}: {report}"
    return report


@pytest.mark.parametrize("dtype", rs.DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_special_values(name: str, dtype: torch.dtype) -> None:
    if name in IR:
        engine_ops.register_vllm()
    check(lambda h: rs._quantise(name, h, torch.tensor(0.37)), dtype)


def scaled(h: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return (h.float() / scale).clamp(-448.0, 448.0).to(q.FP8), scale


def largest(h: Tensor) -> Tensor:
    return h.float().abs().amax(-1, keepdim=True).clamp(min=1e-10)


def by_product(h: Tensor) -> tuple[Tensor, Tensor]:
    return scaled(h, largest(h) * (1.0 / 448.0))


def by_two_reciprocals(h: Tensor) -> tuple[Tensor, Tensor]:
    encode = 448.0 / largest(h)
    return (h.float() * encode).clamp(-448.0, 448.0).to(q.FP8), encode.reciprocal()


def int8_by_product(h: Tensor) -> tuple[Tensor, Tensor]:
    scale = largest(h) * (1.0 / 127.0)
    return (h.float() / scale).round().clamp(-128, 127).to(torch.int8), scale


SPELLINGS = {
    by_product: ("quant_fp8_token", ScaleRule.MULTIPLY),
    by_two_reciprocals: ("quant_fp8_token", ScaleRule.RECIPROCAL),
    int8_by_product: ("quant_int8_token", ScaleRule.MULTIPLY),
}


@pytest.mark.parametrize("dtype", rs.DTYPES, ids=str)
@pytest.mark.parametrize("quantise", SPELLINGS)
def test_other_rules_of_a_scale(quantise: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product with 1 / 448 in place of a division, and the reciprocal of what encodes, are the spec's own rules."""
    specs: list[QuantSpec] = []
    unpack = QuantSpec.unpack
    monkeypatch.setattr(QuantSpec, "unpack", lambda *packed: specs.append(unpack(*packed)) or specs[-1])
    report = check(quantise, dtype)
    wanted, rule = SPELLINGS[quantise]
    assert report.fused[0].quantiser == wanted, report.fused[0].note
    assert {spec.scale_rule for spec in specs} == {rule}


def other_16_bits(h: Tensor) -> tuple[Tensor, Tensor]:
    h = h.to(torch.float16 if h.dtype == torch.bfloat16 else torch.bfloat16)
    return scaled(h, largest(h) / 448.0)


def by_itself(h: Tensor) -> Tensor:
    return (h.float() / h.float().abs()).to(q.FP8)


def squared(h: Tensor) -> Tensor:
    return (h.float() * h.float()).to(q.FP8)


def scaled_and_doubled(h: Tensor) -> Tensor:
    return (h.float() / (largest(h) / 448.0) * 2.0).to(q.FP8)


def times_scale(h: Tensor) -> tuple[Tensor, Tensor]:
    scale = largest(h) / 448.0
    return (h.float() * scale).clamp(-448.0, 448.0).to(q.FP8), scale


def magnitudes(h: Tensor) -> tuple[Tensor, Tensor]:
    scale = largest(h) / 448.0
    return (h.float().abs() / scale).clamp(-448.0, 448.0).to(q.FP8), scale


def of_columns(h: Tensor) -> tuple[Tensor, Tensor]:
    """One scale a token, which meets the columns where there are as many of them."""
    return scaled(h, (largest(h) / 448.0).squeeze(-1))


def of_the_first(h: Tensor) -> tuple[Tensor, Tensor]:
    return scaled(h, (largest(h) / 448.0)[:1])


def double_scale(h: Tensor) -> Tensor:
    return (h.float() / torch.full((), 0.37, dtype=torch.float64)).clamp(-448.0, 448.0).to(q.FP8)


def rounded_twice(h: Tensor) -> tuple[Tensor, Tensor]:
    scale = largest(h) / 127.0
    return (h.float() / scale).round().round().clamp(-128, 127).to(torch.int8), scale


def clamped_twice(h: Tensor) -> tuple[Tensor, Tensor]:
    scale = largest(h) / 448.0
    return (h.float() / scale).clamp(-448.0, 448.0).clamp(-400.0, 448.0).to(q.FP8), scale


def power(up: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda h: scaled(h, up(largest(h) / 448.0))


def exponents(s: Tensor) -> Tensor:
    bits = s.view(torch.int32)
    return (((bits >> 23) + (bits >> 23)) << 22).view(torch.float32)


NEAR: dict[str, Callable[[Tensor], Any]] = {
    **{
        each.__name__: each
        for each in (
            *(other_16_bits, by_itself, squared, scaled_and_doubled, times_scale, magnitudes),
            *(of_columns, of_the_first, double_scale, rounded_twice, clamped_twice),
        )
    },
    "log2 without a whole number": power(lambda s: torch.exp2(torch.log2(s))),
    "log2 of the largest": lambda h: scaled(h, torch.exp2(torch.ceil(torch.log2(largest(h))))),
    "a power of three": power(lambda s: torch.pow(3.0, torch.ceil(torch.log2(s)))),
    "twice rounded up": power(lambda s: torch.exp2(torch.ceil(torch.log2(torch.exp2(torch.ceil(torch.log2(s))))))),
    "bits and back": power(lambda s: s.view(torch.int32).view(torch.float32)),
    "exponents added": power(exponents),
    "a negative bound": power(lambda s: s.clamp(min=-1.0)),
    "bounded three times": lambda h: scaled(h, (largest(h).clamp(min=1e-8) / 448.0).clamp(min=1e-3).clamp(min=1e-2)),
    "bounded behind a power": power(lambda s: torch.exp2(torch.ceil(torch.log2(s))).clamp(min=1e-3)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NEAR)
def test_what_is_nearly_a_quantiser(name: str, dtype: torch.dtype) -> None:
    """Contract *sound*: the norm is fused, and the quantiser, which no spec of the kernels' is, stays in the graph."""
    rows = torch.randn(32, 32, generator=torch.Generator().manual_seed(2)).to(dtype) if name == "of_columns" else None
    assert check(NEAR[name], dtype, rows).fused[0].quantiser is None
