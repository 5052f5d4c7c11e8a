"""Custom ops by schema name and argument name, however a graph calls them. No engine is imported for it.

Three spellings of one call, all read alike (:class:`OpCall`)::

    # functional: trailing defaults are dropped
    %norm = vllm_ir.rms_norm.default(%x, %weight, 1e-06)

    # v1: every argument by name; results are (returns or None, written arguments...)
    %af   = auto_functionalized(_C.fused_add_rms_norm.default, input=%x, residual=%r, weight=%w, epsilon=1e-06)
    %norm = getitem(%af, 1); %total = getitem(%af, 2)

    # v2: written arguments as bases, with the view that the op was handed; results are (returns or None, bases...)
    %af   = auto_functionalized_v2(_C.fused_add_rms_norm.default, weight=%w, epsilon=1e-06,
                _input_base_index=0, _input_size=(16, 64), _input_stride=(64, 1), _input_storage_offset=0,
                _residual_base_index=1, _all_bases=[%x, %r])
    %norm = getitem(%af, 1); %total = getitem(%af, 2)

Arguments that a newer engine added with a default do not matter to a table that does not name them.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from arfusion_pass.dialects.base import Dialect, Norm, Quantised, Reduced, Refused
from arfusion_pass.dialects.operands import EPSILON_ADVICE, Sum, readable_total, sums, weight_of
from arfusion_pass.graph import (
    VIEWS,
    constant,
    describe,
    dtype_of,
    is_call,
    is_cast,
    last_dim,
    only_user,
    path,
    row_views,
    tensor_of,
    value_of,
    widens,
)
from arfusion_pass.ops.layouts import CODE_DTYPES, token_count
from arfusion_pass.ops.spec import Flags

aten = torch.ops.aten
_RESHAPING = (aten.permute.default, aten.transpose.int, aten.t.default, aten.slice.Tensor, *VIEWS)

V1 = torch.ops.higher_order.auto_functionalized
V2 = torch.ops.higher_order.auto_functionalized_v2

Output = str | int
"""Which result of an op: the argument that it writes, or the index of what it returns."""


def overload_of(node: Any) -> torch._ops.OpOverload | None:
    """The op that a node calls, ``auto_functionalized`` or not."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    target = node.args[0] if node.target in (V1, V2) and node.args else node.target
    return target if isinstance(target, torch._ops.OpOverload) else None


@functools.cache
def schema_name(op: torch._ops.OpOverload) -> str:
    """``namespace::name``, with ``.overload`` where that is not the default one."""
    schema = op._schema
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name


