"""Comparisons of the exact contract: bits, values of a format, checksums, and buffers with guards around them."""

from __future__ import annotations

import math

import torch

GUARD = 256
POISON = 0xA5

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A position-dependent 64-bit sum of a tensor's bytes, on its device."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    data = torch.nn.functional.pad(data, (0, -data.numel() % 4)).view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, data.numel(), 1 << 24):
        part = data[start : start + (1 << 24)].to(torch.int64)
        index = torch.arange(start, start + part.numel(), device=tensor.device, dtype=torch.int64)
        total += ((part + 0x1234567) * (index * 0x5851F42D4C957F2D + 0x14057B7EF767814F)).sum()
    return total


def value_index(tensor: torch.Tensor) -> torch.Tensor:
    """Floats as integers in their own order, so that neighbours differ by one; both zeros are 0."""
    bits = tensor.contiguous().view(_INTEGERS[tensor.element_size()]).to(torch.int64)
    top = 1 << (8 * tensor.element_size() - 1)
    bits = torch.where(bits < 0, bits + 2 * top, bits)
    return torch.where(bits >= top, top - bits, bits)


def steps_apart(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """How many values of the dtype lie between; NaN equals NaN and is far from everything else."""
    apart = (value_index(got) - value_index(want)).abs()
    nan = torch.isnan(got.float()) | torch.isnan(want.float())
    both = torch.isnan(got.float()) & torch.isnan(want.float())
    return torch.where(both, 0, torch.where(nan, 1 << 40, apart))


def assert_bits(name: str, got: torch.Tensor, want: torch.Tensor, nan_equal: bool = True) -> None:
    """The same bits; any NaN equals any NaN where ``nan_equal`` and the dtype is a float's."""
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, expected {want.dtype}"
    if got.numel() == 0:
        return
    differs = differing(got, want, nan_equal)
    if differs.any():
        raise AssertionError(describe(name, got, want, differs))


def differing(got: torch.Tensor, want: torch.Tensor, nan_equal: bool = True) -> torch.Tensor:
    """Where the bits are others; any NaN equals any NaN where ``nan_equal`` and the dtype is a float's."""
    integer = _INTEGERS[got.element_size()]
    differs = got.contiguous().view(integer) != want.contiguous().view(integer)
    if nan_equal and got.dtype.is_floating_point:
        differs &= ~(torch.isnan(got.float()) & torch.isnan(want.float()))
    return differs


def assert_norm(name: str, got: torch.Tensor, want: torch.Tensor, limit: int = 1) -> None:
    """bf16 and fp16: at most max(1, 0.1 %) elements differ, each by ``limit`` values; fp32: at most 4 values apart."""
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    if got.numel() == 0:
        return
    apart = steps_apart(got, want)
    limit = 4 if got.dtype == torch.float32 else limit
    if (apart > limit).any():
        raise AssertionError(describe(f"{name} (up to {int(apart.max())} values apart)", got, want, apart > limit))
    if got.dtype != torch.float32:
        count, allowed = int((apart > 0).sum()), max(1, math.floor(got.numel() * 1e-3))
        if count > allowed:
            raise AssertionError(describe(f"{name} ({count} differ, {allowed} may)", got, want, apart > 0))


def describe(name: str, got: torch.Tensor, want: torch.Tensor, differs: torch.Tensor) -> str:
    """Where two tensors differ, with the first few pairs."""
    places = differs.nonzero()
    pairs = []
    for place in places[:3].tolist():
        at = tuple(place)
        pairs.append(f"{place}: {_show(got[at])}, expected {_show(want[at])}")
    return f"{name}: {len(places)} of {got.numel()} elements differ, at " + "; ".join(pairs)


def _show(value: torch.Tensor) -> str:
    if value.dtype.is_floating_point:
        return f"{float(value.float()):.9g}"
    return str(int(value))


class GuardedBuffer:
    """A tensor whose bytes start as a poison pattern, with guard bytes before and after it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        count = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        padded = (count + GUARD - 1) // GUARD * GUARD
        self._count, self._dtype, self._shape = count, dtype, shape
        self.move_to(torch.full((padded + 2 * GUARD,), POISON, dtype=torch.uint8, device=device))

    def move_to(self, raw: torch.Tensor) -> None:
        """Lie in other bytes, as many as ``self.raw`` has; what they hold stays."""
        self.raw = raw
        self.tensor = raw[GUARD : GUARD + self._count].view(self._dtype).view(self._shape)

    def assert_guards(self, name: str) -> None:
        """Nothing was written outside the tensor."""
        before, after = self.raw[:GUARD], self.raw[GUARD + self._count :]
        touched = int((before != POISON).sum()), int((after != POISON).sum())
        assert touched == (0, 0), f"{name}: {touched[0]} bytes written before the tensor, {touched[1]} after it"
