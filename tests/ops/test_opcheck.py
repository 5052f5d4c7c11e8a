"""``torch.library.opcheck`` on every fused op: schema honest, fake right, traceable with dynamic shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from arfusion_pass.ops import layouts, library
from arfusion_pass.ops.schema import SCATTERING_OP
from arfusion_pass.ops.spec import NO_QUANT, QuantFormat, QuantSpec
from tests.ops.cases import SPECS, arguments, outputs

TRACING = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
EVERYTHING = ("test_schema", *TRACING)


def positional(spec: QuantSpec, residual: torch.Tensor | None, weight: torch.Tensor | None) -> tuple[Any, ...]:
    """The epilogue inputs in schema order."""
    return (residual, weight, None, "", 1e-6, 0.0, 0, spec.pack(), spec.bound, 0.5)


def utilities(spec: QuantSpec) -> tuple[str, ...]:
    """``test_schema`` fails inside torch where an output is fp8 or another format without arithmetic."""
    return EVERYTHING if spec.format in (QuantFormat.NONE, QuantFormat.INT8) else TRACING


@pytest.mark.parametrize("name", ["none", *SPECS])
def test_allreduce_rms_norm(name: str) -> None:
    """3-D input, all outputs, each quantiser."""
    spec = SPECS.get(name, NO_QUANT)
    x, residual = torch.randn(2, 3, 128, dtype=torch.bfloat16), torch.randn(6, 128)
    inputs = (x, *positional(spec, residual.to(x.dtype), torch.randn(128)))
    kwargs = outputs((2, 3, 128), x.dtype, spec)
    torch.library.opcheck(library.fused_op("allreduce_rms_norm"), inputs, kwargs, test_utils=utilities(spec))


@pytest.mark.parametrize("name", ["none", "int8", "group_tma"])
def test_sequence_parallel(name: str) -> None:
    """Sequence parallelism's op in a world of one rank, with a block."""
    spec = SPECS.get(name, NO_QUANT)
    x, residual = torch.randn(2, 3, 128, dtype=torch.bfloat16), torch.randn(6, 128)
    inputs = (x, *positional(spec, residual.to(x.dtype), torch.randn(128)), 3)
    kwargs = outputs((2, 3, 128), x.dtype, spec)
    torch.library.opcheck(library.fused_op(SCATTERING_OP), inputs, kwargs, test_utils=utilities(spec))


@pytest.mark.parametrize("name", ["none", "int8", "token"])
def test_moe_reduce(name: str) -> None:
    """MoE reduction in front, with and without the token's own input."""
    spec = SPECS.get(name, NO_QUANT)
    x = torch.randn(3, 5, 128, dtype=torch.bfloat16)
    for token_input in (None, x[0].clone()):
        inputs = (x, torch.rand(3, 5), token_input, *positional(spec, None, x[0, 0].clone()))
        torch.library.opcheck(
            library.fused_op("moe_reduce_allreduce_rms_norm"),
            inputs,
            outputs((5, 128), x.dtype, spec),
            test_utils=utilities(spec),
        )


@pytest.mark.parametrize("name", ["none", "int8", "group_tma"])
def test_moe_finalize(name: str) -> None:
    """MoE finalize in front, with and without router weights and shared expert."""
    spec = SPECS.get(name, NO_QUANT)
    x = torch.randn(7, 128, dtype=torch.float16)
    index = torch.randint(-1, 7, (5, 2), dtype=torch.int32)
    for expert_scale, shared in ((None, None), (torch.rand(5, 2), torch.randn(5, 128, dtype=x.dtype))):
        inputs = (x, index, expert_scale, shared, 2.5, *positional(spec, None, None))
        torch.library.opcheck(
            library.fused_op("moe_finalize_allreduce_rms_norm"),
            inputs,
            outputs((5, 128), x.dtype, spec),
            test_utils=utilities(spec),
        )


@pytest.mark.parametrize("name", ["none", "static", "group_tma", "group_packed", "nvfp4_128x4", "mxfp8_linear"])
def test_dynamic_tokens_stay_dynamic(name: str) -> None:
    """Tracing with a symbolic token count adds no guard on it: one trace serves 2, 5 and 130 tokens."""
    spec = SPECS.get(name, NO_QUANT)
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    context: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(torch.randn(6, 256, dtype=torch.bfloat16), symbolic_context=context)
    with mode:
        kwargs: dict[str, Any] = {"norm_out": torch.empty(x.shape, dtype=x.dtype)}
        if spec.format != QuantFormat.NONE:
            kwargs["quant_out"] = torch.empty(layouts.codes_shape(x.shape, spec), dtype=layouts.codes_dtype(spec))
            allocation = layouts.scale_allocation(x.shape[0], 256, spec)
            if allocation is not None:
                kwargs["scale_out"] = torch.empty(allocation[0], dtype=allocation[1])
        before = len(environment.guards)
        library.fused_op("allreduce_rms_norm")(x, **arguments(spec), **kwargs)
    assert len(environment.guards) == before
    assert isinstance(x.shape[0], torch.SymInt)


def test_compiled_equals_eager() -> None:
    """Under Inductor, a strided producer included, the op gets contiguous inputs and writes what eager writes."""
    spec = SPECS["group_tma"]
    op = library.fused_op("allreduce_rms_norm")

    def run(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        turned = (x + 1).t()
        norm = torch.empty(turned.shape, dtype=turned.dtype)
        codes = torch.empty(turned.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(turned.shape[1] // 32, (turned.shape[0] + 3) // 4 * 4)
        inputs = turned if torch.compiler.is_compiling() else turned.contiguous()
        op(inputs, **arguments(spec, weight=weight), norm_out=norm, quant_out=codes, scale_out=scales)
        return norm, codes.float(), scales

    x, weight = torch.randn(64, 6, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16)
    for compiled, eager in zip(torch.compile(run, fullgraph=True)(x, weight), run(x, weight), strict=True):
        assert torch.equal(compiled, eager)
