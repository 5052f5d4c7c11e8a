"""What each aten op makes of its inputs' states: the rules behind :mod:`aten_quant`.

A rule gives the state of a node, or None where no quantiser spec could express what the node computes.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from arfusion_pass.dialects.reading.quant_states import (
    LOW,
    Codes,
    Given,
    Kind,
    PerUnit,
    Rows,
    Scaled,
    Spread,
    State,
    single,
)
from arfusion_pass.graph import (
    FP32_MAX,
    VIEWS,
    argument,
    constant,
    dtype_of,
    is_call,
    is_cast,
    is_pure,
    is_written,
    last_dim,
    multiplies_instead,
    peel,
    same_shape,
    tensor_of,
    understood,
)
from arfusion_pass.ops.quantisers import FP8_MAX, INT8_MAX
from arfusion_pass.ops.spec import Apply, QuantFormat, ScaleRound, ScaleRule

aten = torch.ops.aten

GIVEN_DEPTH = 16
"""A given scale may be computed by so many nodes from the graph's inputs; the real ones have one or two."""

States = dict[Any, State]


def evaluate(node: fx.Node, states: States) -> State | None:
    """The state of ``node``, or None where nothing is known of it."""
    if node.target is operator.getitem:
        pair = states.get(node.args[0])
        if isinstance(pair, PerUnit) and pair.kind == Kind.AMAX_AND_INDEX and node.args[1] == 0:
            return pair.to(Kind.AMAX)
        return None
    if (dtype_of(node) is None and node.target is not aten.max.dim) or not understood(node):
        return None
    if node.target in VIEWS:
        return states.get(node.args[0])
    if is_cast(node):
        return _cast(node, states.get(node.args[0]))
    rule = _RULES.get(node.target)
    return None if rule is None else rule(node, states)


def _low(node: fx.Node) -> torch.dtype | None:
    dtype = dtype_of(node)
    return dtype if dtype in LOW else None


def _cast(node: fx.Node, state: State | None) -> State | None:
    source, dtype = dtype_of(node.args[0]), dtype_of(node)
    if isinstance(state, PerUnit) and state.kind in _INTEGER_KINDS:
        if dtype == torch.bool and state.kind == Kind.MANTISSA:
            return state.to(Kind.HAS_MANTISSA)
        return state if dtype == torch.int32 and state.kind == Kind.HAS_MANTISSA else None
    if dtype == torch.float32:
        return state if source in (*LOW, torch.float32) else None
    if dtype == torch.float8_e4m3fn and isinstance(state, Rows) and not state.absolute:
        return Codes(QuantFormat.FP8, _as_they_are(state))
    if dtype in LOW:
        if source == dtype:
            return state
        if source != torch.float32:
            return None
        if isinstance(state, Rows):
            return Rows(dtype, state.absolute) if state.rounded in (None, dtype) else None
        return state.cast_low(dtype) if isinstance(state, (PerUnit, Scaled)) else None
    if isinstance(state, Scaled) and dtype == torch.float8_e4m3fn and not state.rint:
        return Codes(QuantFormat.FP8, state)
    if isinstance(state, Scaled) and dtype == torch.int8 and state.rint:
        return Codes(QuantFormat.INT8, state)
    return None


def _as_they_are(rows: Rows) -> Scaled:
    """The norm's elements where nobody scales them: by one, which changes nothing."""
    return Scaled(rows, Given(), Apply.MULTIPLY)


def _abs(node: fx.Node, states: States) -> State | None:
    state = states.get(node.args[0])
    if isinstance(state, Rows):
        return Rows(state.rounded, True)
    if isinstance(state, PerUnit) and state.kind in (Kind.LOWEST, Kind.HIGHEST):
        return state.to(Kind.LOWEST_SIZE if state.kind == Kind.LOWEST else Kind.HIGHEST_SIZE)
    return state if isinstance(state, PerUnit) and state.kind in (Kind.AMAX, Kind.SCALE) else None


