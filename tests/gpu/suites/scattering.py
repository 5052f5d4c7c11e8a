"""Sequence parallelism's op on the kernels against the all-reduce's op: every row's bits, the residual a rank's own."""

from __future__ import annotations

import itertools

import torch

from arfusion_pass.ops.schema import SCATTERING_OP
from arfusion_pass.ops.spec import NO_QUANT, Flags
from arfusion_pass.runtime import scattering
from tests.gpu.calls import Config, Result, Shared, allocate, launch, rank_input, shared_inputs
from tests.gpu.harness import Env, case
from tests.gpu.suites.sharded import SPECS


class Call:
    """The op on one rank's rows of the residual, and what the all-reduce's op makes of the whole."""

    def __init__(self, env: Env, config: Config, count: int = 1):
        """``count``: blocks of a rank."""
        self.env, self.config = env, config
        self.block = config.tokens // env.world // count
        self.own = torch.arange(config.tokens, device=env.device) // self.block % env.world == env.rank
        self.x, self.shared = rank_input(config, env.rank, env.device), shared_inputs(config, env.device)
        self.residual = None if self.shared.residual is None else self.shared.residual[self.own]
        addend = self.shared.addend
        self.addend = addend if addend is None or addend.dim() == 1 else addend[self.own]
        self.wanted, self.result = allocate(config, env.device), allocate(config, env.device)
        self.rows = {name: torch.empty_like(self.wanted[name][self.own]) for name in self.scattered(self.wanted)}

    @staticmethod
    def scattered(result: Result) -> list[str]:
        return [name for name in ("allreduce_out", "residual_out") if name in result.buffers]

    def expect(self) -> None:
        launch(self.config, self.env, self.x, self.shared, self.wanted)

    def poison(self) -> None:
        for tensor in (*self.result.tensors(), *self.rows.values()):
            tensor.view(torch.uint8).fill_(0xFF)

    def run(self) -> None:
        shared: Shared = self.shared
        out = {name: buffer.tensor for name, buffer in self.result.buffers.items()} | self.rows
        getattr(torch.ops.arfusion, SCATTERING_OP)(
            self.x,
            self.residual,
            shared.weight,
            shared.scale,
            self.env.group_name,
            self.config.epsilon,
            self.config.weight_bias,
            int(self.config.flags),
            self.config.spec.pack(),
            self.config.spec.bound,
            shared.scale_value,
            self.block,
            addend=self.addend,
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
    shapes = (
        (2, 4096),
        (24, 2048),
        (132, 3584),
        (640, 7168),
        (2048, 4096),
        (48, 16384),
        (12000, 7168),
    )  # the last in pieces
    for number, ((tokens, hidden), spec) in enumerate(itertools.product(shapes, SPECS)):
        count = 3 if number % 4 == 3 and tokens % 12 == 0 else 1
        tokens = (tokens + env.world * count - 1) // (env.world * count) * env.world * count
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
                    addend=("none", "none", "row", "none", "rows")[number % 5] if number % 3 else "none",
                ),
                count,
            )
        )  # fmt: skip
    return made


@case("scattering", "all")
def every_call(env: Env) -> None:
    """On the kernels, and not by the process group's collectives; in a graph as well."""
    ran, run = 0, scattering.run

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
                call.poison()
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
                call.poison()
            graph.replay()
            torch.cuda.synchronize()
            for number, call in enumerate(some):
                call.compare(f"replay {replay}, call {number}")
    finally:
        scattering.run = run
