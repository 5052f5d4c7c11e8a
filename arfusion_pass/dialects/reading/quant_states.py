"""What a value between a norm and its codes is, as plain facts: the states that :mod:`aten_quant` computes with.

Each node behind a norm is one of these, or unknown. A state says exactly what was computed, rounding by rounding,
so that two spellings with one meaning end in equal states, and one with another meaning in none.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from typing import TypeAlias

import torch
from torch import fx

from arfusion_pass.ops.quantisers import FP8_MAX, INT8_MAX
from arfusion_pass.ops.spec import Apply, Bound, QuantFormat, QuantSpec, ScaleRound, ScaleRule

LOW = (torch.bfloat16, torch.float16)
GROUPS = (128, 64, 32)
"""Group sizes that the kernels have."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """The norm's elements in their order, in any shape.

    Attributes:
        rounded: the 16-bit dtype that they were rounded to; None: fp32 as the norm left them.
        absolute: their absolute values.
    """

    rounded: torch.dtype | None
    absolute: bool = False


class Kind(enum.Enum):
    """What a number per unit is."""

    AMAX = enum.auto()
    LOWEST = enum.auto()
    """The smallest element, or 0 where that is smaller."""
    HIGHEST = enum.auto()
    """The largest element, or 0 where that is larger."""
    LOWEST_SIZE = enum.auto()
    """Its absolute value; the larger one of this and the next is ``AMAX``."""
    HIGHEST_SIZE = enum.auto()
    AMAX_AND_INDEX = enum.auto()
    """The pair that ``aten.max.dim`` gives."""
    SCALE = enum.auto()
    INVERSE_AMAX = enum.auto()
    ENCODE = enum.auto()
    """``(1 / amax) * max``."""
    INVERSE_SCALE = enum.auto()
    LOG2 = enum.auto()
    CEILED = enum.auto()
    """``ceil(log2(scale))``."""
    BITS = enum.auto()
    """The scale's bits as int32; below, what the bit forms of rounding up to a power of two make of them."""
    BITS_UP = enum.auto()
    """``bits + 0x7FFFFF``."""
    EXPONENT_SIGNED = enum.auto()
    """``bits >> 23``; the sign is 0."""
    MANTISSA = enum.auto()
    """``bits & 0x7FFFFF``."""
    HAS_MANTISSA = enum.auto()
    EXPONENT_UP = enum.auto()
    """The exponent, one more where there is a mantissa."""
    POWER_BITS = enum.auto()
    """The bits of the power of two."""


ENDS = (Kind.LOWEST, Kind.HIGHEST, Kind.LOWEST_SIZE, Kind.HIGHEST_SIZE)


