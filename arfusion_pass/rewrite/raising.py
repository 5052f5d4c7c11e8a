"""Raise: from every all-reduce of a graph, name the stages that follow, or the reason why there are none.

The user's graph is only read; what is found goes into a shadow graph (:mod:`arfusion_pass.rewrite.shadow`). A
reduce-scatter whose norm is gathered again (:mod:`arfusion_pass.rewrite.gathering`) begins a site as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterable, Iterator

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from arfusion_pass.config import FusionConfig, canonical_epsilon
from arfusion_pass.dialects import DIALECTS, Norm, Prologue, Quantised, Reduced, Refused, Scattered, norms_of
from arfusion_pass.dialects.reading.operands import is_row, sums, widens_beside
from arfusion_pass.graph import (
    as_many_rows,
    describe,
    dtype_of,
    is_cast,
    is_returned,
    last_dim,
    path,
    row_views,
    same_shape,
    same_size,
    source_of,
    tensor_of,
    trains,
    views_of,
    widens,
    without_views,
)
from arfusion_pass.ops.spec import Flags, group_fits
from arfusion_pass.rewrite import hindrances
from arfusion_pass.rewrite.gathering import Gathering, gathering, uneven
from arfusion_pass.rewrite.hindrances import (
    Hindrance,
    Reductions,
    following,
    leads_to_norm,
    merges,
    sum_before,
    why_no_norm,
)
from arfusion_pass.rewrite.output_views import codes_layout, scale_layout
from arfusion_pass.rewrite.reductions import (
    check_reduced,
    in_its_own_dtype,
    in_its_own_order,
    in_whole_rows,
    row_lengths,
)

COMPUTES = ("aten", "prims")
"""Namespaces of ops that are no collectives: nearly all of a graph's nodes, which no dialect is asked about."""


