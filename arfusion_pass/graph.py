"""Questions about the nodes of a post-grad FX graph. The one home of predicates such as :func:`is_view`."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives
from torch import fx
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true

from arfusion_pass.source import Source, line_of

aten = torch.ops.aten
prims = torch.ops.prims
c10d = torch.ops._c10d_functional

VIEWS: frozenset[Any] = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.flatten.using_ints,
        aten.alias.default,
        aten.detach.default,
    }
)
"""Ops that give the same elements in the same order another shape."""

FP32_MAX = torch.finfo(torch.float32).max

_CLONES: frozenset[Any] = frozenset({aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default})
_PARTS: frozenset[Any] = frozenset(
    {
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.expand.default,
    }
)
"""Ops that may leave elements out, repeat them or move them, and often do not."""

_SPLITS: frozenset[Any] = frozenset(
    {
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.tensor_split.sections,
        aten.tensor_split.indices,
        aten.unbind.int,
    }
)
"""Ops that give a list of parts: a list of one has all elements."""

CASTS: frozenset[Any] = frozenset(
    {prims.convert_element_type.default, aten._to_copy.default, aten.to.dtype, aten.type_as.default}
)


def value_of(node: Any) -> Any:
    """``meta["val"]`` of a node, or None; a literal is its own value."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def tensor_of(node: Any) -> torch.Tensor | None:
    """The fake tensor that a node stands for, or None."""
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) else None


def holds_tensors(node: Any) -> bool:
    """Whether a node stands for a tensor, or for a list of some."""
    value = value_of(node)
    return any(isinstance(each, torch.Tensor) for each in (value if isinstance(value, (list, tuple)) else [value]))


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of a node's tensor, or None where it is no tensor."""
    tensor = tensor_of(node)
    return None if tensor is None else tensor.dtype


def last_dim(node: Any) -> int | None:
    """The size of the last dimension as a plain int; None if there is none or it is symbolic."""
    tensor = tensor_of(node)
    if tensor is None or tensor.dim() == 0:
        return None
    size = tensor.shape[-1]
    return size if isinstance(size, int) else None


def statically_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for sure; adds no guard."""
    return statically_known_true(a == b)


def same_shape(a: Any, b: Any) -> bool:
    """Whether two nodes' tensors have the same shape for sure; adds no guard."""
    ta, tb = tensor_of(a), tensor_of(b)
    if ta is None or tb is None or ta.dim() != tb.dim():
        return False
    return all(map(statically_equal, ta.shape, tb.shape))


def same_rows(a: Any, b: Any) -> bool:
    """Whether two nodes' tensors have the same shape for sure, but for leading dimensions of size 1; adds no guard."""
    ta, tb = tensor_of(a), tensor_of(b)
    if ta is None or tb is None:
        return False
    sizes = [list(tensor.shape) for tensor in (ta, tb)]
    for shape in sizes:
        while shape and len(shape) > 1 and _is_one(shape[0]):
            del shape[0]
    return len(sizes[0]) == len(sizes[1]) and all(map(statically_equal, *sizes))


def as_many_rows(a: Any, b: Any) -> bool:
    """Whether two nodes' ``[..., H]`` tensors have the same number of rows for sure; adds no guard.

    A view with the last dimension of its source, or a cast, has as many rows as that, however its sizes are called:
    where ``y.view(r.shape)`` was guarded on, the sizes of ``y`` and those of ``r`` have other symbols, and the product
    of the former is known to be that of the latter, but not that of the view's.
    """
    return any(statically_equal(rows, others) for rows in _row_counts(a) for others in _row_counts(b))


def _row_counts(node: Any) -> list[Any]:
    """How many rows a node has, by its own shape and by that of everything that it is a view or a cast of."""
    counts: list[Any] = []
    hidden = last_dim(node)
    while (tensor := tensor_of(node)) is not None and tensor.dim() > 0:
        if last_dim(node) == hidden and (hidden is not None or not counts):
            counts.append(math.prod(tensor.shape[:-1]))
        node = node.args[0] if is_cast(node) else source_of(node)
    return counts


def same_size(a: Any, b: Any) -> bool:
    """Whether two nodes' tensors have as many elements for sure; adds no guard."""
    ta, tb = tensor_of(a), tensor_of(b)
    return ta is not None and tb is not None and statically_equal(ta.numel(), tb.numel())


