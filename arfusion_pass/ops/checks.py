"""Argument checks of the fused ops: a ``ValueError`` that says what was given and what is needed, before any work.

They run in the fake implementation (so tracing and export fail early) and again on real tensors. Under tracing a token
count is a ``SymInt``: a check fails only where it is known to be violated, so none adds a guard or fixes a size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from arfusion_pass.groups import find_group
from arfusion_pass.ops import layouts
from arfusion_pass.ops.layouts import Size
from arfusion_pass.ops.marks import without_mark
from arfusion_pass.ops.memory import Rows, row_pitch, within_storage
from arfusion_pass.ops.schema import OUTPUT_NAMES, SCATTERING_OP
from arfusion_pass.ops.spec import (
    SHARDED_FLAGS,
    Apply,
    Bound,
    Flags,
    QuantFormat,
    QuantSpec,
    ScaleLayout,
    ScaleRound,
    ScaleRule,
)

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOE_FLAGS = Flags.MOE_ROUND_PRODUCT | Flags.MOE_ROUND_PARTIAL | Flags.MOE_ROUND_SUM | Flags.MOE_ROUND_SCALED
ALL_FLAGS = int(sum(Flags))  # an int: ~ of an IntFlag drops the bits that it does not know
EXCLUSIVE = (
    (Flags.ONESHOT, Flags.TWOSHOT),
    (Flags.ONESHOT, Flags.SHARDED),
    (Flags.TWOSHOT, Flags.SHARDED),
    (Flags.REFERENCE, Flags.FLASHINFER),
    (Flags.DIVIDE_BY_ROOT, Flags.RECIPROCAL_ROOT),
    (Flags.ADDEND_LAST, Flags.ADDEND_SCALED),
)
FP32_MAX = torch.finfo(torch.float32).max
EPSILON_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHARED_ROWS = ("residual", "addend", "factor", "allreduce_out", "residual_out")
"""What sequence parallelism's op takes and gives of this rank's rows alone."""
ROW_OUTPUTS = ("allreduce_out", "residual_out", "norm_out")
IN_PLACE_INPUTS = ("x", "token_input", "shared", "residual")
"""Inputs that are read row by row, each before that row of any output is written (kernels/README.md, in-place use)."""
_ONE_BYTE_LAYOUTS = (*layouts.SWIZZLED, ScaleLayout.LINEAR)


@dataclasses.dataclass
class FusedCall:
    """One call of a fused op, its arguments by name.

    Args:
        op: the op's name, for messages.
        inputs: the tensors in front of the epilogue, by argument name; the first is the one that is reduced.
        residual, weight, scale, group_name, epsilon, weight_bias, flags, scale_value, addend, epsilon_tensor, factor,
            factor_value: as in the schema.
        spec: unpacked from ``quant`` and ``quant_bound``.
        outputs: given output tensors by name; absent where None.
        routed_scaling_factor: MoE finalize only.
        block: sequence parallelism only.
    """

    op: str
    inputs: dict[str, torch.Tensor | None]
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    scale: torch.Tensor | None
    group_name: str
    epsilon: float
    weight_bias: float
    flags: int
    spec: QuantSpec
    scale_value: float
    outputs: dict[str, torch.Tensor]
    routed_scaling_factor: float = 1.0
    block: Size = 0
    addend: torch.Tensor | None = None
    epsilon_tensor: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    factor_value: float = 1.0

    @classmethod
    def bind(cls, op: str, arguments: dict[str, Any]) -> FusedCall:
        """From the schema's arguments by name; ``ValueError`` where ``quant`` is no packed spec."""
        rest = dict(arguments)
        try:
            spec = QuantSpec.unpack(rest.pop("quant"), rest.pop("quant_bound"))
        except ValueError as error:
            raise ValueError(f"arfusion::{op}: {error}") from None
        outputs = {name: rest.pop(name) for name in OUTPUT_NAMES}
        common = {
            field.name: rest.pop(field.name)
            for field in dataclasses.fields(cls)
            if field.name in rest and field.name not in ("op", "inputs", "spec", "outputs")
        }
        given = {name: tensor for name, tensor in outputs.items() if tensor is not None}
        return cls(op=op, inputs=rest, spec=spec, outputs=given, **common)

    @property
    def x(self) -> torch.Tensor:
        """The tensor that the op's dtype, device and hidden size come from."""
        first = next(iter(self.inputs.values()))
        assert first is not None
        return first

    @property
    def tokens(self) -> Size:
        """Tokens of the reduced tensor; never specialised."""
        if self.op.startswith("moe_reduce"):
            return self.x.shape[1]
        if self.op.startswith("moe_finalize"):
            index = self.inputs["index"]
            assert index is not None
            return index.shape[0]
        return layouts.token_count(self.x.shape)

    def describe_reduced(self) -> str:
        """What is reduced, the same on all ranks: ``bfloat16 [4, 4096]``."""
        return f"{str(self.x.dtype).removeprefix('torch.')} [{self.tokens}, {self.x.shape[-1]}]"


