"""Every epilogue x dtype x strategy against the reference: quantisers with their whole spec, layouts, flags."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import torch

from arfusion_pass.ops.spec import (
    NO_QUANT,
    Apply,
    Bound,
    Flags,
    QuantFormat,
    QuantSpec,
    ScaleLayout,
    ScaleRound,
    ScaleRule,
)
from tests.gpu import rare
from tests.gpu.calls import (
    Config,
    allocate,
    assert_same_codes,
    launch,
    rank_input,
    run,
    shared_inputs,
    verify,
    verify_quantiser,
    with_strategy,
)
from tests.gpu.harness import Env, case

FP8, INT8, NVFP4, MXFP8 = QuantFormat.FP8, QuantFormat.INT8, QuantFormat.NVFP4, QuantFormat.MXFP8
TINY = 1.0 / (448.0 * 512.0)

STATIC = [
    QuantSpec(FP8, 0),
    QuantSpec(FP8, 0, apply=Apply.RECIPROCAL),
    QuantSpec(FP8, 0, apply=Apply.MULTIPLY),
    QuantSpec(FP8, 0, unrounded=True),
    QuantSpec(FP8, 0, in_dtype=True),
    QuantSpec(FP8, 0, clamp=False),
]
PER_TOKEN = [
    QuantSpec(FP8, -1),
    QuantSpec(FP8, -1, bound_on=Bound.SCALE, bound=TINY),
    QuantSpec(FP8, -1, bound_on=Bound.AMAX, bound=1e-12, apply=Apply.RECIPROCAL),
    QuantSpec(FP8, -1, scale_rule=ScaleRule.MULTIPLY, unrounded=True),
    QuantSpec(FP8, -1, scale_rule=ScaleRule.RECIPROCAL, apply=Apply.RECIPROCAL),
    QuantSpec(FP8, -1, scale_round=ScaleRound.TENSOR, bound_on=Bound.AMAX, bound=1e-12),
    QuantSpec(FP8, -1, scale_round=ScaleRound.POW2),
    QuantSpec(FP8, -1, apply=Apply.MAX_OVER_AMAX, bound_on=Bound.AMAX, bound=1e-4),
    QuantSpec(FP8, -1, in_dtype=True, clamp=False),
    QuantSpec(INT8, -1),
    QuantSpec(INT8, -1, bound_on=Bound.AMAX, bound=1e-5, apply=Apply.RECIPROCAL),
    QuantSpec(INT8, -1, unrounded=True, scale_rule=ScaleRule.MULTIPLY),
]
GROUPED = [
    QuantSpec(FP8, group, layout, bound_on=Bound.AMAX, bound=1e-10, scale_round=rounding)
    for group in (128, 64, 32)
    for layout in (ScaleLayout.ROW, ScaleLayout.COLUMN, ScaleLayout.COLUMN_TMA)
    for rounding in (ScaleRound.FP32, ScaleRound.POW2)
]
GROUPED += [
    QuantSpec(FP8, group, ScaleLayout.PACKED_UE8M0, bound_on=Bound.SCALE, bound=1e-10, scale_round=rounding)
    for group in (128, 64, 32)
    for rounding in (ScaleRound.POW2, ScaleRound.POW2_LOG2)
]
GROUPED += [
    QuantSpec(FP8, 128, scale_round=ScaleRound.POW2_LOG2, bound_on=Bound.AMAX, bound=1e-4),
    QuantSpec(FP8, 128, scale_round=ScaleRound.TENSOR, apply=Apply.RECIPROCAL),
    QuantSpec(FP8, 128, scale_rule=ScaleRule.RECIPROCAL, unrounded=True),
    QuantSpec(FP8, 128, ScaleLayout.COLUMN, apply=Apply.MAX_OVER_AMAX, bound_on=Bound.AMAX, bound=1e-4),
]
ONE_BYTE = [
    QuantSpec(fmt, group, layout, unrounded=unrounded)
    for fmt, group in ((NVFP4, 16), (MXFP8, 32))
    for layout in (ScaleLayout.SWIZZLED_128X4, ScaleLayout.SWIZZLED_8X4, ScaleLayout.LINEAR)
    for unrounded in (False, True)
]
SPECS = [NO_QUANT, *STATIC, *PER_TOKEN, *GROUPED, *ONE_BYTE]

RESIDUALS = ("same", "none", "fp32")
WEIGHTS = ("same", "fp32", "none")
ROUNDINGS = (0, Flags.UNROUNDED_SUM, Flags.ROUND_BEFORE_WEIGHT, Flags.UNROUNDED_SUM | Flags.ROUND_BEFORE_WEIGHT)
SUBSETS = (
    ("allreduce_out", "residual_out", "norm_out"),
    ("residual_out", "norm_out"),
    ("norm_out",),
    ("allreduce_out", "norm_out"),
)
SHAPES = ((5, 4096), (1, 7168), (33, 2880), (130, 1536), (7, 16384), (3, 128))


def variants(spec: QuantSpec, dtype: torch.dtype, seed: int) -> list[Config]:
    """Several calls with ``spec``: the other settings walk through their values, each pair of neighbours meeting."""
    configs = []
    for step in range(4):
        n = seed * 4 + step
        residual, weight = RESIDUALS[(n + step) % 3], WEIGHTS[(n // 2) % 3]
        flags = ROUNDINGS[(n // 3 + step) % 4]
        if residual == "fp32" and dtype != torch.float32:
            flags |= Flags.UNROUNDED_SUM
        tokens, hidden = SHAPES[n % len(SHAPES)]
        if spec.group > 0 and hidden % spec.group:
            hidden = 2048
        outputs = SUBSETS[(n + n // 4) % 4]
        if spec.format != QuantFormat.NONE:
            outputs = (*outputs, "quant_out")
        configs.append(
            Config(
                tokens,
                hidden,
                dtype,
                residual=residual,
                weight=weight,
                weight_bias=(0.0, 1.0, 0.5)[n % 3] if weight != "none" else 0.0,
                epsilon=(1e-6, 1e-5, 0.0, 1e-3)[(n // 2) % 4],
                flags=int(flags),
                spec=spec,
                outputs=outputs,
                norm_fp32=spec.unrounded or n % 3 == 0,
                residual_out_fp32=residual == "fp32" and n % 2 == 0,
                logical_scales=n % 2 == 0,
                given_scale=("tensor", "value")[n % 2],
                seed=n,
            )
        )
    return configs


def _register(dtype: torch.dtype, strategy: str) -> None:
    @case("epilogues", f"{str(dtype)[6:]}-{strategy}")
    def all_quantisers(env: Env) -> None:
        count = 0
        for seed, spec in enumerate(SPECS):
            for config in variants(spec, dtype, seed):
                config = with_strategy(config, strategy)
                result = run(config, env)
                if env.checker(count):
                    on_cpu = count % 8 == 0 and config.tokens < 40
                    env.attempt(partial(verify, config, env, result, on_cpu), config)
                count += 1
        env.note(f"{count} calls")

    @case("epilogues", f"{str(dtype)[6:]}-{strategy}-outputs")
    def any_subset_of_outputs(env: Env) -> None:
        """What is not asked for changes nothing: codes without the norm are the codes with it."""
        specs = (NO_QUANT, STATIC[0], PER_TOKEN[1], GROUPED[0], GROUPED[12], ONE_BYTE[0], ONE_BYTE[7])
        for seed, spec in enumerate(specs):
            quant = ("quant_out",) if spec.format != QuantFormat.NONE else ()
            full = Config(
                9, 2048, dtype, spec=spec, seed=seed, outputs=("allreduce_out", "residual_out", "norm_out", *quant)
            )
            full = with_strategy(dataclasses.replace(full, norm_fp32=spec.unrounded), strategy)
            want = run(full, env).snapshot()
            names = ("allreduce_out", "residual_out", "norm_out", *quant)
            for size in range(1, len(names)):
                for outputs in itertools.combinations(names, size):
                    if quant and "quant_out" not in outputs:
                        continue
                    got = run(dataclasses.replace(full, outputs=outputs), env).snapshot()
                    for name, tensor in got.items():
                        if not torch.equal(tensor.view(torch.uint8), want[name].view(torch.uint8)):
                            env.problems.append(f"{name} changes with the outputs asked for: {outputs}, {spec}")


for _dtype in (torch.bfloat16, torch.float16, torch.float32):
    for _strategy in ("oneshot", "twoshot"):
        _register(_dtype, _strategy)


@case("epilogues", "rare", worlds=(1, 2, 3, 4))
def rare_inputs(env: Env) -> None:
    """Addends, epsilon in a tensor, norms by division: the reference's bits, by either strategy."""
    count = 0
    for config, strategy in itertools.product(rare.configs(), ("oneshot", "twoshot")):
        config = with_strategy(config, strategy)
        env.attempt(partial(verify, config, env, run(config, env)), config)
        count += 1
    env.note(f"{count} calls")


