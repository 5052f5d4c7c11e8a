"""A Hugging Face model under tp_plan="auto": random weights from a tiny config, nothing is downloaded.

    torchrun --nproc-per-node 2 examples/hf_tp_plan.py [--model llama|qwen3|gemma]
    torchrun --nproc-per-node 2 examples/hf_tp_plan.py --generate 64 [--batch 16 --hidden 4096 --layers 32]

With --generate it decodes greedily from a static cache, each step one CUDA graph (mode="reduce-overhead"), and prints
tokens a second without and with the pass. Needs the extra: pip install 'arfusion-pass[hf]'.
"""

import argparse
import inspect
import os
import tempfile
import time

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen3Config, StaticCache
from transformers.distributed import DistributedConfig

import arfusion_pass as arf

CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma": GemmaConfig}
parser = argparse.ArgumentParser()
parser.add_argument("--model", choices=CONFIGS, default="llama")
parser.add_argument("--generate", type=int, default=0, metavar="TOKENS", help="decode so many tokens")
parser.add_argument("--batch", type=int, default=1, help="sequences")
parser.add_argument("--hidden", type=int, default=256, help="hidden size, a multiple of 128")
parser.add_argument("--layers", type=int, default=2)
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
    hidden_size=arguments.hidden,
    intermediate_size=2 * arguments.hidden,
    num_hidden_layers=arguments.layers,
    num_attention_heads=arguments.hidden // 64,
    num_key_value_heads=arguments.hidden // 128,
    head_dim=64,
    vocab_size=512,
    pad_token_id=0,
)
if rank == 0:
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):  # random weights by the GPU: a CPU thread takes minutes for billions
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder[0])
dist.barrier()

plan = {"tp_plan": "auto"}
if hasattr(DistributedConfig, "tp_plan"):  # newer transformers take it so
    plan = {"distributed_config": DistributedConfig(**plan)}
model = AutoModelForCausalLM.from_pretrained(folder[0], dtype=torch.bfloat16, **plan).eval()
ids = torch.randint(0, config.vocab_size, (arguments.batch, 16), generator=torch.Generator().manual_seed(0))
ids = ids.to(model.device)
taken = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # the older name


def compare_logits() -> None:
    """One forward pass, compiled with the pass, against the model as it is."""
    compiled = torch.compile(model, options=arf.inductor_options(fx_graph_cache=False))  # a cached graph has no report
    unfused = model(ids, use_cache=False).logits
    fused = compiled(ids, use_cache=False).logits
    if rank == 0:
        print(arf.reports())
        print(f"largest difference of the logits to the unfused model: {(fused - unfused).abs().max().item():.4f}")


def decode(step, cache: StaticCache) -> tuple[torch.Tensor, float]:
    """Greedy tokens ``[batch, TOKENS]`` and tokens a second; ``step`` runs every token but the prompt's."""
    cache.reset()
    token = model(ids, use_cache=True, **{taken: cache}).logits[:, -1:].argmax(-1)
    tokens = [token]
    positions = torch.full((arguments.batch, 1), ids.shape[1], device=ids.device)
    _ = token.sum().item()  # the prompt is done
    begin = time.perf_counter()
    for _ in range(arguments.generate - 1):
        torch.compiler.cudagraph_mark_step_begin()
        logits = step(token, position_ids=positions, use_cache=True, **{taken: cache}).logits
        token = logits[:, -1:].argmax(-1)
        tokens.append(token)
        positions += 1
    result = torch.cat(tokens, dim=1)
    _ = result.sum().item()
    return result, arguments.batch * (arguments.generate - 1) / (time.perf_counter() - begin)


def generate() -> None:
    """The same tokens without and with the pass. The first run compiles and warms up, the second records a graph."""
    mode = "reduce-overhead" if cuda else "default"
    outcomes = {}
    for name, options in {
        "without the pass": {**torch._inductor.list_mode_options().get(mode, {}), "fx_graph_cache": False},
        "with the pass": arf.inductor_options(mode=mode, fx_graph_cache=False),
    }.items():
        torch.compiler.reset()
        step = torch.compile(model, options=options, dynamic=False)
        cache = StaticCache(config=config, max_cache_len=ids.shape[1] + arguments.generate)
        for _ in range(3):  # with one cache: a CUDA graph is recorded anew for another one
            outcomes[name] = decode(step, cache)
    if rank == 0:
        print(arf.reports())
        for name, (_, speed) in outcomes.items():
            print(f"{name}: {speed:.0f} tokens/s")
        (first, _), (second, _) = outcomes.values()
        print(f"tokens alike: {(first == second).sum().item()} of {first.numel()} (roundings part them)")


with torch.no_grad():
    generate() if arguments.generate else compare_logits()
torch.compiler.reset()  # NCCL waits for CUDA graphs that hold its kernels, and would wait forever below
dist.destroy_process_group()