def _amax(node: fx.Node, states: States) -> State | None:
    """The largest of absolute values, or of the elements the largest or the smallest."""
    source = node.args[0]
    state, tensor = states.get(source), tensor_of(source)
    unit, dims = last_dim(source), argument(node, "dim")
    if not isinstance(state, Rows) or tensor is None or unit is None:
        return None
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    if len(dims) != 1 or dims[0] not in (-1, tensor.dim() - 1):
        return None
    absolute = {aten.amax.default: Kind.AMAX, aten.max.dim: Kind.AMAX_AND_INDEX}
    signed = {aten.amax.default: Kind.HIGHEST, aten.amin.default: Kind.LOWEST}
    kinds: dict[Any, Kind] = absolute if state.absolute else signed
    kind = kinds.get(node.target)
    return None if kind is None else PerUnit(kind, unit, state.rounded)


def _clamp(node: fx.Node, states: States) -> State | None:
    """clamp_min, clamp_max, clamp, and maximum or minimum with a constant."""
    target, args = node.target, node.args
    state = states.get(args[0])
    low, high = argument(node, "min"), argument(node, "max")
    if target in (aten.maximum.default, aten.minimum.default):
        other = states.get(args[1])
        if isinstance(state, PerUnit) and isinstance(other, PerUnit):
            sizes = {state.kind, other.kind} == {Kind.LOWEST_SIZE, Kind.HIGHEST_SIZE}
            amax = state.to(Kind.AMAX)
            return amax if sizes and target is aten.maximum.default and other.to(Kind.AMAX) == amax else None
        if state is None:
            state, low = states.get(args[1]), args[0]
        else:
            low = args[1]
        low, high = (low, None) if target is aten.maximum.default else (None, low)
    lower, upper = _everywhere(low, node), _everywhere(high, node)
    if (low is not None and lower is None) or (high is not None and upper is None):
        return None
    if isinstance(state, Rows) and not state.absolute and {lower, upper} <= {-FP8_MAX, FP8_MAX, None}:
        state = _as_they_are(state)
    if isinstance(state, Scaled):
        return state.clamped(lower, upper)
    if not isinstance(state, PerUnit):
        return None
    if state.kind in (Kind.LOWEST, Kind.HIGHEST):
        return state if (lower, upper) == ((None, 0.0) if state.kind == Kind.LOWEST else (0.0, None)) else None
    if state.kind == Kind.EXPONENT_UP:
        # 0 becomes the exponent 1 here and stays 0 in a spec: the same only where the scale cannot be that small.
        return state if lower in (1.0, None) and upper in (254.0, None) and state.positive else None
    if state.kind not in (Kind.AMAX, Kind.SCALE) or lower is None or upper is not None:
        return None
    return state.bounded(lower, _low(node))


def _everywhere(bound: Any, node: fx.Node) -> float | None:
    """The number that a bound is, also as a tensor of the result's shape that is full of it."""
    filled = is_call(bound, aten.full.default) and same_shape(bound, node) and not is_written(bound)
    return constant(bound.args[1] if filled else bound)


def _divide(node: fx.Node, states: States) -> State | None:
    a, b = node.args[0], node.args[1]
    state, low = states.get(a), _low(node)
    divisor = states.get(b) if isinstance(b, fx.Node) else None
    if isinstance(state, PerUnit):
        limit = constant(b)
        if state.kind != Kind.AMAX or divisor is not None or limit not in (FP8_MAX, INT8_MAX):
            return None
        multiplies = not isinstance(b, fx.Node) and multiplies_instead(node)
        rule = ScaleRule.MULTIPLY if multiplies else ScaleRule.DIVIDE
        return _scale(state, limit, rule, low)
    if not isinstance(state, Rows) or state.absolute:
        return None
    if isinstance(divisor, (PerUnit, Spread)):
        return _apply(node, a, b, divisor, {Kind.SCALE: Apply.DIVIDE}, states)
    if divisor is not None:
        return None
    number = constant(b) if not isinstance(b, fx.Node) else None
    if number is not None and number != 0.0 and multiplies_instead(node):
        factor = single(1.0 / number)
        if factor != single(1.0 / single(number)) or abs(factor) > FP32_MAX:
            return None  # whether CUDA takes the reciprocal in fp32 or fp64 differs between dtypes and releases
        given: Given | None = Given(value=factor)
        return _apply_given(node, a, given, Apply.MULTIPLY, states)
    return _apply_given(node, a, _given(node, a, b), Apply.DIVIDE, states)


