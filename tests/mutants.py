"""Mutants: a graph that fuses with one condition broken, to be fused again and compared with itself, unfused.

:func:`mutate` changes one thing in a graph: an argument, a constant, an operand, an op, a rounding, a reader, or what
somebody writes to a tensor in between. Whether the mutant still fuses is the pass's own decision; what it computes must
be what the mutant computes as it stands.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from tests import models, moe_cases
from tests import quant_cases as q
from tests.simulate import aten, c10d, copied, prims, trace

Tensor = torch.Tensor
HIDDEN, ROWS, EXPERTS, PERMUTED = q.HIDDEN, 6, 3, 9
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUANTISERS = (
    *("static_div", "static_div_f32", "static_reciprocal", "static_encode", "static_no_clamp", "static_number"),
    *("token", "token_vllm", "token_torchao", "token_low", "group", "group_64", "group_minus_one", "group_vllm"),
    *("group_column", "group_tma", "group_pow2_log2", "group_pow2_bits", "int8_token", "int8_token_low"),
    *("int8_symmetric", "int8_unclamped"),
)
NORMS = tuple(name for name in models.NORMS if name not in models.OTHER_ROOTS)
"""Those that fuse bit for bit: what is compared are bits."""


def original(choose: random.Random) -> fx.GraphModule:
    """A graph of one site, or of two that share a residual, which fuses."""
    dtype = choose.choice(DTYPES)
    norm, quantiser = models.NORMS[choose.choice(NORMS)], choose.choice(("", *QUANTISERS))
    prologue = choose.choice(("", "", *moe_cases.FINALIZE, *moe_cases.REDUCE))
    residual = choose.choice(("none", "left", "right", "fp32", "unrounded"))
    twice = choose.random() < 0.3

    def model(x: Tensor, r: Tensor, w: Tensor, scale: Tensor, p: Tensor, index: Tensor, router: Tensor) -> Any:
        outputs: list[Tensor] = []
        for _ in range(2 if twice else 1):
            if prologue in moe_cases.FINALIZE:
                y = models.reduce(moe_cases.FINALIZE[prologue](p, index, router, x))
            elif prologue:
                y = models.reduce(moe_cases.REDUCE[prologue](p[:EXPERTS, None] * x, router.t().contiguous(), x))
            else:
                y = models.reduce(x)
            if residual == "unrounded":
                h, total = models.unrounded_sum(y, r, w, 1e-6, models.fp32_result)
            else:
                total = _sum(residual, y, r)
                h = norm(total, w, 1e-6)
            if quantiser:
                function = getattr(q, quantiser)
                outputs += [function(h, scale)] if quantiser.startswith("static") else list(function(h))
            else:
                outputs.append(h)
            outputs.append(total)
            x, r = h.to(dtype), total.to(dtype)
        return outputs

    examples = [
        *(torch.empty(ROWS, HIDDEN, dtype=dtype) for _ in range(2)),
        torch.empty(HIDDEN, dtype=dtype),
        torch.empty(1),
        torch.empty(PERMUTED, HIDDEN, dtype=dtype),
        torch.empty(ROWS, EXPERTS, dtype=torch.int64),
        torch.empty(ROWS, EXPERTS, dtype=dtype),
    ]
    return trace(model, *examples)


def _sum(residual: str, y: Tensor, r: Tensor) -> Tensor:
    if residual in ("none", "right"):
        return y if residual == "none" else y + r
    return (r.float() if residual == "fp32" else r) + y


def inputs_of(module: fx.GraphModule, seed: int) -> list[Tensor]:
    """Real inputs for an :func:`original`, indices from -2 on; some rows are all zero, tiny or hold a NaN."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if not value.dtype.is_floating_point:
            made.append(torch.randint(-2, PERMUTED, tuple(value.shape), generator=generator))
            continue
        data = torch.randn(tuple(value.shape), generator=generator)
        if tuple(value.shape) == (ROWS, HIDDEN) and seed % 4 == 3:
            data[1], data[ROWS - 2] = 0, 0
            data[2], data[ROWS - 3] = data[2] * 1e-42, data[2] * 1e-41
            data[0, 3] = math.nan if seed % 8 == 7 else data[0, 3]
        made.append((data.abs() + 0.1 if value.numel() == 1 else data).to(value.dtype))
    return made