def op_name(node: Any) -> str | None:
    """The schema name of the op that a node calls, or None."""
    op = overload_of(node)
    return None if op is None else schema_name(op)


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor argument: the node that holds it, and the sizes and strides that the op sees.

    Attributes:
        node: the argument, or its base under v2.
        size, stride: of the argument itself.
        whole: whether the op sees all of ``node``'s rows in order: itself, or a view that keeps the last dimension.
        offset: where in ``node`` the argument begins, in elements.
    """

    node: fx.Node
    size: tuple[Any, ...]
    stride: tuple[Any, ...]
    whole: bool = True
    offset: Any = 0

    @property
    def dtype(self) -> torch.dtype | None:
        return dtype_of(self.node)


class OpCall:
    """One call of a custom op with its arguments by name and its results by what they are.

    Attributes:
        node: the call, or the ``auto_functionalized`` around it.
        name: the op's schema name.
        in_place: the call writes to memory of the graph, outside ``auto_functionalized``.
        nodes: the call and every ``getitem`` of its results.
    """

    def __init__(self, node: fx.Node) -> None:
        op = overload_of(node)
        if op is None:
            raise ValueError(f"{node} calls no op")
        self.node = node
        self.op = op
        self.name = schema_name(op)
        self.functionalized = node.target in (V1, V2)
        self.in_place = op._schema.is_mutable and not self.functionalized
        self._arguments = self._normalised()
        self._written = [
            parameter.name
            for parameter in op._schema.arguments
            if parameter.alias_info is not None and parameter.alias_info.is_write
        ]
        self._items: dict[int, list[fx.Node]] = {}
        for user in node.users:
            if user.op == "call_function" and user.target is operator.getitem and isinstance(user.args[1], int):
                self._items.setdefault(user.args[1], []).append(user)
        self.nodes = (node, *(item for items in self._items.values() for item in items))

    def __getitem__(self, name: str) -> Any:
        """An argument's value (a node for tensors); its default where the call leaves it out, None if unknown."""
        value = self._arguments.get(name)
        return value.node if isinstance(value, Operand) else value

    def operand(self, name: str | None) -> Operand | None:
        """A tensor argument, or None where it is None or no tensor."""
        value = None if name is None else self._arguments.get(name)
        if isinstance(value, Operand):
            return value
        tensor = tensor_of(value)
        if not isinstance(value, fx.Node) or tensor is None:
            return None
        return Operand(value, tuple(tensor.shape), tuple(tensor.stride()))

    def reads(self, name: str | None, node: fx.Node) -> bool:
        """Whether argument ``name`` is ``node``, all its rows in order."""
        operand = self.operand(name)
        return operand is not None and operand.node is node and operand.whole

    def output(self, which: Output | None) -> fx.Node | None:
        """The node that holds a result; None where nobody reads it, or where it is taken apart twice."""
        if which is None:
            return None
        returns = len(self.op._schema.returns)
        if isinstance(which, int):
            if returns == 1 and not self.functionalized and tensor_of(self.node) is not None:
                return self.node
            index = which
        elif which not in self._written or not self.functionalized:
            return None
        elif self.node.target is V1:
            index = max(1, returns) + self._written.index(which)
        else:
            base = self.node.kwargs.get(f"_{which}_base_index")
            if not isinstance(base, int) or not self._owns_base(which, base):
                return None
            items = self._items.get(max(1, returns) + base, [])
            return self._without_padding(which, items[0]) if len(items) == 1 else None
        items = self._items.get(index, [])
        return items[0] if len(items) == 1 else None

    def has_argument(self, name: str) -> bool:
        """Whether the op's schema has an argument of that name."""
        return any(parameter.name == name for parameter in self.op._schema.arguments)

    def is_optional(self, name: str) -> bool:
        """Whether the schema lets an argument be None."""
        return any(
            parameter.name == name and isinstance(parameter.type, torch.OptionalType)
            for parameter in self.op._schema.arguments
        )

    def _owns_base(self, name: str, base: int) -> bool:
        """Under v2: no other written argument shares the base, and ours is the whole of it, but for padding."""
        sharing = [other for other in self._written if self.node.kwargs.get(f"_{other}_base_index") == base]
        operand = self._arguments.get(name)
        return sharing == [name] and isinstance(operand, Operand) and (_covers(operand) or _pads(operand))

    def _without_padding(self, which: str, base: fx.Node) -> fx.Node | None:
        """The view of a base's new value that is the argument as the op saw it, where the base has more; the views up
        to it become part of the call."""
        operand = self._arguments[which]
        if _covers(operand):
            return base
        views = [base]
        while not _is_view(views[-1], operand):
            following = only_user(views[-1])
            if following is None or not is_call(following, *_RESHAPING):
                return None
            views.append(following)
        self.nodes = tuple(dict.fromkeys((*self.nodes, *views)))
        return views[-1]

    def _normalised(self) -> dict[str, Any]:
        node = self.node
        arguments: dict[str, Any] = {}
        positional = () if self.functionalized else node.args
        for index, parameter in enumerate(self.op._schema.arguments):
            name = parameter.name
            if name in node.kwargs:
                arguments[name] = node.kwargs[name]
            elif node.target is V2 and f"_{name}_base_index" in node.kwargs:
                arguments[name] = _base_operand(node, name)
            elif index < len(positional) and not parameter.kwarg_only:
                arguments[name] = positional[index]
            elif parameter.has_default_value():
                arguments[name] = parameter.default_value
        return arguments


