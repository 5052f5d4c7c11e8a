"""One process that stands for a whole group: graphs are traced against fake process groups and run on simulated ranks.

Tracing needs nothing but the groups' names and sizes, and a graph means the same whatever the other ranks send as
long as fused and unfused receive the same. So most of the suite needs no second process: :func:`all_reduce` makes up
the other ranks' tensors from this rank's, differently for each group, and stands in for the collective both in the
graph as it came and in the fused op. ``test_ranks.py`` does the same on real ranks.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import arfusion_pass as arf
from arfusion_pass.groups import find_group
from arfusion_pass.inspection import replay
from arfusion_pass.inspection.graph_diff import print_graph
from arfusion_pass.ops import reference
from arfusion_pass.testing import assert_fused, fake_group

c10d = torch.ops._c10d_functional
aten = torch.ops.aten
prims = torch.ops.prims

fake_world = fake_group  # this process is rank 0, its group is called "0"
STRICT = arf.FusionConfig(raise_errors=True)

ENGINE_COLLECTIVES = (
    "vllm::all_reduce",
    "sglang::outplace_all_reduce",
    "sglang::flashinfer_allreduce",
    "symm_mem::one_shot_all_reduce",
    "trtllm::allreduce",
    "vllm::reduce_scatter",
    "vllm::all_gather",
)
"""Schema names of the all-reduces that :class:`Interpreter` simulates besides torch's own."""


