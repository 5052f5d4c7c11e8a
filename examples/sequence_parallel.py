"""Sequence parallelism: DTensor's SequenceParallel plan on a small Llama-like model.

Each rank keeps the residual of its own tokens; between two layers stand a reduce-scatter, a norm and an all-gather,
which become one call: of the kernels on GPUs, of the same two collectives elsewhere.

torchrun --nproc-per-node 2 examples/sequence_parallel.py
"""

import os

import torch
import torch.distributed as dist

import arfusion_pass as arf
from arfusion_pass.demo.model import Decoder, ModelConfig, initialise, parallelize_sequence

world = int(os.environ["WORLD_SIZE"])
cuda = torch.cuda.device_count() >= world
dist.init_process_group("nccl" if cuda else "gloo")
rank = dist.get_rank()
if cuda:
    torch.cuda.set_device(rank)

mesh = dist.init_device_mesh("cuda" if cuda else "cpu", (world,))
config = ModelConfig.for_ranks(world, layers=1, hidden=64 * world, norm="llama")
model = Decoder(config).bfloat16()
initialise(model, seed=0)
model = parallelize_sequence(model.to(mesh.device_type), mesh)
ids = torch.arange(16 * world, device=mesh.device_type).view(2, -1) % config.vocab  # two sequences

compiled = torch.compile(model, options=arf.inductor_options(fx_graph_cache=False))  # a cached one: no report
with torch.no_grad():
    difference = (compiled(ids).float() - model(ids).float()).abs().max().item()
if rank == 0:
    print(arf.reports())
    print("largest difference from the eager model:", difference)
dist.destroy_process_group()
