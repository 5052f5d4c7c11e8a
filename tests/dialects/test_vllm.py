"""vLLM's ops, registered here under its schemas with what its kernels compute, through torch.compile on two ranks."""

from __future__ import annotations

import pytest
import torch

from tests.dialects import engine_ops
from tests.dialects.cases import EPSILON, HIDDEN, TOKENS, Case, run, standard, verify

ADD, PLAIN = "AllReduceFusedAddRMSNorm", "AllReduceRMSNorm"
fp8 = torch.float8_e4m3fn


def register() -> None:
    engine_ops.register_vllm()


def reduce(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.vllm.all_reduce(x, "tp:0")


def ir_add(x, r, w, epsilon=EPSILON):  # type: ignore[no-untyped-def]
    return torch.ops.vllm_ir.fused_add_rms_norm(x, r, w, epsilon)


def c_norm(x, w):  # type: ignore[no-untyped-def]
    result = torch.empty_like(x)
    torch.ops._C.rms_norm(result, x, w, EPSILON)
    return result


def c_add_norm(x, r, w):  # type: ignore[no-untyped-def]
    torch.ops._C.fused_add_rms_norm(x, r, w, EPSILON)
    return x, r


def static(x, s, shape=None):  # type: ignore[no-untyped-def]
    result = torch.empty_like(x, dtype=fp8)
    torch.ops._C.static_scaled_fp8_quant(result, x, s, shape)
    return result


def per_token(x):  # type: ignore[no-untyped-def]
    result = torch.empty_like(x, dtype=fp8)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32)
    torch.ops._C.dynamic_per_token_scaled_fp8_quant(result, x, scale, None)
    return result, scale