def mutate(module: fx.GraphModule, choose: random.Random) -> tuple[fx.GraphModule, str] | None:
    """A mutant of ``module`` with what was changed in it; None where that makes no graph."""
    mutant = copied(module)
    name = choose.choice(tuple(MUTATIONS))
    what = MUTATIONS[name](mutant.graph, choose)
    if what is None:
        return None
    try:
        mutant.graph.lint()
        propagate(mutant)
    except Exception:
        return None  # such as a size that does not fit
    mutant.recompile()
    return mutant, f"{name}: {what}"


def propagate(module: fx.GraphModule) -> None:
    """Every node's ``meta["val"]`` anew."""
    vals = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    mode = next((val.fake_mode for val in vals if hasattr(val, "fake_mode")), FakeTensorMode())

    class Keep(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if node.op != "output":
                node.meta["val"] = value
            return value

    with mode, torch.no_grad():
        Keep(module).run(*(val.detach() if isinstance(val, Tensor) else val for val in vals))


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "name", "").startswith(
            ("aten::", "prims::")
        )
    ]  # fmt: skip


VALUES: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.bfloat16, torch.float32, torch.float64),
    "alpha": (2, 0.5, -1),
    "keepdim": (True, False),
    "min": (0, 1, -448.0, -127.0),
    "max": (3, 127.0, 448.0, 240.0),
    "dim": (0, -1, 1, [0], [-1], [-2]),
    "memory_format": (torch.contiguous_format, torch.preserve_format),
    "padding_idx": (0, 1),
    "step": (2,),
    "start": (1,),
    "end": (2,),
    "value": (1.0,),
    "rounding_mode": ("floor",),
}


def _option(graph: fx.Graph, choose: random.Random) -> str | None:
    """Another value for an optional argument."""
    node = choose.choice(_calls(graph))
    options = [
        (i, p) for i, p in enumerate(node.target._schema.arguments) if p.has_default_value() and p.name in VALUES
    ]
    if not options:
        return None
    index, parameter = choose.choice(options)
    value = choose.choice(VALUES[parameter.name])
    if index < len(node.args):
        node.update_arg(index, value)
    else:
        node.update_kwarg(parameter.name, value)
    return f"{node}: {parameter.name}={value}"


def _number(graph: fx.Graph, choose: random.Random) -> str | None:
    """Another constant."""
    places = [
        (node, i)
        for node in _calls(graph)
        for i, arg in enumerate(node.args)
        if isinstance(arg, (int, float)) and not isinstance(arg, bool)
    ]
    if not places:
        return None
    node, index = choose.choice(places)
    old = node.args[index]
    changed = (old + 1, old - 1, -old, old * 2, 0, old * 0.5 if isinstance(old, float) else old + 2, 1e39, old * 1.001)
    value = choose.choice(changed if isinstance(old, float) else changed[:6])
    node.update_arg(index, value if isinstance(old, float) else int(value))
    return f"{node}: {old} -> {value}"


def _operand(graph: fx.Graph, choose: random.Random) -> str | None:
    """Another operand of the same shape and dtype, or both exchanged."""
    node = choose.choice(_calls(graph))
    tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if not tensors:
        return None
    if len(tensors) == 2 and choose.random() < 0.4:
        node.args = (node.args[1], node.args[0], *node.args[2:])
        return f"{node}: operands exchanged"
    old = choose.choice(tensors)
    alike = [
        other
        for other in graph.nodes
        if other < node and other is not old and _same(other.meta.get("val"), old.meta.get("val"))
    ]
    if not alike:
        return None
    new = choose.choice(alike)
    node.replace_input_with(old, new)
    return f"{node}: {old} -> {new}"


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype


OTHERS: dict[Any, tuple[Any, ...]] = {
    aten.rsqrt.default: (aten.sqrt.default, aten.exp.default),
    aten.mean.dim: (aten.sum.dim_IntList,),
    aten.sum.dim_IntList: (aten.mean.dim,),
    aten.amax.default: (aten.amin.default, aten.logsumexp.default),
    aten.abs.default: (aten.neg.default, aten.relu.default, aten.nan_to_num.default),
    aten.add.Tensor: (aten.sub.Tensor, aten.maximum.default, aten.copy.default, aten.rsub.Tensor, aten.hypot.default),
    aten.mul.Tensor: (aten.div.Tensor, aten.add.Tensor, aten.copy.default, aten.fmod.Tensor),
    aten.div.Tensor: (aten.mul.Tensor,),
    aten.round.default: (aten.floor.default, aten.trunc.default),
    aten.ceil.default: (aten.floor.default, aten.round.default),
    aten.log2.default: (aten.log.default,),
    aten.exp2.default: (aten.exp.default,),
    aten.clamp_min.default: (aten.clamp_max.default,),
    aten.clamp_max.default: (aten.clamp_min.default,),
    aten.ge.Scalar: (aten.gt.Scalar, aten.ne.Scalar, aten.le.Scalar),
    aten.gt.Scalar: (aten.ge.Scalar, aten.ne.Scalar),
    aten.ne.Scalar: (aten.ge.Scalar, aten.eq.Scalar),
    aten.reciprocal.default: (aten.neg.default,),
    aten.bitwise_and.Scalar: (aten.bitwise_or.Scalar,),
    c10d.all_reduce.default: (),
}


