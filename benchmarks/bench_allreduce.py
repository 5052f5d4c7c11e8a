"""Ours against NCCL, torch symmetric memory, vLLM's all-reduce, FlashInfer and the plain prototype, in one run.

    python -m benchmarks.bench_allreduce --world 4 --kit flashinfer_kit --floor ./fused_floor --out benchmarks/results

All-reduce + residual + RMSNorm in bf16, and the same with a quantiser; microseconds of one operation, method of
:mod:`benchmarks.timing`. FlashInfer's and vLLM's kernels come from ``--kit`` (:mod:`benchmarks.flashinfer_kit`), else
from FlashInfer where it is installed; without ``--floor`` the plain prototype is left out (a binary that times itself,
before the rest). Writes ``tpN.json`` and ``tpN.md``, once all ranks have ended well.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import ranks

HIDDEN, TOKENS = (2048, 4096, 7168, 8192), (1, 4, 16, 64, 256, 1024, 2048)
QUANTISED = ("static FP8", "group-128 FP8", "NVFP4", "MXFP8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ranks.add_arguments(parser)
    parser.add_argument("--floor", default="", help="the compiled prototype")
    parser.add_argument("--hidden", default=",".join(map(str, HIDDEN)))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--quantised", default=",".join(QUANTISED), help="quantisers to time too; empty: none")
    parser.add_argument(
        "--tune", action="store_true", help="measure the strategy table, write thresholds.json, and end"
    )
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--iterations", type=int, default=200, help="calls in a graph; fewer above 1 MiB")
    parser.add_argument("--replays", type=int, default=15)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.rank >= 0:
        rank_main(arguments)
    if problem := ranks.too_few_gpus(arguments.world):
        print(f"bench_allreduce: {problem}")
        return 1
    if arguments.tune:
        from arfusion_pass.cli import tune

        print(tune.run(arguments.world))
        return 0
    prototype = run_prototype(arguments.floor, arguments.budget / 2) if arguments.floor else {}
    with tempfile.TemporaryDirectory() as folder:
        command = [*sys.argv[1:], "--out", folder]
        problem = ranks.run("benchmarks.bench_allreduce", command, arguments.world, arguments.budget)
        made = Path(folder) / "results.json"
        results = json.loads(made.read_text()) if made.exists() else {"us": {}}
    if problem or not results["us"]:
        print(f"bench_allreduce: {problem or 'no cell was measured'}; {arguments.out} is as it was")
        return 1
    results["prototype"] = prototype
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"tp{arguments.world}"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1))
    text = markdown(results)
    path.with_suffix(".md").write_text(text)
    print(text)
    return 0


def run_prototype(binary: str, timeout: float) -> dict[str, float]:
    """The prototype's own figures, best of its two strategies: ``{"4096x16": µs}``. It takes all visible GPUs."""
    try:
        done = subprocess.run([binary], capture_output=True, text=True, timeout=timeout, check=False)
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else (error.stdout or "")
    except OSError as error:
        print(f"the prototype did not run: {error}")
        return {}
    figures = {}
    for line in output.splitlines():
        if found := re.match(r"W\d+ H(\d+) T(\d+):", line):
            times = [float(value) for value in re.findall(r"-shot ([\d.]+) us", line)]
            if times:
                figures[f"{found[1]}x{found[2]}"] = min(times)
    return figures