def known_contiguous(tensor: torch.Tensor) -> bool:
    """Whether a tensor is contiguous for sure; adds no guard."""
    expected: Any = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not statically_known_true(size == 1) and not statically_known_true(stride == expected):
            return False
        expected = expected * size
    return True


def is_call(node: Any, *targets: Any) -> bool:
    """Whether ``node`` calls one of ``targets``, with no argument that its readers would not understand."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets and understood(node)


def _same_dtype(node: fx.Node, value: Any) -> bool:
    return value is None or value == dtype_of(node.args[0])


def _keeps_layout(node: fx.Node, value: Any) -> bool:
    return value in (None, torch.contiguous_format, torch.preserve_format)


_READ: dict[Any, tuple[str, ...]] = {
    aten.mean.dim: ("keepdim",),
    aten.sum.dim_IntList: ("keepdim",),
    aten.linalg_vector_norm.default: ("ord", "dim", "keepdim"),
    aten.amax.default: ("dim", "keepdim"),
    aten.amin.default: ("dim", "keepdim"),
    aten.max.dim: ("keepdim",),
    aten.clamp.default: ("min", "max"),
    aten.slice.Tensor: ("dim", "start", "end"),
    aten.cat.default: ("dim",),
    aten.split.Tensor: ("dim",),
    aten.constant_pad_nd.default: ("value",),
    aten.flatten.using_ints: ("start_dim", "end_dim"),
    aten.embedding.default: ("scale_grad_by_freq", "sparse"),
    aten.expand.default: ("implicit",),
    aten.clone.default: ("memory_format",),
    aten._to_copy.default: ("dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format"),
    aten.to.dtype: ("non_blocking", "copy"),
    aten.copy.default: ("non_blocking",),
    aten.rms_norm.default: ("weight", "eps"),
    aten.full.default: ("dtype", "layout", "device", "pin_memory"),
    aten.scalar_tensor.default: ("dtype", "layout", "device", "pin_memory"),
    aten.empty.memory_format: ("dtype", "layout", "device", "pin_memory", "memory_format"),
}
"""Optional arguments of aten ops that whoever recognises the op reads, or that change no value and no shape. Every
other one must be at its default for the op to be recognised: ``mean(dtype=bfloat16)`` is not the mean of a norm."""

_ALLOWED: dict[Any, dict[str, Callable[[fx.Node, Any], bool]]] = {
    aten.mean.dim: {"dtype": _same_dtype},
    aten.sum.dim_IntList: {"dtype": _same_dtype},
    aten.to.dtype: {"memory_format": _keeps_layout},
}
"""Optional arguments with other values than the default that change nothing."""


def by_position(node: fx.Node) -> bool:
    """Whether a call of an aten or prims op gives its operands by position, as every tracer does. A pass that wrote the
    graph may have given them by name, ``permute(x, dims=[1, 0])``: none such is recognised."""
    return len(node.args) >= _operands(node.target)[0]


def understood(node: fx.Node) -> bool:
    """Whether a call of an aten or prims op gives its operands by position, and no optional argument that its
    recogniser does not read a value other than the default; and whether it is known what the call gives. Of other ops'
    arguments their dialects know."""
    positional, optional = _operands(node.target)
    if not by_position(node) or (positional and value_of(node) is None):
        return False
    args, kwargs = node.args, node.kwargs
    for name, index, default, allowed in optional:
        value = kwargs.get(name, args[index] if index < len(args) else default)
        if value is default:
            continue
        if isinstance(value, fx.Node) or (value != default and not (allowed is not None and allowed(node, value))):
            return False
    return True


@functools.cache
def _operands(target: Any) -> tuple[int, tuple[tuple[str, int, Any, Callable[[fx.Node, Any], bool] | None], ...]]:
    """What :func:`understood` asks of an op: how many operands a call gives by position, and each optional argument
    that no recogniser reads: its name, place and default, and which other values change nothing."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.name.startswith(("aten::", "prims::")):
        return 0, ()
    read, allowed = _READ.get(target, ()), _ALLOWED.get(target, {})
    required = [
        index
        for index, parameter in enumerate(schema.arguments)
        if not parameter.has_default_value() and not parameter.kwarg_only
    ]
    optional = [
        (parameter.name, index, parameter.default_value, allowed.get(parameter.name))
        for index, parameter in enumerate(schema.arguments)
        if parameter.has_default_value() and parameter.name not in read
    ]
    return max(required, default=-1) + 1, tuple(optional)


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """One argument of an op call by its schema's name, however the call spells it."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return default
    for index, parameter in enumerate(schema.arguments):
        if parameter.name == name:
            if index < len(node.args):
                return node.args[index]
            return parameter.default_value if parameter.has_default_value() else default
    return default


def is_cast(node: Any, dtype: torch.dtype | None = None) -> bool:
    """Whether ``node`` only changes its input's dtype (to ``dtype``, where given)."""
    if not is_call(node, *CASTS):
        return False
    if not _same_device(node, node.args[0]):
        return False
    if dtype_of(node) is None or (dtype is not None and dtype_of(node) != dtype):
        return False
    if node.target is aten._to_copy.default:
        source, kept = tensor_of(node.args[0]), {"dtype", "non_blocking"}
        if source is not None:  # type_as says what stays as well
            kept |= {key for key in ("device", "layout") if node.kwargs.get(key) == getattr(source, key)}
        said = {key for key, value in node.kwargs.items() if value not in (None, False, torch.preserve_format)}
        return said <= kept
    return True


