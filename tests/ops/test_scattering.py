"""Sequence parallelism's op: who owns which rows, what it takes and gives of them, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from arfusion_pass.ops import layouts, library, reference
from arfusion_pass.ops.schema import SCATTERING_OP
from arfusion_pass.ops.spec import Flags
from tests.helpers import run_ranks
from tests.ops.cases import SPECS, arguments, outputs
from tests.simulate import fake_world

BF16 = torch.bfloat16
HIDDEN = 128


def call(x: torch.Tensor, **given: Any) -> None:
    library.fused_op(SCATTERING_OP)(x, **{**arguments(group="0"), **given})


RIGHT: dict[str, Any] = {"residual": torch.zeros(3, 64, dtype=BF16), "norm_out": torch.empty(6, 64, dtype=BF16)}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "residual of all rows": ({"residual": torch.zeros(6, 64, dtype=BF16)}, "residual must be .* 3 tokens of 64"),
    "sum of all rows": ({"residual_out": torch.empty(6, 64, dtype=BF16)}, "residual_out must be .* 3 tokens of 64"),
    "norm of the own rows": ({"norm_out": torch.empty(3, 64, dtype=BF16)}, "norm_out must be .* 6 tokens of 64"),
    "block": ({"block": 2}, "6 tokens cannot be dealt to 2 ranks in blocks of 2 each"),
    "negative block": ({"block": -1}, "block must not be negative, got -1"),
    "flags": ({"flags": int(Flags.RESIDUAL_IN_SHARDED)}, "always holds this rank's rows"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    """A ValueError that says what is needed, before any rank sends anything."""
    changes, message = WRONG[name]
    with fake_world(2), pytest.raises(ValueError, match=message):
        call(torch.zeros(6, 64, dtype=BF16), **{**RIGHT, **changes})


def test_uneven() -> None:
    """Tokens that the ranks cannot share evenly: the model has to pad them."""
    with fake_world(2), pytest.raises(ValueError, match="5 tokens cannot be dealt to 2 ranks in one block each"):
        call(torch.zeros(5, 64, dtype=BF16), norm_out=torch.empty(5, 64, dtype=BF16))


CASES = (
    *(("none", 0, 6), ("none", 1, 12), ("none", 0, 0), ("int8", 0, 12), ("static", 3, 18)),
    *(("group_tma", 2, 24), ("mxfp8_128x4", 2, 12)),
)
"""Quantiser, block, tokens."""


def _rows(rank: int, world: int) -> list[str]:
    """Every case against the collectives written out; what differs."""
    wrong = []
    for name, block, tokens in CASES:
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(tokens, HIDDEN, generator=generator).to(BF16)
        residual = torch.randn(tokens // world, HIDDEN, generator=generator).to(BF16)
        weight = torch.rand(HIDDEN, generator=torch.Generator().manual_seed(9)).to(BF16)
        spec = SPECS.get(name)
        given = outputs((tokens, HIDDEN), BF16, *([] if spec is None else [spec]))
        given.update(outputs((tokens // world, HIDDEN), BF16) | {"norm_out": given["norm_out"]})
        extra = {} if spec is None else {"quant": spec.pack(), "quant_bound": spec.bound}
        call(x, residual=residual, weight=weight, block=block, **extra, **given)
        owner = torch.arange(tokens) // (block or max(tokens // world, 1)) % world
        mine = torch.empty_like(residual)
        if tokens:
            dist.reduce_scatter_tensor(mine, torch.cat([x[owner == each] for each in range(world)]))
        result = reference.epilogue(mine, residual, weight, None, **({} if spec is None else {"spec": spec}))
        assert result.norm is not None
        whole = {"norm_out": result.norm.to(BF16), "quant_out": result.codes, "scale_out": result.scales}
        for role, value in whole.items():
            if value is None:
                continue
            everyone = reference.gather_ranks(value, dist.group.WORLD)
            rows = torch.empty((tokens, *value.shape[1:]), dtype=value.dtype)
            for each in range(world):
                rows.view(torch.uint8)[owner == each] = everyone[each].view(torch.uint8)
            got = given[role]
            if role == "scale_out":
                assert spec is not None
                got = layouts.read_scales(got, tokens, HIDDEN, spec)
            if not torch.equal(got.reshape(-1).view(torch.uint8), rows.reshape(-1).view(torch.uint8)):
                wrong.append(f"{name} {block} {tokens}: {role}")
        for role, value in (("allreduce_out", mine), ("residual_out", result.total.to(BF16))):
            if not torch.equal(given[role], value):
                wrong.append(f"{name} {block} {tokens}: {role}")
    return wrong


@pytest.mark.parametrize("world", [3])
def test_rows(world: int) -> None:
    """Contract *exact*: each rank has the bits of its own reduce-scatter and epilogue, and gets everybody's."""
    assert run_ranks(world, _rows) == [[]] * world