def known(condition: Any) -> bool:
    """Whether ``condition`` holds for certain; a symbolic one that could go either way does not, and adds no guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def check_call(call: FusedCall, eager: bool, certain: bool = False) -> None:
    """Check every argument of ``call``; with ``eager``, the strides and addresses of real tensors too.

    Under the compiler a strided input is copied before the op runs (the ops' ``needs_contiguous_strides``), so it is
    an error in eager mode only. With ``certain``, sizes that are not known to agree are an error as well: who makes the
    call in a graph must know that it will run.
    """
    check = _Checker(call, certain)
    check.inputs()
    check.scalars()
    check.epilogue_inputs()
    check.outputs()
    if eager:
        check.strides()
        check.overlaps()


def finite_fp32(value: float) -> bool:
    """Whether ``value`` is a finite number within fp32, which is what kernels and reference compute with."""
    return abs(value) <= FP32_MAX  # False for NaN


def check_spec(spec: QuantSpec) -> None:
    """``ValueError`` where ``spec`` combines what no quantiser has."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"quantiser {spec}: {message}")

    if spec.format == QuantFormat.NONE:
        return
    need(finite_fp32(spec.bound), f"the bound must be finite in fp32, got {spec.bound}")
    if spec.is_static:
        need(spec.layout == ScaleLayout.ROW, "a static scale has no layout, use ROW")
        need(spec.bound_on == Bound.NONE, "a static scale has no lower bound")
        need(spec.scale_rule == ScaleRule.DIVIDE, "a static scale has no scale rule, use DIVIDE")
        need(spec.scale_round == ScaleRound.FP32, "a static scale is not rounded, use ScaleRound.FP32")
        need(spec.apply != Apply.MAX_OVER_AMAX, "MAX_OVER_AMAX needs a dynamic scale")
        return
    need(spec.apply != Apply.MULTIPLY, "Apply.MULTIPLY is for a static scale")
    power_of_two = spec.scale_round in (ScaleRound.POW2, ScaleRound.POW2_LOG2)
    need(not (spec.apply == Apply.MAX_OVER_AMAX and power_of_two), "MAX_OVER_AMAX does not apply the rounded scale")
    if spec.format == QuantFormat.FP8:
        need(spec.group == -1 or spec.group > 0, f"group must be 0, -1 or positive, got {spec.group}")
        allowed = (ScaleLayout.ROW,) if spec.group == -1 else (ScaleLayout.ROW, *layouts.COLUMN_MAJOR)
        need(spec.layout in allowed, f"FP8 scales of group {spec.group} come in {_names(allowed)}")
        packed = spec.layout == ScaleLayout.PACKED_UE8M0
        need(power_of_two or not packed, "packed UE8M0 scales are powers of two: use ScaleRound.POW2 or POW2_LOG2")
    elif spec.format == QuantFormat.INT8:
        need(spec.group == -1, f"INT8 is quantised per token (group -1), got group {spec.group}")
        need(spec.layout == ScaleLayout.ROW, "INT8 scales come in ROW")
    else:
        size = 16 if spec.format == QuantFormat.NVFP4 else 32
        need(spec.group == size, f"{spec.format.name} has groups of {size}, got {spec.group}")
        need(spec.layout in _ONE_BYTE_LAYOUTS, f"{spec.format.name} scales come in {_names(_ONE_BYTE_LAYOUTS)}")
    if spec.format == QuantFormat.MXFP8:
        need(spec.scale_round in (ScaleRound.FP32, ScaleRound.POW2), "MXFP8 rounds its exponent up itself")
        need(spec.apply != Apply.MAX_OVER_AMAX, "MAX_OVER_AMAX does not apply the rounded scale")
    if spec.format == QuantFormat.NVFP4:
        plain = QuantSpec(spec.format, spec.group, spec.layout, spec.unrounded, clamp=spec.clamp)
        need(spec == plain, "NVFP4 has one formula: leave bound, scale rule, rounding, apply and in_dtype at defaults")


def _names(values: Sequence[ScaleLayout]) -> str:
    return ", ".join(value.name for value in values)


def _dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))


