"""The MoE patterns: a sum over experts on each rank, then the all-reduce, the norm and the quantiser, in one kernel.

Pattern 6, ``trtllm_moe_allreduce_fusion``, for each token ``t``::

    x[t] = sum over e of active_experts_token_input[e, t] * scale_input[e, t], plus token_input[t]

Pattern 7, ``trtllm_moe_finalize_allreduce_fusion``::

    x[t] = routed_scaling_factor * sum over k of input[index[t, k]] * expert_scale_factor[t, k], plus shared[t]

Both in fp32 throughout and rounded once before the exchange (FlashInfer rounds at every step). Every output is
optional, at least one is needed. ``quant_out`` decides the quantiser: e4m3 is static FP8 (with ``scale_factor``) or,
with an fp32 ``scale_out`` and no ``scale_factor``, dynamic FP8 per token; anything else holds NVFP4 codes.

How the expert tensors of pattern 6 lie in memory: FlashInfer documents ``[token_num, num_experts]`` scales, its kernel
and its tests read ``[num_experts, token_num]``. Here the shape of the scales decides (flat: expert-major), and with it
the order of the experts' rows. Where the two counts are equal the shapes say nothing and expert-major is read, what
code written for FlashInfer's kernel has; ``moe_reduction_expert_major`` settles it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import torch

from arfusion_pass.comm.fusion_workspace import AllReduceFusionWorkspace
from arfusion_pass.comm.request import (
    NOT_QUANTISED,
    Quantised,
    Request,
    launch_flags,
    need_dense,
    open_workspace,
    real,
    truth,
)
from arfusion_pass.ops.flashinfer_specs import FP8, STATIC_FP8, TOKEN_FP8, nvfp4

log = logging.getLogger("arfusion_pass")
_told: set[str] = set()

BACKENDS = ("trtllm", "cake")
"""FlashInfer's implementations of the MoE patterns; here they all mean ours."""


@dataclasses.dataclass
class Epilogue:
    """Everything after the sum over experts, as given; ``names`` translates a field to the caller's word."""

    residual_in: torch.Tensor | None
    gamma: torch.Tensor | None
    epsilon: float
    weight_bias: float
    without_residual: bool
    scale_factor: torch.Tensor | float | None
    layout_code: int | None
    flags: int
    allreduce_out: torch.Tensor | None
    residual_out: torch.Tensor | None
    norm_out: torch.Tensor | None
    quant_out: torch.Tensor | None
    scale_out: torch.Tensor | None
    names: dict[str, str]

    def given(self) -> list[torch.Tensor]:
        """The outputs given, the most downstream first: the first is what a call returns."""
        outputs = (self.norm_out, self.quant_out, self.residual_out, self.allreduce_out)
        return [output for output in outputs if output is not None]

    def make_norm(self, input: torch.Tensor) -> None:
        """Pattern 7 returns a norm: make one where neither it nor codes are given, but something else is."""
        if self.norm_out is None and self.quant_out is None and self.given() and isinstance(input, torch.Tensor):
            self.norm_out = torch.empty_like(self.given()[0], dtype=input.dtype)

    def name(self, field: str) -> str:
        """What the caller calls ``field``."""
        return self.names.get(field, field)

    def launch(self, request: Request, op: str, inputs: tuple[Any, ...]) -> torch.Tensor:
        """Check the rest and run ``op``."""
        returned = self.given()
        if not returned:
            request.fail(
                f"at least one output is needed: {self.name('allreduce_out')}, residual_out, norm_out or quant_out"
            )
        normed = self.norm_out is not None or self.quant_out is not None
        unread = not normed and self.residual_out is None and self.residual_in is None
        residual = request.residual(
            "residual_in", self.residual_in, truth(request.api, "without_residual", self.without_residual) or unread
        )
        either = (request.dtype, torch.float32)
        weight = request.gamma(self.name("gamma"), self.gamma) if normed or self.gamma is not None else None
        request.launch(
            op,
            inputs,
            residual=residual,
            weight=weight,
            epsilon=self.epsilon,
            weight_bias=self.weight_bias if weight is not None else 0.0,
            flags=self.flags,
            quantised=self._quantised(request),
            allreduce_out=request.optional_rows(self.name("allreduce_out"), self.allreduce_out),
            residual_out=request.optional_rows("residual_out", self.residual_out, *either),
            norm_out=request.optional_rows("norm_out", self.norm_out, *either),
        )
        return returned[0]

    def _quantised(self, request: Request) -> Quantised:
        codes, scales = self.quant_out, self.scale_out
        if codes is None:
            return NOT_QUANTISED
        if not isinstance(codes, torch.Tensor) or codes.dtype != FP8:
            spec = nvfp4(self.layout_code, request.api)
            return request.quantised(spec, codes, scales, self.scale_factor, default_scale=1.0)
        dynamic = self.scale_factor is None and scales is not None and scales.dtype == torch.float32
        return request.quantised(TOKEN_FP8 if dynamic else STATIC_FP8, codes, scales, self.scale_factor)