@dataclasses.dataclass
class RaisedSite:
    """One all-reduce, or reduce-scatter, with what was recognised behind it.

    Attributes:
        reduced: the collective; None where it was refused at once.
        node: the node that names the site.
        prologue, norm, quant: the stages, or None.
        scatters: whether it is a reduce-scatter's.
        gathered: what gathers the norm's rows behind a reduce-scatter; None for an all-reduce.
        twins: quantisers of the same norm that compute what ``quant`` does: its outputs serve their readers too.
        note: why a quantiser behind the norm is left alone, or None.
        reason: why nothing can be fused, or None so far.
        culprit: the node that the reason speaks of, whose line of code the report shows; None where there is none.
        hindrance: the step that could be taken before the all-reduce (:mod:`arfusion_pass.rewrite.reassociate`), or
            None. A sum of two all-reduces that a norm reads hinders one of them alone.
        dialects: the names of the dialects that spelled the stages.
        values: role (``allreduce_out``, ``residual_out``, ``norm_out``, ``quant_out``, ``scale_out``) to the node of
            the user's graph that holds it.
        inputs: role (``x`` or the prologue's argument names, ``residual``, ``addend``, ``weight``, ``epsilon_tensor``,
            ``scale``) to the node of the user's graph.
    """

    node: fx.Node
    group: str = ""
    reduced: Reduced | None = None
    prologue: Prologue | None = None
    norm: Norm | None = None
    gathered: Gathering | None = None
    quant: Quantised | None = None
    twins: tuple[Quantised, ...] = ()
    note: str | None = None
    reason: str | None = None
    culprit: fx.Node | None = None
    hindrance: Hindrance | None = None
    dialects: tuple[str, ...] = ()
    scatters: bool = False

    @property
    def norms(self) -> tuple[fx.Node, ...]:
        """The nodes that hold the norm of all rows."""
        if self.gathered is not None:
            return self.gathered.norms
        return () if self.norm is None or self.norm.norm is None else (self.norm.norm,)

    @property
    def rows(self) -> torch.Tensor:
        """A tensor of the shape ``[..., H]`` that a norm of all rows has."""
        tensor = tensor_of(self.norms[0] if self.norms else self.reduced.x)  # type: ignore[union-attr]
        assert tensor is not None
        return tensor

    @property
    def holders(self) -> dict[str, tuple[fx.Node, ...]]:
        """Role to every node of the user's graph that holds the value: several where quantisers are twins."""
        holders: dict[str, tuple[fx.Node | None, ...]] = {}
        if self.reduced is not None:
            holders["allreduce_out"] = self.reduced.values
        if self.norm is not None:
            holders["residual_out"] = (self.norm.total,)
            holders["norm_out"] = self.norms
        if self.quant is not None:
            quantisers = (self.quant, *self.twins)
            holders["quant_out"] = tuple(quant.codes for quant in quantisers)
            holders["scale_out"] = tuple(quant.scales for quant in quantisers)
        held = {role: tuple(node for node in nodes if node is not None) for role, nodes in holders.items()}
        return {role: tuple(dict.fromkeys(nodes)) for role, nodes in held.items() if nodes}

    @property
    def values(self) -> dict[str, fx.Node]:
        return {role: nodes[0] for role, nodes in self.holders.items()}

    @property
    def inputs(self) -> dict[str, fx.Node]:
        inputs: dict[str, fx.Node | None] = {}
        if self.prologue is not None:
            inputs.update(self.prologue.inputs)
        elif self.reduced is not None:
            inputs["x"] = self.reduced.x
        if self.gathered is not None and isinstance(self.gathered.rows.block, fx.Node):
            inputs["block"] = self.gathered.rows.block
        if self.norm is not None:
            inputs["residual"] = self.norm.residual
            inputs["addend"] = self.norm.addend
            inputs["weight"] = self.norm.weight
            if isinstance(self.norm.epsilon, fx.Node):
                inputs["epsilon_tensor"] = self.norm.epsilon
        if self.quant is not None:
            inputs["scale"] = self.quant.scale
        return {role: node for role, node in inputs.items() if node is not None}

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Every node that the fused call would stand for, in graph order."""
        stages = (self.prologue, self.reduced, self.norm, self.gathered, self.quant, *self.twins)
        return tuple(sorted({node for stage in stages if stage is not None for node in stage.nodes}))

    @property
    def replaced(self) -> set[fx.Node]:
        """The nodes that go: all of them, but for a cast or view that somebody outside reads. That one stays and
        reads the value that the kernel writes."""
        nodes = self.nodes
        gone, values = set(nodes), {node for held in self.holders.values() for node in held}
        for node in reversed(nodes):
            read = node not in values and any(user not in gone for user in node.users)
            if read and (is_cast(node) or source_of(node) is not None):
                gone.discard(node)
        return gone

    @property
    def outside_readers(self) -> dict[str, list[fx.Node]]:
        """Role of a value to the nodes outside the site that read it, in graph order."""
        gone = self.replaced
        return {
            role: sorted({user for node in nodes for user in node.users if user not in gone})
            for role, nodes in self.holders.items()
        }


def find_sites(graph: fx.Graph, config: FusionConfig) -> list[RaisedSite]:
    """Every all-reduce of ``graph`` in graph order, with its stages or the reason why it has none; and every
    reduce-scatter that a norm follows."""
    sites = [site for node in graph.nodes if (site := open_site(node, config)) is not None]
    candidates: dict[fx.Node, list[tuple[Norm, str]]] = {}
    for site in sites:
        if site.reason is None:
            candidates[site.node] = _norms(site, config)
    summed = (site.reduced for site in sites if site.node in candidates and not site.scatters)
    reductions = Reductions(reduced for reduced in summed if reduced is not None)
    sites = [site for site in sites if not site.scatters or _concerns_norm(site, candidates, reductions)]
    for site in sites:
        if site.reduced is None or site.reason is not None:
            continue
        if not candidates[site.node]:
            moved = config.reassociate or site.scatters  # nothing is moved behind a reduce-scatter
            site.hindrance, site.reason, site.culprit = why_no_norm(site.reduced, reductions, moved)
            site.hindrance = None if site.scatters else site.hindrance
        elif not site.scatters:
            site.hindrance = _sum_behind(site.reduced, candidates[site.node], reductions)
    _assign(sites, candidates, reductions, config)
    for site in sites:
        if site.reason is None and site.scatters:
            _gather(site, config)
    for site in sites:
        if site.reason is None:
            _find_prologue(site)
            if config.quantisers:
                _find_quantiser(site)
    for site in sites:
        if site.reason is None and not any(site.outside_readers.values()):
            site.reason = "nobody reads its norm or anything else that the fused call would produce"
    if trains(graph):  # one that keeps nothing of the inside of a norm: its backward computes the norm again
        for site in sites:
            site.reason = site.reason or "its graph is half of a training step, and only inference graphs are fused"
    return sites


def find_hindrance(reduced: Reduced, reductions: Reductions, config: FusionConfig) -> Hindrance | None:
    """What hinders one all-reduce: the :attr:`RaisedSite.hindrance` of :func:`find_sites`, for it alone."""
    site = RaisedSite(reduced.node, reduced.group, reduced)
    candidates = _norms(site, config)
    if candidates:
        return _sum_behind(reduced, candidates, reductions)
    return hindrances.find_hindrance(reduced, reductions)[0] if site.reason is None else None


def _sum_behind(reduced: Reduced, candidates: list[tuple[Norm, str]], reductions: Reductions) -> Hindrance | None:
    """The sum of two all-reduces that could be one, where norms are found behind one of them."""
    norms = [norm for norm, _ in candidates]
    if all(_adds_reduced(norm, reductions) for norm in norms):  # as well as the addend's own site
        found, _ = hindrances.find_hindrance(reduced, reductions)
        if merges(found, reduced, reductions):
            return found
    return next(filter(None, (sum_before(norm, reduced, reductions) for norm in norms)), None)


def _concerns_norm(site: RaisedSite, candidates: dict[fx.Node, list[tuple[Norm, str]]], reductions: Reductions) -> bool:
    """Whether a norm stands behind a reduce-scatter, or its kind of reduction is a reason by itself."""
    if site.reduced is None or site.reason is not None or candidates[site.node]:
        return True
    return leads_to_norm(site.reduced, reductions)


def _adds_reduced(norm: Norm, reductions: Reductions) -> bool:
    """Whether a norm has an addend, and that or the residual is another site's all-reduce, which nobody else reads: one
    all-reduce of both sums would do."""
    for node in (norm.addend, norm.residual) if norm.addend is not None else ():
        other = reductions.get(without_views(node))
        read = None if other is None else following(other.value)
        while read is not None and widens(read[0]):
            read = following(read[0])
        if read is not None and read[0] in norm.nodes:
            return True
    return False


def open_site(node: fx.Node, config: FusionConfig) -> RaisedSite | None:
    """The site that ``node`` opens, if it is an all-reduce or a reduce-scatter in any dialect, with what speaks against
    it already."""
    if node.op != "call_function" or getattr(node.target, "namespace", None) in COMPUTES:
        return None
    for dialect in DIALECTS:
        found = dialect.all_reduce(node)
        scatters = found is None
        if found is None:
            found = dialect.reduce_scatter(node)
        if found is None or (scatters and isinstance(found, Refused) and not config.sequence_parallel):
            continue
        if isinstance(found, Refused):
            site = RaisedSite(node, reason=found.reason, culprit=found.node)
        else:
            found = found if isinstance(found, Scattered) else in_its_own_order(in_its_own_dtype(found))
            site = RaisedSite(node, found.group, found, reason=check_reduced(found))
        site.dialects, site.scatters = (dialect.name,), scatters
        return site
    return None


def _gather(site: RaisedSite, config: FusionConfig) -> None:
    """Find what gathers a reduce-scatter's norm, and a quantiser in front of that; else the reason."""
    assert isinstance(site.reduced, Scattered) and site.norm is not None
    found = uneven(site.reduced) or gathering(site.reduced, site.norm)
    if isinstance(found, Refused):
        site.reason, site.culprit = found.reason, found.node
        return
    site.gathered, site.quant = found, found.quant
    site.reduced = dataclasses.replace(site.reduced, x=found.rows.node)
    if not config.sequence_parallel:
        site.reason = (
            f"its norm {describe(site.norm.result)} is gathered again, and FusionConfig has sequence_parallel=False"
        )
    elif last_dim(found.rows.node) != last_dim(site.norm.operand):
        site.reason = (
            f"{describe(found.rows.node)} has no rows of {last_dim(site.norm.operand)}, as its norm reads them"
        )
    elif found.quant is not None:
        _check_gathered(site, config)