def _scale(amax: PerUnit, limit: float, rule: ScaleRule, low: torch.dtype | None) -> PerUnit | None:
    scale = amax.to(Kind.SCALE, limit=limit, rule=rule)
    if low is None:
        return scale
    return scale.cast_low(low)


def _multiply(node: fx.Node, states: States) -> State | None:
    a, b = node.args[0], node.args[1]
    state_a = states.get(a)
    state_b = states.get(b) if isinstance(b, fx.Node) else None
    if state_a is None or (isinstance(state_a, (PerUnit, Spread)) and isinstance(state_b, Rows)):
        a, b, state_a, state_b = b, a, state_b, state_a
    if isinstance(state_a, PerUnit):
        factor = constant(b, operation=node)
        if state_b is not None or factor is None:
            return None
        if factor == 1.0:
            return state_a if dtype_of(node) == dtype_of(a) else None  # what 1.0 / scale leaves
        if state_a.kind == Kind.INVERSE_AMAX and factor in (FP8_MAX, INT8_MAX) and _low(node) is None:
            return state_a.to(Kind.ENCODE, limit=factor)
        for limit in (FP8_MAX, INT8_MAX):
            if state_a.kind == Kind.AMAX and single(factor) == single(1.0 / limit):
                return _scale(state_a, limit, ScaleRule.MULTIPLY, _low(node))
        return None
    if not isinstance(state_a, Rows) or state_a.absolute:
        return None
    if isinstance(state_b, (PerUnit, Spread)):
        factors = {Kind.INVERSE_SCALE: Apply.RECIPROCAL, Kind.ENCODE: Apply.MAX_OVER_AMAX}
        return _apply(node, a, b, state_b, factors, states)
    if state_b is not None:
        return None
    if is_call(b, aten.reciprocal.default) and dtype_of(b) == torch.float32:
        inner = _given(node, a, b)
        scale = _given(node, a, b.args[0])  # type: ignore[union-attr]
        if inner is not None and inner.dtype is None and scale is not None and scale.node is not None:
            return _apply_given(node, a, Given(scale.node), Apply.RECIPROCAL, states)
    return _apply_given(node, a, _given(node, a, b), Apply.MULTIPLY, states)


def _apply(
    node: fx.Node, rows: Any, by: Any, state: PerUnit | Spread, applies: dict[Kind, Apply], states: States
) -> State | None:
    """Rows scaled by a number per unit, which must meet the rows of its own unit: one of them for each, or as many of
    them as there are elements."""
    value, factor = tensor_of(rows), tensor_of(by)
    number = state.number if isinstance(state, Spread) else state
    apply = applies.get(number.kind)
    if apply is None or value is None or factor is None or not same_shape(node, rows):
        return None
    if isinstance(state, Spread):
        if not same_shape(by, rows):
            return None
    else:
        if value.dim() != factor.dim() or last_dim(rows) != number.unit or last_dim(by) != 1:
            return None
        sizes = zip(factor.shape[:-1], value.shape[:-1], strict=True)
        if not all(statically_known_true(x == y) for x, y in sizes):
            return None
    kind = Kind.SCALE if apply != Apply.MAX_OVER_AMAX else Kind.ENCODE
    return Scaled(states[rows], number.to(kind), apply, _low(node))  # type: ignore[arg-type]


def _expand(node: fx.Node, states: States) -> State | None:
    """One number for each unit, repeated along a last dimension of one element: for each element of the unit."""
    state, before, after = states.get(node.args[0]), tensor_of(node.args[0]), tensor_of(node)
    if same_shape(node, node.args[0]):
        return state
    if not isinstance(state, PerUnit) or state.kind not in (Kind.SCALE, Kind.INVERSE_SCALE, Kind.ENCODE):
        return None
    if before is None or after is None or before.dim() != after.dim():
        return None
    leading = zip(before.shape[:-1], after.shape[:-1], strict=True)
    spreads = last_dim(node.args[0]) == 1 and last_dim(node) == state.unit
    return Spread(state) if spreads and all(statically_known_true(x == y) for x, y in leading) else None


