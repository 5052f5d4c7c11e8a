"""``all_reduce -> (fused_add_)rms_norm -> (quantiser)`` over the canonical ops, and what replaces it.

One class, parametrised by whether there is an add and by the quantiser; an instance is registered for each epsilon
and dtype that a graph holds. Every value of the chain is an output of the pattern, so that one pattern serves every
fan-out: the replacement allocates and computes only what is read outside the match.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._inductor.pattern_matcher import (
    MULTIPLE,
    CallFunction,
    GraphPatternEntry,
    KeywordArg,
    Match,
    MultiOutputPattern,
    PatternExpr,
    PatternMatcherPass,
)

from arfusion_pass import ir
from arfusion_pass.ops.schema import OUTPUT_NAMES

auto_functionalized = torch.ops.higher_order.auto_functionalized


PROLOGUES: dict[str, tuple[str, ...]] = {
    "moe_reduce": ("expert_x", "expert_scale", "token_input", "moe_flags"),
    "moe_finalize": ("permuted_x", "index", "expert_scale", "shared", "routed_scaling_factor", "moe_flags"),
}
"""Canonical MoE op to its arguments, in order; but for the flags they are the fused op's own names."""


class AllReduceRMSNormChain:
    """The chain that ends in the norm, or in ``quantiser`` behind it.

    Before and after, with an add and a static FP8 quantiser::

        reduced = all_reduce(x, group)                                    empties = torch.empty(...) for what is read
        norm, total = fused_add_rms_norm(reduced, residual, weight, ...)  out = auto_functionalized(
        codes = quant_fp8_static(norm, scale, ...)                            allreduce_rms_norm, x, residual, ...)

    Args:
        epsilon: of the norm, compared exactly (canonical, see ``config.canonical_epsilon``); 0 where a tensor holds it.
        dtype: of the norm's result, compared exactly.
        add: whether anything is added, or multiplied by, in front of the norm.
        quantiser: the quantiser behind the norm, or None.
        prologue: the canonical MoE op in front of the all-reduce (a key of ``PROLOGUES``), or None.
        launch_flags: the flags that the config adds to the fused call (strategy, backend, PDL).
    """

    def __init__(
        self,
        epsilon: float,
        dtype: torch.dtype,
        add: bool,
        quantiser: ir.Quantiser | None = None,
        prologue: str | None = None,
        launch_flags: int = 0,
    ) -> None:
        self.epsilon = epsilon
        self.dtype = dtype
        self.add = add
        self.quantiser = quantiser
        self.prologue = prologue
        self.launch_flags = launch_flags

    def name(self, weight_bias: float, adds: int, scaled: bool) -> str:
        """The pattern's name in reports, such as ``AllReduceFusedAddGemmaRMSNormStaticQuantFP8``."""
        return "".join(
            (
                {None: "", "moe_reduce": "MoEReduce", "moe_finalize": "MoEFinalize"}[self.prologue],
                "AllReduce",
                "Scaled" if scaled else "",
                {0: "", 1: "FusedAdd", 2: "FusedTwoAdds"}[adds],
                "Gemma" if weight_bias == 1.0 else "",
                "RMSNorm",
                "" if self.quantiser is None else self.quantiser.label,
            )
        )

    def pattern(self) -> PatternExpr:
        """The chain, its last op first; every value is an output."""
        x: PatternExpr = KeywordArg("x")
        if self.prologue is not None:
            x = call(getattr(ir.op, self.prologue).default, *map(KeywordArg, PROLOGUES[self.prologue]))
        reduced = self.reduction(x)
        if self.add:
            both = call(
                ir.op.fused_add_rms_norm.default,
                *(reduced, KeywordArg("residual"), KeywordArg("weight"), self.epsilon, self.dtype),
                *(KeywordArg("weight_bias"), KeywordArg("flags"), KeywordArg("residual_dtype")),
                *(KeywordArg("addend"), KeywordArg("epsilon_tensor"), KeywordArg("factor"), KeywordArg("factor_value")),
            )
            norm = call(operator.getitem, both, 0)
            values = [both, norm, call(operator.getitem, both, 1), reduced]
        else:
            norm = call(
                ir.op.rms_norm.default,
                *(reduced, KeywordArg("weight"), self.epsilon, self.dtype),
                *(KeywordArg("weight_bias"), KeywordArg("flags"), KeywordArg("epsilon_tensor")),
            )
            values = [norm, reduced]
        whole = self.gathered(norm)
        if whole is not norm:
            values.insert(0, whole)
        if self.quantiser is None:
            return MultiOutputPattern(values)
        names = ("scale", "scale_value", "quant") if self.quantiser.takes_scale else ("quant", "quant_bound")
        codes = call(self.quantiser.op, whole, *map(KeywordArg, names))
        if not self.quantiser.has_scales:
            return MultiOutputPattern([codes, *values])
        return MultiOutputPattern([codes, call(operator.getitem, codes, 0), call(operator.getitem, codes, 1), *values])

    @property
    def op_name(self) -> str:
        """The fused op."""
        return "_".join(filter(None, (self.prologue, "allreduce_rms_norm")))

    def reduction(self, x: PatternExpr) -> CallFunction:
        """The collective in front of the norm."""
        return call(ir.op.all_reduce.default, x, KeywordArg("group"))

    def gathered(self, norm: CallFunction) -> CallFunction:
        """What the quantiser and others read of the norm: itself, where nothing gathers it."""
        return norm

    def check(self, match: Match) -> bool:
        """Whether a match may be replaced. Dtypes and shapes were checked when the site was raised."""
        return True

    def replacement(
        self,
        match: Match,
        group: str,
        weight: fx.Node | None,
        weight_bias: float,
        flags: int,
        residual: fx.Node | None = None,
        residual_dtype: torch.dtype | None = None,
        scale: fx.Node | None = None,
        scale_value: float = 1.0,
        quant: int = 0,
        quant_bound: float = 0.0,
        moe_flags: int = 0,
        addend: fx.Node | None = None,
        epsilon_tensor: fx.Node | None = None,
        factor: fx.Node | None = None,
        factor_value: float = 1.0,
        **reduced_inputs: Any,
    ) -> None:
        """Replace the match by one fused call, with a buffer for each value that is read outside of it."""
        graph, matched = match.graph, set(match.nodes)
        read = {
            node.meta["role"]: node
            for node in matched
            if "role" in node.meta and any(user not in matched for user in node.users)
        }
        buffers: dict[str, fx.Node | None] = dict.fromkeys(OUTPUT_NAMES)
        outputs = ("quant_out", "scale_out") if self.quantiser and self.quantiser.has_scales else ("quant_out",)
        for role in [*read, *(outputs if self.quantiser else ())]:  # a quantiser writes all that it has, read or not
            buffers[role] = graph.call_function(torch.empty, ((0,),))  # its shape is known at commit
        scaled = factor is not None or factor_value != 1.0
        rare: dict[str, Any] = {"addend": addend, "epsilon_tensor": epsilon_tensor, "factor": factor}
        rare = {name: node for name, node in rare.items() if node is not None}
        if scaled and factor is None:
            rare["factor_value"] = factor_value
        fused = graph.call_function(
            auto_functionalized,
            (getattr(torch.ops.arfusion, self.op_name).default,),
            {
                **reduced_inputs,
                "residual": residual,
                "weight": weight,
                "scale": scale,
                "group_name": group,
                "epsilon": self.epsilon,
                "weight_bias": weight_bias,
                "flags": flags | moe_flags | self.launch_flags,
                "quant": quant,
                "quant_bound": quant_bound,
                "scale_value": scale_value,
                **rare,
                **buffers,
            },
        )
        adds = (residual is not None) + (addend is not None)
        fused.meta.update(site=next(iter(matched)).meta["site"], pattern=self.name(weight_bias, adds, scaled))
        for role, node in read.items():
            value = graph.call_function(operator.getitem, (fused, 1 + OUTPUT_NAMES.index(role)))
            value.meta["role"] = role
            node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in matched)
        match.erase_nodes()

    def register(self, patterns: PatternMatcherPass) -> None:
        """Add this chain to a pass."""
        entry = GraphPatternEntry(pattern=self.pattern(), extra_check=self.check, handler=self.replacement)
        entry.register(patterns)  # type: ignore[arg-type]


def call(target: Any, *args: Any) -> CallFunction:
    return CallFunction(target, *args, _users=MULTIPLE)
