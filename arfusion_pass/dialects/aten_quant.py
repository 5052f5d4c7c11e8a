"""aten's spellings of quantisers behind a norm: plain torch code for FP8 and INT8, as Inductor's decompositions
leave it. ``[...]`` may be missing, views (reshape, unsqueeze, squeeze) and lossless casts may stand anywhere::

    FP8 with a given scale, or with none
      [%y    = aten.div.Tensor(%norm, %scale)             # scale of one element or a number
               or aten.mul.Tensor(%norm, %scale), or mul(%norm, reciprocal(%scale))]
      [%y    = clamp_max(clamp_min(%y, -448), 448)]       # either order, or aten.clamp
      %codes = convert_element_type(%y, float8_e4m3fn)    # a cast to the norm's dtype may come before

    FP8 and INT8 per token, FP8 per group of 128, 64 or 32 (%v = reshape(%norm, [T, H / g, g]))
      %amax  = aten.amax.default(aten.abs.default(%v), [-1], True)       # or max.dim and getitem 0
               or maximum(abs(amin(%v)), abs(amax(%v))), either one with 0 before
      [%amax = aten.clamp_min.default(%amax, bound)]
      %scale = aten.div.Tensor(%amax, 448.0)              # INT8: 127; or mul by 1 / 448
      [%scale = aten.clamp_min.default(%scale, bound)]
      [%scale = exp2(ceil(log2(%scale)))]                 # no bit form of it: those make a number of NaN
      %y     = aten.div.Tensor(%v, %scale)                # or mul(%v, reciprocal(%scale))
               or mul(%v, mul(reciprocal(%amax), 448.0))  # DeepSeek's 448 / amax; %scale for the output only
               the scale as it is, or aten.expand of it to the shape of %v, a clone and a reshape of that
      INT8:    %y = aten.round.default(%y)
      the clamp and the cast as above; INT8: [-128, 127] or [-127, 127], to int8

    column-major scales, where nobody reads %scale but
      aten.clone.default(aten.permute.default(%scale, [1, 0]), memory_format=contiguous_format)
               or aten.constant_pad_nd.default(permute, [0, pad], 0.0) up to a multiple of 4 tokens (TMA)
               or aten.copy.default(a tensor of such strides, %scale)

Not a chain is compared, but each node behind the norm is given a state (:mod:`quant_states`) by its op's rule, in
graph order; what no rule knows ends the walk. A dtype of 16 bits where arithmetic happens is a rounding, and recorded
as one. On CUDA an eager division by a Python number multiplies by its reciprocal, and a 0-dim scale is rounded to the
other operand's dtype first; on CPU neither is so.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable

import torch
from torch import fx

from arfusion_pass.dialects.reading.base import Dialect, Quantised, Refused
from arfusion_pass.dialects.reading.quant_rules import States, evaluate
from arfusion_pass.dialects.reading.quant_states import LOW, Codes, Given, Kind, PerUnit, Rows, Scaled, Spread
from arfusion_pass.dialects.reading.scale_copies import column_copy
from arfusion_pass.graph import (
    PRODUCTS,
    VIEWS,
    describe,
    dtype_of,
    is_call,
    keeps_rows,
    last_dim,
    same_shape,
    source_of,
    statically_equal,
    tensor_of,
    widens,
)
from arfusion_pass.ops.spec import Apply, Bound, QuantFormat, ScaleRound, ScaleRule

aten = torch.ops.aten
_EXTREMES = (aten.amax.default, aten.max.default, aten.amin.default, aten.min.default)


class AtenQuant(Dialect):
    """Quantisers in aten and prims ops."""

    name = "aten"

    def quantisers(self, norm: fx.Node) -> Iterable[Quantised | Refused]:
        """Every cast to FP8 or INT8 that ends a chain this dialect knows, in graph order."""
        if keeps_rows(norm):
            return  # the walk from the norm itself goes through its views
        hidden, dtype = last_dim(norm), dtype_of(norm)
        if hidden is None or dtype is None:
            return
        states: States = {norm: Rows(dtype if dtype in LOW else None)}
        codes: list[fx.Node] = []
        unknown: fx.Node | None = None
        queue = list(norm.users)
        heapq.heapify(queue)
        while queue:
            node = heapq.heappop(queue)
            if node in states or node.op != "call_function":
                continue
            state = evaluate(node, states)
            if state is None:
                unknown = unknown or (node if node.users and _stuck(node, states) else None)
                continue
            states[node] = state
            if isinstance(state, Codes):
                codes.append(node)
            else:
                for user in node.users:
                    heapq.heappush(queue, user)
        quantised = [_quantised(norm, node, states, hidden) for node in codes]
        yield from quantised
        if not codes and unknown is not None:
            yield Refused(_why_unknown(unknown), unknown)


def _why_unknown(step: fx.Node) -> str:
    """What to say of the first step that no rule knows."""
    if _of_all_tokens(step):
        return (
            f"{describe(step)} finds one scale for all tokens, which exists once all their norms do; the kernels have "
            "a scale that is given, or one for each token or group"
        )
    return f"{describe(step)} is no step of a quantiser that the kernels have"


def _of_all_tokens(step: fx.Node) -> bool:
    """Whether a step finds the largest or the smallest of a whole tensor."""
    tensor = tensor_of(step)
    return is_call(step, *_EXTREMES) and tensor is not None and statically_equal(tensor.numel(), 1)


def _stuck(node: fx.Node, states: States) -> bool:
    """Whether ``node``, which no rule knows, computes or reads a value that only a quantiser computes. What a product
    reads scaled is a factor of the model's own, as Falcon-H1 has one behind its norms."""
    if _of_all_tokens(node):
        return True
    if is_call(node, *PRODUCTS):
        return False
    inputs = [states.get(inner) for inner in node.all_input_nodes]
    tell = [
        each
        for each in inputs
        if isinstance(each, (PerUnit, Spread, Scaled)) or (isinstance(each, Rows) and each.absolute)
    ]
    return any(not (isinstance(each, PerUnit) and each.kind == Kind.HIGHEST) for each in tell)  # so begins a softmax


