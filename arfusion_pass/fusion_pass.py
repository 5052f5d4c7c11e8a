"""The pass: raise, fuse, commit, and one report for every graph it sees."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

import arfusion_pass.ops  # noqa: F401  (a compiled artefact imports nothing: the ops must exist before it runs)
from arfusion_pass import cache_key, provenance, publishing, written_order
from arfusion_pass.compilation import GraphBreak, compile_id, graph_break, known, running_part
from arfusion_pass.config import FusionConfig
from arfusion_pass.graph import parts_of, put_in_order, tensor_of, trains
from arfusion_pass.reporting.printing import print_graph, readable
from arfusion_pass.reporting.reports import FusionReport, Reports
from arfusion_pass.reporting.sites import Site
from arfusion_pass.rewrite import marking, recording
from arfusion_pass.rewrite.absence import why_no_all_reduce
from arfusion_pass.rewrite.chains import Chain, find_chains, mark_chains
from arfusion_pass.rewrite.commit import commit
from arfusion_pass.rewrite.edits import Edits
from arfusion_pass.rewrite.planning import Plan, planned
from arfusion_pass.rewrite.raised import RaisedSite
from arfusion_pass.rewrite.raising import find_sites
from arfusion_pass.rewrite.reassociate import Moves, reassociate
from arfusion_pass.rewrite.sizes import give_sizes

log = logging.getLogger("arfusion_pass")


class AllReduceFusionPass(CustomGraphPass):
    """Fuses ``all_reduce -> (add +) RMSNorm -> quantise`` in post-grad graphs.

    Install it as Inductor's ``post_grad_custom_post_pass``: :func:`arfusion_pass.inductor_options`,
    :func:`arfusion_pass.enable`, or by hand.

    Args:
        config: settings; those of ``ARFUSION_CONFIG``, else the defaults, if None.
    """

    def __init__(self, config: FusionConfig | None = None) -> None:
        self.config = given_config("AllReduceFusionPass", config)
        self._reports: list[FusionReport] = []

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite ``graph`` in place. Never raises, unless ``config.raise_errors``."""
        report = run(graph, self.config)
        self._reports.append(report)
        publishing.publish(report)
        publishing.called(report)

    def __deepcopy__(self, memo: dict[int, Any]) -> AllReduceFusionPass:
        """Itself: Inductor copies its options where it compiles for AOTInductor, and the reports belong here."""
        return self

    def uuid(self) -> Any:
        """Inductor's cache key for this pass (:mod:`arfusion_pass.cache_key`); None, no caching, while recording."""
        if recording.active() is not None:
            return None
        key = cache_key.pass_key(self.config)
        publishing.expect(key, self._reports.append)
        return key

    @property
    def reports(self) -> Reports:
        """One report for each graph this pass has seen or a compile cache kept, in order."""
        return Reports(self._reports)

    @property
    def report(self) -> Reports:
        """The same as :attr:`reports`: prints as one table over all graphs."""
        return self.reports


def fuse(graph_module: fx.GraphModule, config: FusionConfig | None = None) -> FusionReport:
    """Fuse a post-AOT graph module in place, for other back-ends and tests: with the graphs that it runs as parts, as
    Inductor does: the branches of ``torch.cond``, and the pieces of a split graph. Their sites stand in the report
    before its own. What is fused has no backward: run it under ``torch.no_grad()``. (With inputs that require a
    gradient the reference raises where gradients are on; the kernels cannot see it.)

    Args:
        graph_module: a functional aten graph whose nodes carry ``meta["val"]``.
        config: settings; the defaults if None.

    Raises:
        ValueError: if ``graph_module`` is no GraphModule, or ``config`` no FusionConfig.
    """
    if not isinstance(graph_module, fx.GraphModule):
        raise ValueError(f"fuse: expected a torch.fx.GraphModule, got {type(graph_module).__name__}")
    config = given_config("fuse", config)
    sites: list[Site] = []
    parts: dict[fx.GraphModule, fx.Node] = {}
    for node in graph_module.graph.nodes:
        for part in parts_of(node):
            parts.setdefault(part, node)  # each once, as its first call names it
    for part, node in parts.items():
        with running_part(part.graph, node):
            sites += fuse(part, config).sites
    names = [node.name for node in _outputs(graph_module.graph)]
    report = run(graph_module.graph, config)
    publishing.publish(report)
    if report.matched_count:
        _keep_names(graph_module.graph, names)
        graph_module.recompile()
    return dataclasses.replace(report, sites=(*sites, *report.sites)) if sites else report


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    """What a graph returns, in order."""
    found: list[fx.Node] = []
    fx.map_arg([output.args for output in graph.find_nodes(op="output")], found.append)
    return found


def _keep_names(graph: fx.Graph, names: list[str]) -> None:
    """Call what a graph returns as it was called: an exported program's signature names its outputs' nodes."""
    taken = {node.name for node in graph.nodes}
    for node, name in zip(_outputs(graph), names, strict=True):
        if name not in taken:
            node.name = name
            taken.add(name)


def given_config(what: str, config: FusionConfig | None) -> FusionConfig:
    """``config``, or the environment's where it is None.

    Raises:
        ValueError: it is no FusionConfig, in the words of the function ``what`` that was given it.
    """
    if config is not None and not isinstance(config, FusionConfig):
        raise ValueError(f"{what}: expected a FusionConfig, got {config!r}")
    return config or FusionConfig.from_env()


