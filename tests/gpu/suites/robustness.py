"""What breaks exchange protocols: rank skew, odd payloads, two groups, two streams, wrong arguments."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
import torch.distributed as dist

from arfusion_pass.groups import register_group
from arfusion_pass.ops.spec import QuantFormat, QuantSpec
from tests.gpu.calls import Config, allocate, launch, rank_input, run, shared_inputs, verify, with_strategy
from tests.gpu.compare import assert_bits
from tests.gpu.harness import Env, case

PAYLOADS = ("specials", "negative_zero", "zero", "sentinel", "subnormal", "nan_rank", "integers")


@case("robustness", "payloads", worlds=(1, 2, 3, 4))
def odd_payloads(env: Env) -> None:
    """-0.0, NaN, inf, subnormals and every bit pattern a protocol might use for itself (a NaN may become another)."""
    count = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for payload in PAYLOADS:
            for strategy in ("oneshot", "twoshot"):
                for residual in ("none", "same"):
                    spec = (
                        QuantSpec(QuantFormat.FP8, 32) if payload in ("subnormal", "zero", "integers") else QuantSpec()
                    )
                    outputs = ("allreduce_out", "residual_out", "norm_out", *(("quant_out",) if spec.pack() else ()))
                    config = Config(37, 2048, dtype, payload=payload, residual=residual, spec=spec, outputs=outputs)
                    config = with_strategy(dataclasses.replace(config, seed=count), strategy)
                    for _ in range(3):
                        result = run(config, env)
                    if env.checker(count):
                        env.attempt(partial(verify, config, env, result), config)
                    count += 1
    env.note(f"{count} calls")


@case("robustness", "skew", worlds=(2, 3, 4))
def one_rank_sleeps(env: Env) -> None:
    """A different rank is late by up to some milliseconds before each call; back-to-back calls catch up."""
    generator = torch.Generator().manual_seed(11)
    late = torch.randint(0, env.world, (60,), generator=generator).tolist()
    results = []
    for number, sleeper in enumerate(late):
        config = with_strategy(Config(1 + number % 40, 4096, seed=number), ("oneshot", "twoshot", "auto")[number % 3])
        x, shared, result = rank_input(config, env.rank, env.device), shared_inputs(config, env.device), None
        result = allocate(config, env.device)
        if env.rank == sleeper:
            torch.cuda._sleep(int(4e6) * (1 + number % 3))
        for _ in range(4):
            launch(config, env, x, shared, result)
        results.append((config, result))
    for number, (config, result) in enumerate(results):
        env.same(*result.tensors())
        if env.checker(number):
            verify(config, env, result)


@case("robustness", "two-groups", worlds=(2, 3, 4))
def two_groups(env: Env) -> None:
    """Two groups of the same ranks, one in reverse, and an engine's own name for one: interleaved calls."""
    other = dist.new_group(list(range(env.world)))
    register_group("engine tp:0", other)
    names = (env.group_name, other.group_name, "engine tp:0")
    results = []
    for number in range(30):
        config = Config(1 + number * 7 % 150, 4096, seed=number, group_name=names[number % 3])
        results.append((config, run(config, env)))
    for number, (config, result) in enumerate(results):
        if env.checker(number):
            verify(config, env, result)
    torch.cuda.synchronize()
    from arfusion_pass.runtime import workspace

    env.barrier()
    workspace.destroy(other.group_name)
    workspace.destroy("engine tp:0")


