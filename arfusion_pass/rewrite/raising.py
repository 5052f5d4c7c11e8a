"""Raise: from every all-reduce of a graph, name the stages that follow, or the reason why there are none.

The user's graph is only read; what is found goes into a shadow graph (:mod:`arfusion_pass.rewrite.shadow`). A
reduce-scatter whose norm is gathered again (:mod:`arfusion_pass.rewrite.gathering`) begins a site as well.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator

import torch
from torch import fx

from arfusion_pass.config import FusionConfig, canonical_epsilon
from arfusion_pass.dialects import DIALECTS, Norm, Reduced, Refused, Scattered, norms_of
from arfusion_pass.dialects.reading.operands import Product, is_row, products, sums, widens_beside
from arfusion_pass.graph import (
    as_many_rows,
    describe,
    dtype_of,
    last_dim,
    path,
    same_size,
    source_of,
    tensor_of,
    trains,
    users_of,
    views_of,
    views_of_all,
    widens,
    without_views,
)
from arfusion_pass.ops.spec import Flags
from arfusion_pass.rewrite import hindrances
from arfusion_pass.rewrite.edits import is_erased
from arfusion_pass.rewrite.gathering import gathering, uneven
from arfusion_pass.rewrite.hindrances import (
    Hindrance,
    Kind,
    Reductions,
    following,
    merges,
    sum_before,
)
from arfusion_pass.rewrite.no_norm import leads_to_norm, why_no_norm
from arfusion_pass.rewrite.quantising import find_quantiser, fuse_quantisers, why_unfit
from arfusion_pass.rewrite.raised import RaisedSite, read_inside
from arfusion_pass.rewrite.reductions import (
    check_reduced,
    in_its_own_dtype,
    in_its_own_order,
    in_whole_rows,
    row_lengths,
)

WAIT = torch.ops._c10d_functional.wait_tensor.default

COMPUTES = ("aten", "prims")
"""Namespaces of ops that are no collectives: nearly all of a graph's nodes, which no dialect is asked about."""


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
            site.hindrance = _in_front(site.reduced, candidates[site.node], reductions)
    _assign(sites, candidates, reductions, config)
    for site in sites:
        if site.reason is None and site.scatters:
            _gather(site, config)
    for site in sites:
        if site.reason is None:
            _find_prologue(site)
            if config.quantisers:
                find_quantiser(site)
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
    candidates = _norms(site, config, factors=False)  # a factor that can go before the all-reduce does
    if candidates:
        return _sum_behind(reduced, candidates, reductions)
    return hindrances.find_hindrance(reduced, reductions)[0] if site.reason is None else None


def _in_front(reduced: Reduced, candidates: list[tuple[Norm, str]], reductions: Reductions) -> Hindrance | None:
    """What could move out of the way though norms are found: a factor of each, or a sum of two all-reduces."""
    if all(is_scaled(norm) for norm, _ in candidates):
        return hindrances.find_hindrance(reduced, reductions)[0]
    return _sum_behind(reduced, candidates, reductions)


def _sum_behind(reduced: Reduced, candidates: list[tuple[Norm, str]], reductions: Reductions) -> Hindrance | None:
    """The sum of two all-reduces that could be one, where norms are found behind one of them."""
    norms = [norm for norm, _ in candidates]
    if all(_adds_reduced(norm, reductions) for norm in norms):  # as well as the addend's own site
        found, _ = hindrances.find_hindrance(reduced, reductions)
        if merges(found, reduced, reductions):
            return found
    return next(filter(None, (sum_before(norm, reduced, reductions) for norm in norms)), None)


def _concerns_norm(site: RaisedSite, candidates: dict[fx.Node, list[tuple[Norm, str]]], reductions: Reductions) -> bool:
    """Whether a norm stands behind a reduce-scatter, whatever speaks against either."""
    if site.node in candidates and (candidates[site.node] or site.reason is not None):
        return True
    return leads_to_norm(site.reduced or _as_if_by_sum(site.node), reductions)


