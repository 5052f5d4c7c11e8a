"""The shadow graph: what was recognised of a user's graph, as canonical IR nodes that the patterns match.

Placeholders stand for the values that a site takes from the user's graph (``meta["origin"]``), outputs are the values
that somebody outside the site reads::

    %x = placeholder; %residual = placeholder; %weight = placeholder
    %reduced = arfusion_ir.all_reduce(%x, "0")
    %both    = arfusion_ir.fused_add_rms_norm(%reduced, %residual, %weight, 1e-06, bfloat16, 0.0, 0, bfloat16)
    %norm    = getitem(%both, 0); %total = getitem(%both, 1)
    %codes   = arfusion_ir.quant_fp8_static(%norm, %scale, 1.0, quant)
    %kept = keep(%total, %codes); return (%kept,)
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable

import torch
from torch import fx

from arfusion_pass import ir
from arfusion_pass.config import canonical_epsilon
from arfusion_pass.dialects import Prologue
from arfusion_pass.dialects.reading.operands import widens_beside
from arfusion_pass.graph import dtype_of, last_dim, tensor_of
from arfusion_pass.rewrite.raised import RaisedSite
from arfusion_pass.rewrite.raising import adds, is_spread


@dataclasses.dataclass
class Shadow:
    """The shadow graph and the sites behind its nodes (a node's ``meta["site"]`` is an index into ``sites``)."""

    module: fx.GraphModule
    sites: list[RaisedSite]

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph


def build_shadow(sites: list[RaisedSite]) -> Shadow:
    """The shadow graph of the sites that have no reason against them."""
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())  # while it is empty: no code is generated of the nodes
    graph = module.graph
    origins: dict[fx.Node, fx.Node] = {}
    kept: list[fx.Node] = []
    for site in sites:
        if site.reason is not None:
            continue
        for node in site.inputs.values():
            if node not in origins:
                origins[node] = graph.placeholder(node.name)
                origins[node].meta["origin"] = node
    for index, site in enumerate(sites):
        if site.reason is None:
            live = _raise_site(graph, site, index, origins)
            kept.append(graph.call_function(keep, tuple(live)))
    graph.output(tuple(kept))
    return Shadow(module, sites)


def keep(*values: object) -> tuple[object, ...]:
    """What reads a site's values in a shadow graph. One node a site: were the graph's output the reader of all, each
    value that is replaced would write the arguments of one long call anew."""
    return values


def _spread_row(graph: fx.Graph, node: fx.Node, row: fx.Node, hidden: int) -> fx.Node:
    """``row``, which stands for ``node``, as ``[H]``: one element is repeated."""
    if tensor_of(node).shape == (hidden,):  # type: ignore[union-attr]
        return row
    row = graph.call_function(torch.ops.aten.reshape.default, (row, [-1]))
    if tensor_of(node).numel() == 1 != hidden:  # type: ignore[union-attr]
        row = graph.call_function(torch.ops.aten.repeat.default, (row, [hidden]))
    return row


