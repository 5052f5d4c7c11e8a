"""A Hugging Face model under tp_plan="auto": random weights from a tiny config, nothing is downloaded.

    torchrun --nproc-per-node 2 examples/hf_tp_plan.py [--model llama|qwen3|gemma]

Needs the extra: pip install 'arfusion-pass[hf]'.
"""

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen3Config

import arfusion_pass as arf

CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma": GemmaConfig}
parser = argparse.ArgumentParser()
parser.add_argument("--model", choices=CONFIGS, default="llama")
arguments = parser.parse_args()

# transformers shards while it loads a checkpoint, so rank 0 writes one first.
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
cuda = torch.cuda.device_count() >= world
if cuda:
    torch.cuda.set_device(rank)
dist.init_process_group("nccl" if cuda else "gloo")
folder = [tempfile.mkdtemp() if rank == 0 else None]
dist.broadcast_object_list(folder)
config = CONFIGS[arguments.model](
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=512,
    pad_token_id=0,
)
if rank == 0:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder[0])
dist.barrier()

model = AutoModelForCausalLM.from_pretrained(folder[0], tp_plan="auto", dtype=torch.bfloat16).eval()
ids = torch.randint(0, config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0)).to(model.device)
compiled = torch.compile(model, options=arf.inductor_options(fx_graph_cache=False))  # a cached graph has no report
with torch.no_grad():
    unfused = model(ids, use_cache=False).logits
    fused = compiled(ids, use_cache=False).logits
if rank == 0:
    print(arf.reports())
    print(f"largest difference of the logits to the unfused model: {(fused - unfused).abs().max().item():.4f}")
dist.destroy_process_group()
