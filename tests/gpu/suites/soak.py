"""200,000 replays with changing inputs, every result checked on the device."""

from __future__ import annotations

import os
import time

import torch

from tests.gpu.calls import Config, allocate, launch, rank_input, run, shared_inputs, with_strategy
from tests.gpu.harness import Env, case
from tests.gpu.suites.graphs import capture

REPLAYS = int(os.environ.get("ARFUSION_SOAK_REPLAYS", "200000"))
POOL = 8


@case("soak", "replays", worlds=(2, 3, 4))
def soak(env: Env) -> None:
    """A graph of three calls (both strategies, three shapes) whose inputs rotate through a pool; the graph itself
    compares each output with what the eager call gave for that input and counts the elements that differ."""
    configs = [
        with_strategy(Config(tokens, hidden, seed=tokens), strategy)
        for tokens, hidden, strategy in ((1, 4096, "oneshot"), (16, 7168, "oneshot"), (24, 2880, "twoshot"))
    ]
    import dataclasses

    pools, wants, shared = [], [], []
    for config in configs:
        each = [dataclasses.replace(config, seed=config.seed * 100 + n) for n in range(POOL)]
        pools.append(torch.stack([rank_input(c, env.rank, env.device) for c in each]))
        common = shared_inputs(config, env.device)
        shared.append(common)
        norms = []
        for number in range(POOL):
            result = allocate(config, env.device)
            launch(config, env, pools[-1][number], common, result)
            env.same(*result.tensors())
            norms.append(result["norm_out"].clone())
        wants.append(torch.stack(norms))
    results = [allocate(config, env.device) for config in configs]
    counter = torch.zeros(1, dtype=torch.int64, device=env.device)
    wrong = torch.zeros((), dtype=torch.int64, device=env.device)

    def step() -> None:
        for config, pool, want, common, result in zip(configs, pools, wants, shared, results, strict=True):
            launch(config, env, pool.index_select(0, counter % POOL)[0], common, result)
            wrong.add_(
                (
                    result["norm_out"].view(torch.int16) != want.index_select(0, counter % POOL)[0].view(torch.int16)
                ).sum()
            )
        counter.add_(1)

    graph = capture(step)
    counter.zero_()
    start = time.monotonic()
    for number in range(REPLAYS):
        graph.replay()
        if number % 2000 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    assert int(counter) == REPLAYS
    assert int(wrong) == 0, f"{int(wrong)} elements differed"
    run(configs[0], env)
    env.note(f"{REPLAYS} replays of 3 calls in {time.monotonic() - start:.0f} s")