@dataclasses.dataclass(frozen=True)
class PerUnit:
    """One number for every ``unit`` consecutive elements (a token's row, or a group), in their order, in any shape.

    Attributes:
        kind: what it is.
        unit: elements in a unit.
        rounded: as in :class:`Rows`, of the norm that it comes from.
        limit: the format's largest value, once it was met.
        bound_on, bound, rule, scale_round: as in ``QuantSpec``.
        low: the dtype that ``ScaleRound.TENSOR`` rounds to.
    """

    kind: Kind
    unit: int
    rounded: torch.dtype | None
    limit: float = 0.0
    bound_on: Bound = Bound.NONE
    bound: float = 0.0
    rule: ScaleRule = ScaleRule.DIVIDE
    scale_round: ScaleRound = ScaleRound.FP32
    low: torch.dtype | None = None

    def to(self, kind: Kind, **changes: object) -> PerUnit:
        """The same facts about another kind of number."""
        return dataclasses.replace(self, kind=kind, **changes)  # type: ignore[arg-type]

    def bounded(self, bound: float, low: torch.dtype | None) -> PerUnit | None:
        """After ``max(self, bound)`` computed in ``low`` (None: fp32)."""
        if not 0.0 <= bound < float("inf"):
            return None
        if low is not None:
            bound = narrowed(bound, low)
        if self.kind == Kind.SCALE and self.bound_on == Bound.AMAX and low is None:
            return self._bounded_again(bound)
        if self.bound_on != Bound.NONE or self.scale_round in (ScaleRound.POW2, ScaleRound.POW2_LOG2):
            return None
        if self.kind == Kind.AMAX:
            return dataclasses.replace(self, bound_on=Bound.AMAX, bound=bound)
        if self.kind == Kind.SCALE and self.keeps(bound):
            return dataclasses.replace(self, bound_on=Bound.SCALE, bound=bound)
        return None

    def _bounded_again(self, bound: float) -> PerUnit | None:
        """The larger one of a bound on ``amax``, divided as that is, and one on the scale: division keeps the order."""
        if self.scale_round != ScaleRound.FP32 or self.rule not in (ScaleRule.DIVIDE, ScaleRule.MULTIPLY):
            return None
        first = single(self.bound)
        by = single(1.0 / self.limit)
        least = single(first / self.limit if self.rule == ScaleRule.DIVIDE else first * by)
        return self if single(bound) <= least else dataclasses.replace(self, bound_on=Bound.SCALE, bound=bound)

    def keeps(self, bound: float) -> bool:
        """Whether rounding the scale to ``T``, where it is rounded, leaves ``bound`` as it is."""
        return self.low is None or narrowed(bound, self.low) == bound

    def cast_low(self, low: torch.dtype) -> PerUnit | None:
        """After a cast to the 16-bit dtype ``low``; None where no spec has that rounding."""
        if self.rounded != low:
            return None
        bound = narrowed(self.bound, low)
        if self.kind == Kind.AMAX or self.kind in ENDS:
            return dataclasses.replace(self, bound=bound)  # the largest of 16-bit values is one
        if bound != self.bound:
            return None
        if self.kind == Kind.SCALE and self.low == low:
            return self
        if self.kind == Kind.SCALE and self.scale_round == ScaleRound.FP32:
            return dataclasses.replace(self, scale_round=ScaleRound.TENSOR, low=low)
        return None

    @property
    def amax(self) -> PerUnit:
        """The facts of the largest absolute value that this comes from."""
        on_amax = self.bound_on == Bound.AMAX
        return PerUnit(
            Kind.AMAX,
            self.unit,
            self.rounded,
            bound_on=Bound.AMAX if on_amax else Bound.NONE,
            bound=self.bound if on_amax else 0.0,
        )

    @property
    def positive(self) -> bool:
        """Whether a bound keeps the scale a normal number above 0."""
        least = self.bound if self.bound_on == Bound.SCALE else self.bound / max(self.limit, 1.0)
        return self.bound_on != Bound.NONE and least >= 2.0**-125


@dataclasses.dataclass(frozen=True)
class Spread:
    """A number per unit, repeated for each element of the unit, in the elements' order and in any shape."""

    number: PerUnit


@dataclasses.dataclass(frozen=True)
class Given:
    """A scale that the graph takes from elsewhere.

    Attributes:
        node: one element, or None for a number.
        value: the number.
        dtype: what the graph rounds the scale to before it is applied; None: nothing.
    """

    node: fx.Node | None = None
    value: float = 1.0
    dtype: torch.dtype | None = None