EXTREMES = (0.0, 1e-45, 3e-39, 1e-30, 2.0**-91, 2.0**-80, 1.0, 2.0**80, 2.0**91, 3e38, float("inf"), float("nan"))
"""Around the limits of the kernels' short divisions, and beyond any."""


@case("epilogues", "extreme-scales", worlds=(1, 2, 3, 4))
def extreme_scales(env: Env) -> None:
    """Groups of any magnitude and any given scale, in calls with the specs and dtypes that have code of their own: the
    codes and scales are the reference quantiser's."""
    grouped = [
        QuantSpec(FP8, 128),
        QuantSpec(FP8, 128, bound_on=Bound.AMAX, bound=1e-4),
        QuantSpec(FP8, 128, ScaleLayout.COLUMN_TMA, bound_on=Bound.SCALE, bound=1e-10),
        QuantSpec(FP8, 128, scale_rule=ScaleRule.MULTIPLY),
        QuantSpec(FP8, 128, apply=Apply.RECIPROCAL),
        QuantSpec(FP8, 128, bound_on=Bound.AMAX, bound=3e38),
        QuantSpec(NVFP4, 16, ScaleLayout.SWIZZLED_128X4),
        QuantSpec(MXFP8, 32, ScaleLayout.LINEAR),
    ]
    per_token = [*PER_TOKEN[:3], QuantSpec(FP8, -1, scale_rule=ScaleRule.MULTIPLY, apply=Apply.RECIPROCAL)]
    static = [spec for spec in STATIC if spec.clamp and not spec.unrounded and not spec.in_dtype]
    given = [spec for spec in (*static, *grouped) if spec.is_static or spec.format == NVFP4]
    calls = [(spec, 1.0, EXTREMES) for spec in grouped]
    calls += [(spec, 1.0, (value,) * len(EXTREMES)) for spec in per_token for value in EXTREMES]
    calls += [(spec, sign * value, EXTREMES) for spec in given for value in EXTREMES for sign in (1, -1)]
    for count, (dtype, (spec, scale, magnitudes)) in enumerate(
        itertools.product((torch.bfloat16, torch.float32), calls)
    ):
        for strategy in ("oneshot", "twoshot"):
            config = Config(
                6, 128 * len(EXTREMES), dtype, spec=spec, seed=count, outputs=("residual_out", "norm_out", "quant_out")
            )
            config = with_strategy(config, strategy)
            shared = shared_inputs(config, env.device)
            assert shared.weight is not None
            factors = torch.tensor(magnitudes, device=env.device).repeat_interleave(128)
            shared.weight = (shared.weight.float() * factors).to(dtype)
            if shared.scale is not None:
                shared.scale = torch.full_like(shared.scale, scale)
            result = allocate(config, env.device)
            launch(config, env, rank_input(config, env.rank, env.device), shared, result)
            env.same(*result.tensors())
            outputs = {name: buffer.tensor for name, buffer in result.buffers.items()}
            check = partial(verify_quantiser, config, outputs, outputs["norm_out"], shared, exact=True)
            env.attempt(check, (spec, scale, dtype, strategy))
            bare = dataclasses.replace(config, outputs=("residual_out", "quant_out"))  # kernels of their own
            alone = allocate(bare, env.device)
            launch(bare, env, rank_input(bare, env.rank, env.device), shared, alone)
            env.attempt(partial(assert_same_codes, alone, result), (spec, scale, dtype, strategy, "without the norm"))
    env.note(f"{2 * 2 * 2 * len(calls)} calls")


@case("epilogues", "local", worlds=(1,))
def a_world_of_one(env: Env) -> None:
    """The local kernel: every epilogue without an exchange."""
    count = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for seed, spec in enumerate(SPECS):
            for config in variants(spec, dtype, seed):
                on_cpu = count % 16 == 0 and config.tokens < 40
                env.attempt(partial(verify, config, env, run(config, env), on_cpu), config)
                count += 1
    env.note(f"{count} calls")
