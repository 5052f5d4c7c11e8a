"""Sequence parallelism's op on the kernels against the all-reduce's op: every row's bits, the residual a rank's own."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import torch

from arfusion_pass.ops.schema import SCATTERING_OP
from arfusion_pass.ops.spec import NO_QUANT, Flags
from arfusion_pass.runtime import fallback
from tests.gpu.calls import Config, Shared, allocate, launch, rank_input, shared_inputs
from tests.gpu.harness import Env, case
from tests.gpu.suites.sharded import SPECS

SHARED_ROWS = frozenset({"allreduce_out", "residual_out"})
"""Outputs that hold a rank's own rows."""


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
        factor = self.shared.factor
        self.factor = factor if factor is None or factor.dim() == 0 else factor[self.own]
        self.wanted, self.result = allocate(config, env.device), allocate(config, env.device)
        share = dataclasses.replace(config, tokens=config.tokens // env.world)
        for name in SHARED_ROWS & self.wanted.buffers.keys():
            self.result.buffers[name] = allocate(share, env.device).buffers[name]

    def expect(self) -> None:
        launch(self.config, self.env, self.x, self.shared, self.wanted)

    def poison(self) -> None:
        for tensor in self.result.tensors():
            tensor.view(torch.uint8).fill_(0xFF)

    def run(self) -> None:
        shared: Shared = self.shared
        out = {name: buffer.tensor for name, buffer in self.result.buffers.items()}
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
            factor=self.factor,
            factor_value=shared.factor_value,
            **out,
        )

    def compare(self, where: str) -> None:
        for name, buffer in self.result.buffers.items():
            buffer.assert_guards(f"{where}: {name}")
            wanted = self.wanted[name][self.own] if name in SHARED_ROWS else self.wanted[name]
            differs = int((buffer.tensor.view(torch.uint8) != wanted.view(torch.uint8)).sum())
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
                    factor=("none", "rows", "none", "value")[number % 4] if first == "residual_out" else "none",
                ),
                count,
            )
        )  # fmt: skip
    return made


@contextlib.contextmanager
def fallbacks() -> Iterator[list[str]]:
    """The ops that the group's collectives run in place of the kernels, as they come."""
    names, run = [], fallback.run_reference

    def counted(op: str, arguments: dict) -> None:
        names.append(op)
        run(op, arguments)

    fallback.run_reference = counted
    try:
        yield names
    finally:
        fallback.run_reference = run


@case("scattering", "all")
def every_call(env: Env) -> None:
    """On the kernels, and not by the process group's collectives; in a graph as well."""
    made = calls(env)
    with fallbacks() as fell_back:
        for number, call in enumerate(made):
            call.expect()
            for again in range(3):
                call.poison()
                call.run()
                call.compare(f"call {number}, run {again}")
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
    if fell_back:
        env.problems.append(f"{len(fell_back)} of {3 * len(made)} calls did not run on the kernels")


@case("scattering", "collectives", worlds=(2,))
def between_collectives(env: Env) -> None:
    """A sum read beside its residual add: one kernel between the group's collectives, whose sum of two is ours."""
    made = []
    for number, spec in enumerate(SPECS):
        outputs = ("allreduce_out", "residual_out", "quant_out" if spec != NO_QUANT else "norm_out")
        made.append(
            Call(env, Config(48, 4096, torch.bfloat16, spec=spec, outputs=outputs, seed=number, residual="same"))
        )
    with fallbacks() as fell_back:
        for number, call in enumerate(made):
            call.expect()
            call.poison()
            call.run()
            call.compare(f"call {number}")
    if len(fell_back) != len(made):
        env.problems.append(f"{len(fell_back)} of {len(made)} calls ran on collectives")