def all_reduce(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum over the simulated ranks of ``group`` (a name or a ProcessGroup): another one for every group."""
    group = find_group(group) if isinstance(group, str) else group
    assert group is not None
    salt = sum(map(ord, group.group_name)) % 97 + 1
    flat = x.reshape(-1)
    # By powers of two, so that 16-bit values widened before the sum give what they give as they are.
    ranks = [flat] + [flat.flip(0).roll(salt) * 2.0 ** (rank % 3) for rank in range(1, group.size())]
    return reference.sum_in_rank_order(torch.stack(ranks)).view(x.shape)


def reduce_scatter(x: torch.Tensor, group: Any) -> torch.Tensor:
    """This rank's part of the first dimension of the sum over simulated ranks. What they send is made up row by row, so
    that it is the same in whatever order the rows come."""
    group = find_group(group) if isinstance(group, str) else group
    assert group is not None
    ranks = [x] + [x.flip(-1).roll(rank, -1) * 2.0 ** (rank % 3) for rank in range(1, group.size())]
    return reference.sum_in_rank_order(torch.stack(ranks))[: x.shape[0] // group.size()]


def all_gather(mine: torch.Tensor, group: Any) -> torch.Tensor:
    """The simulated ranks' rows behind one another: the others have this one's in another order, so that what is
    computed of each row by itself may be gathered before or after."""
    group = find_group(group) if isinstance(group, str) else group
    assert group is not None
    rows = mine.contiguous().view(torch.uint8).view(-1, mine.shape[-1] * mine.itemsize)
    ranks = torch.cat([rows.roll(rank, 0) for rank in range(group.size())])
    return ranks.view(mine.dtype).view(group.size() * mine.shape[0], *mine.shape[1:])


def ordered_all_reduce(x: torch.Tensor, group: Any) -> torch.Tensor:
    """:func:`reference.ordered_all_reduce` on the simulated ranks; no group is a world of one."""
    return x.clone() if group is None else all_reduce(x, group)


def scatter_rows(x: torch.Tensor, group: Any, block: int) -> torch.Tensor:
    """:func:`reference.scatter_rows` on the simulated ranks."""
    world = group.size()
    dealt = x.view(-1, world, block or max(x.shape[0] // world, 1), x.shape[-1]).transpose(0, 1)
    return reduce_scatter(dealt.reshape(x.shape), group)


def gather_rows(mine: torch.Tensor, group: Any, block: int) -> torch.Tensor:
    """:func:`reference.gather_rows` on the simulated ranks."""
    everyone = all_gather(mine, group).view(group.size(), -1, block or max(mine.shape[0], 1), mine.shape[-1])
    return everyone.transpose(0, 1).reshape(-1, mine.shape[-1])


@contextlib.contextmanager
def simulated_ranks() -> Iterator[None]:
    """The fused ops and the replays reduce with :func:`all_reduce`, scatter and gather with the two above."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (reference, replay):
            patch.setattr(module, "ordered_all_reduce", ordered_all_reduce)
            patch.setattr(module, "scatter_rows", scatter_rows)
        patch.setattr(reference, "gather_rows", gather_rows)
        patch.setattr(replay, "rows_of_owners", lambda x, group: x)  # the reference leaves every row on every rank
        yield


class Interpreter(fx.Interpreter):
    """Runs a graph node by node, its collectives by :func:`all_reduce`; engines' run over the whole world."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.higher_order.cond:
            predicate, *branches, operands = args
            return type(self)(branches[0 if predicate else 1]).run(*operands)
        schema = getattr(target, "_schema", None)
        if kwargs and schema is not None and schema.name.startswith("_c10d_functional::"):
            names = [parameter.name for parameter in schema.arguments]
            args, kwargs = (*args, *(kwargs[name] for name in names[len(args) :])), {}
        if target is c10d.all_reduce.default:
            return all_reduce(args[0], args[2])
        if target is c10d.all_reduce_.default:
            return args[0].copy_(all_reduce(args[0], args[2]))
        if target is c10d.reduce_scatter_tensor.default:
            return reduce_scatter(args[0], args[3])
        if target is c10d.all_gather_into_tensor.default:
            return all_gather(args[0], args[2])
        if target is c10d.wait_tensor.default:
            return args[0]
        if schema is not None and schema.name in ENGINE_COLLECTIVES:
            if schema.name in ("vllm::reduce_scatter", "vllm::all_gather"):
                collective = reduce_scatter if "scatter" in schema.name else all_gather
                dim = args[1] if len(args) > 1 else kwargs["dim"]
                return collective(args[0].movedim(dim, 0).contiguous(), dist.group.WORLD).movedim(0, dim).contiguous()
            result = all_reduce(args[0], dist.group.WORLD)
            return [result] if schema.name == "trtllm::allreduce" else result
        return super().call_function(target, args, kwargs)


def trace(fn: Callable[..., Any], *args: Any, functional: bool = True) -> fx.GraphModule:
    """``fn`` as a post-grad graph: decomposed as Inductor does, with ``meta["val"]``.

    With ``functional=False`` mutations stay as written.
    """
    traced = make_fx(
        torch.func.functionalize(fn) if functional else fn,
        decomposition_table=select_decomp_table(),
        tracing_mode="fake",
    )(*args)
    if functional:  # the C++ composite of rms_norm adds epsilon in place; AOT autograd leaves no such node
        for node in traced.graph.find_nodes(op="call_function", target=aten.add_.Scalar):
            node.target = aten.add.Scalar
    return traced


def tensors(*shapes: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Example inputs for :func:`trace`; only their shapes, dtypes and strides matter."""
    return [torch.empty(tuple(shape), dtype=dtype) for shape in shapes]


def symbolic(
    *shapes: Sequence[int | str], dtype: torch.dtype = torch.bfloat16, hints: dict[str, int] | None = None
) -> list[torch.Tensor]:
    """Like :func:`tensors`, but a size that is a string is a symbol of that name: ``("s", 32)``. All in one fake mode.

    A name stands for one symbol by its hint, which may be given: equal hints give one symbol, as they do in Dynamo.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    hints = {} if hints is None else dict(hints)
    made = []
    for shape in shapes:
        sizes = [size if isinstance(size, int) else hints.setdefault(size, 5 + 2 * len(hints)) for size in shape]
        dynamic = [DimDynamic.STATIC if isinstance(size, int) else DimDynamic.DUCK for size in shape]
        context = StatelessSymbolicContext(dynamic_sizes=dynamic)
        made.append(mode.from_tensor(torch.empty(sizes, dtype=dtype), symbolic_context=context))
    return made


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """Another module with the same graph and the same fake values, and the parts that it runs copied as well."""
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, env := {})
    graph.output(output)
    for old, new in env.items():
        new.meta = copy.copy(old.meta)
    made = fx.GraphModule(module, graph)
    for name, part in made.named_children():
        if isinstance(part, fx.GraphModule):
            setattr(made, name, copied(part))
    return made


def random_inputs(module: fx.GraphModule, seed: int = 0, **symbols: int) -> list[Any]:
    """Real inputs for a graph's placeholders; ``symbols`` gives the sizes, in order of appearance: ``tokens=5``."""
    generator = torch.Generator().manual_seed(seed)
    sizes = list(symbols.values())
    bound: dict[Any, int] = {}

    def size(value: Any) -> int:
        if isinstance(value, int):
            return value
        expression = value.node.expr
        if expression.is_Symbol and expression not in bound:
            bound[expression] = sizes[min(len(bound), len(sizes) - 1)] if sizes else 5
        return int(expression.subs(bound))

    inputs: list[Any] = []
    placeholders = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    for value in placeholders:
        if isinstance(value, torch.Tensor):
            shape = [size(dim) for dim in value.shape]
            data = torch.randn(shape, generator=generator, dtype=torch.float32)
            real = data.to(value.dtype)
            if not value.is_contiguous() and not any(isinstance(dim, torch.SymInt) for dim in value.shape):
                real = torch.empty_strided(shape, value.stride(), dtype=value.dtype).copy_(data)
            inputs.append(real)
        else:
            inputs.append(size(value) if isinstance(value, (int, torch.SymInt)) else value)
    return inputs


def run(module: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of ``module`` on the simulated ranks; the inputs are copied first."""
    own = [value.clone() if isinstance(value, torch.Tensor) else value for value in inputs]
    with simulated_ranks():
        result = Interpreter(module).run(*own)
    results = list(result) if isinstance(result, (list, tuple)) else [result]
    return [*results, *own]  # what was written to an input counts as well


def shared_memory(values: Sequence[Any]) -> set[tuple[int, int]]:
    """The pairs of ``values`` that are tensors in one storage: whoever gets both and writes to one writes to both."""
    where: dict[int, list[int]] = {}
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor) and value.numel():
            where.setdefault(value.untyped_storage().data_ptr(), []).append(index)
    return {pair for indices in where.values() for pair in itertools.combinations(indices, 2)}


def fused_copy(module: fx.GraphModule, config: arf.FusionConfig = STRICT) -> tuple[fx.GraphModule, arf.FusionReport]:
    """A fused copy of ``module``, linted, and its report."""
    fused = copied(module)
    report = arf.fuse(fused, config)
    fused.graph.lint()
    return fused, report


def check_same(module: fx.GraphModule, fused: fx.GraphModule, seed: int = 0, ulps: int = 0, **symbols: int) -> None:
    """Every output and every input afterwards agrees bit for bit, in dtype, shape and value, and has memory of its own
    where it had.

    On the CPU reference, fused and unfused are the same torch ops, so this is stricter than the *exact* contract;
    ``ulps`` is for a graph that spells the root otherwise.
    """
    inputs = random_inputs(module, seed, **symbols)
    wanted, got = run(module, inputs), run(fused, inputs)
    assert len(wanted) == len(got)
    assert shared_memory(got) <= shared_memory(wanted), print_graph(fused.graph)
    for index, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if not isinstance(a, torch.Tensor):
            assert a == b
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"output {index}"
        if a.dtype.is_floating_point:
            difference = replay.compare(b, a)
            assert difference.max_ulp <= ulps, f"output {index}: {difference}\n{print_graph(fused.graph)}"
        else:
            assert torch.equal(a, b), f"output {index}"


def check_fused(
    module: fx.GraphModule, count: int, config: arf.FusionConfig = STRICT, ulps: int = 0, **symbols: int
) -> arf.FusionReport:
    """Fuse a copy: ``count`` sites, none missed, no all-reduce or wait left beside them, the same bits."""
    fused, report = fused_copy(module, config)
    assert_fused(report, count)
    assert calls(fused, c10d.all_reduce.default, c10d.wait_tensor.default) == 0
    assert calls(fused, torch.ops.higher_order.auto_functionalized) == count
    check_same(module, fused, ulps=ulps, **symbols)
    return report


def check_unchanged(module: fx.GraphModule, config: arf.FusionConfig = STRICT) -> arf.FusionReport:
    """Fusing leaves ``module`` node for node as it was: names, targets, arguments, order, even the node objects, and
    the order of each one's readers."""
    before, nodes = print_graph(module.graph), list(module.graph.nodes)
    readers = [list(node.users) for node in nodes]
    report = arf.fuse(module, config)
    assert report.matched_count == 0, str(report)
    assert print_graph(module.graph) == before
    assert all(a is b for a, b in zip(nodes, module.graph.nodes, strict=True))
    assert [list(node.users) for node in nodes] == readers
    assert all(site.reason for site in report.sites)
    return report


def calls(module: fx.GraphModule, *targets: Any) -> int:
    """How many nodes call one of ``targets``."""
    return sum(node.op == "call_function" and node.target in targets for node in module.graph.nodes)


class _Captured(Exception):
    """Ends a compilation."""


def captured(
    model: Any, inputs: Sequence[torch.Tensor], dynamic: int | None = None, options_dynamic: bool | None = None
) -> fx.GraphModule:
    """The graph that torch.compile hands to Inductor's post-grad hook; the compilation ends there.

    Args:
        dynamic: every dimension of this size is marked dynamic.
        options_dynamic: ``torch.compile``'s own ``dynamic``.
    """
    found: list[fx.GraphModule] = []

    def take(graph: fx.Graph) -> None:
        found.append(copied(fx.GraphModule(graph.owning_module, graph)))
        raise _Captured

    torch._dynamo.reset()
    for tensor in inputs:
        for dim, size in enumerate(tensor.shape):
            if size == dynamic:
                torch._dynamo.mark_dynamic(tensor, dim)
    options = {"post_grad_custom_post_pass": take}
    try:
        torch.compile(model, fullgraph=True, options=options, dynamic=options_dynamic)(*inputs)
    except Exception:  # the compiler wraps ours in its own
        if not found:
            raise
    return found[0]
