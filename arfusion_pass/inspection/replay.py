"""Check every fused site against the subgraph it replaced, on the inputs that it really met.

::

    with replay.recording() as recorder:
        compiled(x)                      # compiled inside: each fused call keeps a copy of its inputs and outputs
    for check in recorder.checks():      # the matched subgraph, interpreted eagerly with the same all-reduce
        assert check.ok, check.detail

The contract (DESIGN, "Exact"): all-reduce and residual are bit-equal; a bf16 or fp16 norm differs in at most
``max(1, 0.1 %)`` elements, each by one value (:func:`norm_values`: two where Hugging Face rounds twice); an fp32 norm
by at most 4 ulp; codes and scales are bit-equal to the subgraph's quantiser applied to the norm that was produced.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from arfusion_pass.graph import aten, source_of, tensor_of
from arfusion_pass.groups import resolve_group
from arfusion_pass.ops import record
from arfusion_pass.ops.reference import ordered_all_reduce, rows_of_owners, scatter_rows
from arfusion_pass.ops.schema import OUTPUT_NAMES
from arfusion_pass.ops.spec import Flags, QuantSpec
from arfusion_pass.reporting.reports import FusionReport
from arfusion_pass.reporting.sites import Site
from arfusion_pass.rewrite.output_views import codes_layout, scale_layout
from arfusion_pass.rewrite.planning import Plan
from arfusion_pass.rewrite.recording import watching

GIVEN = ("residual", "addend", "factor", "weight", "epsilon_tensor", "scale")
"""The epilogue's tensor inputs."""
NORM_SHARE = 0.001
"""A 16-bit norm may differ from the subgraph's in this share of its elements (or in one), each by one value."""
NORM_ULPS_FP32 = 4
"""An fp32 norm may differ by so many units in the last place."""


@dataclasses.dataclass(frozen=True)
class OutputCheck:
    """How one output compares: elements that differ, elements in all, and the largest distance in representable
    values (0 where all bits agree)."""

    mismatched: int
    total: int
    max_ulp: int


@dataclasses.dataclass(frozen=True)
class SiteCheck:
    """The outcome for one call of one fused site."""

    site: Site
    ok: bool
    detail: str
    outputs: dict[str, OutputCheck]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a fused op: its arguments (tensors copied before it ran), what it wrote, and how to run it again."""

    arguments: dict[str, Any]
    outputs: dict[str, torch.Tensor]
    run: Callable[[dict[str, Any]], None]


@dataclasses.dataclass
class ReplaySite:
    """A fused site's subgraph, and the calls of the fused op that were seen."""

    subgraph: fx.GraphModule
    inputs: dict[str, str]
    group: str
    prologue: fx.GraphModule | None = None
    calls: list[Call] = dataclasses.field(default_factory=list)
    unsupported: str | None = None
    site: Site | None = None

    def observe(self, arguments: dict[str, Any], run: Callable[[dict[str, Any]], None]) -> None:
        """Keep a copy of a call's inputs and outputs."""
        kept = {
            name: value.detach().clone() if isinstance(value, torch.Tensor) and name not in OUTPUT_NAMES else value
            for name, value in arguments.items()
        }
        run(arguments)
        outputs = {name: arguments[name].detach().clone() for name in OUTPUT_NAMES if arguments[name] is not None}
        self.calls.append(Call(kept, outputs, run))