def _same_device(a: Any, b: Any) -> bool:
    one, other = tensor_of(a), tensor_of(b)
    return one is None or other is None or one.device == other.device


def widens(node: Any) -> bool:
    """Whether ``node`` is a cast that loses nothing (bf16 or fp16 to fp32)."""
    return is_cast(node, torch.float32) and dtype_of(node.args[0]) in (torch.bfloat16, torch.float16, torch.float32)


def peel(node: Any) -> Any:
    """``node`` without the lossless casts around it."""
    while widens(node):
        node = node.args[0]
    return node


def source_of(node: Any) -> fx.Node | None:
    """What ``node`` gives the elements of: all of them, in the same order and dtype, in whatever shape. None if it
    computes anything, leaves elements out or moves them. Such a node is a view, a ``permute`` that moves dimensions of
    size 1 only, a wait for what was waited for already, a clone, the functional ``copy`` that a tensor reduced in place
    leaves, dropout that does not train, or a split into one part, which is a list, with the ``getitem`` of it."""
    if not (isinstance(node, fx.Node) and node.op == "call_function" and node.args and by_position(node)):
        return None
    target = node.target
    source: Any = node.args[0]
    if target is aten.copy.default and len(node.args) > 1:
        source = node.args[1]
        if not (isinstance(source, fx.Node) and dtype_of(source) == dtype_of(node) and same_shape(source, node)):
            return None
    elif target is c10d.wait_tensor.default:
        if isinstance(source, fx.Node) and getattr(source.target, "namespace", "") == c10d.name:
            return source if source.target is target else None
    elif target is operator.getitem:
        return source if _is_list_of_one(source) else None
    elif target is aten.dropout.default:
        if node.args[2] is not False:
            return None
    elif target in _SPLITS:
        if not _is_list_of_one(node):
            return None
    elif target in _PARTS:
        if not _moves_nothing(node, source):
            return None
    elif target not in VIEWS and target not in _CLONES:
        return None
    return source if isinstance(source, fx.Node) and tensor_of(source) is not None else None


def _moves_nothing(node: fx.Node, source: Any) -> bool:
    """Whether a permute, select, slice or expand keeps all elements in order."""
    before, after = tensor_of(source), tensor_of(node)
    if before is None or after is None:
        return False
    arguments: Any = node.args
    if node.target is aten.select.int:
        return _is_one(before.shape[arguments[1]])
    if node.target in (aten.slice.Tensor, aten.expand.default):
        return same_rows(node, source)
    dims = list(range(before.dim()))
    if node.target is aten.permute.default:
        dims = [dim % before.dim() for dim in arguments[1]]
    elif before.dim() > 1:
        first, second = arguments[1:3] if node.target is aten.transpose.int else (0, 1)
        dims[first], dims[second] = dims[second], dims[first]
    kept = [dim for dim in dims if not _is_one(before.shape[dim])]
    return kept == sorted(kept)


def _is_list_of_one(node: Any) -> bool:
    parts = value_of(node)
    return isinstance(node, fx.Node) and node.target in _SPLITS and isinstance(parts, (list, tuple)) and len(parts) == 1


