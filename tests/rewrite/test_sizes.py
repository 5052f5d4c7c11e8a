"""A value of a site that is asked for its size alone: nobody reads it, and the size is still right."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx

import arfusion_pass as arf
from arfusion_pass.inspection.graph_diff import print_graph
from arfusion_pass.rewrite import sizes
from tests.models import Tensor, llama, reduce
from tests.sequence_parallel import gather, scatter
from tests.simulate import check_same, check_unchanged, fake_world, fused_copy, symbolic, trace

WORLD, HIDDEN, EPSILON = 2, 32, 1e-6
aten = torch.ops.aten
c10d = torch.ops._c10d_functional


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with fake_world(WORLD):
        yield


def replicated(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r + reduce(x)
    return llama(total, w, EPSILON), total


def scattered(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    total = r + scatter(x, WORLD)
    return gather(llama(total, w, EPSILON), WORLD), total


def alone(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (reduce(x),)


def asked(model: Callable[..., Any], of: Any, live: bool, target: Any = aten.sym_size.int) -> fx.GraphModule:
    """A graph of ``model`` in which the first call of ``of`` is asked for a size, doubled, and used or not."""
    module = trace(
        model, *symbolic(("s", HIDDEN), ("t" if model is scattered else "s", HIDDEN), (HIDDEN,), hints={"s": 8, "t": 4})
    )
    graph = module.graph
    value = graph.find_nodes(op="call_function", target=of)[0]
    with graph.inserting_after(value):
        size = graph.call_function(target, (value, 0) if target is aten.sym_size.int else (value,))
    tensor = value.meta["val"]
    size.meta["val"] = tensor.shape[0] if target is aten.sym_size.int else tensor.numel()
    with graph.inserting_after(size):
        twice = graph.call_function(operator.mul, (size, 2))
    twice.meta["val"] = size.meta["val"] * 2
    if live:
        output = graph.output_node()
        output.args = ((*output.args[0], twice),)
    module.recompile()
    return module


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("target", [aten.sym_size.int, aten.sym_numel.default])
@pytest.mark.parametrize(
    ("model", "of"),
    [
        (replicated, c10d.wait_tensor.default),
        (replicated, aten.rsqrt.default),
        (replicated, aten.pow.Tensor_Scalar),
        (scattered, c10d.wait_tensor.default),
    ],
)
def test_a_size_is_no_reader(model: Callable[..., Any], of: Any, target: Any, live: bool) -> None:
    """Of the reduced value, or of one inside the norm: the site fuses without it, and the size is what it was."""
    module = asked(model, of, live, target)
    fused, report = fused_copy(module)
    (site,) = report.fused
    assert not report.missed and site.outputs == ("residual_out", "norm_out"), str(report)
    check_same(module, fused, **({"s": 6, "t": 3} if model is scattered else {"s": 6}))


@pytest.mark.parametrize("live", [False, True])
def test_a_graph_that_fuses_nothing_keeps_its_sizes(live: bool) -> None:
    """Node for node, the readers of a size included."""
    check_unchanged(asked(alone, c10d.wait_tensor.default, live))


def test_asked_by_name() -> None:
    """A call that a pass wrote with its operands by name is one, and no error."""
    module = asked(replicated, c10d.wait_tensor.default, True)
    (size,) = module.graph.find_nodes(op="call_function", target=aten.sym_size.int)
    size.args, size.kwargs = (), {"self": size.args[0], "dim": size.args[1]}
    module.recompile()
    fused, report = fused_copy(module)
    assert report.fused[0].outputs == ("residual_out", "norm_out"), str(report)
    check_same(module, fused, s=6)


def test_an_error_leaves_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass never raises, whatever it meets while it looks at sizes."""

    def fail(*_: object) -> None:
        raise RuntimeError("no size")

    monkeypatch.setattr(sizes.SizeSource, "find", fail)
    module = asked(replicated, c10d.wait_tensor.default, True)
    before = print_graph(module.graph)
    assert "no size" in str(arf.fuse(module).note)
    assert print_graph(module.graph) == before