class Recorder:
    """Every fused site of the graphs compiled inside :func:`recording`."""

    def __init__(self) -> None:
        self.reports: list[FusionReport] = []
        self.sites: list[ReplaySite] = []
        self._observed: list[int] = []

    def take(self, plan: Plan) -> ReplaySite:
        """Copy what a plan is about to replace, while it still stands in the graph."""
        return _extract(plan)

    def mark(self, replays: list[ReplaySite], calls: list[fx.Node]) -> None:
        """Let each written call report to its recorder."""
        for replay, call in zip(replays, calls, strict=True):
            flags = call.kwargs["flags"]
            assert isinstance(flags, int)
            self._observed.append(record.observed(flags, replay.observe))
            call.update_kwarg("flags", self._observed[-1])

    def add(self, report: FusionReport, replays: list[ReplaySite]) -> None:
        """Keep a graph's report; its fused sites are the replays, in the report's order."""
        self.reports.append(report)
        by_name = {site.name: site for site in report.fused}
        for replay in replays:
            replay.site = by_name[replay.subgraph.meta["site"]]
            self.sites.append(replay)

    def end(self) -> None:
        """Keep no more calls: a model that runs on would fill the memory with what it runs on."""
        while self._observed:
            record.forget(self._observed.pop())

    def checks(self) -> list[SiteCheck]:
        """Compare every recorded call with its subgraph. Collective: every rank calls it, in the same order."""
        results = []
        for replay in self.sites:
            assert replay.site is not None
            if replay.unsupported is not None or not replay.calls:
                detail = replay.unsupported or "its fused call never ran"
                results.append(SiteCheck(replay.site, False, detail, {}))
            else:
                results += [_check(replay, call) for call in replay.calls]
        return results


def verdicts(reports: Sequence[FusionReport], checks: Sequence[SiteCheck]) -> dict[tuple[int, str], str]:
    """``"exact"``, or what differs, by a report's place and a site's name: what the page shows of the replays."""
    found: dict[tuple[int, str], str] = {}
    for number, report in enumerate(reports):
        for site in report.fused:
            calls = [check for check in checks if check.site is site]
            wrong = [check.detail for check in calls if not check.ok]
            if calls:
                found[number, site.name] = wrong[0] if wrong else "exact"
    return found


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Record every fused site of what is compiled and run inside: the recorder keeps copies of each call's inputs and
    outputs. Inductor's caches do not keep such graphs."""
    recorder = Recorder()
    try:
        with watching(recorder):
            yield recorder
    finally:
        recorder.end()


def _extract(plan: Plan) -> ReplaySite:
    """The subgraphs of a site: from a prologue's inputs to what is reduced, and from there to the written values."""
    site = plan.site
    assert site.reduced is not None and site.norm is not None
    given = {"reduced": site.reduced.value}
    given.update({role: node for role, node in site.inputs.items() if role in GIVEN})
    wanted = {role: site.values[role] for role in plan.buffers if role in site.values}
    norm = site.norms[0] if site.norms else None  # None where no node holds the norm of all rows, only its codes
    if norm is not None:
        wanted.setdefault("norm_out", norm)
    module, names, env, unknown = _subgraph(given, wanted, site.reduced.aliases)
    module.meta.update(site=site.node.name, norm=None if norm is None else env[norm].name)
    prologue = None
    if site.prologue is not None:
        prologue, prologue_names, _, more = _subgraph(site.prologue.inputs, {"x": site.prologue.x})
        prologue.meta["inputs"] = prologue_names
        unknown += more
    reason = f"its subgraph reads {', '.join(unknown)}, which the fused call does not take" if unknown else None
    return ReplaySite(module, names, site.group, prologue, unsupported=reason)


