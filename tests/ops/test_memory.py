"""Rows in memory: which strides are taken, which tensors may overlap; against sets of bytes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from arfusion_pass.ops import library
from arfusion_pass.ops.memory import Rows, row_pitch
from tests.bad_calls import BadCall, calls
from tests.ops.cases import arguments

BF16 = torch.bfloat16


def _bytes(tensor: torch.Tensor) -> set[int]:
    """Every address that belongs to an element of ``tensor``."""
    offsets = {0}
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = {offset + index * stride for offset in offsets for index in range(size)}
    first = tensor.data_ptr()
    return {first + offset * tensor.itemsize + byte for offset in offsets for byte in range(tensor.itemsize)}


def test_rows_against_sets_of_bytes() -> None:
    """Whether a span meets rows, and whether rows lie on each other, for random rows and spans of one buffer."""
    chance, buffer, hits = random.Random(0), torch.empty(400, dtype=torch.uint8), 0
    for _ in range(4000):
        width, count = chance.randrange(1, 9), chance.randrange(1, 5)
        pitch, start = chance.randrange(width, 30), chance.randrange(200)
        tensor = buffer.as_strided((count, width), (pitch, 1), start)
        first, end = sorted(chance.randrange(400) for _ in range(2))
        rows, span = Rows.of(tensor), buffer[first:end]
        wanted = bool(_bytes(tensor) & _bytes(span)) if first < end else False
        assert rows.overlaps(span.data_ptr(), span.data_ptr() + end - first) == wanted, (tensor.stride(), start, first)
        hits += wanted
        assert Rows.span(tensor).overlaps(span.data_ptr(), span.data_ptr() + end - first) >= wanted
        other = buffer.as_strided((count, width), (chance.choice((pitch, pitch + 1)), 1), start + chance.randrange(2))
        same = all(a.data_ptr() == b.data_ptr() for a, b in zip(tensor, other, strict=True))
        assert rows.coincides(Rows.of(other)) <= same
    assert 500 < hits < 3500


@pytest.mark.parametrize(
    ("shape", "strides", "pitch"),
    [
        ((4, 8), (8, 1), 8),
        ((4, 8), (24, 1), 24),
        ((2, 3, 8), (72, 24, 1), 24),
        ((2, 1, 3, 8), (72, 5, 24, 1), 24),
        ((1, 8), (3, 1), 8),
        ((8,), (1,), 8),
        ((0, 8), (0, 1), 8),
        ((4, 8), (0, 1), None),
        ((4, 8), (4, 1), None),
        ((4, 8), (16, 2), None),
        ((4, 8), (1, 4), None),
        ((2, 3, 8), (80, 24, 1), None),
        ((2, 3, 8), (0, 24, 1), None),
        ((2, 3, 8), (8, 16, 1), None),
    ],
)
def test_row_pitch(shape: tuple[int, ...], strides: tuple[int, ...], pitch: int | None) -> None:
    """Rows at one distance of at least their width, and nothing else."""
    assert row_pitch(torch.empty(400).as_strided(shape, strides)) == pitch


def _call(**changes: Any) -> None:
    library.fused_op("allreduce_rms_norm")(**{**arguments(), **changes})


def test_rows_apart_are_read() -> None:
    """x and residual as columns of wider tensors: the bits of their copies."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 5, 3 * 64, generator=generator).to(BF16)
    x, residual, weight = wide[..., :64], wide[..., 64:128], wide[0, 0, 128:].clone()
    given, wanted = torch.empty(30, 64, dtype=BF16), torch.empty(30, 64, dtype=BF16)
    _call(x=x, residual=residual, weight=weight, norm_out=given)
    _call(x=x.contiguous(), residual=residual.contiguous(), weight=weight, norm_out=wanted)
    assert torch.equal(given, wanted)


def test_in_place_as_engines_call_it() -> None:
    """residual_out on the residual, norm_out on x, or the other way round: as with memory of their own."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(5, 64, generator=generator).to(BF16) for _ in range(2)]
    want = [torch.empty(5, 64, dtype=BF16) for _ in range(2)]
    _call(x=values[0], residual=values[1], residual_out=want[0], norm_out=want[1])
    for swap in (False, True):
        x, residual = (value.clone() for value in values)
        total, norm = (x, residual) if swap else (residual, x)
        _call(x=x, residual=residual, residual_out=total, norm_out=norm)
        assert torch.equal(total, want[0])
        assert torch.equal(norm, want[1])


def test_memory_that_is_refused() -> None:
    """One memory for two outputs; an output that lies on an input in any other way than row on row."""
    x, weight = torch.ones(4, 64, dtype=BF16), torch.ones(64, dtype=BF16)
    flat = torch.ones(8 * 64, dtype=BF16)
    shifted, wider = flat[64:320].view(4, 64), flat.view(torch.float32).view(4, 64)
    on_x = r"it may lie on x or residual only, exactly row on row"
    for changes, message in (
        ({"residual_out": x, "norm_out": x}, r"residual_out and norm_out share memory: every output needs its own"),
        ({"x": flat[:256].view(4, 64), "norm_out": shifted}, rf"norm_out shares memory with x: {on_x}"),
        ({"x": flat[:256].view(4, 64), "norm_out": wider}, rf"norm_out shares memory with x: {on_x}"),
        (
            {"x": flat.view(4, 128)[:, :64], "norm_out": flat[:256].view(4, 64)},
            rf"norm_out shares memory with x: {on_x}",
        ),
        ({"weight": flat[:64], "norm_out": flat[:256].view(4, 64)}, r"norm_out shares memory with weight: it may lie"),
    ):
        given = {"x": x.clone(), "residual": x.clone(), "weight": weight, **changes}
        before = {name: value.clone() for name, value in given.items()}
        with pytest.raises(ValueError, match=message):
            _call(**given)
        assert all(torch.equal(value, before[name]) for name, value in given.items()), "nothing was written"


def test_matrix_of_bad_calls() -> None:
    """2,500 random calls, right ones and broken ones: each runs, or is a ValueError with a sentence that leaves all
    tensors as they were; never another error."""
    ran = refused = 0
    for call in calls(2500, seed=0):
        before = {name: memory.clone() for name, memory in _memories(call).items()}
        sentence = None
        try:
            call.run()
        except ValueError as error:
            sentence = str(error)
        if sentence is None:
            ran += 1
            continue
        refused += 1
        assert len(sentence) > 25, call.what
        written = [name for name, memory in _memories(call).items() if not torch.equal(memory, before[name])]
        assert not written, call.what
    assert ran > 300
    assert refused > 1000


def _memories(call: BadCall) -> dict[str, torch.Tensor]:
    """All bytes behind each tensor of a call."""
    dense = {name: t for name, t in call.tensors().items() if t.device.type == "cpu" and t.layout == torch.strided}
    return {name: torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()) for name, t in dense.items()}