@dataclasses.dataclass(frozen=True)
class Scaled:
    """The norm's elements, scaled.

    Attributes:
        rows: what was scaled.
        by: by what: a scale, ``max / amax``, or a given one.
        apply: how.
        low: the 16-bit dtype that the result was rounded to; None: fp32.
        lower, upper: bounds of the clamp so far.
        rint: rounded to whole numbers.
    """

    rows: Rows
    by: PerUnit | Given
    apply: Apply
    low: torch.dtype | None = None
    lower: float | None = None
    upper: float | None = None
    rint: bool = False

    def cast_low(self, low: torch.dtype) -> Scaled | None:
        """After a cast to ``low``. The clamp's bounds are 16-bit values, so clamp and rounding may change places."""
        if self.low not in (None, low):
            return None
        if self.rint:  # whole numbers of up to 8 bits stay as they are
            return self if self.lower is not None and self.upper is not None else None
        return dataclasses.replace(self, low=low)

    def clamped(self, lower: float | None, upper: float | None) -> Scaled | None:
        """After a clamp from one side or both."""
        if (lower is not None and self.lower is not None) or (upper is not None and self.upper is not None):
            return None
        bounds = {"lower": self.lower if lower is None else lower, "upper": self.upper if upper is None else upper}
        return dataclasses.replace(self, **bounds)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Codes:
    """The quantised elements, in their order, in any shape."""

    format: QuantFormat
    scaled: Scaled

    def spec(self, hidden: int) -> QuantSpec | None:
        """The spec that computes these codes from rows of ``hidden``, with row-major scales; None if there is none."""
        scaled, by = self.scaled, self.scaled.by
        clamp = self._clamp()
        if clamp is None:
            return None
        common = {
            "format": self.format,
            "unrounded": scaled.rows.rounded is None,
            "apply": scaled.apply,
            "in_dtype": scaled.low is not None,
            "clamp": clamp,
        }
        if isinstance(by, Given):
            return QuantSpec(**common) if self.format == QuantFormat.FP8 else None  # type: ignore[arg-type]
        group = -1 if by.unit == hidden else by.unit
        groups = (-1, *GROUPS) if self.format == QuantFormat.FP8 else (-1,)
        limit = FP8_MAX if self.format == QuantFormat.FP8 else INT8_MAX
        if by.rounded != scaled.rows.rounded or by.limit != limit or group not in groups or hidden % by.unit:
            return None
        return QuantSpec(
            **common,  # type: ignore[arg-type]
            group=group,
            bound_on=by.bound_on,
            bound=by.bound,
            scale_rule=by.rule,
            scale_round=by.scale_round,
        )

    def misfit(self, hidden: int) -> str:
        """Why rows of ``hidden`` have no :meth:`spec`: what no kernel has."""
        by, scaled, int8 = self.scaled.by, self.scaled, self.format == QuantFormat.INT8
        if isinstance(by, Given) and int8:
            return "quantises to INT8 by a scale that is given; the kernels find one for each token"
        if isinstance(by, PerUnit):
            groups = "" if int8 else f", or for each group of {', '.join(map(str, GROUPS))}"
            if by.unit != hidden and (int8 or by.unit not in GROUPS):
                return f"has a scale for each {by.unit} elements; the kernels have one for each token{groups}"
            if by.rounded != scaled.rows.rounded:
                return "finds its scales from the norm as it is, or rounded, and quantises it the other way"
        if self._clamp() is None:
            low = "no bound" if scaled.lower is None else f"{scaled.lower:g}"
            high = "no bound" if scaled.upper is None else f"{scaled.upper:g}"
            return f"clamps to {low} below and {high} above, which no kernel does with these scales"
        return "ends a quantiser with bounds, groups or roundings that no kernel has"

    def _clamp(self) -> bool | None:
        """A spec's ``clamp``; None for bounds that no spec has.

        A whole number made of ``x / (amax / 127)`` is never past 127 in size while the scale is a normal number, so
        that for INT8 both usual lower bounds, and no clamp, are one. A subnormal scale may be off by half of itself,
        and the reciprocal of one is infinite; where scale and quotient are rounded to 16 bits, 127 may become 128.
        Then only the clamp that the kernels have is theirs.
        """
        bounds = (self.scaled.lower, self.scaled.upper)
        if self.format == QuantFormat.INT8:
            same = ((-128.0, 127.0), (-127.0, 127.0), (None, None)) if self._stays_within() else ((-128.0, 127.0),)
            return True if bounds in same else None
        return {(None, None): False, (-FP8_MAX, FP8_MAX): True}.get(bounds)

    def _stays_within(self) -> bool:
        """Whether no finite element of any row can be quantised past the format's largest value."""
        by, scaled = self.scaled.by, self.scaled
        if not isinstance(by, PerUnit) or (by.low is not None and scaled.low is not None):
            return False
        # 16-bit numbers begin at 2**-133, a 127th of which fp32 still holds to one part in 500.
        plain = scaled.apply == Apply.DIVIDE and by.rule != ScaleRule.RECIPROCAL and scaled.rows.rounded is not None
        return by.positive or plain

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The 16-bit dtypes that something was rounded to on the way: a spec has one, the reduced tensor's."""
        by = self.scaled.by
        low = by.low if isinstance(by, PerUnit) else None
        return {dtype for dtype in (self.scaled.rows.rounded, self.scaled.low, low) if dtype is not None}


State: TypeAlias = "Rows | PerUnit | Spread | Scaled | Codes"


def narrowed(value: float, dtype: torch.dtype) -> float:
    """``value`` rounded to a 16-bit dtype by way of fp32.

    bf16 by its bits, so that no tensor is made: the pass runs under fake mode.
    """
    bits = int.from_bytes(_packed("f", value), "little")
    if dtype == torch.bfloat16:
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return _unpacked("f", bits.to_bytes(4, "little"))
    single = _unpacked("f", bits.to_bytes(4, "little"))
    try:
        return _unpacked("e", _packed("e", single))
    except OverflowError:
        return float("inf") if single > 0 else float("-inf")


def single(value: float) -> float:
    """``value`` rounded to fp32; infinity beyond it."""
    try:
        return _unpacked("f", _packed("f", value))
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _packed(code: str, value: float) -> bytes:
    return struct.pack("<" + code, value)


def _unpacked(code: str, data: bytes) -> float:
    return float(struct.unpack("<" + code, data)[0])
