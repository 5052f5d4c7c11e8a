"""Bytes that a site moves, by the formula of :mod:`arfusion_pass.reporting.traffic`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import arfusion_pass as arf
from tests.models import Tensor, llama, reduce
from tests.simulate import captured, fused_copy, symbolic, tensors, trace

pytestmark = pytest.mark.usefixtures("world")
T, H = 4, 32
ROW = 2 * T * H
"""Bytes of one bf16 tensor [T, H]."""
W = 2 * H


def add_norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = r + reduce(x)
    return llama(total, w, 1e-6), total


def norm_only(x: Tensor, w: Tensor) -> Tensor:
    return llama(reduce(x), w, 1e-6)


def all_three(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = reduce(x)
    total = r + y
    return llama(total, w, 1e-6), total, y


def site(report: arf.FusionReport) -> arf.Site:
    (only,) = report.fused
    return only


@pytest.mark.parametrize(
    ("fn", "shapes", "unfused", "fused"),
    [
        (add_norm, ((T, H), (T, H), (H,)), (1 + 1) * ROW + (2 + 2) * ROW + W, (2 + 2) * ROW + W),
        (norm_only, ((T, H), (H,)), (1 + 1) * ROW + (1 + 1) * ROW + W, (1 + 1) * ROW + W),
        (all_three, ((T, H), (T, H), (H,)), (1 + 1) * ROW + (2 + 2) * ROW + W, (2 + 3) * ROW + W),
    ],
)
def test_what_a_site_moves(fn: object, shapes: tuple[tuple[int, ...], ...], unfused: int, fused: int) -> None:
    """One all-reduce and one kernel for the rest, against one kernel."""
    found = site(fused_copy(trace(fn, *tensors(*shapes)))[1])  # type: ignore[arg-type]
    assert (found.bytes_unfused, found.bytes_fused) == (unfused, fused)
    assert (found.shape, found.tokens) == ((T, H), T)


def test_a_symbolic_size_counts_as_it_was_traced() -> None:
    found = site(fused_copy(trace(add_norm, *symbolic(("s", H), ("s", H), (H,))))[1])
    assert isinstance(found.shape[0], str)
    assert found.tokens is not None
    assert found.bytes_fused == 4 * 2 * found.tokens * H + W


def test_views_move_nothing() -> None:
    def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = r + reduce(x).view(2, 2, H)
        return llama(total, w, 1e-6), total

    found = site(fused_copy(trace(fn, *tensors((T, H), (2, 2, H), (H,))))[1])
    assert (found.bytes_unfused, found.bytes_fused) == (6 * ROW + W, 4 * ROW + W)


def test_a_missed_site_has_a_shape_and_no_bytes() -> None:
    (found,) = fused_copy(trace(lambda x: reduce(x) @ x.t(), *tensors((T, H))))[1].missed
    assert found.shape == (T, H)
    assert found.bytes_unfused is found.bytes_fused is None


def test_a_compiled_module_says_where_it_is() -> None:
    """Dynamo records lines and modules; both reach the report."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = torch.nn.Linear(H, H, bias=False)
            self.weight = torch.nn.Parameter(torch.ones(H))

        def forward(self, x: Tensor) -> Tensor:
            y = reduce(self.down(x)) + x
            return F.rms_norm(y, (H,), self.weight, 1e-6)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    with torch.no_grad():
        graph = captured(Model().bfloat16(), tensors((T, H)))
    sites = fused_copy(graph)[1].fused
    assert [each.module for each in sites] == ["layers.0", "layers.1"]
    for each in sites:
        assert each.source is not None
        assert (each.source.place.split(":")[0], each.source.function) == ("models.py", "reduce")
        assert "all_reduce" in each.source.code