def _base_operand(node: fx.Node, name: str) -> Operand | None:
    """A written argument of ``auto_functionalized_v2``: its base, and the view of it that the op was handed."""
    bases, index = node.kwargs.get("_all_bases"), node.kwargs.get(f"_{name}_base_index")
    if not isinstance(bases, Sequence) or not isinstance(index, int):
        return None
    base = bases[index]
    tensor = tensor_of(base)
    if not isinstance(base, fx.Node) or tensor is None:
        return None
    whole = Operand(base, tuple(tensor.shape), tuple(tensor.stride()))
    if f"_{name}_slice_dim" in node.kwargs:
        return dataclasses.replace(whole, whole=False)
    if f"_{name}_size" not in node.kwargs:
        return whole
    size = tuple(value_of(item) for item in node.kwargs[f"_{name}_size"])  # type: ignore[union-attr]
    stride = tuple(value_of(item) for item in node.kwargs[f"_{name}_stride"])  # type: ignore[union-attr]
    offset = value_of(node.kwargs.get(f"_{name}_storage_offset", 0))
    viewed = Operand(base, size, stride, False, offset)
    rows = bool(size) and bool(whole.size) and same(size[-1], whole.size[-1])
    contiguous = is_contiguous(size, stride) and is_contiguous(whole.size, whole.stride)
    return dataclasses.replace(viewed, whole=rows and contiguous and same(offset, 0) and _covers(viewed))


def _covers(operand: Operand) -> bool:
    """Whether a view has as many elements as its base, for sure."""
    tensor = tensor_of(operand.node)
    return tensor is not None and same(_product(operand.size), tensor.numel())


def _pads(operand: Operand) -> bool:
    """Whether a view begins where its base does and the base is a fresh buffer: nobody knows what its rest holds."""
    return is_call(operand.node, aten.empty.memory_format) and same(operand.offset, 0)


def _is_view(node: fx.Node, operand: Operand) -> bool:
    """Whether a node's tensor has the size and strides of an argument, from the start of their common base on."""
    tensor = tensor_of(node)
    if tensor is None or len(operand.size) != tensor.dim() or not same(tensor.storage_offset(), 0):
        return False
    dims = zip(tensor.shape, operand.size, tensor.stride(), operand.stride, strict=True)
    return all(same(size, its) and (same(size, 1) or same(step, its_step)) for size, its, step, its_step in dims)