def _op(graph: fx.Graph, choose: random.Random) -> str | None:
    """Another op on the same operands."""
    places = [node for node in _calls(graph) if OTHERS.get(node.target)]
    if not places:
        return None
    node = choose.choice(places)
    old, node.target = node.target, choose.choice(OTHERS[node.target])
    return f"{node}: {old} -> {node.target}"


def _rounding(graph: fx.Graph, choose: random.Random) -> str | None:
    """One operand rounded to another dtype and back."""
    node = choose.choice(_calls(graph))
    tensors = [arg for arg in node.all_input_nodes if _floating(arg)]
    if not tensors:
        return None
    old, low = choose.choice(tensors), choose.choice((torch.bfloat16, torch.float16, torch.float8_e4m3fn))
    with graph.inserting_before(node):
        rounded = graph.call_function(prims.convert_element_type.default, (old, low))
        back = graph.call_function(prims.convert_element_type.default, (rounded, old.meta["val"].dtype))
    node.replace_input_with(old, back)
    return f"{node}: {old} by way of {low}"


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _reader(graph: fx.Graph, choose: random.Random) -> str | None:
    """A value inside is an output as well."""
    node = choose.choice([node for node in _calls(graph) if isinstance(node.meta.get("val"), Tensor)])
    output = graph.output_node()
    output.args = ([*output.args[0], node],)  # type: ignore[misc]
    return f"{node} is returned"


def _broadcast(graph: fx.Graph, choose: random.Random) -> str | None:
    """One operand is its own first row, which broadcasts, or that row repeated."""
    node = choose.choice(_calls(graph))
    tensors = [arg for arg in node.all_input_nodes if getattr(arg.meta.get("val"), "ndim", 0) > 0]
    if not tensors:
        return None
    old = choose.choice(tensors)
    dim = choose.randrange(old.meta["val"].dim())
    with graph.inserting_before(node):
        new = graph.call_function(aten.slice.Tensor, (old, dim, 0, 1))
        if choose.random() < 0.5:
            new = graph.call_function(aten.expand.default, (new, list(old.meta["val"].shape)))
    node.replace_input_with(old, new)
    return f"{node}: {old} broadcast along {dim}"


def _enlarged(graph: fx.Graph, choose: random.Random) -> str | None:
    """One operand has a dimension more, of 1 or 3."""
    node = choose.choice(_calls(graph))
    tensors = [arg for arg in node.all_input_nodes if getattr(arg.meta.get("val"), "ndim", 0) > 0]
    if not tensors:
        return None
    old, count = choose.choice(tensors), choose.choice((1, 3))
    with graph.inserting_before(node):
        new = graph.call_function(aten.unsqueeze.default, (old, 0))
        new = graph.call_function(aten.expand.default, (new, [count, *old.meta["val"].shape]))
    node.replace_input_with(old, new)
    return f"{node}: {old} of {count} layers"


def _write(graph: fx.Graph, choose: random.Random) -> str | None:
    """Somebody writes to a tensor, or to a view of it, while others have still to read it."""
    nodes = [node for node in graph.nodes if _floating(node) and node.users]
    node = choose.choice(nodes)
    later = [other for other in graph.nodes if node < other and other.op != "placeholder"]
    place = choose.choice(later[:24])
    while place.op == "call_function" and place.target is operator.getitem:
        place = place.next
    value = node.meta["val"]
    if value.dtype.itemsize < 2:
        return None
    with graph.inserting_before(place):
        target = node
        if value.dim() > 1 and choose.random() < 0.3:
            target = graph.call_function(aten.select.int, (node, 0, 0))
        if choose.random() < 0.2:
            target = graph.call_function(aten.detach.default, (target,))
        graph.call_function(choose.choice((aten.mul_.Tensor, aten.add_.Tensor)), (target, 2.0))
    return f"{node} written in front of {place}"