def _check_gathered(site: RaisedSite, config: FusionConfig) -> None:
    """What speaks against a quantiser whose codes are gathered, each rank's own."""
    assert site.quant is not None
    site.culprit = site.quant.codes
    if not config.quantisers:
        site.reason = f"{describe(site.quant.codes)} gathers codes, and FusionConfig has quantisers=False"
    else:
        site.reason = _unfit(site.quant, site) or _fuse_quantisers(site, [site.quant])


def _norms(site: RaisedSite, config: FusionConfig) -> list[tuple[Norm, str]]:
    """The norms that could be fused behind a site, best first. With none, the site gets the reason against one that it
    has; a site that has none at all keeps None."""
    assert site.reduced is not None
    usable: list[tuple[Norm, str]] = []
    reasons: list[tuple[str, fx.Node | None]] = []
    reason: str | None
    lengths = row_lengths(site.reduced.x)
    for held in site.reduced.values:
        for value in filter(_is_computed_with, views_of(held)):
            for found, dialect in (*norms_of(value), *_norms_behind_addend(value)):
                norm = in_whole_rows(found, value, lengths)
                norm = norm if isinstance(norm, Refused) else _with_bias(norm)
                reason = norm.reason if isinstance(norm, Refused) else _check_norm(site.reduced, norm, config)
                if reason is not None:
                    reasons.append((reason, norm.node if isinstance(norm, Refused) else norm.result))
                else:
                    assert isinstance(norm, Norm)
                    usable.append((dataclasses.replace(norm, nodes=(*path(held, value), *norm.nodes)), dialect))
    if not usable and reasons:
        site.reason, site.culprit = reasons[0]
    return usable


