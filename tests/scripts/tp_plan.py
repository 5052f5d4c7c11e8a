"""Hugging Face's ``tp_plan="auto"``, random weights."""

import tempfile

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

config = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=128,
)
plan = {"tp_plan": "auto"}
if hasattr(DistributedConfig, "tp_plan"):  # newer transformers take it so
    plan = {"distributed_config": DistributedConfig(**plan)}
dist.init_process_group("gloo")
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    shared = [folder]
    if dist.get_rank() == 0:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    dist.broadcast_object_list(shared)
    model = LlamaForCausalLM.from_pretrained(shared[0], dtype=torch.bfloat16, **plan)
    dist.barrier()
    torch.compile(model)(torch.arange(8)[None], use_cache=False)
    dist.barrier()
dist.destroy_process_group()
