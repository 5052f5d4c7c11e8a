"""How far a norm may be off, and how a site is replayed."""

from __future__ import annotations

import pytest
import torch

import arfusion_pass as arf
from arfusion_pass.inspection import replay
from arfusion_pass.inspection.replay import compare, norm_values
from arfusion_pass.ops.spec import Flags
from tests.models import Tensor, llama, reduce
from tests.simulate import STRICT, copied, run, simulated_ranks, symbolic, trace

BF16 = torch.bfloat16


def test_two_values_only_where_the_graph_rounds_before_the_weight() -> None:
    """Contract: a 16-bit norm is off by one value at most, and by two only behind a rounding before the weight."""
    weight = torch.ones(8, dtype=BF16)
    assert norm_values(0, weight, BF16) == 1
    assert norm_values(int(Flags.ROUND_BEFORE_WEIGHT), None, BF16) == 1
    assert norm_values(int(Flags.ROUND_BEFORE_WEIGHT), weight, torch.float32) == 1
    assert norm_values(int(Flags.ROUND_BEFORE_WEIGHT), weight, BF16) == 2


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_an_fp32_norm_behind_a_rounding_to_16_bits(dtype: torch.dtype) -> None:
    """A rounding that fell otherwise is a whole 16-bit value there, not 4 ulp: seen where a norm by division has an
    fp32 weight. As rarely as in a 16-bit norm, and nowhere else."""
    unit, weight = torch.ones(2000), torch.full((2000,), 0.98)
    other = unit.clone()
    other[7] = torch.finfo(dtype).eps + 1
    check = compare(other * weight, unit * weight)
    assert check.mismatched == 1
    values = norm_values(int(Flags.ROUND_BEFORE_WEIGHT), weight, dtype, torch.float32)
    assert replay._problem("norm_out", check, torch.float32, values) is None
    assert replay._problem("norm_out", check, torch.float32, norm_values(0, weight, dtype, torch.float32)) is not None
    assert replay._problem("residual_out", check, torch.float32, values) is not None
    other[:4] = torch.finfo(dtype).eps + 1
    assert replay._problem("norm_out", compare(other, unit), torch.float32, values) is not None, "too many"


def test_why_two() -> None:
    """Contract: neighbours in bf16 that a weight multiplies can be two values apart, as the docstring says."""
    one = torch.ones(1, dtype=BF16)
    above = torch.nextafter(one, torch.full_like(one, 2.0))
    weight = torch.full_like(one, 0.98)
    assert compare(one, above).max_ulp == 1
    assert compare(one * weight, above * weight).max_ulp == 2


@pytest.mark.parametrize("prologue", [False, True])
def test_symbol_known_by_its_multiple(world: None, prologue: bool) -> None:
    """A subgraph that needs the symbol ``s`` is replayed where every input has ``2 * s`` rows, and where the fused
    call reduces rows that the graph views in three dimensions."""

    def model(x: Tensor, index: Tensor, w: Tensor) -> Tensor:
        rows = x.reshape(-1, 32)
        if prologue:
            rows = rows[index.reshape(-1, 2).clamp(min=0)].sum(1)
        return llama(reduce(rows.reshape(x.shape)), w, 1e-6)

    x, w = symbolic((2, "s", 32), (32,))
    index = x[..., :2].long()
    module = trace(model, x, index, w)
    fused = copied(module)
    with replay.recording() as recorder:
        assert arf.fuse(fused, STRICT).matched_count == 1
        run(fused, [torch.randn(2, 5, 32, dtype=BF16), torch.randint(0, 9, (2, 5, 2)), torch.ones(32, dtype=BF16)])
    with simulated_ranks():
        assert [check.detail for check in recorder.checks()] == ["within the contract"]


def test_what_a_tensor_reduced_in_place_was_is_not_replayed(world: None) -> None:
    """``copy`` leaves nothing of what it writes over: what that was computed of is no input of the site. Nor does it
    stand between another all-reduce and a norm."""

    def model(x: Tensor, other: Tensor, r: Tensor, w: Tensor) -> Tensor:
        before = reduce(x + other)
        return llama(torch.ops.aten.copy(before, reduce(before * 2)) + r, w, 1e-6)

    inputs = [torch.randn(4, 32), torch.randn(4, 32), torch.randn(4, 32), torch.randn(32)]
    module = trace(model, *inputs)
    with replay.recording() as recorder:
        (missed,) = arf.fuse(module, STRICT).missed
        run(module, inputs)
    assert "copy" not in str(missed.reason)
    with simulated_ranks():
        assert [check.detail for check in recorder.checks()] == ["within the contract"]


def test_a_sum_that_the_fused_call_takes_in_another_shape_of_as_many_dimensions(world: None) -> None:
    """Reduced as a column, and read as the row that it is a view of."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return llama(r + reduce(x.t()).t(), w, 1e-6)

    inputs = [torch.randn(1, 32), torch.randn(1, 32), torch.randn(32)]
    module = trace(model, *inputs)
    with replay.recording() as recorder:
        assert arf.fuse(module, STRICT).matched_count == 1
        run(module, inputs)
    with simulated_ranks():
        assert [check.detail for check in recorder.checks()] == ["within the contract"]


def test_a_site_whose_subgraph_reads_more_than_its_call_takes_is_not_run(world: None) -> None:
    """It is told so, once, and its calls are not compared: what it reads is known by its shape alone."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return llama(reduce(x) + r, w, 1e-6)

    module = trace(model, torch.randn(4, 32), torch.randn(4, 32), torch.randn(32))
    with replay.recording() as recorder:
        arf.fuse(module, STRICT)
        run(module, [torch.randn(4, 32), torch.randn(4, 32), torch.randn(32)])
    (site,) = recorder.sites
    with simulated_ranks():
        assert [check.ok for check in recorder.checks()] == [True]
        site.unsupported = "its subgraph reads index, which the fused call does not take"
        site.inputs.clear()  # so that running it would fail
        (check,) = recorder.checks()
    assert (check.ok, check.detail) == (False, site.unsupported)


def test_a_recording_that_has_ended_keeps_no_more_calls(world: None) -> None:
    """The model runs on, with the same results, and nothing is copied of it any more. What was recorded stays."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return llama(reduce(x) + r, w, 1e-6)

    inputs = [torch.randn(4, 32), torch.randn(4, 32), torch.randn(32)]
    module = trace(model, *inputs)
    with replay.recording() as recorder:
        arf.fuse(module, STRICT)
        first = run(module, inputs)
    assert all(map(torch.equal, first, run(module, inputs)))
    assert [len(site.calls) for site in recorder.sites] == [1]
    with simulated_ranks():
        assert [check.ok for check in recorder.checks()] == [True]
