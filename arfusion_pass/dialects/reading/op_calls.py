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

Arguments that a newer engine added do not matter to a table that does not name them while they are at their default;
with another value the call is not what the table says (:meth:`OpCall.stranger`).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from arfusion_pass.dialects.reading.scale_copies import TRANSPOSES
from arfusion_pass.graph import VIEWS, describe, dtype_of, is_call, only_user, same_geometry, tensor_of, value_of

aten = torch.ops.aten
_RESHAPING = (*TRANSPOSES, aten.slice.Tensor, *VIEWS)

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


HOW = frozenset(
    {
        "enable_pdl",
        "launch_with_pdl",
        "trigger_completion_at_end",
        "strategy",
        "outplace_all_reduce_method",
        "workspace",
        "backend",
        "rank",
        "pg",
        "max_token_num",
        "dummy_is_scale_transposed",
        "dummy_is_tma_aligned",
        "column_major_scales",
        "scale_tma_aligned",
    }
)
"""Arguments that say how an op computes, or what its buffers' strides say already, and not what."""


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
        self._read: set[str] = set()
        self._items: dict[int, list[fx.Node]] = {}
        for user in node.users:
            if user.op == "call_function" and user.target is operator.getitem and isinstance(user.args[1], int):
                self._items.setdefault(user.args[1], []).append(user)
        self.nodes = (node, *(item for items in self._items.values() for item in items))

    def __getitem__(self, name: str) -> Any:
        """An argument's value (a node for tensors); its default where the call leaves it out, None if unknown."""
        self._read.add(name)
        value = self._arguments.get(name)
        return value.node if isinstance(value, Operand) else value

    def operand(self, name: str | None) -> Operand | None:
        """A tensor argument, or None where it is None or no tensor."""
        self._read.add(name or "")
        value = None if name is None else self._arguments.get(name)
        if isinstance(value, Operand):
            return value
        return _whole(value)

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

    def result(self, index: int) -> Operand | None:
        """A tensor that the op returns, with its sizes and strides; None where nobody reads it."""
        return _whole(self.output(index))

    def stranger(self) -> str | None:
        """A reason against a call that was read: an argument that nobody asked for and that is not at its default, so
        that the op may compute something else than what was understood."""
        for parameter in self.op._schema.arguments:
            name, value = parameter.name, self._arguments.get(parameter.name)
            if value is None or name in self._read or name in self._written or name in HOW:
                continue
            if not isinstance(value, (fx.Node, Operand)) and parameter.has_default_value():
                default = parameter.default_value
                if value is default or (type(value) is type(default) and value == default):
                    continue
            return f"{describe(self.node)} is given {name}={value!r}, an argument that is not known here"
        return None

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


def _whole(node: Any) -> Operand | None:
    """A node's tensor as it is, or None where it is none."""
    tensor = tensor_of(node)
    if not isinstance(node, fx.Node) or tensor is None:
        return None
    return Operand(node, tuple(tensor.shape), tuple(tensor.stride()))


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
    return tensor is not None and same(product(operand.size), tensor.numel())


def _pads(operand: Operand) -> bool:
    """Whether a view begins where its base does and the base is a fresh buffer: nobody knows what its rest holds."""
    return is_call(operand.node, aten.empty.memory_format) and same(operand.offset, 0)


def _is_view(node: fx.Node, operand: Operand) -> bool:
    """Whether a node's tensor has the size and strides of an argument, from the start of their common base on."""
    tensor = tensor_of(node)
    return (
        tensor is not None and same(tensor.storage_offset(), 0) and same_geometry(operand.size, operand.stride, tensor)
    )


def product(sizes: Iterable[Any]) -> Any:
    """How many elements ``sizes`` are; symbols stay symbols."""
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