def rank_main(arguments: argparse.Namespace) -> None:
    device, cpu_group = ranks.join(arguments)
    from benchmarks.timing import Timer

    timer = Timer(device, cpu_group)
    hidden = [int(value) for value in arguments.hidden.split(",")]
    tokens = [int(value) for value in arguments.tokens.split(",")]
    results: dict[str, Any] = {
        "world": arguments.world,
        "us": {},
        "norm_error": {},
        "notes": [],
        "info": ranks.machine(),
    }
    contenders = make_contenders(arguments, timer, cpu_group, device, max(hidden), max(tokens), results)
    path = arguments.out / "results.json"
    for h in hidden:
        for t in tokens:
            if timer.maximum(time.time() - arguments.started) > arguments.budget:
                results["notes"].append(f"no time left for {h}x{t}")
                continue
            row, errors = time_cell(arguments, timer, contenders, h, t, device, results["notes"])
            results["us"][f"{h}x{t}"], results["norm_error"][f"{h}x{t}"] = row, errors
            if arguments.rank == 0:
                path.write_text(json.dumps(results, indent=1))
                print(f"{h}x{t}", " ".join(f"{name}={value:.1f}" for name, value in row.items()), flush=True)
    if arguments.rank == 0:
        results["info"]["seconds"] = round(time.time() - arguments.started, 1)
        path.write_text(json.dumps(results, indent=1))
    ranks.leave(cpu_group)


def make_contenders(arguments, timer, cpu_group, device, hidden: int, tokens: int, results: dict[str, Any]) -> list:
    """All that can be made on every rank; what cannot is noted."""
    from benchmarks import contenders as c

    largest = hidden * tokens * 2
    made: list[c.Contender] = []

    def attempt(name: str, make) -> Any:
        error, value = None, None
        try:
            value = make()
        except Exception:
            error = traceback.format_exc(limit=-3)
        if timer.agree(error is None):
            return value
        results["notes"].append(f"{name} left out: {error or 'it failed on another rank'}")
        if arguments.rank == 0:
            print(results["notes"][-1], flush=True)
        return None

    quantised = [name for name in arguments.quantised.split(",") if name]
    flashinfer = None
    if not arguments.only_ours:
        made.append(c.nccl())
        made.append(attempt("symm", lambda: c.symmetric_memory(largest, device)))
        flashinfer = attempt(
            "FlashInfer", lambda: c.FlashInfer(arguments.kit, arguments.world, arguments.rank, tokens, hidden)
        )
        if flashinfer is not None:
            made.append(attempt("vLLM", lambda: flashinfer.vllm(largest, cpu_group, device)))
            made += [
                flashinfer.fused("FlashInfer one-shot", True),
                flashinfer.fused("FlashInfer two-shot", False),
                flashinfer.fused("FlashInfer auto", None),
            ]
    made += [c.ours(label, flags) for label, flags in c.OUR_STRATEGIES.items()]
    made.append(c.ours("ours sharded", c.MIDDLE))
    for name in quantised:
        if not arguments.only_ours and name in ("static FP8", "group-128 FP8"):
            made.append(c.nccl(name))
        if flashinfer is not None and name == "static FP8":
            made.append(flashinfer.fused("FlashInfer static FP8", None, name))
        made.append(c.ours(f"ours {name}", 0, name))
        made.append(c.ours(f"ours sharded {name}", c.MIDDLE, name))
    return [contender for contender in made if contender is not None]


