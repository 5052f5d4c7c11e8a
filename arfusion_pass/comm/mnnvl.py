"""FlashInfer's ``trtllm_mnnvl_*`` functions on the same kernels: any workspace of ours, no NVLink multicast.

    trtllm_mnnvl_allreduce(x, ws, launch_with_pdl=True)          # T(sum over ranks of x.float())
    codes, scales, residual, norm = trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant(
        x, residual, gamma, ws, quant_type=MNNVLQuantType.FP8, output_scale=scale)

Deterministic: the same bits on every rank and with every strategy, since sums are taken in rank order in fp32.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from arfusion_pass.comm.fusion_workspace import AllReduceFusionWorkspace
from arfusion_pass.comm.request import NOT_QUANTISED, Quantised, Request, input_shape, launch_flags, open_workspace
from arfusion_pass.ops import layouts
from arfusion_pass.ops.flashinfer_enums import MNNVLAllreduceFusionStrategy as Strategy
from arfusion_pass.ops.flashinfer_enums import MNNVLQuantType, QuantizationSFLayout, as_quant_type, as_strategy
from arfusion_pass.ops.flashinfer_specs import FP8, STATIC_FP8, TOKEN_FP8, mxfp8, nvfp4
from arfusion_pass.ops.spec import QuantSpec, ScaleLayout


def trtllm_mnnvl_allreduce(
    input: torch.Tensor,
    workspace: AllReduceFusionWorkspace,
    launch_with_pdl: bool,
    output: torch.Tensor | None = None,
    strategy: Strategy = Strategy.AUTO,
) -> torch.Tensor:
    """Sum of ``input`` over the ranks, in rank order, in fp32, rounded once. Collective.

    Args:
        input: ``T`` ``[num_tokens, hidden_dim]``, contiguous.
        workspace: of this rank's group.
        launch_with_pdl: programmatic dependent launch.
        output: where to write the result; made where it is None. May be ``input``.
        strategy: ``AUTO``, ``ONESHOT`` or ``TWOSHOT``; the bits are the same.

    Returns:
        The output.

    Raises:
        ValueError: naming the argument, what it is and what is needed.
    """
    api = "trtllm_mnnvl_allreduce"
    request, flags = _begin(api, input, workspace, launch_with_pdl, strategy)
    if output is None:
        output = torch.empty_like(input)
    request.launch("allreduce_rms_norm", (input,), flags=flags, allreduce_out=request.rows("output", output))
    return output


def trtllm_mnnvl_fused_allreduce_add_rmsnorm(
    input: torch.Tensor,
    residual_in: torch.Tensor,
    gamma: torch.Tensor,
    workspace: AllReduceFusionWorkspace,
    epsilon: float | None = None,
    output: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    launch_with_pdl: bool = False,
    strategy: Strategy = Strategy.AUTO,
    weight_bias: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All-reduce, residual add and RMSNorm. Collective.

    Arguments as in :func:`trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant`.

    Returns:
        ``(output, residual_out)``, the norm and the sum, each made where it is None.
    """
    api = "trtllm_mnnvl_fused_allreduce_add_rmsnorm"
    request, flags = _begin(api, input, workspace, launch_with_pdl, strategy)
    output = torch.empty_like(input) if output is None else output
    residual_out = _residual_out(input, residual_in) if residual_out is None else residual_out
    _launch(request, flags, input, residual_in, gamma, epsilon, weight_bias, output, residual_out, NOT_QUANTISED)
    return output, residual_out


def trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant(
    input: torch.Tensor,
    residual_in: torch.Tensor,
    gamma: torch.Tensor,
    workspace: AllReduceFusionWorkspace,
    epsilon: float | None = None,
    output: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    quant_out: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
    output_scale: torch.Tensor | float | None = None,
    layout_code: int = QuantizationSFLayout.SWIZZLED_128x4,
    quant_type: int = MNNVLQuantType.NONE,
    launch_with_pdl: bool = False,
    strategy: Strategy = Strategy.AUTO,
    weight_bias: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """All-reduce, residual add, RMSNorm and FP8, NVFP4 or MXFP8 quantisation. Collective.

    Args:
        input: ``T`` ``[num_tokens, hidden_dim]``, contiguous; ``T`` is bf16, fp16 or fp32.
        residual_in: ``T`` or fp32, the input's shape.
        gamma: ``T`` or fp32 ``[hidden_dim]``.
        workspace: of this rank's group.
        epsilon: None: ``torch.finfo(input.dtype).eps``.
        output: where to write the norm; not computed into memory where it is None.
        residual_out: where to write the sum; made where it is None.
        quant_out: FP8 and MXFP8: e4m3 ``[num_tokens, hidden_dim]``; NVFP4: ``num_tokens * hidden_dim / 2`` bytes.
            Made where it is None.
        scale_out: NVFP4 and MXFP8: bytes in the layout of ``layout_code``; dynamic FP8: fp32 ``[num_tokens, 1]``.
            Made where it is None. Static FP8 ignores it.
        output_scale: float, or a tensor of one element, 1.0 where None: FP8's dequantisation scale, NVFP4's global
            encode scale. Dynamic FP8 and MXFP8 ignore it.
        layout_code: NVFP4's and MXFP8's scale layout; all three work.
        quant_type: ``MNNVLQuantType.FP8``, ``NVFP4``, ``DYNAMIC_FP8`` or ``MXFP8``; ``NONE`` is refused.
        launch_with_pdl: as in :func:`trtllm_mnnvl_allreduce`.
        strategy: as in :func:`trtllm_mnnvl_allreduce`.
        weight_bias: added to ``gamma``; 1.0 for Gemma's norm.

    Returns:
        ``(quant_out, scale_out, residual_out, output)``; ``scale_out`` is None for static FP8, ``output`` is None
        unless it was given.

    Raises:
        ValueError: naming the argument, what it is and what is needed.
    """
    api = "trtllm_mnnvl_fused_allreduce_add_rmsnorm_quant"
    kind = as_quant_type(api, quant_type)
    request, flags = _begin(api, input, workspace, launch_with_pdl, strategy)
    if kind == MNNVLQuantType.NVFP4:
        spec = nvfp4(layout_code, api)
        if quant_out is None:
            quant_out = input.new_empty(request.tokens, request.hidden // 2, dtype=torch.uint8)
    else:
        mx = kind == MNNVLQuantType.MXFP8
        spec = mxfp8(layout_code, api) if mx else STATIC_FP8 if kind == MNNVLQuantType.FP8 else TOKEN_FP8
        if quant_out is None:
            quant_out = torch.empty_like(input, dtype=FP8)
    scale_out = None if spec.is_static else _scale_out(request, spec) if scale_out is None else scale_out
    quantised = request.quantised(spec, quant_out, scale_out, output_scale, 1.0, "output_scale")
    residual_out = _residual_out(input, residual_in) if residual_out is None else residual_out
    _launch(request, flags, input, residual_in, gamma, epsilon, weight_bias, output, residual_out, quantised)
    return quant_out, scale_out, residual_out, output


def _begin(api: str, input: Any, workspace: Any, launch_with_pdl: bool, strategy: Any) -> tuple[Request, int]:
    """The checks that all these functions share; (request, flags)."""
    found = open_workspace(api, workspace)
    shape = input_shape(api, "input", input)
    chosen = as_strategy(api, strategy)
    use_oneshot = None if chosen == Strategy.AUTO else chosen == Strategy.ONESHOT
    return Request(api, found, "input", input, *shape), launch_flags(api, use_oneshot, launch_with_pdl)


def _launch(
    request: Request,
    flags: int,
    input: torch.Tensor,
    residual_in: Any,
    gamma: Any,
    epsilon: float | None,
    weight_bias: float,
    output: torch.Tensor | None,
    residual_out: torch.Tensor,
    quantised: Quantised,
) -> None:
    either = (request.dtype, torch.float32)
    request.launch(
        "allreduce_rms_norm",
        (input,),
        residual=request.residual("residual_in", residual_in, False),
        weight=request.gamma("gamma", gamma),
        epsilon=torch.finfo(input.dtype).eps if epsilon is None else epsilon,
        weight_bias=weight_bias,
        flags=flags,
        quantised=quantised,
        residual_out=request.rows("residual_out", residual_out, *either),
        norm_out=request.optional_rows("output", output, *either),
    )


def _residual_out(input: torch.Tensor, residual_in: Any) -> torch.Tensor:
    """A sum's buffer, in the residual's dtype."""
    dtype = residual_in.dtype if isinstance(residual_in, torch.Tensor) else input.dtype
    return torch.empty_like(input, dtype=dtype)


def _scale_out(request: Request, spec: QuantSpec) -> torch.Tensor:
    """A scale buffer as FlashInfer makes it: flat for the swizzled layouts."""
    allocation = layouts.scale_allocation(request.tokens, request.hidden, spec)
    assert allocation is not None
    shape, dtype = allocation
    flat = spec.layout in (ScaleLayout.SWIZZLED_128X4, ScaleLayout.SWIZZLED_8X4)
    return torch.empty((math.prod(shape),) if flat else shape, dtype=dtype, device=request.device)
