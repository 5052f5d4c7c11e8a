"""A whole decode step of a Hugging Face model, compiled without the pass, with it, and with it on FlashInfer's kernels.

    torchrun --nproc-per-node 4 -m benchmarks.bench_model --model llama-3.1-8b --batch 1,16,64 --out results.json

transformers' own Llama in the published sizes with random weights, tensor-parallel through DTensor, a static KV cache;
one step for every sequence of the batch. Each variant is one ``torch.compile`` with Inductor's defaults and nothing
else changed; steps run back to back in one CUDA graph, method of :mod:`benchmarks.timing`. ``--norm torch`` puts
``nn.RMSNorm`` for transformers' norm, which rounds before the weight as FlashInfer's kernels cannot, and adds the pass
on those kernels where FlashInfer is installed. ``--layers`` takes fewer layers than the model has, ``--hidden`` a small
model (also on CPUs, untimed).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import arfusion_pass as arf
from benchmarks.timing import Timer

MODELS: dict[str, dict[str, int]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
    },
    "llama-3.1-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_hidden_layers": 80,
    },
}
STEPS = 4
"""Steps in a graph: tens of milliseconds, beside which the ranks' start does not show."""
PLAN: dict[str, ParallelStyle] = {
    "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
    "model.layers.*.self_attn.q_proj": ColwiseParallel(),
    "model.layers.*.self_attn.k_proj": ColwiseParallel(),
    "model.layers.*.self_attn.v_proj": ColwiseParallel(),
    "model.layers.*.self_attn.o_proj": RowwiseParallel(input_layouts=Shard(-1)),
    "model.layers.*.mlp.gate_proj": ColwiseParallel(),
    "model.layers.*.mlp.up_proj": ColwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(input_layouts=Shard(-1)),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),
}


def sharded_model(arguments: argparse.Namespace, device: torch.device) -> Any:
    """The model, sharded while it has no memory yet, so that a rank only ever holds its share."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(MODELS[arguments.model])
    if arguments.layers:
        sizes["num_hidden_layers"] = arguments.layers
    if arguments.hidden:
        sizes |= {"hidden_size": arguments.hidden, "intermediate_size": 2 * arguments.hidden}
        sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(
        **sizes,
        vocab_size=1024 if arguments.hidden else 128256,
        max_position_embeddings=arguments.context,
        rms_norm_eps=1e-5,
        attn_implementation="sdpa",
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    if arguments.norm == "torch":
        for path, module in list(model.named_modules()):
            if type(module).__name__ == "LlamaRMSNorm":
                model.set_submodule(
                    path, torch.nn.RMSNorm(config.hidden_size, 1e-5, device="meta", dtype=torch.bfloat16)
                )
    parallelize_module(model, init_device_mesh(device.type, (dist.get_world_size(),)), PLAN)
    model.to_empty(device=device)
    torch.manual_seed(dist.get_rank())
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.dim() == 1:
            torch.nn.init.ones_(local)
        else:
            torch.nn.init.normal_(local, std=parameter.shape[-1] ** -0.5)
    # The rotary frequencies are computed, not loaded: make them again with memory.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model


class Decoding:
    """One step at a fixed position behind a cache that is filled up to it."""

    def __init__(self, model: Any, batch: int, context: int, device: torch.device) -> None:
        from transformers import StaticCache

        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=context)
        generator = torch.Generator().manual_seed(batch)
        vocab = model.config.vocab_size
        prompt = torch.randint(0, vocab, (batch, context // 2), generator=generator).to(device)
        self.ids = torch.randint(0, vocab, (batch, 1), generator=generator).to(device)
        self.positions = torch.full((batch, 1), context // 2, device=device)
        model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self._lengths = [self._length(layer) for layer in self.cache.layers]

    @staticmethod
    def _length(layer: Any) -> Any:
        value = getattr(layer, "cumulative_length", None)
        return value.clone() if isinstance(value, torch.Tensor) else value

    def rewind(self) -> None:
        """Back to the position after the prompt, for caches that count what they hold."""
        for layer, length in zip(self.cache.layers, self._lengths, strict=True):
            if isinstance(length, torch.Tensor):
                layer.cumulative_length.copy_(length)
            elif length is not None:
                layer.cumulative_length = length

    def step(self, forward: Callable[..., Any]) -> torch.Tensor:
        """The next token's logits ``[batch, 1, vocabulary]``."""
        output = forward(self.ids, position_ids=self.positions, past_key_values=self.cache, use_cache=True)
        return output.logits


