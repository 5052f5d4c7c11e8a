"""CUDA graphs: alternating shapes and strategies in one, several replayed in any order, inputs changed in between."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from arfusion_pass.ops import marks
from arfusion_pass.ops.spec import Flags, QuantFormat, QuantSpec
from arfusion_pass.runtime import workspace
from tests.gpu.calls import (
    Config,
    Result,
    Shared,
    allocate,
    launch,
    rank_input,
    run,
    shared_inputs,
    verify,
    with_strategy,
)
from tests.gpu.compare import assert_bits
from tests.gpu.harness import Env, case


class Captured:
    """Some calls in one graph, with static inputs that :meth:`refill` changes."""

    def __init__(self, env: Env, configs: list[Config]):
        self.env, self.configs = env, configs
        self.inputs = [rank_input(c, env.rank, env.device) for c in configs]
        self.shared: list[Shared] = [shared_inputs(c, env.device) for c in configs]
        self.results: list[Result] = [allocate(c, env.device) for c in configs]
        self.graph = capture(self._launch_all)

    def _launch_all(self) -> None:
        for config, x, shared, result in zip(self.configs, self.inputs, self.shared, self.results, strict=True):
            launch(config, self.env, x, shared, result)

    def refill(self, seed: int) -> None:
        self.configs = [dataclasses.replace(c, seed=seed * 1000 + n) for n, c in enumerate(self.configs)]
        for config, x, shared in zip(self.configs, self.inputs, self.shared, strict=True):
            x.copy_(rank_input(config, self.env.rank, self.env.device))
            fresh = shared_inputs(config, self.env.device)
            for old, new in ((shared.residual, fresh.residual), (shared.weight, fresh.weight)):
                if old is not None and new is not None:
                    old.copy_(new)

    def verify(self, numbers: range | None = None) -> None:
        for number, (config, result) in enumerate(zip(self.configs, self.results, strict=True)):
            self.env.same(*result.tensors())
            if self.env.checker(number):
                verify(config, self.env, result)


def capture(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """``work`` as a graph, after one eager run (a first use inside a capture is an error)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    torch.cuda.synchronize()
    return graph


def _mixed(count: int, seed: int) -> list[Config]:
    generator = torch.Generator().manual_seed(seed)
    configs = []
    for number in range(count):
        tokens = (1, 2, 5, 16, 64, 200, 1000)[int(torch.randint(0, 7, (), generator=generator))]
        hidden = (2880, 4096, 7168)[int(torch.randint(0, 3, (), generator=generator))]
        strategy = ("oneshot", "twoshot", "auto")[number % 3]
        spec = (QuantSpec(), QuantSpec(QuantFormat.FP8, -1), QuantSpec(QuantFormat.FP8, 32))[number % 3]
        outputs = ("residual_out", "norm_out", *(("quant_out",) if number % 3 else ()))
        config = with_strategy(Config(tokens, hidden, spec=spec, outputs=outputs, seed=seed * 100 + number), strategy)
        configs.append(config)
    return configs


@case("graphs", "alternating", worlds=(2, 3, 4))
def alternating_shapes_and_strategies(env: Env) -> None:
    captured = Captured(env, _mixed(24, 1))
    for seed in range(6):
        captured.refill(seed)
        for _ in range(1 + seed % 3):
            captured.graph.replay()
        captured.verify()


@case("graphs", "several", worlds=(2, 3, 4))
def several_graphs_in_any_order(env: Env) -> None:
    """Three graphs of different lengths and eager calls between them, in an order that the ranks agree on."""
    graphs = [Captured(env, _mixed(count, 10 + count)) for count in (1, 5, 8)]
    generator = torch.Generator().manual_seed(3)
    for step in range(30):
        chosen = graphs[int(torch.randint(0, 3, (), generator=generator))]
        chosen.refill(step)
        chosen.graph.replay()
        if step % 4 == 0:
            run(Config(step + 1, 4096, seed=step), env)
        if step % 5 == 0:
            chosen.verify()
    for captured in graphs:
        captured.graph.replay()
        captured.verify()


