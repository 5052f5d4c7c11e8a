"""Fuzz: random graphs over every dialect, random chains, random functions in eager Python, as people and as servers'
models have them, and graphs that fuse with one condition broken, with a writer to one of their tensors, with operands
by name, or with all-reduces in place, for a night or for a minute.

    python -m benchmarks.fuzz --seed 1 --sites 5000 --chains 5000 --programs 5000 --mutants 20000 --writings 20000

Each graph is fused in this process on simulated ranks and must then lint, pass the ops' own fakes, and compute the bits
that it computed before, in every output and in every input that is written to, none of which shares memory with another
that it did not share it with. A graph that does not run by itself is
no case. Prints every failure with its seed, and a table; the exit status is 1 where there is a failure.
"""

from __future__ import annotations

import argparse
import collections
import functools
import logging
import random
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config

import arfusion_pass as arf
from arfusion_pass.inspection import replay
from arfusion_pass.inspection.graph_diff import print_graph
from tests import mutants, random_programs, random_sites
from tests.simulate import (
    copied,
    fake_world,
    fused_copy,
    random_inputs,
    run,
    shared_memory,
    simulated_ranks,
    tensors,
    trace,
)
from tests.test_random_graphs import HIDDEN, Program
from tests.test_random_sites import WORLD, check_graph, register_groups

STRICT = arf.FusionConfig(raise_errors=True)
MOVING = arf.FusionConfig(raise_errors=True, reassociate=True)
Counts = collections.Counter[str]
Change = Callable[[torch.fx.GraphModule, random.Random], "tuple[torch.fx.GraphModule, str] | None"]


def same(wanted: list[Any], got: list[Any], bits: bool) -> str | None:
    """The first difference: of bits (NaNs count as one value), or beyond rounding where steps were moved."""
    for index, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if not isinstance(a, torch.Tensor):
            continue
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"output {index}: {b.dtype} {tuple(b.shape)}, wanted {a.dtype} {tuple(a.shape)}"
        if not bits:
            continue
        x, y = (t.double() if t.dtype.is_floating_point else t for t in (a, b))
        if not torch.equal(torch.nan_to_num(x, 7), torch.nan_to_num(y, 7)) if x.is_floating_point() else not a.equal(b):
            return f"output {index}: {int((x != y).sum())} of {a.numel()} elements differ"
    return None


def one_program(seed: int, counts: Counts) -> str | None:
    """A function written in eager Python, captured from torch.compile; each fused site is replayed as well."""
    module = random_programs.Program(seed).graph()
    inputs = random_inputs(module, seed)
    if (problem := compare(module, inputs, MOVING if seed % 5 == 4 else STRICT, counts)) is not None:
        return problem
    with replay.recording() as recorder:
        fused, report = fused_copy(module)
        run(fused, inputs)
    with simulated_ranks():
        wrong = [check.detail for check in recorder.checks() if not check.ok]
    return f"replayed: {wrong}\n{report}\n{print_graph(module.graph)}" if wrong else None


def one_served(seed: int, counts: Counts) -> str | None:
    """A function as servers' models have them, captured from torch.compile: caches, masks, branches, two groups."""
    try:
        with torch.no_grad():
            module = random_programs.Served(seed).graph()
    except Exception:
        counts["no graph"] += 1  # such as a branch that returns what it was given
        return None
    choose = torch.Generator().manual_seed(seed)
    inputs = [
        torch.rand(value.shape, generator=choose) > 0.4
        if isinstance(value, torch.Tensor) and value.dtype == torch.bool
        else value
        for value in random_inputs(module, seed)
    ]
    return compare(module, inputs, MOVING if seed % 5 == 4 else STRICT, counts)


def compare(module: torch.fx.GraphModule, inputs: list[Any], config: arf.FusionConfig, counts: Counts) -> str | None:
    """Fuse a copy of ``module``; what is wrong with it, or None."""
    with torch.no_grad():
        try:
            wanted = run(module, inputs)
        except Exception:
            counts["no graph"] += 1
            return None
        fused = copied(module)
        try:
            report = arf.fuse(fused, config)
            fused.graph.lint()
            mutants.propagate(fused)
        except Exception:
            return f"the fused graph does not compile\n{traceback.format_exc(limit=-4)}\n{print_graph(module.graph)}"
        counts.update(graphs=1, sites=len(report.sites), fused=report.matched_count)
        counts["quantised"] += sum(site.quantiser is not None for site in report.fused)
        try:
            got = run(fused, inputs)
            difference = same(wanted, got, bits=not config.reassociate)
            if more := shared_memory(got) - shared_memory(wanted):
                difference = difference or f"outputs {more} share memory"
        except Exception:
            difference = f"the fused graph does not run\n{traceback.format_exc(limit=-4)}"
    if difference is None and not all(site.reason for site in report.missed):
        difference = "a site was missed for no reason"
    return None if difference is None else f"{difference}\n{report}\n{print_graph(module.graph)}"


