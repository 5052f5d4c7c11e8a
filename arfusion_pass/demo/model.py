"""A Llama-like decoder from plain modules, and its tensor-parallel plan.

Every layer runs ``norm -> attention -> all-reduce -> add -> norm -> MLP -> all-reduce -> add``; with the vocab-parallel
embedding in front and the final norm behind, n layers make 2n + 1 all-reduces, each followed by an RMSNorm.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

Norm = Literal["llama", "gemma", "torch"]
NORMS: tuple[Norm, ...] = ("llama", "gemma", "torch")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of the model; ``heads``, ``vocab`` and ``intermediate`` must be divisible by the number of ranks."""

    layers: int = 2
    hidden: int = 256
    heads: int = 4
    head_dim: int = 64
    vocab: int = 512
    intermediate: int = 512
    epsilon: float = 1e-6
    norm: Norm = "llama"

    @staticmethod
    def for_ranks(world: int, layers: int, hidden: int, norm: Norm, epsilon: float = 1e-6) -> ModelConfig:
        """A small model whose sharded dimensions are divisible by ``world``."""
        return ModelConfig(
            layers=layers,
            hidden=hidden,
            heads=_round_up(4, world),
            vocab=_round_up(512, world),
            intermediate=_round_up(2 * hidden, 8 * world),
            epsilon=epsilon,
            norm=norm,
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class LlamaRMSNorm(nn.Module):
    """Hugging Face's spelling, with two roundings: ``w * (x.float() * rsqrt(mean(x.float()**2) + eps)).to(dtype)``."""

    def __init__(self, hidden: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * x32.to(x.dtype)


class GemmaRMSNorm(LlamaRMSNorm):
    """Gemma's spelling: the weight is stored without its 1, and one rounding comes last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (x32 * (1.0 + self.weight.float())).to(x.dtype)


def make_norm(config: ModelConfig) -> nn.Module:
    """An RMSNorm over the hidden dimension in the spelling that the config names."""
    if config.norm == "torch":
        return nn.RMSNorm(config.hidden, eps=config.epsilon)
    return {"llama": LlamaRMSNorm, "gemma": GemmaRMSNorm}[config.norm](config.hidden, config.epsilon)


class Attention(nn.Module):
    """Causal self-attention with rotary embeddings; each rank holds its share of the heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width = config.heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, width, bias=False)
        self.k_proj = nn.Linear(config.hidden, width, bias=False)
        self.v_proj = nn.Linear(config.hidden, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            projection(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer, pre-norm with residual adds."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_norm = make_norm(config)
        self.attention = Attention(config)
        self.post_attention_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.input_norm(x), cos, sin)
        return x + self.mlp(self.post_attention_norm(x))


class Decoder(nn.Module):
    """Token ids ``[batch, tokens]`` to logits ``[batch, tokens, vocab]``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        cos, sin = rotary(ids.shape[1], self.config.head_dim, x)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))


def rotary(tokens: int, head_dim: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin ``[tokens, head_dim]`` in the dtype and on the device of ``like``."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, device=like.device).float() / head_dim)
    angle = torch.arange(tokens, device=like.device).float()[:, None] * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``[batch, heads, tokens, head_dim]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def initialise(model: Decoder, seed: int) -> None:
    """Random weights, the same on every rank; scaled so that activations neither vanish nor grow with depth."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                centre = 0.0 if model.config.norm == "gemma" else 1.0
                parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                scale = 1.0 if name.startswith("embedding") else parameter.shape[1] ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def parallelize(model: Decoder, mesh: DeviceMesh) -> Decoder:
    """Shard the model over the mesh: embedding by vocabulary, projections by columns and rows. The norms stay whole,
    so that every row-wise layer ends in a plain functional all-reduce."""
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "layers.*.attention.q_proj": ColwiseParallel(),
        "layers.*.attention.k_proj": ColwiseParallel(),
        "layers.*.attention.v_proj": ColwiseParallel(),
        "layers.*.attention.o_proj": RowwiseParallel(input_layouts=Shard(-1)),
        "layers.*.mlp.gate_proj": ColwiseParallel(),
        "layers.*.mlp.up_proj": ColwiseParallel(),
        "layers.*.mlp.down_proj": RowwiseParallel(input_layouts=Shard(-1)),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    return model


def parallelize_sequence(model: Decoder, mesh: DeviceMesh) -> Decoder:
    """The same with sequence parallelism: residual and norms hold each rank's share of the tokens, so that every
    row-wise layer ends in a reduce-scatter, and every norm in an all-gather. The ranks must divide the tokens."""
    whole, share = Replicate(), Shard(1)
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=whole, output_layouts=share),
        "layers.*.input_norm": SequenceParallel(),
        "layers.*.attention": PrepareModuleInput(
            input_layouts=(share, None, None), desired_input_layouts=(whole, None, None)
        ),
        "layers.*.attention.q_proj": ColwiseParallel(),
        "layers.*.attention.k_proj": ColwiseParallel(),
        "layers.*.attention.v_proj": ColwiseParallel(),
        "layers.*.attention.o_proj": RowwiseParallel(output_layouts=share),
        "layers.*.post_attention_norm": SequenceParallel(),
        "layers.*.mlp": PrepareModuleInput(input_layouts=(share,), desired_input_layouts=(whole,)),
        "layers.*.mlp.gate_proj": ColwiseParallel(),
        "layers.*.mlp.up_proj": ColwiseParallel(),
        "layers.*.mlp.down_proj": RowwiseParallel(output_layouts=share),
        "norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=share, output_layouts=whole),
    }
    parallelize_module(model, mesh, plan)
    return model
