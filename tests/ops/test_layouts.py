"""Scale layouts: every scale where its consumer reads it, every byte of padding 0, nothing outside written."""

from __future__ import annotations

import itertools

import pytest
import torch

from arfusion_pass.ops import layouts
from arfusion_pass.ops.spec import QuantFormat, QuantSpec, ScaleLayout, ScaleRound
from tests.ops.cases import logical_view

POW2 = ScaleRound.POW2
TOKENS = [1, 2, 3, 4, 5, 8, 9, 127, 128, 129, 160]
GROUPS = [1, 3, 4, 5, 8]


def spec_of(layout: ScaleLayout) -> QuantSpec:
    """A quantiser of groups of 32 with that layout."""
    if layout in (ScaleLayout.SWIZZLED_128X4, ScaleLayout.SWIZZLED_8X4, ScaleLayout.LINEAR):
        return QuantSpec(QuantFormat.MXFP8, 32, layout)
    rounding = POW2 if layout == ScaleLayout.PACKED_UE8M0 else ScaleRound.FP32
    return QuantSpec(QuantFormat.FP8, 32, layout, scale_round=rounding)


def random_scales(tokens: int, groups: int, spec: QuantSpec) -> torch.Tensor:
    """Logical scales, none of them 0."""
    if spec.format == QuantFormat.MXFP8:
        return torch.randint(1, 255, (tokens, groups), dtype=torch.uint8)
    scales = torch.rand(tokens, groups) + 0.1
    return torch.exp2(torch.randint(-100, 100, scales.shape).float()) if spec.scale_round == POW2 else scales


@pytest.mark.parametrize("layout", ScaleLayout)
def test_round_trip_and_padding(layout: ScaleLayout) -> None:
    """What is written is read back; the rest of the buffer is 0, and there is as much of it as the layout says."""
    spec = spec_of(layout)
    for tokens, groups in itertools.product(TOKENS, GROUPS):
        hidden = 32 * groups
        scales = random_scales(tokens, groups, spec)
        buffer = layouts.allocate_scales(tokens, hidden, spec, "cpu")
        assert buffer is not None
        buffer.view(torch.uint8).fill_(0xA5)
        layouts.write_scales(scales, buffer, hidden, spec)
        assert torch.equal(layouts.read_scales(buffer, tokens, hidden, spec), scales)
        unit = torch.uint8 if layout == ScaleLayout.PACKED_UE8M0 else buffer.dtype
        assert int((buffer.view(unit) != 0).sum()) == tokens * groups


@pytest.mark.parametrize("layout", [ScaleLayout.COLUMN, ScaleLayout.COLUMN_TMA, ScaleLayout.PACKED_UE8M0])
def test_column_major_logical_view(layout: ScaleLayout) -> None:
    """The logical strided view takes the same bytes as the transpose, and the memory around it is left alone."""
    spec = spec_of(layout)
    for tokens, groups in itertools.product(TOKENS, GROUPS):
        hidden = 32 * groups
        scales = random_scales(tokens, groups, spec)
        columns = int(layouts.column_count(hidden, spec))
        ld = int(layouts.leading_dimension(tokens, spec))
        span = (columns - 1) * ld + tokens
        memory = torch.full((span + 16,), 99, dtype=layouts.scale_dtypes(spec)[0])
        view = memory.as_strided((tokens, columns), (1, ld), 8)
        layouts.write_scales(scales, view, hidden, spec)
        transposed = layouts.allocate_scales(tokens, hidden, spec, "cpu")
        assert transposed is not None
        layouts.write_scales(scales, transposed, hidden, spec)
        assert torch.equal(memory[8:-8], transposed.view(-1)[:span])
        assert torch.equal(view, logical_view(transposed, tokens, spec))
        assert (memory[:8] == 99).all()
        assert (memory[-8:] == 99).all()
        assert torch.equal(layouts.read_scales(view, tokens, hidden, spec), scales)


def test_packed_words() -> None:
    """Byte ``g % 4`` of word ``(g / 4) * pad4(T) + t`` is the biased exponent (FlashInfer 8 and 9, DeepGEMM)."""
    spec = spec_of(ScaleLayout.PACKED_UE8M0)
    scales = torch.exp2(torch.arange(10.0).view(2, 5))
    buffer = torch.full((2, 4), -1, dtype=torch.int32)
    layouts.write_scales(scales, buffer, 160, spec)
    raw = buffer.view(-1).view(torch.uint8)
    for token, group in itertools.product(range(2), range(5)):
        assert raw[(group // 4 * 4 + token) * 4 + group % 4] == 127 + 5 * token + group


@pytest.mark.parametrize(
    ("layout", "rows"), [(ScaleLayout.SWIZZLED_128X4, 128), (ScaleLayout.SWIZZLED_8X4, 8)], ids=["128x4", "8x4"]
)
def test_swizzle_is_a_permutation_of_tiles(layout: ScaleLayout, rows: int) -> None:
    """The index equals the layout spelled as reshape and transpose (cuBLAS's block-scaling layout), a bijection."""
    tokens, groups = 2 * rows, 12
    index = layouts.swizzled_index(torch.arange(tokens).unsqueeze(1), torch.arange(groups).unsqueeze(0), groups, layout)
    logical = torch.arange(tokens * groups).view(tokens, groups)
    if rows == 128:
        tiles = logical.view(tokens // 128, 4, 32, groups // 4, 4).permute(0, 3, 2, 1, 4)
    else:
        tiles = logical.view(tokens // 8, 8, groups // 4, 4).permute(0, 2, 1, 3)
    assert torch.equal(tiles.reshape(-1)[index.view(-1)].view(tokens, groups), logical)
    assert sorted(index.view(-1).tolist()) == list(range(tokens * groups))


def test_allocation_shapes() -> None:
    """Whole tiles, column-major scales transposed; MXFP8 has ceil(H / 128) tiles a row of tiles, NVFP4 ceil(H / 64)."""
    mx, nv = spec_of(ScaleLayout.SWIZZLED_128X4), QuantSpec(QuantFormat.NVFP4, 16, ScaleLayout.SWIZZLED_8X4)
    assert layouts.scale_allocation(5, 160, mx) == ((128, 8), torch.uint8)
    assert layouts.scale_allocation(9, 80, nv) == ((16, 8), torch.float8_e4m3fn)
    assert layouts.scale_allocation(5, 160, spec_of(ScaleLayout.COLUMN)) == ((5, 5), torch.float32)
    assert layouts.scale_allocation(5, 160, spec_of(ScaleLayout.COLUMN_TMA)) == ((5, 8), torch.float32)
    assert layouts.scale_allocation(5, 160, spec_of(ScaleLayout.PACKED_UE8M0)) == ((2, 8), torch.int32)
    assert layouts.scale_allocation(5, 160, QuantSpec(QuantFormat.INT8, -1)) == ((5, 1), torch.float32)
    assert layouts.scale_allocation(5, 160, QuantSpec(QuantFormat.FP8)) is None
