"""Random chains of sites with other nodes in between: fused or not, a graph means the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models import NORMS, OTHER_ROOTS, Tensor, fp32_result, reduce, unrounded_sum
from tests.simulate import STRICT, c10d, calls, check_same, fake_world, fused_copy, symbolic, tensors, trace

HIDDEN = 16
EPSILONS = (1e-5, 1e-6, 3e-6, 1e-2)
EXACT = [name for name in NORMS if name not in OTHER_ROOTS]  # its root is spelled with other roundings


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with fake_world(3):
        yield


class Program:
    """A random function over a pool of ``[T, H]`` tensors, decided by a seed and written out again at every call."""

    def __init__(self, seed: int, steps: int) -> None:
        self.seed, self.steps = seed, steps

    def __call__(self, x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        choose = random.Random(self.seed)
        rows, weights = [x, r], [w, v]
        for _ in range(self.steps):
            self.step(choose, rows, weights)
        choose.shuffle(rows)
        return tuple(rows[: choose.randint(1, len(rows))])

    def step(self, choose: random.Random, rows: list[Tensor], weights: list[Tensor]) -> None:
        """One site, or one node that gets in the way."""
        kind = choose.choices(("site", "reduce", "row", "weight", "shape", "root"), (6, 1, 4, 1, 1, 1))[0]
        a, b, w = choose.choice(rows), choose.choice(rows), choose.choice(weights)
        if kind == "site":
            self.site(choose, rows, a, b, w)
        elif kind == "reduce":
            rows.append(reduce(a))
        elif kind == "row":
            op = choose.choice((torch.relu, torch.neg, torch.tanh, lambda t: t + b, lambda t: t * w, lambda t: b - t))
            rows.append(op(a))
        elif kind == "weight":
            op = choose.choice((lambda t: t + 1, lambda t: t * 2, lambda t: t + a.amax(0), torch.neg))
            weights.append(op(w))
        elif kind == "shape":
            rows.append(a.reshape(-1, 1, HIDDEN).relu().reshape(-1, HIDDEN))
        else:
            h = reduce(a).float()
            root = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            rows += [(h * root * w).to(a.dtype), (a * root).to(a.dtype)]

    def site(self, choose: random.Random, rows: list[Tensor], a: Tensor, b: Tensor, w: Tensor) -> None:
        epsilon, norm = choose.choice(EPSILONS), NORMS[choose.choice(EXACT)]
        y = reduce(a)
        form = choose.choice(("plain", "left", "right", "fp32 sum", "fp32 residual", "late", "gate"))
        if form == "plain":
            total = y
        elif form == "left":
            total = b + y
        elif form == "right":
            total = y + b
        elif form == "late":
            total = y + torch.tanh(b)
        elif form == "gate":
            total = b + torch.sigmoid(choose.choice(rows) @ w[:, None]) * y
        elif form == "fp32 sum":
            n, total = unrounded_sum(y, b, w, epsilon, fp32_result)
            rows += [n, total]
            return
        else:
            wide = b.float() + y
            rows += [fp32_result(wide, w, epsilon).to(a.dtype), wide.to(a.dtype)]
            return
        if choose.random() < 0.3:
            rows.append(total.relu())
        if choose.random() < 0.3:
            total = total.view(1, -1, HIDDEN)
        n = norm(total, w, epsilon).to(a.dtype).reshape(-1, HIDDEN)
        rows.append(n)
        if choose.random() < 0.7:
            rows.append(total.reshape(-1, HIDDEN))
        if choose.random() < 0.3:
            rows.append(norm(total, w, epsilon).to(a.dtype).reshape(-1, HIDDEN).neg())


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 12),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    dynamic=st.booleans(),
)
def test_random_graph(seed: int, steps: int, dtype: torch.dtype, dynamic: bool) -> None:
    """Contracts *sound* and *exact*: a valid graph with the same bits, one collective left for each missed site, a
    reason for each of those, and every all-reduce in the report, in graph order."""
    make: Any = symbolic if dynamic else tensors
    rows = ("tokens" if dynamic else 4, HIDDEN)
    module = trace(Program(seed, steps), *make(rows, rows, (HIDDEN,), (HIDDEN,), dtype=dtype))
    names = [node.name for node in module.graph.find_nodes(op="call_function", target=c10d.all_reduce.default)]
    fused, report = fused_copy(module, STRICT)
    assert [site.name for site in report.sites] == names
    assert all(site.reason for site in report.missed)
    assert calls(fused, c10d.all_reduce.default) == len(report.missed)
    assert calls(fused, torch.ops.higher_order.auto_functionalized) == report.matched_count
    check_same(module, fused, tokens=3)
