"""The MoE prologues in front of the exchange: expert sums, gathers, -1 indices, both weight dtypes, every rounding."""

from __future__ import annotations

import itertools

import torch

from arfusion_pass.ops import reference
from arfusion_pass.ops.spec import NO_QUANT, Flags, QuantFormat, QuantSpec, ScaleLayout
from tests.gpu.calls import Config, allocate, shared_inputs, verify_epilogue, with_strategy
from tests.gpu.harness import Env, case

ROUNDINGS = (
    0,
    Flags.MOE_ROUND_PRODUCT,
    Flags.MOE_ROUND_PARTIAL,
    Flags.MOE_ROUND_PRODUCT | Flags.MOE_ROUND_PARTIAL,
    Flags.MOE_ROUND_SUM,
    Flags.MOE_ROUND_SUM | Flags.MOE_ROUND_SCALED,
)
SPECS = (NO_QUANT, QuantSpec(QuantFormat.FP8, 128), QuantSpec(QuantFormat.NVFP4, 16, ScaleLayout.SWIZZLED_128X4))
STRATEGIES = ("oneshot", "twoshot")


def _finish(env: Env, config: Config, op: str, inputs: list, reduced, number: int) -> None:
    result, shared = allocate(config, env.device), shared_inputs(config, env.device)
    out = {name: buffer.tensor for name, buffer in result.buffers.items()}
    getattr(torch.ops.arfusion, op)(
        *inputs,
        shared.residual,
        shared.weight,
        shared.scale,
        env.group_name,
        config.epsilon,
        config.weight_bias,
        int(config.flags),
        config.spec.pack(),
        config.spec.bound,
        shared.scale_value,
        **out,
    )
    env.same(*result.tensors())
    if env.checker(number):
        env.attempt(lambda: verify_epilogue(config, reduced(), shared, result), (op, config))


def _config(number: int, tokens: int, dtype: torch.dtype, flags: int) -> Config:
    spec = SPECS[number % 3]
    outputs = ("allreduce_out", "residual_out", "norm_out", *(("quant_out",) if spec.pack() else ()))
    strategy = STRATEGIES[number // 2 % 2]
    return with_strategy(Config(tokens, 2048, dtype, flags=flags, spec=spec, outputs=outputs, seed=number), strategy)


@case("moe", "reduce", worlds=(1, 2, 3, 4))
def moe_reduce(env: Env) -> None:
    number = 0
    for dtype, experts, rounding in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), (1, 8, 12), ROUNDINGS
    ):
        config = _config(number, (1, 5, 64)[number % 3], dtype, int(rounding) & ~int(Flags.MOE_ROUND_SCALED))

        def make(rank: int, config=config, experts=experts, number=number):
            g = torch.Generator(env.device).manual_seed(config.seed * 64 + rank)
            x = torch.randn(experts, config.tokens, config.hidden, generator=g, device=env.device).to(config.dtype)
            scale = torch.rand(experts, config.tokens, generator=g, device=env.device)
            token = torch.randn(config.tokens, config.hidden, generator=g, device=env.device).to(config.dtype)
            return [x, scale, token if number % 2 else None]

        def reduced(config=config, make=make):
            return reference.sum_in_rank_order(
                torch.stack([reference.moe_reduce(*make(rank), int(config.flags)) for rank in range(env.world)])
            )

        _finish(env, config, "moe_reduce_allreduce_rms_norm", make(env.rank), reduced, number)
        number += 1
    env.note(f"{number} calls")


@case("moe", "finalize", worlds=(1, 2, 3, 4))
def moe_finalize(env: Env) -> None:
    number = 0
    for dtype, top_k, rounding in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), (1, 6, 8), ROUNDINGS
    ):
        for weights in ("fp32", "same", "none"):
            config = _config(number, (1, 16, 65)[number % 3], dtype, int(rounding))
            factor = (1.0, 2.5)[number % 2]

            def make(rank: int, config=config, top_k=top_k, weights=weights, number=number, factor=factor):
                g = torch.Generator(env.device).manual_seed(config.seed * 64 + rank)
                rows = config.tokens * top_k
                x = torch.randn(rows, config.hidden, generator=g, device=env.device).to(config.dtype)
                index = torch.randint(
                    -1, rows, (config.tokens, top_k), generator=g, device=env.device, dtype=torch.int32
                )
                scale = torch.rand(config.tokens, top_k, generator=g, device=env.device)
                scale = None if weights == "none" else scale if weights == "fp32" else scale.to(config.dtype)
                extra = torch.randn(config.tokens, config.hidden, generator=g, device=env.device).to(config.dtype)
                return [x, index, scale, extra if number % 3 else None, factor]

            def reduced(config=config, make=make):
                parts = [reference.moe_finalize(*make(rank), int(config.flags)) for rank in range(env.world)]
                return reference.sum_in_rank_order(torch.stack(parts))

            _finish(env, config, "moe_finalize_allreduce_rms_norm", make(env.rank), reduced, number)
            number += 1
    env.note(f"{number} calls")