def reduce(
    api: str,
    workspace: AllReduceFusionWorkspace,
    epilogue: Epilogue,
    experts: Any,
    scale_input: Any,
    active_experts: Any,
    token_input: Any,
    expert_major: bool | None,
) -> torch.Tensor:
    """Pattern 6. The token count and hidden size come from ``token_input`` and ``rms_gamma``.

    Args:
        experts: ``moe_reduction_device_num_experts``, int.
        scale_input: fp32 ``[experts, tokens]``, flat so, or ``[tokens, experts]``.
        active_experts: ``T`` ``[experts * tokens, hidden]`` (or with three dimensions, or flat), in the same order.
        token_input: ``T`` ``[tokens, hidden]``.
    """
    prefix = "moe_reduction_"
    if isinstance(experts, bool) or not isinstance(experts, int) or experts < 1:
        raise ValueError(f"{api}: {prefix}device_num_experts is needed, a positive integer, got {experts!r}")
    hidden = _hidden(api, epilogue, token_input, prefix + "token_input")
    tokens = token_input.numel() // hidden
    request = Request(api, workspace, prefix + "token_input", token_input, tokens, hidden)
    added = request.rows(prefix + "token_input", token_input)
    name = prefix + "scale_input"
    scales = request.tensor(name, scale_input, (torch.float32,), f"[{experts}, {tokens}]")
    if expert_major is None:
        expert_major = _expert_major(tuple(scales.shape), experts, tokens)
    expert_major = truth(api, "moe_reduction_expert_major", expert_major)
    shape = (experts, tokens) if expert_major else (tokens, experts)
    if scales.numel() != experts * tokens or (scales.dim() == 2 and tuple(scales.shape) != shape):
        request.fail(
            f"{name} must be [num_experts, token_num] = [{experts}, {tokens}] or, as FlashInfer documents it, "
            f"[{tokens}, {experts}], got {list(scales.shape)}"
        )
    scales = scales.view(shape)
    name = prefix + "active_experts_token_input"
    rows = request.tensor(name, active_experts, (request.dtype,), f"[{experts * tokens}, {hidden}]")
    fits = rows.numel() == experts * tokens * hidden and (rows.dim() == 1 or rows.shape[-1] == hidden)
    if not fits or (rows.dim() == 3 and tuple(rows.shape[:2]) != shape):
        request.fail(
            f"{name} must be [num_experts * token_num, hidden_dim] = [{experts * tokens}, {hidden}] or "
            f"{[*shape, hidden]}, got {list(rows.shape)}"
        )
    rows = rows.view(*shape, hidden)
    if not expert_major:
        rows, scales = rows.transpose(0, 1).contiguous(), scales.t().contiguous()
    return epilogue.launch(request, "moe_reduce_allreduce_rms_norm", (rows, scales, added))


