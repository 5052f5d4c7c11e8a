"""A whole step of a Hugging Face model, compiled without the pass and with it: a decode step, or a prompt's prefill.

    torchrun --nproc-per-node 4 -m benchmarks.bench_model --model llama-3.1-8b --batch 1,16,64 --out results.json
    torchrun --nproc-per-node 2 -m benchmarks.bench_model --prefill 2048,8192 --linear fp8 --out prefill.json

transformers' own Llama in the published sizes with random weights, tensor-parallel through DTensor; ``--linear fp8``
puts :mod:`benchmarks.fp8_linear` for the layers' linear layers, split alike. A decode step (``--batch``) is one token
for every sequence behind a static KV cache; a prefill (``--prefill``) is all tokens of one prompt, with causal
attention, no cache, and the last token's logits. Each variant is one ``torch.compile`` with Inductor's defaults and
nothing else changed: without the pass, with it and, for a prefill, with it and a table that keeps every residual
replicated, then one that keeps it sharded from one token on (``docs/how.md``; on CPUs nothing is sharded). All of them
run back to back in a CUDA graph each, in turn, by the method of :mod:`benchmarks.timing`; a step that no graph holds is
launched by the host and timed by events. ``parts`` in the file is where the GPU's time goes
(:mod:`benchmarks.kernel_times`).

``--norm torch`` puts ``nn.RMSNorm`` for transformers' norm, which rounds before the weight as FlashInfer's kernels
cannot, and adds the pass on those kernels where FlashInfer is installed. ``--layers`` takes fewer layers than the model
has, ``--hidden`` a small model (also on CPUs, untimed), ``--check`` runs every fused call against its subgraph
instead.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.util
import inspect
import json
import os
import statistics
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import arfusion_pass as arf
from arfusion_pass.inspection import replay
from arfusion_pass.rewrite.recording import watching
from arfusion_pass.runtime import native
from arfusion_pass.runtime.thresholds import NEVER
from benchmarks import fp8_linear
from benchmarks.kernel_times import by_kind, kernel_times
from benchmarks.timing import Play, Timer

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
REPLAYS, ROUNDS = 9, 3
"""Of every variant in turn in a round; a figure is the median of the rounds', its spread theirs."""
PROFILED = 3
"""Plays that the profiler sees: what a site waits for other ranks differs from one to the next."""
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


