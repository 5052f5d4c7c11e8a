"""What an epilogue does, as plain numbers: rounding flags, launch choices and the quantiser's spec.

The same values travel from the dialect recognisers through the IR into the fused ops' arguments and
down to the kernels (``kernels/spec.h`` mirrors this file; a test compares the two). Everything is packed
into one ``flags`` and one ``quant`` integer, because an empty ``int[]`` breaks AOTInductor and a dozen
scalars would make every call slower.
"""

from __future__ import annotations

import dataclasses
import enum


class Flags(enum.IntFlag):
    """The ``flags`` argument of every fused op. ``T`` below is the dtype of the tensor that is reduced.

    Rounding of the epilogue (with none set: the sum of all-reduce and residual is rounded to ``T``, the norm
    reads that, the weight is multiplied in fp32, and one rounding follows):

    * ``UNROUNDED_SUM``: the norm reads the fp32 sum ``float(T(all_reduce)) + float(residual)`` itself.
      Always set where the residual is fp32 and ``T`` is not.
    * ``ROUND_BEFORE_WEIGHT``: the normalised value is rounded to ``T`` before the weight is multiplied
      (Hugging Face Llama: two roundings).
    * ``ADDEND_LAST``: the addend is added to the rounded sum of all-reduce and residual, ``T(all_reduce + residual) +
      addend``; without it the residual to that of all-reduce and addend. Of the two, what is added first is in ``T``.
    * ``ADDEND_SCALED``: the factor multiplies ``T(all_reduce + addend)``; without it the all-reduce alone. Either
      product is rounded to ``T``.
    * ``DIVIDE_BY_ROOT``: the norm is ``value / sqrt(mean + epsilon)``, each correctly rounded in fp32 on a GPU.
    * ``RECIPROCAL_ROOT``: it is ``value * (1 / sqrt(mean + epsilon))``, likewise.

    How a fused op runs (never changes a result's bits):

    * ``ONESHOT`` / ``TWOSHOT``: force a strategy; neither: by the measured table.
    * ``SHARDED``: keep the residual sharded wherever the two flags below allow it, whatever the table says.
    * ``NO_PDL``: launch without programmatic dependent launch.
    * ``TRIGGER_EARLY``: let the next kernel start before this one's epilogue; only safe before a kernel that
      synchronises on its grid dependency itself.
    * ``REFERENCE`` / ``FLASHINFER``: run on that backend instead of the native kernels.
    * ``RESIDUAL_IN_SHARDED`` / ``RESIDUAL_OUT_SHARDED``: of ``residual``, of ``residual_out``, only the rows of this
      rank's tokens (``token % world == rank``) need be defined. Set for all members of a chain
      (:mod:`arfusion_pass.rewrite.chains`), which decide alike whether they make use of it; not with
      ``allreduce_out``, and with the norm or its codes among the outputs.
    * ``OWNER_BLOCKS``: of a launch alone (``kernels/binding.h``), with ``SHARDED`` and both of the
      above: rank ``r`` owns the tokens from ``r * tokens / world`` on, and the residuals hold those alone.
    * ``RECORD``: hand inputs and outputs to the recorder whose site number stands in bits 32 and up
      (:mod:`arfusion_pass.inspection.replay`), and run as without it.

    In a call that is not recorded, bits 32 and up hold its graph's mark (:mod:`arfusion_pass.ops.marks`), 0 for none.

    Rounding inside the MoE prologues (none set: fp32 throughout, one rounding to ``T`` before the exchange):

    * ``MOE_ROUND_PRODUCT``: each expert's row times its weight is rounded to ``T``.
    * ``MOE_ROUND_PARTIAL``: every partial sum over experts is rounded to ``T``, in expert order.
    * ``MOE_ROUND_SUM``: the sum over experts is rounded to ``T``.
    * ``MOE_ROUND_SCALED``: so is its product with ``routed_scaling_factor``.
    """

    NONE = 0
    UNROUNDED_SUM = 1 << 0
    ROUND_BEFORE_WEIGHT = 1 << 1
    ADDEND_LAST = 1 << 2
    DIVIDE_BY_ROOT = 1 << 3
    RECIPROCAL_ROOT = 1 << 4
    ADDEND_SCALED = 1 << 5
    ONESHOT = 1 << 8
    TWOSHOT = 1 << 9
    NO_PDL = 1 << 10
    TRIGGER_EARLY = 1 << 11
    REFERENCE = 1 << 12
    FLASHINFER = 1 << 13
    RECORD = 1 << 14
    SHARDED = 1 << 15
    MOE_ROUND_PRODUCT = 1 << 16
    MOE_ROUND_PARTIAL = 1 << 17
    MOE_ROUND_SUM = 1 << 18
    MOE_ROUND_SCALED = 1 << 19
    RESIDUAL_IN_SHARDED = 1 << 20
    RESIDUAL_OUT_SHARDED = 1 << 21
    OWNER_BLOCKS = 1 << 22