def _subgraph(
    given: dict[str, fx.Node], wanted: dict[str, fx.Node], reduced: Sequence[fx.Node] = ()
) -> tuple[fx.GraphModule, dict[str, str], dict[fx.Node, fx.Node], list[str]]:
    """What computes ``wanted`` from ``given``, where ``reduced`` are other names of what is given as that.

    A module that returns a dict, its placeholders' names by role, the copies of nodes, and the names of values that
    neither role nor symbolic size gives.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    names: dict[str, str] = {}
    unknown: list[str] = []

    def placeholder(node: fx.Node, role: str) -> None:
        if node not in env:
            env[node] = graph.placeholder(role)
            env[node].meta["val"] = node.meta.get("val")
        names[role] = env[node].name

    for role, node in given.items():
        placeholder(node, role)
    env.update({node: env[given["reduced"]] for node in reduced if node not in env})

    def copy(node: fx.Node) -> fx.Node:
        stack = [node]
        while stack:
            current = stack[-1]
            copied = source_of(current) if _overwrites_unknown(current, env) else None
            missing = [inner for inner in ([copied] if copied else current.all_input_nodes) if inner not in env]
            if current in env:
                stack.pop()
            elif copied in env:  # what it is written over may be anybody's
                env[current] = env[copied]
                stack.pop()
            elif current.op == "placeholder" or current.op == "get_attr":
                if isinstance(current.meta.get("val"), torch.SymInt):
                    placeholder(current, f"size_{current.name}")
                else:
                    unknown.append(current.name)
                    placeholder(current, f"unknown_{current.name}")
                stack.pop()
            elif missing:
                stack += missing
            else:
                env[current] = graph.node_copy(current, env.__getitem__)
                stack.pop()
        return env[node]

    graph.output({role: copy(node) for role, node in wanted.items()})
    return fx.GraphModule(torch.nn.Module(), graph), names, env, unknown


def _overwrites_unknown(node: fx.Node, env: dict[fx.Node, fx.Node]) -> bool:
    """Whether a node is a ``copy`` over what rests on tensors that are not given. A buffer that the graph makes for it
    is kept: its strides are the result's."""
    if node.target is not aten.copy.default:
        return False
    stack, seen = list(node.args[:1]), set[fx.Node]()
    while stack:
        current = stack.pop()
        if not isinstance(current, fx.Node) or current in env or current in seen:
            continue
        if current.op in ("placeholder", "get_attr") and tensor_of(current) is not None:
            return True
        seen.add(current)
        stack += current.all_input_nodes
    return False


class _WithNorm(fx.Interpreter):
    """Interprets a subgraph; the node called ``name`` takes a given value instead of its own."""

    def __init__(self, module: fx.GraphModule, name: str | None, value: torch.Tensor | None) -> None:
        super().__init__(module)
        self.target_name, self.value = name, value

    def run_node(self, n: fx.Node) -> Any:
        if n.name == self.target_name and self.value is not None:
            return self.value
        return super().run_node(n)


def _check(replay: ReplaySite, call: Call) -> SiteCheck:
    assert replay.site is not None
    group = resolve_group(replay.group) if replay.group else None
    call = _whole(call, group)
    arguments, produced = call.arguments, call.outputs
    x = arguments["x"] if replay.prologue is None else _prologue(replay.prologue, arguments)
    if "block" in arguments:
        reduced = scatter_rows(x.view(-1, x.shape[-1]), group, int(arguments["block"]))
    else:
        reduced = ordered_all_reduce(x, group)
    wanted = _interpret(replay, arguments, reduced, None)
    checks: dict[str, OutputCheck] = {}
    problems: list[str] = []
    if "quant_out" in produced and "norm_out" in wanted:
        norm, changed = _norm_of(call, wanted["norm_out"], group)
        again = _interpret(replay, arguments, reduced, norm.view(wanted["norm_out"].shape))
        wanted = {**wanted, **{role: again[role] for role in ("quant_out", "scale_out") if role in again}}
        problems += [f"{role}: another result when run again" for role in changed]
    for role, value in produced.items():
        if role not in wanted:
            continue  # scales that nobody reads
        expected = wanted[role]
        value = _as_in_graph(role, value, expected, wanted.get("norm_out", x).shape, arguments)
        checks[role] = compare(value.reshape(expected.shape), expected)
        inside = role == "quant_out" and "norm_out" not in wanted  # the graph's op keeps its norm to itself
        values = norm_values(arguments["flags"], arguments["weight"], x.dtype, expected.dtype)
        problem = _problem("norm_out" if inside else role, checks[role], expected.dtype, values)
        if problem is not None:
            problems.append(f"{role}: {problem}")
    return SiteCheck(replay.site, not problems, "; ".join(problems) or "within the contract", checks)


