"""Start the ranks, compile the model without and with the pass, compare, and say whether everything held.

:func:`main` is ``arfusion demo``. Every rank compiles and checks its own sites; rank 0 writes the text; any rank's
complaint makes the exit status 1.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

import arfusion_pass
from arfusion_pass.config import Backend
from arfusion_pass.demo.model import Decoder, ModelConfig, Norm, initialise, parallelize
from arfusion_pass.demo.text import Comparison, comparison_table, section
from arfusion_pass.inspection import replay
from arfusion_pass.inspection.graph_diff import graph_diff
from arfusion_pass.inspection.html import diff_page
from arfusion_pass.inspection.replay import SiteCheck
from arfusion_pass.reporting.reports import Reports

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ERROR_RATIO = 1.1
"""How much larger the fused model's error may be than the unfused one's (the exact contract for whole models)."""

STEPS = 20
"""How many steps are timed, for their median."""

Logits = torch.Tensor
Compiled = Callable[[torch.Tensor], Logits]


@dataclasses.dataclass(frozen=True)
class Options:
    """What ``arfusion demo`` was asked for; see ``arfusion demo --help``."""

    layers: int = 2
    hidden: int = 256
    tokens: int = 32
    batch: int = 1
    dtype: str = "bfloat16"
    norm: Norm = "llama"
    epsilon: float = 1e-6
    world: int = 2
    device: str = "auto"
    backend: Backend = "auto"
    dynamic: bool = False
    diff: bool = False
    html: str | None = None
    seed: int = 0

    @property
    def use_cuda(self) -> bool:
        """Whether the ranks run on GPUs (one each, NCCL) or on the CPU (gloo)."""
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.device_count() >= self.world)


@dataclasses.dataclass
class Result:
    """What one rank found."""

    text: list[str] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)


def main(options: Options) -> int:
    """Run the demo and print its findings; the exit status: 0 if every site was fused and exact, else 1.

    Raises:
        ValueError: if the options ask for what cannot be, such as more GPUs than there are.
    """
    if options.device == "cuda" and torch.cuda.device_count() < options.world:
        raise ValueError(f"--device cuda --world {options.world}: {torch.cuda.device_count()} GPU(s) visible")
    if options.backend in ("native", "flashinfer") and not options.use_cuda:
        raise ValueError(f"--backend {options.backend} runs on GPUs, and this demo on {options.world} CPU processes")
    if options.world < 2:
        raise ValueError(f"--world {options.world}: tensor parallelism needs at least two ranks")
    if options.dynamic and options.tokens < 2:
        raise ValueError(
            "--dynamic --tokens 1: torch.compile never makes a dimension of size 1 dynamic; take two or more"
        )
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="arfusion-demo-") as folder:
        # Before a rank's torch is imported, which warns of a missing NumPy and of drivers: nothing to the demo.
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        others = set(multiprocessing.active_children())
        try:
            mp.spawn(_rank_main, (options, folder), nprocs=options.world)
        finally:  # nobody waits for a rank that waits for another
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
                process.join()
        results = [Result(**json.loads(_result_path(folder, rank).read_text())) for rank in range(options.world)]
    print("\n".join(results[0].text))
    failures = list(dict.fromkeys(failure for result in results for failure in result.failures))
    seconds = f"{time.monotonic() - start:.0f} s"
    if failures:
        print(section("FAILED") + "\n".join(f"* {failure}" for failure in failures) + f"\n({seconds})")
        return 1
    print(section("PASSED") + f"All sites are fused and exact, on all {options.world} ranks ({seconds}).")
    return 0


def _result_path(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.json"


def _rank_main(rank: int, options: Options, folder: str) -> None:
    """One rank's process: set up, run, write the result."""
    warnings.filterwarnings("ignore", category=UserWarning)
    if options.use_cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.world))
    backend = "nccl" if options.use_cuda else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=options.world)
    try:
        result = _Demo(options, rank).run()
    finally:
        dist.destroy_process_group()
    _result_path(folder, rank).write_text(json.dumps(dataclasses.asdict(result)))