def _apply_given(node: fx.Node, rows: Any, given: Given | None, apply: Apply, states: States) -> State | None:
    if given is None or not same_shape(node, rows):
        return None
    return Scaled(states[rows], given, apply, _low(node))  # type: ignore[arg-type]


def _given(node: fx.Node, rows: Any, factor: Any) -> Given | None:
    """The given scale that ``factor`` is, with what ``node`` (an operation of ``rows`` with it) rounds it to."""
    if not isinstance(factor, fx.Node):
        number = constant(factor)
        return None if number is None else Given(value=number)
    while is_call(factor, aten.expand.default):
        factor = factor.args[0]
    low, given = _low(node), peel(factor)
    tensor, scale = tensor_of(factor), tensor_of(given)
    if tensor is None or scale is None or not all(statically_known_true(size == 1) for size in scale.shape):
        return None
    if scale.device != tensor_of(node).device or scale.dtype not in (*LOW, torch.float32):  # type: ignore[union-attr]
        return None
    if low is None:
        return Given(given) if _independent(given) else None
    # Promotion to 16 bits: the factor is of that dtype, or 0-dim and wider.
    if tensor.dtype == low:
        return Given(factor) if _independent(factor) else None
    if tensor.dim() != 0 or tensor.dtype != torch.float32 or not _independent(given):
        return None
    return Given(given, dtype=None if tensor.device.type == "cpu" or scale.dtype == low else low)


def _independent(node: fx.Node) -> bool:
    """Whether ``node`` comes from the graph's inputs by a few pure nodes, so that it cannot come from the norm."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current.op in ("placeholder", "get_attr") or current in seen:
            continue
        seen.add(current)
        if len(seen) > GIVEN_DEPTH or not is_pure(current):
            return False
        stack.extend(current.all_input_nodes)
    return True


def _clone(node: fx.Node, states: States) -> State | None:
    state = states.get(node.args[0])
    return state if isinstance(state, Spread) else None


def _reciprocal(node: fx.Node, states: States) -> State | None:
    state = states.get(node.args[0])
    if not isinstance(state, PerUnit) or _low(node) is not None:
        return None
    if state.kind == Kind.ENCODE:
        return state.to(Kind.SCALE, rule=ScaleRule.RECIPROCAL)
    kind = {Kind.AMAX: Kind.INVERSE_AMAX, Kind.SCALE: Kind.INVERSE_SCALE}.get(state.kind)
    return None if kind is None else state.to(kind)


def _round(node: fx.Node, states: States) -> State | None:
    state = states.get(node.args[0])
    if not isinstance(state, Scaled) or state.rint:
        return None
    return dataclasses.replace(state, rint=True)


# Rules of rounding a scale up to a power of two -----------------------------------------------------------------------


def _step(before: Kind, after: Kind) -> Callable[[fx.Node, States], State | None]:
    """The rule of a unary fp32 op on the scale."""

    def rule(node: fx.Node, states: States) -> State | None:
        state = states.get(node.args[0])
        if not isinstance(state, PerUnit) or state.kind != before or _low(node) is not None:
            return None
        return state.to(after) if state.scale_round == ScaleRound.FP32 else None

    return rule


def _exp2(node: fx.Node, states: States) -> State | None:
    """``exp2(ceil(log2(scale)))``, also as ``pow(2.0, ...)``."""
    power = node.target is aten.pow.Scalar
    if power and node.args[0] != 2:
        return None
    state = states.get(node.args[1 if power else 0])
    if not isinstance(state, PerUnit) or state.kind != Kind.CEILED or _low(node) is not None:
        return None
    return state.to(Kind.SCALE, scale_round=ScaleRound.POW2_LOG2)


def _view_dtype(node: fx.Node, states: States) -> State | None:
    state, dtype = states.get(node.args[0]), dtype_of(node)
    if not isinstance(state, PerUnit):
        return None
    if dtype == torch.int32 and state.kind == Kind.SCALE and dtype_of(node.args[0]) == torch.float32:
        return state.to(Kind.BITS) if state.scale_round == ScaleRound.FP32 else None
    if dtype == torch.float32 and state.kind == Kind.POWER_BITS:
        return state.to(Kind.SCALE, scale_round=ScaleRound.POW2)
    return None


_INTEGER_KINDS = (
    Kind.BITS,
    Kind.BITS_UP,
    Kind.EXPONENT_SIGNED,
    Kind.MANTISSA,
    Kind.HAS_MANTISSA,
    Kind.EXPONENT_UP,
    Kind.POWER_BITS,
)
_EXPONENT_MASK = (0x7F800000, -0x800000, 0xFF800000)
_INTEGER_RULES: dict[tuple[Any, Kind], dict[float, Kind]] = {}


def _integer(node: fx.Node, states: States) -> State | None:
    """Integer ops on the scale's bits with a constant, by table; and the sum of exponent and carry."""
    a, b = node.args[0], node.args[1]
    state, other = states.get(a), states.get(b) if isinstance(b, fx.Node) else None
    if isinstance(state, PerUnit) and isinstance(other, PerUnit):
        kinds = {state.kind, other.kind}
        same = state.to(Kind.BITS) == other.to(Kind.BITS) and argument(node, "alpha", 1) == 1
        if node.target is aten.add.Tensor and kinds == {Kind.EXPONENT_SIGNED, Kind.HAS_MANTISSA} and same:
            return state.to(Kind.EXPONENT_UP)
        return None
    number = constant(b)
    if not isinstance(state, PerUnit) or number is None:
        return None
    after = _INTEGER_RULES.get((node.target, state.kind), {}).get(number)
    return None if after is None else state.to(after)


