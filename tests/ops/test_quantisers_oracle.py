"""The reference quantisers against an independent oracle (numpy, value tables), over all specs and awkward values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arfusion_pass.ops import quantisers
from arfusion_pass.ops.checks import check_spec
from arfusion_pass.ops.spec import Apply, Bound, QuantFormat, QuantSpec, ScaleLayout, ScaleRound, ScaleRule
from tests.ops import oracle

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AWKWARD = [0.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, 448.0, 449.0, 464.0, -480.0, 65504.0, 3e38, np.inf, -np.inf, np.nan]


def valid(spec: QuantSpec) -> bool:
    try:
        check_spec(spec)
    except ValueError:
        return False
    return True


formats = st.sampled_from(
    [
        (QuantFormat.FP8, 0, ScaleLayout.ROW),
        (QuantFormat.FP8, -1, ScaleLayout.ROW),
        (QuantFormat.FP8, 32, ScaleLayout.ROW),
        (QuantFormat.FP8, 64, ScaleLayout.COLUMN),
        (QuantFormat.INT8, -1, ScaleLayout.ROW),
        (QuantFormat.MXFP8, 32, ScaleLayout.LINEAR),
        (QuantFormat.NVFP4, 16, ScaleLayout.LINEAR),
    ]
)


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    """Any spec that the checks accept, clamped (without a clamp the result is this torch's own cast)."""
    form, group, layout = draw(formats)
    plain = form == QuantFormat.NVFP4
    fixed = plain or (form == QuantFormat.FP8 and group == 0)
    pick = lambda values, default: default if fixed else draw(st.sampled_from(list(values)))  # noqa: E731
    spec = QuantSpec(
        form,
        group,
        layout,
        unrounded=draw(st.booleans()),
        bound_on=pick(Bound, Bound.NONE),
        scale_rule=pick(ScaleRule, ScaleRule.DIVIDE),
        scale_round=pick(ScaleRound, ScaleRound.FP32),
        apply=Apply.DIVIDE if plain else draw(st.sampled_from(list(Apply))),
        in_dtype=False if plain else draw(st.booleans()),
        bound=0.0 if fixed else draw(st.sampled_from([0.0, 1e-10, 1e-12, 1e-4, 4.3597e-06, 0.3])),
    )
    return spec if valid(spec) else QuantSpec(form, group, layout, spec.unrounded)


@st.composite
def norms(draw: st.DrawFn) -> np.ndarray:
    """A small fp32 matrix: normal values over many magnitudes, some rows zero, some elements awkward."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens, hidden = draw(st.integers(1, 4)), 64
    values = rng.standard_normal((tokens, hidden)) * 10.0 ** draw(st.integers(-8, 6))
    matrix = values.astype(np.float32)
    for row, column, value in draw(
        st.lists(
            st.tuples(st.integers(0, tokens - 1), st.integers(0, hidden - 1), st.sampled_from(AWKWARD)), max_size=4
        )
    ):
        matrix[row, column] = value
    if draw(st.booleans()):
        matrix[0] = draw(st.sampled_from([0.0, -0.0]))
    return matrix


def assert_same_bits(got: torch.Tensor, wanted: np.ndarray) -> None:
    """Equal as bytes; fp32 NaN equals NaN, and e4m3 NaN of either sign."""
    if wanted.dtype == np.float32:
        np.testing.assert_array_equal(got.numpy(), wanted)
        assert np.array_equal(np.signbit(got.numpy()), np.signbit(wanted)) or np.isnan(wanted).any()
        return
    found = got.contiguous().view(torch.uint8).numpy()
    if got.dtype == torch.float8_e4m3fn:
        found = np.where(found & 0x7F == 0x7F, 0x7F, found)
    np.testing.assert_array_equal(found, wanted.view(np.uint8))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(spec=specs(), norm=norms(), dtype=st.sampled_from(list(DTYPES)), scale=st.sampled_from([1.0, 0.37, 3e-3, 57.0]))
def test_every_spec(spec: QuantSpec, norm: np.ndarray, dtype: str, scale: float) -> None:
    """Codes and scales are those of the oracle, bit for bit."""
    codes, scales = quantisers.quantise(torch.from_numpy(norm), spec, None, scale, DTYPES[dtype])
    wanted_codes, wanted_scales = oracle.quantise(norm, spec, scale, dtype)
    assert_same_bits(codes, wanted_codes)
    assert (scales is None) == (wanted_scales is None)
    if scales is not None and wanted_scales is not None:
        assert_same_bits(scales, wanted_scales)


def test_e2m1_is_exhaustively_right() -> None:
    """Every bf16 bit pattern converts to the nearest e2m1 value, ties to even, as ``cvt.rn.satfinite.e2m1x2`` does."""
    values = (torch.arange(1 << 16, dtype=torch.int32) << 16).view(torch.float32)
    assert_same_bits(quantisers.e2m1_codes(values), oracle.e2m1_codes(values.numpy()))


def test_e8m0_edges() -> None:
    """UE8M0 codes at and one ulp around each power of two, 0, subnormals, the largest value, inf and NaN."""
    powers = np.ldexp(np.float32(1), np.arange(-127, 128)).astype(np.float32)
    around = [powers, np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(np.inf))]
    values = np.concatenate([*around, np.array([0, 1e-45, 3.4028235e38, np.inf, np.nan], np.float32)])
    codes, decoded = oracle.e8m0(values)
    assert_same_bits(quantisers.e8m0_round_up(torch.from_numpy(values)), codes)
    assert_same_bits(quantisers.e8m0_value(torch.from_numpy(codes)), decoded)


@pytest.mark.parametrize("power", [-126, -100, -9, -8, -1, 0, 1, 7, 64, 127])
def test_pow2_log2_stays_at_a_power(power: int) -> None:
    """A few ulp above a power, log2 rounds to an integer and the scale stays; a plain round-up goes one further."""
    exact = torch.tensor(2.0**power)
    above = torch.nextafter(exact, torch.tensor(torch.inf))
    assert quantisers.pow2_by_log2(exact) == exact
    assert quantisers.pow2_by_log2(above) == (exact if abs(power) > 1 else 2 * exact)
    assert quantisers.pow2_round_up(exact) == exact
    assert quantisers.pow2_round_up(above) == 2 * exact