def _norms_behind_addend(value: fx.Node) -> Iterator[tuple[Norm, str]]:
    """The norms of two sums, each in the tensor's dtype but for the last: ``r + (value + t)``, ``(r + value) + t``.

    Which of the two is the residual and which the addend is one to the kernels but for this: a bias is an addend, an
    fp32 tensor a residual.
    """
    for inner in sums(value):
        add, first = inner.start, inner.residual
        assert first is not None
        if dtype_of(add) != dtype_of(value) or dtype_of(first) != dtype_of(value) or following(add) is None:
            continue  # a sum that others read as well, such as a residual stream's, is no step on the way
        for view in filter(_is_computed_with, views_of(add)):
            for found, dialect in norms_of(view):
                if isinstance(found, Refused) or found.residual is None:
                    continue
                last = found.residual
                behind = is_row(last, last_dim(value)) and not is_row(first, last_dim(value))
                addend, residual = (last, first) if behind else (first, last)
                norm = dataclasses.replace(
                    found,
                    operand=value,
                    nodes=(*inner.nodes, *path(add, view), *found.nodes),
                    residual=residual,
                    addend=addend,
                    flags=found.flags | (Flags.ADDEND_LAST if behind else Flags.NONE),
                )
                yield norm, dialect


def _with_bias(norm: Norm) -> Norm:
    """A bias that is all that is added: an addend, which may be one row, and no residual."""
    if norm.residual is None or norm.addend is not None or not is_spread(norm.residual, norm.operand):
        return norm
    return dataclasses.replace(norm, residual=None, addend=norm.residual)


def _is_computed_with(value: fx.Node) -> bool:
    """Whether others than views of ``value`` read it: what reads those is found from them, and a long chain of views is
    not gone through from each of its links."""
    return any(source_of(user) is not value for user in value.users)


