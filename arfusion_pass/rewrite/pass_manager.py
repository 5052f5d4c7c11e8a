"""Registers pattern classes for what a graph holds, and applies them to its shadow graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx
from torch._inductor.pattern_matcher import PatternMatcherPass

from arfusion_pass import ir
from arfusion_pass.config import FusionConfig
from arfusion_pass.ops.spec import Flags
from arfusion_pass.patterns.chains import PROLOGUES, AllReduceRMSNormChain, auto_functionalized
from arfusion_pass.patterns.indexer import AllReduceRMSNormIndexerChain
from arfusion_pass.patterns.scattered import ReduceScatterRMSNormAllGatherChain
from arfusion_pass.rewrite.shadow import Shadow


def fuse_shadow(shadow: Shadow, config: FusionConfig) -> list[fx.Node]:
    """Fuse a shadow graph in place; gives the fused calls in site order.

    Patterns are registered for the chains alone that the graph can hold, each with its epsilon and dtype.

    Args:
        config: its strategy, backend and PDL settings become flags of every fused call.
    """
    patterns = PatternMatcherPass(pass_name="arfusion")
    for chain in _chains(shadow.graph, config):
        chain.register(patterns)
    patterns.apply(shadow.module)
    fused = shadow.graph.find_nodes(op="call_function", target=auto_functionalized)
    return sorted(fused, key=lambda node: node.meta["site"])


def _chains(graph: fx.Graph, config: FusionConfig) -> Iterator[AllReduceRMSNormChain]:
    """A chain for each combination of (epsilon, dtype, add, quantiser, prologue) in the graph, longest first."""
    norms = {ir.op.rms_norm.default: False, ir.op.fused_add_rms_norm.default: True}
    quantisers = {quantiser.op: quantiser for quantiser in ir.QUANTISERS.values()}
    prologues = {getattr(ir.op, name).default: name for name in PROLOGUES}
    held: dict[tuple[Any, ...], None] = {}
    for node in graph.nodes:
        if node.target in norms:
            add = norms[node.target]
            epsilon, dtype = node.args[3 if add else 2], node.args[4 if add else 3]
            prologue = prologues.get(getattr(node.args[0].args[0], "target", None))
            scatters = node.args[0].target is ir.op.reduce_scatter.default
            chain = ReduceScatterRMSNormAllGatherChain if scatters else AllReduceRMSNormChain
            held[chain, epsilon, dtype, add, None, prologue] = None
            readers = [*node.users, *(user for value in node.users for user in value.users)]
            if scatters:  # the quantiser reads what is gathered
                readers += [user for reader in readers for user in reader.users]
            for reader in readers:
                if reader.target in quantisers:
                    quantiser = quantisers[reader.target]
                    held[chain, epsilon, dtype, add, quantiser, prologue] = None
                    if quantiser.name == "quant_fp8_group" and not scatters and reader.args[0].meta["readers"]:
                        held[AllReduceRMSNormIndexerChain, epsilon, dtype, add, quantiser, prologue] = None
    longest = sorted(held, key=lambda key: ((key[4] is None) + (key[5] is None), key[0] is AllReduceRMSNormChain))
    for chain, epsilon, dtype, add, quantiser, prologue in longest:
        yield chain(epsilon, dtype, add, quantiser, prologue, launch_flags(config))


def launch_flags(config: FusionConfig) -> int:
    """The flags by which a config says how a fused call runs; 0 for the defaults."""
    flags = Flags.NONE
    if config.strategy != "auto":
        flags |= {"oneshot": Flags.ONESHOT, "twoshot": Flags.TWOSHOT, "sharded": Flags.SHARDED}[config.strategy]
    if config.backend in ("reference", "flashinfer"):
        flags |= Flags.REFERENCE if config.backend == "reference" else Flags.FLASHINFER
    if not config.pdl:
        flags |= Flags.NO_PDL
    return int(flags)