def _whole(call: Call, group: dist.ProcessGroup | None) -> Call:
    """A call inside a chain with the rows of its residuals that are defined: each token's from its owner."""
    arguments, outputs = dict(call.arguments), dict(call.outputs)
    if arguments["flags"] & Flags.RESIDUAL_IN_SHARDED:
        arguments["residual"] = rows_of_owners(arguments["residual"], group)
    if arguments["flags"] & Flags.RESIDUAL_OUT_SHARDED:
        outputs["residual_out"] = rows_of_owners(outputs["residual_out"], group)
    return dataclasses.replace(call, arguments=arguments, outputs=outputs)


def _norm_of(call: Call, like: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, list[str]]:
    """The norm that a call quantised, and the outputs that differ where the call is run once more to see it.

    A call that does not write its norm is run again with ``norm_out``: the fused ops are deterministic.
    """
    if "norm_out" in call.outputs:
        return call.outputs["norm_out"], []
    outputs = {name: torch.empty_like(value) for name, value in call.outputs.items()}
    outputs["norm_out"] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    call.run({**call.arguments, **outputs})
    outputs = _whole(dataclasses.replace(call, outputs=outputs), group).outputs
    changed = [name for name, value in call.outputs.items() if compare(outputs[name], value).mismatched]
    return outputs["norm_out"], changed


def _as_in_graph(
    role: str, value: torch.Tensor, expected: torch.Tensor, shape: torch.Size, arguments: dict[str, Any]
) -> torch.Tensor:
    """What the graph sees of a buffer: quantised outputs are views of it."""
    if role not in ("quant_out", "scale_out"):
        return value
    spec = QuantSpec.unpack(arguments["quant"], arguments["quant_bound"])
    plan = codes_layout if role == "quant_out" else scale_layout
    # Eager may have other strides than the graph was traced with (a padding by 0 keeps its input's); the values count.
    layout = plan(shape, spec, expected) or plan(shape, spec, expected.contiguous())
    if layout is None:
        raise ValueError(f"replay: {role} of {spec} cannot be viewed as {list(expected.shape)}, {expected.stride()}")
    return layout.view(value.view(layout.dtype).view(layout.shape))


def norm_values(flags: int, weight: torch.Tensor | None, dtype: torch.dtype, result: torch.dtype | None = None) -> int:
    """By how many representable values an element of a norm may be off where a rounding to 16 bits fell otherwise: by
    one, but by two where the normalised value is rounded before the weight is multiplied. One value there can become
    two: 1.0 and its neighbour above, times 0.98. An fp32 ``result`` of that has as many more values in between."""
    if not flags & Flags.ROUND_BEFORE_WEIGHT or weight is None or dtype == torch.float32:
        return 1
    between = 1 if result != torch.float32 else torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    return int(2 * between)


def _problem(role: str, check: OutputCheck, dtype: torch.dtype, values: int) -> str | None:
    """What breaks the contract, or None; ``values`` is :func:`norm_values`."""
    if check.mismatched == 0:
        return None
    allowed = max(1, int(NORM_SHARE * check.total))
    summary = f"{check.mismatched} of {check.total} elements differ, by up to {check.max_ulp} values"
    if role != "norm_out":
        return summary
    if dtype == torch.float32 and check.max_ulp <= NORM_ULPS_FP32:
        return None
    if dtype == torch.float32 and values == 1:
        return summary
    return None if check.mismatched <= allowed and check.max_ulp <= values else summary