def _check_norm(reduced: Reduced, norm: Norm, config: FusionConfig) -> str | None:
    dtype, hidden = dtype_of(reduced.x), last_dim(norm.operand)
    if hidden is None:
        return f"the last dimension of {describe(norm.operand)} is symbolic or absent; the hidden size must be static"
    if hidden * dtype.itemsize % 16:  # type: ignore[union-attr]
        return f"a row of {describe(norm.operand)} has {hidden * dtype.itemsize} bytes, no multiple of 16"  # type: ignore[union-attr]
    if norm.quant is not None and not config.quantisers:
        return f"{describe(norm.result)} is quantised by the norm's own op, and FusionConfig has quantisers=False"
    if norm.norm is not None and dtype_of(norm.norm) not in (dtype, torch.float32):
        return f"{describe(norm.norm)} is {dtype_of(norm.norm)}; a norm of {dtype} may be {dtype} or float32"
    if norm.norm is not None and last_dim(norm.norm) != hidden:
        return f"{describe(norm.norm)} normalises rows of {last_dim(norm.norm)}, the all-reduce has rows of {hidden}"
    for node in (norm.norm, norm.total):
        if node is not None and not as_many_rows(node, norm.operand):
            return f"{describe(node)} is not known to have as many rows as {describe(norm.operand)}"
    if norm.addend is not None and dtype_of(norm.addend) != dtype:
        return f"the addend {describe(norm.addend)} is {dtype_of(norm.addend)}; expected {dtype}"
    for role, node in (("residual", norm.residual), ("weight", norm.weight)):
        if node is not None and dtype_of(node) not in (dtype, torch.float32) and not widens_beside(node, dtype):
            return f"the {role} {describe(node)} is {dtype_of(node)}; expected {dtype} or float32"
    if norm.weight is not None and (tensor_of(norm.weight).dim() != 1 or last_dim(norm.weight) != hidden):  # type: ignore[union-attr]
        shape = tuple(tensor_of(norm.weight).shape)  # type: ignore[union-attr]
        return f"the weight {describe(norm.weight)} has shape {shape}, expected ({hidden},)"
    if norm.total is not None and dtype_of(norm.total) not in (dtype, torch.float32):
        return f"the residual sum {describe(norm.total)} is {dtype_of(norm.total)}; expected {dtype} or float32"
    if config.dtypes is not None and dtype not in config.dtypes:
        return f"{dtype} is not among the dtypes of FusionConfig ({', '.join(map(str, config.dtypes))})"
    if isinstance(norm.epsilon, fx.Node):
        if config.epsilons is not None:
            value = describe(norm.epsilon)
            return f"epsilon is the value of {value}, and FusionConfig names its epsilons ({config.epsilons})"
        return _read_inside(norm.nodes, _values(reduced, norm), "RMSNorm")
    if not math.isfinite(canonical_epsilon(norm.epsilon)) or norm.epsilon < 0:
        return f"epsilon {norm.epsilon} is no finite float32 >= 0"
    if config.epsilons is not None and canonical_epsilon(norm.epsilon) not in config.epsilons:
        return f"epsilon {norm.epsilon} is not among the epsilons of FusionConfig ({config.epsilons})"
    return _read_inside(norm.nodes, _values(reduced, norm), "RMSNorm")


def _values(reduced: Reduced, norm: Norm) -> set[fx.Node | None]:
    """What the fused call of a norm can write."""
    values = {*reduced.values, norm.norm, norm.total}
    return values if norm.quant is None else values | {norm.quant.codes, norm.quant.scales}


def _read_inside(nodes: tuple[fx.Node, ...], values: set[fx.Node | None], what: str) -> str | None:
    """A reason if a value inside a match, which the fused kernel does not produce, is read outside of it."""
    inside = set(nodes)
    for node in nodes:
        if node in values or is_cast(node) or source_of(node) is not None:
            continue  # produced by the kernel, or computed from what it produces
        for user in node.users:
            if user not in inside:
                kept = user.op == "output" and what == "RMSNorm" and last_dim(node) == 1  # a row's statistic
                training = "; a training graph keeps such values for its backward" if kept else ""
                return f"{describe(node)}, a value inside the {what}, is also read by {describe(user)}{training}"
    return None