def finalize(
    api: str,
    workspace: AllReduceFusionWorkspace,
    epilogue: Epilogue,
    permuted: Any,
    permuted_name: str,
    index: Any,
    expert_scale: Any,
    shared: Any,
    routed_scaling_factor: float | None,
) -> torch.Tensor:
    """Pattern 7. The token count comes from the index.

    Args:
        permuted: ``T`` ``[rows, hidden]``, the experts' outputs; ``rows`` may exceed ``tokens * top_k``, or be 0.
        index: int32 ``[tokens, top_k]``, the row of each token's k-th expert; outside ``[0, rows)``: none, skipped.
        expert_scale: router weights ``[tokens, top_k]``, ``T`` or fp32, each read as what it is; None: all 1.
        shared: ``T`` ``[tokens, hidden]``, added at the end, or None.
        routed_scaling_factor: multiplies the sum over experts once; None: 1.
    """
    if not isinstance(permuted, torch.Tensor) or permuted.dim() != 2:
        got = list(permuted.shape) if isinstance(permuted, torch.Tensor) and not permuted.is_nested else repr(permuted)
        raise ValueError(f"{api}: {permuted_name} must be a tensor [permuted rows, hidden_dim], got {got}")
    need_dense(api, permuted_name, permuted)
    if not isinstance(index, torch.Tensor) or index.dim() != 2:
        got = list(index.shape) if isinstance(index, torch.Tensor) and not index.is_nested else repr(index)
        raise ValueError(f"{api}: expanded_idx_to_permuted_idx must be a tensor int32 [token_num, top_k], got {got}")
    need_dense(api, "expanded_idx_to_permuted_idx", index)
    tokens, hidden = index.shape[0], permuted.shape[1]
    request = Request(api, workspace, permuted_name, permuted, tokens, hidden)
    rows = request.tensor(permuted_name, permuted, (request.dtype,), f"[rows, {hidden}]")
    chosen = request.tensor("expanded_idx_to_permuted_idx", index, (torch.int32,), "[token_num, top_k]")
    weights = expert_scale
    if weights is not None:
        needed = f"[token_num, top_k] = {list(index.shape)}"
        weights = request.tensor("expert_scale_factor", weights, (request.dtype, torch.float32), needed)
        if weights.numel() != index.numel() or (weights.dim() > 1 and weights.shape[-1] != index.shape[1]):
            request.fail(f"expert_scale_factor must be {needed}, got {list(weights.shape)}")
        weights = weights.view(index.shape)
    factor = 1.0 if routed_scaling_factor is None else real(api, "routed_scaling_factor", routed_scaling_factor)
    if not -math.inf < factor < math.inf:
        request.fail(f"routed_scaling_factor must be finite, got {factor}")
    added = request.optional_rows("shared_expert_output", shared)
    return epilogue.launch(request, "moe_finalize_allreduce_rms_norm", (rows, chosen, weights, added, factor))


def trtllm_moe_allreduce_fusion(
    world_size: int,
    world_rank: int,
    token_num: int,
    hidden_dim: int,
    workspace_ptrs: AllReduceFusionWorkspace,
    launch_with_pdl: bool,
    residual_in: torch.Tensor,
    rms_gamma: torch.Tensor,
    rms_eps: float,
    scale_factor: torch.Tensor | float | None,
    moe_reduction_device_num_experts: int,
    moe_reduction_scale_input: torch.Tensor,
    moe_reduction_active_experts_token_input: torch.Tensor,
    moe_reduction_token_input: torch.Tensor,
    layout_code: int | None,
    moe_allreduce_out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    norm_out: torch.Tensor | None,
    quant_out: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    weight_bias: float | None = None,
    *,
    backend: str = "trtllm",
    moe_reduction_expert_major: bool | None = None,
    without_residual: bool = False,
) -> None:
    """Pattern 6 by FlashInfer's own function. ``workspace_ptrs`` is our workspace (or its ``workspace_tensor``).

    ``scale_factor`` is a float or a tensor of one element; the other arguments are those of
    :func:`arfusion_pass.comm.allreduce_fusion` and :func:`reduce`. ``ValueError`` where one does not fit.
    """
    api = "trtllm_moe_allreduce_fusion"
    workspace = _workspace(api, workspace_ptrs, world_size, world_rank)
    check_backend(api, "backend", backend)
    _match(api, "moe_reduction_token_input", moe_reduction_token_input, token_num, hidden_dim)
    epilogue = Epilogue(
        residual_in=residual_in,
        gamma=rms_gamma,
        epsilon=rms_eps,
        weight_bias=0.0 if weight_bias is None else weight_bias,
        without_residual=without_residual,
        scale_factor=scale_factor,
        layout_code=layout_code,
        flags=launch_flags(api, None, launch_with_pdl),
        allreduce_out=moe_allreduce_out,
        residual_out=residual_out,
        norm_out=norm_out,
        quant_out=quant_out,
        scale_out=scale_out,
        names={"allreduce_out": "moe_allreduce_out", "gamma": "rms_gamma"},
    )
    reduce(
        api,
        workspace,
        epilogue,
        moe_reduction_device_num_experts,
        moe_reduction_scale_input,
        moe_reduction_active_experts_token_input,
        moe_reduction_token_input,
        moe_reduction_expert_major,
    )