class _Demo:
    """The steps of one rank."""

    def __init__(self, options: Options, rank: int) -> None:
        self.options = options
        self.rank = rank
        self.device = torch.device("cuda", rank) if options.use_cuda else torch.device("cpu")
        self.result = Result()
        config = ModelConfig.for_ranks(options.world, options.layers, options.hidden, options.norm, options.epsilon)
        whole = Decoder(config)
        initialise(whole, options.seed)
        whole = whole.to(self.device, DTYPES[options.dtype]).eval().requires_grad_(False)
        # fp32 has nothing above it but fp64
        self.exact = copy.deepcopy(whole).to(torch.float64 if options.dtype == "float32" else torch.float32)
        mesh = init_device_mesh(self.device.type, (options.world,))
        self.model = parallelize(whole, mesh)
        self.expected_sites = 2 * options.layers + 1
        self.ids = [self._ids(tokens, config.vocab) for tokens in (options.tokens, options.tokens // 2 + 3)]

    def run(self) -> Result:
        """Everything, in the order in which it is printed."""
        self._say(self._headline())
        # Not taking shapes from an earlier run's profile: the same graph in every run.
        with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_local_pgo=False):
            eager = self.model(self.ids[0])
            compiled = self._compile("without the pass", mark=self.options.dynamic)
            unfused = compiled(self.ids[0])
            unfused_step = self._step(compiled)
            fused, reports, checks = self._fused("with the pass", mark=self.options.dynamic)
            self._expect_all_fused(reports)
            self._print_graphs(reports, checks)
            self._say(section("Each fused site against its subgraph, run eagerly") + comparison_table(checks))
            exact = self.exact(self.ids[0])
            self._whole_model(
                Comparison.of("unfused, eager", eager, exact),
                Comparison.of("unfused, compiled", unfused, exact),
                Comparison.of("fused, compiled", fused, exact),
            )
            self._summary(reports, checks, unfused_step, self._fused_step())
            if self.options.dynamic:
                self._say(section("torch.compile(dynamic=True), whose epsilon is a graph input"))
                fused, reports, _ = self._fused("with dynamic=True", dynamic=True)
                self._expect_all_fused(reports)
                self._say(str(reports))
                self._expect_accurate(
                    Comparison.of("unfused, eager", eager, exact), Comparison.of("with dynamic=True", fused, exact)
                )
        return self.result

    def _fused(
        self, what: str, *, mark: bool = False, dynamic: bool | None = None
    ) -> tuple[Logits, Reports, list[SiteCheck]]:
        """Compile with the pass, run, check every fused site on what it was given."""
        known = len(arfusion_pass.reports())
        with replay.recording() as recorded:
            compiled = self._compile(what, mark=mark, dynamic=dynamic, options=self._inductor_options())
            logits = compiled(self.ids[0])
            if self.options.dynamic:
                compiled(self.ids[1])
        reports = Reports(arfusion_pass.reports()[known:])
        checks = recorded.checks()
        calls = (2 if self.options.dynamic else 1) * reports.matched_count
        if len(checks) != calls:
            self._fail(f"{what}: {reports.matched_count} sites were fused, {len(checks)} of {calls} calls were checked")
        for check in checks:
            if not check.ok:
                self._fail(f"{what}: rank {self.rank}, site {check.site.name} is not exact: {check.detail}")
        return logits, reports, checks

    def _fused_step(self) -> float:
        """Milliseconds of a step of the model compiled with the pass and nothing that watches it."""
        compiled = self._compile("with the pass, to time it", options=self._inductor_options())
        compiled(self.ids[0])
        return self._step(compiled)

    def _step(self, compiled: Compiled) -> float:
        """Milliseconds of one step of a compiled model: the median of some."""
        times = []
        for _ in range(STEPS):
            self._synchronise()
            begin = time.perf_counter()
            compiled(self.ids[0])
            self._synchronise()
            times.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(times)

    def _synchronise(self) -> None:
        if self.options.use_cuda:
            torch.cuda.synchronize()
        dist.barrier()

    def _summary(self, reports: Reports, checks: list[SiteCheck], unfused: float, fused: float) -> None:
        """The small table that everything ends with."""
        sites = len(reports.fused) + len(reports.missed)
        rows = [
            ("sites fused", f"{reports.matched_count} of {sites}"),
            ("calls exact", f"{sum(check.ok for check in checks)} of {len(checks)}"),
            ("a step, unfused", f"{unfused:.2f} ms"),
            ("a step, fused", f"{fused:.2f} ms"),
        ]
        text = "\n".join(f"{name:<16}  {value}" for name, value in rows)
        slow = "" if self.options.use_cuda else "\n(on the CPU the fused ops are torch ops: correct, and no faster)"
        self._say(section("Summary") + text + slow)

    def _inductor_options(self) -> dict[str, Any]:
        return arfusion_pass.inductor_options(arfusion_pass.FusionConfig(backend=self.options.backend))

    def _compile(self, what: str, *, mark: bool = False, **compile_options: Any) -> Compiled:
        """torch.compile the model afresh. The compilation itself happens on the first call."""
        torch.compiler.reset()
        if mark:
            for ids in self.ids:
                torch._dynamo.mark_dynamic(ids, 1)
        if self.rank == 0:
            print(f"compiling {what} ...", file=sys.stderr, flush=True)
        return torch.compile(self.model, **compile_options)

    def _expect_all_fused(self, reports: Reports) -> None:
        for site in reports.missed:
            self._fail(f"{site.name} was not fused: {site.reason}")
        if reports.matched_count != self.expected_sites:
            self._fail(f"{reports.matched_count} sites were fused, expected {self.expected_sites} (2 * layers + 1)")

    def _print_graphs(self, reports: Reports, checks: list[SiteCheck]) -> None:
        self._say(section("Report") + str(reports))
        for report in reports:
            if self.options.diff and report.before and report.after:
                self._say(
                    section("Graph before and after the pass") + graph_diff(report.before, report.after, context=1)
                )
        if self.options.html and self.rank == 0:
            page = diff_page(reports, replays=replay.verdicts(reports, checks))
            try:
                Path(self.options.html).write_text(page, encoding="utf-8")
                self._say(f"diff page: {self.options.html}")
            except OSError as error:  # what was found all the same is printed
                self._fail(f"the page {self.options.html} cannot be written: {error.strerror}")

    def _whole_model(self, eager: Comparison, compiled: Comparison, fused: Comparison) -> None:
        reference = "fp64" if self.options.dtype == "float32" else "fp32"
        lines = [f"{'':<20}  relative RMS error  largest error"]
        lines += [f"{each.name:<20}  {each.error:>18.3e}  {each.largest:>13.3e}" for each in (eager, compiled, fused)]
        ratio = self._expect_accurate(eager, fused)
        lines.append(f"fused / unfused eager: {ratio:.3f} (at most {ERROR_RATIO})")
        self._say(section(f"Logits against an unsharded {reference} model, run eagerly") + "\n".join(lines))

    def _expect_accurate(self, unfused: Comparison, fused: Comparison) -> float:
        """How many times the unfused model's error the fused one's is."""
        ratio = fused.error / unfused.error if unfused.error else math.inf if fused.error else 1.0
        if not ratio <= ERROR_RATIO:
            self._fail(f"rank {self.rank}: the error {fused.name} is {ratio:.3f} times the unfused model's")
        return ratio

    def _headline(self) -> str:
        options, count = self.options, self.options.world
        where = (
            f"{count} GPUs ({torch.cuda.get_device_name()}), NCCL"
            if options.use_cuda
            else f"{count} CPU processes, gloo"
        )
        shape = f"{options.layers} layers, hidden {options.hidden}, {options.norm} norms, {options.dtype}"
        tokens = f"{options.batch} x {options.tokens}{' (dynamic)' if options.dynamic else ''} tokens"
        return f"arfusion demo: torch {torch.__version__}, {where}\nmodel: {shape}; {tokens}"

    def _ids(self, tokens: int, vocab: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.options.seed)
        return torch.randint(0, vocab, (self.options.batch, tokens), generator=generator).to(self.device)

    def _say(self, text: str) -> None:
        self.result.text.append(text)

    def _fail(self, text: str) -> None:
        self.result.failures.append(text)