SHARDED_FLAGS = Flags.RESIDUAL_IN_SHARDED | Flags.RESIDUAL_OUT_SHARDED
"""The marks of a chain's members."""

BLOCKS = Flags.SHARDED | SHARDED_FLAGS | Flags.OWNER_BLOCKS
"""How sequence parallelism's op is launched."""


class QuantFormat(enum.IntEnum):
    """Element format of the quantised output."""

    NONE = 0
    FP8 = 1
    """``float8_e4m3fn``, largest value 448."""
    INT8 = 2
    """``int8``, ``rint`` to [-128, 127], scale ``amax / 127``."""
    NVFP4 = 3
    """``e2m1`` pairs in ``uint8`` ``[T, H / 2]`` (element 2i in the low nibble), groups of 16 with e4m3 scales."""
    MXFP8 = 4
    """``float8_e4m3fn`` in groups of 32 with UE8M0 scales (``uint8`` or ``float8_e8m0fnu``)."""


class ScaleLayout(enum.IntEnum):
    """Where the scale of (token ``t``, group ``g``) lies; ``G`` groups a token, ``pad4(T)`` = T rounded up to 4.

    The column-major layouts are given either as the logical view ``[T, G]`` with the strides below, or as its
    contiguous transpose ``[G, T]`` (``[G, pad4(T)]`` where padded); the graph rewrite uses the latter. Padding
    inside the storage is written as 0.
    """

    ROW = 0
    """fp32 ``[T, G]``, contiguous (``[T, 1]`` per token)."""
    COLUMN = 1
    """fp32 ``[T, G]``, strides ``(1, T)``."""
    COLUMN_TMA = 2
    """fp32 ``[T, G]``, strides ``(1, pad4(T))``."""
    PACKED_UE8M0 = 3
    """int32 ``[T, ceil(G / 4)]``, strides ``(1, pad4(T))``: byte ``g % 4`` of word ``g / 4`` is a biased exponent."""
    SWIZZLED_128X4 = 4
    """1-byte scales, ``round_up(T, 128) * round_up(G, 4)``; index in ``arfusion_pass.ops.layouts``."""
    SWIZZLED_8X4 = 5
    """1-byte scales, ``round_up(T, 8) * round_up(G, 4)``."""
    LINEAR = 6
    """1-byte scales ``[T, G]``, contiguous."""


class Bound(enum.IntEnum):
    """What the lower bound ``quant_bound`` is applied to."""

    NONE = 0
    AMAX = 1
    """``amax = max(amax, bound)`` before the division."""
    SCALE = 2
    """``scale = max(scale, bound)`` after the division, before any rounding to a power of two."""


class ScaleRule(enum.IntEnum):
    """How a dynamic scale comes from ``amax`` and the format's largest value ``max``; every step in fp32."""

    DIVIDE = 0
    """``amax / max``."""
    MULTIPLY = 1
    """``amax * float32(1 / max)``."""
    RECIPROCAL = 2
    """``1 / ((1 / amax) * max)``, what eager ``1 / (max / amax)`` computes."""


class ScaleRound(enum.IntEnum):
    """What the scale is rounded to before it is applied and written."""

    FP32 = 0
    TENSOR = 1
    """``amax``, its bound and the rule's result are in ``T`` (torchao: ``amax`` and the division in bf16)."""
    POW2 = 2
    """Up to a power of two by its bits: mantissa cleared, exponent one more unless it was 0."""
    POW2_LOG2 = 3
    """``exp2(ceil(log2(scale)))`` with a correctly rounded fp32 ``log2``: a scale a few ulp above a power of two
    stays at that power."""


