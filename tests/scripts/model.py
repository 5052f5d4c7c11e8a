"""A tensor-parallel model of two layers that the scripts beside this share; on one process it stands for two ranks."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

Tensor = torch.Tensor
HIDDEN = 64


def join() -> None:
    """Two ranks under torchrun, else a fake group of two."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)


class RMSNorm(nn.Module):
    def __init__(self, epsilon: float | Tensor = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))
        if isinstance(epsilon, Tensor):
            self.register_buffer("epsilon", epsilon)
        else:
            self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * h.to(x.dtype)


class Block(nn.Module):
    """``reduce`` is what its layer does with the partial sums of a linear."""

    def __init__(self, reduce: Callable[[Tensor], Tensor], epsilon: float | Tensor = 1e-6) -> None:
        super().__init__()
        self.down = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.bias = nn.Parameter(torch.zeros(HIDDEN))
        self.scale = nn.Parameter(torch.ones(HIDDEN))
        self.norm = RMSNorm(epsilon)
        self.reduce = reduce

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + self.reduce(self, self.down(x))
        return self.norm(residual), residual


class Model(nn.Module):
    def __init__(self, reduce: Callable[[Tensor], Tensor], layers: int = 2, epsilon: float | Tensor = 1e-6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(reduce, epsilon) for _ in range(layers)])
        self.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x


def plain(block: Block, y: Tensor) -> Tensor:
    dist.all_reduce(y)
    return y


def tokens(count: int = 4) -> Tensor:
    return torch.ones(count, HIDDEN, dtype=torch.bfloat16)