def trtllm_moe_finalize_allreduce_fusion(
    allreduce_in: torch.Tensor,
    residual_in: torch.Tensor,
    norm_weight: torch.Tensor,
    expanded_idx_to_permuted_idx: torch.Tensor,
    norm_out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    quant_out: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    workspace_ptrs: AllReduceFusionWorkspace,
    launch_with_pdl: bool,
    world_rank: int,
    world_size: int,
    eps: float,
    shared_expert_output: torch.Tensor | None,
    expert_scale_factor: torch.Tensor | None,
    routed_scaling_factor: float | None,
    weight_bias: float | None = None,
    *,
    backend: str = "trtllm",
    scale_factor: torch.Tensor | float | None = None,
    layout_code: int | None = None,
    moe_allreduce_out: torch.Tensor | None = None,
    without_residual: bool = False,
) -> None:
    """Pattern 7 by FlashInfer's own function. ``workspace_ptrs`` is our workspace (or its ``workspace_tensor``).

    Ours: ``scale_factor`` (FlashInfer's function has none and leaves the NVFP4 global scale undefined; here 1.0 without
    one), ``layout_code``, ``moe_allreduce_out``. The other arguments are those of
    :func:`arfusion_pass.comm.allreduce_fusion` and :func:`finalize`. ``ValueError`` where one does not fit.
    """
    api = "trtllm_moe_finalize_allreduce_fusion"
    workspace = _workspace(api, workspace_ptrs, world_size, world_rank)
    check_backend(api, "backend", backend)
    epilogue = Epilogue(
        residual_in=residual_in,
        gamma=norm_weight,
        epsilon=eps,
        weight_bias=0.0 if weight_bias is None else weight_bias,
        without_residual=without_residual,
        scale_factor=scale_factor,
        layout_code=layout_code,
        flags=launch_flags(api, None, launch_with_pdl),
        allreduce_out=moe_allreduce_out,
        residual_out=residual_out,
        norm_out=norm_out,
        quant_out=quant_out,
        scale_out=scale_out,
        names={"allreduce_out": "moe_allreduce_out", "gamma": "norm_weight"},
    )
    finalize(
        api,
        workspace,
        epilogue,
        allreduce_in,
        "allreduce_in",
        expanded_idx_to_permuted_idx,
        expert_scale_factor,
        shared_expert_output,
        routed_scaling_factor,
    )


def check_backend(api: str, name: str, backend: str) -> None:
    """``ValueError`` unless ``backend`` is one of FlashInfer's."""
    if backend not in BACKENDS:
        raise ValueError(f"{api}: {name} must be 'trtllm' or 'cake' (the same kernel here), got {backend!r}")


def _hidden(api: str, epilogue: Epilogue, token_input: Any, name: str) -> int:
    """Hidden size of pattern 6: gamma's length where the token input is flat, else its last dimension."""
    if not isinstance(token_input, torch.Tensor):
        raise ValueError(f"{api}: {name} is needed, a tensor [token_num, hidden_dim], got {token_input!r}")
    need_dense(api, name, token_input)
    if token_input.dim() > 1 and token_input.shape[-1] > 0:
        return token_input.shape[-1]
    if isinstance(epilogue.gamma, torch.Tensor) and epilogue.gamma.numel() and token_input.dim() == 1:
        return epilogue.gamma.numel()
    raise ValueError(f"{api}: {name} must be [token_num, hidden_dim], got {list(token_input.shape)}")


def _expert_major(shape: tuple[int, ...], experts: int, tokens: int) -> bool:
    """Whether scales of this shape are read as ``[experts, tokens]``; see the module's docstring."""
    if shape != (tokens, experts) or experts == tokens:
        return True
    if "token-major" not in _told:
        _told.add("token-major")
        log.warning(
            "arfusion: moe_reduction_scale_input [%d, %d] is read as FlashInfer documents it, [token_num, "
            "num_experts], and the experts' rows in the same order. With as many tokens as experts the shapes are the "
            "same and [num_experts, token_num] is read: pass moe_reduction_expert_major=False to be sure.",
            tokens,
            experts,
        )
    return False


def _workspace(api: str, workspace: Any, world_size: int, world_rank: int) -> AllReduceFusionWorkspace:
    """The workspace given where FlashInfer takes pointers, of this world and rank."""
    found = open_workspace(api, workspace, "workspace_ptrs")
    given = (world_size, world_rank)
    if any(isinstance(each, torch.Tensor) for each in given) or given != (found.world_size, found.rank):
        raise ValueError(
            f"{api}: world_size={world_size} and world_rank={world_rank} do not fit the workspace, which has "
            f"{found.world_size} and {found.rank}"
        )
    return found


def _match(api: str, name: str, value: Any, tokens: int, hidden: int) -> None:
    """``value`` has ``token_num * hidden_dim`` elements."""
    if not isinstance(value, torch.Tensor):
        return  # refused where it is read
    need_dense(api, name, value)
    if isinstance(tokens, torch.Tensor) or isinstance(hidden, torch.Tensor) or value.numel() != tokens * hidden:
        raise ValueError(
            f"{api}: {name} must be [token_num, hidden_dim] = [{tokens}, {hidden}], got {list(value.shape)}"
        )