def _assign(
    sites: list[RaisedSite],
    candidates: dict[fx.Node, list[tuple[Norm, str]]],
    reductions: Reductions,
    config: FusionConfig,
) -> None:
    """Give each norm to one site. A norm whose add has an all-reduce on either side is wanted by both: the site
    with fewer choices goes first, and among a site's norms the one that is read first, without an add before with."""
    taken: dict[fx.Node, fx.Node] = {}
    waiting = [site for site in sites if site.reason is None]
    for site in sorted(waiting, key=lambda site: len({norm.result for norm, _ in candidates[site.node]})):
        choices = sorted(candidates[site.node], key=lambda choice: (adds(choice[0]), choice[0].result))
        for norm, dialect in choices:
            if not any(node in taken for node in (norm.result, *norm.nodes)):
                site.norm = norm
                site.dialects += (dialect,)
                taken.update(dict.fromkeys(norm.nodes, site.node))
                break
        else:
            owner = next(taken[node] for node in choices[0][0].nodes if node in taken)
            both = [site, *(each for each in waiting if each.node is owner)]
            one = any(merges(each.hindrance, each.reduced, reductions) for each in both)  # type: ignore[arg-type]
            advice = "; FusionConfig(reassociate=True) all-reduces their sum at once" if one else ""
            advice = "" if config.reassociate else advice
            site.culprit = choices[0][0].result
            site.reason = f"the norm behind it, {describe(site.culprit)}, is fused with {describe(owner)}{advice}"


def adds(norm: Norm) -> int:
    """How many tensors are added in front of a norm."""
    return (norm.residual is not None) + (norm.addend is not None)


def _find_prologue(site: RaisedSite) -> None:
    """The MoE combination in front of an all-reduce, where nobody else reads its result."""
    assert site.reduced is not None and site.norm is not None
    if site.scatters:
        return
    if site.norm.residual is not None and is_spread(site.norm.residual, site.norm.operand):
        return  # a second bias is spread to the shape of what is reduced, which then must be there
    for dialect in DIALECTS:
        for prologue in dialect.prologues(site.reduced.x):
            if isinstance(prologue, Refused) or _read_inside((*prologue.nodes, site.node), {site.node}, "") is not None:
                continue
            rows = tensor_of(prologue.inputs.get("permuted_x"))
            if prologue.wraps and not isinstance(None if rows is None else rows.shape[0], int):
                continue  # a negative index would have to be wrapped by a symbolic number of rows
            if len(prologue.x.users) == 1:
                site.prologue = prologue
                site.dialects = (dialect.name, *site.dialects)
                return


def _find_quantiser(site: RaisedSite) -> None:
    """The first quantiser of a site's norm that can be fused, with those that compute the same; the others go on
    reading the norm."""
    assert site.norm is not None
    assert site.reduced is not None
    if site.quant is not None:
        return  # gathered behind a reduce-scatter
    if site.norm.norm is None:
        assert site.norm.quant is not None
        site.quant, site.reason = site.norm.quant, _unfit(site.norm.quant, site)
        return
    dtype = dtype_of(site.reduced.x)
    alike: dict[Hashable, list[tuple[Quantised, str]]] = {}
    codes: set[fx.Node] = set()
    for norm, value in [(each, value) for each in site.norms for value in row_views(each)]:
        for dialect in DIALECTS:
            for quant in dialect.quantisers(value):
                if isinstance(quant, Refused):
                    site.note = site.note or quant.reason
                elif not any(node.users for node in (quant.codes, quant.scales) if node is not None):
                    continue  # nobody reads it: a graph whose dead code nobody removed
                elif (unfit := _unfit(quant, site)) is not None:
                    site.note = site.note or unfit
                elif quant.codes not in codes:
                    codes.add(quant.codes)
                    views = path(norm, value)
                    quant = dataclasses.replace(quant, nodes=(*views, *quant.nodes))
                    if dtype == torch.float32 and quant.spec.unrounded:
                        spec = dataclasses.replace(quant.spec, unrounded=False)  # the same, and one kernel less
                        quant = dataclasses.replace(quant, spec=spec)
                    key = (quant.op, quant.spec, quant.scale, quant.scale_value, quant.scale_dtype)
                    alike.setdefault(key, []).append((quant, dialect.name))
    for quants in alike.values():
        first, dialect_name = quants[0]
        twins = _twins(first, [quant for quant, _ in quants[1:]])
        for group in ([first, *twins], [first]):
            reason = _fuse_quantisers(site, group)
            if reason is None:
                site.note = None
                site.dialects += (dialect_name,)
                return
            site.note = site.note or reason