def _quantised(norm: fx.Node, node: fx.Node, states: States, hidden: int) -> Quantised | Refused:
    """The quantiser whose codes are first complete at ``node``; Refused where no spec computes them."""
    state = states[node]
    assert isinstance(state, Codes)
    spec = state.spec(hidden)
    if spec is None or len(state.dtypes) > 1:
        return Refused(f"{describe(node)} {state.misfit(hidden)}", node)
    by = state.scaled.by
    if isinstance(by, PerUnit) and by.scale_round == ScaleRound.POW2:
        return Refused(
            f"{describe(node)} is quantised by a scale that is rounded up to a power of two by its bits: of a NaN that "
            "makes a number, and the kernels keep it; exp2(ceil(log2(scale))) is fused",
            node,
        )
    tail: list[fx.Node] = []
    codes = node
    while not same_shape(codes, norm) and len(codes.users) == 1:
        user = next(iter(codes.users))
        if not is_call(user, *VIEWS):
            break
        tail.append(user)
        codes = user
    codes, tail = (codes, tail) if same_shape(codes, norm) else (node, [])
    slice_ = _slice(norm, node, states)
    dtype = next(iter(state.dtypes), None)
    if isinstance(by, Given):
        return Quantised(
            op="quant_fp8_static",
            spec=spec,
            codes=codes,
            nodes=(*sorted(slice_), *tail),
            scale=by.node,
            scale_value=by.value,
            dtype=dtype,
            scale_dtype=by.dtype,
        )
    scale, rule, written = _scales(by, state.scaled.apply, slice_, states)
    layout = spec.layout
    if scale is not None:
        slice_ |= _slice(norm, scale, states)
        copy = column_copy(scale, slice_) if spec.group > 0 else None
        if copy is not None:
            scale, layout, path = copy
            tail += path
    spec = dataclasses.replace(spec, layout=layout, scale_rule=rule, scale_round=written)
    names = {QuantFormat.INT8: "quant_int8_token"}
    op = names.get(spec.format, "quant_fp8_token" if spec.group == -1 else "quant_fp8_group")
    return Quantised(op=op, spec=spec, codes=codes, nodes=tuple(sorted({*slice_, *tail})), scales=scale, dtype=dtype)


def _slice(norm: fx.Node, end: fx.Node, states: States) -> set[fx.Node]:
    """The nodes with a state that ``end`` is computed from, ``end`` included, the norm not; and the index that
    ``max.dim`` gives besides, where nobody reads it."""
    slice_: set[fx.Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node is not norm and node not in slice_:
            slice_.add(node)
            if node.target is aten.max.dim:
                slice_.update(item for item in node.users if not item.users)
            stack.extend(inner for inner in node.all_input_nodes if inner in states)
    return slice_


def _scales(
    by: PerUnit, apply: Apply, slice_: set[fx.Node], states: States
) -> tuple[fx.Node | None, ScaleRule, ScaleRound]:
    """The node that holds the scales which go with the codes (None where nobody reads them), their rule and rounding.

    Scales that the graph rounds to 16 bits are their node there, where somebody reads them so, else that of their fp32
    form. With ``MAX_OVER_AMAX`` the codes do not need the scale: any scale of the same ``amax`` is theirs, and without
    one the fused op writes ``amax / max`` for nobody.
    """
    amax = by.amax
    for node, state in states.items():
        if not isinstance(state, PerUnit) or state.kind != Kind.SCALE:
            continue
        if dtype_of(node) != torch.float32 and not _read_narrow(node, slice_):
            continue
        if apply == Apply.MAX_OVER_AMAX:
            plain = state.scale_round == ScaleRound.FP32 and state.bound_on != Bound.SCALE
            same = plain and state.amax == amax and state.limit == by.limit
        else:
            same = state == by
        if same and _read_outside(node, slice_) and _of_same_amax(node, slice_, states):
            return node, state.rule, state.scale_round
    return None, ScaleRule.DIVIDE if apply == Apply.MAX_OVER_AMAX else by.rule, by.scale_round


def _read_narrow(scale: fx.Node, slice_: set[fx.Node]) -> bool:
    """Whether somebody outside reads scales of 16 bits as they are, and not only widened to fp32."""
    stack = [scale]
    while stack:
        node = stack.pop()
        for user in node.users:
            if source_of(user) is node:
                stack.append(user)
            elif user not in slice_ and not widens(user):
                return True
    return False


def _read_outside(node: fx.Node, slice_: set[fx.Node]) -> bool:
    return any(user not in slice_ for user in node.users)


def _of_same_amax(scale: fx.Node, slice_: set[fx.Node], states: States) -> bool:
    """Whether ``scale`` is computed from a node of ``slice_``, and not by another quantiser from an amax of its own."""
    stack = [scale]
    while stack:
        node = stack.pop()
        if node in slice_:
            continue
        if not isinstance(states.get(node), PerUnit) or is_call(
            node, aten.amax.default, aten.amin.default, aten.max.dim
        ):
            return False
        stack.extend(inner for inner in node.all_input_nodes if inner in states)
    return True


DIALECT = AtenQuant()