def _as_if_by_sum(node: fx.Node) -> Reduced:
    """A collective that no dialect takes, as one by sum: only to look behind it."""
    values = [node]
    for value in values:
        values += users_of(value, WAIT, operator.getitem)
    return Reduced(node, node, node.all_input_nodes[0], "", (), tuple(values[1:]))


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
    if node.op != "call_function" or getattr(node.target, "namespace", None) in COMPUTES or is_erased(node):
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
        site.reason = why_unfit(site.quant, site) or fuse_quantisers(site, [site.quant])


def _norms(site: RaisedSite, config: FusionConfig, factors: bool = True) -> list[tuple[Norm, str]]:
    """The norms that could be fused behind a site, best first, ``factors`` in front of them or not. With none, the site
    gets the reason against one that it has; a site that has none at all keeps None."""
    assert site.reduced is not None
    usable: list[tuple[Norm, str]] = []
    reasons: list[tuple[str, fx.Node | None]] = []
    reason: str | None
    lengths = row_lengths(site.reduced.x)
    for held, value in views_of_all(site.reduced.values):
        if not _is_computed_with(value):
            continue
        behind = _norms_behind_factor(value) if factors else ()
        for found, dialect in (*norms_of(value), *_norms_behind_addend(value), *behind):
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


def _norms_behind_factor(value: fx.Node) -> Iterator[tuple[Norm, str]]:
    """The norms of a product, ``value * f``, of sums with it, and of ``(value + t) * f``: each step in the tensor's
    dtype."""
    for product in products(value):
        for view in filter(_is_computed_with, views_of(product.node)):
            for found, dialect in (*norms_of(view), *_norms_behind_addend(view)):
                if isinstance(found, Norm):
                    yield _scaled(found, value, product, (), view), dialect
    for inner in sums(value):
        add, addend = inner.start, inner.residual
        if dtype_of(add) != dtype_of(value) or dtype_of(addend) != dtype_of(value) or following(add) is None:
            continue
        for operand in filter(_is_computed_with, views_of(add)):
            for product in products(operand):
                for view in filter(_is_computed_with, views_of(product.node)):
                    for found, dialect in norms_of(view):
                        if isinstance(found, Norm):
                            norm = _scaled(found, value, product, (*inner.nodes, *path(add, operand)), view)
                            flags = norm.flags | (Flags.ADDEND_SCALED if is_scaled(norm) else Flags.NONE)
                            yield dataclasses.replace(norm, addend=addend, flags=flags), dialect


def _scaled(norm: Norm, value: fx.Node, product: Product, before: tuple[fx.Node, ...], view: fx.Node) -> Norm:
    """The norm of ``view``, a view of a product, as one of ``value``; ``before`` lie between that and the product. With
    nothing added the product is the sum that others may read."""
    return dataclasses.replace(
        norm,
        operand=value,
        nodes=(*before, *product.nodes, *path(product.node, view), *norm.nodes),
        total=norm.total if adds(norm) else product.node,
        factor=product.factor,
    )


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
        return f"{describe(norm.norm)} normalises rows of {last_dim(norm.norm)}, the reduced ones have {hidden}"
    for node in (norm.norm, norm.total):
        if node is not None and not as_many_rows(node, norm.operand):
            return f"{describe(node)} is not known to have as many rows as {describe(norm.operand)}"
    if norm.addend is not None and dtype_of(norm.addend) != dtype:
        return f"the addend {describe(norm.addend)} is {dtype_of(norm.addend)}; expected {dtype}"
    if isinstance(norm.factor, fx.Node) and dtype_of(norm.factor) not in (dtype, torch.float32):
        return f"the factor {describe(norm.factor)} is {dtype_of(norm.factor)}; expected {dtype} or float32"
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
        return read_inside(norm.nodes, _values(reduced, norm), "RMSNorm")
    if not math.isfinite(canonical_epsilon(norm.epsilon)) or norm.epsilon < 0:
        return f"epsilon {norm.epsilon} is no finite float32 >= 0"
    if config.epsilons is not None and canonical_epsilon(norm.epsilon) not in config.epsilons:
        return f"epsilon {norm.epsilon} is not among the epsilons of FusionConfig ({config.epsilons})"
    return read_inside(norm.nodes, _values(reduced, norm), "RMSNorm")


