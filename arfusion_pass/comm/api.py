"""``allreduce_fusion``: FlashInfer's unified call on the fused ops of this package.

    reduced = T(sum over ranks of input.float())                                  # output
    total = T(reduced + residual_in)                                              # residual_out
    norm = T(total * rsqrt(mean(total ** 2) + rms_eps) * (weight_bias + gamma))   # norm_out
    quant_out, scale_out = quantiser(norm)

Every step is that of the fused op (:mod:`arfusion_pass.ops.schema`), on CUDA and on CPU alike.
"""

from __future__ import annotations

from typing import Any

import torch

from arfusion_pass.comm import moe
from arfusion_pass.comm.fusion_workspace import AllReduceFusionWorkspace
from arfusion_pass.comm.request import NOT_QUANTISED, Quantised, Request, input_shape, launch_flags, open_workspace
from arfusion_pass.ops.flashinfer_enums import AllReduceFusionPattern as Pattern
from arfusion_pass.ops.flashinfer_enums import as_pattern
from arfusion_pass.ops.flashinfer_specs import FP8, STATIC_FP8, TOKEN_FP8, mxfp8, nvfp4, packed_group_fp8
from arfusion_pass.ops.spec import QuantFormat

_STATIC = (Pattern.kARResidualRMSNormFP8Quant, Pattern.kARResidualRMSNormOutFP8Quant)
_NVFP4 = (Pattern.kARResidualRMSNormFP4Quant, Pattern.kARResidualRMSNormOutFP4Quant)
_MXFP8 = (Pattern.kARResidualRMSNormMXFP8Quant, Pattern.kARResidualRMSNormOutMXFP8Quant)
_GROUP = (
    Pattern.kARResidualRMSNormPerTokenGroupFP8PackedQuant,
    Pattern.kARResidualRMSNormOutPerTokenGroupFP8PackedQuant,
)
_NORM_OUT = (
    Pattern.kARResidualRMSNorm,
    Pattern.kARResidualRMSNormOutFP8Quant,
    Pattern.kARResidualRMSNormOutFP4Quant,
    Pattern.kARResidualRMSNormOutPerTokenGroupFP8PackedQuant,
    Pattern.kARResidualRMSNormOutDynamicFP8Quant,
    Pattern.kARResidualRMSNormOutMXFP8Quant,
)
"""Patterns that write ``norm_out``, and return it."""