def variants(norm: str) -> dict[str, dict[str, Any]]:
    """Options of torch.compile by name."""
    found: dict[str, dict[str, Any]] = {"compiled": {}, "with the pass": arf.inductor_options(fx_graph_cache=False)}
    if norm == "torch" and torch.cuda.is_available() and importlib.util.find_spec("flashinfer"):
        config = arf.FusionConfig(backend="flashinfer")
        found["with the pass, FlashInfer's kernels"] = arf.inductor_options(config, fx_graph_cache=False)
    return found


def measure(decoding: Decoding, options: dict[str, Any], timer: Timer | None, wanted: torch.Tensor) -> dict[str, Any]:
    """Compile the step once, compare its logits with the eager ones, and time it."""
    torch._dynamo.reset()
    before = len(arf.reports())
    forward = torch.compile(decoding.model, options=options, dynamic=False)
    for _ in range(3):
        decoding.rewind()
        logits = decoding.step(forward)
    reports = arf.reports()[before:]
    result: dict[str, Any] = {
        "fused": sum(report.matched_count for report in reports),
        "missed": sum(len(report.missed) for report in reports),
        "from eager": ((logits - wanted).float().norm() / wanted.float().norm()).item(),
    }
    if timer is not None:
        graph = timer.capture(lambda: decoding.step(forward), STEPS, warm=True)
        times = [timer.microseconds(graph, STEPS, 9, decoding.rewind) for _ in range(3)]
        result["ms"] = statistics.median(times) / 1e3
        result["spread"] = (max(times) - min(times)) / 1e3
        del graph
    return result


def table(results: dict[str, Any]) -> str:
    """One line a batch size."""
    names = list(next(iter(results["batches"].values())))
    lines = [f"| batch | {' | '.join(f'{name}, ms' for name in names)} | faster |", "| --- " * (len(names) + 2) + "|"]
    for batch, row in results["batches"].items():
        times = [row[name].get("ms") for name in names]
        faster = f"{times[0] / times[1]:.2f}x" if times[0] else "–"
        cells = [f"{time:.3f}" if time else "–" for time in times]
        lines.append(f"| {batch} | {' | '.join(cells)} | {faster} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=0, help="default: the model's own")
    parser.add_argument("--hidden", type=int, default=0, help="a small model of this width")
    parser.add_argument("--norm", choices=("transformers", "torch"), default="transformers", help="torch: nn.RMSNorm")
    parser.add_argument("--batch", default="1,16,64", help="sequences, comma-separated")
    parser.add_argument("--context", type=int, default=1024, help="positions in the cache; half are filled")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.device_count() >= world
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    timer = Timer(device, dist.new_group(backend="gloo")) if cuda else None
    results: dict[str, Any] = {
        "model": arguments.model,
        "layers": arguments.layers or MODELS[arguments.model]["num_hidden_layers"],
        "world": world,
        "context": arguments.context,
        "norm": arguments.norm,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "batches": {},
    }
    with torch.no_grad():
        model = sharded_model(arguments, device)
        for batch in map(int, arguments.batch.split(",")):
            decoding = Decoding(model, batch, arguments.context, device)
            wanted = decoding.step(model)
            row = {
                name: measure(decoding, options, timer, wanted) for name, options in variants(arguments.norm).items()
            }
            results["batches"][batch] = row
            if rank == 0:
                print(f"batch {batch}: {json.dumps(row)}", flush=True)
                if arguments.out:
                    arguments.out.write_text(json.dumps(results, indent=1))
            del decoding
            gc.collect()
    if rank == 0:
        print(table(results), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