def _product(sizes: Iterable[Any]) -> Any:
    return functools.reduce(operator.mul, sizes, 1)


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for sure; adds no guard."""
    return statically_known_true(a == b)


def is_contiguous(size: Sequence[Any], stride: Sequence[Any]) -> bool:
    """Whether sizes and strides are a contiguous tensor's; dimensions of one element do not matter."""
    expected: Any = 1
    for length, step in zip(reversed(size), reversed(stride), strict=True):
        if not same(length, 1) and not same(step, expected):
            return False
        expected = expected * length
    return True


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
        if len(roles) != 1:
            return None
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
        epsilon = self.default_epsilon if call[self.epsilon] is None else constant(call[self.epsilon])
        if epsilon is None:
            return Refused(EPSILON_ADVICE.format(node=call[self.epsilon]), call.node)
        dtype, x_dtype = dtype_of(value), dtype_of(start)
        given = None if self.weight is None else call[self.weight]
        weight = None if given is None else weight_of(given, last_dim(start), dtype)
        if given is not None and weight is None:
            return Refused(f"the weight {describe(given)} of {call.node.name} is no [hidden] vector", call.node)
        assert dtype is not None and x_dtype is not None
        nodes = (*candidate.nodes, *path(candidate.start, start), *call.nodes)
        norm = call.output(self.norm)
        quant: Quantised | None = None
        if self.quant is not None:
            found = self.quant.recognise(call, start)
            if found is None or isinstance(found, Refused):
                return found
            spec = dataclasses.replace(found.spec, unrounded=found.spec.unrounded or x_dtype == torch.float32 != dtype)
            quant = dataclasses.replace(found, spec=spec, nodes=nodes)
        elif norm is None:
            return None  # only the sum is read: nothing to fuse
        else:
            last = only_user(norm)
            if last is not None and dtype_of(norm) == torch.float32 != dtype and is_cast(last, dtype):
                norm, nodes = last, (*nodes, last)
        total = readable_total(candidate, nodes) if residual is None else call.output(self.total)
        return Norm(
            operand=value,
            norm=norm,
            epsilon=epsilon,
            nodes=nodes if total is None or total in nodes else (*nodes, total),
            weight=None if weight is None else weight.node,
            weight_bias=0.0 if weight is None else self.weight_bias + weight.bias,
            flags=candidate.flags | self.flags(call, x_dtype, dtype_of(given), residual is not None),
            residual=candidate.residual if residual is None else residual.node,
            total=total,
            quant=quant,
        )

    def _misfit(self, call: OpCall, start: fx.Node, value: fx.Node, residual: Operand | None) -> str | None:
        dtype, x_dtype, name = dtype_of(value), dtype_of(start), call.node.name
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

    def recognise(self, call: OpCall, norm: fx.Node) -> Quantised | Refused | None:
        """The quantiser that ``call`` is, reading ``norm``."""
        if not call.reads(self.x, norm):
            return None
        if call.in_place:
            return Refused(f"{describe(call.node)} writes in place, outside auto_functionalized", call.node)
        codes, scales = call.output(self.codes), call.output(self.scales)
        if codes is None:
            return None
        found = self.spec(call, norm)
        if isinstance(found, (str, Refused)):
            return Refused(found, call.node) if isinstance(found, str) else found
        op, spec = found
        if dtype_of(codes) not in CODE_DTYPES[spec.format]:
            return Refused(f"{describe(codes)} holds {dtype_of(codes)}, no codes of {spec.format.name}", codes)
        if not _has_rows(codes, norm):
            return Refused(f"{describe(codes)} has another number of rows than {describe(norm)}", codes)
        quantised = Quantised(op=op, spec=spec, codes=codes, nodes=call.nodes, scales=scales)
        if self.scale is None:
            return quantised
        number, scale = constant(call[self.scale]), call.operand(self.scale)
        if number is not None and scale is None:
            return dataclasses.replace(quantised, scale_value=number)
        if scale is None or not scale.whole or not same(_product(scale.size), 1):
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
    """

    def __init__(
        self,
        name: str,
        reductions: Mapping[str, Callable[[OpCall], Reduced | Refused]] | None = None,
        norms: Mapping[str, NormOp] | None = None,
        quantisers: Mapping[str, QuantOp] | None = None,
    ) -> None:
        self.name = name
        self.reduction_ops = dict(reductions or {})
        self.norm_ops = dict(norms or {})
        self.quantiser_ops = dict(quantisers or {})

    def all_reduce(self, node: fx.Node) -> Reduced | Refused | None:
        """The all-reduce that ``node`` is, if its op is in the table."""
        reduction = self.reduction_ops.get(op_name(node) or "")
        return None if reduction is None else reduction(OpCall(node))

    def norms(self, value: fx.Node) -> Iterable[Norm | Refused]:
        """Direct norms of ``value`` first, then those of its sums with a residual."""
        if not self.norm_ops:
            return
        for candidate in (Sum(value), *sums(value)):
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
            quant = None if entry is None else entry.recognise(OpCall(user), norm)
            if isinstance(quant, Quantised) and dtype_of(norm) == torch.float32:
                # of a norm that was never rounded to the reduced tensor's dtype (of an fp32 site, raising drops this)
                quant = dataclasses.replace(quant, spec=dataclasses.replace(quant.spec, unrounded=True))
            if quant is not None:
                yield quant


def functional_all_reduce(x: str, group: str, reduce_op: str | None = None) -> Callable[[OpCall], Reduced | Refused]:
    """An all-reduce op that returns the sum: the names of its arguments."""

    def recognise(call: OpCall) -> Reduced | Refused:
        if call.in_place or call.functionalized:
            return Refused(f"{describe(call.node)} reduces in place; an out-of-place all-reduce is fused", call.node)
        if reduce_op is not None and call[reduce_op] != "sum":
            return Refused(f"{call.node.name} reduces by {call[reduce_op]!r}; only 'sum' is fused", call.node)
        tensor, name = call[x], call[group]
        if not isinstance(name, str) or not isinstance(tensor, fx.Node):
            return Refused(f"{call.node.name} names its group by {name!r}, not by a string", call.node)
        return Reduced(node=call.node, value=call.node, x=tensor, group=name, nodes=(call.node,))

    return recognise


def refused(reason: str) -> Callable[[OpCall], Reduced | Refused]:
    """An all-reduce op that is never fused; ``{node}`` in the reason is the call."""
    return lambda call: Refused(reason.format(node=describe(call.node)), call.node)