class Apply(enum.IntEnum):
    """How the scale meets the value."""

    DIVIDE = 0
    """``x / scale``."""
    RECIPROCAL = 1
    """``x * (1 / scale)``."""
    MULTIPLY = 2
    """``x * scale`` (static only: the graph holds an encode scale)."""
    MAX_OVER_AMAX = 3
    """``x * ((1 / amax) * max)`` (DeepSeek's ``448 / amax``; dynamic only)."""


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """One quantiser, completely: the ``quant`` and ``quant_bound`` arguments of every fused op.

    The value quantised, ``v``, is the norm rounded to ``T``, or as computed in fp32 where ``unrounded``.
    Static per-tensor FP8 (``group`` 0) takes its scale as an input, dynamic formats write it.

    Args:
        format: element format.
        group: 0 one given scale for the tensor (NVFP4: the global scale is given besides), -1 one scale a token,
            else that many consecutive elements share a scale.
        layout: of the scales written.
        unrounded: the quantiser reads the fp32 norm.
        bound_on: what ``bound`` bounds from below.
        scale_rule: ``amax`` to scale.
        scale_round: rounding of the scale.
        apply: scale to value.
        in_dtype: the result of ``apply`` is rounded to ``T`` before the clamp (a 0-dim bf16 static scale).
        clamp: ``[-448, 448]`` before the cast; without it a larger value becomes what torch's own cast makes of it.
        bound: the lower bound itself, fp32.
    """

    format: QuantFormat = QuantFormat.NONE
    group: int = 0
    layout: ScaleLayout = ScaleLayout.ROW
    unrounded: bool = False
    bound_on: Bound = Bound.NONE
    scale_rule: ScaleRule = ScaleRule.DIVIDE
    scale_round: ScaleRound = ScaleRound.FP32
    apply: Apply = Apply.DIVIDE
    in_dtype: bool = False
    clamp: bool = True
    bound: float = 0.0

    @property
    def is_static(self) -> bool:
        """Whether the (only) scale is an input and none is written."""
        return self.format == QuantFormat.FP8 and self.group == 0

    def pack(self) -> int:
        """The ``quant`` integer: bits 0-3 format, 4-7 layout, 8-9 bound, 10-11 rule, 12-13 rounding, 14-15 apply,
        16 unrounded, 17 in_dtype, 18 clamp, 32 and up the group plus 1; 0 is no quantiser. ``bound`` travels
        beside it, as ``quant_bound``."""
        if self.format == QuantFormat.NONE:
            return 0
        return (
            int(self.format)
            | int(self.layout) << 4
            | int(self.bound_on) << 8
            | int(self.scale_rule) << 10
            | int(self.scale_round) << 12
            | int(self.apply) << 14
            | int(self.unrounded) << 16
            | int(self.in_dtype) << 17
            | int(self.clamp) << 18
            | (self.group + 1) << 32
        )

    @staticmethod
    def unpack(quant: int, bound: float = 0.0) -> QuantSpec:
        """The inverse of :meth:`pack`; 0 is no quantiser. ``ValueError`` on a value that no spec packs to."""
        if quant == 0:
            return NO_QUANT
        try:
            spec = QuantSpec(
                format=QuantFormat(quant & 15),
                layout=ScaleLayout(quant >> 4 & 15),
                bound_on=Bound(quant >> 8 & 3),
                scale_rule=ScaleRule(quant >> 10 & 3),
                scale_round=ScaleRound(quant >> 12 & 3),
                apply=Apply(quant >> 14 & 3),
                unrounded=bool(quant >> 16 & 1),
                in_dtype=bool(quant >> 17 & 1),
                clamp=bool(quant >> 18 & 1),
                group=(quant >> 32) - 1,
                bound=bound,
            )
        except ValueError as error:
            raise ValueError(f"quant={quant:#x} is no packed QuantSpec: {error}") from None
        if spec.pack() != quant or spec.format == QuantFormat.NONE:
            raise ValueError(f"quant={quant:#x} is no packed QuantSpec")
        return spec


def group_fits(group: int, itemsize: int) -> bool:
    """Whether the kernels have FP8 groups of this many elements of ``itemsize`` bytes: a power of two of whole 16-byte
    vectors, at most a warp's (``group_fits`` in ``kernels/plan.cu``)."""
    lanes, rest = divmod(group * itemsize, 16)
    return rest == 0 and 1 <= lanes <= 32 and lanes & (lanes - 1) == 0


NO_QUANT = QuantSpec()
"""No quantiser; packs to 0."""