def _at_once(env: Env, groups: list[dist.ProcessGroup], max_ctas: int, rounds: int) -> None:
    """Long calls of every group on a stream of its own, in opposite orders on half of the ranks: all right."""
    from arfusion_pass.runtime import workspace

    for group in groups:
        workspace.prepare(group, 1024, 8192, max_ctas=max_ctas)
    streams = [torch.cuda.Stream() for _ in groups]
    shapes = ((1024, 8192, "twoshot"), (1024, 4096, "oneshot"), (300, 8192, "oneshot"), (1500, 4096, "oneshot"))
    configs = [
        dataclasses.replace(with_strategy(Config(tokens, hidden, seed=tokens), strategy), group_name=group.group_name)
        for tokens, hidden, strategy in shapes
        for group in groups
    ]
    inputs = [(rank_input(c, env.rank, env.device), shared_inputs(c, env.device)) for c in configs]
    results = [allocate(config, env.device) for config in configs]
    torch.cuda.synchronize()
    env.barrier()
    order = range(len(groups)) if env.rank % 2 else range(len(groups))[::-1]
    for _ in range(rounds):
        for first in range(0, len(configs), len(groups)):
            for which in order:
                with torch.cuda.stream(streams[which]):
                    launch(configs[first + which], env, *inputs[first + which], results[first + which])
    torch.cuda.synchronize()
    workspace.check()
    for number, (config, result) in enumerate(zip(configs, results, strict=True)):
        if env.checker(number):
            verify(config, env, result)
    env.barrier()


@case("robustness", "two-groups-at-once", worlds=(2, 3, 4))
def two_groups_at_once(env: Env) -> None:
    """Groups on streams of their own, whose launches would fill the GPU, as new workspaces' first calls and later: two,
    three, and two with half of it each by ``max_ctas``."""
    from arfusion_pass.runtime import workspace

    others = [dist.new_group(list(range(env.world))) for _ in range(2)]
    workspace.destroy(env.group_name)
    for groups in ([env.group, others[0]], [env.group, *others]):
        for rounds in (1, 30):
            _at_once(env, groups, 0, rounds)
    workspace.destroy(others[1].group_name)
    half = torch.cuda.get_device_properties(env.device).multi_processor_count // 2
    _at_once(env, [env.group, others[0]], half, 30)
    workspace.destroy(others[0].group_name)
    workspace.prepare(env.group, max_ctas=0)