def _scaled(graph: fx.Graph, choose: random.Random) -> str | None:
    """A factor behind a value."""
    node = choose.choice([node for node in graph.nodes if _floating(node) and node.users])
    if node.meta["val"].dtype.itemsize < 2:
        return None
    readers = list(node.users)
    with graph.inserting_after(node):
        scaled = graph.call_function(aten.mul.Tensor, (node, choose.choice((0.5, 1.0, 3.7))))
    if node.op == "placeholder":
        first = next(each for each in graph.nodes if each.op != "placeholder")
        first.prepend(scaled)
    for reader in readers if choose.random() < 0.5 else readers[:1]:
        reader.replace_input_with(node, scaled)
    return f"{node} scaled"


def write(
    module: fx.GraphModule, choose: random.Random, ways: dict[str, Write] | None = None
) -> tuple[fx.GraphModule, str] | None:
    """``module`` with somebody who writes to one of its tensors, in one of the ways of ``WRITES``, at any place behind
    it; None where that makes no graph."""
    mutant, ways = copied(module), WRITES if ways is None else ways
    nodes = [node for node in mutant.graph.nodes if _floating(node) and node.meta["val"].itemsize > 1]
    node, name = choose.choice(nodes), choose.choice(tuple(ways))
    later = [other for other in mutant.graph.nodes if node < other and other.op != "placeholder"]
    place = choose.choice(later[: choose.choice((6, 24, 60))])
    while place.op == "call_function" and place.target is operator.getitem:
        place = place.next
    try:
        with mutant.graph.inserting_before(place):
            ways[name](mutant.graph.call_function, node, node.meta["val"])
        mutant.graph.lint()
        propagate(mutant)
    except Exception:
        return None
    mutant.recompile()
    return mutant, f"{node} written by {name} in front of {place}"


def named(module: fx.GraphModule, choose: random.Random) -> tuple[fx.GraphModule, str]:
    """``module`` with the operands of some calls given by their names, as a pass may write them."""
    mutant, changed = copied(module), []
    for node in mutant.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or choose.random() < 0.5:
            continue
        kept = choose.randrange(len(node.args) + 1)
        names = [parameter.name for parameter in schema.arguments]
        node.kwargs = {**dict(zip(names[kept:], node.args[kept:], strict=False)), **node.kwargs}
        node.args = node.args[:kept]
        changed.append(node.name)
    mutant.recompile()
    return mutant, f"operands by name: {', '.join(changed)}"


def in_place(module: fx.GraphModule, choose: random.Random) -> tuple[fx.GraphModule, str] | None:
    """``module`` whose all-reduces write over what they reduce, where that is a tensor of its own or a copy. The sum
    is read from the result, its wait or that tensor, and now and then somebody writes to one of them."""
    mutant, changed = copied(module), []
    graph = mutant.graph
    for node in graph.find_nodes(op="call_function", target=c10d.all_reduce.default):
        x, group, (wait,) = node.args[0], node.args[2], node.users
        if choose.random() < 0.2:
            continue
        with graph.inserting_before(node):
            if x.op == "placeholder" or len(x.users) > 1 or choose.random() < 0.3:
                x = graph.call_function(aten.clone.default, (x,))
            if choose.random() < 0.3:
                x = graph.call_function(aten.view.default, (x, list(node.meta["val"].shape)))
            written = graph.call_function(c10d.all_reduce_.default, (x, "sum", group))
            again = graph.call_function(c10d.wait_tensor.default, (choose.choice((written, x)),))
        for reader in list(wait.users):
            reader.replace_input_with(wait, choose.choice((x, x, written, again)))
        if choose.random() < 0.3:
            with graph.inserting_before(choose.choice([each for each in graph.nodes if again < each][:24])):
                graph.call_function(aten.mul_.Tensor, (choose.choice((x, written, again)), 2.0))
        changed.append(node.name)
        graph.erase_node(wait)
        graph.erase_node(node)
    try:
        graph.lint()
        propagate(mutant)
    except Exception:
        return None
    mutant.recompile()
    return mutant, f"in place: {', '.join(changed)}"


Call = Callable[..., fx.Node]
Write = Callable[[Call, fx.Node, Tensor], Any]


