"""Chains of sites with a sharded residual, against the same calls replicated: every output's bits, whatever was in the
rows that a rank does not own."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from arfusion_pass.ops.spec import NO_QUANT, Bound, Flags, QuantFormat, QuantSpec, ScaleLayout, ScaleRound
from tests.gpu.calls import Config, allocate, launch, rank_input, shared_inputs
from tests.gpu.harness import Env, case

FP8 = QuantFormat.FP8
GROUP = QuantSpec(FP8, 128, ScaleLayout.COLUMN_TMA, bound_on=Bound.AMAX, bound=1e-10)
SPECS = (
    NO_QUANT,
    QuantSpec(FP8, 0),
    QuantSpec(FP8, -1),
    GROUP,
    dataclasses.replace(GROUP, layout=ScaleLayout.PACKED_UE8M0, scale_round=ScaleRound.POW2),
    QuantSpec(QuantFormat.INT8, -1),
    QuantSpec(QuantFormat.NVFP4, 16, ScaleLayout.SWIZZLED_128X4),
    QuantSpec(QuantFormat.MXFP8, 32, ScaleLayout.LINEAR),
)


def sites(length: int, tokens: int, hidden: int, dtype: torch.dtype, norms: bool = False) -> list[Config]:
    """A chain that goes through the quantisers; every third site also gives its norm if ``norms``."""
    made = []
    for number in range(length):
        spec = SPECS[number % len(SPECS)]
        norm = spec == NO_QUANT or (norms and number % 3 == 1)
        outputs = ("residual_out", *(("norm_out",) if norm else ()), *(("quant_out",) if spec != NO_QUANT else ()))
        made.append(Config(tokens, hidden, dtype, spec=spec, outputs=outputs, seed=number % 7))
    return made


class Chain:
    """Calls of which each takes the residual that the one before wrote; the same inputs for any strategy."""

    def __init__(self, env: Env, configs: list[Config], strategy: int, whole: bool):
        self.env, self.strategy = env, strategy
        self.inputs = [(rank_input(c, env.rank, env.device), shared_inputs(c, env.device)) for c in configs]
        self.results = [allocate(c, env.device) for c in configs]
        marks = [Flags.RESIDUAL_IN_SHARDED | Flags.RESIDUAL_OUT_SHARDED] * len(configs)
        marks[0] &= ~Flags.RESIDUAL_IN_SHARDED
        marks[-1] &= ~Flags.RESIDUAL_OUT_SHARDED
        self.configs = [
            dataclasses.replace(c, flags=c.flags | int(m) | strategy) for c, m in zip(configs, marks, strict=True)
        ]
        if not whole:  # the last residual is read by nobody
            del self.results[-1].buffers["residual_out"]
        for (_, shared), before in zip(self.inputs[1:], self.results, strict=False):
            shared.residual = before["residual_out"]

    def poison(self) -> None:
        """NaN wherever a call is to write, codes and scales as bytes."""
        for result in self.results:
            for tensor in result.tensors():
                tensor.view(torch.uint8).fill_(0xFF)

    def run(self) -> None:
        for config, (x, shared), result in zip(self.configs, self.inputs, self.results, strict=True):
            launch(config, self.env, x, shared, result)

    def outputs(self) -> list[torch.Tensor]:
        """What is defined on every rank: all but the residuals inside the chain."""
        last = len(self.results) - 1
        return [
            buffer.tensor.clone()
            for number, result in enumerate(self.results)
            for name, buffer in result.buffers.items()
            if name != "residual_out" or number == last
        ]


def compare(env: Env, configs: list[Config], whole: bool = True, runs: int = 2) -> None:
    """Two-shot, then sharded several times over poison; the bits must not differ, on any rank."""
    wanted = Chain(env, configs, int(Flags.TWOSHOT), whole)
    chain = Chain(env, configs, int(Flags.SHARDED), whole)
    wanted.poison()
    wanted.run()
    first = wanted.outputs()
    for number in range(runs):
        chain.poison()
        chain.run()
        got = chain.outputs()
        env.same(*got)
        for index, (a, b) in enumerate(zip(got, first, strict=True)):
            differs = int((a.view(torch.uint8) != b.view(torch.uint8)).sum())
            if differs:
                where = f"run {number}, output {index}"
                env.problems.append(f"{where}: {differs} bytes differ in {configs[0]}, {len(configs)} sites")


@case("sharded", "chains")
def chains(env: Env) -> None:
    for dtype, (tokens, hidden) in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), ((1, 4096), (7, 2048), (64, 3584), (300, 4096), (33, 16384))
    ):
        compare(env, sites(10, tokens, hidden, dtype, norms=True))
        compare(env, sites(3, tokens, hidden, dtype), whole=False)
    compare(env, sites(2, 5, 2048, torch.bfloat16))
    compare(env, sites(80, 130, 2048, torch.bfloat16, norms=True))


@case("sharded", "narrow")
def narrow(env: Env) -> None:
    """Rows whose last 32 vectors are few, with codes that have marks: INT8, e2m1, unclamped e4m3."""
    int8, nvfp4, unclamped = QuantSpec(QuantFormat.INT8, -1), SPECS[6], QuantSpec(FP8, 0, clamp=False)
    rows = ((8, (int8, unclamped)), (24, (int8, unclamped)), (264, (int8, unclamped)), (272, (int8, nvfp4)))
    for dtype, (hidden, specs) in itertools.product((torch.bfloat16, torch.float16, torch.float32), rows):
        configs = [
            Config(9, hidden, dtype, spec=specs[number % 2], outputs=("residual_out", "quant_out"), seed=number)
            for number in range(6)
        ]
        compare(env, configs)


@case("sharded", "prefill")
def prefill(env: Env) -> None:
    """Several rows a CTA, CTAs that only push, and more than one piece."""
    for tokens, hidden in ((2049, 4096), (1023, 7168), (2048, 8192), (9000, 7168)):
        compare(env, sites(8, tokens, hidden, torch.bfloat16), runs=1)


@case("sharded", "graphs")
def graphs(env: Env) -> None:
    """A captured chain, replayed over new inputs and new poison, with calls of other strategies in between."""
    configs = sites(9, 70, 4096, torch.bfloat16)
    chain, wanted = (Chain(env, configs, int(flag), True) for flag in (Flags.SHARDED, Flags.TWOSHOT))
    one = Chain(env, sites(2, 9, 2048, torch.bfloat16), int(Flags.ONESHOT), True)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        chain.run()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        chain.run()
        one.run()
        chain.run()
        graph.capture_end()
    torch.cuda.synchronize()
    for number in range(4):
        for (x, _), (other, _), config in zip(chain.inputs, wanted.inputs, configs, strict=True):
            fresh = dataclasses.replace(config, seed=100 * number + config.seed)
            x.copy_(rank_input(fresh, env.rank, env.device))
            other.copy_(x)
        first = shared_inputs(dataclasses.replace(configs[0], seed=number), env.device).residual
        assert first is not None
        for _, shared in (chain.inputs[0], wanted.inputs[0]):
            assert shared.residual is not None
            shared.residual.copy_(first)
        chain.poison()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.replay()
        torch.cuda.synchronize()
        wanted.run()
        got = chain.outputs()
        env.same(*got)
        for a, b in zip(got, wanted.outputs(), strict=True):
            if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                env.problems.append(f"replay {number} differs from two-shot")
