"""Registers pattern classes for what a graph holds, applies them to its shadow graph and counts their matches."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import torch
from torch import fx
from torch._inductor.pattern_matcher import PatternMatcherPass

from arfusion_pass import ir
from arfusion_pass.config import FusionConfig
from arfusion_pass.ops.spec import Flags
from arfusion_pass.patterns.chains import AllReduceRMSNormChain, auto_functionalized
from arfusion_pass.patterns.indexer import AllReduceRMSNormIndexerChain
from arfusion_pass.raising import Shadow

Chain = tuple[type[AllReduceRMSNormChain], float, torch.dtype, bool, "ir.Quantiser | None"]
"""A pattern class and what it is made with."""


class FusionPassManager:
    """One graph's patterns: registered lazily, per epsilon and dtype, only for chains that the graph can hold.

    Args:
        config: its strategy, backend and PDL settings become flags of every fused call.
    """

    def __init__(self, config: FusionConfig) -> None:
        self.config = config
        self.patterns = PatternMatcherPass(pass_name="arfusion")
        self.registered: list[AllReduceRMSNormChain] = []
        self.matches: collections.Counter[str] = collections.Counter()

    def apply(self, shadow: Shadow) -> list[fx.Node]:
        """Fuse the shadow graph in place; gives the fused calls in site order."""
        for chain in self._chains(shadow.graph):
            chain.register(self.patterns)
            self.registered.append(chain)
        self.patterns.apply(shadow.module)
        fused = shadow.graph.find_nodes(op="call_function", target=auto_functionalized)
        self.matches.update(node.meta["pattern"] for node in fused)
        return sorted(fused, key=lambda node: node.meta["site"])

    def _chains(self, graph: fx.Graph) -> Iterator[AllReduceRMSNormChain]:
        """A chain for each combination of (epsilon, dtype, add, quantiser) in the graph, longest chains first."""
        norms = {ir.ops.rms_norm.default: False, ir.ops.fused_add_rms_norm.default: True}
        quantisers = {quantiser.op: quantiser for quantiser in ir.QUANTISERS.values()}
        held: dict[Chain, None] = {}  # a set that keeps the graph's order
        for node in graph.nodes:
            if node.target in norms:
                held[self._chain(node, norms[node.target], None, AllReduceRMSNormChain)] = None
            elif node.target in quantisers:
                value = node.args[0]
                norm = value if value.target in norms else value.args[0]
                kinds: list[type[AllReduceRMSNormChain]] = [AllReduceRMSNormChain]
                if node.target is ir.ops.quant_fp8_group.default and value.meta["readers"]:
                    kinds.append(AllReduceRMSNormIndexerChain)
                held.update(dict.fromkeys(self._chain(norm, norms[norm.target], quantisers[node.target], kind) for kind in kinds))
        longest_first = sorted(held, key=lambda chain: (chain[-1] is None, chain[0] is AllReduceRMSNormChain))
        for kind, epsilon, dtype, add, quantiser in longest_first:
            yield kind(epsilon, dtype, add, quantiser, launch_flags(self.config))

    def _chain(
        self, norm: fx.Node, add: bool, quantiser: ir.Quantiser | None, kind: type[AllReduceRMSNormChain]
    ) -> Chain:
        epsilon, dtype = norm.args[3 if add else 2], norm.args[4 if add else 3]
        return kind, epsilon, dtype, add, quantiser  # type: ignore[return-value]


def launch_flags(config: FusionConfig) -> int:
    """The flags by which a config says how a fused call runs; 0 for the defaults."""
    flags = Flags.NONE
    if config.strategy != "auto":
        flags |= Flags.ONESHOT if config.strategy == "oneshot" else Flags.TWOSHOT
    if config.backend in ("reference", "flashinfer"):
        flags |= Flags.REFERENCE if config.backend == "reference" else Flags.FLASHINFER
    if not config.pdl:
        flags |= Flags.NO_PDL
    return int(flags)
