"""A graph without an all-reduce says why, where it can be known."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as nn_functional
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

import arfusion_pass as arf
from tests import post_grad
from tests.models import Tensor, llama, reduce
from tests.simulate import STRICT, c10d, check_unchanged, tensors, trace

pytestmark = pytest.mark.usefixtures("world")


def test_other_collective() -> None:
    """A reduce-scatter that no norm follows: the report names it."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        return c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", 2, "0")) * w

    report = check_unchanged(trace(model, *tensors((4, 32), (32,))))
    assert report.sites == ()
    assert "reduce_scatter_tensor" in str(report.note)
    assert "reduce_scatter_tensor" in str(report)


def test_graph_before_autograd() -> None:
    """A back-end that gives Dynamo's own graph is told which one to give."""
    notes = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        notes.append(arf.fuse(module, STRICT).note)
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(lambda x, w: llama(reduce(x), w, 1e-6), backend=backend)(torch.randn(4, 32), torch.ones(32))
    assert "is a call as Dynamo traces it" in notes[0] and "aot_autograd" in notes[0]


def test_graph_break_at_a_collective() -> None:
    """``async_op=True`` breaks the graph: no graph holds the all-reduce, and the report says where it went."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        work = dist.all_reduce(x, async_op=True)
        work.wait()
        return llama(x, w, 1e-6)

    torch._dynamo.reset()
    fusion = arf.AllReduceFusionPass(STRICT)
    post_grad.compiled(model, fusion)(torch.randn(4, 32).bfloat16(), torch.ones(32).bfloat16())
    assert "async_op=True" in str(fusion.report)


@pytest.mark.skipif(not hasattr(nn_functional, "_not_supported_under_compile"), reason="this torch traces it")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_collective_that_raises_while_it_is_traced() -> None:
    """Dynamo leaves the whole function to Python, and compiles the norm by itself: its report says what it met."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        return llama(nn_functional.all_reduce(x), w, 1e-6)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fusion = arf.AllReduceFusionPass(STRICT)
    with torch.no_grad():
        post_grad.compiled(model, fusion)(torch.randn(4, 32).bfloat16(), torch.ones(32).bfloat16())
    (report,) = fusion.reports
    assert "torch.distributed.nn.functional.all_reduce is not supported under torch.compile" in str(report.note)
    assert "_functional_collectives.all_reduce" in str(report.note), "what to call instead"


def test_ops_of_somebodys_own() -> None:
    """A collective or a norm that the pass does not know is called that, and not by what is missing."""
    library = torch.library.Library("arfusion_test_own", "DEF")
    library.define("all_reduce(Tensor x) -> Tensor")
    library.define("rms_norm(Tensor x, Tensor w) -> Tensor")
    own = torch.ops.arfusion_test_own
    for name in ("all_reduce", "rms_norm"):
        torch.library.register_fake(f"arfusion_test_own::{name}", lambda x, w=None: torch.empty_like(x), lib=library)
    report = check_unchanged(trace(lambda x, w: llama(own.all_reduce(x), w, 1e-6), *tensors((4, 32), (32,))))
    assert "no all-reduce that the pass knows: all_reduce (arfusion_test_own.all_reduce" in str(report.note)
    report = check_unchanged(trace(lambda x, w: own.rms_norm(x + reduce(x), w), *tensors((4, 32), (32,))))
    (site,) = report.missed
    assert "rms_norm (arfusion_test_own.rms_norm.default) is an op that the pass does not know" in str(site.reason)


def test_a_triton_kernel_of_somebodys_own() -> None:
    """Liger's and Unsloth's norms are Triton kernels: the graph holds a launch, and the reason names the kernel."""

    def _rms_layernorm_forward() -> None: ...

    @dataclasses.dataclass(frozen=True)
    class Holds:
        fn: object

    tuned: Any = Holds(Holds(_rms_layernorm_forward))  # as an autotuner and the kernel in it
    module = trace(lambda x, y: x + reduce(x), *tensors((4, 32), (4, 32)))
    *_, total, output = module.graph.nodes
    arguments = {"kernel_idx": kernel_side_table.add_kernel(tuned), "constant_args_idx": 0, "grid": [(4, 1, 1)]}
    arguments |= {"tma_descriptor_metadata": {}, "kwargs": {"X": total}, "tensors_to_clone": []}
    with module.graph.inserting_before(output):
        module.graph.call_function(torch.ops.higher_order.triton_kernel_wrapper_functional, (), arguments)
    (site,) = check_unchanged(module).missed
    assert "launches a Triton kernel, _rms_layernorm_forward, that the pass cannot look into" in str(site.reason)


def test_nothing_to_say() -> None:
    """A graph that has nothing to do with a collective has no note."""
    assert check_unchanged(trace(lambda x: x.relu(), *tensors((4, 32)))).note is None
