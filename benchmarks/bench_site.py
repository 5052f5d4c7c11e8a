"""What a site costs where it stands: between two GEMMs, with a cold L2, ours beside every peer.

    python -m benchmarks.bench_site --world 2 --kit flashinfer_kit --shapes llama-8b,llama-70b --tokens 1,8,32,128

A chain is a decoder layer's four GEMMs, each layer with weights of its own (:mod:`benchmarks.layers`), in a CUDA graph.
A contender's figure is (chain with its sites - chain of the GEMMs alone) over the number of sites. The chain with a
*meeting* in each site's place, an exchange of 16 bytes, tells what it costs that the ranks wait for each other there:
GEMMs do not take equally long on all GPUs. *cold input*: what the GEMMs alone lose where each reads an input that was
evicted, and not what the one before it wrote. All chains are replayed in turn, so that what drifts drifts for all; a
repetition is the median over its replays, a figure the median over repetitions, with the least and the most. Writes
``siteN.json`` and ``siteN.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import ranks
from benchmarks.layers import SHAPES

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GEMMS_ALONE, COLD, MEETING = "GEMMs alone", "cold input", "meeting"
NOT_RUN = {
    "SGLang's push all-reduce": "its kernels are compiled by the engine when it starts; no package holds them alone",
    "NVLS, MNNVL, all multicast kernels": "multicast objects are not made: they can put a shared host out of service",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ranks.add_arguments(parser)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument(
        "--gemm", type=gemms, default=["bf16"], help="bf16, fp8 (static FP8 behind the norm), or bf16,fp8"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--replays", type=int, default=15, help="of a repetition")
    parser.add_argument("--older-kit", default="", help="folder of a kit of another FlashInfer version, beside --kit")
    parser.add_argument(
        "--library", action="append", default=[], type=built_library, metavar="NAME=FILE[@THREADS]",
        help="a built library as one more contender, its rows split over CTAs of so many threads",
    )  # fmt: skip
    parser.add_argument("--only-libraries", action="store_true", help="beside them nothing but ours")
    parser.add_argument("--isolated", action="store_true", help="also time the calls back to back")
    return parser.parse_args()


def gemms(text: str) -> list[str]:
    """The kinds of GEMMs in ``text``, which argparse refuses if there is another."""
    kinds = text.split(",")
    if unknown := set(kinds) - {"bf16", "fp8"}:
        raise argparse.ArgumentTypeError(f"no GEMMs of kind {', '.join(sorted(unknown))}; bf16 and fp8 exist")
    return kinds


def built_library(text: str) -> tuple[str, str, int]:
    """Label, file and threads (0: its own choice) of ``NAME=FILE[@THREADS]``; argparse refuses what can be none."""
    label, _, rest = text.partition("=")
    path, _, threads = rest.partition("@")
    if not label or not Path(path).is_file() or (threads and not threads.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE[@THREADS] with a file that is there")
    if b"aoti_torch_library_init" in Path(path).read_bytes():
        raise argparse.ArgumentTypeError(
            f"{path} would register torch's ops a second time: build it without binding.cpp"
        )
    return label, path, int(threads or 0)


def main() -> int:
    arguments = parse()
    if arguments.rank >= 0:
        rank_main(arguments)
    if problem := ranks.too_few_gpus(arguments.world):
        print(f"bench_site: {problem}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        problem = ranks.run(
            "benchmarks.bench_site", [*sys.argv[1:], "--out", folder], arguments.world, arguments.budget
        )
        made = Path(folder) / "site.json"
        results = json.loads(made.read_text()) if made.exists() else None
    if results:
        print(markdown(results))
    if problem:
        print(f"bench_site: {problem}; {arguments.out} is as it was")
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"site{arguments.world}"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1))
    path.with_suffix(".md").write_text(markdown(results))
    return 0


def rank_main(arguments: argparse.Namespace) -> None:
    import torch

    device, cpu_group = ranks.join(arguments)
    from benchmarks.layers import Chain
    from benchmarks.timing import Timer

    timer = Timer(device, cpu_group)
    shapes = {name: SHAPES[name] for name in arguments.shapes.split(",")}
    tokens = [int(value) for value in arguments.tokens.split(",")]
    results: dict[str, Any] = {"world": arguments.world, "cells": {}, "notes": [], "info": ranks.machine()}
    results["notes"] += [f"{name}: not run, {reason}" for name, reason in NOT_RUN.items()]
    largest = max(shape.hidden for shape in shapes.values()) * max(tokens) * 2
    for gemm in arguments.gemm:
        quantiser = "static FP8" if gemm == "fp8" else None
        made = contenders(arguments, timer, cpu_group, device, largest, quantiser, results["notes"])
        for name, shape in shapes.items():
            chain = Chain(shape, arguments.world, arguments.rank, device, gemm == "fp8")
            for count in tokens:
                if timer.maximum(time.time() - arguments.started) > arguments.budget:
                    results["notes"].append(f"no time left for {name} {gemm} {count}")
                    continue
                cell = time_cell(arguments, timer, chain, made, count, device, results["notes"])
                results["cells"][f"{name} {gemm} {count}"] = cell
                if arguments.rank == 0:
                    (arguments.out / "site.json").write_text(json.dumps(results))
                    print(f"{name} {gemm} {count}", _short(cell), flush=True)
            del chain
            torch.cuda.empty_cache()
    results["info"]["seconds"] = round(time.time() - arguments.started, 1)
    if arguments.rank == 0:
        (arguments.out / "site.json").write_text(json.dumps(results))
    ranks.leave(cpu_group)


def contenders(arguments, timer, cpu_group, device, largest: int, quantiser: str | None, notes: list[str]) -> list:
    """Pairs of a contender and its :class:`Library`, if it is one; what cannot be made on every rank is noted."""
    from arfusion_pass.ops.spec import Flags
    from benchmarks import contenders as c
    from benchmarks.libraries import Library

    made: list[Any] = []

    def attempt(name: str, make) -> Any:
        error = value = None
        try:
            value = make()
        except Exception:
            error = traceback.format_exc(limit=-2)
        if timer.agree(error is None):
            return value
        notes.append(f"{name} left out: {error or 'it failed on another rank'}")
        return None

    def add(name: str, make, library: Any = None) -> None:
        made.append((attempt(name, make), library))

    hidden = 8192
    if not arguments.only_libraries:
        add("NCCL", lambda: c.nccl(quantiser))
        for kit, label in ((arguments.kit, "FlashInfer"), (arguments.older_kit, "FlashInfer, older")):
            if label != "FlashInfer" and not kit:
                continue
            flashinfer = attempt(
                label, lambda k=kit: c.FlashInfer(k, arguments.world, arguments.rank, largest // 2 // hidden, hidden)
            )
            if flashinfer is None:
                continue
            label = f"FlashInfer {flashinfer.version}"
            if quantiser is None and kit == arguments.kit:
                add("vLLM", lambda f=flashinfer: f.vllm(largest, cpu_group, device))
            add(label, lambda f=flashinfer, n=label: f.fused(n, None, quantiser))
            if kit == arguments.kit:
                add(label, lambda f=flashinfer, n=label: f.fused(f"{n} early", None, quantiser, early=True))
        if quantiser is None:
            add("NCCL + Inductor", c.nccl_inductor)
            add("NCCL windows", lambda: c.nccl_windows(largest, device))
    add("ours", lambda: c.ours("ours", 0, quantiser))
    add("ours without PDL", lambda: c.ours("ours without PDL", int(Flags.NO_PDL), quantiser))
    for label, path, threads in arguments.library:
        library = attempt(label, lambda n=label, f=path, a=threads: Library(n, f, largest, arguments.rank, device, a))
        if library is not None:
            add(label, lambda o=library: o.contender(quantiser), library)
    return [pair for pair in made if pair[0] is not None]


def time_cell(arguments, timer, chain, made: list, tokens: int, device, notes: list[str]) -> dict[str, Any]:
    """µs a site adds by contender, beside the chain's own time and the phases of builds that stamp them."""
    import torch

    from benchmarks.contenders import Cell
    from benchmarks.contenders import meeting as make_meeting
    from benchmarks.libraries import STAMP_BYTES

    chain.activations(tokens)
    cell = Cell(tokens, chain.shape.hidden, arguments.world, arguments.rank, device)
    given = cell.x0.clone()
    feed = cell.codes if chain.fp8 else cell.norm
    cell.codes.view(torch.uint8).zero_(), cell.norm.zero_()
    meet = make_meeting(device)
    # Alone, a GEMM reads what the one before it wrote: from L2, as behind a site. FP8 codes are of another dtype.
    direct = feed if chain.fp8 else cell.x0

    def met() -> torch.Tensor:
        meet()
        return direct

    graphs: dict[str, Any] = {
        GEMMS_ALONE: timer.capture(lambda: chain.run(cell.x0, lambda: direct), 1, True),
        COLD: timer.capture(lambda: chain.run(cell.x0, lambda: feed), 1, True),
        MEETING: timer.capture(lambda: chain.run(cell.x0, met), 1, True),
    }
    isolated: dict[str, float] = {}
    wanted: tuple[Any, Any] | None = None
    libraries = {}
    for contender, library in made:
        error = graph = alone = None
        timed = contender.make(cell)
        x = cell.x0 if timed.x is None else timed.x
        try:
            cell.x0.copy_(given), x.copy_(given), cell.norm.zero_(), cell.codes.view(torch.uint8).zero_()
            if timed.warm:
                timed.call()
                torch.cuda.synchronize()
                if timed.writes_norm and not cell.norm_error() < 1e-2:
                    raise RuntimeError(f"{contender.name} is wrong by {cell.norm_error():.1e}")
                if contender.ours:
                    bits = (
                        cell.residual_out.clone(),
                        cell.codes.view(torch.uint8).clone() if chain.fp8 else cell.norm.clone(),
                    )
                    wanted = wanted or bits
                    if not all(torch.equal(a, b) for a, b in zip(wanted, bits, strict=True)):
                        raise RuntimeError(f"{contender.name} has other bits than ours")

            def site(timed=timed) -> torch.Tensor:
                timed.call()
                return timed.norm() if timed.norm else feed

            graph = timer.capture(lambda x=x, site=site: chain.run(x, site), 1, timed.warm)
            if timed.after_capture:
                timed.after_capture()
            if arguments.isolated:
                count = 200 if cell.bytes <= 1 << 20 else 100
                alone = timer.capture(timed.call, count, timed.warm)
                if timed.after_capture:
                    timed.after_capture()
        except Exception:
            error = traceback.format_exc(limit=-2)
        if not timer.agree(error is None):
            notes.append(f"{contender.name} at {tokens} tokens: {error or 'it failed on another rank'}")
            continue
        graphs[contender.name] = graph
        if library is not None:
            libraries[contender.name] = library
        if alone is not None:
            isolated[contender.name] = min(timer.microseconds(alone, count, 7, timed.reset) for _ in range(2))
    for library in libraries.values():
        library.control[-STAMP_BYTES:].zero_()
    plays = {name: graph.replay for name, graph in graphs.items()}
    timer.alternating(plays, 1)
    times = [timer.alternating(plays, arguments.replays) for _ in range(arguments.repetitions)]
    adds = {
        name: sorted((row[name] - row[GEMMS_ALONE]) / chain.sites for row in times)
        for name in graphs
        if name != GEMMS_ALONE
    }
    return {
        "gemms": statistics.median(row[GEMMS_ALONE] for row in times) / chain.shape.layers,
        "adds": {name: [values[len(values) // 2], values[0], values[-1]] for name, values in adds.items()},
        "isolated": isolated,
        "phases": {name: found for name, library in libraries.items() if (found := library.phases())},
    }


def _short(cell: dict[str, Any]) -> str:
    text = ", ".join(f"{name} {m:.2f} ({low:.2f}-{high:.2f})" for name, (m, low, high) in cell["adds"].items())
    if cell["isolated"]:
        text += " | isolated " + ", ".join(f"{name} {value:.2f}" for name, value in cell["isolated"].items())
    for name, phases in cell["phases"].items():
        text += f" | {name}: " + ", ".join(f"{phase} {value:.2f}" for phase, value in phases.items())
    return text


def ratio(cell: dict[str, Any]) -> float | None:
    """Best peer over ours; what rests on a library or a setting of our own is neither."""
    peers = [m for name, (m, _, _) in cell["adds"].items() if name.startswith(("NCCL", "vLLM", "FlashInfer"))]
    ours = cell["adds"].get("ours")
    return min(peers) / ours[0] if peers and ours and ours[0] > 0 else None


def markdown(results: dict[str, Any]) -> str:
    """The table: a row a cell, µs a site adds (median, least to most) by contender."""
    info = results["info"]
    names = list(dict.fromkeys(name for cell in results["cells"].values() for name in cell["adds"]))
    lines = [
        f"# A site between two GEMMs, {results['world']} GPUs",
        "",
        f"{info['gpu']}, torch {info['torch']}, NCCL {info['nccl']}, kernels {info['kernels']}, {info['date']}. "
        "µs that a site adds to the chain of the GEMMs alone: median of the repetitions (least to most). "
        "Share: of our sites in a layer.",
        "",
        f"| layer, GEMMs, tokens | a layer's GEMMs | {' | '.join(names)} | best peer / ours | share |",
        "| --- " * (len(names) + 4) + "|",
    ]
    known = []
    for key, cell in results["cells"].items():
        columns = [f"{v[0]:.1f} ({v[1]:.1f}-{v[2]:.1f})" if (v := cell["adds"].get(name)) else "–" for name in names]
        found = ratio(cell)
        known += [found] if found else []
        ours = cell["adds"].get("ours")
        share = f"{2 * ours[0] / (2 * ours[0] + cell['gemms']):.0%}" if ours else "–"
        best = f"{found:.2f}" if found else "–"
        lines.append(f"| {key} | {cell['gemms']:.0f} | {' | '.join(columns)} | {best} | {share} |")
    if known:
        mean = math.exp(sum(map(math.log, known)) / len(known))
        lines += ["", f"Best peer over ours: geometric mean {mean:.2f}, smallest {min(known):.2f}."]
    phases = {key: cell["phases"] for key, cell in results["cells"].items() if cell["phases"]}
    if phases:
        columns = list(next(iter(next(iter(phases.values())).values())))
        lines += ["", "## Phases of a site, µs", "", f"| cell | build | {' | '.join(columns)} |"]
        lines += ["| --- " * (len(columns) + 2) + "|"]
        for key, builds in phases.items():
            for name, found in builds.items():
                lines.append(f"| {key} | {name} | {' | '.join(f'{found[c]:.2f}' for c in columns)} |")
    lines += ["", *(f"Note: {note}".replace("\n", " ")[:500] for note in results["notes"])]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
