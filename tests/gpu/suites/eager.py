"""The eager API on GPUs: the native kernels against the reference, and against FlashInfer where it is right.

FlashInfer's cases are noted as skipped where ``flashinfer.comm`` cannot be imported (``pip install flashinfer-python``,
or the kit of ``flashinfer_kit.py`` on the path).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from arfusion_pass import comm
from arfusion_pass.ops.spec import Flags
from arfusion_pass.runtime import workspace as symmetric
from tests.gpu.compare import assert_bits, assert_norm, steps_apart
from tests.gpu.harness import Env, case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPSILON = 1e-3
Outputs = dict[str, torch.Tensor]


def make(env: Env, backend: str = "auto", **changes: Any) -> comm.AllReduceFusionWorkspace:
    arguments = {"group": env.group, "max_token_num": 2048, "hidden_dim": 8192, "dtype": BF16, **changes}
    return comm.create_allreduce_fusion_workspace(backend, world_size=None if env.group else 1, **arguments)


def tensors(env: Env, tokens: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """The input differs between ranks, the residual and the weight do not."""

    def values(number: int, *shape: int) -> torch.Tensor:
        generator = torch.Generator(env.device).manual_seed(number)
        return (torch.randn(shape, generator=generator, device=env.device) * 2).to(dtype)

    return {
        "input": values(1000 + env.rank + 64 * seed, tokens, hidden),
        "residual_in": values(seed, tokens, hidden),
        "rms_gamma": values(500 + seed, hidden),
    }


def outputs(env: Env, pattern: int, tokens: int, hidden: int, dtype: torch.dtype, options: dict[str, Any]) -> Outputs:
    """What the pattern names, poisoned, as FlashInfer wants it."""

    def full(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        return torch.full((size,), 0x5A, dtype=torch.uint8, device=env.device).view(dtype).view(shape)

    if pattern == 0:
        return {"output": full(tokens, hidden, dtype=dtype)}
    given = {"residual_out": full(tokens, hidden, dtype=dtype)}
    if pattern in (1, 4, 5, 9, 11):
        given["norm_out"] = full(tokens, hidden, dtype=dtype)
    if pattern in (3, 5):
        given["quant_out"] = full(tokens, hidden // 2, dtype=torch.uint8)
        layout = options.get("layout_code", 0)
        rows, columns = ((128, 8, 1)[layout], -(-hidden // 64) * 4 if layout < 2 else hidden // 16)
        given["scale_out"] = full(-(-tokens // rows) * rows, columns, dtype=torch.uint8)
    elif pattern > 1:
        given["quant_out"] = full(tokens, hidden, dtype=torch.float8_e4m3fn)
    if pattern in (8, 9):
        words, ld = -(-hidden // options["block_quant_group_size"] // 4), -(-tokens // 4) * 4
        given["scale_out"] = full(words * ld, dtype=torch.int32).as_strided((tokens, words), (1, ld))
    if pattern in (10, 11):
        given["scale_out"] = full(tokens, 1, dtype=FP32)
    return given


PATTERNS: list[tuple[int, dict[str, Any]]] = [
    (0, {}),
    (0, {"use_oneshot": True}),
    (0, {"use_oneshot": False}),
    (1, {"launch_with_pdl": True}),
    (1, {"weight_bias": 1.0}),
    (2, {"scale_factor": 0.037}),
    (4, {"scale_factor": "tensor"}),
    (3, {"scale_factor": 61.0, "layout_code": 0}),
    (5, {"scale_factor": "tensor", "layout_code": 1}),
    (5, {"scale_factor": 61.0, "layout_code": 2}),
    (8, {"block_quant_group_size": 128}),
    (9, {"block_quant_group_size": 32}),
    (10, {}),
    (11, {"use_oneshot": False}),
]
SHAPES = [(1, 2048, BF16), (17, 4096, FP16), (64, 7168, BF16), (128, 2880, BF16), (600, 8192, BF16)]


def call(
    env: Env,
    function: Callable[..., Any],
    workspace: Any,
    pattern: int,
    options: dict[str, Any],
    shape: tuple[int, int, torch.dtype],
) -> Outputs:
    given = outputs(env, pattern, *shape, options)
    options = dict(options)
    if options.get("scale_factor") == "tensor":
        options["scale_factor"] = torch.full((1,), 0.037, device=env.device)
    inputs = tensors(env, *shape, seed=pattern)
    function(**inputs, workspace=workspace, pattern=pattern, rms_eps=EPSILON, fp32_acc=True, **options, **given)
    return given


def fits(pattern: int, options: dict[str, Any], hidden: int) -> bool:
    return hidden % options.get("block_quant_group_size", 16) == 0


def compare(env: Env, ours: Outputs, theirs: Outputs, what: str, approximate: bool = False) -> None:
    """Sums bit-equal, the norm one value off at most, codes and scales equal wherever a row's norm is.

    ``approximate``: theirs divides with fast math: a scale per token may be one fp32 value off, and codes under it one
    value off, where they are near a tie.
    """
    for name in ("output", "residual_out"):
        if name in ours:
            assert_bits(f"{what} {name}", ours[name], theirs[name])
    same = torch.ones(next(iter(ours.values())).shape[0], dtype=torch.bool, device=env.device)
    if "norm_out" in ours:
        assert_norm(f"{what} norm_out", ours["norm_out"], theirs["norm_out"])
        same = (steps_apart(ours["norm_out"], theirs["norm_out"]) == 0).all(-1)
        by_token = approximate and ours.get("scale_out", ours["norm_out"]).dtype == FP32
        if by_token:
            apart = steps_apart(ours["scale_out"], theirs["scale_out"])
            assert apart.max() <= 1, f"{what} scale_out: {apart.max().item()} values apart"
            same &= (apart == 0).squeeze(-1)
    if "quant_out" in ours:
        codes, other = (one["quant_out"].view(torch.uint8) for one in (ours, theirs))
        wrong = (codes != other).any(-1)
        if "norm_out" in ours:
            if by_token:
                far = steps_apart(ours["quant_out"], theirs["quant_out"])[same]
                assert far.numel() == 0 or far.max() <= 1, f"{what}: codes {far.max().item()} values apart"
                assert (far > 0).float().mean() < 1e-3 or far.numel() == 0, f"{what}: too many codes differ"
            else:
                assert not (wrong & same).any(), f"{what}: codes differ where norm and scale are the same"
        else:  # without the norm only few codes may differ, where it rounded otherwise
            assert (codes != other).float().mean() < 2e-3, f"{what}: too many codes differ"
    if "scale_out" in ours and "norm_out" in ours and same.all():
        assert_bits(f"{what} scale_out", ours["scale_out"].contiguous(), theirs["scale_out"].contiguous())


@case("eager", "patterns", worlds=(1, 2, 3, 4))
def patterns(env: Env) -> None:
    """Every pattern, on our kernels and on the reference of the same API."""
    with make(env) as native, make(env, "reference") as reference:
        assert native.backend == "native", native.backend
        for shape in SHAPES:
            for pattern, options in PATTERNS:
                if fits(pattern, options, shape[1]):
                    what = f"pattern {pattern} {options} {shape}"
                    ours = call(env, comm.allreduce_fusion, native, pattern, options, shape)
                    theirs = call(env, comm.allreduce_fusion, reference, pattern, options, shape)
                    compare(env, ours, theirs, what)
                    env.same(*(tensor.contiguous() for tensor in ours.values()))


@case("eager", "mnnvl", worlds=(2, 3, 4))
def mnnvl(env: Env) -> None:
    """``trtllm_mnnvl_*`` in each strategy, on our kernels and on the reference."""
    fused, kinds = comm.trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant, comm.MNNVLQuantType
    scale = torch.full((1,), 0.037, device=env.device)
    with make(env) as native, make(env, "reference") as reference:
        for tokens, hidden, dtype in SHAPES:
            given = tensors(env, tokens, hidden, dtype)
            x, residual, gamma = given["input"], given["residual_in"], given["rms_gamma"]
            for strategy in comm.MNNVLAllreduceFusionStrategy:
                ours, theirs = (
                    comm.trtllm_mnnvl_allreduce(x, space, True, strategy=strategy) for space in (native, reference)
                )
                assert_bits("output", ours, theirs)
                by_layout = (kinds.NVFP4, 0), (kinds.NVFP4, 1), (kinds.MXFP8, 0)
                for kind, layout in ((kinds.FP8, 0), (kinds.DYNAMIC_FP8, 0), *by_layout):
                    if hidden % {kinds.NVFP4: 16, kinds.MXFP8: 32}.get(kind, 1):
                        continue
                    results = []
                    for space in (native, reference):
                        norm = torch.empty_like(x)
                        codes, scales, total, _ = fused(
                            x, residual, gamma, space, output=norm, output_scale=scale, layout_code=layout,
                            quant_type=kind, launch_with_pdl=True, strategy=strategy, weight_bias=1.0,
                        )  # fmt: skip
                        results.append({"residual_out": total, "norm_out": norm, "quant_out": codes})
                        if kind == kinds.DYNAMIC_FP8:
                            results[-1]["scale_out"] = scales
                    compare(env, *results, f"{kind.name} {strategy.name} {tokens} x {hidden}")


@case("eager", "moe-functions", worlds=(2, 3, 4))
def moe_functions(env: Env) -> None:
    """FlashInfer's two MoE functions with our workspace for its pointers, against the reference."""
    experts, top_k, hidden = 8, 4, 2048
    with make(env) as native, make(env, "reference") as reference:
        for tokens in (1, 7, 64):
            g = torch.Generator(env.device).manual_seed(env.rank + tokens)
            common = tensors(env, tokens, hidden, BF16)
            rows = torch.randn(experts, tokens, hidden, generator=g, device=env.device).to(BF16)
            scales = torch.rand(experts, tokens, generator=g, device=env.device)
            index = torch.randint(
                -1, experts * tokens, (tokens, top_k), generator=g, device=env.device, dtype=torch.int32
            )
            results: list[list[Outputs]] = [[], []]
            for space, found in zip((native, reference), results, strict=True):
                first = {name: torch.empty(tokens, hidden, dtype=BF16, device=env.device) for name in MOE_OUTPUTS}
                comm.trtllm_moe_allreduce_fusion(
                    env.world, env.rank, tokens, hidden, space, True, common["residual_in"], common["rms_gamma"],
                    EPSILON, None, experts, scales, rows, common["input"], None, None, quant_out=None, scale_out=None,
                    **first,
                )  # fmt: skip
                second = {name: torch.empty(tokens, hidden, dtype=BF16, device=env.device) for name in MOE_OUTPUTS}
                comm.trtllm_moe_finalize_allreduce_fusion(
                    rows.view(-1, hidden), common["residual_in"], common["rms_gamma"], index, quant_out=None,
                    scale_out=None, workspace_ptrs=space, launch_with_pdl=True, world_rank=env.rank,
                    world_size=env.world, eps=EPSILON, shared_expert_output=common["input"],
                    expert_scale_factor=scales.T[:, :top_k].contiguous(), routed_scaling_factor=2.5, **second,
                )  # fmt: skip
                found += [first, second]
            for name, ours, theirs in zip(("reduce", "finalize"), *results, strict=True):
                compare(env, ours, theirs, f"{name} {tokens}")