def _raise_site(graph: fx.Graph, site: RaisedSite, index: int, origins: dict[fx.Node, fx.Node]) -> Iterable[fx.Node]:
    """Write one site's IR nodes; gives the values that are read outside of it."""
    assert site.reduced is not None and site.norm is not None
    norm, values = site.norm, {}

    def call(target: object, *args: object) -> fx.Node:
        node = graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta["site"] = index
        return node

    dtype, epsilon, epsilon_tensor = dtype_of(norm.norm or site.reduced.x), 0.0, None
    if isinstance(norm.epsilon, fx.Node):
        epsilon_tensor = _epsilon_tensor(graph, norm.epsilon, site.reduced.x, origins)
    else:
        epsilon = canonical_epsilon(norm.epsilon)

    def operand(node: fx.Node) -> fx.Node:
        given = origins[node]
        if widens_beside(node, dtype_of(site.reduced.x)):  # type: ignore[union-attr]
            given = graph.call_function(torch.ops.prims.convert_element_type.default, (given, torch.float32))
        return given

    weight = None if norm.weight is None else operand(norm.weight)
    if site.prologue is not None:
        x = call(getattr(ir.op, site.prologue.op).default, *_prologue_arguments(graph, site.prologue, origins))
    else:
        x = origins[site.reduced.x]
        if last_dim(site.reduced.x) != (hidden := last_dim(norm.operand)):
            x = graph.call_function(torch.ops.aten.view.default, (x, [-1, hidden]))
    block: object = 0
    if site.gathered is not None and site.gathered.rows.block is not None:
        block = site.gathered.rows.block
        block = origins[block] if isinstance(block, fx.Node) else block
    if site.scatters:
        reduced = call(ir.op.reduce_scatter.default, x, site.reduced.group, block)
    else:
        reduced = call(ir.op.all_reduce.default, x, site.reduced.group)
    values["allreduce_out"] = reduced
    rounding = (dtype, norm.weight_bias, int(norm.flags))
    if not adds(norm):
        norm_value = call(ir.op.rms_norm.default, reduced, weight, epsilon, *rounding, epsilon_tensor)
    else:
        residual = addend = None
        hidden = last_dim(norm.operand)
        assert hidden is not None
        if norm.residual is not None:
            residual = operand(norm.residual)
            if is_spread(norm.residual, norm.operand):  # a second bias, as a tensor of its own
                residual = _spread_row(graph, norm.residual, residual, hidden)
                residual = graph.call_function(torch.ops.aten.copy.default, (x, residual))
        if norm.addend is not None:
            addend = origins[norm.addend]
            if is_spread(norm.addend, norm.operand):
                addend = _spread_row(graph, norm.addend, addend, hidden)
        both = call(
            ir.op.fused_add_rms_norm.default,
            *(reduced, residual, weight, epsilon, *rounding, dtype_of(norm.total), addend, epsilon_tensor),
        )
        norm_value = call(operator.getitem, both, 0)
        values["residual_out"] = call(operator.getitem, both, 1)
    if site.scatters:
        norm_value = call(ir.op.all_gather.default, norm_value, site.reduced.group, block)
    values["norm_out"] = norm_value
    if site.quant is not None:
        quantiser = ir.QUANTISERS[site.quant.op]
        scale = None if site.quant.scale is None else origins[site.quant.scale]
        if scale is not None and site.quant.scale_dtype is not None:
            scale = graph.call_function(torch.ops.prims.convert_element_type.default, (scale, site.quant.scale_dtype))
        codes = call(quantiser.op, *quantiser.arguments(norm_value, site.quant.spec, scale, site.quant.scale_value))
        if quantiser.has_scales:
            values["scale_out"] = call(operator.getitem, codes, 1)
            codes = call(operator.getitem, codes, 0)
        values["quant_out"] = codes
    live = []
    outside = site.outside_readers
    for role, node in values.items():
        node.meta["role"] = role
        node.meta["readers"] = outside.get(role, [])
        if node.meta["readers"]:
            live.append(node)
    return live


def _epsilon_tensor(graph: fx.Graph, epsilon: fx.Node, x: fx.Node, origins: dict[fx.Node, fx.Node]) -> fx.Node:
    """An epsilon that is no number, as one element on the device of ``x``. A SymFloat, and a tensor on the CPU beside a
    GPU's, are rounded to fp32 in a node that all sites of the graph share (``once``)."""
    given, tensor, device = origins[epsilon], tensor_of(epsilon), tensor_of(x).device  # type: ignore[union-attr]
    if tensor is not None and tensor.device == device:
        return given
    if (made := given.meta.get("epsilon_tensor")) is None:
        options = {"dtype": torch.float32, "device": device}
        value = given if tensor is None else 1.0
        made = graph.call_function(torch.ops.aten.full.default, ([1], value), options)
        if tensor is not None:
            made = graph.call_function(torch.ops.aten.mul.Tensor, (made, given))
        made.meta["once"] = True
        given.meta["epsilon_tensor"] = made
    return made


def _prologue_arguments(graph: fx.Graph, prologue: Prologue, origins: dict[fx.Node, fx.Node]) -> tuple[object, ...]:
    """The canonical MoE op's arguments; an index as int32 without torch's wrap-around, an expert scale as the op's."""

    def given(role: str) -> fx.Node | None:
        node = prologue.inputs.get(role)
        return None if node is None else origins[node]

    def as_dtype(role: str, dtype: torch.dtype) -> fx.Node | None:
        node = given(role)
        if node is None or dtype_of(prologue.inputs[role]) == dtype:
            return node
        return graph.call_function(torch.ops.prims.convert_element_type.default, (node, dtype))

    if prologue.op == "moe_reduce":
        scale = as_dtype("expert_scale", torch.float32)
        return (given("expert_x"), scale, given("token_input"), int(prologue.flags))
    given_index = index = as_dtype("index", torch.int32)
    if prologue.wraps:
        rows = tensor_of(prologue.inputs["permuted_x"]).shape[0]  # type: ignore[union-attr]
        index = graph.call_function(torch.ops.aten.remainder.Scalar, (index, rows))
    elif prologue.sentinel:
        index = graph.call_function(torch.ops.aten.clamp_min.default, (index, 0))
    if prologue.sentinel:
        some = graph.call_function(torch.ops.aten.ne.Scalar, (given_index, -1))
        index = graph.call_function(torch.ops.aten.where.ScalarOther, (some, index, -1))
    scale, shared = given("expert_scale"), given("shared")
    return (given("permuted_x"), index, scale, shared, prologue.routed_scaling_factor, int(prologue.flags))
