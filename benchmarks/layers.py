"""A decoder layer's GEMMs as a chain, with a place for an all-reduce site behind o_proj and behind down_proj.

Each layer has weights of its own, some 40 to 900 MB a rank, so that every weight comes from memory and whatever a site
reads was evicted from L2 since the site before; that is how a site stands in a decode step, attention left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

FP8 = torch.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a whole layer (before sharding), and how many layers a chain has."""

    hidden: int
    attention: int  # heads * head size: what o_proj reads
    kv: int  # of keys, and of values
    ffn: int
    layers: int


SHAPES = {
    "llama-8b": Shape(4096, 4096, 1024, 14336, 16),
    "llama-70b": Shape(8192, 8192, 1024, 28672, 6),
    "qwen3-32b": Shape(5120, 8192, 1024, 25600, 8),
    # MLA: what q_b and kv_b project from is small and replicated; the dense layers' FFN.
    "deepseek-v3": Shape(7168, 16384, 512, 18432, 6),
    # The width that is no multiple of 128 vectors; its experts' FFN as one dense GEMM of four active ones.
    "gpt-oss": Shape(2880, 4096, 512, 11520, 24),
}

Site = Callable[[], torch.Tensor]
"""Runs the site on what the GEMM before it wrote, and returns what the next GEMM reads."""


class Chain:
    """All layers' weights and activations of one rank, in bf16 or FP8."""

    def __init__(self, shape: Shape, world: int, rank: int, device: torch.device, fp8: bool):
        self.shape, self.world, self.device, self.fp8 = shape, world, device, fp8
        generator = torch.Generator(device).manual_seed(rank)
        self._one = torch.ones((), device=device)

        def weight(inputs: int, outputs: int) -> torch.Tensor:
            values = torch.randn(inputs, outputs, generator=generator, device=device, dtype=torch.bfloat16)
            values *= inputs**-0.5
            # cuBLAS takes an FP8 weight by columns, as a checkpoint's [outputs, inputs] is read.
            return values.t().contiguous().to(FP8).t() if fp8 else values

        s = shape
        self.weights = [
            (
                weight(s.attention // world, s.hidden),
                weight(s.hidden, 2 * s.ffn // world),
                weight(s.ffn // world, s.hidden),
                weight(s.hidden, (s.attention + 2 * s.kv) // world),
            )
            for _ in range(s.layers)
        ]

    @property
    def sites(self) -> int:
        return 2 * self.shape.layers

    def activations(self, tokens: int) -> None:
        """Buffers for ``tokens`` rows."""
        s, bf16 = self.shape, torch.bfloat16
        inputs = torch.float8_e4m3fn if self.fp8 else bf16

        def made(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randn(tokens, columns // self.world, device=self.device).to(dtype)

        self.heads, self.gated = made(s.attention, inputs), made(s.ffn, inputs)
        self.gate_up, self.qkv = made(2 * s.ffn, bf16), made(s.attention + 2 * s.kv, bf16)

    def product(self, a: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        if self.fp8:
            torch.ops.aten._scaled_mm.out(a, weight, self._one, self._one, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, weight, out=out)

    def run(self, x: torch.Tensor, site: Site) -> None:
        """All layers; the GEMMs in front of a site write ``x``."""
        for o_proj, gate_up, down, qkv in self.weights:
            self.product(self.heads, o_proj, x)
            self.product(site(), gate_up, self.gate_up)
            self.product(self.gated, down, x)
            self.product(site(), qkv, self.qkv)
