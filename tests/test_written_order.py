"""Inductor's CPU code runs a fused call before what reads its outputs, and every other custom op likewise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import arfusion_pass as arf
from tests.models import llama, reduce


def test_no_loop_runs_before_the_op_that_writes_what_it_reads(world: None) -> None:
    """A router's sigmoid, joined with a loop over its bias, stands behind the op that writes the logits (a GLM-4 MoE:
    torch 2.13 put it in front of everything)."""
    library = torch.library.Library("toy_router", "DEF")
    library.define("mm(Tensor! out, Tensor a, Tensor b) -> ()")
    library.impl("mm", lambda out, a, b: (out.copy_(a @ b), None)[1], "CPU")
    torch.library.register_fake("toy_router::mm", lambda out, a, b: None, lib=library)

    def model(x: Tensor, r: Tensor, w: Tensor, gate: Tensor, up: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        r = r + reduce(x)
        norm = llama(r, w, 1e-5)
        logits, hidden = norm.new_empty(len(norm), 8, dtype=torch.float32), torch.empty_like(norm)
        torch.ops.toy_router.mm(logits, norm.float(), gate)
        torch.ops.toy_router.mm(hidden, norm, up)
        scores = logits.sigmoid()
        _, chosen = torch.topk(scores + bias, 2)
        weights = scores.gather(1, chosen)
        y = hidden * (weights / weights.sum(-1, keepdim=True)).sum(-1, keepdim=True).to(norm.dtype) + norm
        r = r + reduce(y)
        return llama(r, w, 1e-5), r

    shapes = ((5, 64), (5, 64), (64,))
    rows = [torch.randn(shape).bfloat16() for shape in shapes]
    inputs = (*rows, torch.randn(64, 8), torch.randn(64, 64).bfloat16(), torch.zeros(8))
    torch._dynamo.reset()
    with torch.no_grad():
        _, (code, *_) = run_and_get_code(
            torch.compile(model, options=arf.inductor_options(fx_graph_cache=False)), *inputs
        )
    calls = [line for line in code[code.index("def call") :].splitlines() if "(" in line]
    (loop,) = (place for place, line in enumerate(calls) if "cpp_fused" in line and "sigmoid" in line)
    assert [place for place, line in enumerate(calls) if "toy_router.mm" in line and place < loop] != []
    read = calls[loop].partition("(")[2].split(",")[0]
    assert any(f"mm.default({read}," in line for line in calls[:loop]), "\n".join(calls)
