"""What eager CUDA computes otherwise than CPU, read from graphs of fake CUDA tensors; no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import arfusion_pass as arf
from arfusion_pass.ops.spec import Apply, QuantSpec, ScaleRule
from tests import quant_cases as q
from tests.dialects import engine_ops
from tests.simulate import STRICT

pytestmark = pytest.mark.usefixtures("world")
auto_functionalized = torch.ops.higher_order.auto_functionalized


def fused_call(model: Callable[..., Any], device: str, scale: tuple[int, ...] = (1,)) -> fx.Node:
    """The one fused call of ``model`` on fake tensors of a device."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x, r = (torch.empty(6, q.HIDDEN, dtype=torch.bfloat16, device=device) for _ in range(2))
        w, s = torch.empty(q.HIDDEN, dtype=torch.bfloat16, device=device), torch.empty(scale, device=device)
    whole = torch.func.functionalize(q.reduced(model))
    module = make_fx(whole, decomposition_table=select_decomp_table(), tracing_mode="fake")(x, r, w, s)
    report = arf.fuse(module, STRICT)
    assert report.matched_count == 1, str(report)
    (call,) = module.graph.find_nodes(op="call_function", target=auto_functionalized)
    return call


def spec_of(call: fx.Node) -> QuantSpec:
    return QuantSpec.unpack(call.kwargs["quant"], call.kwargs["quant_bound"])  # type: ignore[arg-type]


@pytest.mark.parametrize("quantiser", [q.token, q.group, q.int8_token, q.token_torchao])
def test_division_by_a_number(quantiser: Callable[..., Any]) -> None:
    """``amax / 448.0`` multiplies by fp32(1 / 448) in eager CUDA, and divides on CPU."""
    assert spec_of(fused_call(q.site(quantiser), "cuda")).scale_rule == ScaleRule.MULTIPLY
    assert spec_of(fused_call(q.site(quantiser), "cpu")).scale_rule == ScaleRule.DIVIDE


def test_ir_ops_divide_as_their_native_form() -> None:
    """vLLM's dynamic IR ops are torch code: what they divide by 448 is multiplied on CUDA, as that code would be."""
    engine_ops.register_vllm()

    def token(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = torch.ops.vllm_ir.dynamic_quant_fp8(h, True, q.FP8)
        return codes, scales

    def group(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = torch.ops.vllm_ir.dynamic_group_quant_fp8(h, [1, 64], False, False, q.FP8)
        return codes, scales

    for quantiser in (token, group):
        assert spec_of(fused_call(q.site(quantiser), "cuda")).scale_rule == ScaleRule.MULTIPLY
        assert spec_of(fused_call(q.site(quantiser), "cpu")).scale_rule == ScaleRule.DIVIDE


def test_zero_dim_scale() -> None:
    """A 0-dim fp32 scale is rounded to bf16 before it divides bf16 on CUDA: the fused call takes the rounded one."""
    call = fused_call(q.site(q.static_div), "cuda", scale=())
    scale = call.kwargs["scale"]
    assert isinstance(scale, fx.Node)
    assert scale.target is torch.ops.prims.convert_element_type.default
    assert scale.args[1] == torch.bfloat16
    assert spec_of(call).in_dtype
    on_cpu = fused_call(q.site(q.static_div), "cpu", scale=()).kwargs["scale"]
    assert isinstance(on_cpu, fx.Node)
    assert on_cpu.op == "placeholder"
    wide = fused_call(q.site(q.static_div), "cuda", scale=(1,)).kwargs["scale"]
    assert isinstance(wide, fx.Node)
    assert wide.op == "placeholder"


def test_static_number() -> None:
    """``h / 0.0517`` is a multiplication by the reciprocal on CUDA."""
    call = fused_call(q.site(q.static_number), "cuda")
    assert spec_of(call).apply == Apply.MULTIPLY
    assert call.kwargs["scale_value"] == float(torch.tensor(1 / 0.0517))
    call = fused_call(q.site(q.static_number), "cpu")
    assert spec_of(call).apply == Apply.DIVIDE
    assert call.kwargs["scale_value"] == 0.0517


def test_ambiguous_number() -> None:
    """Where 1 / s differs in fp64 and fp32, the quantiser is left alone: eager may take either."""

    def model(y: torch.Tensor, r: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return (q.llama(r + y, w) / 0.0123).clamp(-448, 448).to(q.FP8)

    assert fused_call(model, "cuda").kwargs["quant"] == 0
    assert fused_call(model, "cpu").kwargs["quant"] != 0
