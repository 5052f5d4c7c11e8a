"""What the pass does to the real graphs of ``a_*`` and ``b_*``: the difference is kept in ``tests/golden``.

Each model is compiled by torch.compile up to Inductor's post-grad hook, where the graph is taken and the compilation
ended. ``pytest --update-golden`` writes the files anew: read the difference before you commit it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import fx, nn

from arfusion_pass.inspection import graph_diff, print_graph
from arfusion_pass.testing import assert_fused
from tests.models import Tensor, fp32_result, gemma, llama, reduce, torch_norm
from tests.simulate import captured, check_same, fused_copy, tensors

GOLDEN = pathlib.Path(__file__).parent / "golden"
T, H = 8, 64
X, W = (T, H), (H,)
EPS = 1e-6

pytestmark = pytest.mark.usefixtures("world")


def weight(size: int = H) -> nn.Parameter:
    return nn.Parameter(torch.ones(size, dtype=torch.bfloat16), requires_grad=False)


def a01_norm(x: Tensor, w: Tensor) -> Tensor:
    return torch_norm(reduce(x), w, EPS)


def a03_add_norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = r + reduce(x)
    return torch_norm(total, w, EPS), total


def a05_add_reversed(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = reduce(x) + r
    return torch_norm(total, w, EPS), total


def a06_fp32_weight(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = r + reduce(x)
    return torch_norm(total, w.float(), EPS).to(x.dtype), total


def a07_no_epsilon(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = r + reduce(x)
    return torch_norm(total, w, None), total


def rare_inputs(x: Tensor, r: Tensor, w: Tensor, b: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """A bias behind the residual, epsilon in a buffer, a division by the root."""
    total = (reduce(x) + r) + b
    h = total.float()
    return (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + epsilon.float()) * w).to(x.dtype), total


def a08_linear_3d(x: Tensor, r: Tensor, w: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    total = r + reduce(F.linear(x, up))
    return F.linear(torch_norm(total, w, EPS), down), total


def a09_dist_on_input(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    dist.all_reduce(x)
    total = r + x
    return torch_norm(total, w, EPS), total


def a10_dist_on_linear(x: Tensor, r: Tensor, w: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    y = F.linear(x, up)
    dist.all_reduce(y)
    total = r + y
    return torch_norm(total, w, EPS), total


def a13_fp32_sum(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = reduce(x).float() + r.float()
    return fp32_result(total, w, EPS).to(x.dtype), total.to(x.dtype)


def b_gemma(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = r + reduce(x)
    return gemma(total, w, EPS), total


def b_gemma2_sandwich(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    total = r + gemma(reduce(x), w, EPS)
    return gemma(total, v, EPS), total


def b_llama(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = r + reduce(x)
    return llama(total, w, EPS), total


def b_llama_embed_first_layer(x: Tensor, z: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    embedded = reduce(x)
    hidden = llama(embedded, w, EPS)
    total = embedded + reduce(z * hidden)
    return llama(total, v, EPS), total


def b_llama_multiuser(x: Tensor, r: Tensor, w: Tensor, router: Tensor) -> tuple[Tensor, ...]:
    total = r + reduce(x)
    norm = llama(total, w, EPS)
    return norm, norm @ router, F.silu(norm), total


def b_moe_shared_before_ar(x: Tensor, shared: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = r + reduce(x + shared)
    return llama(total, w, EPS), total


X3 = (1, T, H)
CASES: dict[Callable[..., Any], tuple[list[tuple[int, ...]], bool, int]] = {
    a01_norm: ([X, W], False, 1),
    a03_add_norm: ([X, X, W], False, 1),
    a05_add_reversed: ([X, X, W], False, 1),
    a06_fp32_weight: ([X, X, W], False, 1),
    a07_no_epsilon: ([X, X, W], False, 1),
    rare_inputs: ([X, X, W, W, (1,)], False, 1),
    a08_linear_3d: ([(2, T, 32), (2, T, H), W, (H, 32), (32, H)], False, 1),
    a09_dist_on_input: ([X, X, W], False, 1),
    a10_dist_on_linear: ([(T, 32), X, W, (H, 32)], False, 1),
    a13_fp32_sum: ([X, X, W], False, 1),
    b_gemma: ([X3, X3, W], False, 1),
    b_gemma2_sandwich: ([X3, X3, W, W], True, 1),
    b_llama: ([X3, X3, W], True, 1),
    b_llama_embed_first_layer: ([X, X, W, W], True, 2),
    b_llama_multiuser: ([X, X, W, (H, 8)], True, 1),
    b_moe_shared_before_ar: ([X, X, X, W], True, 1),
}


Golden = Callable[[pathlib.Path, str], None]


def check_golden(name: str, module: fx.GraphModule, fused: fx.GraphModule, golden: Golden) -> None:
    """The graph's difference is the one in ``golden/name.txt``."""
    golden(GOLDEN / f"{name}.txt", graph_diff(print_graph(module.graph), print_graph(fused.graph)))


@pytest.mark.parametrize("model", CASES, ids=lambda model: model.__name__)
def test_golden(model: Callable[..., Any], golden: Golden) -> None:
    """Torch's own graph, as of 2.13, turns into exactly this one; on any torch it fuses to the same bits.

    Odd cases are compiled with a symbolic token count: the difference holds the symbol, and no size is fixed.
    """
    shapes, dynamic, count = CASES[model]
    module = captured(model, tensors(*shapes), dynamic=T if dynamic else None)
    fused, report = fused_copy(module)
    assert_fused(report, count)
    for tokens in (5, 8) if dynamic else (T,):
        check_same(module, fused, tokens=tokens)
    if torch.__version__.startswith("2.13."):  # names and folded casts differ from release to release
        check_golden(model.__name__, module, fused, golden)


def test_training_graph(golden: Golden) -> None:
    """``a14_grad_train``: the forward graph of a training step stays as it is."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        return torch_norm(r + reduce(x), w, EPS).float().pow(2).sum()

    inputs = [tensor.requires_grad_() for tensor in tensors(X, X, W)]
    module = captured(model, inputs)
    before = print_graph(module.graph)
    fused, report = fused_copy(module)
    assert "training graph" in str(report.missed[0].reason)
    assert print_graph(fused.graph) == before


def test_dynamic_true() -> None:
    """``torch.compile(dynamic=True)`` makes a module's epsilon a graph input: refused with advice, unchanged."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.epsilon = weight(), EPS

        def forward(self, x: Tensor) -> Tensor:
            return llama(reduce(x), self.weight, self.epsilon)

    module = captured(Norm(), tensors(X), options_dynamic=True)
    fused, report = fused_copy(module)
    if report.missed:
        assert "mark_dynamic" in str(report.missed[0].reason)
    else:  # where it is a number after all
        check_same(module, fused, tokens=3)
