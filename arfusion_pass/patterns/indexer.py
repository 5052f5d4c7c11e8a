"""DeepSeek's form: the norm is quantised in groups for the attention's projections, and a sparse-attention indexer
multiplies the unquantised norm as well.

    norm = rms_norm(all_reduce(x) + residual)
    codes, scales = quant_fp8_group(norm)           # for fp8 GEMMs
    index = norm @ indexer_weight                   # bf16 GEMM: the fused call writes the norm too
"""

from __future__ import annotations

import torch
from torch import fx
from torch._inductor.pattern_matcher import Match

from arfusion_pass.graph import PRODUCTS, VIEWS, is_call, is_cast
from arfusion_pass.patterns.chains import AllReduceRMSNormChain, auto_functionalized

aten = torch.ops.aten


class AllReduceRMSNormIndexerChain(AllReduceRMSNormChain):
    """The chain with a group quantiser whose norm a GEMM reads as well."""

    def name(self, weight_bias: float, adds: int, scaled: bool) -> str:
        """As the plain chain's, with ``WithIndexer`` behind it."""
        return super().name(weight_bias, adds, scaled) + "WithIndexer"

    def check(self, match: Match) -> bool:
        """Whether a GEMM outside the match reads the norm."""
        norm = next(node for node in match.nodes if node.meta.get("role") == "norm_out")
        return any(gemm_behind(reader) for reader in norm.meta["readers"]) and super().check(match)


def gemm_behind(reader: fx.Node) -> bool:
    """Whether ``reader``, or what follows it over views and casts, is a matrix multiplication."""
    stack = [reader]
    while stack:
        node = stack.pop()
        if is_gemm(node):
            return True
        if is_call(node, *VIEWS) or is_cast(node):
            stack.extend(node.users)
    return False


def is_gemm(node: fx.Node) -> bool:
    """Whether ``node`` multiplies matrices: one of aten's ops, or an opaque op with ``gemm`` in its name."""
    if node.op != "call_function":
        return False
    target = node.args[0] if node.target is auto_functionalized and node.args else node.target
    return node.target in PRODUCTS or (isinstance(target, torch._ops.OpOverload) and "gemm" in target._schema.name)
