"""Sequence parallelism's op on the kernels against the all-reduce's op: every row's bits, the residual a rank's own."""

from __future__ import annotations

import itertools
import os

import torch

from arfusion_pass.ops.schema import SCATTERING_OP
from arfusion_pass.ops.spec import NO_QUANT, Flags
from arfusion_pass.runtime import scattering
from tests.gpu.calls import Config, Result, Shared, allocate, launch, rank_input, shared_inputs
from tests.gpu.harness import Env, case
from tests.gpu.suites.sharded import SPECS


class Call:
    """The op on one rank's rows of the residual, and what the all-reduce's op makes of the whole."""

    def __init__(self, env: Env, config: Config):
        self.env, self.config = env, config
        rows = config.tokens // env.world
        self.own = slice(env.rank * rows, (env.rank + 1) * rows)
        self.x, self.shared = rank_input(config, env.rank, env.device), shared_inputs(config, env.device)
        self.wanted, self.result = allocate(config, env.device), allocate(config, env.device)
        self.rows = {name: torch.empty_like(self.wanted[name][self.own]) for name in self.scattered(self.wanted)}

    @staticmethod
    def scattered(result: Result) -> list[str]:
        return [name for name in ("allreduce_out", "residual_out") if name in result.buffers]

    def expect(self) -> None:
        launch(self.config, self.env, self.x, self.shared, self.wanted)

    def run(self) -> None:
        shared: Shared = self.shared
        out = {name: buffer.tensor for name, buffer in self.result.buffers.items()} | self.rows
        getattr(torch.ops.arfusion, SCATTERING_OP)(
            self.x,
            None if shared.residual is None else shared.residual[self.own],
            shared.weight,
            shared.scale,
            self.env.group_name,
            self.config.epsilon,
            self.config.weight_bias,
            int(self.config.flags),
            self.config.spec.pack(),
            self.config.spec.bound,
            shared.scale_value,
            **out,
        )

    def compare(self, where: str) -> None:
        for name, buffer in self.result.buffers.items():
            wanted = self.wanted[name][self.own] if name in self.rows else self.wanted[name]
            got = self.rows.get(name, buffer.tensor)
            differs = int((got.view(torch.uint8) != wanted.view(torch.uint8)).sum())
            if differs:
                self.env.problems.append(f"{where}: {differs} bytes of {name} differ in {self.config}")


def calls(env: Env) -> list[Call]:
    """Every quantiser with and without a residual, and a norm beside codes."""
    made = []
    shapes = ((2, 4096), (8, 2048), (130, 3584), (640, 7168), (2048, 4096), (48, 16384))
    for number, ((tokens, hidden), spec) in enumerate(itertools.product(shapes, SPECS)):
        tokens = (tokens + env.world - 1) // env.world * env.world
        first = "residual_out" if number % 3 else "allreduce_out"
        norm = spec == NO_QUANT or number % 4 == 1
        outputs = (first, *(("norm_out",) if norm else ()), *(("quant_out",) if spec != NO_QUANT else ()))
        made.append(
            Call(
                env,
                Config(
                    tokens, hidden, (torch.bfloat16, torch.float16)[number % 2], spec=spec, outputs=outputs,
                    seed=number,
                    residual="same" if number % 3 else "none", weight_bias=float(number % 5 == 0),
                    flags=int(Flags.UNROUNDED_SUM) if number % 7 == 1 else 0,
                ),
            )
        )  # fmt: skip
    return made


@case("scattering", "all")
def every_call(env: Env) -> None:
    """On the kernels, and not by the process group's collectives."""
    before = os.environ.get(scattering.VARIABLE)
    os.environ[scattering.VARIABLE] = "1"
    ran = 0
    run = scattering.run

    def counted(arguments: dict) -> bool:
        nonlocal ran
        done = run(arguments)
        ran += done
        return done

    scattering.run = counted
    try:
        made = calls(env)
        for number, call in enumerate(made):
            call.expect()
            for again in range(3):
                for tensor in (*call.result.tensors(), *call.rows.values()):
                    tensor.view(torch.uint8).fill_(0xFF)
                call.run()
                call.compare(f"call {number}, run {again}")
        if ran != 3 * len(made):
            env.problems.append(f"{ran} of {3 * len(made)} calls ran on the kernels")
        graph = torch.cuda.CUDAGraph()
        some = made[::5]
        torch.cuda.synchronize()
        env.barrier()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for call in some:
                call.run()
        for replay in range(5):
            for call in some:
                for tensor in (*call.result.tensors(), *call.rows.values()):
                    tensor.view(torch.uint8).fill_(0xFF)
            graph.replay()
            torch.cuda.synchronize()
            for number, call in enumerate(some):
                call.compare(f"replay {replay}, call {number}")
    finally:
        scattering.run = run
        if before is None:
            del os.environ[scattering.VARIABLE]
        else:
            os.environ[scattering.VARIABLE] = before