@case("graphs", "pdl-chain", worlds=(2, 3, 4))
def producers_and_consumers(env: Env) -> None:
    """A producer writes x and the residual right before each call and a consumer reads the outputs right after it.

    With programmatic dependent launch on, off and triggered early, every kernel has to wait for what it reads.
    """
    for flags in (0, int(Flags.NO_PDL), int(Flags.TRIGGER_EARLY)):
        for strategy in ("oneshot", "twoshot"):
            config = with_strategy(Config(48, 4096, flags=flags, seed=5), strategy)
            x, shared = rank_input(config, env.rank, env.device), shared_inputs(config, env.device)
            weight = shared.weight
            assert weight is not None
            steps = 8
            static, results, sums = torch.empty_like(x), [allocate(config, env.device) for _ in range(steps)], []

            def chain(
                config=config, x=x, shared=shared, weight=weight, static=static, results=results, sums=sums
            ) -> None:
                sums.clear()
                residual = shared.residual.clone()
                for step, result in enumerate(results):
                    torch.mul(x, 1.0 + 0.25 * step, out=static)  # producer
                    gamma = weight * (1.0 + step)  # a gamma computed in the graph
                    launch(config, env, static, Shared(residual, gamma, None, 1.0), result)
                    sums.append(result["norm_out"].float() * 1.0)  # consumer
                    residual = result["residual_out"]

            graph = capture(chain)
            for _ in range(5):
                graph.replay()
            torch.cuda.synchronize()
            got = [tensor.clone() for tensor in sums]
            flags_off = Config(48, 4096, flags=int(Flags.NO_PDL), seed=5)
            residual = shared.residual
            for step in range(steps):
                result = allocate(flags_off, env.device)
                y = x * (1.0 + 0.25 * step)
                torch.cuda.synchronize()
                launch(flags_off, env, y, Shared(residual, weight * (1.0 + step), None, 1.0), result)
                torch.cuda.synchronize()
                assert_bits(f"step {step}, flags {flags:#x}, {strategy}", got[step], result["norm_out"].float())
                residual = result["residual_out"]
            env.same(*got)


@case("graphs", "compiled", worlds=(1, 2, 3, 4))
def under_torch_compile(env: Env) -> None:
    """The op inside torch.compile, plain and with CUDA graphs, gives the eager op's bits; opcheck's schema test."""
    config = Config(32, 4096, seed=9)
    x, shared = rank_input(config, env.rank, env.device), shared_inputs(config, env.device)
    name = env.group_name

    def model(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual_out, norm_out = torch.empty_like(x), torch.empty_like(x)
        op = torch.ops.arfusion.allreduce_rms_norm
        op(x * 2, residual, weight, None, name, residual_out=residual_out, norm_out=norm_out)
        return residual_out + 1, norm_out

    want = model(x, shared.residual, shared.weight)
    for options in ({}, {"mode": "reduce-overhead"}):
        compiled = torch.compile(model, fullgraph=True, **options)
        for _ in range(4):
            got = [tensor.clone() for tensor in compiled(x, shared.residual, shared.weight)]
        assert_bits("norm", got[1], want[1])
        assert_bits("residual", got[0], want[0])
        env.same(*got)


@case("graphs", "first-call-warms-up", worlds=(2, 3, 4))
def first_call_warms_up(env: Env) -> None:
    """A group's first call is in a step that torch warms up for a CUDA graph: the workspace lies outside its pool."""
    x = torch.full((8, 4096), float(env.rank + 1), dtype=torch.bfloat16, device=env.device)
    other = torch.distributed.new_group(list(range(env.world)))

    def model(x: torch.Tensor) -> torch.Tensor:
        norm_out = torch.empty_like(x)
        torch.ops.arfusion.allreduce_rms_norm(x * 2, None, None, None, other.group_name, norm_out=norm_out)
        return norm_out + 1

    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled(x).clone()
    assert_bits("norm", got, torch.full_like(x, 2.0))
    torch.cuda.synchronize()
    env.barrier()
    workspace.destroy(other.group_name)


@case("graphs", "marks", worlds=(2, 3, 4))
def ranks_compare_their_marks(env: Env) -> None:
    """A new mark is compared inside a capture as outside; where ranks differ, each raises and none waits."""
    config = Config(8, 4096)
    want = run(config, env).snapshot()
    torch.cuda.synchronize()
    steps = [marks.Step(True, "bfloat16 [..., 4096]", "all_reduce")]
    marked = dataclasses.replace(config, flags=config.flags | marks.mark_of(steps) << marks.MARK_SHIFT)
    x, shared = rank_input(config, env.rank, env.device), shared_inputs(config, env.device)
    result = allocate(config, env.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        launch(marked, env, x, shared, result)
    for _ in range(3):
        graph.replay()
    for name, tensor in want.items():
        assert_bits(name, result[name], tensor)
    mine = [*steps, marks.Step(env.rank != 0, "", "all_reduce_1: another reads it")]
    marks.remember(env.group_name, marks.mark_of(mine), mine)
    differing = dataclasses.replace(config, flags=config.flags | marks.mark_of(mine) << marks.MARK_SHIFT)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"do not run one graph: .*rank 0: missed, all_reduce_1: "):
            launch(differing, env, x, shared, result)
    verify(config, env, run(config, env))
