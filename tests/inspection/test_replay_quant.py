"""The replay's verdict on quantised outputs: right where they are right, and wrong where one bit is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import arfusion_pass as arf
from arfusion_pass.dialects import Quantised, aten_quant
from arfusion_pass.inspection import replay
from arfusion_pass.ops.spec import Apply
from tests import quant_cases as q
from tests.post_grad import compiled
from tests.simulate import STRICT, simulated_ranks

pytestmark = pytest.mark.usefixtures("world")
CASE = q.Case(q.site(q.group_column), "", shape=(6, 512))


@pytest.fixture
def recorder() -> Iterator[replay.Recorder]:
    """A compiled site with column-major scales that was run once; the call does not write its norm."""
    with simulated_ranks(), replay.recording() as recorder:
        torch._dynamo.reset()
        compiled(q.reduced(CASE.model), arf.AllReduceFusionPass(STRICT))(*q.inputs(CASE, 0))
        yield recorder


def test_right(recorder: replay.Recorder) -> None:
    """Codes and scales agree bit for bit with the subgraph's quantiser on the norm of the call run again."""
    (check,) = recorder.checks()
    assert check.ok, check.detail
    assert {role: output.mismatched for role, output in check.outputs.items()} == {
        "residual_out": 0,
        "quant_out": 0,
        "scale_out": 0,
    }


@pytest.mark.parametrize("role", ["quant_out", "scale_out"])
def test_one_bit(recorder: replay.Recorder, role: str) -> None:
    """One flipped bit in one element is found, and so is the difference from the second run."""
    recorder.sites[0].calls[0].outputs[role].view(torch.uint8).view(-1)[5] ^= 1
    (check,) = recorder.checks()
    assert not check.ok
    assert check.outputs[role].mismatched == 1
    assert f"{role}: another result when run again" in check.detail


def test_layout(recorder: replay.Recorder) -> None:
    """Scales that lie in memory row by row where the graph has columns are wrong, though their values are right."""
    scales = recorder.sites[0].calls[0].outputs["scale_out"]
    scales.copy_(scales.t().contiguous().view(scales.shape))
    (check,) = recorder.checks()
    assert not check.ok
    assert check.outputs["scale_out"].mismatched > 0


def test_wrong_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recogniser that takes a division for a multiplication by the reciprocal is caught by its codes."""
    right = aten_quant._quantised

    def wrong(*args: Any) -> Any:
        found = right(*args)
        assert isinstance(found, Quantised)
        return dataclasses.replace(found, spec=dataclasses.replace(found.spec, apply=Apply.RECIPROCAL))

    monkeypatch.setattr(aten_quant, "_quantised", wrong)
    case = dataclasses.replace(CASE, shape=(64, 4096))
    with simulated_ranks(), replay.recording() as recorder:
        torch._dynamo.reset()
        compiled(q.reduced(case.model), arf.AllReduceFusionPass(STRICT))(*q.inputs(case, 0))
        (check,) = recorder.checks()
    assert not check.ok
    assert check.outputs["quant_out"].mismatched > 0
    assert check.outputs["scale_out"].mismatched == 0
