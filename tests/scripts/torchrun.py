"""Needs its ranks from torchrun."""

import torch
import torch.distributed as dist
from model import Model, plain, tokens

dist.init_process_group("gloo")
with torch.no_grad():
    torch.compile(Model(plain))(tokens())
dist.destroy_process_group()
