"""What a missed site's advice says: of a graph that trains although nobody meant it to, of one that ends too early."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import fx

import arfusion_pass as arf
from arfusion_pass.compilation import runs_as_part
from arfusion_pass.fusion_pass import run
from arfusion_pass.reporting.reports import FusionReport
from tests.models import llama, reduce
from tests.scripts.model import Model, plain, tokens
from tests.simulate import STRICT

pytestmark = pytest.mark.usefixtures("world")


class Seen(Exception):
    """Ends a compilation."""


def report_of(model: Callable[..., Any], *inputs: torch.Tensor, config: arf.FusionConfig = STRICT) -> FusionReport:
    """What the pass says inside torch.compile, which ends there."""
    return reports_of(model, *inputs, config=config)[-1]


def reports_of(
    model: Callable[..., Any], *inputs: torch.Tensor, config: arf.FusionConfig = STRICT
) -> list[FusionReport]:
    """What the pass says of a graph's parts and, last, of the graph."""
    reports: list[FusionReport] = []

    def look(graph: fx.Graph) -> None:
        reports.append(run(graph, config))
        if runs_as_part(graph) is None:
            raise Seen

    torch._dynamo.reset()
    with contextlib.suppress(Exception):  # the compiler wraps ours in its own
        torch.compile(model, options={"post_grad_custom_post_pass": look})(*inputs)
    return reports


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
        (lambda y, r: (y, y.view(2, 2, 32) @ r[:32].T[:32]), False),
        (lambda y, r: (r * torch.sigmoid(y), None), False),
        (lambda y, r: (r + y * y.relu(), None), False),
        (lambda y, r: (torch.nn.functional.layer_norm(r + y, (32,)), None), False),
    ],
)
def test_a_sum_that_leaves_the_graph(behind: Callable[..., tuple[torch.Tensor, ...]], whole: bool) -> None:
    """Layers compiled one by one end in a residual add whose norm is in the next graph: said, and only there. Not of a
    sum that is projected as it is, as an embedding is where norms stand behind the layers: no norm follows it."""

    def layer(x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return behind(reduce(x), r)

    x = torch.randn(4, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        (site,) = report_of(layer, x, x).missed
    assert (site.advice is not None and "in the same graph" in site.advice) == whole


def test_an_all_reduce_in_a_branch() -> None:
    """Of an all-reduce in a graph that another one runs: what it is, and that its norm belongs in there as well."""

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return llama(r + torch.cond(chosen, reduce, torch.relu, (x,)), w, 1e-6)

    x, w = torch.randn(4, 32, dtype=torch.bfloat16), torch.ones(32, dtype=torch.bfloat16)
    with torch.no_grad():
        (site,) = (site for report in reports_of(model, x, x, w, torch.tensor(True)) for site in report.missed)
    assert str(site.advice).startswith("the all-reduce lies in a graph of its own, that of test_advice.py:")
    assert '"return llama(r + torch.cond(' in str(site.advice)


@pytest.mark.parametrize("alone", [True, False])
def test_rows_that_are_taken_behind_the_all_reduce(alone: bool) -> None:
    """The last token's rows could be taken before it, where nobody reads the others."""

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        y = reduce(x @ r)
        last = y.view(2, 4, 32)[:, -1]
        return llama(last + r[:2], w, 1e-6), None if alone else y

    x, w = torch.randn(8, 32, dtype=torch.bfloat16), torch.ones(32, dtype=torch.bfloat16)
    with torch.no_grad():
        (site,) = report_of(model, x, torch.randn(32, 32, dtype=torch.bfloat16), w).missed
    assert "aten.select.int) stands between" in site.reason
    assert (site.advice == "take those rows before the all-reduce: it need not sum the others") == alone, site.advice


def test_a_norm_in_a_region() -> None:
    """Of an all-reduce whose norm is in a graph that its own one runs; what runs such a graph writes to nothing, also
    where a fused call in there writes to buffers of its own."""
    normed, rectified = map(torch.compiler.nested_compile_region, (llama, lambda x, w: llama(reduce(x), w, 1e-6) + 1))

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        y = reduce(x)
        beside = rectified(normed(x, w, 1e-6), w) + rectified(x, w)  # called once, a region is no graph of its own
        return normed(r + reduce(x), w, 1e-6), llama(y + beside, w, 1e-6)

    x, w = torch.randn(4, 32, dtype=torch.bfloat16), torch.ones(32, dtype=torch.bfloat16)
    with torch.no_grad():
        report = report_of(model, x, x, w)
    (site,) = report.missed
    assert re.match(r'its norm models.py:\d+ ".*" \(aten.mul.Tensor\) lies in a graph of its own, that of', site.reason)
    assert "(invoke_subgraph)" in site.reason
    assert report.matched_count == 1


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