@case("eager", "lifetime", worlds=(2, 4))
def lifetime(env: Env) -> None:
    """Workspaces have memory of their own: one is destroyed, another made, a captured graph goes on undisturbed."""
    symmetric.destroy()
    env.barrier()
    kept, other = make(env, max_token_num=64), make(env, max_token_num=64)
    inputs, out = tensors(env, 32, 4096, BF16), torch.empty(32, 4096, dtype=torch.float8_e4m3fn, device=env.device)

    def run(workspace: Any) -> None:
        comm.allreduce_fusion(**inputs, workspace=workspace, pattern=2, quant_out=out, scale_factor=0.037)

    run(kept)
    expected = out.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(kept)  # a float scale is legal here
    run(other)
    torch.cuda.synchronize()
    env.barrier()
    other.destroy()
    env.barrier()
    larger = make(env, max_token_num=1024)
    for workspace in (None, larger, None):
        out.view(torch.uint8).zero_()
        graph.replay() if workspace is None else run(workspace)
        assert_bits("quant_out", out.view(torch.uint8), expected.view(torch.uint8))
    torch.cuda.synchronize()
    env.barrier()
    kept.destroy()
    larger.destroy()
    assert symmetric.workspaces() == []


@case("eager", "sub-groups", worlds=(4,))
def sub_groups(env: Env) -> None:
    """Four GPUs as 2 x 2, each pair with its own workspace, interleaved with the whole."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with make(env, group=pairs[env.rank // 2]) as pair, make(env) as everyone:
        for tokens in (1, 64, 700):
            x = torch.full((tokens, 4096), float(1 << env.rank), dtype=BF16, device=env.device)
            two = comm.allreduce_fusion(x, pair, 0)
            four = comm.allreduce_fusion(x, everyone, 0)
            assert (two == (3.0 if env.rank < 2 else 12.0)).all()
            assert (four == 15.0).all()
        torch.cuda.synchronize()
        env.barrier()


def peer(env: Env, tokens: int = 2048, hidden: int = 8192, dtype: torch.dtype = BF16) -> tuple[Any, Any] | None:
    """(flashinfer.comm, its trtllm workspace), or None with a note."""
    try:
        module = importlib.import_module("flashinfer.comm")
    except Exception as error:
        env.note(f"skipped, flashinfer.comm cannot be imported: {error}"[:120])
        return None
    space = module.create_allreduce_fusion_workspace(
        backend="trtllm", world_size=env.world, rank=env.rank, max_token_num=tokens, hidden_dim=hidden, dtype=dtype
    )
    return module, space


@case("eager", "flashinfer", worlds=(2, 4))
def flashinfer(env: Env) -> None:
    """Patterns 0 to 2, 4 and 8 to 11 against FlashInfer's own result; NVFP4 where its conversion exists (sm_100)."""
    if (found := peer(env)) is None:
        return
    module, space = found
    sm100 = torch.cuda.get_device_capability()[0] >= 10
    count = 0
    with make(env) as native:
        for shape in SHAPES:
            for pattern, options in PATTERNS:
                nvfp4 = pattern in (3, 5)
                twoshot_short = options.get("use_oneshot") is False and shape[0] <= env.world
                if not fits(pattern, options, shape[1]) or twoshot_short:
                    continue
                if nvfp4 and (not sm100 or options["layout_code"] != 2):
                    continue
                ours = call(env, comm.allreduce_fusion, native, pattern, options, shape)
                theirs = call(env, module.allreduce_fusion, space, pattern, options, shape)
                compare(env, ours, theirs, f"pattern {pattern} {options} {shape}", approximate=True)
                count += 1
    env.note(f"{count} calls")