def _unfit(quant: Quantised, site: RaisedSite) -> str | None:
    """The reason for which a quantiser has no place behind a site's norm."""
    dtype = dtype_of(site.reduced.x)  # type: ignore[union-attr]
    if quant.dtype not in (None, dtype):
        return f"{describe(quant.codes)} rounds to {quant.dtype}, the reduced is {dtype}"
    if quant.spec.group > 0 and not group_fits(quant.spec.group, dtype.itemsize):  # type: ignore[union-attr]
        return f"{describe(quant.codes)} quantises groups of {quant.spec.group}, a size that no kernel has for {dtype}"
    if quant.scale is not None and (cause := _computed_from(quant.scale, site)) is not None:
        return (
            f"the scale {describe(quant.scale)} is computed from {describe(cause)}, which the fused call would produce"
        )
    return None


def _computed_from(node: fx.Node, site: RaisedSite) -> fx.Node | None:
    """The value of a site's all-reduce or norm that ``node`` is computed from, or None."""
    own, seen, stack = set(site.nodes), set[fx.Node](), [node]
    while stack:
        current = stack.pop()
        if current in own:
            return current
        if current not in seen and not current < site.node:  # nothing before the all-reduce comes from it
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return None


def _fuse_quantisers(site: RaisedSite, quants: list[Quantised]) -> str | None:
    """Give a site quantisers that compute one thing; the reason if they cannot be fused."""
    assert site.norm is not None
    shape = site.rows.shape
    values: set[fx.Node | None] = {*site.norms}
    nodes: set[fx.Node] = set()
    for quant in quants:
        scales = tensor_of(quant.scales)
        if codes_layout(shape, quant.spec, tensor_of(quant.codes)) is None:  # type: ignore[arg-type]
            return f"{describe(quant.codes)} is no view of rows of codes"
        if scales is not None and scale_layout(shape, quant.spec, scales) is None:
            return f"{describe(quant.scales)} is no view of scales laid out as {quant.spec.layout.name}"  # type: ignore[arg-type]
        values |= {quant.codes, quant.scales}
        nodes.update(quant.nodes)
    for node in sorted(nodes, reverse=True):
        if node not in values and (is_cast(node) or source_of(node) is not None) and not nodes.issuperset(node.users):
            nodes.discard(node)  # others read it too: it stays, and reads what the kernel writes
    reason = _read_inside(tuple(sorted(nodes)), values, "quantiser")
    if reason is None:
        site.quant, *twins = (dataclasses.replace(q, nodes=tuple(n for n in q.nodes if n in nodes)) for q in quants)
        site.twins = tuple(twins)
    return reason


def _twins(first: Quantised, others: Iterable[Quantised]) -> list[Quantised]:
    """Those of ``others`` whose readers can have the outputs of ``first``. Of tensors that leave the graph each keeps
    memory of its own: whoever gets two of them may write to one."""
    twins = []
    taken = _returned(first)
    for other in others:
        returned = _returned(other)
        if taken.isdisjoint(returned) and _same_outputs(first, other):
            taken |= returned
            twins.append(other)
    return twins


def _returned(quant: Quantised) -> set[str]:
    """Which of a quantiser's outputs leave the graph."""
    held = {"codes": quant.codes, "scales": quant.scales}
    return {role for role, node in held.items() if node is not None and is_returned(node)}


def _same_outputs(a: Quantised, b: Quantised) -> bool:
    """Whether two quantisers' codes, and their scales where both have readers, have one shape, stride and dtype."""
    pairs = [(a.codes, b.codes)]
    if a.scales is not None and b.scales is not None:
        pairs.append((a.scales, b.scales))
    return all(same_shape(x, y) and dtype_of(x) == dtype_of(y) and _same_strides(x, y) for x, y in pairs)


def _same_strides(a: fx.Node, b: fx.Node) -> bool:
    strides = zip(tensor_of(a).stride(), tensor_of(b).stride(), strict=True)  # type: ignore[union-attr]
    return all(statically_known_true(x == y) for x, y in strides)


def is_spread(node: fx.Node, operand: fx.Node) -> bool:
    """Whether ``node`` holds one row, or one element, for sure, which is added to every row of ``operand``; a symbolic
    number of rows may be any."""
    return is_row(node, last_dim(operand)) and not same_size(node, operand)
