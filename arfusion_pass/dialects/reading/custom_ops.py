"""Dialects of custom ops as tables: schema name to how the op is called, by the names of its arguments.

    NORMS = {"sgl_kernel::rmsnorm": NormOp("input", norm="output", flags=..., epsilon="eps")}
    QUANTISERS = {"sgl_kernel::sgl_per_token_quant_fp8": QuantOp("input", "output_q", spec, scales="output_s")}
    DIALECT = CustomOpDialect("sglang", {"sglang::outplace_all_reduce": functional_all_reduce(...)}, NORMS, QUANTISERS)

No engine is imported for it; how a graph spells a call is :mod:`arfusion_pass.dialects.reading.op_calls`' matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from arfusion_pass.dialects.reading.base import (
    Dialect,
    Gathered,
    Norm,
    Quantised,
    Reduced,
    Refused,
    Rows,
    Scattered,
)
from arfusion_pass.dialects.reading.op_calls import OpCall, Operand, Output, is_contiguous, op_name, product, same
from arfusion_pass.dialects.reading.operands import Sum, epsilon_of, epsilon_reason, readable_total, weight_of
from arfusion_pass.graph import (
    constant,
    describe,
    dtype_of,
    is_cast,
    last_dim,
    only_user,
    path,
    row_views,
    tensor_of,
    widens,
)
from arfusion_pass.ops.layouts import CODE_DTYPES, token_count
from arfusion_pass.ops.spec import Flags

FlagRule = Callable[[OpCall, torch.dtype, "torch.dtype | None", bool], Flags]
"""``(call, dtype of x as the op sees it, the weight's, whether the op adds a residual)`` to the rounding flags."""


@dataclasses.dataclass(frozen=True)
class NormOp:
    """How one norm op is called; every name is an argument of its schema.

    Attributes:
        x, weight, epsilon: what it reads. ``weight`` None: the op has none.
        norm: the result that is the norm; None where the op quantises it at once (``quant``).
        flags: its rounding.
        residual: the second operand of the add, where the op adds. It may be None at a call.
        total: the result that is the sum.
        weight_bias: what the op adds to its weight (Gemma: 1).
        default_epsilon: what an epsilon of None means, or None.
        mixed: the op takes 16-bit and fp32 operands in any mix.
        fp32: the op takes fp32 operands, all of them, as well as 16-bit ones.
        fp32_weight: whether a call's op takes an fp32 weight beside a 16-bit ``x``, and multiplies in fp32.
        refuse: a reason against one call, or None.
        quant: the quantiser that the op ends in.
    """

    x: str
    norm: Output | None
    flags: FlagRule
    epsilon: str = "epsilon"
    weight: str | None = "weight"
    residual: str | None = None
    total: Output | None = None
    weight_bias: float = 0.0
    default_epsilon: float | None = None
    mixed: bool = False
    fp32: bool = False
    fp32_weight: Callable[[OpCall], bool] = lambda call: False
    refuse: Callable[[OpCall], str | None] = lambda call: None
    quant: QuantOp | None = None

    def recognise(self, call: OpCall, start: fx.Node, candidate: Sum, value: fx.Node) -> Norm | Refused | None:
        """The norm that ``call`` is, reading ``start``: the reduced ``value`` or its sum with a residual, as it is or
        widened to fp32."""
        roles = [role for role in (self.x, self.residual) if call.reads(role, start)]
        if not roles:
            return Refused(
                f"{describe(call.node)} reads {describe(start)}, and not as the rows that it normalises", call.node
            )
        if len(roles) > 1:
            return Refused(f"{describe(call.node)} adds {describe(start)} to itself", call.node)
        if call.in_place:
            return Refused(
                f"{describe(call.node)} writes in place: the pass runs where Inductor has no auto_functionalized "
                "calls (any more); install it as post_grad_custom_post_pass",
                call.node,
            )
        residual = call.operand(self.residual if roles[0] == self.x else self.x)
        if residual is not None and candidate.residual is not None:
            return None
        reason = self.refuse(call) or self._misfit(call, start, value, residual)
        if reason is not None:
            return Refused(reason, call.node)
        given_epsilon = call[self.epsilon]
        epsilon: float | fx.Node | None = self.default_epsilon
        if given_epsilon is not None:
            epsilon = constant(given_epsilon, finite=False)
            epsilon = epsilon_of(given_epsilon) if epsilon is None else epsilon
        if epsilon is None:
            return Refused(epsilon_reason(call[self.epsilon]), call.node)
        dtype, x_dtype = dtype_of(value), dtype_of(start)
        given = None if self.weight is None else call[self.weight]
        weight = None if given is None else weight_of(given, last_dim(start), dtype)
        if given is not None and weight is None:
            return Refused(f"the weight {describe(given)} of {describe(call.node)} is no [hidden] vector", call.node)
        assert dtype is not None and x_dtype is not None
        casts = (start,) if start is not candidate.start and widens(start) else ()
        views = path(candidate.start, start.args[0] if casts else start)  # type: ignore[arg-type]
        nodes = (*candidate.nodes, *views, *casts, *call.nodes)
        norm = call.output(self.norm)
        quant: Quantised | None = None
        if self.quant is not None:
            found = self.quant.recognise(call, start, alone=False)
            if isinstance(found, Refused):
                return found
            spec = dataclasses.replace(found.spec, unrounded=found.spec.unrounded or x_dtype == torch.float32 != dtype)
            quant = dataclasses.replace(found, spec=spec, nodes=nodes)
        elif norm is None:
            return Refused(f"nobody reads the norm of {describe(call.node)}", call.node)
        else:
            last = only_user(norm)
            if last is not None and dtype_of(norm) == torch.float32 != dtype and is_cast(last, dtype):
                norm, nodes = last, (*nodes, last)
        total = readable_total(candidate, nodes) if residual is None else call.output(self.total)
        flags = candidate.flags | self.flags(call, x_dtype, dtype_of(given), residual is not None)
        if (reason := call.stranger()) is not None:
            return Refused(reason, call.node)
        return Norm(
            operand=value,
            norm=norm,
            epsilon=epsilon,
            epsilon_at=call.node,
            nodes=nodes if total is None or total in nodes else (*nodes, total),
            weight=None if weight is None else weight.node,
            weight_bias=0.0 if weight is None else self.weight_bias + weight.bias,
            flags=flags,
            residual=candidate.residual if residual is None else residual.node,
            total=total,
            quant=quant,
        )

    def _misfit(self, call: OpCall, start: fx.Node, value: fx.Node, residual: Operand | None) -> str | None:
        dtype, x_dtype, name = dtype_of(value), dtype_of(start), describe(call.node)
        if x_dtype != dtype and not (self.mixed or self.fp32):
            return (
                f"{describe(call.node)} normalises {describe(start)}, which is {x_dtype}; the op takes only 16-bit "
                f"tensors: round to {dtype} in front of it"
            )
        if residual is not None and not residual.whole:
            return f"the residual of {name} is a part of {describe(residual.node)}"
        if self.mixed:
            return None
        weight = None if self.weight is None else call[self.weight]
        if dtype_of(weight) == torch.float32 and self.fp32_weight(call):
            weight = None
        operands = {"weight": weight, "residual": None if residual is None else residual.node}
        for role, node in {**operands, "result": call.output(self.norm)}.items():
            if node is not None and dtype_of(node) != x_dtype:
                return (
                    f"the {role} {describe(node)} of {name} is {dtype_of(node)}; the op takes only {x_dtype} beside an "
                    f"input of {x_dtype}: cast it to that"
                )
        return None


@dataclasses.dataclass(frozen=True)
class QuantOp:
    """How one quantiser op is called.

    Attributes:
        x: the argument that is quantised.
        codes: the result that holds the codes.
        spec: of one call, given the node that is quantised: the canonical op and the spec, or why there is none.
        scales: the result that holds the scales; None where the scale is given.
        scale: the argument that gives the scale.
    """

    x: str
    codes: Output
    spec: Callable[[OpCall, fx.Node], Any]
    scales: Output | None = None
    scale: str | None = None

    def recognise(self, call: OpCall, norm: fx.Node, alone: bool = True) -> Quantised | Refused:
        """The quantiser that ``call`` is, reading ``norm``; or a part of what it is, not ``alone``."""
        if alone and not call.reads(self.x, norm):
            return Refused(f"{describe(call.node)} reads {describe(norm)}, and not as what it quantises", call.node)
        if call.in_place:
            return Refused(f"{describe(call.node)} writes in place, outside auto_functionalized", call.node)
        codes, scales = call.output(self.codes), call.output(self.scales)
        if codes is None:
            return Refused(f"nobody reads the codes of {describe(call.node)}", call.node)
        found = self.spec(call, norm)
        if isinstance(found, (str, Refused)):
            return Refused(found, call.node) if isinstance(found, str) else found
        op, spec = found
        if dtype_of(codes) not in CODE_DTYPES[spec.format]:
            return Refused(f"{describe(codes)} holds {dtype_of(codes)}, no codes of {spec.format.name}", codes)
        if not _has_rows(codes, norm):
            return Refused(f"{describe(codes)} has another number of rows than {describe(norm)}", codes)
        quantised = Quantised(op=op, spec=spec, codes=codes, nodes=call.nodes, scales=scales)
        number, scale = constant(call[self.scale or ""]), call.operand(self.scale)
        if alone and (reason := call.stranger()) is not None:
            return Refused(reason, call.node)
        if self.scale is None:
            return quantised
        if number is not None and scale is None:
            return dataclasses.replace(quantised, scale_value=number)
        if scale is None or not scale.whole or not same(product(scale.size), 1):
            return Refused(f"{describe(call.node)} has no scale of one element", call.node)
        if scale.dtype != torch.float32:
            return Refused(f"the scale of {describe(call.node)} is {scale.dtype}, expected float32", call.node)
        return dataclasses.replace(quantised, scale=scale.node)


def _has_rows(codes: fx.Node, norm: fx.Node) -> bool:
    """Whether the codes have as many rows as what was quantised (a buffer may be padded)."""
    a, b = tensor_of(codes), tensor_of(norm)
    if a is None or b is None or a.dim() == 0 or b.dim() == 0:
        return False
    return same(token_count(a.shape), token_count(b.shape)) and is_contiguous(a.shape, a.stride())


class CustomOpDialect(Dialect):
    """A dialect that is tables of ops by schema name.

    Args:
        name: for the report.
        reductions: all-reduce ops.
        norms: norm ops, with or without an add and a quantiser.
        quantisers: quantiser ops.
        scatters, gathers: reduce-scatter and all-gather ops.
    """

    def __init__(
        self,
        name: str,
        reductions: Mapping[str, Callable[[OpCall], Reduced | Refused]] | None = None,
        norms: Mapping[str, NormOp] | None = None,
        quantisers: Mapping[str, QuantOp] | None = None,
        scatters: Mapping[str, Callable[[OpCall], Scattered | Refused]] | None = None,
        gathers: Mapping[str, Callable[[OpCall, fx.Node], Gathered | None]] | None = None,
    ) -> None:
        self.name = name
        self.scatter_ops = dict(scatters or {})
        self.gather_ops = dict(gathers or {})
        self.reduction_ops = dict(reductions or {})
        self.norm_ops = dict(norms or {})
        self.quantiser_ops = dict(quantisers or {})

    def all_reduce(self, node: fx.Node) -> Reduced | Refused | None:
        """The all-reduce that ``node`` is, if its op is in the table."""
        reduction = self.reduction_ops.get(op_name(node) or "")
        return None if reduction is None else reduction(OpCall(node))

    def reduce_scatter(self, node: fx.Node) -> Scattered | Refused | None:
        """The reduce-scatter that ``node`` is, if its op is in the table."""
        scatter = self.scatter_ops.get(op_name(node) or "") if self.scatter_ops else None
        return None if scatter is None else scatter(OpCall(node))

    def all_gathers(self, shard: fx.Node) -> Iterable[Gathered]:
        """The all-gathers in the table that read ``shard``."""
        for user in list(shard.users) if self.gather_ops else ():
            gather = self.gather_ops.get(op_name(user) or "")
            found = None if gather is None else gather(OpCall(user), shard)
            if found is not None:
                yield found

    def norms(self, value: fx.Node, candidates: Sequence[Sum]) -> Iterable[Norm | Refused]:
        """Direct norms of ``value`` first, then those of its sums with a residual."""
        for candidate in candidates if self.norm_ops else ():
            for view in row_views(candidate.start):
                for start in (view, *filter(widens, list(view.users))):
                    for user in list(start.users):
                        entry = self.norm_ops.get(op_name(user) or "")
                        norm = None if entry is None else entry.recognise(OpCall(user), start, candidate, value)
                        if norm is not None:
                            yield norm

    def quantisers(self, norm: fx.Node) -> Iterable[Quantised | Refused]:
        """The quantisers in the table that read ``norm``."""
        for user in list(norm.users):
            entry = self.quantiser_ops.get(op_name(user) or "")
            if entry is None:
                continue
            quant = entry.recognise(OpCall(user), norm)
            if isinstance(quant, Quantised) and dtype_of(norm) == torch.float32:
                # of a norm that was never rounded to the reduced tensor's dtype (of an fp32 site, raising drops this)
                quant = dataclasses.replace(quant, spec=dataclasses.replace(quant.spec, unrounded=True))
            yield quant


def functional_all_reduce(x: str, group: str, reduce_op: str | None = None) -> Callable[[OpCall], Reduced | Refused]:
    """An all-reduce op that returns the sum: the names of its arguments."""

    def recognise(call: OpCall) -> Reduced | Refused:
        if call.in_place or call.functionalized:
            return Refused(f"{describe(call.node)} reduces in place; an out-of-place all-reduce is fused", call.node)
        if reduce_op is not None and call[reduce_op] != "sum":
            return Refused(f"{describe(call.node)} reduces by {call[reduce_op]!r}; only 'sum' is fused", call.node)
        tensor, name = call[x], call[group]
        if not isinstance(name, str) or not isinstance(tensor, fx.Node):
            return Refused(f"{describe(call.node)} names its group by {name!r}, not by a string", call.node)
        if (reason := call.stranger()) is not None:
            return Refused(reason, call.node)
        return Reduced(node=call.node, value=call.node, x=tensor, group=name, nodes=(call.node,))

    return recognise


def functional_reduce_scatter(x: str, dim: str, world: str, group: str) -> Callable[[OpCall], Scattered | Refused]:
    """A reduce-scatter op that returns this rank's part of the sum: the names of its arguments."""

    def recognise(call: OpCall) -> Scattered | Refused:
        tensor, size, name = call[x], call[world], call[group]
        if not isinstance(name, str) or not isinstance(tensor, fx.Node) or not isinstance(size, int):
            return Refused(f"{describe(call.node)} names its group by {name!r}, {size!r}", call.node)
        block = _block(tensor, call.node, call[dim])
        if isinstance(block, str):
            return Refused(f"{describe(call.node)} {block}", call.node)
        if isinstance(block, torch.SymInt):
            return Refused(f"{describe(call.node)} scatters a dimension of symbolic length behind others", call.node)
        rows = Rows(tensor, block)
        return Scattered(call.node, call.node, tensor, name, nodes=(call.node,), world=size, rows=(rows,))

    return recognise


def functional_all_gather(x: str, dim: str, world: str, group: str) -> Callable[[OpCall, fx.Node], Gathered | None]:
    """An all-gather op that returns all ranks' rows: the names of its arguments."""

    def recognise(call: OpCall, shard: fx.Node) -> Gathered | None:
        size, name = call[world], call[group]
        if not call.reads(x, shard) or not isinstance(name, str) or not isinstance(size, int):
            return None
        block = _block(call.node, shard, call[dim])
        return (
            None if isinstance(block, str) else Gathered(call.node, name, size, (Rows(call.node, block),), (call.node,))
        )

    return recognise


def _block(whole: fx.Node, shard: fx.Node, dim: Any) -> Any:
    """How many consecutive rows of ``whole`` are one rank's where ``shard`` is its part along ``dim``; None for one
    block a rank. Why there are no such rows, in words."""
    tensor, part = tensor_of(whole), tensor_of(shard)
    if tensor is None or part is None or tensor.dim() != part.dim() or not isinstance(dim, int):
        return "has no tensor in meta['val']"
    dim %= tensor.dim()
    if dim == tensor.dim() - 1:
        return "scatters the last dimension, in which the norm lies"
    if same(product(tensor.shape[:dim]), 1):
        return None
    return product(part.shape[dim:-1])


def refused(reason: str) -> Callable[[OpCall], Reduced | Refused]:
    """An all-reduce op that is never fused; ``{node}`` in the reason is the call."""
    return lambda call: Refused(reason.format(node=describe(call.node)), call.node)