class _Checker:
    """The checks of one call, grouped; ``hidden``, ``tokens`` and ``dtype`` come from the tensor that is reduced."""

    def __init__(self, call: FusedCall, certain: bool) -> None:
        self.call = call
        self.certain = certain
        self.x_name = next(iter(call.inputs))
        self.dtype = call.x.dtype
        self.scatters = call.op == SCATTERING_OP
        group = find_group(call.group_name) if self.scatters and call.group_name else None
        self.world = 1 if group is None else group.size()

    def fail(self, message: str) -> None:
        raise ValueError(f"arfusion::{self.call.op}: {message}")

    def need(self, condition: bool, message: str) -> None:
        if not condition:
            self.fail(message)

    def differ(self, a: Any, b: Any) -> bool:
        """Whether two sizes differ for certain; with ``certain``, whether they may differ."""
        return not known(a == b) if self.certain else known(a != b)

    def shape(self, name: str, tensor: torch.Tensor, expected: Sequence[Size], meaning: str) -> None:
        """``tensor`` has exactly the dimensions ``expected``."""
        wrong = tensor.dim() != len(expected) or any(
            self.differ(size, wanted) for size, wanted in zip(tensor.shape, expected, strict=True)
        )
        if wrong:
            self.fail(f"{name} must be {meaning} = {list(expected)}, got {list(tensor.shape)}")

    def rows(self, name: str, tensor: torch.Tensor, width: Size, meaning: str) -> None:
        """``tensor`` is ``[..., width]`` with the call's number of tokens, or with this rank's share of them."""
        wrong = tensor.dim() < 1 or self.differ(tensor.shape[-1], width)
        count = layouts.token_count(tensor.shape)
        counts, tokens = [(count, self.tokens)], self.tokens
        if self.scatters:  # every rank has as many rows, so a graph may spell T as T // world * world
            share = self.tokens // self.world
            shared = name in SHARED_ROWS
            counts = [
                (count * self.world if shared else count, self.tokens),
                (count, share if shared else share * self.world),
            ]
            tokens = share if shared else tokens
        # The op that a residual came from takes as many rows of both, whatever the graph calls their number.
        differ = (lambda a, b: known(a != b)) if name == "residual" else self.differ
        if wrong or all(differ(*pair) for pair in counts):
            self.fail(f"{name} must be {meaning} with {tokens} tokens of {width}, got {list(tensor.shape)}")

    def dtypes(self, name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
        if tensor.dtype not in allowed:
            self.fail(f"{name} must be {_dtype_names(allowed)}, got {_dtype_names([tensor.dtype])}")

    def inputs(self) -> None:
        call, x = self.call, self.call.x
        self.dtypes(self.x_name, x, *INPUT_DTYPES)
        dims = 3 if call.op.startswith("moe_reduce") else 2 if call.op.startswith("moe_finalize") else None
        if dims is not None and x.dim() != dims:
            self.fail(f"{self.x_name} must have {dims} dimensions, got {list(x.shape)}")
        self.need(x.dim() >= 1, f"{self.x_name} must be [..., hidden], got a scalar")
        self.hidden = x.shape[-1]
        self.need(not known(self.hidden < 1), f"{self.x_name} must have a hidden size, got {list(x.shape)}")
        if call.op.startswith("moe_finalize"):
            index = call.inputs["index"]
            assert index is not None
            self.need(index.dim() == 2, f"index must be [tokens, top_k], got {list(index.shape)}")
            self.dtypes("index", index, torch.int32)
        self.tokens = call.tokens
        if self.scatters:
            self.blocks()
        for name, tensor in {**self.tensors(), **call.outputs}.items():
            if tensor.device != x.device:
                self.fail(f"{name} must be on {x.device} as {self.x_name} is, got {tensor.device}")
            if tensor.layout != torch.strided or tensor.is_nested:
                self.fail(f"{name} must be a dense tensor, got {'a nested one' if tensor.is_nested else tensor.layout}")
        if call.op.startswith("moe_"):
            self.moe_inputs()

    def blocks(self) -> None:
        """Every rank has as many rows, in blocks of one size."""
        block, world = self.call.block, self.world
        self.need(not known(block < 0), f"block must not be negative, got {block}")
        one = known(block == 0)
        unit: Any = world if one else world * block
        if known(self.tokens % unit != 0):
            dealt = "one block" if one else f"blocks of {block}"
            self.fail(f"{self.tokens} tokens cannot be dealt to {world} ranks in {dealt} each")

    def moe_inputs(self) -> None:
        call, x = self.call, self.call.x
        scale, index = call.inputs["expert_scale"], call.inputs.get("index")
        if index is not None:
            if scale is not None:
                self.dtypes("expert_scale", scale, torch.float32, self.dtype)
                self.shape("expert_scale", scale, index.shape, "[tokens, top_k] as index")
        elif scale is not None:
            self.dtypes("expert_scale", scale, torch.float32)
            self.shape("expert_scale", scale, x.shape[:2], "[experts, tokens]")
        name = "token_input" if index is None else "shared"
        added = call.inputs[name]
        if added is not None:
            self.dtypes(name, added, self.dtype)
            self.rows(name, added, self.hidden, "[..., hidden]")

    def scalars(self) -> None:
        call = self.call
        flags = call.flags
        meaningless = flags < 0 or without_mark(flags) & ~int(ALL_FLAGS)
        self.need(not meaningless, f"flags={flags:#x} has bits that mean nothing")
        self.need(not flags & Flags.OWNER_BLOCKS, "flag OWNER_BLOCKS is for launches alone: use the op with a block")
        for one, other in EXCLUSIVE:
            self.need(not (flags & one and flags & other), f"flags {one.name} and {other.name} exclude each other")
        if not call.op.startswith("moe_"):
            self.need(not flags & MOE_FLAGS, f"flags={flags:#x}: MOE_ROUND_* belong to the MoE ops")
        if isinstance(call.epsilon, float):
            valid = finite_fp32(call.epsilon) and call.epsilon >= 0
            self.need(valid, f"epsilon must be finite in fp32 and not negative, got {call.epsilon}")
        for name in ("weight_bias", "scale_value", "routed_scaling_factor", "factor_value"):
            value = getattr(call, name)
            if isinstance(value, float):
                self.need(finite_fp32(value), f"{name} must be finite in fp32, got {value}")
        try:
            check_spec(call.spec)
        except ValueError as error:
            self.fail(str(error))

    def epilogue_inputs(self) -> None:
        call = self.call
        if call.residual is not None:
            self.dtypes("residual", call.residual, self.dtype, torch.float32)
            self.rows("residual", call.residual, self.hidden, "[..., hidden]")
            if call.residual.dtype != self.dtype and not call.flags & Flags.UNROUNDED_SUM:
                self.fail(f"an fp32 residual beside {_dtype_names([self.dtype])} needs flags UNROUNDED_SUM")
        if call.weight is not None:
            self.dtypes("weight", call.weight, self.dtype, torch.float32)
            self.shape("weight", call.weight, [self.hidden], "[hidden]")
        elif call.weight_bias != 0.0:
            self.fail(f"weight_bias={call.weight_bias} needs a weight, got None")
        if call.addend is not None:
            self.dtypes("addend", call.addend, self.dtype)
            self.addend_rows(call.addend)
        if call.flags & Flags.ADDEND_LAST:
            both = call.addend is not None and call.residual is not None
            self.need(both, "flag ADDEND_LAST needs an addend and a residual")
            self.dtypes("a residual in front of the addend", call.residual, self.dtype)  # type: ignore[arg-type]
        if call.factor is not None:
            self.dtypes("factor", call.factor, self.dtype, torch.float32)
            self.factor_rows(call.factor)
        if call.flags & Flags.ADDEND_SCALED:
            scaled = call.factor is not None or call.factor_value != 1.0
            self.need(call.addend is not None and scaled, "flag ADDEND_SCALED needs an addend and a factor")
        if (epsilon := call.epsilon_tensor) is not None:
            self.dtypes("epsilon_tensor", epsilon, *EPSILON_DTYPES)
            one = math.prod(epsilon.shape)
            self.need(not self.differ(one, 1), f"epsilon_tensor must have one element, got shape {list(epsilon.shape)}")
        if call.scale is not None:
            takes = call.spec.is_static or call.spec.format == QuantFormat.NVFP4
            self.need(takes, "scale is for static FP8 and NVFP4 only, this call writes its scales")
            self.dtypes("scale", call.scale, torch.float32, *INPUT_DTYPES)
            one = math.prod(call.scale.shape)
            self.need(not self.differ(one, 1), f"scale must have one element, got shape {list(call.scale.shape)}")

    def addend_rows(self, addend: torch.Tensor) -> None:
        """``[hidden]``, or ``[..., hidden]`` with the call's tokens."""
        if addend.dim() == 1:
            self.shape("addend", addend, [self.hidden], "[hidden] or [..., hidden]")
        else:
            self.rows("addend", addend, self.hidden, "[hidden], or [..., hidden]")

    def factor_rows(self, factor: torch.Tensor) -> None:
        """One element, or one for each of the call's tokens, ``[..., 1]``."""
        if self.differ(math.prod(factor.shape), 1):
            self.rows("factor", factor, 1, "[1], or [..., 1]")

    def outputs(self) -> None:
        call, outputs = self.call, self.call.outputs
        self.need(bool(outputs), "at least one output must be given: " + ", ".join(OUTPUT_NAMES))
        if call.flags & SHARDED_FLAGS:
            alone = "allreduce_out" not in outputs and ("norm_out" in outputs or "quant_out" in outputs)
            self.need(not self.scatters, "the residual of this op always holds this rank's rows: no flags for that")
            self.need(alone, "a residual may be sharded beside norm_out or quant_out, and without allreduce_out")
            beside = call.addend is None and call.factor is None
            self.need(beside, "a residual may be sharded without an addend, or a factor in memory, only")
        for name in ROW_OUTPUTS:
            if (tensor := outputs.get(name)) is not None:
                allowed = (self.dtype,) if name == "allreduce_out" else (self.dtype, torch.float32)
                self.dtypes(name, tensor, *allowed)
                self.rows(name, tensor, self.hidden, "[..., hidden]")
        spec, codes, scales = call.spec, outputs.get("quant_out"), outputs.get("scale_out")
        if spec.format == QuantFormat.NONE:
            self.need(codes is None and scales is None, "quant_out and scale_out need a quantiser, got quant=0")
            return
        self.need(codes is not None, f"quant={spec.pack():#x} ({spec.format.name}) needs quant_out, got None")
        assert codes is not None
        multiple = 2 if spec.format == QuantFormat.NVFP4 else 1
        group = spec.group if spec.group > 0 else 1
        self.need(
            not self.differ(self.hidden % group, 0), f"hidden size {self.hidden} is no multiple of the group {group}"
        )
        self.dtypes("quant_out", codes, *layouts.CODE_DTYPES[spec.format])
        meaning = "[..., hidden]" if multiple == 1 else "[..., hidden / 2]"
        self.rows("quant_out", codes, self.hidden // multiple, meaning)
        if spec.is_static:
            self.need(scales is None, "static FP8 writes no scale: scale_out must be None")
            return
        if scales is None:
            shape, dtype = layouts.scale_allocation(self.tokens, self.hidden, spec) or ((), torch.float32)
            self.fail(f"{spec.format.name} needs scale_out, {_dtype_names([dtype])} {list(shape)}; got None")
        assert scales is not None
        self.dtypes("scale_out", scales, *layouts.scale_dtypes(spec))
        self.scale_shape(scales)

    def scale_shape(self, scales: torch.Tensor) -> None:
        spec, tokens = self.call.spec, self.tokens
        groups = layouts.group_count(self.hidden, spec)
        if spec.layout in layouts.COLUMN_MAJOR:
            columns, ld = layouts.column_count(self.hidden, spec), layouts.leading_dimension(tokens, spec)
            forms = ((tokens, columns), (columns, ld))
            fits = scales.dim() == 2 and any(
                not (self.differ(scales.shape[0], rows) or self.differ(scales.shape[1], width)) for rows, width in forms
            )
            if not fits:
                self.fail(
                    f"scale_out ({spec.layout.name}) must be {list(forms[0])} with strides (1, {ld}), or contiguous "
                    f"{list(forms[1])}, got {list(scales.shape)}"
                )
        elif spec.layout in layouts.SWIZZLED:
            shape, _ = layouts.scale_allocation(tokens, self.hidden, spec) or ((), None)
            if self.differ(math.prod(scales.shape), math.prod(shape)):
                self.fail(
                    f"scale_out ({spec.layout.name}) must have {list(shape)} = {math.prod(shape)} elements, "
                    f"got {list(scales.shape)}"
                )
        else:
            per_token = spec.group == -1 and scales.dim() >= 1 and not self.differ(math.prod(scales.shape), tokens)
            if not per_token:
                self.rows("scale_out", scales, groups, f"[..., {groups}]")

    def tensors(self) -> dict[str, torch.Tensor]:
        """The inputs given, by name."""
        call = self.call
        rest = ("residual", "weight", "scale", "addend", "epsilon_tensor", "factor")
        named = {**call.inputs, **{name: getattr(call, name) for name in rest}}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def strides(self) -> None:
        """Real tensors only: within their storage, and contiguous, rows at one distance, or a column-major scale's
        logical view."""
        call = self.call
        for name, tensor in {**self.tensors(), **call.outputs}.items():
            self.need(within_storage(tensor), f"{name} reaches beyond its storage, which was freed or made smaller")
            got = f"got shape {list(tensor.shape)} strides {list(tensor.stride())}"
            if name == "scale_out" and call.spec.layout in layouts.COLUMN_MAJOR:
                self.column_strides(tensor)
            elif name in ("x", "residual"):
                apart = f"{name} must be contiguous, or have rows of {self.hidden} at one distance, {got}"
                self.need(row_pitch(tensor) is not None, apart)
            else:
                self.need(tensor.is_contiguous(), f"{name} must be contiguous, {got}")

    def overlaps(self) -> None:
        """Real tensors only: each output has memory of its own, or lies on an input that is read row by row before."""
        outputs = {name: Rows.span(tensor) for name, tensor in self.call.outputs.items()}
        tensors = self.tensors()
        in_place = [name for name in IN_PLACE_INPUTS if name in tensors]
        inputs = {name: Rows.of(t) if name in in_place else Rows.span(t) for name, t in tensors.items()}
        checked: list[str] = []
        for name, span in outputs.items():
            end = span.start + span.width
            for other in checked:
                if outputs[other].overlaps(span.start, end):
                    self.fail(f"{other} and {name} share memory: every output needs its own")
            checked.append(name)
            for other, rows in inputs.items():
                if not rows.overlaps(span.start, end):
                    continue
                exact = other in in_place and name in ROW_OUTPUTS and Rows.of(self.call.outputs[name]).coincides(rows)
                if not exact:
                    where = " or ".join(in_place) or "no input of this call"
                    self.fail(f"{name} shares memory with {other}: it may lie on {where} only, exactly row on row")

    def column_strides(self, scales: torch.Tensor) -> None:
        spec = self.call.spec
        if spec.layout not in layouts.COLUMN_MAJOR or scales.numel() == 0:
            return
        tokens, hidden = int(self.tokens), int(self.hidden)
        if layouts.is_transposed(scales, tokens, hidden, spec):
            return
        ld = int(layouts.leading_dimension(tokens, spec))
        columns = int(layouts.column_count(hidden, spec))
        logical = tuple(scales.shape) == (tokens, columns)
        if not logical or (tokens > 1 and scales.stride(0) != 1) or (columns > 1 and scales.stride(1) != ld):
            self.fail(
                f"scale_out ({spec.layout.name}) must be [{tokens}, {columns}] with strides (1, {ld}), or contiguous "
                f"[{columns}, {ld}], got {list(scales.shape)} with strides {list(scales.stride())}"
            )
