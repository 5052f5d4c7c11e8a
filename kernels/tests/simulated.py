"""All ranks in one launch on one GPU: worlds 2 to 8, every epilogue and quantiser, against the reference, bit for bit.

    python simulated.py LIBRARY.so            # everything
    python simulated.py LIBRARY.so --quick    # a few dozen cases, for compute-sanitizer memcheck
    python simulated.py LIBRARY.so --race     # one of each kind of path, for racecheck, which is slow

Without a GPU, LIBRARY.so is one of kernels/tests/emulated.

One set of buffers serves all cases of a world, so every launch also checks that the one before it left them empty.
Besides the exact contract (tests/gpu/calls.py) each case checks that all ranks have the same bits.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import sys
import time

import torch

import arfusion_pass.ops.library  # noqa: F401  (defines the ops)
from arfusion_pass.ops import reference
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
from arfusion_pass.runtime import c_api
from kernels.tests.machine import DEVICE, EMULATED, host_mapped, load, stream, synchronize
from tests.gpu import rare
from tests.gpu.calls import Config, Result, allocate, assert_same_codes, rank_input, shared_inputs, verify_epilogue

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
EPSILON_DTYPES = {**DTYPES, torch.float64: 3}
FACTORS = {"none": 0, "value": 1, "element": 2, "rows": 3}
FP8, INT8, NVFP4, MXFP8 = QuantFormat.FP8, QuantFormat.INT8, QuantFormat.NVFP4, QuantFormat.MXFP8
ALL = ("allreduce_out", "residual_out", "norm_out", "quant_out")

PUSHED = 4112  # the narrowest rows, about, for which some CTAs only push

GROUP = QuantSpec(FP8, 128, ScaleLayout.ROW, bound_on=Bound.AMAX, bound=1e-4)
SPECS = {
    "static": QuantSpec(FP8, 0),
    "static_reciprocal": QuantSpec(FP8, 0, apply=Apply.RECIPROCAL),
    "static_multiply": QuantSpec(FP8, 0, apply=Apply.MULTIPLY),
    "static_in_dtype": QuantSpec(FP8, 0, in_dtype=True),
    "static_unclamped": QuantSpec(FP8, 0, clamp=False),
    "token": QuantSpec(FP8, -1, bound_on=Bound.SCALE, bound=1 / 512 / 448),
    "token_max_over_amax": QuantSpec(FP8, -1, bound_on=Bound.AMAX, bound=1e-12, apply=Apply.MAX_OVER_AMAX),
    "int8": QuantSpec(INT8, -1),
    "int8_reciprocal": QuantSpec(INT8, -1, apply=Apply.RECIPROCAL, clamp=False, bound_on=Bound.SCALE, bound=1e-7),
    "group128": GROUP,
    "group128_column": dataclasses.replace(GROUP, layout=ScaleLayout.COLUMN),
    "group128_tma": dataclasses.replace(GROUP, layout=ScaleLayout.COLUMN_TMA),
    "group64": dataclasses.replace(GROUP, group=64, scale_rule=ScaleRule.MULTIPLY),
    "group32": dataclasses.replace(GROUP, group=32, scale_rule=ScaleRule.RECIPROCAL, apply=Apply.RECIPROCAL),
    "group128_tensor": dataclasses.replace(GROUP, scale_round=ScaleRound.TENSOR, in_dtype=True),
    "group128_pow2": dataclasses.replace(GROUP, scale_round=ScaleRound.POW2, bound_on=Bound.SCALE),
    "group128_log2": dataclasses.replace(GROUP, scale_round=ScaleRound.POW2_LOG2),
    "packed128": dataclasses.replace(GROUP, layout=ScaleLayout.PACKED_UE8M0, scale_round=ScaleRound.POW2),
    "packed64_unrounded": dataclasses.replace(
        GROUP, group=64, layout=ScaleLayout.PACKED_UE8M0, scale_round=ScaleRound.POW2_LOG2
    ),
    "nvfp4_128x4": QuantSpec(NVFP4, 16, ScaleLayout.SWIZZLED_128X4),
    "nvfp4_8x4": QuantSpec(NVFP4, 16, ScaleLayout.SWIZZLED_8X4),
    "nvfp4_linear": QuantSpec(NVFP4, 16, ScaleLayout.LINEAR),
    "mxfp8_128x4": QuantSpec(MXFP8, 32, ScaleLayout.SWIZZLED_128X4),
    "mxfp8_linear": QuantSpec(MXFP8, 32, ScaleLayout.LINEAR, scale_rule=ScaleRule.MULTIPLY),
}


class Ranks:
    """Buffers, control words and error records of a simulated world."""

    def __init__(self, library: ctypes.CDLL, world: int, size: int = 64 << 20) -> None:
        self.library, self.world, self.size = library, world, size
        self.buffers = [torch.full((size,), 255, dtype=torch.uint8, device=DEVICE) for _ in range(world)]
        self.controls = [torch.zeros(c_api.CONTROL_BYTES, dtype=torch.uint8, device=DEVICE) for _ in range(world)]
        self.errors = [host_mapped(16) for _ in range(world)]

    def launch(self, calls: list[c_api.Call], timeout_s: float = 5.0) -> None:
        def pointers(tensors: list[torch.Tensor]):
            return (ctypes.c_void_p * self.world)(*[t.data_ptr() for t in tensors])

        c_api.check(
            self.library, "arf_launch_simulated", self.world, (c_api.Call * self.world)(*calls), pointers(self.buffers),
            self.size, pointers(self.controls), pointers(self.errors), int(timeout_s * 1e9),
            stream(),
        )  # fmt: skip

    def assert_clean(self) -> None:
        synchronize()
        for rank, error in enumerate(self.errors):
            assert int(error[0]) == 0, f"rank {rank}'s wait expired: {error.tolist()}"
        for rank, buffer in enumerate(self.buffers):
            dirty = int((buffer.view(torch.int64) != -1).sum())
            assert dirty == 0, f"rank {rank}'s buffer has {dirty} words that are not empty"
        for rank, control in enumerate(self.controls):
            pairs = control.view(torch.int32).view(-1, 2)[:1024]
            assert bool((pairs[:, 0] == pairs[0, 0]).all()), f"rank {rank}'s generations differ"
            assert not bool(pairs[:, 1].any())


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def make_call(config: Config, x: torch.Tensor, shared, result: Result) -> c_api.Call:
    out = {name: buffer.tensor for name, buffer in result.buffers.items()}
    call = c_api.Call(
        op=0, dtype=DTYPES[config.dtype], tokens=config.tokens, hidden=config.hidden, x=x.data_ptr(),
        residual=pointer(shared.residual), weight=pointer(shared.weight), scale=pointer(shared.scale), scale_dtype=2,
        scale_value=shared.scale_value, epsilon=config.epsilon_given, weight_bias=config.weight_bias, flags=int(config.flags),
        quant_bound=config.spec.bound, quant=config.spec.pack(), scale_pad_last=not config.logical_scales,
    )  # fmt: skip
    call.residual_fp32 = shared.residual is not None and shared.residual.dtype == torch.float32
    call.weight_fp32 = shared.weight is not None and shared.weight.dtype == torch.float32
    call.residual_out_fp32 = "residual_out" in out and out["residual_out"].dtype == torch.float32
    call.norm_out_fp32 = "norm_out" in out and out["norm_out"].dtype == torch.float32
    call.addend, call.addend_rows = pointer(shared.addend), config.addend == "rows"
    call.factor, call.factor_value, call.factor_kind = (
        pointer(shared.factor),
        shared.factor_value,
        FACTORS[config.factor],
    )
    call.factor_fp32 = shared.factor is not None and shared.factor.dtype == torch.float32
    call.epsilon_tensor = pointer(shared.epsilon_tensor)
    call.epsilon_dtype = EPSILON_DTYPES[config.epsilon_in or torch.float32]
    for name, tensor in out.items():
        setattr(call, name, tensor.data_ptr())
    return call


def run_case(ranks: Ranks, config: Config) -> Result:
    """A call of all ranks, against the reference. Codes beside no norm are those beside a norm, which are known to the bit."""
    xs = [rank_input(config, r, DEVICE) for r in range(ranks.world)]
    shared = shared_inputs(config, DEVICE)
    results = [allocate(config, DEVICE) for _ in xs]
    ranks.launch([make_call(config, x, shared, result) for x, result in zip(xs, results, strict=True)])
    reduced = reference.sum_in_rank_order(torch.stack(xs))
    verify_epilogue(config, reduced, shared, results[0])
    first = results[0].tensors()
    for rank, result in enumerate(results[1:], 1):
        for a, b in zip(first, result.tensors(), strict=True):
            same = torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
            assert same, f"rank {rank} has other bits than rank 0"
    if "quant_out" in config.outputs and "norm_out" not in config.outputs:
        beside = run_case(ranks, dataclasses.replace(config, outputs=(*config.outputs, "norm_out")))
        assert_same_codes(results[0], beside)
    return results[0]


def run_local(config: Config) -> None:
    """The torch op with group "": binding, local kernel."""
    x, shared, result = rank_input(config, 0, DEVICE), shared_inputs(config, DEVICE), allocate(config, DEVICE)
    out = {name: buffer.tensor for name, buffer in result.buffers.items()}
    if result.scale_view is not None:
        out["scale_out"] = result.scale_view
    torch.ops.arfusion.allreduce_rms_norm(
        x, shared.residual, shared.weight, shared.scale, "", config.epsilon_given, config.weight_bias, int(config.flags),
        config.spec.pack(), config.spec.bound, shared.scale_value, addend=shared.addend,
        epsilon_tensor=shared.epsilon_tensor, factor=shared.factor, factor_value=shared.factor_value, **out,
    )  # fmt: skip
    verify_epilogue(config, x, shared, result)


def cases() -> list[Config]:
    base = Config(tokens=5, hidden=4096, outputs=ALL)
    plain = ("allreduce_out", "residual_out", "norm_out")
    made = []
    for dtype, (name, spec) in itertools.product(DTYPES, SPECS.items()):
        hidden = 2048 if dtype == torch.float32 else 7168 if name.startswith("group128") else 4096
        made.append(dataclasses.replace(base, dtype=dtype, spec=spec, hidden=hidden, tokens=7))
        if spec.group > 0 or name == "token":
            made.append(dataclasses.replace(base, dtype=dtype, spec=spec, hidden=hidden // 2, tokens=130))
            made.append(
                dataclasses.replace(
                    base,
                    dtype=dtype,
                    spec=dataclasses.replace(spec, unrounded=True),
                    hidden=384,
                    tokens=3,
                    norm_fp32=True,
                    logical_scales=True,
                )
            )
    for dtype, residual, weight in itertools.product(DTYPES, ("none", "same", "fp32"), ("none", "same", "fp32")):
        flags = [0, int(Flags.UNROUNDED_SUM), int(Flags.ROUND_BEFORE_WEIGHT), 3]
        for flag, bias, wide in itertools.product(flags, (0.0, 1.0), (False, True)):
            if (residual == "fp32" and not flag & 1) or (bias and weight == "none"):
                continue
            if wide and flag & 2 and dtype != torch.float32:
                continue  # where the two fp32 norms round apart to T before the weight, their products are far apart in fp32
            made.append(
                Config(
                    tokens=3,
                    hidden=2880 if dtype != torch.float32 else 1440,
                    dtype=dtype,
                    residual=residual,
                    weight=weight,
                    weight_bias=bias,
                    flags=flag,
                    outputs=plain,
                    norm_fp32=wide,
                    residual_out_fp32=wide,
                )
            )
    for hidden, dtype in itertools.product((8, 16, 24, 256, 264, 2880, 5120, 6144, 8192, 8200, 12288, 16384), DTYPES):
        for tokens in (1, 2, 9):
            made.append(
                Config(
                    tokens=tokens, hidden=hidden, dtype=dtype, outputs=plain, weight="fp32" if tokens == 2 else "same"
                )
            )
    for outputs in (("allreduce_out",), ("residual_out",), ("norm_out",), ("allreduce_out", "norm_out")):
        made.append(Config(tokens=4, hidden=1024, outputs=outputs))
    for payload, dtype in itertools.product(PAYLOADS, DTYPES):
        made.append(
            Config(
                tokens=11,
                hidden=1024,
                dtype=dtype,
                payload=payload,
                residual="none",
                outputs=("allreduce_out", "residual_out"),
            )
        )
        made.append(Config(tokens=11, hidden=1024, dtype=dtype, payload=payload, outputs=plain))
    for tokens in (17, 64, 300, 1000):
        made.append(Config(tokens=tokens, hidden=1024, outputs=plain))
    for tokens, hidden, dtype in itertools.product(
        (300, 257), (7168, PUSHED), DTYPES
    ):  # enough for CTAs that only push
        made.append(
            Config(tokens=tokens, hidden=hidden if dtype != torch.float32 else hidden // 2, dtype=dtype, outputs=plain)
        )
    return made + straight_cases() + near_cases() + token_rows() + rare.configs()


PAYLOADS = ("specials", "negative_zero", "sentinel", "subnormal", "nan_rank")
STRAIGHT = ("static", "token", "group128", "nvfp4_128x4", "nvfp4_linear", "mxfp8_128x4")


def straight_cases() -> list[Config]:
    """What a decode step asks for: kernels of their own (plan.cu: is_straight)."""
    made = []
    for dtype, (name, quant), flag in itertools.product(
        DTYPES,
        (("", "norm_out"), *((name, "quant_out") for name in STRAIGHT)),
        (0, int(Flags.UNROUNDED_SUM), int(Flags.ROUND_BEFORE_WEIGHT), 3),
    ):
        spec = SPECS[name] if name else NO_QUANT
        hidden = 4096 if flag & 2 else 2176  # clusters of several CTAs; a last tile of their own
        made.append(
            Config(tokens=3, hidden=hidden, dtype=dtype, spec=spec, flags=flag, outputs=("residual_out", quant))
        )
    for payload, dtype, name in itertools.product(PAYLOADS, (torch.bfloat16, torch.float16), STRAIGHT):
        outputs = ("residual_out", "quant_out")
        made.append(Config(tokens=5, hidden=1024, dtype=dtype, spec=SPECS[name], payload=payload, outputs=outputs))
    return made


def near_cases() -> list[Config]:
    """Straight but for a factor, an addend, a bias to the weight or epsilon in memory: kernels of their own (plan.cu)."""
    made = []
    steps = list(itertools.product(("none", "row", "rows"), (("none", False), *rare.FACTORS)))
    for dtype, name, (addend, (factor, wide)) in itertools.product(
        (torch.bfloat16, torch.float16), ("", "static"), steps
    ):
        spec, outputs = SPECS[name] if name else NO_QUANT, ("residual_out", "quant_out" if name else "norm_out")
        both = addend != "none" and factor != "none"
        for flag in (0, 3, *((int(Flags.ADDEND_SCALED),) if both else ())):
            hidden = 4096 if flag & 2 else 2176
            shape = Config(tokens=3, hidden=hidden, dtype=dtype, spec=spec, flags=flag, outputs=outputs)
            shape = dataclasses.replace(shape, addend=addend, factor=factor, factor_fp32=wide)
            made.append(dataclasses.replace(shape, weight_bias=float(len(made) % 2)))
    for dtype, flag, bias, epsilon_in in itertools.product(
        (torch.bfloat16, torch.float16), (0, 1, 2, 3), (0.0, 1.0), (None, torch.float64, torch.bfloat16)
    ):
        shape = Config(tokens=6, hidden=2880, dtype=dtype, flags=flag, weight_bias=bias)
        made.append(dataclasses.replace(shape, epsilon=0.3 if epsilon_in else 1e-6, epsilon_in=epsilon_in))
    for payload, dtype, residual in itertools.product(
        PAYLOADS, (torch.bfloat16, torch.float16), ("same", "negative_zero")
    ):
        shape = Config(tokens=5, hidden=1024, dtype=dtype, payload=payload, residual=residual)
        made += [dataclasses.replace(shape, factor="value"), dataclasses.replace(shape, addend="row")]
    return made


def token_rows() -> list[Config]:
    """Rows enough that some of their largest norms lie next to a boundary of T (epilogue.cuh: find_amax)."""
    base = Config(tokens=1000, hidden=256, spec=SPECS["token"], outputs=("residual_out", "quant_out"))
    dtypes = (torch.float16, torch.bfloat16)
    return [
        dataclasses.replace(base, dtype=dtype, seed=seed, flags=flag)
        for dtype, seed, flag in itertools.product(dtypes, range(12), (0, int(Flags.UNROUNDED_SUM)))
    ]


def run_moe(ranks: Ranks | None) -> int:
    """Both prologues against the reference, simulated or local."""
    count = 0
    flag_sets = (
        [0]
        + [
            int(f)
            for f in (Flags.MOE_ROUND_PRODUCT, Flags.MOE_ROUND_PARTIAL, Flags.MOE_ROUND_SUM, Flags.MOE_ROUND_SCALED)
        ]
        + [0xF << 16]
    )
    for dtype, flags, tokens in itertools.product(DTYPES, flag_sets, (1, 6)):
        generator = torch.Generator(DEVICE).manual_seed(tokens)
        hidden, experts, top_k = 2048, 5, 4

        def rand(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE)

        world = ranks.world if ranks else 1
        for kind, weight_dtype in (
            ("reduce", torch.float32),
            ("finalize", torch.float32),
            ("finalize", dtype),
            ("finalize", None),
        ):
            calls, references, outs, keep = [], [], [], []
            for rank in range(world):
                out = torch.empty(tokens, hidden, dtype=dtype, device=DEVICE)
                shared = rand(tokens, hidden).to(dtype)
                call = c_api.Call(
                    dtype=DTYPES[dtype],
                    tokens=tokens,
                    hidden=hidden,
                    flags=flags,
                    allreduce_out=out.data_ptr(),
                    shared=shared.data_ptr(),
                    epsilon=1e-6,
                    routed_scaling_factor=1.0,
                )
                if kind == "reduce":
                    x, scale = rand(experts, tokens, hidden).to(dtype), rand(experts, tokens)
                    references.append(reference.moe_reduce(x, scale, shared, flags))
                    call.op, call.experts, call.x, call.expert_scale, call.expert_scale_fp32 = (
                        1,
                        experts,
                        x.data_ptr(),
                        scale.data_ptr(),
                        1,
                    )
                    if ranks is None:
                        torch.ops.arfusion.moe_reduce_allreduce_rms_norm(
                            x, scale, shared, None, None, None, "", flags=flags, allreduce_out=out
                        )
                else:
                    rows = 3 * tokens
                    x = rand(rows, hidden).to(dtype)
                    index = torch.randint(
                        -1, rows, (tokens, top_k), generator=generator, device=DEVICE, dtype=torch.int32
                    )
                    scale = None if weight_dtype is None else rand(tokens, top_k).to(weight_dtype)
                    references.append(reference.moe_finalize(x, index, scale, shared, 2.5, flags))
                    call.op, call.experts, call.x, call.index, call.permuted_rows = (
                        2,
                        top_k,
                        x.data_ptr(),
                        index.data_ptr(),
                        rows,
                    )
                    call.expert_scale, call.routed_scaling_factor = pointer(scale), 2.5
                    call.expert_scale_fp32 = scale is not None and scale.dtype == torch.float32
                    keep.append(index)
                    if ranks is None:
                        torch.ops.arfusion.moe_finalize_allreduce_rms_norm(
                            x, index, scale, shared, 2.5, None, None, None, "", flags=flags, allreduce_out=out
                        )
                calls.append(call), outs.append(out), keep.append((x, scale, shared))
            if ranks:
                ranks.launch(calls)
            synchronize()
            want = reference.sum_in_rank_order(torch.stack(references))
            for rank, out in enumerate(outs):
                assert torch.equal(out, want), (
                    f"moe {kind} {dtype} flags {flags:#x} rank {rank}: {int((out != want).sum())} differ"
                )
            count += 1
    return count


def run_invariance(ranks: Ranks) -> int:
    """A token's bits do not depend on strategy, threads, clusters, batch or world's split: all runs against the first."""
    count = 0
    override = ranks.library.arf_set_launch_override
    for dtype, hidden, name in itertools.product(DTYPES, (2880, 4096), (None, "static", "token", "mxfp8_linear")):
        spec = NO_QUANT if name is None else SPECS[name]
        outputs = ("residual_out", "norm_out") + (() if name is None else ("quant_out",))
        base = Config(tokens=40, hidden=hidden, dtype=dtype, spec=spec, outputs=outputs)
        xs, shared = [rank_input(base, r, DEVICE) for r in range(ranks.world)], shared_inputs(base, DEVICE)
        first: list[torch.Tensor] | None = None
        for flag, threads, ctas, tokens in itertools.product(
            (Flags.ONESHOT, Flags.TWOSHOT), (0, 64, 256, 1024), (0, 8), (1, 7, 40)
        ):
            override(threads, ctas)
            config = dataclasses.replace(base, tokens=tokens, flags=int(flag))
            results = [allocate(config, DEVICE) for _ in xs]
            ranks.launch([make_call(config, x, shared, r) for x, r in zip(xs, results, strict=True)])
            override(0, 0)
            synchronize()
            got = [t[:tokens].view(tokens, -1).view(torch.uint8) for t in results[-1].tensors()]
            if tokens == 40 and first is None:
                first = got
            elif first is not None:
                for a, b in zip(got, first, strict=True):
                    assert torch.equal(a, b[:tokens]), f"{config} threads {threads} ctas {ctas}"
            count += 1
    return count


def run_expiry(library: ctypes.CDLL) -> None:
    """Rank 1 is poisoned and sends nothing: rank 0 gives up in time, writes the record, and its output is NaN."""
    ranks = Ranks(library, 2, 1 << 22)
    ranks.controls[1].view(torch.int32)[1::2] = 1
    for strategy in (int(Flags.ONESHOT), int(Flags.TWOSHOT)):
        ranks.controls[0].zero_()
        ranks.errors[0].zero_()
        config = Config(tokens=4, hidden=1024, flags=strategy, outputs=("norm_out",))
        xs, shared = [rank_input(config, r, DEVICE) for r in range(2)], shared_inputs(config, DEVICE)
        results = [allocate(config, DEVICE) for _ in xs]
        start = time.time()
        ranks.launch([make_call(config, x, shared, r) for x, r in zip(xs, results, strict=True)], timeout_s=0.2)
        synchronize()
        took = time.time() - start
        record = ranks.errors[0].tolist()
        assert record[0] == 1 and record[1] == 0 and record[2] == 1, record
        assert all(bool(r["norm_out"].isnan().all()) for r in results), "the outputs of an expired launch are NaN"
        assert EMULATED or 0.15 < took < 2, took
        print(f"expiry: {took:.2f} s, record {record[:7]}")


def host_time() -> None:
    x = torch.randn(1, 4096, device=DEVICE, dtype=torch.bfloat16)
    weight, residual, out, norm = (torch.ones_like(x[0]), torch.randn_like(x), torch.empty_like(x), torch.empty_like(x))
    op = torch.ops.arfusion.allreduce_rms_norm

    def call() -> None:
        op(x, residual, weight, None, "", residual_out=out, norm_out=norm)

    for name, f in (("arfusion op, group ''", call), ("torch.add(out=)", lambda: torch.add(x, residual, out=out))):
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(500):
                f()
            times.append((time.perf_counter() - start) / 500 * 1e6)
        print(f"host time {name}: {sorted(times)[10]:.2f} us")


def graph_time() -> None:
    """The local kernel in a graph of 100, us: what the epilogues cost beside the plain norm."""
    print("local kernel, us: hidden tokens plain then", *("static", "token", "group128", "nvfp4_128x4", "mxfp8_128x4"))
    for hidden, tokens in itertools.product((4096, 7168), (1, 64, 1024)):
        row = []
        for name in (None, "static", "token", "group128", "nvfp4_128x4", "mxfp8_128x4"):
            spec = NO_QUANT if name is None else SPECS[name]
            config = Config(
                tokens=tokens,
                hidden=hidden,
                spec=spec,
                outputs=("residual_out", "norm_out") if name is None else ("residual_out", "quant_out"),
            )
            x, shared, result = rank_input(config, 0, DEVICE), shared_inputs(config, DEVICE), allocate(config, DEVICE)
            out = {n: b.tensor for n, b in result.buffers.items()}

            def call() -> None:
                torch.ops.arfusion.allreduce_rms_norm(
                    x,
                    shared.residual,
                    shared.weight,
                    shared.scale,
                    "",
                    1e-6,
                    0.0,
                    0,
                    spec.pack(),
                    spec.bound,
                    shared.scale_value,
                    **out,
                )

            call()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(100):
                    call()
            times = []
            for _ in range(7):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end) * 10)
            row.append(f"{sorted(times)[3]:7.2f}")
        print(f"  {hidden} x {tokens:<5}", *row)


def races(library: ctypes.CDLL) -> None:
    """Rows over clusters and in one CTA, common calls and others, both strategies, CTAs that only push."""
    ranks = Ranks(library, 2, 16 << 20)
    row = Config(tokens=3, hidden=1024, outputs=ALL)
    paths = {
        "cluster, group-128 FP8": dataclasses.replace(row, spec=GROUP),
        "cluster, token FP8, fp32 weight": dataclasses.replace(row, spec=SPECS["token"], weight="fp32"),
        "one CTA a row, token FP8": dataclasses.replace(row, spec=SPECS["token"], tokens=150, hidden=256),
        "one CTA a row, NVFP4": dataclasses.replace(row, spec=SPECS["nvfp4_128x4"], tokens=70, hidden=256),
        "CTAs that only push": Config(tokens=257, hidden=PUSHED),
    }
    for (name, config), flag in itertools.product(paths.items(), (Flags.ONESHOT, Flags.TWOSHOT)):
        start = time.time()
        run_case(ranks, dataclasses.replace(config, flags=int(flag)))
        print(f"{flag.name} {name}: {time.time() - start:.1f} s", flush=True)
    ranks.assert_clean()


def main() -> None:
    library = load(sys.argv[1])
    if "--race" in sys.argv:
        return races(library)
    quick = "--quick" in sys.argv
    failures, count = [], 0

    def attempt(what: str, run) -> None:
        nonlocal count
        count += 1
        try:
            run()
        except AssertionError as error:
            failures.append(f"{what}: {error}")
            if len(failures) <= 40:
                print("FAIL", failures[-1][:100] + " ... " + failures[-1][-300:], flush=True)

    everything = cases()
    if quick:
        everything = [
            c
            for i, c in enumerate(everything)
            if (i % 23 == 0 and c.tokens < 200) or ((c.tokens, c.hidden) == (257, PUSHED) and c.addend == "none")
        ] + (straight_cases() + near_cases())[::7]
        everything += [
            c for c in rare.configs() if c.dtype == torch.bfloat16 and c.tokens in (6, 40) and c.hidden <= 720
        ]
    start = time.time()
    if not quick:
        for config in everything + [dataclasses.replace(c, tokens=2000) for c in everything[:6]]:
            attempt(f"local {config}", lambda c=config: run_local(c))
        attempt("local moe", lambda: run_moe(None))
        print(f"local: {count} cases, {len(failures)} failures, {time.time() - start:.0f} s", flush=True)
    for world in (3,) if quick else (2, 3, 4, 5, 6, 7, 8):
        ranks = Ranks(library, world, (64 << 20) if not quick else (16 << 20))
        for i, config in enumerate(everything):
            if not quick and (i + world) % 4 and config.tokens not in (257, 300):
                continue
            for flag in (Flags.ONESHOT, Flags.TWOSHOT):
                chosen = dataclasses.replace(config, flags=int(config.flags) | int(flag))
                attempt(f"world {world} {flag.name} {chosen}", lambda r=ranks, c=chosen: run_case(r, c))
            if any(int(e[0]) for e in ranks.errors):
                attempt(f"world {world} after {chosen}", ranks.assert_clean)
                ranks = Ranks(library, world)
        attempt(f"world {world} moe", lambda r=ranks: run_moe(r))
        if not (quick and EMULATED):  # six minutes there
            attempt(f"world {world} invariance", lambda r=ranks: run_invariance(r))
        attempt(f"world {world} buffers", ranks.assert_clean)
        print(f"world {world}: {count} cases, {len(failures)} failures, {time.time() - start:.0f} s", flush=True)
    if not quick:
        run_expiry(library)
    if not quick and not EMULATED:
        host_time()
        graph_time()
    print(f"{count} cases, {len(failures)} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