def _integer_rules() -> None:
    shifts_right = (aten.bitwise_right_shift.Tensor_Scalar, aten.__rshift__.Scalar, aten.__rshift__.Tensor)
    shifts_left = (aten.bitwise_left_shift.Tensor_Scalar, aten.__lshift__.Scalar, aten.__lshift__.Tensor)
    ands = (aten.bitwise_and.Scalar, aten.bitwise_and.Tensor, aten.__and__.Scalar)
    table: list[tuple[tuple[Any, ...], Kind, dict[float, Kind]]] = [
        ((aten.add.Tensor, aten.add.Scalar), Kind.BITS, {float(0x7FFFFF): Kind.BITS_UP}),
        (ands, Kind.BITS_UP, {float(mask): Kind.POWER_BITS for mask in _EXPONENT_MASK}),
        (shifts_right, Kind.BITS, {23.0: Kind.EXPONENT_SIGNED}),
        (ands, Kind.EXPONENT_SIGNED, {255.0: Kind.EXPONENT_SIGNED}),
        (ands, Kind.BITS, {float(0x7FFFFF): Kind.MANTISSA}),
        ((aten.ne.Scalar, aten.gt.Scalar), Kind.MANTISSA, {0.0: Kind.HAS_MANTISSA}),
        (shifts_left, Kind.EXPONENT_UP, {23.0: Kind.POWER_BITS}),
    ]
    for targets, before, outcomes in table:
        for target in targets:
            _INTEGER_RULES[target, before] = outcomes


_integer_rules()

_RULES: dict[Any, Callable[[fx.Node, States], State | None]] = {
    aten.abs.default: _abs,
    **dict.fromkeys((aten.amax.default, aten.amin.default, aten.max.dim), _amax),
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default), _clamp),
    **dict.fromkeys((aten.maximum.default, aten.minimum.default), _clamp),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _divide),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _multiply),
    aten.reciprocal.default: _reciprocal,
    aten.expand.default: _expand,
    aten.clone.default: _clone,
    aten.round.default: _round,
    aten.log2.default: _step(Kind.SCALE, Kind.LOG2),
    aten.ceil.default: _step(Kind.LOG2, Kind.CEILED),
    **dict.fromkeys((aten.exp2.default, aten.pow.Scalar), _exp2),
    aten.view.dtype: _view_dtype,
    **{target: _integer for target, _ in _INTEGER_RULES},
}