def _is_one(size: Any) -> bool:
    return statically_known_true(size == 1)


def keeps_rows(node: Any) -> bool:
    """Whether ``node`` gives its source's elements (:func:`source_of`) with the same last dimension."""
    source = source_of(node)
    return source is not None and last_dim(node) is not None and last_dim(node) == last_dim(source)


def views_of(node: fx.Node) -> Iterator[fx.Node]:
    """``node`` and everything that gives its elements (:func:`source_of`) in whatever shape, in no special order."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        stack.extend(user for user in current.users if source_of(user) is current)


def row_views(node: fx.Node) -> Iterator[fx.Node]:
    """Those of its :func:`views_of` that have its last dimension; views of another may lie between."""
    hidden = last_dim(node)
    for view in views_of(node):
        if view is node or (hidden is not None and last_dim(view) == hidden):
            yield view


def without_views(node: Any) -> Any:
    """What ``node`` gives the elements of, through any number of views; itself where it is no view."""
    while (source := source_of(node)) is not None:
        node = source
    return node


def path(start: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
    """The views between ``start`` and ``end`` (one of its :func:`views_of`), ``end`` included."""
    views: list[fx.Node] = []
    node: fx.Node | None = end
    while node is not start:
        if node is None:
            raise ValueError(f"{describe(end)} is no view of {describe(start)}")
        views.append(node)
        node = source_of(node)
    return tuple(reversed(views))


def users_of(node: fx.Node, *targets: Any) -> list[fx.Node]:
    """The users of ``node`` that call one of ``targets``, in graph order."""
    return [user for user in node.users if is_call(user, *targets)]


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of ``node``, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def other_operand(node: fx.Node, operand: fx.Node) -> Any:
    """The other operand of a binary call; None unless ``operand`` is exactly one of the two."""
    if len(node.args) < 2 or (node.args[0] is operand) == (node.args[1] is operand):
        return None
    return node.args[1] if node.args[0] is operand else node.args[0]


def is_pure(node: fx.Node) -> bool:
    """Whether ``node`` only computes a value: it may be moved, repeated or dropped."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or node.is_impure() or mutated_arguments(node):
        return False
    if isinstance(node.target, HigherOrderOperator) and not _is_functional(node):
        return False  # there may be a collective in its graphs
    return torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())


FUNCTIONAL = ("auto_functionalized", "auto_functionalized_v2", "triton_kernel_wrapper_functional")
"""Names of the higher-order ops that copy what they would write to. By name: torch defines some on first use."""