def group_scales(x, group, kind):  # type: ignore[no-untyped-def]
    tokens, count = x.shape[0], x.shape[1] // group
    if kind == "row":
        return torch.empty(tokens, count, dtype=torch.float32)
    if kind == "column":
        return torch.empty(count, tokens, dtype=torch.float32).permute(1, 0)
    return torch.empty_strided((tokens, count), (1, (tokens + 3) // 4 * 4), dtype=torch.float32)


def per_group(x, group=128, kind="row", ue8m0=False):  # type: ignore[no-untyped-def]
    codes = torch.empty_like(x, dtype=fp8)
    scales = group_scales(x, group, kind)
    torch.ops._C.per_token_group_fp8_quant(
        x, codes, scales, group, 1e-10, -448.0, 448.0, ue8m0, kind != "row", kind == "tma"
    )
    return codes, scales


def packed(x, group=128):  # type: ignore[no-untyped-def]
    codes = torch.empty_like(x, dtype=fp8)
    tokens, words = x.shape[0], (x.shape[1] // group + 3) // 4
    scales = torch.empty_strided((tokens, words), (1, (tokens + 3) // 4 * 4), dtype=torch.int32)
    torch.ops._C.per_token_group_fp8_quant_packed(x, codes, scales, group, 1e-10, -448.0, 448.0)
    return codes, scales


def with_scale() -> tuple[torch.Tensor, ...]:
    return (*standard(), torch.tensor([0.02]))


def tiny() -> tuple[torch.Tensor, ...]:
    """A norm of rows so small that each scale is its lower bound."""
    x, r, w = standard()
    return x, r, w * 2.0**-14


def wide() -> tuple[torch.Tensor, ...]:
    """Rows of four groups of 96."""
    return tuple(torch.cat([each, each[..., :128]], -1).contiguous() for each in standard())


def f_group_odd(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return *per_group(norm, 96), total


def f_norm_block_odd(x, r, w):  # type: ignore[no-untyped-def]
    result, scale = torch.empty_like(x, dtype=fp8), torch.empty(x.shape[0], 4)
    torch.ops._C.rms_norm_per_block_quant(result, reduce(x), w, scale, EPSILON, None, None, 96, False)
    return result, scale


def f_ir_plain(x, r, w):  # type: ignore[no-untyped-def]
    return torch.ops.vllm_ir.rms_norm(reduce(x), w, EPSILON)


def f_ir_add(x, r, w):  # type: ignore[no-untyped-def]
    return ir_add(reduce(x), r, w)


def f_ir_add_swapped(x, r, w):  # type: ignore[no-untyped-def]
    return ir_add(r, reduce(x), w)


def f_ir_dead_residual(x, r, w):  # type: ignore[no-untyped-def]
    return ir_add(reduce(x), r, w)[0]


def f_ir_no_weight(x, r, w):  # type: ignore[no-untyped-def]
    return ir_add(reduce(x), r, None)


def f_ir_gemma(x, r, w):  # type: ignore[no-untyped-def]
    return ir_add(reduce(x), r, w.float() + 1.0)


def f_ir_two_layers(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w, 1e-5)
    norm2, total2 = ir_add(reduce(norm @ norm.new_ones(HIDDEN, HIDDEN)), total, w, 3e-6)
    return norm2, total2


def f_ir_variance_size(x, r, w):  # type: ignore[no-untyped-def]
    return torch.ops.vllm_ir.rms_norm(reduce(x), w, EPSILON, 64)


def f_ir_whole_variance(x, r, w):  # type: ignore[no-untyped-def]
    return torch.ops.vllm_ir.rms_norm(reduce(x), w, EPSILON, HIDDEN)


def f_ir_3d(x, r, w):  # type: ignore[no-untyped-def]
    y = reduce(x.view(2, TOKENS // 2, HIDDEN))
    norm, total = ir_add(y.view(-1, HIDDEN), r, w)
    return norm.view(2, TOKENS // 2, HIDDEN), total


def f_aten_add(x, r, w):  # type: ignore[no-untyped-def]
    total = r + reduce(x)
    return torch.ops.vllm_ir.rms_norm(total, w, EPSILON), total


def f_aten_norm(x, r, w):  # type: ignore[no-untyped-def]
    total = reduce(x) + r
    wide = total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    return w * wide.to(x.dtype), total


def f_c_plain(x, r, w):  # type: ignore[no-untyped-def]
    y = reduce(x)
    return c_norm(y, w), y


def f_c_add(x, r, w):  # type: ignore[no-untyped-def]
    return c_add_norm(reduce(x), r.clone(), w)


def f_c_add_view(x, r, w):  # type: ignore[no-untyped-def]
    y = reduce(x.view(2, TOKENS // 2, HIDDEN))
    total = r.clone().view(2, TOKENS // 2, HIDDEN)
    norm, _ = c_add_norm(y.view(-1, HIDDEN), total.view(-1, HIDDEN), w)
    return norm, total


def f_c_aten_add(x, r, w):  # type: ignore[no-untyped-def]
    total = reduce(x) + r
    return c_norm(total, w), total


def f_ir_fp32_sum(x, r, w):  # type: ignore[no-untyped-def]
    """The IR's norm reads an fp32 sum: its result is fp32, and others read the sum rounded."""
    total = reduce(x) + r.float()
    return torch.ops.vllm_ir.rms_norm(total, w, EPSILON), total.to(x.dtype)


def f_ir_fp32_sum_rounded(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = f_ir_fp32_sum(x, r, w)
    return norm.to(x.dtype), total


def f_ir_widened(x, r, w):  # type: ignore[no-untyped-def]
    return torch.ops.vllm_ir.rms_norm((reduce(x) + r).float(), w, EPSILON)


def f_c_fp32_weight(x, r, w):  # type: ignore[no-untyped-def]
    return c_norm(reduce(x), w.float() * 1.01)


def f_c_add_fp32_weight(x, r, w):  # type: ignore[no-untyped-def]
    return c_add_norm(reduce(x), r.clone(), w.float() * 1.01)


def f_c_fp32_sum(x, r, w):  # type: ignore[no-untyped-def]
    total = reduce(x) + r.float()
    return c_norm(total, w.float() * 1.01), total


def f_c_add_widened(x, r, w):  # type: ignore[no-untyped-def]
    """The op adds in fp32: its norm reads the unrounded sum."""
    return c_add_norm(reduce(x).float(), r.float() * 1.01, w.float() * 1.01)


def f_c_fp32_sum_only(x, r, w):  # type: ignore[no-untyped-def]
    return c_norm(reduce(x) + r.float(), w)


def f_c_norm_static_fp32_sum(x, r, w, s):  # type: ignore[no-untyped-def]
    total = reduce(x) + r.float()
    result = torch.empty_like(x, dtype=fp8)
    torch.ops._C.rms_norm_static_fp8_quant(result, total, w.float(), s, EPSILON)
    return result, total


def f_funcol_static(x, r, w, s):  # type: ignore[no-untyped-def]
    import torch.distributed as dist
    from torch.distributed import _functional_collectives as funcol

    norm, total = ir_add(funcol.all_reduce(x, "sum", dist.group.WORLD), r, w)
    return static(norm, s), total


def f_static(x, r, w, s):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return static(norm, s, [-1, -1]), total


def f_static_fp32_norm(x, r, w, s):  # type: ignore[no-untyped-def]
    """The op reads an fp32 norm of a bf16 sum: rounding it to bf16 first would give other codes."""
    total = reduce(x) + r
    wide = total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON) * w.float()
    return static(wide, s), total


def f_static_plain(x, r, w, s):  # type: ignore[no-untyped-def]
    y = reduce(x)
    return static(c_norm(y, w), s), y


def f_static_fan_out(x, r, w, s):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return static(norm, s), torch.ops.vllm.rocm_unquantized_gemm(norm, w.expand(16, HIDDEN)), total


def f_ir_static(x, r, w, s):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return torch.ops.vllm_ir.static_quant_fp8(norm, s, fp8), total


def f_ir_static_padded(x, r, w, s):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return torch.ops.vllm_ir.static_quant_fp8(norm, s, fp8, 17), total


def _ir_dynamic(*arguments, group=False, dead=False):  # type: ignore[no-untyped-def]
    """One of vLLM's dynamic IR quantisers behind its IR norm."""

    def f(x, r, w):  # type: ignore[no-untyped-def]
        norm, total = ir_add(reduce(x), r, w)
        op = torch.ops.vllm_ir.dynamic_group_quant_fp8 if group else torch.ops.vllm_ir.dynamic_quant_fp8
        outputs = op(norm, *arguments)
        return *(outputs[:1] if dead else outputs), total

    return f


def _ir_group(size=128, column=False, ue8m0=False, alignment=1, dead=False):  # type: ignore[no-untyped-def]
    return _ir_dynamic([1, size], column, ue8m0, fp8, alignment, group=True, dead=dead)


def f_ir_token_bounded(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return *torch.ops.vllm_ir.dynamic_quant_fp8(norm, True, fp8, norm.new_ones(1, dtype=torch.float32)), total


def f_per_channel(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return static(norm, norm.new_ones(HIDDEN, dtype=torch.float32), [-1, 1]), total


def f_token(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return *per_token(norm), total


def f_group_row(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return *per_group(norm), total


def f_group_column(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return *per_group(norm, kind="column"), total


def f_group_tma(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return *per_group(norm, kind="tma"), total


def f_group_ue8m0(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return *per_group(norm, 64, ue8m0=True), total


def f_group_dead_scales(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return per_group(norm)[0], total


def f_group_view(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x.view(2, TOKENS // 2, HIDDEN)), r.view(2, TOKENS // 2, HIDDEN), w)
    return *per_group(norm.view(-1, HIDDEN)), total


def f_indexer(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return *per_group(norm), torch.ops.vllm.rocm_unquantized_gemm(norm, w.expand(16, HIDDEN)), total


def f_group_packed(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return *packed(norm), total


def f_nvfp4(x, r, w, s):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return *torch.ops._C.scaled_fp4_quant(norm, s, False), total


def f_nvfp4_out(x, r, w, s):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    codes = torch.empty(x.shape[0], HIDDEN // 2, dtype=torch.uint8)
    scales = torch.empty((x.shape[0] + 127) // 128 * 128, HIDDEN // 64, dtype=torch.int32)
    torch.ops._C.scaled_fp4_quant.out(norm, s, True, output=codes, output_scale=scales)
    return codes, scales.view(torch.float8_e4m3fn), total


def f_mxfp8(x, r, w):  # type: ignore[no-untyped-def]
    norm, total = ir_add(reduce(x), r, w)
    return *torch.ops.vllm.mxfp8_quantize(norm, True), total


def f_mxfp8_linear(x, r, w):  # type: ignore[no-untyped-def]
    return torch.ops.vllm.mxfp8_quantize(torch.ops.vllm_ir.rms_norm(reduce(x), w, EPSILON))


def f_norm_static(x, r, w, s):  # type: ignore[no-untyped-def]
    result = torch.empty_like(x, dtype=fp8)
    torch.ops._C.rms_norm_static_fp8_quant(result, reduce(x), w, s, EPSILON)
    return result


def f_add_norm_static(x, r, w, s):  # type: ignore[no-untyped-def]
    result, total = torch.empty_like(x, dtype=fp8), r.clone()
    torch.ops._C.fused_add_rms_norm_static_fp8_quant(result, reduce(x), total, w, s, EPSILON)
    return result, total


def f_add_norm_token(x, r, w):  # type: ignore[no-untyped-def]
    result, total, scale = torch.empty_like(x, dtype=fp8), r.clone(), torch.empty(x.shape[0], 1)
    torch.ops._C.rms_norm_dynamic_per_token_quant(result, reduce(x), w, scale, EPSILON, None, total)
    return result, scale, total


def f_norm_token_int8(x, r, w):  # type: ignore[no-untyped-def]
    result, scale = torch.empty_like(x, dtype=torch.int8), torch.empty(x.shape[0], 1)
    torch.ops._C.rms_norm_dynamic_per_token_quant(result, reduce(x), w, scale, EPSILON, None, None)
    return result, scale


def f_norm_block(x, r, w):  # type: ignore[no-untyped-def]
    result, scale = torch.empty_like(x, dtype=fp8), torch.empty(x.shape[0], HIDDEN // 64)
    torch.ops._C.rms_norm_per_block_quant(result, reduce(x), w, scale, EPSILON, None, None, 64, False)
    return result, scale


def unknown_group(x, r, w):  # type: ignore[no-untyped-def]
    return ir_add(torch.ops.vllm.all_reduce(x, "pp:0"), r, w)


def f_lora_sharded(x, r, w):  # type: ignore[no-untyped-def]
    """Fully sharded LoRA: its own few columns are reduced, go into the projection's, and those are reduced."""
    low = reduce(x[:, :8])
    return ir_add(reduce(x + low.repeat(1, HIDDEN // 8)), r, w)


def f_longer_rows(x, r, w):  # type: ignore[no-untyped-def]
    return torch.ops.vllm_ir.rms_norm(reduce(x[:, :8]).repeat(1, HIDDEN // 8), w, EPSILON)


def fp32_residual() -> tuple[torch.Tensor, ...]:
    x, r, w = standard()
    return x, r.float(), w


NORM_CASES = {
    "ir_plain": Case(f_ir_plain, standard, (PLAIN,)),
    "ir_add": Case(f_ir_add, standard, (ADD,)),
    "ir_add_dynamic": Case(f_ir_add, standard, (ADD,), dynamic=True),
    "ir_add_swapped": Case(f_ir_add_swapped, standard, (ADD,)),
    "ir_dead_residual": Case(f_ir_dead_residual, standard, (ADD,)),
    "ir_no_weight": Case(f_ir_no_weight, standard, (ADD,)),
    "ir_gemma": Case(f_ir_gemma, standard, ("AllReduceFusedAddGemmaRMSNorm",)),
    "ir_two_layers": Case(f_ir_two_layers, standard, (ADD, ADD)),
    "ir_3d": Case(f_ir_3d, standard, (ADD,)),
    "ir_fp32_residual": Case(f_ir_add, fp32_residual, (ADD,)),
    "ir_whole_variance": Case(f_ir_whole_variance, standard, (PLAIN,)),
    "ir_variance_size": Case(f_ir_variance_size, standard, missed=("variance over 64 columns",)),
    "aten_add": Case(f_aten_add, standard, (ADD,)),
    "aten_norm": Case(f_aten_norm, standard, (ADD,)),
    "lora_sharded": Case(f_lora_sharded, standard, (ADD,), missed=("no RMSNorm over its last dimension follows",)),
    "longer_rows": Case(f_longer_rows, standard, missed=(f"rows of {HIDDEN} in",)),
    "unknown_group": Case(unknown_group, standard, missed=("register_group('pp:0', group)",)),
    "c_plain": Case(f_c_plain, standard, (PLAIN,)),
    "c_add": Case(f_c_add, standard, (ADD,)),
    "c_add_view": Case(f_c_add_view, standard, (ADD,)),
    "c_aten_add": Case(f_c_aten_add, standard, (ADD,)),
    "ir_fp32_sum": Case(f_ir_fp32_sum, standard, (ADD,)),
    "ir_fp32_sum_fp32_weight": Case(lambda x, r, w: f_ir_fp32_sum(x, r, w.float() * 1.01), standard, (ADD,)),
    "ir_fp32_sum_rounded": Case(f_ir_fp32_sum_rounded, standard, (ADD,)),
    "ir_widened": Case(f_ir_widened, standard, (ADD,)),
    "c_fp32_weight": Case(f_c_fp32_weight, standard, (PLAIN,)),
    "c_add_fp32_weight": Case(f_c_add_fp32_weight, standard, (ADD,)),
    "c_add_fp32_residual": Case(f_c_add, fp32_residual, missed=("takes only torch.bfloat16",)),
    "c_fp32_sum": Case(f_c_fp32_sum, standard, (ADD,)),
    "c_add_widened": Case(f_c_add_widened, standard, (ADD,)),
    "c_fp32_sum_only": Case(f_c_fp32_sum_only, standard, missed=("takes only torch.float32",)),
}
QUANT_CASES = {
    "funcol_static": Case(f_funcol_static, with_scale, (ADD + "StaticQuantFP8",)),
    "static": Case(f_static, with_scale, (ADD + "StaticQuantFP8",)),
    "static_dynamic": Case(f_static, with_scale, (ADD + "StaticQuantFP8",), dynamic=True),
    "static_fp32_norm": Case(f_static_fp32_norm, with_scale, (ADD + "StaticQuantFP8",)),
    "static_plain": Case(f_static_plain, with_scale, (PLAIN + "StaticQuantFP8",)),
    "static_fan_out": Case(f_static_fan_out, with_scale, (ADD + "StaticQuantFP8",)),
    "static_off": Case(f_static, with_scale, (ADD,), config={"quantisers": False}),
    "ir_static": Case(f_ir_static, with_scale, (ADD + "StaticQuantFP8",)),
    "ir_static_dynamic": Case(f_ir_static, with_scale, (ADD + "StaticQuantFP8",), dynamic=True),
    "ir_static_padded": Case(f_ir_static_padded, with_scale, (ADD,), note="pads its rows"),
    "ir_token": Case(_ir_dynamic(True, fp8), standard, (ADD + "TokenQuantFP8",)),
    "ir_token_tiny": Case(_ir_dynamic(True, fp8), tiny, (ADD + "TokenQuantFP8",)),
    "ir_token_bounded": Case(f_ir_token_bounded, standard, (ADD,), note="bounds its scales from above"),
    "ir_token_padded": Case(_ir_dynamic(True, fp8, None, 17), standard, (ADD,), note="pads its rows"),
    "ir_tensor": Case(_ir_dynamic(False, fp8), standard, (ADD,), note="makes one scale of all tokens"),
    "ir_group": Case(_ir_group(), standard, (ADD + "GroupQuantFP8",), dynamic=True),
    "ir_group_tiny": Case(_ir_group(64), tiny, (ADD + "GroupQuantFP8",)),
    "ir_group_column": Case(_ir_group(64, column=True), standard, (ADD + "GroupQuantFP8",), dynamic=True),
    "ir_group_dead_scales": Case(_ir_group(32, dead=True), standard, (ADD + "GroupQuantFP8",)),
    "ir_group_aligned": Case(_ir_group(column=True, alignment=4), standard, (ADD,), note="to be aligned to 4"),
    "ir_group_aligned_rows": Case(_ir_group(alignment=4), standard, (ADD + "GroupQuantFP8",)),
    "ir_group_ue8m0": Case(_ir_group(ue8m0=True), standard, (ADD,), note="which is no power of two, after"),
    "ir_group_of_two_rows": Case(
        _ir_dynamic([2, 128], False, False, fp8, group=True), standard, (ADD,), note="groups within a row"
    ),
    "group_of_a_size_without_kernel": Case(f_group_odd, wide, (ADD,), note="a size that no kernel has"),
    "norm_block_of_a_size_without_kernel": Case(f_norm_block_odd, wide, missed=("a size that no kernel has",)),
    "per_channel": Case(f_per_channel, standard, (ADD,), note="no scale of one element"),
    "token": Case(f_token, standard, (ADD + "TokenQuantFP8",)),
    "group_row": Case(f_group_row, standard, (ADD + "GroupQuantFP8",)),
    "group_row_dynamic": Case(f_group_row, standard, (ADD + "GroupQuantFP8",), dynamic=True),
    "group_column": Case(f_group_column, standard, (ADD + "GroupQuantFP8",)),
    "group_tma": Case(f_group_tma, standard, (ADD + "GroupQuantFP8",)),
    "group_ue8m0": Case(f_group_ue8m0, standard, (ADD + "GroupQuantFP8",)),
    "group_tma_dynamic": Case(f_group_tma, standard, (ADD + "GroupQuantFP8",), dynamic=True),
    "group_dead_scales": Case(f_group_dead_scales, standard, (ADD + "GroupQuantFP8",)),
    "group_view": Case(f_group_view, standard, (ADD + "GroupQuantFP8",)),
    "indexer": Case(f_indexer, standard, (ADD + "GroupQuantFP8WithIndexer",)),
    "group_packed": Case(f_group_packed, standard, (ADD + "GroupQuantFP8",)),
    "nvfp4": Case(f_nvfp4, with_scale, (ADD + "QuantNVFP4",)),
    "nvfp4_out": Case(f_nvfp4_out, with_scale, (ADD + "QuantNVFP4",)),
    "mxfp8": Case(f_mxfp8, standard, (ADD + "QuantMXFP8",)),
    "mxfp8_linear": Case(f_mxfp8_linear, standard, (PLAIN + "QuantMXFP8",)),
    "norm_static": Case(f_norm_static, with_scale, (PLAIN + "StaticQuantFP8",)),
    "add_norm_static": Case(f_add_norm_static, with_scale, (ADD + "StaticQuantFP8",)),
    "norm_static_fp32_sum": Case(f_c_norm_static_fp32_sum, with_scale, (ADD + "StaticQuantFP8",)),
    "add_norm_static_off": Case(
        f_add_norm_static, with_scale, missed=("quantisers=False",), config={"quantisers": False}
    ),
    "add_norm_token": Case(f_add_norm_token, standard, (ADD + "TokenQuantFP8",)),
    "norm_token_int8": Case(f_norm_token_int8, standard, (PLAIN + "TokenQuantINT8",)),
    "norm_block": Case(f_norm_block, standard, (PLAIN + "GroupQuantFP8",)),
}
CASES = NORM_CASES | QUANT_CASES


@pytest.fixture(scope="module", params=[False, True], ids=["v1", "v2"])
def outcomes(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    return run(__name__, list(CASES), request.param)


@pytest.mark.parametrize("name", CASES)
def test_case(outcomes, name: str) -> None:  # type: ignore[no-untyped-def]
    """Each spelling of vLLM's fuses (or is refused with its reason) under both versions of auto_functionalized, no
    all-reduce is left of a fused site, and every fused value is within the contract of the ops it replaced."""
    verify(CASES[name], outcomes[name])
