"""NaN, infinite, subnormal and all-zero rows through every quantiser in plain torch: the fused graph's codes and scales
are the unfused one's, bit for bit, whether the quantiser was fused or left."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("dtype", rs.DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_special_values(name: str, dtype: torch.dtype) -> None:
    rows = special_rows(dtype)
    if name in IR:
        engine_ops.register_vllm()

    def model(x: Tensor, w: Tensor) -> list[Tensor]:
        wide = reduce(x).float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return rs._quantise(name, (wide * w.float()).to(x.dtype), torch.tensor(0.37))

    module = trace(model, torch.empty_like(rows), torch.empty(q.HIDDEN, dtype=dtype))
    fused, report = fused_copy(module)
    assert report.matched_count == 1
    for kind in WEIGHTS:
        inputs = [rows, special_weight(kind, dtype)]
        for a, b in zip(run(module, inputs)[:-2], run(fused, inputs)[:-2], strict=True):
            if a.dtype.is_floating_point:
                assert torch.equal(a.float().nan_to_num(7), b.float().nan_to_num(7)), f"{kind}: {report}"
                assert torch.equal(a.float().signbit() | a.float().isnan(), b.float().signbit() | b.float().isnan())
            else:
                assert torch.equal(a, b), f"{kind}: {report}"