def _interpret(
    replay: ReplaySite, arguments: dict[str, Any], reduced: torch.Tensor, norm: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The subgraph's values for one call's inputs; with ``norm`` given, the norm's node takes that value."""
    real: dict[str, Any] = {"reduced": reduced}
    real.update({role: arguments[role] for role in GIVEN if arguments[role] is not None})
    values = _placeholder_values(replay.subgraph, replay.inputs, real)
    return _WithNorm(replay.subgraph, replay.subgraph.meta["norm"], norm).run(*values)


def _prologue(module: fx.GraphModule, arguments: dict[str, Any]) -> torch.Tensor:
    """What a MoE prologue's subgraph computes from a call's inputs."""
    values = _placeholder_values(module, module.meta["inputs"], arguments)
    return fx.Interpreter(module).run(*values)["x"]


def _placeholder_values(module: fx.GraphModule, names: dict[str, str], real: dict[str, Any]) -> list[Any]:
    """A value for each placeholder of a subgraph, in the shape that the graph gave it."""
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    by_name = {name: real[role] for role, name in names.items() if role in real}
    bindings: dict[Any, int] = {}
    for node in placeholders:
        fake = node.meta.get("val")
        if isinstance(fake, torch.Tensor) and node.name in by_name:
            value = _as_given(fake, by_name[node.name])
            by_name[node.name] = value.reshape(_concrete(fake, value, bindings)).to(fake.dtype)
        elif isinstance(fake, torch.SymFloat) and node.name in by_name:
            by_name[node.name] = float(by_name[node.name])
    return [by_name[node.name] if node.name in by_name else _size(node.meta["val"], bindings) for node in placeholders]


def _as_given(fake: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A bias that the fused call got as a row for each token: as the row, or the one element, that the graph has."""
    count = fake.numel()
    if not isinstance(count, int) or count == value.numel() or count not in (1, value.shape[-1]):
        return value
    return value.reshape(-1, value.shape[-1])[0, :count] if value.numel() else value.new_zeros(fake.shape)


def _concrete(fake: torch.Tensor, real: torch.Tensor, bindings: dict[Any, int]) -> list[int]:
    """The real sizes of a fake tensor, given a real tensor of as many elements; binds symbols, their multiples and
    shares."""
    known = [(size, actual) for size, actual in zip(fake.shape, real.shape, strict=False) if isinstance(size, int)]
    if real.dim() == fake.dim() and all(size == actual for size, actual in known):  # else the call took a view of it
        for size, actual in zip(fake.shape, real.shape, strict=True):
            _bind(size, actual, bindings)
        return list(real.shape)
    _bind(fake.numel(), real.numel(), bindings)
    return [_size(size, bindings) for size in fake.shape]


def _bind(size: Any, actual: int, bindings: dict[Any, int]) -> None:
    if isinstance(size, torch.SymInt):
        bindings.setdefault(size.node.expr, actual)
        factor, symbol = size.node.expr.as_coeff_Mul()
        bindings.setdefault(symbol, actual // int(factor))
        if isinstance(symbol, FloorDiv) and symbol.args[1].is_number:  # each rank has as many rows
            bindings.setdefault(symbol.args[0], actual // int(factor) * int(symbol.args[1]))


def _size(value: Any, bindings: dict[Any, int]) -> Any:
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return bindings[expression] if expression in bindings else int(expression.subs(bindings))
    return value


def compare(actual: torch.Tensor, expected: torch.Tensor) -> OutputCheck:
    """Elements that differ and the largest distance in representable values; all NaNs are one value."""
    if actual.dtype != expected.dtype:
        raise ValueError(f"compare: {actual.dtype} against {expected.dtype}")
    a, b = _ordered(actual), _ordered(expected)
    distance = (a - b).abs()
    if actual.dtype.is_floating_point and actual.dtype.itemsize > 1:
        both_nan = actual.isnan() & expected.isnan()
        distance = torch.where(both_nan.reshape(distance.shape), torch.zeros_like(distance), distance)
    differs = distance != 0
    return OutputCheck(int(differs.sum()), differs.numel(), int(distance.max()) if distance.numel() else 0)


def _ordered(value: torch.Tensor) -> torch.Tensor:
    """int64 that grows with the value: neighbours in the dtype differ by 1; -0.0 and +0.0 differ by 1 as well."""
    value = value.contiguous()
    if value.dtype.is_floating_point:
        size = value.dtype.itemsize
        bits = value.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).to(torch.int64)
        bits = bits & ((1 << (8 * size)) - 1) if size < 8 else bits
        sign = 1 << (8 * size - 1)
        return torch.where(bits >= sign, sign - 1 - bits, bits)
    return value.to(torch.int64)


__all__ = ["OutputCheck", "Recorder", "SiteCheck", "compare", "recording"]
