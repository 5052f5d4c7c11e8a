"""Random calls without end: shapes, dtypes, epilogues, strategies, streams and rank skew, in graphs and outside.

A round draws some calls, each with several inputs, and checks every one against the reference (``calls.verify``). Then
it repeats them thousands of times, in a CUDA graph over two streams and as eager calls on random streams between its
replays, while a random rank is late now and then. Inputs change from replay to replay; outputs are poisoned before a
call and compared on the device, guards included, with what was verified. ``python -m tests.gpu.soak`` says how long and
from which seed; under pytest it takes a minute.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from functools import partial

import torch

from arfusion_pass.ops.spec import NO_QUANT, Flags
from tests.gpu.calls import (
    Config,
    Result,
    allocate,
    launch,
    rank_input,
    reduced_reference,
    shared_inputs,
    verify_epilogue,
    with_strategy,
)
from tests.gpu.compare import POISON
from tests.gpu.harness import Env, case
from tests.gpu.suites.epilogues import SPECS

OPERATIONS = int(os.environ.get("ARFUSION_SOAK_OPERATIONS", "10000000"))
SECONDS = float(os.environ.get("ARFUSION_SOAK_SECONDS", "60"))
SEED = int(os.environ.get("ARFUSION_SOAK_SEED", "1"))

CALLS = 12  # of a round
INPUTS = 3  # of a call
REPLAYS = 4000  # of a round
MOST_BYTES = 8 << 20  # of a message


def draw(generator: random.Random) -> Config:
    """A call that the kernels take."""
    dtype = generator.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))
    hidden = generator.choice((512, 1024, 2304, 2880, 3584, 4096, 5120, 7168, 8192, 16384))
    most = min(2048, MOST_BYTES // (hidden * dtype.itemsize))
    tokens = min(most, max(1, round(2 ** generator.uniform(0, 11))))
    spec = generator.choice(SPECS)
    weight = generator.choice(("same", "same", "none", "fp32"))
    residual = generator.choice(("same", "same", "none", "fp32"))
    flags = generator.choice((0, 0, int(Flags.UNROUNDED_SUM), int(Flags.ROUND_BEFORE_WEIGHT)))
    if residual == "fp32":
        flags |= int(Flags.UNROUNDED_SUM)
    # Where the reference rounds a step before the codes, codes of an unrounded norm have no one right value.
    if (spec.group > 0 and hidden % spec.group) or (spec.unrounded and flags & Flags.ROUND_BEFORE_WEIGHT):
        spec = NO_QUANT
    outputs = [name for name in ("allreduce_out", "residual_out") if generator.random() < 0.6] + ["norm_out"]
    if spec.pack():
        outputs.append("quant_out")
    config = Config(
        tokens, hidden, dtype, residual, weight, 0.0 if weight == "none" else generator.choice((0.0, 0.0, 1.0)),
        flags=flags, spec=spec, outputs=tuple(outputs), norm_fp32=spec.unrounded, seed=generator.randrange(1 << 20),
    )  # fmt: skip
    return with_strategy(config, generator.choice(("auto", "oneshot", "twoshot")))


class Repeated:
    """A call with its pool of inputs, and the verified outputs for each, guards around them included, in one piece."""

    def __init__(self, env: Env, config: Config, number: int):
        self.env, self.config = env, config
        self.shared, self.result = shared_inputs(config, env.device), allocate(config, env.device)
        self.arena = arena_of(self.result)
        # Only x differs from input to input: residual and weight stay the config's.
        variants = [dataclasses.replace(config, seed=config.seed + (n << 21)) for n in range(INPUTS)]
        self.inputs = torch.stack([rank_input(variant, env.rank, env.device) for variant in variants])
        wants = []
        for n, variant in enumerate(variants):
            self.arena.fill_(POISON)
            launch(config, env, self.inputs[n], self.shared, self.result)
            env.same(*self.result.tensors())
            wants.append(self.arena.view(torch.int32).clone())
            if env.checker(number + n):
                reduced = reduced_reference(variant, env)
                env.attempt(partial(verify_epilogue, config, reduced, self.shared, self.result), variant)
        self.wants = torch.stack(wants)

    def __call__(self, variant: torch.Tensor, wrong: torch.Tensor) -> None:
        """The call with one of its inputs; adds up the words that differ."""
        x = self.inputs.index_select(0, variant)[0]
        self.arena.fill_(POISON)
        launch(self.config, self.env, x, self.shared, self.result)
        wrong.add_((self.arena.view(torch.int32) != self.wants.index_select(0, variant)[0]).sum())


def arena_of(result: Result) -> torch.Tensor:
    """Moves a result's buffers, guards and all, into one piece of memory."""
    sizes = [buffer.raw.numel() for buffer in result.buffers.values()]
    arena = torch.empty(sum(sizes), dtype=torch.uint8, device=next(iter(result.buffers.values())).raw.device)
    for buffer, part in zip(result.buffers.values(), arena.split(sizes), strict=True):
        buffer.move_to(part)
    return arena


