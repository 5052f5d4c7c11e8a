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

import torch
from torch import fx

from arfusion_pass import ir
from arfusion_pass.config import canonical_epsilon
from arfusion_pass.dialects import Prologue, Quantised
from arfusion_pass.dialects.reading.operands import widens_beside
from arfusion_pass.graph import aten, dtype_of, last_dim, prims, tensor_of
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
            kept.append(graph.call_function(keep, tuple(_Site(graph, site, index, origins).write())))
    graph.output(tuple(kept))
    return Shadow(module, sites)


def keep(*values: object) -> tuple[object, ...]:
    """What reads a site's values in a shadow graph. One node a site: were the graph's output the reader of all, each
    value that is replaced would write the arguments of one long call anew."""
    return values


class _Site:
    """Writes the IR nodes of one site, stage after stage.

    Attributes:
        graph: the shadow graph.
        site, index: the site, and what its nodes know it by.
        origins: the shadow graph's placeholders, by the nodes of the user's graph that they stand for.
    """

    def __init__(self, graph: fx.Graph, site: RaisedSite, index: int, origins: dict[fx.Node, fx.Node]) -> None:
        assert site.reduced is not None and site.norm is not None
        self.graph, self.site, self.index, self.origins = graph, site, index, origins
        self.reduced, self.norm = site.reduced, site.norm

    def write(self) -> list[fx.Node]:
        """All stages; gives the values that are read outside of the site."""
        values: dict[str, fx.Node] = {}
        block: object = 0
        if self.site.gathered is not None and self.site.gathered.rows.block is not None:
            block = self.site.gathered.rows.block
            block = self.origins[block] if isinstance(block, fx.Node) else block
        x = self._x()
        if self.site.scatters:
            reduced = self._call(ir.op.reduce_scatter.default, x, self.reduced.group, block)
        else:
            reduced = self._call(ir.op.all_reduce.default, x, self.reduced.group)
        values["allreduce_out"] = reduced
        if adds(self.norm) or self.norm.total is not None:
            values["norm_out"], values["residual_out"] = self._added_and_normed(reduced, x)
        else:
            values["norm_out"] = self._normed(reduced)
        if self.site.scatters:
            gather = ir.op.all_gather.default
            values["norm_out"] = self._call(gather, values["norm_out"], self.reduced.group, block)
        if self.site.quant is not None:
            values |= self._quantised(self.site.quant, values["norm_out"])
        outside = self.site.outside_readers
        for role, node in values.items():
            node.meta.update(role=role, readers=outside.get(role, []))
        return [node for node in values.values() if node.meta["readers"]]

    def _call(self, target: object, *args: object) -> fx.Node:
        node = self.graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta["site"] = self.index
        return node

    def _x(self) -> fx.Node:
        """What is reduced: a prologue's result, or an input as rows of the norm's size."""
        if (prologue := self.site.prologue) is not None:
            arguments = _prologue_arguments(self.graph, prologue, self.origins)
            return self._call(getattr(ir.op, prologue.op).default, *arguments)
        x = self.origins[self.reduced.x]
        if last_dim(self.reduced.x) == (hidden := last_dim(self.norm.operand)):
            return x
        return self.graph.call_function(aten.view.default, (x, [-1, hidden]))

    def _normed(self, reduced: fx.Node) -> fx.Node:
        epsilon, epsilon_tensor = self._epsilon()
        arguments = (self._weight(), epsilon, *self._rounding(), epsilon_tensor)
        return self._call(ir.op.rms_norm.default, reduced, *arguments)

    def _added_and_normed(self, reduced: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The norm, and the sum that it is of."""
        norm, residual, addend = self.norm, None, None
        if norm.residual is not None:
            residual = self._operand(norm.residual)
            if is_spread(norm.residual, norm.operand):  # a second bias, as a tensor of its own
                residual = self.graph.call_function(aten.copy.default, (x, self._row(norm.residual, residual)))
        if norm.addend is not None:
            addend = self.origins[norm.addend]
            if is_spread(norm.addend, norm.operand):
                addend = self._row(norm.addend, addend)
        in_memory = isinstance(norm.factor, fx.Node)
        factor = self.origins[norm.factor] if isinstance(norm.factor, fx.Node) else None
        epsilon, epsilon_tensor = self._epsilon()
        both = self._call(
            ir.op.fused_add_rms_norm.default,
            *(reduced, residual, self._weight(), epsilon, *self._rounding()),
            *(dtype_of(norm.total), addend, epsilon_tensor, factor, 1.0 if in_memory else norm.factor),
        )
        return self._call(operator.getitem, both, 0), self._call(operator.getitem, both, 1)

    def _quantised(self, quant: Quantised, norm: fx.Node) -> dict[str, fx.Node]:
        """The codes, and the scales where the quantiser gives some, by role."""
        quantiser = ir.QUANTISERS[quant.op]
        scale = None if quant.scale is None else self.origins[quant.scale]
        if scale is not None and quant.scale_dtype is not None:
            scale = self.graph.call_function(prims.convert_element_type.default, (scale, quant.scale_dtype))
        codes = self._call(quantiser.op, *quantiser.arguments(norm, quant.spec, scale, quant.scale_value))
        if not quantiser.has_scales:
            return {"quant_out": codes}
        scales = self._call(operator.getitem, codes, 1)
        return {"scale_out": scales, "quant_out": self._call(operator.getitem, codes, 0)}

    def _rounding(self) -> tuple[object, ...]:
        """Dtype, weight bias and flags of the norm."""
        norm = self.norm
        return dtype_of(norm.norm or self.reduced.x), norm.weight_bias, int(norm.flags)

    def _epsilon(self) -> tuple[float, fx.Node | None]:
        """As a number, or as one element, with 0 for the number."""
        epsilon = self.norm.epsilon
        if isinstance(epsilon, fx.Node):
            return 0.0, _epsilon_tensor(self.graph, epsilon, self.reduced.x, self.origins)
        return canonical_epsilon(epsilon), None

    def _weight(self) -> fx.Node | None:
        return None if self.norm.weight is None else self._operand(self.norm.weight)

    def _operand(self, node: fx.Node) -> fx.Node:
        """An input beside the rows, widened where torch does that in the op itself."""
        given = self.origins[node]
        if widens_beside(node, dtype_of(self.reduced.x)):
            given = self.graph.call_function(prims.convert_element_type.default, (given, torch.float32))
        return given

    def _row(self, node: fx.Node, row: fx.Node) -> fx.Node:
        """``row``, which stands for ``node``, as ``[H]``: one element is repeated."""
        hidden, tensor = last_dim(self.norm.operand), tensor_of(node)
        assert tensor is not None
        if tensor.shape == (hidden,):
            return row
        row = self.graph.call_function(aten.reshape.default, (row, [-1]))
        return self.graph.call_function(aten.repeat.default, (row, [hidden])) if tensor.numel() == 1 != hidden else row


def _epsilon_tensor(graph: fx.Graph, epsilon: fx.Node, x: fx.Node, origins: dict[fx.Node, fx.Node]) -> fx.Node:
    """An epsilon that is no number, as one element on the device of ``x``. A SymFloat, and a tensor on the CPU beside a
    GPU's, are rounded to fp32 in a node that all sites of the graph share (``once``)."""
    given, tensor, device = origins[epsilon], tensor_of(epsilon), tensor_of(x).device  # type: ignore[union-attr]
    if tensor is not None and tensor.device == device:
        return given
    if (made := given.meta.get("epsilon_tensor")) is None:
        options = {"dtype": torch.float32, "device": device}
        value = given if tensor is None else 1.0
        made = graph.call_function(aten.full.default, ([1], value), options)
        if tensor is not None:
            made = graph.call_function(aten.mul.Tensor, (made, given))
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
        return graph.call_function(prims.convert_element_type.default, (node, dtype))

    if prologue.op == "moe_reduce":
        scale = as_dtype("expert_scale", torch.float32)
        return (given("expert_x"), scale, given("token_input"), int(prologue.flags))
    given_index = index = as_dtype("index", torch.int32)
    if prologue.wraps:
        rows = tensor_of(prologue.inputs["permuted_x"]).shape[0]  # type: ignore[union-attr]
        index = graph.call_function(aten.remainder.Scalar, (index, rows))
    elif prologue.sentinel:
        index = graph.call_function(aten.clamp_min.default, (index, 0))
    if prologue.sentinel:
        some = graph.call_function(aten.ne.Scalar, (given_index, -1))
        index = graph.call_function(aten.where.ScalarOther, (some, index, -1))
    scale, shared = given("expert_scale"), given("shared")
    return (given("permuted_x"), index, scale, shared, prologue.routed_scaling_factor, int(prologue.flags))
