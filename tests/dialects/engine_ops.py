"""Engines' ops under their own schemas, with CPU implementations of what their kernels compute.

Registered in a test's process only where the engine itself is not there. The formulas are written out here once more
from the engines' sources, independent of the specs that the dialects make of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from arfusion_pass.ops.spec import QuantFormat, QuantSpec, ScaleLayout
from tests.ops import oracle

FP8_MAX = 448.0

_libraries: dict[str, torch.library.Library] = {}


def define(name: str, schema: str, meaning: Callable[..., object], fake: Callable[..., object] | None = None) -> None:
    """Register ``namespace::op`` once a process; an op that only writes to its arguments needs no fake."""
    namespace, op = name.split("::")
    library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
    base, _, overload = op.partition(".")
    packet = getattr(getattr(torch.ops, namespace), base, None)
    if packet is not None and (overload or "default") in packet.overloads():
        return
    library.define(op + schema)
    library.impl(op, meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake or (lambda *args, **kwargs: None), lib=library)


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks."""
    result = x.clone()
    dist.all_reduce(result)
    return result


def rms(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``x / RMS(x)`` in fp32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def divide(x: torch.Tensor, y: float) -> torch.Tensor:
    return x / torch.full((), y)


def groups(x: torch.Tensor, size: int) -> torch.Tensor:
    return x.float().reshape(-1, x.shape[-1] // size, size)


def like(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


def _part(shape: torch.Size, dim: int, size: Callable[[int], int]) -> list[int]:
    """``shape`` with another size of one dimension."""
    return [size(length) if index == dim % len(shape) else length for index, length in enumerate(shape)]


def _reduce_scatter(tensor: torch.Tensor, dim: int, world_size: int, group_name: str) -> torch.Tensor:
    parts = tensor.movedim(dim, 0).contiguous()
    mine = parts.new_empty(_part(parts.shape, 0, lambda n: n // world_size))
    dist.reduce_scatter_tensor(mine, parts)
    return mine.movedim(0, dim).contiguous()


def _all_gather(tensor: torch.Tensor, dim: int, world_size: int, group_name: str) -> torch.Tensor:
    mine = tensor.movedim(dim, 0).contiguous()
    everyone = mine.new_empty(_part(mine.shape, 0, lambda n: n * world_size))
    dist.all_gather_into_tensor(everyone.view(torch.uint8), mine.view(torch.uint8))
    return everyone.movedim(0, dim).contiguous()


# vLLM ----------------------------------------------------------------------------------------------------------------


def _ir_rms_norm(x, weight, epsilon, variance_size=None):  # type: ignore[no-untyped-def]
    wide = x.float()
    part = wide if variance_size is None else wide[..., :variance_size]
    y = wide * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + epsilon)
    return (y if weight is None else y.to(weight.dtype) * weight).to(x.dtype)


def _ir_fused_add_rms_norm(x, x_residual, weight, epsilon, variance_size=None):  # type: ignore[no-untyped-def]
    total = x.float() + x_residual.float()
    y = rms(total, epsilon)
    return (y if weight is None else y.to(weight.dtype) * weight).to(x.dtype), total.to(x.dtype)


def _ir_static_quant_fp8(x, scale, fp8_dtype, num_token_padding=None):  # type: ignore[no-untyped-def]
    codes = to_fp8(x.float() * scale.float().reciprocal())
    rows = max((num_token_padding or 0) - x.shape[0], 0)
    return torch.nn.functional.pad(codes.view(torch.uint8), (0, 0, 0, rows)).view(fp8_dtype)


def _ir_dynamic_quant_fp8(x, per_token, fp8_dtype, scale_ub=None, num_token_padding=None):  # type: ignore[no-untyped-def]
    amax = x.abs().amax(-1, keepdim=True) if per_token else x.abs().amax().reshape(1)
    scale = divide(amax.float(), FP8_MAX).clamp(min=1 / (FP8_MAX * 512))
    return _ir_static_quant_fp8(x, scale, fp8_dtype, num_token_padding), scale


def _ir_dynamic_group_quant_fp8(  # type: ignore[no-untyped-def]
    x, group_shape, column_major, use_ue8m0, fp8_dtype, scale_alignment=1
):
    grouped = groups(x, group_shape[-1])
    scale = divide(grouped.abs().amax(-1), FP8_MAX)
    if use_ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scale = scale.clamp(min=1 / (FP8_MAX * 512))
    codes = to_fp8(grouped / scale.unsqueeze(-1)).reshape(x.shape)
    scale = scale.reshape(*x.shape[:-1], -1)
    return codes, scale.mT.contiguous().mT if column_major else scale


def _c_rms_norm(result, input, weight, epsilon):  # type: ignore[no-untyped-def]
    y = rms(input, epsilon)
    result.copy_(y if weight is None else y * weight.float())


def _c_fused_add_rms_norm(input, residual, weight, epsilon):  # type: ignore[no-untyped-def]
    residual.copy_(input + residual)
    y = rms(residual, epsilon)
    input.copy_(y if weight is None else y * weight.float())


def _c_static_fp8(result, input, scale, group_shape=None):  # type: ignore[no-untyped-def]
    result.copy_(to_fp8(input.float() * (1.0 / scale.float())))


def _token_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = divide(x.float().abs().amax(-1, keepdim=True), FP8_MAX).clamp(min=1 / (FP8_MAX * 512))
    return to_fp8(x.float() / scale), scale


def _c_token_fp8(result, input, scale, scale_ub):  # type: ignore[no-untyped-def]
    codes, scales = _token_fp8(input)
    result.copy_(codes)
    scale.copy_(scales)


def _c_group_fp8(  # type: ignore[no-untyped-def]
    input, output_q, output_s, group_size, eps, fp8_min, fp8_max, scale_ue8m0, transposed, tma
):
    grouped = groups(input, group_size)
    scale = divide(grouped.abs().amax(-1).clamp(min=eps), fp8_max)
    if scale_ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale.clamp(min=1e-10))))
    output_q.copy_(to_fp8(grouped / scale.unsqueeze(-1)).reshape(input.shape))
    output_s.copy_(scale.reshape(output_s.shape))


def _c_group_packed(input, output_q, output_s_packed, group_size, eps, fp8_min, fp8_max):  # type: ignore[no-untyped-def]
    grouped = groups(input, group_size)
    scale = divide(grouped.abs().amax(-1).clamp(min=eps), fp8_max).clamp(min=1e-10)
    bits = scale.contiguous().view(torch.int32)
    exponent = (bits >> 23 & 0xFF) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    scale = (exponent << 23).view(torch.float32)
    output_q.copy_(to_fp8(grouped / scale.unsqueeze(-1)).reshape(input.shape))
    columns = output_s_packed.shape[1]
    words = torch.zeros(grouped.shape[0], 4 * columns, dtype=torch.uint8)
    words[:, : grouped.shape[1]] = exponent.to(torch.uint8)
    output_s_packed.copy_(words.view(torch.int32))


def _c_norm_static(result, input, weight, scale, epsilon):  # type: ignore[no-untyped-def]
    _c_static_fp8(result, (rms(input, epsilon) * weight.float()).to(input.dtype), scale)


def _c_add_norm_static(result, input, residual, weight, scale, epsilon):  # type: ignore[no-untyped-def]
    residual.copy_(input + residual)
    _c_norm_static(result, residual, weight, scale, epsilon)


def _round_first(input, residual, weight, epsilon):  # type: ignore[no-untyped-def]
    total = input.float() if residual is None else input.float() + residual.float()
    if residual is not None:
        residual.copy_(total)
    return rms(total, epsilon).to(input.dtype) * weight


def _c_norm_token(result, input, weight, scale, epsilon, scale_ub, residual):  # type: ignore[no-untyped-def]
    norm = _round_first(input, residual, weight, epsilon)
    if result.dtype == torch.int8:
        scales = divide(norm.float().abs().amax(-1, keepdim=True), 127.0).clamp(min=2.0**-23)
        codes = torch.round(norm.float() * (1.0 / scales)).clamp(-128, 127).to(torch.int8)
    else:
        codes, scales = _token_fp8(norm)
    result.copy_(codes)
    scale.copy_(scales)


def _c_norm_block(  # type: ignore[no-untyped-def]
    result, input, weight, scale, epsilon, scale_ub, residual, group_size, is_scale_transposed
):
    grouped = groups(_round_first(input, residual, weight, epsilon), group_size)
    scales = divide(grouped.abs().amax(-1), FP8_MAX).clamp(min=1 / (FP8_MAX * 512))
    result.copy_(to_fp8(grouped / scales.unsqueeze(-1)).reshape(input.shape))
    scale.copy_(scales)


def _blocks(
    x: torch.Tensor, format: QuantFormat, size: int, layout: ScaleLayout, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of NVFP4 or MXFP8 (uint8; a swizzled layout's flat), by the numpy oracle."""
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[x.dtype]
    given = 1.0 if scale is None else scale.item()
    rows = x.detach().float().reshape(-1, x.shape[-1])
    codes, scales = (
        torch.from_numpy(each) for each in oracle.quantise(rows.numpy(), QuantSpec(format, size), given, dtype)
    )
    tile = {ScaleLayout.SWIZZLED_128X4: 128, ScaleLayout.SWIZZLED_8X4: 8}.get(layout)
    if tile is not None:
        count, columns = scales.shape
        scales = torch.nn.functional.pad(scales, (0, -columns % 4, 0, -count % tile))
        # a tile of 128 rows is four times 32 of them, side by side
        tiles = scales.reshape(-1, max(tile // 32, 1), min(tile, 32), scales.shape[1] // 4, 4)
        scales = tiles.permute(0, 3, 2, 1, 4).reshape(-1)
    return codes, scales


def _block_scales(x: torch.Tensor, size: int, layout: ScaleLayout) -> torch.Tensor:
    """An empty buffer for the scales of :func:`_blocks`."""
    rows, columns = x.shape[0], x.shape[1] // size
    tile = {ScaleLayout.SWIZZLED_128X4: 128, ScaleLayout.SWIZZLED_8X4: 8}.get(layout)
    if tile is None:
        return x.new_empty(rows, columns, dtype=torch.uint8)
    return x.new_empty((rows + tile - 1) // tile * tile * ((columns + 3) // 4 * 4), dtype=torch.uint8)


def _swizzle(swizzled: bool, eight: bool = False) -> ScaleLayout:
    if not swizzled:
        return ScaleLayout.LINEAR
    return ScaleLayout.SWIZZLED_8X4 if eight else ScaleLayout.SWIZZLED_128X4


def _nvfp4_blocks(x: torch.Tensor, scale: torch.Tensor, layout: ScaleLayout) -> tuple[torch.Tensor, torch.Tensor]:
    return _blocks(x, QuantFormat.NVFP4, 16, layout, scale)


def _nvfp4_buffers(x: torch.Tensor, layout: ScaleLayout) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], x.shape[1] // 2, dtype=torch.uint8), _block_scales(x, 16, layout)


def _mxfp8_blocks(x: torch.Tensor, layout: ScaleLayout) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = _blocks(x, QuantFormat.MXFP8, 32, layout, None)
    return codes.view(torch.float8_e4m3fn).view(x.shape), scales


def _mxfp8_buffers(x: torch.Tensor, layout: ScaleLayout) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), _block_scales(x, 32, layout)


def _nvfp4(input, input_scale, is_sf_swizzled_layout):  # type: ignore[no-untyped-def]
    codes, scales = _nvfp4_blocks(input, input_scale, _swizzle(is_sf_swizzled_layout))
    return codes, scales.view(torch.int32).view(-1, input.shape[1] // 64) if is_sf_swizzled_layout else scales


def _nvfp4_fake(input, input_scale, is_sf_swizzled_layout):  # type: ignore[no-untyped-def]
    codes, scales = _nvfp4_buffers(input, _swizzle(is_sf_swizzled_layout))
    if is_sf_swizzled_layout:
        rows = (input.shape[0] + 127) // 128 * 128
        scales = input.new_empty(rows, (input.shape[1] // 16 + 3) // 4, dtype=torch.int32)
    return codes, scales


def _nvfp4_out(input, input_scale, is_sf_swizzled_layout, *, output, output_scale):  # type: ignore[no-untyped-def]
    codes, scales = _nvfp4(input, input_scale, is_sf_swizzled_layout)
    output.copy_(codes)
    output_scale.copy_(scales)


def _fake_ir_group(x, group_shape, column_major, use_ue8m0, fp8_dtype, scale_alignment=1):  # type: ignore[no-untyped-def]
    scales = x.new_empty(*x.shape[:-1], x.shape[-1] // group_shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=fp8_dtype), scales.mT.contiguous().mT if column_major else scales


def register_vllm(optional_weight: bool = True) -> None:
    """vLLM 0.32's ops; ``optional_weight=False`` gives ``_C``'s norms the schema of vLLM 0.19 and before."""
    weight = "Tensor? weight" if optional_weight else "Tensor weight"
    define(
        "vllm::all_reduce",
        "(Tensor tensor, str group_name) -> Tensor",
        lambda tensor, group_name: all_reduce(tensor),
        like,
    )
    define(
        "vllm::reduce_scatter",
        "(Tensor tensor, SymInt dim, SymInt world_size, str group_name) -> Tensor",
        _reduce_scatter,
        lambda tensor, dim, world_size, _: tensor.new_empty(_part(tensor.shape, dim, lambda n: n // world_size)),
    )
    define(
        "vllm::all_gather",
        "(Tensor tensor, SymInt dim, SymInt world_size, str group_name) -> Tensor",
        _all_gather,
        lambda tensor, dim, world_size, _: tensor.new_empty(_part(tensor.shape, dim, lambda n: n * world_size)),
    )
    define(
        "vllm_ir::rms_norm",
        "(Tensor x, Tensor? weight, float epsilon, SymInt? variance_size=None) -> Tensor",
        _ir_rms_norm,
        like,
    )
    define(
        "vllm_ir::fused_add_rms_norm",
        "(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, SymInt? variance_size=None) -> (Tensor, Tensor)",
        _ir_fused_add_rms_norm,
        lambda x, *_: (torch.empty_like(x), torch.empty_like(x)),
    )
    define(
        "vllm_ir::static_quant_fp8",
        "(Tensor x, Tensor scale, ScalarType fp8_dtype, SymInt? num_token_padding=None) -> Tensor",
        _ir_static_quant_fp8,
        lambda x, scale, fp8_dtype, num_token_padding=None: x.new_empty(
            max(num_token_padding or 0, x.shape[0]), *x.shape[1:], dtype=fp8_dtype
        ),
    )
    define(
        "vllm_ir::dynamic_quant_fp8",
        "(Tensor x, bool per_token, ScalarType fp8_dtype, Tensor? scale_ub=None, SymInt? num_token_padding=None)"
        " -> (Tensor, Tensor)",
        _ir_dynamic_quant_fp8,
        lambda x, per_token, fp8_dtype, scale_ub=None, num_token_padding=None: (
            x.new_empty(max(num_token_padding or 0, x.shape[0]), *x.shape[1:], dtype=fp8_dtype),
            x.new_empty((*x.shape[:-1], 1) if per_token else (1,), dtype=torch.float32),
        ),
    )
    define(
        "vllm_ir::dynamic_group_quant_fp8",
        "(Tensor x, SymInt[] group_shape, bool column_major, bool use_ue8m0, ScalarType fp8_dtype,"
        " SymInt scale_alignment=1) -> (Tensor, Tensor)",
        _ir_dynamic_group_quant_fp8,
        _fake_ir_group,
    )
    define("_C::rms_norm", f"(Tensor! result, Tensor input, {weight}, float epsilon) -> ()", _c_rms_norm)
    define(
        "_C::fused_add_rms_norm",
        f"(Tensor! input, Tensor! residual, {weight}, float epsilon) -> ()",
        _c_fused_add_rms_norm,
    )
    define(
        "_C::static_scaled_fp8_quant",
        "(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()",
        _c_static_fp8,
    )
    define(
        "_C::dynamic_per_token_scaled_fp8_quant",
        "(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
        _c_token_fp8,
    )
    define(
        "_C::per_token_group_fp8_quant",
        "(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, float fp8_max, "
        "bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()",
        _c_group_fp8,
    )
    define(
        "_C::per_token_group_fp8_quant_packed",
        "(Tensor input, Tensor! output_q, Tensor! output_s_packed, int group_size, float eps, float fp8_min, "
        "float fp8_max) -> ()",
        _c_group_packed,
    )
    define(
        "_C::rms_norm_static_fp8_quant",
        "(Tensor! result, Tensor input, Tensor weight, Tensor scale, float epsilon) -> ()",
        _c_norm_static,
    )
    define(
        "_C::fused_add_rms_norm_static_fp8_quant",
        "(Tensor! result, Tensor input, Tensor! residual, Tensor weight, Tensor scale, float epsilon) -> ()",
        _c_add_norm_static,
    )
    define(
        "_C::rms_norm_dynamic_per_token_quant",
        "(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, Tensor? scale_ub, "
        "Tensor!? residual) -> ()",
        _c_norm_token,
    )
    define(
        "_C::rms_norm_per_block_quant",
        "(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, Tensor? scale_ub, "
        "Tensor!? residual, int group_size, bool is_scale_transposed) -> ()",
        _c_norm_block,
    )
    define(
        "_C::scaled_fp4_quant",
        "(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout) -> (Tensor, Tensor)",
        _nvfp4,
        _nvfp4_fake,
    )
    define(
        "_C::scaled_fp4_quant.out",
        "(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout, *, Tensor(a!) output, "
        "Tensor(b!) output_scale) -> ()",
        _nvfp4_out,
    )
    define(
        "vllm::mxfp8_quantize",
        "(Tensor x, bool is_sf_swizzled_layout=False, SymInt alignment=0) -> (Tensor, Tensor)",
        lambda x, is_sf_swizzled_layout=False, alignment=0: _mxfp8_blocks(x, _swizzle(is_sf_swizzled_layout)),
        lambda x, is_sf_swizzled_layout=False, alignment=0: _mxfp8_buffers(x, _swizzle(is_sf_swizzled_layout)),
    )
    define(
        "vllm::rocm_unquantized_gemm",
        "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
        lambda x, weight, bias=None: x @ weight.t(),
        lambda x, weight, bias=None: x.new_empty((*x.shape[:-1], weight.shape[0])),
    )


# FlashInfer's norms, under the names of those who register them ------------------------------------------------------


def _fi_norm(weight_bias: float):  # type: ignore[no-untyped-def]
    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return (rms(x, eps) * (weight_bias + weight.float())).to(x.dtype)

    return norm


def _fi_write(weight_bias: float):  # type: ignore[no-untyped-def]
    def write(output, input, weight, eps, enable_pdl=None):  # type: ignore[no-untyped-def]
        output.copy_(_fi_norm(weight_bias)(input, weight, eps))

    return write


def _fi_add(weight_bias: float):  # type: ignore[no-untyped-def]
    def add(input, residual, weight, eps=1e-6, enable_pdl=None):  # type: ignore[no-untyped-def]
        total = input.float() + residual.float()
        residual.copy_(total)
        input.copy_(rms(total, eps) * (weight_bias + weight.float()))

    return add


def _fi_add_quant(out, input, residual, weight, scale, eps=1e-6, enable_pdl=None):  # type: ignore[no-untyped-def]
    total = input.float() + residual.float()
    residual.copy_(total)
    out.copy_(to_fp8(rms(total, eps) * weight.float() * (1.0 / scale)))


def _sgl_token(input, output_q, output_s):  # type: ignore[no-untyped-def]
    scale = divide(input.float().abs().amax(-1, keepdim=True), FP8_MAX)
    output_q.copy_(to_fp8(input.float() * (1.0 / scale)))
    output_s.copy_(scale)


def _sgl_group(  # type: ignore[no-untyped-def]
    input, output_q, output_s, group_size, eps, fp8_min, fp8_max, scale_ue8m0, fuse_silu_and_mul=False, masked_m=None
):
    if output_s.dtype == torch.int32:
        _c_group_packed(input, output_q, output_s, group_size, eps, fp8_min, fp8_max)
    else:
        _c_group_fp8(input, output_q, output_s, group_size, eps, fp8_min, fp8_max, False, False, False)


def _sgl_by_encode_scale(input, output_q, output_s, group_size, power_of_two):  # type: ignore[no-untyped-def]
    """The group kernels since v2. Their fast-math quotient is a product with the reciprocal."""
    grouped = groups(input, group_size)
    amax = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-10)
    scale = amax * torch.tensor(1.0 / FP8_MAX)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
        encoded = grouped / scale
    else:
        encoded = grouped * (torch.reciprocal(amax) * FP8_MAX)
    output_q.copy_(to_fp8(encoded).reshape(input.shape))
    scale = scale.squeeze(-1)
    if output_s.dtype == torch.int32:
        words = torch.zeros(scale.shape[0], 4 * output_s.shape[1], dtype=torch.uint8)
        words[:, : scale.shape[1]] = (torch.log2(scale) + 127).to(torch.uint8)
        scale = words.view(torch.int32)
    output_s.copy_(scale)


def _sgl_group_v2(  # type: ignore[no-untyped-def]
    input, output_q, output_s, group_size, eps, low, high, scale_ue8m0=False, fuse_silu_and_mul=False, masked_m=None
):
    _sgl_by_encode_scale(input, output_q, output_s, group_size, scale_ue8m0)


def _sgl_group_v3(input, output_q, output_s, group_size, scale_ue8m0=False, *rest):  # type: ignore[no-untyped-def]
    _sgl_by_encode_scale(input, output_q, output_s, group_size, scale_ue8m0)


def _inplace_all_reduce(tensor: torch.Tensor, group_name: str) -> None:
    tensor.copy_(all_reduce(tensor))


def register_sglang() -> None:
    """SGLang's all-reduces, sgl-kernel 0.3.21's norms and FP8 quantisers, SGLang 0.5.23's own quantisers."""
    define(
        "sglang::outplace_all_reduce",
        "(Tensor tensor, str group_name, str outplace_all_reduce_method) -> Tensor",
        lambda tensor, group_name, outplace_all_reduce_method: all_reduce(tensor),
        like,
    )
    define(
        "sglang::inplace_all_reduce",
        "(Tensor! tensor, str group_name) -> ()",
        _inplace_all_reduce,
    )
    for prefix, bias in (("", 0.0), ("gemma_", 1.0)):
        define(
            f"sgl_kernel::{prefix}rmsnorm",
            "(Tensor! output, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()",
            _fi_write(bias),
        )
        define(
            f"sgl_kernel::{prefix}fused_add_rmsnorm",
            "(Tensor! input, Tensor! residual, Tensor weight, float eps, bool enable_pdl) -> ()",
            _fi_add(bias),
        )
    define(
        "sgl_kernel::sgl_per_tensor_quant_fp8",
        "(Tensor input, Tensor! output_q, Tensor! output_s, bool is_static) -> ()",
        lambda input, output_q, output_s, is_static: _c_static_fp8(output_q, input, output_s),
    )
    define(
        "sgl_kernel::sgl_per_token_quant_fp8", "(Tensor input, Tensor! output_q, Tensor! output_s) -> ()", _sgl_token
    )
    group = (
        "(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, float fp8_max, "
        "bool scale_ue8m0"
    )
    define("sgl_kernel::sgl_per_token_group_quant_8bit", group + ") -> ()", _sgl_group)
    define(
        "sgl_kernel::sgl_per_token_group_quant_8bit_v2",
        group + ", bool fuse_silu_and_mul, Tensor? masked_m) -> ()",
        _sgl_group_v2,
    )
    define(
        "sglang::flashinfer_allreduce",
        "(Tensor tensor, str group_name) -> Tensor",
        lambda tensor, group_name: all_reduce(tensor),
        like,
    )
    written = "(Tensor input, Tensor(a1!) output_q, Tensor(a2!) output_s"
    define(
        "sglang::per_tensor_quant_fp8",
        written + ", bool is_static=False) -> ()",
        lambda input, output_q, output_s, is_static: _c_static_fp8(output_q, input, output_s),
    )
    define("sglang::per_token_quant_fp8", written + ") -> ()", _sgl_token)
    define(
        "sglang::per_token_group_quant",
        written + ", SymInt group_size, bool scale_ue8m0=False, bool fuse_silu_and_mul=False, Tensor? masked_m=None, "
        "SymInt? expected_m=None, Tensor? sorted_token_ids=None, Tensor? num_tokens_post_padded=None, "
        'SymInt num_valid_tokens=0, str silu_and_mul_mode="legacy") -> ()',
        _sgl_group_v3,
    )
    define(
        "sglang::per_token_group_quant_8bit_v2",
        written + ", SymInt group_size, float eps, float min_8bit, float max_8bit, bool scale_ue8m0=False, "
        "bool fuse_silu_and_mul=False, Tensor? masked_m=None) -> ()",
        _sgl_group_v2,
    )
    define(
        "sglang::flashinfer_fp4_quantize",
        "(Tensor input, Tensor? global_scale=None, SymInt sf_vec_size=16, bool sf_use_ue8m0=False, "
        "bool is_sf_swizzled_layout=True, bool is_sf_8x4_layout=False, bool? enable_pdl=None) -> (Tensor, Tensor)",
        lambda x, scale, size=16, ue8m0=False, swizzled=True, eight=False, pdl=None: _nvfp4_blocks(
            x, scale, _swizzle(swizzled, eight)
        ),
        lambda x, scale, size=16, ue8m0=False, swizzled=True, eight=False, pdl=None: _nvfp4_buffers(
            x, _swizzle(swizzled, eight)
        ),
    )
    define(
        "sglang::flashinfer_mxfp8_quantize",
        '(Tensor input, bool is_sf_swizzled_layout=True, SymInt alignment=32, str backend="cute-dsl") '
        "-> (Tensor, Tensor)",
        lambda x, swizzled=True, *rest: _mxfp8_blocks(x, _swizzle(swizzled)),
        lambda x, swizzled=True, *rest: _mxfp8_buffers(x, _swizzle(swizzled)),
    )


def register_flashinfer() -> None:
    """FlashInfer's norms, were they registered."""
    for prefix, bias in (("", 0.0), ("gemma_", 1.0)):
        define(
            f"flashinfer::{prefix}rmsnorm",
            "(Tensor! out, Tensor input, Tensor weight, float eps, bool? enable_pdl) -> ()",
            _fi_write(bias),
        )
        define(
            f"flashinfer::{prefix}fused_add_rmsnorm",
            "(Tensor! input, Tensor! residual, Tensor weight, float eps=1e-6, bool? enable_pdl=None) -> ()",
            _fi_add(bias),
        )
    define(
        "flashinfer::fused_add_rmsnorm_quant",
        "(Tensor! out, Tensor input, Tensor! residual, Tensor weight, Tensor scale, float eps=1e-6, "
        "bool? enable_pdl=None) -> ()",
        _fi_add_quant,
    )

    define(
        "flashinfer::fp4_quantize_sm100",
        "(Tensor input, Tensor? global_scale=None, int sf_vec_size=16, bool sf_use_ue8m0=False, "
        "bool is_sf_swizzled_layout=True, bool is_sf_8x4_layout=False, bool is_global_scale_inversed=False, "
        "bool? enable_pdl=None) -> (Tensor, Tensor)",
        lambda x, scale, size, ue8m0, swizzled, eight, *rest: _nvfp4_blocks(x, scale, _swizzle(swizzled, eight)),
        lambda x, scale, size, ue8m0, swizzled, eight, *rest: _nvfp4_buffers(x, _swizzle(swizzled, eight)),
    )
    define(
        "flashinfer::mxfp8_quantize_sm100",
        "(Tensor input, int sf_swizzle_layout=0, SymInt alignment=32, bool? enable_pdl=None) -> (Tensor, Tensor)",
        lambda x, code=0, *rest: _mxfp8_blocks(x, _swizzle(code != 2, code == 1)),
        lambda x, code=0, *rest: _mxfp8_buffers(x, _swizzle(code != 2, code == 1)),
    )


def register_tensorrt_llm() -> None:
    """TensorRT-LLM's all-reduce (its ``op`` NONE), FlashInfer's norms under its names, and its quantisers."""
    define(
        "trtllm::allreduce",
        "(Tensor input, Tensor? residual, Tensor? norm_weight, Tensor? scale, Tensor? bias, Tensor? workspace, "
        "int[] group, int strategy, int op, float eps, bool trigger_completion_at_end) -> Tensor[]",
        lambda input, *rest: [all_reduce(input)],
        lambda input, *rest: [torch.empty_like(input)],
    )
    define(
        "trtllm::flashinfer_rmsnorm",
        "(Tensor input, Tensor weight, float eps) -> Tensor",
        _fi_norm(0.0),
        like,
    )
    define(
        "trtllm::flashinfer_fused_add_rmsnorm",
        "(Tensor! input, Tensor! residual, Tensor weight, float eps) -> ()",
        _fi_add(0.0),
    )
    define(
        "tensorrt_llm::static_quantize_e4m3_per_tensor",
        "(Tensor input, Tensor scales) -> (Tensor, Tensor)",
        lambda input, scales: (to_fp8(input.float() / scales), scales.clone()),
        lambda input, scales: (torch.empty_like(input, dtype=torch.float8_e4m3fn), torch.empty_like(scales)),
    )

    define(
        "trtllm::fp4_quantize",
        "(Tensor input, Tensor? globalScale, int sfVecSize, bool sfUseUE8M0=False, bool isSfSwizzledLayout=True) "
        "-> (Tensor, Tensor)",
        lambda x, scale, size, ue8m0=False, swizzled=True: _flat(_nvfp4_blocks(x, scale, _swizzle(swizzled))),
        lambda x, scale, size, ue8m0=False, swizzled=True: _flat(_nvfp4_buffers(x, _swizzle(swizzled))),
    )
    define(
        "trtllm::mxfp8_quantize",
        "(Tensor input, bool swizzedLayout=True, int alignment=32) -> (Tensor, Tensor)",
        lambda x, swizzled=True, alignment=32: _flat(_mxfp8_blocks(x, _swizzle(swizzled))),
        lambda x, swizzled=True, alignment=32: _flat(_mxfp8_buffers(x, _swizzle(swizzled))),
    )


def _flat(outputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """TensorRT-LLM gives scales as one row in every layout."""
    return outputs[0], outputs[1].reshape(-1)


def register_symm_mem() -> None:
    """torch's own op, of which a CPU build has no implementation: one, once a process, as torch 2.11 insists on."""
    if "symm_mem" not in _libraries:
        library = _libraries["symm_mem"] = torch.library.Library("symm_mem", "IMPL")
        library.impl("one_shot_all_reduce", lambda input, reduce_op, group_name: all_reduce(input), "CPU")