def sharded_model(arguments: argparse.Namespace, positions: int, device: torch.device) -> Any:
    """The model for so many positions, sharded while it has no memory yet: a rank only ever holds its share."""
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
        max_position_embeddings=positions,
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
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    plan = PLAN
    if arguments.linear == "fp8":
        in_layers = {path for path in PLAN if path.startswith("model.layers.")}
        by_rows = {path.split(".")[-1]: isinstance(PLAN[path], RowwiseParallel) for path in in_layers}
        for layer in model.model.layers:
            fp8_linear.share_out(layer, by_rows, mesh.get_group())
        plan = {path: style for path, style in PLAN.items() if path not in in_layers}
    parallelize_module(model, mesh, plan)
    model.to_empty(device=device)
    torch.manual_seed(dist.get_rank())
    fp8_linear.fill(model, device)
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

    steps = 4
    """In a graph: tens of milliseconds, beside which the ranks' start does not show."""

    def __init__(self, model: Any, batch: int, context: int, device: torch.device) -> None:
        from transformers import StaticCache

        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=context)
        known = inspect.signature(model.forward).parameters
        self.given = {"cache" if "cache" in known else "past_key_values": self.cache}  # the older name
        generator = torch.Generator().manual_seed(batch)
        vocab = model.config.vocab_size
        prompt = torch.randint(0, vocab, (batch, context // 2), generator=generator).to(device)
        self.ids = torch.randint(0, vocab, (batch, 1), generator=generator).to(device)
        self.positions = torch.full((batch, 1), context // 2, device=device)
        model(prompt, use_cache=True, logits_to_keep=1, **self.given)
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
        output = forward(self.ids, position_ids=self.positions, use_cache=True, **self.given)
        return output.logits


class Prefill:
    """All tokens of one prompt, without a cache: attention is causal and reads what the step itself computes."""

    steps = 1

    def __init__(self, model: Any, tokens: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(tokens)
        self.model = model
        self.ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator).to(device)

    def rewind(self) -> None:
        """Nothing is kept from one step to the next."""

    def step(self, forward: Callable[..., Any]) -> torch.Tensor:
        """The last token's logits ``[1, 1, vocabulary]``."""
        return forward(self.ids, use_cache=False, logits_to_keep=1).logits


COMPILED, REPLICATED, SHARDED = "compiled", "with the pass, replicated", "with the pass, sharded"


class Variant(NamedTuple):
    """Options of torch.compile, and from which message on, in bytes, a chain's residual is sharded (None: by the
    table in force). Variants with one options object are compiled once."""

    options: dict[str, Any]
    sharded_from: int | None = None


def variants(norm: str, prefill: bool) -> dict[str, Variant]:
    """By name; the first is what the others are compared with."""
    fused = arf.inductor_options(fx_graph_cache=False)
    found = {COMPILED: Variant({})}
    if prefill:
        found[REPLICATED] = Variant(fused, NEVER)
        found[SHARDED] = Variant(fused, 1)
    else:
        found["with the pass"] = Variant(fused)
    if norm == "torch" and torch.cuda.is_available() and importlib.util.find_spec("flashinfer"):
        config = arf.FusionConfig(backend="flashinfer")
        found["with the pass, FlashInfer's kernels"] = Variant(arf.inductor_options(config, fx_graph_cache=False))
    return found


class Compiled:
    """The step under one options object, with what the pass reported of it."""

    def __init__(self, work: Decoding | Prefill, options: dict[str, Any]) -> None:
        self.forward = torch.compile(work.model, options=options, dynamic=False)
        self.work, self.reports, self.recorder = work, [], replay.Recorder()

    def step(self, variant: Variant) -> torch.Tensor:
        """The step's logits. The table is given anew each time: making a workspace brings one of its own."""
        if torch.cuda.is_available() and variant.sharded_from is not None:
            native.use_sharded_thresholds(((dist.get_world_size(), 0, variant.sharded_from),))
        return self.work.step(self.forward)

    def warm(self, variant: Variant, steps: int, check: bool) -> torch.Tensor:
        """The last of some steps' logits, the first of which compiles, watched where it is to be checked."""
        before = len(arf.reports())
        with watching(self.recorder) if check else contextlib.nullcontext():
            for _ in range(steps):
                self.work.rewind()
                logits = self.step(variant).clone()
        self.reports += arf.reports()[before:]
        return logits

    def facts(self, check: bool) -> dict[str, Any]:
        """What was fused, and whether each call since the last check was exact."""
        sites = [site for report in self.reports for site in report.fused]
        found: dict[str, Any] = {
            "fused": len(sites),
            "missed": sum(len(report.missed) for report in self.reports),
            "quantised": sum(site.quantiser is not None for site in sites),
        }
        if check:
            checks = self.recorder.checks()
            found["exact"] = sum(check.ok for check in checks)
            found["differ"] = [f"{check.site.name}: {check.detail}" for check in checks if not check.ok]
            for site in self.recorder.sites:
                site.calls.clear()
        return found


def measure(
    work: Decoding | Prefill, chosen: dict[str, Variant], timer: Timer | None, check: bool
) -> dict[str, dict[str, Any]]:
    """Compile the step for each variant, compare its logits with the eager ones, and time all of them in turn, or check
    the fused calls."""
    wanted = work.step(work.model).float()
    compiled: dict[int, Compiled] = {}
    logits: dict[str, torch.Tensor] = {}
    plays: dict[str, tuple[Play, int]] = {}
    row: dict[str, dict[str, Any]] = {}
    torch._dynamo.reset()  # of earlier rows; not between variants: a graph reads constants of its compiled code
    for name, variant in chosen.items():
        known = compiled.setdefault(id(variant.options), Compiled(work, variant.options))
        logits[name] = known.warm(variant, 1 if check else 3, check)
        row[name] = known.facts(check)
        row[name]["from eager"] = ((logits[name].float() - wanted).norm() / wanted.norm()).item()
        if timer is not None:
            play, steps, row[name]["timed"] = _play(functools.partial(known.step, variant), work.steps, timer)
            plays[name] = (play, steps)
    if {REPLICATED, SHARDED} <= set(logits):
        row[SHARDED]["the replicated's bits"] = torch.equal(logits[REPLICATED], logits[SHARDED])
    if timer is not None:
        _time(work, timer, plays, row)
    return row


def _play(step: Play, steps: int, timer: Timer) -> tuple[Play, int, str]:
    """Steps as a graph; where a rank cannot capture them, one as calls; how many it is, and which of the two."""
    graph, error = None, "another rank could not capture it"
    try:
        graph = timer.capture(step, steps, warm=True)
    except Exception:
        error = traceback.format_exc(limit=-1)
    if timer.agree(graph is not None):
        assert graph is not None
        return graph.replay, steps, "graph replays"
    return step, 1, f"events: {error}"


def _time(work: Decoding | Prefill, timer: Timer, plays: dict[str, tuple[Play, int]], row: dict[str, Any]) -> None:
    """Milliseconds of a step, spread over the rounds, and where the time goes, as the ranks' mean."""
    calls = {name: play for name, (play, _) in plays.items()}
    timer.alternating(calls, 2, work.rewind)
    rounds = [timer.alternating(calls, REPLAYS, work.rewind) for _ in range(ROUNDS)]
    for name, (play, steps) in plays.items():
        times = [found[name] / steps / 1e3 for found in rounds]
        row[name] |= {"ms": statistics.median(times), "spread": max(times) - min(times)}
        found = kernel_times(lambda play=play: timer.launch(play, work.rewind), PROFILED)
        kernels = {kernel: time / steps for kernel, time in found.items()}
        parts = {kind: timer.mean(time) for kind, time in by_kind(kernels).items()}
        if parts["all"]:
            row[name]["parts"] = parts
            row[name]["share"] = sum(time for kind, time in parts.items() if kind != "all") / parts["all"]
            row[name]["kernels"] = dict(sorted(kernels.items(), key=lambda item: -item[1])[:12])


def table(rows: dict[int, dict[str, Any]], what: str) -> str:
    """One line a batch size or prompt: milliseconds, tokens a second, the sites' share of the GPU's time."""
    names = list(next(iter(rows.values())))
    heads = [what, *names, *(f"faster {name.removeprefix('with the pass, ')}" for name in names[1:])]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for size, row in rows.items():
        times = [row[name].get("ms", 0) for name in names]
        faster = [f"{times[0] / time:.2f}x" if time else "–" for time in times[1:]]
        lines.append(f"| {' | '.join([str(size), *(_cell(row[name], size) for name in names), *faster])} |")
    return "\n".join(lines)


def _cell(found: dict[str, Any], tokens: int) -> str:
    if "ms" not in found:
        return "–"
    share = f", sites {100 * found['share']:.1f} %" if "share" in found else ""
    return f"{found['ms']:.3f} ms, {tokens / found['ms'] * 1e3:,.0f} tokens/s{share}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=0, help="default: the model's own")
    parser.add_argument("--hidden", type=int, default=0, help="a small model of this width")
    parser.add_argument("--norm", choices=("transformers", "torch"), default="transformers", help="torch: nn.RMSNorm")
    parser.add_argument("--linear", choices=("bf16", "fp8"), default="bf16", help="fp8: static e4m3, torch._scaled_mm")
    parser.add_argument("--batch", help="sequences of a decode step, comma-separated (default: 1,16,64, or no decode)")
    parser.add_argument("--prefill", help="tokens of a prompt, comma-separated")
    parser.add_argument("--check", action="store_true", help="instead of times: each fused call against its subgraph")
    parser.add_argument("--context", type=int, default=1024, help="positions in the cache; half are filled")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    prompts = [int(tokens) for tokens in (arguments.prefill or "").split(",") if tokens]
    batches = [int(batch) for batch in (arguments.batch or ("" if prompts else "1,16,64")).split(",") if batch]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.device_count() >= world
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    timer = Timer(device, dist.new_group(backend="gloo")) if cuda and not arguments.check else None
    results: dict[str, Any] = {
        "model": arguments.model,
        "layers": arguments.layers or MODELS[arguments.model]["num_hidden_layers"],
        "world": world,
        "context": arguments.context,
        "norm": arguments.norm,
        "linear": arguments.linear,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "batches": {},
        "prefill": {},
    }
    with torch.no_grad():
        model = sharded_model(arguments, max([arguments.context, *prompts]), device)
        rows = [
            ("batches", batch, lambda batch=batch: Decoding(model, batch, arguments.context, device))
            for batch in batches
        ]
        rows += [("prefill", tokens, lambda tokens=tokens: Prefill(model, tokens, device)) for tokens in prompts]
        for kind, size, make in rows:
            chosen = variants(arguments.norm, kind == "prefill")
            if arguments.check:
                del chosen[COMPILED]
            row = measure(make(), chosen, timer, arguments.check)
            results[kind][size] = row
            if rank == 0:
                print(f"{kind} {size}: {json.dumps(row)}", flush=True)
                if arguments.out:
                    arguments.out.write_text(json.dumps(results, indent=1))
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
    if rank == 0:
        for kind, what in (("batches", "batch"), ("prefill", "tokens")):
            if results[kind]:
                print(table(results[kind], what), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