def allreduce_fusion(
    input: torch.Tensor,
    workspace: AllReduceFusionWorkspace,
    pattern: int,
    launch_with_pdl: bool = False,
    trigger_completion_at_end: bool = True,
    output: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
    quant_out: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
    residual_in: torch.Tensor | None = None,
    rms_gamma: torch.Tensor | None = None,
    rms_eps: float = 1e-6,
    scale_factor: torch.Tensor | float | None = None,
    layout_code: int | None = None,
    use_oneshot: bool | None = None,
    fp32_acc: bool = False,
    moe_reduction_device_num_experts: int | None = None,
    moe_reduction_scale_input: torch.Tensor | None = None,
    moe_reduction_active_experts_token_input: torch.Tensor | None = None,
    moe_reduction_token_input: torch.Tensor | None = None,
    expanded_idx_to_permuted_idx: torch.Tensor | None = None,
    expert_scale_factor: torch.Tensor | None = None,
    shared_expert_output: torch.Tensor | None = None,
    block_quant_group_size: int | None = None,
    weight_bias: float = 0.0,
    *,
    moe_finalize_backend: str = "trtllm",
    routed_scaling_factor: float | None = None,
    moe_reduction_expert_major: bool | None = None,
    without_residual: bool = False,
) -> torch.Tensor:
    """All-reduce, then (by ``pattern``) residual add, RMSNorm and a quantiser, in one kernel. Collective.

    FlashInfer's parameters, in its order, with its defaults; the last three are ours. ``T`` is the input's dtype, bf16,
    fp16 or fp32. Tensors are contiguous, ``[token_num, hidden_dim]`` unless said otherwise; more leading dimensions,
    or a flat tensor of the same size, are taken too. Any output may share its memory with the input of its shape
    (``norm_out=input``, ``residual_out=residual_in``). ``token_num`` may be 0.

    Args:
        input: the tensor that is summed over the ranks. Pattern 7: permuted expert rows ``[rows, hidden_dim]``.
            Pattern 6 does not read it.
        workspace: of this rank's group (:func:`create_allreduce_fusion_workspace`).
        pattern: :class:`AllReduceFusionPattern`, 0 to 14 but 12.
        launch_with_pdl: programmatic dependent launch.
        trigger_completion_at_end: False lets the next kernel start early; only safe where that one synchronises on its
            grid dependency itself. Without ``launch_with_pdl`` it means nothing.
        output: where to write the all-reduce's result. Pattern 0 makes one where it is None; with the others it is
            written where it is given (FlashInfer leaves it unwritten there).
        residual_out: where to write the sum with the residual, ``T`` or fp32; written where it is given.
        norm_out: where to write the norm, ``T`` or fp32. Patterns 1, 4, 5, 9, 11 and 14 make one where it is None; the
            quantising patterns without "Out" write it where it is given.
        quant_out: FP8 and MXFP8: e4m3 ``[token_num, hidden_dim]``. NVFP4: ``token_num * hidden_dim / 2`` bytes of any
            element type. Patterns 2, 3, 8, 10 and 13 make one where it is None.
        scale_out: patterns 3, 5, 13 and 14: bytes in the layout of ``layout_code`` (more than needed are left alone;
            padding within it is written as 0); 8 and 9: int32 ``[token_num, ceil(groups / 4)]`` with strides
            ``(1, round_up(token_num, 4))``; 10 and 11: fp32 ``[token_num, 1]``. Static FP8 does not use it.
        residual_in: the residual, ``T`` or fp32. Needed by every pattern but 0, unless ``without_residual``.
        rms_gamma: the norm's weight ``[hidden_dim]``, ``T`` or fp32. Needed by every pattern but 0.
        rms_eps: the norm's epsilon.
        scale_factor: a float or a tensor of one element. Static FP8: the dequantisation scale
            (``e4m3(norm * (1 / scale_factor))``). NVFP4: the global encode scale ``448 * 6 / amax``, which is
            multiplied. A float is a kernel argument: legal in a captured graph, and constant there.
        layout_code: NVFP4's and MXFP8's scale layout, a :class:`QuantizationSFLayout`; None is ``SWIZZLED_128x4``.
        use_oneshot: True or False forces a strategy; None takes the measured table's. The bits are the same.
        fp32_acc: accepted. The sum is always taken in fp32, in rank order, and rounded once: FlashInfer's default of
            False, a rounding after every rank, loses accuracy and buys nothing.
        moe_reduction_device_num_experts: pattern 6, see :mod:`arfusion_pass.comm.moe`, as are the three that follow.
        moe_reduction_scale_input: pattern 6.
        moe_reduction_active_experts_token_input: pattern 6.
        moe_reduction_token_input: pattern 6.
        expanded_idx_to_permuted_idx: pattern 7, see :mod:`arfusion_pass.comm.moe`, as are the two that follow.
        expert_scale_factor: pattern 7.
        shared_expert_output: pattern 7.
        block_quant_group_size: patterns 8 and 9: a power of two from 8 to 256 (fp32: 4 to 128) that divides hidden_dim.
        weight_bias: added to ``rms_gamma``: 1.0 for Gemma's and Qwen3-Next's norms. Pattern 0 ignores it.
        moe_finalize_backend: ``"trtllm"`` or ``"cake"``, which run the same kernel here.
        routed_scaling_factor: pattern 7: multiplies the sum over experts, once, before the shared expert is added.
        moe_reduction_expert_major: pattern 6: how the expert tensors lie in memory; None: by their shapes.
        without_residual: patterns from 1: there is no residual; ``residual_out`` is the all-reduce's result.

    Arguments that a pattern has no use for are ignored, as FlashInfer does.

    Returns:
        ``norm_out`` for patterns 1, 4, 5, 9, 11 and 14, ``quant_out`` for 2, 3, 8, 10 and 13, ``output`` for 0. Of
        patterns 6 and 7 the first that is given of ``norm_out``, ``quant_out`` (then for 6 ``residual_out``,
        ``output``; 7 makes a ``norm_out`` where neither is given).

    Raises:
        ValueError: naming the argument, what it is and what is needed; nothing has been launched then.
    """
    api = "allreduce_fusion"
    workspace = open_workspace(api, workspace)
    member = as_pattern(api, pattern)
    flags = launch_flags(api, use_oneshot, launch_with_pdl, trigger_completion_at_end)
    if member in (Pattern.kMoEReductionARResidualRMSNorm, Pattern.kMoEFinalizeARResidualRMSNorm):
        epilogue = moe.Epilogue(
            residual_in=residual_in,
            gamma=rms_gamma,
            epsilon=rms_eps,
            weight_bias=weight_bias,
            without_residual=without_residual,
            scale_factor=scale_factor,
            layout_code=layout_code,
            flags=flags,
            allreduce_out=output,
            residual_out=residual_out,
            norm_out=norm_out,
            quant_out=quant_out,
            scale_out=scale_out,
            names={"allreduce_out": "output", "gamma": "rms_gamma"},
        )
        if member == Pattern.kMoEReductionARResidualRMSNorm:
            return moe.reduce(
                api,
                workspace,
                epilogue,
                moe_reduction_device_num_experts,
                moe_reduction_scale_input,
                moe_reduction_active_experts_token_input,
                moe_reduction_token_input,
                moe_reduction_expert_major,
            )
        moe.check_backend(api, "moe_finalize_backend", moe_finalize_backend)
        epilogue.make_norm(input)
        return moe.finalize(
            api,
            workspace,
            epilogue,
            input,
            "input",
            expanded_idx_to_permuted_idx,
            expert_scale_factor,
            shared_expert_output,
            routed_scaling_factor,
        )
    request = Request(api, workspace, "input", input, *input_shape(api, "input", input))
    if member == Pattern.kAllReduce:
        if output is None:
            output = torch.empty_like(input)
        request.launch("allreduce_rms_norm", (input,), flags=flags, allreduce_out=request.rows("output", output))
        return output
    residual = request.residual("residual_in", residual_in, without_residual)
    weight = request.gamma("rms_gamma", rms_gamma)
    if norm_out is None and member in _NORM_OUT:
        norm_out = torch.empty_like(input)
    quantised = NOT_QUANTISED
    if member != Pattern.kARResidualRMSNorm:
        if quant_out is None and member not in _NORM_OUT:
            quant_out = _new_codes(request, input, member)
        quantised = _quantised(request, member, quant_out, scale_out, scale_factor, layout_code, block_quant_group_size)
    either = (request.dtype, torch.float32)
    request.launch(
        "allreduce_rms_norm",
        (input,),
        residual=residual,
        weight=weight,
        epsilon=rms_eps,
        weight_bias=weight_bias,
        flags=flags,
        quantised=quantised,
        allreduce_out=request.optional_rows("output", output),
        residual_out=request.optional_rows("residual_out", residual_out, *either),
        norm_out=request.optional_rows("norm_out", norm_out, *either),
    )
    result = norm_out if member in _NORM_OUT else quant_out
    assert result is not None
    return result


def _new_codes(request: Request, input: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """A ``quant_out`` that the caller did not bring, in the input's shape."""
    if pattern in _NVFP4:
        return torch.empty(*input.shape[:-1], input.shape[-1] // 2, dtype=torch.uint8, device=request.device)
    return torch.empty(input.shape, dtype=FP8, device=request.device)


def _quantised(
    request: Request,
    pattern: Pattern,
    quant_out: Any,
    scale_out: Any,
    scale_factor: Any,
    layout_code: Any,
    group_size: Any,
) -> Quantised:
    """The pattern's quantiser, checked."""
    if pattern in _STATIC:
        spec = STATIC_FP8
    elif pattern in _NVFP4:
        spec = nvfp4(layout_code, request.api)
    elif pattern in _MXFP8:
        spec = mxfp8(layout_code, request.api)
    elif pattern in _GROUP:
        spec = packed_group_fp8(request.group_size(group_size))
    else:
        spec = TOKEN_FP8
    assert spec.format != QuantFormat.NONE
    return request.quantised(spec, quant_out, scale_out, scale_factor)
