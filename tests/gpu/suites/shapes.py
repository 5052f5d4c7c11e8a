"""Token counts from 0 to more than a workspace holds, on odd and usual hidden sizes; tensors of any rank."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch

from arfusion_pass.ops.spec import NO_QUANT, Bound, QuantFormat, QuantSpec, ScaleLayout
from tests.gpu.calls import Config, launch, rank_input, run, shared_inputs, verify, with_strategy
from tests.gpu.compare import assert_bits
from tests.gpu.harness import Env, case

TOKENS = (0, 1, 2, 3, 15, 16, 17, 127, 128, 129, 1000, 2048, 8192)
HIDDEN = (8, 16, 24, 72, 120, 512, 2880, 4096, 5120, 6144, 7168, 8192, 16384)
LARGEST = 48 << 20  # elements: what the reference takes in a moment

GROUP_FP8 = QuantSpec(QuantFormat.FP8, 128, ScaleLayout.COLUMN_TMA, bound_on=Bound.AMAX, bound=1e-10)
TOKEN_FP8 = QuantSpec(QuantFormat.FP8, -1)
MXFP8 = QuantSpec(QuantFormat.MXFP8, 32, ScaleLayout.SWIZZLED_128X4)


def _spec(hidden: int, number: int) -> QuantSpec:
    choices = [NO_QUANT, TOKEN_FP8]
    choices += [GROUP_FP8] if hidden % 128 == 0 else []
    choices += [MXFP8] if hidden % 32 == 0 else []
    return choices[number % len(choices)]


def _register(dtype: torch.dtype, strategy: str) -> None:
    @case("shapes", f"{str(dtype)[6:]}-{strategy}")
    def tokens_by_hidden(env: Env) -> None:
        count = 0
        for hidden in HIDDEN:
            if hidden * dtype.itemsize % 16:
                continue
            for tokens in TOKENS:
                if tokens * hidden > LARGEST:
                    continue
                spec = _spec(hidden, count)
                outputs = ("residual_out", "norm_out", *(("quant_out",) if spec.format != QuantFormat.NONE else ()))
                config = with_strategy(Config(tokens, hidden, dtype, spec=spec, outputs=outputs, seed=count), strategy)
                result = run(config, env)
                if env.checker(count):
                    env.attempt(partial(verify, config, env, result), config)
                count += 1
        env.note(f"{count} shapes")


for _dtype in (torch.bfloat16, torch.float32):
    for _strategy in ("oneshot", "twoshot", "auto"):
        _register(_dtype, _strategy)


@case("shapes", "any-world")
def every_world_size(env: Env) -> None:
    """A few shapes in every dtype and strategy, checked: what worlds of 5 to 8 ranks run beside the simulated ranks."""
    count = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for strategy in ("oneshot", "twoshot"):
            for tokens, hidden in ((1, 4096), (3, 2880), (17, 7168), (129, 512)):
                spec = _spec(hidden, count)
                outputs = ("allreduce_out", "residual_out", "norm_out")
                outputs += ("quant_out",) if spec.format != QuantFormat.NONE else ()
                config = with_strategy(Config(tokens, hidden, dtype, spec=spec, outputs=outputs, seed=count), strategy)
                result = run(config, env)
                if env.checker(count):
                    env.attempt(partial(verify, config, env, result), config)
                count += 1
    env.note(f"{count} calls")


@case("shapes", "ranks-of-tensor", worlds=(1, 2, 3, 4))
def tensors_of_any_rank(env: Env) -> None:
    """1-D, 3-D and 4-D inputs, outputs of another rank: the op flattens."""
    config = Config(24, 512, outputs=("residual_out", "norm_out", "allreduce_out"))
    want = run(config, env).snapshot()
    x, shared = rank_input(config, env.rank, env.device), shared_inputs(config, env.device)
    for shape in ((2, 12, 512), (2, 3, 4, 512)):
        out = {name: torch.empty(shape, dtype=x.dtype, device=env.device) for name in want}
        residual = shared.residual.view(24, 512)
        op = torch.ops.arfusion.allreduce_rms_norm
        op(x.view(shape), residual, shared.weight, None, env.group_name, **out)
        for name, tensor in out.items():
            assert_bits(name, tensor.view(24, 512), want[name])
    single = Config(1, 512)
    want = run(single, env).snapshot()
    x, shared = rank_input(single, env.rank, env.device), shared_inputs(single, env.device)
    norm = torch.empty(512, dtype=x.dtype, device=env.device)
    torch.ops.arfusion.allreduce_rms_norm(x[0], shared.residual, shared.weight, None, env.group_name, norm_out=norm)
    assert_bits("1-D norm", norm.view(1, 512), want["norm_out"])


@case("shapes", "aliasing", worlds=(1, 2, 3, 4))
def outputs_may_alias_inputs(env: Env) -> None:
    """In place, as engines call it: residual_out is residual, norm_out is x; any strategy, CTAs that only push too."""
    for strategy in ("oneshot", "twoshot"):
        for tokens, hidden in ((1, 4096), (6, 4096), (300, 4096), (300, 8192), (400, 7168)):
            config = with_strategy(Config(tokens, hidden), strategy)
            want = run(config, env).snapshot()
            x, shared = rank_input(config, env.rank, env.device), shared_inputs(config, env.device)
            residual = shared.residual
            op = torch.ops.arfusion.allreduce_rms_norm
            flags = int(config.flags)
            op(x, residual, shared.weight, None, env.group_name, flags=flags, residual_out=residual, norm_out=x)
            assert_bits("residual in place", residual, want["residual_out"])
            assert_bits("norm into x", x, want["norm_out"])
            x = rank_input(config, env.rank, env.device)
            op(x, None, None, None, env.group_name, flags=flags, allreduce_out=x)
            env.same(x)


@case("shapes", "rows-apart", worlds=(1, 2, 3, 4))
def rows_apart(env: Env) -> None:
    """x and residual as columns of wider tensors, as a fused projection leaves them: the bits of their copies."""
    op = torch.ops.arfusion.allreduce_rms_norm
    for tokens, hidden in ((1, 4096), (7, 4096), (300, 7168)):
        config = Config(tokens, hidden)
        want = run(config, env).snapshot()
        x, shared = rank_input(config, env.rank, env.device), shared_inputs(config, env.device)
        wide = torch.cat([x, shared.residual], dim=-1)
        total, norm = torch.empty_like(x), torch.empty_like(x)
        inputs = (wide[:, :hidden], wide[:, hidden:], shared.weight, None, env.group_name)
        op(*inputs, flags=int(config.flags), residual_out=total, norm_out=norm)
        assert_bits("residual_out", total, want["residual_out"])
        assert_bits("norm_out", norm, want["norm_out"])


@case("shapes", "capacity", worlds=(2, 3, 4))
def more_than_the_workspace_holds(env: Env) -> None:
    """A small workspace works in pieces, with the same bits."""
    from arfusion_pass.runtime import workspace

    configs = [
        with_strategy(
            Config(tokens, 7168, spec=spec, outputs=("residual_out", "norm_out", "quant_out"), seed=tokens), s
        )
        for tokens in (40, 129, 3000)
        for s in ("oneshot", "twoshot", "auto")
        for spec in (GROUP_FP8, QuantSpec(QuantFormat.NVFP4, 16, ScaleLayout.SWIZZLED_128X4))
    ]
    large = [run(config, env).snapshot() for config in configs]
    torch.cuda.synchronize()
    env.barrier()
    workspace.destroy()
    made = workspace.prepare(env.group, max_bytes=2 << 20)
    assert 0 < made.bytes <= 2 << 20, made.bytes
    for number, (config, want) in enumerate(zip(configs, large, strict=True)):
        result = run(config, env)
        for name, tensor in result.snapshot().items():
            if not torch.equal(tensor.view(torch.uint8), want[name].view(torch.uint8)):
                env.problems.append(f"{name} in pieces: {config}")
        if env.checker(number):
            env.attempt(partial(verify, config, env, result), config)
    torch.cuda.synchronize()
    env.barrier()
    workspace.destroy()


@case("shapes", "interleaved", worlds=(2, 3, 4))
def growing_and_shrinking(env: Env) -> None:
    """Calls of all sizes in a shuffled order on one workspace, checked only after the last of them."""
    generator = torch.Generator().manual_seed(7)
    configs = []
    for number in range(120):
        tokens = TOKENS[int(torch.randint(0, 11, (), generator=generator))]
        hidden = (64, 2880, 4096, 7168)[int(torch.randint(0, 4, (), generator=generator))]
        strategy = ("oneshot", "twoshot", "auto")[int(torch.randint(0, 3, (), generator=generator))]
        configs.append(with_strategy(Config(tokens, hidden, seed=number), strategy))
    inputs = [(rank_input(c, env.rank, env.device), shared_inputs(c, env.device)) for c in configs]
    from tests.gpu.calls import allocate

    results = [allocate(config, env.device) for config in configs]
    for _ in range(3):
        for config, (x, shared), result in zip(configs, inputs, results, strict=True):
            launch(config, env, x, shared, result)
    for number, (config, result) in enumerate(zip(configs, results, strict=True)):
        env.same(*result.tensors())
        if env.checker(number):
            verify(dataclasses.replace(config), env, result)