def _is_functional(node: fx.Node) -> bool:
    return isinstance(node.target, HigherOrderOperator) and node.target.name() in FUNCTIONAL


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory a call writes to, or may write to: of a call that does not say so, all of its inputs.

    ``auto_functionalized`` calls write to none: they copy.
    """
    if says_nothing(node):
        return _given(node)
    if node.op != "call_function" or _is_functional(node):
        return []
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        if isinstance(node.target, HigherOrderOperator):
            return [] if _only_reads(node) else list(node.all_input_nodes)
        return list(node.all_input_nodes) if node.target in IN_PLACE_OPERATORS else []
    if not schema.is_mutable:
        acts = not schema.returns and not schema.name.startswith(READERS)
        return list(node.all_input_nodes) if acts else []
    written: list[fx.Node] = []
    for index, parameter in enumerate(schema.arguments):
        if parameter.alias_info is not None and parameter.alias_info.is_write:
            written += _nodes(node, parameter.name, index)
    return written


def says_nothing(node: fx.Node) -> bool:
    """Whether nothing says what a call writes to and what it gives: of a method, a module or a Python function, and of
    an op that is named like one in place and whose schema does not admit it (c10d's collectives)."""
    return node.op in ("call_method", "call_module") or (node.op == "call_function" and _is_silent(node.target))


@functools.cache
def _is_silent(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    if schema is None:
        return not isinstance(target, HigherOrderOperator) and getattr(target, "__module__", "") not in _PURE_MODULES
    return not schema.is_mutable and schema.name.endswith("_") and not schema.name.endswith("__")


_PURE_MODULES = ("_operator", "math")
"""Of Python's functions those write to nothing, but for ``operator``'s in place, and give no views, but for getitem."""


def _given(node: fx.Node) -> list[fx.Node]:
    """The nodes that a call takes, without those that surely are numbers."""
    numbers = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    return [each for each in node.all_input_nodes if not isinstance(value_of(each), numbers)]


def parts_of(node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that a node runs: the branches of ``torch.cond``, the region of ``invoke_subgraph``, or the module
    that it calls, such as a piece of a graph that a back-end has split."""
    module = node.graph.owning_module
    if node.op == "call_module" and module is not None:
        called: Any = module.get_submodule(str(node.target))
        return [called] if isinstance(called, fx.GraphModule) else []
    parts = [
        getattr(node.graph.owning_module, str(operand.target), None)
        for operand in node.all_input_nodes
        if isinstance(node.target, HigherOrderOperator) and operand.op == "get_attr"
    ]
    return [part for part in parts if isinstance(part, fx.GraphModule)]


def _only_reads(node: fx.Node) -> bool:
    """Whether a higher-order op surely writes to nothing that it is given: its graphs write to memory of their own
    alone, or it keeps in order an op that writes to nothing."""
    parts = parts_of(node)
    if parts:
        written = (each for part in parts for inner in part.graph.nodes for each in mutated_arguments(inner))
        return not any(owner.op == "placeholder" for each in written for owner in owners(each))
    op = node.args[1] if node.target.name() == "with_effects" else None  # type: ignore[union-attr]
    if isinstance(op, HigherOrderOperator):
        return op.name() == "print"
    return isinstance(op, torch._ops.OpOverload) and not op._schema.is_mutable and bool(op._schema.returns)


READERS = ("aten::_assert", "aten::sym_constrain_range", "_c10d_functional::wait_tensor", "prims::_sink_tokens")
"""Names of ops that return nothing and write nothing."""

IN_PLACE_OPERATORS: frozenset[Any] = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul",
                 "ilshift", "irshift", "setitem", "delitem")
)  # fmt: skip


def _nodes(node: fx.Node, name: str, index: int) -> list[fx.Node]:
    """The nodes in one argument of a call, which may be a list."""
    value = node.kwargs.get(name, node.args[index] if index < len(node.args) else None)
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, fx.Node)]


def viewed(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory the result of ``node`` may be: what it is a view of; none for fresh memory."""
    if says_nothing(node):
        return _given(node)
    if node.op != "call_function" or _is_functional(node):
        return []
    if node.target in VIEWS or node.target in (operator.getitem, torch.ops._c10d_functional.wait_tensor.default):
        return [each for each in node.args[:1] or node.kwargs.values() if isinstance(each, fx.Node)]
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        unknown = node.target in IN_PLACE_OPERATORS or isinstance(node.target, HigherOrderOperator)
        return list(node.all_input_nodes) if unknown else []
    if all(result.alias_info is None for result in schema.returns):
        return _given(node) if schema.name in MAY_BE_VIEWS else []
    shared: list[fx.Node] = []
    for index, parameter in enumerate(schema.arguments):
        if parameter.alias_info is not None:
            shared += _nodes(node, parameter.name, index)
    return shared


MAY_BE_VIEWS = frozenset(
    f"aten::{name}"
    for name in ("alpha_dropout", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "cartesian_prod",
                 "conj_physical", "dropout", "einsum", "feature_alpha_dropout", "feature_dropout",
                 "flatten_dense_tensors", "lift", "meshgrid", "sum_to_size", "to_dense", "type_as", "unsafe_chunk",
                 "unsafe_split", "unsafe_split_with_sizes")
)  # fmt: skip
"""Names of ops that often give what they are given, or a view of it, which their schemas do not say. Found by running
torch's own samples of every op; Inductor's decompositions leave few of them."""


def owners(node: fx.Node) -> set[fx.Node]:
    """The nodes that own the memory of ``node``: views are followed to what they view."""
    found, seen, stack = set[fx.Node](), set[fx.Node](), [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        sources = viewed(current)
        stack += sources
        if not sources:
            found.add(current)
    return found


def is_written(node: fx.Node) -> bool:
    """Whether anybody writes to the memory of ``node``, by itself or by a view of it."""
    return any(name in mutated_arguments(user) for name, user in _readers(node))


def is_returned(node: fx.Node) -> bool:
    """Whether the memory of ``node`` leaves the graph, by itself or by a view of it."""
    return any(user.op == "output" for _, user in _readers(node))


def _readers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Everyone who reads the memory of ``node``, by itself or by a view of it: that name of it, and who reads it."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        for user in current.users:
            yield current, user
            if user not in seen and current in viewed(user):
                seen.add(user)
                stack.append(user)


_FARTHEST_READER = 4
"""Nodes between an input and a line that is said of it: a cast, an add and a view have none of their own."""


def describe(node: fx.Node) -> str:
    """A node for a reason's sentence: ``model.py:10 "return y + self.bias" (aten.add.Tensor)``, or ``name (target)``
    where nobody recorded its line. An input of the graph is known by the line that reads it."""
    if node.op == "output":
        return "the graph's output"
    source = line_of(node)
    if source is None and node.op == "placeholder":
        reader = nearest_line(node)
        return f"{node.name} ({node.target})" if reader is None else f"the input read by {reader}"
    return f"{node.name if source is None else source} ({node.target})"


def nearest_line(node: fx.Node) -> Source | None:
    """The user's line of the nearest reader that has one: a cast that a compiler put in has none."""
    readers, seen = [node], {node}
    for _ in range(_FARTHEST_READER):
        readers = [user for reader in readers for user in reader.users if user not in seen]
        seen.update(readers)
        if (line := next(filter(None, map(line_of, readers)), None)) is not None:
            return line
    return None


def constant(node: Any, finite: bool = True, operation: fx.Node | None = None) -> float | None:
    """The number that an argument is: a Python number, or a node that holds a constant; else None.

    Args:
        node: the argument.
        finite: None for NaN and for what is beyond fp32 as well: no kernel computes with those.
        operation: the call that it is an operand of. Beside a 16-bit tensor CUDA rounds a 0-dim tensor to 16 bits
            first, and CPU does not: then only a number that this leaves as it is.
    """
    value = None
    if isinstance(node, (int, float)) and not isinstance(node, bool):
        value = float(node)
    elif is_call(node, aten.full.default) and not node.args[0]:
        value = _as_dtype(node.args[1], dtype_of(node))
    elif is_call(node, aten.scalar_tensor.default):
        value = _as_dtype(node.args[0], dtype_of(node))
    if isinstance(node, fx.Node):
        if value is None or is_written(node):
            return None
        low = dtype_of(operation)
        if low in (torch.bfloat16, torch.float16) and _as_dtype(value, low) != value:
            return None
    return value if value is not None and (abs(value) <= FP32_MAX or not finite) else None


def multiplies_instead(node: fx.Node) -> bool:
    """Whether eager torch divides this node's tensor by a Python number by multiplying with its reciprocal: everywhere
    but on a CPU."""
    tensor = tensor_of(node)
    return tensor is not None and tensor.device.type != "cpu"


def _as_dtype(value: Any, dtype: torch.dtype | None) -> float | None:
    """A number as an element of ``dtype``."""
    if not isinstance(value, (int, float)) or dtype is None or dtype.is_complex:
        return None
    if dtype.is_floating_point and dtype.itemsize < 4:
        with unset_fake_temporarily():
            return torch.tensor(value, dtype=dtype, device="cpu").item()
    return float(value) if dtype.is_floating_point else float(int(value))


def is_last(dims: Sequence[int], tensor: torch.Tensor) -> bool:
    """Whether ``dims`` are the last dimension of ``tensor`` alone. One without dimensions, of which torch says that it
    has dimension -1, has none."""
    return tensor.dim() > 0 and [dim % tensor.dim() for dim in dims] == [tensor.dim() - 1]


def same_geometry(shape: Sequence[Any], strides: Sequence[Any], tensor: torch.Tensor) -> bool:
    """Whether a tensor has this shape for sure, and these strides where a dimension is not 1."""
    if len(shape) != tensor.dim():
        return False
    known = statically_known_true
    return all(
        known(size == its_size) and (known(size == 1) or known(stride == its_stride))
        for size, its_size, stride, its_stride in zip(shape, tensor.shape, strides, tensor.stride(), strict=True)
    )


def trains(graph: fx.Graph) -> bool:
    """Whether a graph is half of a training step: AOT autograd names its inputs so."""
    return any(node.name.startswith(("primals_", "tangents_")) for node in graph.find_nodes(op="placeholder"))
