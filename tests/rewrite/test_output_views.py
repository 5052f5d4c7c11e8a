"""Buffers of quantised outputs and the views that give them the graph's shape, strides and dtype: nothing is copied."""

from __future__ import annotations

import pytest
import torch

from arfusion_pass.ops import layouts
from arfusion_pass.ops.spec import QuantFormat, QuantSpec, ScaleLayout, ScaleRound
from arfusion_pass.rewrite.output_views import codes_layout, scale_layout
from tests.simulate import symbolic

FP8, INT8, NVFP4, MXFP8 = QuantFormat.FP8, QuantFormat.INT8, QuantFormat.NVFP4, QuantFormat.MXFP8
STATIC, TOKEN, GROUP = (QuantSpec(FP8, group) for group in (0, -1, 128))
COLUMN = QuantSpec(FP8, 128, ScaleLayout.COLUMN)
TMA = QuantSpec(FP8, 128, ScaleLayout.COLUMN_TMA)
PACKED = QuantSpec(FP8, 128, ScaleLayout.PACKED_UE8M0, scale_round=ScaleRound.POW2)
FP4 = QuantSpec(NVFP4, 16, ScaleLayout.SWIZZLED_128X4)
FP4_LINEAR = QuantSpec(NVFP4, 16, ScaleLayout.LINEAR)
MX = QuantSpec(MXFP8, 32, ScaleLayout.SWIZZLED_128X4)
F32, I32, U8 = torch.float32, torch.int32, torch.uint8


def strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype)


@pytest.mark.parametrize(
    ("spec", "target", "steps"),
    [
        (TOKEN, torch.empty(6, 1), []),
        (TOKEN, torch.empty(6), ["reshape"]),
        (GROUP, torch.empty(6, 2), []),
        (GROUP, torch.empty(6, 2, 1), ["reshape"]),
        (GROUP, torch.empty(3, 2, 2), []),
        (COLUMN, strided((6, 2), (1, 6), F32), ["permute"]),
        (COLUMN, torch.empty(2, 6), []),
        (COLUMN, strided((6, 2, 1), (1, 6, 1), F32), ["permute", "reshape"]),
        (COLUMN, strided((3, 2, 2), (2, 1, 6), F32), ["permute", "reshape"]),
        (TMA, strided((6, 2), (1, 8), F32), ["permute", "slice"]),
        (TMA, torch.empty(2, 8), []),
        (PACKED, strided((6, 1), (1, 8), I32), ["permute", "slice"]),
        (FP4, torch.empty(128, 16, dtype=torch.float8_e4m3fn), []),
        (FP4, torch.empty(128, 4, dtype=I32), ["dtype"]),
        (FP4, torch.empty(2048, dtype=U8), ["reshape"]),
        (FP4, torch.empty(512, dtype=I32), ["dtype", "reshape"]),
        (FP4_LINEAR, torch.empty(6, 16, dtype=U8), []),
        (MX, torch.empty(128, 8, dtype=torch.float8_e8m0fnu), []),
        (MX, torch.empty(1024, dtype=U8), ["reshape"]),
    ],
)
def test_scales(spec: QuantSpec, target: torch.Tensor, steps: list[str]) -> None:
    """The buffer is what the op allocates, and its views end in the target's dtype, shape and strides."""
    layout = scale_layout((6, 256), spec, target)
    assert layout is not None
    assert [step.op for step in layout.steps] == steps
    buffer = torch.arange(1, 1 + torch.Size(layout.shape).numel()).to(layout.dtype).view(layout.shape)
    view = layout.view(buffer)
    assert (view.dtype, view.shape) == (target.dtype, target.shape)
    assert all(a == b for size, a, b in zip(view.shape, view.stride(), target.stride(), strict=True) if size != 1)
    assert view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    allocation = layouts.scale_allocation(6, 256, spec)
    assert allocation is not None
    assert buffer.numel() == torch.Size(allocation[0]).numel()


def test_column_values() -> None:
    """What the op writes group by group is read token by token."""
    scales = torch.randn(6, 2)
    for spec, ld in ((COLUMN, 6), (TMA, 8)):
        layout = scale_layout((6, 256), spec, strided((6, 2), (1, ld), F32))
        assert layout is not None
        buffer = torch.empty(layout.shape)
        layouts.write_scales(scales, buffer, 256, spec)
        assert torch.equal(layout.view(buffer), scales)


@pytest.mark.parametrize(
    ("spec", "target"),
    [
        (GROUP, strided((6, 2), (1, 6), F32)),  # row-major rows read as columns
        (COLUMN, torch.empty(6, 2)),  # columns read as rows: as many elements, other places
        (TMA, strided((6, 2), (1, 6), F32)),  # another padding
        (GROUP, torch.empty(6, 3)),
        (FP4, torch.empty(6, 16, dtype=U8)),  # not padded
        (PACKED, strided((6, 2), (1, 8), F32)),
    ],
)
def test_no_view(spec: QuantSpec, target: torch.Tensor) -> None:
    """A tensor that would need a copy is refused."""
    assert scale_layout((6, 256), spec, target) is None


def test_codes() -> None:
    """Rows keep the graph's shape; groups and packed pairs are views of rows."""
    fp8 = torch.float8_e4m3fn
    for shape, steps in (((6, 256), []), ((2, 3, 256), []), ((6, 2, 128), ["reshape"]), ((1536,), ["reshape"])):
        layout = codes_layout((6, 256), GROUP, torch.empty(shape, dtype=fp8))
        assert layout is not None
        assert [step.op for step in layout.steps] == steps
    packed = codes_layout((6, 256), FP4, torch.empty(6, 128, dtype=U8))
    assert packed is not None
    assert packed.shape == (6, 128)
    assert codes_layout((6, 256), GROUP, torch.empty(6, 255, dtype=fp8)) is None
    assert codes_layout((6, 256), INT8_TOKEN, torch.empty(256, 6, dtype=torch.int8).t()) is None


INT8_TOKEN = QuantSpec(INT8, -1)


def test_symbolic_tokens() -> None:
    """A symbolic count stays symbolic and no guard is added."""
    (rows,) = symbolic(("t", 256))
    tokens = rows.shape[0]
    shape_env = tokens.node.shape_env  # type: ignore[union-attr]
    guards = len(shape_env.guards)
    with rows.fake_mode:  # type: ignore[attr-defined]
        target = torch.empty_strided((tokens, 2), (1, (tokens + 3) // 4 * 4))
    layout = scale_layout(rows.shape, TMA, target)
    assert layout is not None
    assert [step.op for step in layout.steps] == ["permute", "slice"]
    assert all(isinstance(size, torch.SymInt) for size in (layout.shape[1], layout.steps[-1].shape[0]))
    assert scale_layout(rows.shape, COLUMN, target) is None
    assert len(shape_env.guards) == guards
