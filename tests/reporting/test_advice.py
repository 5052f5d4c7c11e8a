"""What a missed site's advice says of a graph that trains although nobody meant it to."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import fx

from arfusion_pass.fusion_pass import run
from arfusion_pass.reporting.reports import FusionReport
from tests.scripts.model import Model, plain, tokens
from tests.simulate import STRICT

pytestmark = pytest.mark.usefixtures("world")


class Seen(Exception):
    """Ends a compilation."""


def report_of(model: torch.nn.Module) -> FusionReport:
    """What the pass says inside torch.compile, which ends there."""
    reports: list[FusionReport] = []

    def look(graph: fx.Graph) -> None:
        reports.append(run(graph, STRICT))
        raise Seen

    torch._dynamo.reset()
    with contextlib.suppress(Exception):  # the compiler wraps ours in its own
        torch.compile(model, options={"post_grad_custom_post_pass": look})(tokens())
    return reports[0]


@pytest.mark.parametrize("mode", [torch.inference_mode, contextlib.nullcontext])
def test_a_leaf_made_under_inference_mode_is_named(mode: type) -> None:
    """It cannot be trained, so the call was meant to be under the mode too; other models have no such line."""
    with mode():
        model = Model(plain)
    (first, second) = report_of(model).missed
    assert "torch.no_grad()" in str(first.advice)
    assert ("layers.0.down.weight was made under torch.inference_mode()" in str(first.advice)) == (
        mode is torch.inference_mode
    )
    assert first.advice == second.advice, "layers share a row"
