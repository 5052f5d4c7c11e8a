"""How far a norm may be off."""

from __future__ import annotations

import torch

from arfusion_pass.inspection.replay import compare, norm_values
from arfusion_pass.ops.spec import Flags

BF16 = torch.bfloat16


def test_two_values_only_where_the_graph_rounds_before_the_weight() -> None:
    """Contract: a 16-bit norm is off by one value at most, and by two only behind a rounding before the weight."""
    weight = torch.ones(8, dtype=BF16)
    assert norm_values(0, weight, BF16) == 1
    assert norm_values(int(Flags.ROUND_BEFORE_WEIGHT), None, BF16) == 1
    assert norm_values(int(Flags.ROUND_BEFORE_WEIGHT), weight, torch.float32) == 1
    assert norm_values(int(Flags.ROUND_BEFORE_WEIGHT), weight, BF16) == 2


def test_why_two() -> None:
    """Contract: neighbours in bf16 that a weight multiplies can be two values apart, as the docstring says."""
    one = torch.ones(1, dtype=BF16)
    above = torch.nextafter(one, torch.full_like(one, 2.0))
    weight = torch.full_like(one, 0.98)
    assert compare(one, above).max_ulp == 1
    assert compare(one * weight, above * weight).max_ulp == 2