def reports() -> Reports:
    """The reports of every graph that any pass of this process has seen, or that a compile cache kept."""
    publishing.settle_ended()
    return Reports(publishing.all_reports)


def run(graph: fx.Graph, config: FusionConfig) -> FusionReport:
    """Raise, plan, write and report one graph."""
    begin = time.perf_counter()
    broken, recorder = graph_break(), recording.active()
    known(lambda: put_in_order(graph))
    printed = recorder is not None or publishing.dumping()
    before, before_code = _printed(graph) if printed else (None, None)
    rewrite = _rewrite(graph, config, recorder)
    after, after_code = _printed(graph) if printed and rewrite.written else (before, before_code)
    report = FusionReport(
        sites=_described(rewrite, broken),
        graph_break=None if broken is None else str(broken),
        seconds=time.perf_counter() - begin,
        note=rewrite.note,
        graph=len(publishing.all_reports),
        compile_id=compile_id(),
        rank=provenance.rank(),
        before=before,
        after=after,
        before_code=before_code,
        after_code=after_code,
    )
    if recorder is not None:
        recorder.mark(rewrite.taken, [call for _, call in rewrite.written])
        recorder.add(report, rewrite.taken)
    return report


@dataclasses.dataclass
class _Rewrite:
    """What became of one graph.

    Attributes:
        sites: what was found, each with the reason if nothing is fused there.
        texts: what the report says of them; taken while their nodes stood.
        moves: what stood between all-reduces and norms, and went out of the way.
        written: the fused calls. With none the graph is as it came.
        chains: those of the fused calls.
        taken: what the recorder copied, for each fused call.
        note: why nothing is fused, where no site can say it.
    """

    sites: list[RaisedSite] = dataclasses.field(default_factory=list)
    texts: list[Site] = dataclasses.field(default_factory=list)
    moves: Moves = dataclasses.field(default_factory=Moves)
    written: list[tuple[Plan, fx.Node]] = dataclasses.field(default_factory=list)
    chains: list[Chain] = dataclasses.field(default_factory=list)
    taken: list[Any] = dataclasses.field(default_factory=list)
    note: str | None = None


def _rewrite(graph: fx.Graph, config: FusionConfig, recorder: recording.Recorder | None) -> _Rewrite:
    """Raise, plan and write. An error anywhere leaves the graph node for node as it came, and a note."""
    rewrite = _Rewrite()
    try:
        with Edits(graph) as edits:
            _raise(rewrite, edits, config)
            _write(rewrite, edits, config, recorder)
            if rewrite.written:
                edits.keep()
    except Exception as error:
        if config.raise_errors:
            raise
        what = f"{type(error).__name__}: {error}"
        rewrite.note = f"the pass met something it did not expect and left the graph as it was: {what}"
        rewrite.written, rewrite.chains, rewrite.taken = [], [], []
        log.warning("arfusion: %s", rewrite.note, exc_info=True)
    return rewrite


def _raise(rewrite: _Rewrite, edits: Edits, config: FusionConfig) -> None:
    """Find the sites of a graph, once what can go out of their way has gone."""
    graph, moves = edits.graph, rewrite.moves
    give_sizes(edits)
    if config.reassociate and not trains(graph):
        moves = rewrite.moves = reassociate(edits, config)
    sites = find_sites(graph, config)
    for site in sites:
        if site.reason is not None and site.node in moves.idle:
            site.reason = f"{site.reason}, and without that {moves.idle[site.node]}"
    rewrite.texts = [provenance.describe(site, moves) for site in sites]  # from here on only reasons change
    rewrite.sites = sites
    if not sites:
        rewrite.note = why_no_all_reduce(graph)


def _write(rewrite: _Rewrite, edits: Edits, config: FusionConfig, recorder: recording.Recorder | None) -> None:
    """Write the fused calls that can be planned, and into their flags what they have to know of one another."""
    plans = planned(edits.graph, rewrite.sites, config)
    if recorder is not None:
        rewrite.taken = [recorder.take(plan) for plan in plans]
    rewrite.written = commit(edits, plans)
    if any(map(_on_cpu, rewrite.written)):
        written_order.keep()
    rewrite.chains = find_chains([call for _, call in rewrite.written], config)
    mark_chains(rewrite.chains)
    marking.stamp(rewrite.sites, rewrite.written)


def _described(rewrite: _Rewrite, broken: GraphBreak | None) -> tuple[Site, ...]:
    """What the report says of every all-reduce, those that went into another one among them."""
    fused = {id(plan.site): (plan, call) for plan, call in rewrite.written}
    described: list[Site] = []
    for site, text in zip(rewrite.sites, rewrite.texts, strict=True):
        merged = rewrite.moves.merged.get(site.node, ())
        described += [provenance.merged(gone, text, None if fused else rewrite.note) for gone in merged]
        if id(site) in fused:
            described.append(provenance.finish(text, *fused[id(site)], rewrite.chains))
        else:
            described.append(provenance.missed(site, text, rewrite.note, broken))
    return tuple(described)


def _printed(graph: fx.Graph) -> tuple[str | None, str | None]:
    """A graph as text and as code; None where torch cannot print it."""
    return known(lambda: print_graph(graph)), known(lambda: readable(graph))


def _on_cpu(written: tuple[Plan, fx.Node]) -> bool:
    tensors = map(tensor_of, written[1].all_input_nodes)
    return any(tensor is not None and tensor.device.type == "cpu" for tensor in tensors)
