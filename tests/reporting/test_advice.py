"""What a missed site's advice says: of a graph that trains although nobody meant it to, of one that ends too early."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import fx

import arfusion_pass as arf
from arfusion_pass.fusion_pass import run
from arfusion_pass.reporting.reports import FusionReport
from tests.models import reduce
from tests.scripts.model import Model, plain, tokens
from tests.simulate import STRICT

pytestmark = pytest.mark.usefixtures("world")


class Seen(Exception):
    """Ends a compilation."""


def report_of(model: Callable[..., Any], *inputs: torch.Tensor, config: arf.FusionConfig = STRICT) -> FusionReport:
    """What the pass says inside torch.compile, which ends there."""
    reports: list[FusionReport] = []

    def look(graph: fx.Graph) -> None:
        reports.append(run(graph, config))
        raise Seen

    torch._dynamo.reset()
    with contextlib.suppress(Exception):  # the compiler wraps ours in its own
        torch.compile(model, options={"post_grad_custom_post_pass": look})(*inputs)
    return reports[0]


@pytest.mark.parametrize("mode", [torch.inference_mode, contextlib.nullcontext])
def test_a_leaf_made_under_inference_mode_is_named(mode: type) -> None:
    """It cannot be trained, so the call was meant to be under the mode too; other models have no such line."""
    with mode():
        model = Model(plain)
    (first, second) = report_of(model, tokens()).missed
    assert "torch.no_grad()" in str(first.advice)
    assert ("layers.0.down.weight was made under torch.inference_mode()" in str(first.advice)) == (
        mode is torch.inference_mode
    )
    assert first.advice == second.advice, "layers share a row"


@pytest.mark.parametrize(
    ("behind", "whole"),
    [
        (lambda y, r: (r + y, None), True),
        (lambda y, r: ((r.float() + y.float()).to(y.dtype).view(-1, 32), None), True),
        (lambda y, r: (y, y.sum()), True),
        (lambda y, r: (r * torch.sigmoid(y), None), False),
        (lambda y, r: (r + y * y.relu(), None), False),
        (lambda y, r: (torch.nn.functional.layer_norm(r + y, (32,)), None), False),
    ],
)
def test_a_sum_that_leaves_the_graph(behind: Callable[..., tuple[torch.Tensor, ...]], whole: bool) -> None:
    """Layers compiled one by one end in a residual add whose norm is in the next graph: said, and only there."""

    def layer(x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return behind(reduce(x), r)

    x = torch.randn(4, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        (site,) = report_of(layer, x, x).missed
    assert (site.advice is not None and "in the same graph" in site.advice) == whole


def test_a_training_step_that_would_fuse_is_left_alone() -> None:
    """With activation checkpoints the forward keeps nothing of the inside of a norm, and its backward computes all of
    it again, unfused."""

    def model(x: torch.Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(whole, x, use_reentrant=False)

    whole = Model(plain)
    for config in (STRICT, dataclasses.replace(STRICT, reassociate=True)):
        missed = report_of(model, tokens(), config=config).missed
        assert {site.reason for site in missed} == {
            "its graph is half of a training step, and only inference graphs are fused"
        }
        assert all((site.advice or "").startswith("this is a training graph: ") for site in missed)
