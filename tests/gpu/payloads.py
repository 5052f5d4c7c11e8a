"""Ways of filling an input: ordinary values, and the payloads that break exchange protocols."""

from __future__ import annotations

import torch


def fill(
    payload: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
    rank: int,
) -> torch.Tensor:
    """A ``shape`` tensor of ``dtype``:

    * ``normal``: standard normal. ``integers``: small integers, whose sum is exact in any order.
    * ``specials``: normal, with -0.0, 0.0, inf, -inf, NaN, subnormals, the largest values and every bit pattern that a
      protocol might use as its "not written yet" strewn in (0xFFFF.., 0x8000.., 0x7FFF..).
    * ``negative_zero``, ``zero``, ``sentinel`` (all bits set), ``subnormal``, ``nan_rank`` (one rank all NaN).
    """
    x = torch.randn(shape, generator=generator, device=device)
    if payload == "normal":
        return x.to(dtype)
    if payload == "integers":
        return (x * 4).round().clamp(-16, 16).to(dtype)
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    if payload == "specials":
        bits = x.to(dtype).view(integer)
        patterns = _patterns(dtype, device)
        place = torch.randint(0, 8 * len(patterns), shape, generator=generator, device=device)
        chosen = patterns[place.clamp(max=len(patterns) - 1)]
        return torch.where(place < len(patterns), chosen, bits).view(dtype)
    if payload == "subnormal":
        tiny = torch.randint(0, 100, shape, generator=generator, device=device)
        sign = torch.randint(0, 2, shape, generator=generator, device=device).bool()
        magnitude = tiny.to(integer).view(dtype)
        return torch.where(sign, -magnitude, magnitude)
    constant = {
        "negative_zero": -(1 << (8 * dtype.itemsize - 1)),
        "zero": 0,
        "sentinel": -1,
        "nan_rank": -1 if rank == 1 else 0,
    }[payload]
    return torch.full(shape, constant, dtype=integer, device=device).view(dtype)


def _patterns(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    floats = [
        0.0,
        -0.0,
        float("inf"),
        float("-inf"),
        float("nan"),
        torch.finfo(dtype).max,
        torch.finfo(dtype).tiny,
        1.0,
    ]
    if dtype.itemsize == 2:
        words = [0xFFFF, 0x8000, 0x7FFF, 0xFFFE, 0x0001, 0x8001, 0x807F, 0xFF80, 0x7F80]
        extra = torch.tensor(words, device=device, dtype=torch.int32).to(torch.int16)
        return torch.cat([torch.tensor(floats, device=device).to(dtype).view(torch.int16), extra])
    words = [0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 0xFFFFFFFE, 0x00000001, 0x80000001, 0xFFFF0000, 0x0000FFFF]
    extra = torch.tensor(words, device=device, dtype=torch.int64).to(torch.int32)
    return torch.cat([torch.tensor(floats, device=device).view(torch.int32), extra])