def one_of_sites(seed: int, counts: Counts) -> str | None:
    """A graph over every dialect, captured from torch.compile."""
    graph = random_sites.draw_graph(random.Random(seed).choice, most=3)
    found: Counts = collections.Counter()
    try:
        check_graph(graph, found)
    except Exception:
        return traceback.format_exc()
    counts.update({name: found[name] for name in ("graphs", "sites", "fused", "quantised")})
    return None


def one_chain(seed: int, counts: Counts) -> str | None:
    """A chain of sites with nodes in between, static; now and then with steps moved before the all-reduce."""
    module, inputs = _chain(seed, random.Random(seed))
    return compare(module, inputs, MOVING if seed % 5 == 4 else STRICT, counts)


def _chain(seed: int, choose: random.Random) -> tuple[torch.fx.GraphModule, list[Any]]:
    dtype, steps = choose.choice(mutants.DTYPES), choose.randint(1, 10)
    module = trace(Program(seed, steps), *tensors((4, HIDDEN), (4, HIDDEN), (HIDDEN,), (HIDDEN,), dtype=dtype))
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(tuple(node.meta["val"].shape), generator=generator).to(dtype)
        for node in module.graph.find_nodes(op="placeholder")
    ]
    return module, inputs


_originals: dict[int, torch.fx.GraphModule] = {}


def one_mutant(seed: int, counts: Counts) -> str | None:
    """A graph that fuses with one or two conditions broken; 25 of each original."""
    return _changed(seed, mutants.mutate, counts)


def one_writing(seed: int, counts: Counts) -> str | None:
    """A graph that fuses with one or two writers in it; 25 of each original."""
    return _changed(seed, mutants.write, counts)


def one_silent(seed: int, counts: Counts) -> str | None:
    """The same with writers whose ops do not say that they write, or what they give."""
    return _changed(seed, functools.partial(mutants.write, ways=mutants.SILENT), counts)


def one_named(seed: int, counts: Counts) -> str | None:
    """A graph that fuses, with operands by name."""
    return _changed(seed, mutants.named, counts)


def one_in_place(seed: int, counts: Counts) -> str | None:
    """A graph that fuses, or a chain of sites, with its all-reduces in place."""
    if seed % 2:
        return _changed(seed, mutants.in_place, counts)
    choose = random.Random(seed)
    module, inputs = _chain(seed, choose)
    made = mutants.in_place(module, choose)
    problem = None if made is None else compare(made[0], inputs, MOVING if seed % 10 == 8 else STRICT, counts)
    return None if problem is None or made is None else f"{made[1]}\n{problem}"


def _changed(seed: int, change: Change, counts: Counts) -> str | None:
    number = seed // 25
    if number not in _originals:
        _originals.clear()
        _originals[number] = mutants.original(random.Random(number))
    choose = random.Random(seed)
    made = change(_originals[number], choose)
    if made is not None and choose.random() < 0.25:
        again = change(made[0], choose)
        made = made if again is None else (again[0], f"{made[1]}; {again[1]}")
    if made is None:
        counts["no graph"] += 1
        return None
    module, what = made
    problem = compare(module, mutants.inputs_of(module, seed), MOVING if seed % 10 == 9 else STRICT, counts)
    return None if problem is None else f"{what}\n{problem}"


KINDS: dict[str, Callable[[int, Counts], str | None]] = {
    "sites": one_of_sites,
    "chains": one_chain,
    "programs": one_program,
    "served": one_served,
    "mutants": one_mutant,
    "writings": one_writing,
    "silent": one_silent,
    "named": one_named,
    "in-place": one_in_place,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the first graph of each kind; the others count on")
    parser.add_argument("--minutes", type=float, default=600.0, help="of each kind at most")
    parser.add_argument("--show", type=int, default=5, help="failures printed in full")
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, help=f"how many {kind}")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    logging.disable(logging.ERROR)  # torch logs every mutant that is no graph
    random_sites.register()
    rows = ["| kind | graphs | no graph by itself | sites | fused | with their quantiser | failures | minutes |"]
    rows.append("| --- " * 8 + "|")
    failures = 0
    for kind, check in KINDS.items():
        counts: Counts = collections.Counter()
        begin, failed = time.monotonic(), 0
        with fake_world(WORLD):
            register_groups(WORLD)
            for seed in range(arguments.seed, arguments.seed + getattr(arguments, kind.replace("-", "_"))):
                if time.monotonic() - begin > arguments.minutes * 60:
                    break
                problem = check(seed, counts)
                if problem is not None:
                    failed += 1
                    shown = problem if failures + failed <= arguments.show else problem.splitlines()[0]
                    print(f"{kind} {seed}: {shown}\n", flush=True)
        if getattr(arguments, kind.replace("-", "_")):
            columns = [counts[name] for name in ("graphs", "no graph", "sites", "fused", "quantised")]
            row = [kind, *columns, failed, f"{(time.monotonic() - begin) / 60:.1f}"]
            rows.append("| " + " | ".join(map(str, row)) + " |")
        failures += failed
    print(f"torch {torch.__version__}, seed {arguments.seed}\n")
    print("\n".join(rows))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