class Round:
    """Some calls, in a graph and to be made eagerly."""

    def __init__(self, env: Env, generator: random.Random):
        self.env = env
        self.calls = [Repeated(env, draw(generator), number) for number in range(CALLS)]
        self.streams = [torch.cuda.Stream() for _ in range(3)]
        self.variants = torch.arange(CALLS, device=env.device) % INPUTS
        self.wrong = torch.zeros(CALLS, dtype=torch.int64, device=env.device)
        torch.cuda.synchronize()
        self.step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.step()
        torch.cuda.synchronize()

    def call(self, number: int) -> None:
        self.calls[number](self.variants[number : number + 1], self.wrong[number])

    def step(self) -> None:
        """All calls, every third one on a second stream, with the next of their inputs."""
        here = torch.cuda.current_stream()
        self.variants.add_(1).remainder_(INPUTS)
        for number in range(CALLS):
            if number % 3 == 2:
                self.streams[0].wait_stream(here)
                with torch.cuda.stream(self.streams[0]):
                    self.call(number)
                here.wait_stream(self.streams[0])
            else:
                self.call(number)

    def run(self, generator: random.Random, deadline: float) -> int:
        """Replays and eager calls until the round or the time is over; returns how many fused calls that was."""
        env, count, previous = self.env, 0, torch.cuda.current_stream()
        for replay in range(REPLAYS):
            stream, late = generator.choice(self.streams[1:]), generator.random()
            who, number = generator.randrange(env.world), generator.randrange(CALLS)
            stream.wait_stream(previous)
            with torch.cuda.stream(stream):
                if env.rank == who and late < 0.05:
                    torch.cuda._sleep(int(late * 2e6))
                if env.rank == who and late > 0.995:
                    time.sleep(0.002)
                self.graph.replay()
                count += CALLS
                if replay % 8 == 0:
                    self.call(number)
                    count += 1
            previous = stream
            if replay % 100 == 99:
                torch.cuda.synchronize()
                if env.agree(time.monotonic() > deadline):
                    break
        torch.cuda.synchronize()
        return count


@case("soak", "random", worlds=(2, 3, 4))
def soak(env: Env) -> None:
    """ARFUSION_SOAK_OPERATIONS fused calls, or ARFUSION_SOAK_SECONDS, from ARFUSION_SOAK_SEED."""
    generator, start = random.Random(SEED), time.monotonic()
    count = rounds = wrong = 0
    while count < OPERATIONS and not env.agree(time.monotonic() > start + SECONDS):
        current = Round(env, generator)
        count += current.run(generator, start + SECONDS)
        rounds += 1
        for call, words in zip(current.calls, current.wrong.tolist(), strict=True):
            if words:
                wrong += 1
                env.problems.append(f"{words} words differ in {call.config}")
        del current
    env.note(
        f"seed {SEED}: {count} calls in {rounds} rounds of {CALLS}, {wrong} with wrong words, "
        f"{time.monotonic() - start:.0f} s"
    )