def _values(reduced: Reduced, norm: Norm) -> set[fx.Node | None]:
    """What the fused call of a norm can write."""
    values = {*reduced.values, norm.norm, norm.total}
    return values if norm.quant is None else values | {norm.quant.codes, norm.quant.scales}


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
    for site in sorted(waiting, key=lambda site: _choice(candidates[site.node])):
        choices = sorted(candidates[site.node], key=lambda choice: (_steps(choice[0]), choice[0].result))
        for norm, dialect in choices:
            if not any(node in taken for node in (norm.result, *norm.nodes)):
                site.norm = norm
                site.dialects += (dialect,)
                taken.update(dict.fromkeys(norm.nodes, site.node))
                break
        else:
            owner = next(taken[node] for node in choices[0][0].nodes if node in taken)
            both = [site, *(each for each in waiting if each.node is owner)]
            one = any(_merges(each, reductions) for each in both)
            advice = "; FusionConfig(reassociate=True) all-reduces their sum at once" if one else ""
            advice = "" if config.reassociate else advice
            site.culprit = choices[0][0].result
            site.reason = f"the norm behind it, {describe(site.culprit)}, is fused with {describe(owner)}{advice}"


def _choice(candidates: list[tuple[Norm, str]]) -> tuple[int, bool]:
    """By what a site goes before another: how many norms it has to choose from, then whether all are behind factors."""
    return len({norm.result for norm, _ in candidates}), all(is_scaled(norm) for norm, _ in candidates)


def _merges(site: RaisedSite, reductions: Reductions) -> bool:
    """Whether moving what hinders a site ends in one all-reduce for two: a factor in front of their sum included."""
    assert site.reduced is not None
    factor = site.hindrance is not None and site.hindrance.kind == Kind.SCALE
    return factor or merges(site.hindrance, site.reduced, reductions)


def is_scaled(norm: Norm) -> bool:
    """Whether a factor stands in front of a norm."""
    return isinstance(norm.factor, fx.Node) or norm.factor != 1.0


def adds(norm: Norm) -> int:
    """How many tensors are added in front of a norm."""
    return (norm.residual is not None) + (norm.addend is not None)


def _steps(norm: Norm) -> int:
    """How many tensors are added, or multiplied by, in front of a norm."""
    return adds(norm) + is_scaled(norm)


def _find_prologue(site: RaisedSite) -> None:
    """The MoE combination in front of an all-reduce, where nobody else reads its result."""
    assert site.reduced is not None and site.norm is not None
    if site.scatters:
        return
    if site.norm.residual is not None and is_spread(site.norm.residual, site.norm.operand):
        return  # a second bias is spread to the shape of what is reduced, which then must be there
    for dialect in DIALECTS:
        for prologue in dialect.prologues(site.reduced.x):
            if isinstance(prologue, Refused) or read_inside((*prologue.nodes, site.node), {site.node}, "") is not None:
                continue
            rows = tensor_of(prologue.inputs.get("permuted_x"))
            if prologue.wraps and not isinstance(None if rows is None else rows.shape[0], int):
                continue  # a negative index would have to be wrapped by a symbolic number of rows
            if len(prologue.x.users) == 1:
                site.prologue = prologue
                site.dialects = (dialect.name, *site.dialects)
                return


def is_spread(node: fx.Node, operand: fx.Node) -> bool:
    """Whether ``node`` holds one row, or one element, for sure, which is added to every row of ``operand``; a symbolic
    number of rows may be any."""
    return is_row(node, last_dim(operand)) and not same_size(node, operand)