def _to(view: Callable[[Call, fx.Node, Tensor], fx.Node]) -> Write:
    return lambda call, node, value: call(aten.mul_.Tensor, (view(call, node, value), 3.0))


def _part(call: Call, split: Any, *arguments: Any) -> fx.Node:
    return call(operator.getitem, (call(split, arguments), 0))


def _reduced_again(call: Call, node: fx.Node, value: Tensor) -> None:
    call(c10d.wait_tensor.default, (call(c10d.all_reduce_.default, (node, "sum", "0")),))


WRITES: dict[str, Write] = {
    "mul_": _to(lambda call, node, value: node),
    "imul": lambda call, node, value: call(operator.imul, (node, 2.0)),
    "setitem": lambda call, node, value: call(operator.setitem, (node, 0, 3.0)),
    "method": lambda call, node, value: node.graph.call_method("mul_", (node, 2.0)),
    "copy_": lambda call, node, value: call(aten.copy_.default, (node, call(aten.neg.default, (node,)))),
    "set_": lambda call, node, value: call(aten.set_.source_Tensor, (node, call(aten.neg.default, (node,)))),
    "out": lambda call, node, value: call(aten.add.out, (node, node), {"out": node}),
    "foreach": lambda call, node, value: call(aten._foreach_mul_.Scalar, ([node], 2.0)),
    "all_reduce_": _reduced_again,
    "select": _to(lambda call, node, value: call(aten.select.int, (node, -1, 0))),
    "slice": _to(lambda call, node, value: call(aten.slice.Tensor, (node, 0, 0, 1))),
    "permute": _to(lambda call, node, value: call(aten.permute.default, (node, [*range(value.dim())][::-1]))),
    "split": _to(lambda call, node, value: _part(call, aten.split.Tensor, node, (value.shape[-1] + 1) // 2, -1)),
    "unbind": _to(lambda call, node, value: _part(call, aten.unbind.int, node)),
    "diagonal": _to(lambda call, node, value: call(aten.diagonal.default, (node,))),
    "as_strided": _to(lambda call, node, value: call(aten.as_strided.default, (node, [value.numel()], [1], 0))),
    "detach": _to(lambda call, node, value: call(aten.detach.default, (node,))),
    "unsqueeze": _to(lambda call, node, value: call(aten.unsqueeze.default, (node, 0))),
    "bits": lambda call, node, value: call(
        aten.bitwise_xor_.Scalar,
        (call(aten.view.dtype, (node, torch.int16 if value.itemsize == 2 else torch.int32)), 2),
    ),
}  # fmt: skip
"""Ways to write to a tensor, or to a part of it."""


SILENT: dict[str, Write] = {
    "function": lambda call, node, value: call(torch.relu_, (node,)),
    "method of the class": lambda call, node, value: call(Tensor.mul_, (node, 2.0)),
    "packet": lambda call, node, value: call(aten.mul_, (node, 2.0)),
    "inplace=True": lambda call, node, value: call(torch.nn.functional.relu, (node, True)),
    "by name": lambda call, node, value: call(aten.mul_.Tensor, (), {"other": 2.0, "self": node}),
    "dropout": _to(lambda call, node, value: call(aten.dropout.default, (node, 0.5, False))),
    "einsum": _to(lambda call, node, value: call(aten.einsum.default, ("...i->...i", [node]))),
    "type_as": _to(lambda call, node, value: call(aten.type_as.default, (node, node))),
    "atleast_2d": _to(lambda call, node, value: call(aten.atleast_2d.default, (node,))),
    "broadcast_tensors": _to(lambda call, node, value: _part(call, aten.broadcast_tensors.default, [node])),
    "unsafe_chunk": _to(lambda call, node, value: _part(call, aten.unsafe_chunk.default, node, 2)),
    "sum_to_size": _to(lambda call, node, value: call(aten.sum_to_size.default, (node, list(value.shape)))),
    "view by name": _to(lambda call, node, value: call(aten.view.default, (), {"size": [-1], "self": node})),
}  # fmt: skip
"""Ways whose op does not say that it writes, or that what it gives is memory of what it is given."""


MUTATIONS: dict[str, Callable[[fx.Graph, random.Random], str | None]] = {
    "option": _option,
    "number": _number,
    "operand": _operand,
    "op": _op,
    "rounding": _rounding,
    "reader": _reader,
    "broadcast": _broadcast,
    "enlarged": _enlarged,
    "write": _write,
    "scaled": _scaled,
}
