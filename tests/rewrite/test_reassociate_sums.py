"""``FusionConfig(reassociate=True)`` on sums of many all-reduces, and on random linear steps in front of a norm."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable

import pytest
import torch

from arfusion_pass.rewrite import hindrances, raising
from tests import simulate
from tests.rewrite.test_reassociate import HIDDEN, MOVING, Tensor, norm, reduce
from tests.simulate import STRICT, c10d, calls, fused_copy, random_inputs, run, tensors, trace

pytestmark = pytest.mark.usefixtures("world")


def in_a_chain(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def from_behind(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, reversed(parts))


def in_a_tree(parts: list[Tensor]) -> Tensor:
    while len(parts) > 1:
        parts = [a if b is None else a + b for a, b in itertools.zip_longest(parts[::2], parts[1::2])]
    return parts[0]


@pytest.mark.parametrize("summed", [in_a_chain, from_behind, in_a_tree])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_many_summed_all_reduces(
    monkeypatch: pytest.MonkeyPatch, summed: Callable[[list[Tensor]], Tensor], scale: float | None
) -> None:
    """One all-reduce an expert, all summed in front of one norm: what the pass looks at grows with them, not with
    their square, and moved they are one."""
    looked = []
    for module in (hindrances, raising):
        norms_of = module.norms_of
        monkeypatch.setattr(module, "norms_of", lambda node, of=norms_of: looked.append(node) or of(node))

    def model(x: Tensor, w: Tensor) -> Tensor:
        parts = [reduce(x * expert) for expert in range(count)]
        return norm(summed(parts if scale is None else [part * scale for part in parts]), w)

    for count in (80, 20):
        module = trace(model, *tensors((4, HIDDEN), (HIDDEN,), dtype=torch.float32))
        for config in (STRICT, MOVING):
            looked.clear()
            fused, report = fused_copy(module, config)
            assert len(looked) < 20 * count  # a copy of the graph is tried first
        assert report.matched_count == count
        assert calls(fused, c10d.all_reduce.default) == 0


def test_a_chain_is_summed_in_its_order() -> None:
    """``(a + b) + c`` of three all-reduces is one all-reduce of ``(a + b) + c``: as a rank reads its own program."""

    def model(x: Tensor, y: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return norm((reduce(x) + reduce(y)) + reduce(z), w)

    def before(x: Tensor, y: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return norm(reduce((x + y) + z), w)

    inputs = tensors(*[(4, HIDDEN)] * 3, (HIDDEN,))
    moved, expected = (fused_copy(trace(each, *inputs), MOVING)[0] for each in (model, before))
    simulate.check_same(expected, moved)


class Steps:
    """A function of two tensors and a residual ``[T, H]``, a weight ``[H]`` and a gate ``[T, 1]``, decided by a seed:
    all-reduces with linear steps behind them, summed in random order in front of a norm, in one to three layers."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, x: Tensor, y: Tensor, r: Tensor, w: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        choose = random.Random(self.seed)
        returned, total = [], r
        steps: list[Callable[[Tensor], Tensor]] = [
            lambda v: v * 0.22,
            lambda v: v * w,
            lambda v: v * gate,
            lambda v: v + w,
            lambda v: v + y,
            lambda v: -v,
            lambda v: torch.sub(y, v, alpha=2),
            lambda v: v.view(1, *v.shape).sum(0),
        ]
        for _ in range(choose.randint(1, 3)):
            parts = []
            for _ in range(choose.randint(1, 5)):
                part = reduce(choose.choice((x, y, total)))
                for step in choose.choices(steps, k=choose.choice((0, 0, 1, 2))):
                    part = step(part)
                parts.append(part)
                if choose.random() < 0.1:
                    returned.append(part)
            while len(parts) > 1:
                at = choose.randrange(len(parts) - 1)
                parts[at : at + 2] = [parts[at] + parts[at + 1] * choose.choice((1, 1, 0.5))]
            total = total + parts[0]
            x = norm(total, w)
            returned.append(x)
        return (*returned, total)


@pytest.mark.parametrize("seed", range(24))
def test_random_steps(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """What is moved computes what it did, up to rounding, where ranks that share their weights sum."""
    monkeypatch.setattr(simulate, "all_reduce", lambda x, group: x * 3)  # linear, as three ranks that send alike are
    module = trace(Steps(seed), *tensors(*[(4, HIDDEN)] * 3, (HIDDEN,), (4, 1), dtype=torch.float32))
    module.graph.eliminate_dead_code()
    fused, report = fused_copy(module, MOVING)
    assert report.note is None
    for wanted, got in zip(run(module, inputs := random_inputs(module)), run(fused, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