def time_cell(arguments, timer, contenders, hidden: int, tokens: int, device, notes: list[str]) -> tuple[dict, dict]:
    """Microseconds and the norm's relative error by contender."""
    import torch

    from benchmarks.contenders import Cell

    cell = Cell(tokens, hidden, arguments.world, arguments.rank, device)
    row: dict[str, float] = {}
    errors: dict[str, float] = {}
    # Ranks start a replay up to some 20 us apart: the graph has to be long beside that, a millisecond or more.
    iterations = (
        arguments.iterations
        if cell.bytes <= 1 << 20
        else max(10, arguments.iterations // (2 if cell.bytes <= 8 << 20 else 4))
    )
    for contender in contenders:
        error = None
        timed = contender.make(cell)
        if timed is None or ("one-shot" in contender.name and cell.bytes > 16 << 20):
            continue
        try:
            cell.norm.zero_()
            graph = timer.capture(timed.call, iterations, timed.warm)
            if timed.after_capture is not None:
                timed.after_capture()
            row[contender.name] = timer.microseconds(graph, iterations, arguments.replays, timed.reset)
            if timed.writes_norm:
                if timed.reset is not None:  # in-place peers: one call on fresh input
                    timed.reset()
                    torch.cuda.synchronize()
                    timed.call()
                torch.cuda.synchronize()
                errors[contender.name] = timer.maximum(cell.norm_error())
        except Exception:
            error = traceback.format_exc(limit=-3)
        if not timer.agree(error is None):
            row.pop(contender.name, None)
            notes.append(f"{contender.name} failed at {hidden}x{tokens}: {error or 'on another rank'}")
            if arguments.rank == 0:
                print(notes[-1], flush=True)
    return row, errors


def markdown(results: dict[str, Any]) -> str:
    """Tables: the norm against every peer, the quantisers, and the summary."""
    from benchmarks.timing import floor_microseconds

    world, info = results["world"], results["info"]
    peers = ("NCCL + norm", "vLLM AR + norm", "symm two-shot + norm")
    peers += ("FlashInfer one-shot", "FlashInfer two-shot", "FlashInfer auto")
    lines = [
        f"# TP{world}: all-reduce + residual + RMSNorm, bf16, µs",
        "",
        f"{world} x {info['gpu']}, torch {info['torch']}, NCCL {info['nccl']}, kernels {info.get('kernels')}, "
        f"{info['date']}; one operation in a CUDA graph of back-to-back operations, median over replays, maximum over "
        "ranks, all columns in one run.",
        "",
        f"| H x T | MiB | {' | '.join(peers)} | prototype | ours one-shot | ours two-shot | ours sharded | **ours** "
        "| best peer / ours | floor | over floor |",
        "| --- " * (len(peers) + 10) + "|",
    ]
    ratios, small = [], []
    for key, row in results["us"].items():
        hidden, tokens = map(int, key.split("x"))
        floor = floor_microseconds(hidden * tokens * 2, world)
        best = min((row[name] for name in peers if name in row), default=math.nan)
        mine = row.get("ours", math.nan)
        ratios.append(best / mine)
        small.append(mine - floor)
        cells = [_figure(row.get(name)) for name in peers] + [_figure(results.get("prototype", {}).get(key), 2)]
        cells += [_figure(row.get(name), 2) for name in ("ours one-shot", "ours two-shot", "ours sharded")]
        cells += [f"**{_figure(mine, 2)}**", _figure(best / mine, 2), _figure(floor), _figure(mine - floor, 2)]
        lines.append(f"| {hidden} x {tokens} | {hidden * tokens * 2 / 2**20:.3g} | " + " | ".join(cells) + " |")
    known = [ratio for ratio in ratios if ratio == ratio and ratio > 0]
    if known:
        mean = math.exp(sum(map(math.log, known)) / len(known))
        lines += [
            "",
            f"Best peer over ours: geometric mean {mean:.2f}, smallest {min(known):.2f}, largest {max(known):.2f}.",
        ]
    names = [name for name in next(iter(results["us"].values()), {}) if any(q in name for q in QUANTISED)]
    if names:
        lines += ["", "## With a quantiser, µs", "", f"| H x T | ours, norm | {' | '.join(names)} |"]
        lines += ["| --- " * (len(names) + 2) + "|"]
        for key, row in results["us"].items():
            cells = [_figure(row.get(name), 2) for name in ("ours", *names)]
            lines.append(f"| {key.replace('x', ' x ')} | " + " | ".join(cells) + " |")
    worst = {name: max(row.get(name, 0.0) for row in results["norm_error"].values()) for name in ("ours", *peers)}
    lines += [
        "",
        "Largest relative error of the norm: " + ", ".join(f"{n} {e:.1e}" for n, e in worst.items() if e) + ".",
    ]
    lines += ["", *(f"Note: {note}".replace("\n", " ")[:400] for note in results["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def _figure(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
