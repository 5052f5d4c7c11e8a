"""Two and three gloo ranks: the ordered all-reduce and each fused op, the same bits on every rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from arfusion_pass.groups import register_group
from arfusion_pass.ops import library, reference
from arfusion_pass.ops.spec import QuantFormat
from tests.helpers import run_ranks
from tests.ops.cases import SPECS, arguments, outputs

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(5, 64), (1, 64), (0, 64), (2, 3, 64)]


def sample(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Rank ``rank``'s input, the same in every process."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * 10.0 ** (2 * rank)).to(dtype)


def everything(rank: int, world: int) -> dict[str, torch.Tensor]:
    """All collective cases of one rank in one process group: {case: result}."""
    group = dist.group.WORLD
    assert group is not None
    register_group("tp:0", group)
    results: dict[str, torch.Tensor] = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            results[f"sum {dtype} {shape}"] = reference.ordered_all_reduce(sample(rank, shape, dtype), group)
    fp8 = sample(rank, (3, 4), torch.float32).to(torch.float8_e4m3fn)
    results["gathered bytes"] = reference.gather_ranks(fp8, group).view(torch.uint8)
    whole = sample(6, (2, 4, 64), torch.bfloat16)
    held = torch.where((torch.arange(8) % world == rank).view(2, 4, 1), whole, float("nan"))
    results["rows of their owners"] = reference.rows_of_owners(held, group)
    assert torch.equal(results["rows of their owners"], whole)
    residual, weight = sample(7, (6, 64), torch.bfloat16), sample(8, (64,), torch.bfloat16)
    for spelling, name in (("c10d", group.group_name), ("registered", "tp:0")):
        spec = SPECS["group_tma"]
        given = outputs((6, 64), torch.bfloat16, spec)
        given["scale_out"].view(torch.uint8).fill_(0)
        inputs = arguments(spec, name, residual=residual, weight=weight)
        library.fused_op("allreduce_rms_norm")(sample(rank, (2, 3, 64), torch.bfloat16), **inputs, **given)
        results.update({f"fused {spelling} {key}": value.view(torch.uint8) for key, value in given.items()})
    out = torch.empty(5, 64, dtype=torch.float16)
    experts = torch.stack([sample(rank, (5, 64), torch.float16), sample(9, (5, 64), torch.float16)])
    scale = torch.full((2, 5), 0.5)
    op = library.fused_op("moe_reduce_allreduce_rms_norm")
    op(experts, scale, None, **arguments(group="tp:0"), allreduce_out=out)
    results["moe"] = out
    return results


@pytest.mark.parametrize("world", [2, 3])
def test_ranks(world: int) -> None:
    """Every rank holds the same bits, and they are those of the one-process formula (fp32 sum in rank order)."""
    first, *others = run_ranks(world, everything)
    for other in others:
        assert first.keys() == other.keys()
        for case, value in first.items():
            assert torch.equal(value, other[case]), case

    for dtype in DTYPES:
        for shape in SHAPES:
            total = sample(0, shape, dtype).float()
            for rank in range(1, world):
                total = total + sample(rank, shape, dtype).float()
            assert torch.equal(first[f"sum {dtype} {shape}"], total.to(dtype))
    parts = [sample(rank, (3, 4), torch.float32).to(torch.float8_e4m3fn).view(torch.uint8) for rank in range(world)]
    assert torch.equal(first["gathered bytes"], torch.stack(parts))

    residual, weight = sample(7, (6, 64), torch.bfloat16), sample(8, (64,), torch.bfloat16)
    reduced = reference.sum_in_rank_order(torch.stack([sample(rank, (6, 64), torch.bfloat16) for rank in range(world)]))
    spec = SPECS["group_tma"]
    given = outputs((6, 64), torch.bfloat16, spec)
    library.fused_op("allreduce_rms_norm")(reduced, **arguments(spec, residual=residual, weight=weight), **given)
    for spelling in ("c10d", "registered"):
        for key, value in given.items():
            assert torch.equal(first[f"fused {spelling} {key}"], value.view(torch.uint8)), (spelling, key)

    local = [
        reference.moe_reduce(
            torch.stack([sample(rank, (5, 64), torch.float16), sample(9, (5, 64), torch.float16)]),
            torch.full((2, 5), 0.5),
            None,
            0,
        )
        for rank in range(world)
    ]
    assert torch.equal(first["moe"], reference.sum_in_rank_order(torch.stack(local)))
    assert spec.format == QuantFormat.FP8


def fail_on_one(rank: int, world: int) -> None:
    """Rank 1 raises while the others wait for it."""
    if rank == 1:
        raise ValueError("told to fail")
    dist.barrier()


def test_helper_reports_the_failing_rank() -> None:
    """``run_ranks`` raises the failing rank's own traceback and does not wait for the others."""
    with pytest.raises(RuntimeError, match=r"rank 1 failed with exit code 1[\s\S]*told to fail"):
        run_ranks(2, fail_on_one)
