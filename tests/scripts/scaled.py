"""A learned scale behind the all-reduce, in 32 layers."""

import torch
import torch.distributed as dist
from model import Block, Model, Tensor, join, tokens


def reduce(block: Block, y: Tensor) -> Tensor:
    dist.all_reduce(y)
    return y * block.scale


join()
with torch.no_grad():
    torch.compile(Model(reduce, layers=32))(tokens())