@case("robustness", "two-streams", worlds=(2, 3, 4))
def two_streams(env: Env) -> None:
    """Two streams use one group, without any ordering by the caller: serialised, not corrupted."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    configs = [with_strategy(Config(1 + n * 13 % 200, 4096, seed=n), ("oneshot", "twoshot")[n % 2]) for n in range(40)]
    inputs = [(rank_input(c, env.rank, env.device), shared_inputs(c, env.device)) for c in configs]
    results = [allocate(config, env.device) for config in configs]
    torch.cuda.synchronize()
    for number, (config, (x, shared), result) in enumerate(zip(configs, inputs, results, strict=True)):
        with torch.cuda.stream(streams[number % 3 % 2]):
            if number % 5 == 0:
                torch.cuda._sleep(1_000_000)
            launch(config, env, x, shared, result)
    torch.cuda.synchronize()
    for number, (config, result) in enumerate(zip(configs, results, strict=True)):
        env.same(*result.tensors())
        if env.checker(number):
            verify(config, env, result)


def _wrong_calls(env: Env) -> list[tuple[str, dict]]:
    device, bf16 = env.device, torch.bfloat16
    x, w = torch.ones(4, 4096, dtype=bf16, device=device), torch.ones(4096, dtype=bf16, device=device)
    out = torch.empty_like(x)
    good = {"x": x, "residual": x, "weight": w, "scale": None, "group_name": env.group_name, "norm_out": out}
    flat = torch.ones(4 * 4096 + 8, dtype=bf16, device=device)
    codes = torch.empty(4, 4096, dtype=torch.float8_e4m3fn, device=device)
    fp8 = {"quant": QuantSpec(QuantFormat.FP8, 128).pack(), "quant_out": codes}
    changes: list[tuple[str, dict]] = [
        ("no output", {"norm_out": None}),
        ("int input", {"x": x.int()}),
        ("fp16 residual", {"residual": x.half()}),
        ("fp64 weight", {"weight": w.double()}),
        ("short weight", {"weight": w[:-8].contiguous()}),
        ("short residual", {"residual": x[:3]}),
        ("CPU weight", {"weight": w.cpu()}),
        ("strided input", {"x": torch.ones(4096, 4, dtype=bf16, device=device).t()}),
        ("expanded input", {"x": x[:1].expand(4, -1)}),
        ("expanded residual", {"residual": x[:1].expand(4, -1)}),
        ("rows that overlap", {"residual": flat[: 3 * 64 + 4096].as_strided((4, 4096), (64, 1))}),
        ("one memory for two outputs", {"residual_out": out}),
        ("output shifted on its input", {"x": flat[:-8].view(4, 4096), "norm_out": flat[8:].view(4, 4096)}),
        ("output on the weight", {"weight": out[0], "norm_out": out}),
        ("epsilon beyond fp32", {"epsilon": 1e39}),
        ("NaN bias", {"weight_bias": float("nan")}),
        ("misaligned input", {"x": flat[1 : 1 + 4 * 4096].view(4, 4096)}),
        ("misaligned output", {"norm_out": flat[1 : 1 + 4 * 4096].view(4, 4096)}),
        ("hidden of 12 bytes", {k: t[..., :6].contiguous() for k, t in (("x", x), ("residual", x), ("weight", w))}),
        ("no scale_out", fp8),
        ("small scale_out", {**fp8, "scale_out": torch.empty(4, 31, device=device)}),
        ("bad spec", {"quant": 0x7F, "quant_out": codes}),
        ("both strategies", {"flags": 0x300}),
        ("unknown flag", {"flags": 1 << 30}),
        ("unknown group", {"group_name": "nobody"}),
        ("negative epsilon", {"epsilon": -1.0}),
        ("fp32 residual without its flag", {"residual": x.float()}),
    ]
    return [(name, {**good, **change}) for name, change in changes]


@case("robustness", "wrong-arguments", worlds=(1, 2, 3, 4))
def wrong_arguments(env: Env) -> None:
    """ValueError before anything is launched, with a sentence; afterwards the group still works."""
    run(Config(4, 4096), env)
    torch.cuda.synchronize()
    problems = []
    for name, arguments in _wrong_calls(env):
        if name == "hidden of 12 bytes":
            arguments = {**arguments, "norm_out": torch.empty_like(arguments["x"])}
        try:
            torch.ops.arfusion.allreduce_rms_norm(**arguments)
            torch.cuda.synchronize()
            problems.append(f"{name}: accepted")
        except ValueError as error:
            if len(str(error)) < 20:
                problems.append(f"{name}: no sentence: {error}")
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {str(error)[:120]}")
    config = Config(4, 4096)
    verify(config, env, run(config, env))
    assert not problems, "; ".join(problems)


@case("robustness", "capture-first-use", worlds=(2, 3, 4))
def first_use_inside_a_capture(env: Env) -> None:
    """An error that names arf.prepare, on all ranks; after prepare the capture works."""
    from arfusion_pass.runtime import workspace

    run(Config(4, 4096), env)
    torch.cuda.synchronize()
    env.barrier()
    workspace.destroy(env.group_name)
    config = Config(8, 4096)
    x, shared, result = rank_input(config, env.rank, env.device), shared_inputs(config, env.device), None
    result = allocate(config, env.device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="prepare"), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        launch(config, env, x, shared, result)
    torch.cuda.synchronize()
    env.barrier()
    made = workspace.prepare(env.group, 64, 4096, torch.bfloat16)
    assert made.decision.backend.value == "native", made.decision
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        launch(config, env, x, shared, result)
    for _ in range(3):
        graph.replay()
    verify(config, env, result)
    assert_bits("eager", run(config, env)["norm_out"], result["norm_out"])
    torch.cuda.synchronize()
    env.barrier()
    workspace.destroy(env.group_name)
