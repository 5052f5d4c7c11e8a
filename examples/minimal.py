"""The smallest use: one all-reduce, one residual add, one RMSNorm.

torchrun --nproc-per-node 2 examples/minimal.py
"""

import os

import torch
import torch.distributed as dist

import arfusion_pass as arf

world = int(os.environ["WORLD_SIZE"])
cuda = torch.cuda.device_count() >= world
dist.init_process_group("nccl" if cuda else "gloo")
device = f"cuda:{dist.get_rank()}" if cuda else "cpu"
torch.set_default_device(device)

linear = torch.nn.Linear(64, 256, bias=False, dtype=torch.bfloat16)
norm = torch.nn.RMSNorm(256, eps=1e-6, dtype=torch.bfloat16)


def block(x, residual):
    y = linear(x)
    dist.all_reduce(y)
    residual = residual + y
    return norm(residual), residual


x, residual = torch.randn(8, 64, dtype=torch.bfloat16), torch.randn(8, 256, dtype=torch.bfloat16)
fused = torch.compile(block, options=arf.inductor_options(fx_graph_cache=False))  # a cached graph has no report
with torch.no_grad():
    fused(x, residual)
if dist.get_rank() == 0:
    print(arf.reports())
dist.destroy_process_group()