@case("eager", "flashinfer-moe", worlds=(2, 4))
def flashinfer_moe(env: Env) -> None:
    """Patterns 6 and 7, which round at every step there, the ranks included: a step a rank from ours told so."""
    if (found := peer(env)) is None:
        return
    module, space = found
    experts, top_k, hidden = 8, 8, 7168
    near: list[float] = []
    far: list[float] = []
    with make(env) as native:
        for tokens in (1, 16, 64):
            g = torch.Generator(env.device).manual_seed(env.rank + tokens)
            common = tensors(env, tokens, hidden, BF16)
            token_input = common.pop("input")
            rows = torch.randn(experts * tokens, hidden, generator=g, device=env.device).to(BF16)
            scales = torch.rand(experts, tokens, generator=g, device=env.device)
            index = torch.randint(
                0, experts * tokens, (tokens, top_k), generator=g, device=env.device, dtype=torch.int32
            )
            weights = torch.rand(tokens, top_k, generator=g, device=env.device).to(BF16)
            reduction = {
                "input": token_input,
                "pattern": 6,
                "moe_reduction_device_num_experts": experts,
                "moe_reduction_scale_input": scales,
                "moe_reduction_active_experts_token_input": rows,
                "moe_reduction_token_input": token_input,
            }
            finalize = {
                "input": rows,
                "pattern": 7,
                "expanded_idx_to_permuted_idx": index,
                "expert_scale_factor": weights,
                "shared_expert_output": token_input,
            }
            steps = int(Flags.MOE_ROUND_PRODUCT | Flags.MOE_ROUND_PARTIAL)  # where FlashInfer rounds
            epilogue = (common["residual_in"], common["rms_gamma"], None, env.group_name, EPSILON, 0.0, steps)
            ops, by_expert = torch.ops.arfusion, rows.view(experts, tokens, hidden)
            for arguments, op, inputs in (
                (
                    reduction,
                    ops.moe_reduce_allreduce_rms_norm,
                    (by_expert, scales, token_input),
                ),
                (finalize, ops.moe_finalize_allreduce_rms_norm, (rows, index, weights, token_input, 1.0)),
            ):
                once, stepwise, theirs = (
                    {name: torch.empty(tokens, hidden, dtype=BF16, device=env.device) for name in MOE_OUTPUTS}
                    for _ in range(3)
                )
                comm.allreduce_fusion(workspace=native, rms_eps=EPSILON, **common, **arguments, **once)
                module.allreduce_fusion(workspace=space, rms_eps=EPSILON, **common, **arguments, **theirs)
                op(*inputs, *epilogue, 0, 0.0, 1.0, **stepwise)
                for name in MOE_OUTPUTS:
                    step = torch.exp2(torch.floor(torch.log2(theirs[name].float().abs().amax(-1, keepdim=True))) - 7)
                    for result, limit, found in ((stepwise, env.world, near), (once, experts + 4, far)):
                        apart = ((result[name].float() - theirs[name].float()).abs() / step).amax().item()
                        found.append(apart)
                        assert apart <= limit, (
                            f"pattern {arguments['pattern']} {name}: {apart} bf16 steps of the row's largest"
                        )
    env.note(f"at most {max(near):g} steps of a row's largest value apart; ours rounded once: {max(far):g}")


MOE_OUTPUTS = ("residual_out", "norm_out")


@case("eager", "flashinfer-backend", worlds=(2, 4))
def flashinfer_backend(env: Env) -> None:
    """backend="flashinfer": what it gets right runs there, the rest on ours; both as the native backend computes it."""
    from arfusion_pass.runtime import flashinfer as backend

    if (reason := backend.unavailable()) is not None:
        env.note(f"skipped, {reason}"[:120])
        return
    with make(env, "flashinfer") as mixed, make(env) as native:
        assert mixed.backend == "flashinfer"
        for shape in SHAPES:
            for pattern, options in PATTERNS:
                if fits(pattern, options, shape[1]):
                    ours = call(env, comm.allreduce_fusion, native, pattern, options, shape)
                    theirs = call(env, comm.allreduce_fusion, mixed, pattern, options, shape)
                    compare(env, ours, theirs, f"pattern {pattern} {options} {shape}", approximate=True)
    env.note(f"{len(backend._told)} refusals")
