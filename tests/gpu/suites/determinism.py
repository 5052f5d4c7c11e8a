"""The same bits: across ranks (every case notes that), runs, strategies, and for a token whatever batch it is in."""

from __future__ import annotations

import dataclasses

import torch

from arfusion_pass.ops.spec import Flags, QuantFormat, QuantSpec, ScaleLayout
from tests.gpu.calls import Config, Shared, allocate, launch, rank_input, run, shared_inputs, with_strategy
from tests.gpu.harness import Env, case

BATCHES = (1, 7, 64, 1000)
SPEC = QuantSpec(QuantFormat.FP8, 32, ScaleLayout.ROW)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@case("determinism", "runs-and-strategies", worlds=(1, 2, 3, 4))
def runs_and_strategies(env: Env) -> None:
    strategies = ("oneshot", "twoshot", "auto") if env.world > 1 else ("auto",)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens, hidden in ((1, 4096), (5, 2880), (64, 7168), (300, 8192), (17, 16384)):
            first: dict[str, torch.Tensor] | None = None
            for strategy in strategies:
                for extra in (0, int(Flags.NO_PDL)):
                    config = Config(tokens, hidden, dtype, spec=SPEC, outputs=("residual_out", "norm_out", "quant_out"))
                    config = with_strategy(config, strategy)
                    config = dataclasses.replace(config, flags=config.flags | extra)
                    for _ in range(5):
                        got = run(config, env).snapshot()
                        first = got if first is None else first
                        for name, tensor in got.items():
                            if not _equal(tensor, first[name]):
                                env.problems.append(f"{name} differs between runs or strategies: {config}")


@case("determinism", "batches", worlds=(1, 2, 3, 4))
def a_row_in_any_batch(env: Env) -> None:
    """Row 0 of the largest batch, alone and at the front, middle and end of smaller ones."""
    for dtype in (torch.bfloat16, torch.float32):
        for hidden in (64, 2880, 4096, 7168, 8192, 16384):
            whole = Config(max(BATCHES), hidden, dtype, spec=SPEC, outputs=("residual_out", "norm_out", "quant_out"))
            x, shared = rank_input(whole, env.rank, env.device), shared_inputs(whole, env.device)
            rows: dict[str, torch.Tensor] = {}
            for batch in BATCHES:
                for place in sorted({0, batch // 2, batch - 1}):
                    order = torch.arange(1, batch + 1, device=env.device) % max(BATCHES)
                    order[place] = 0
                    config = dataclasses.replace(whole, tokens=batch)
                    result = allocate(config, env.device)
                    assert shared.residual is not None
                    part = Shared(shared.residual[order].contiguous(), shared.weight, None, 1.0)
                    launch(config, env, x[order].contiguous(), part, result)
                    env.same(*result.tensors())
                    for name, tensor in result.snapshot().items():
                        row = tensor[place]
                        rows.setdefault(name, row)
                        if not _equal(row, rows[name]):
                            env.problems.append(f"{name} of a token in a batch of {batch}: {dtype}, H {hidden}")
