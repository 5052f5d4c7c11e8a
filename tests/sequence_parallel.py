"""Sequence parallelism as graphs spell it: functional collectives, in one dimension or the next, and vLLM's ops."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.models import Tensor

c10d = torch.ops._c10d_functional
GROUP = "0"


def scatter(x: Tensor, world: int, dim: int = 0, group: str = GROUP, op: str = "sum") -> Tensor:
    """``funcol.reduce_scatter_tensor``: pieces of another dimension are put behind one another first."""
    if dim:
        x = torch.cat(x.split(x.shape[dim] // world, dim))
    return c10d.wait_tensor(c10d.reduce_scatter_tensor(x, op, world, group))


def gather(mine: Tensor, world: int, dim: int = 0, group: str = GROUP) -> Tensor:
    """``funcol.all_gather_tensor``."""
    whole = c10d.wait_tensor(c10d.all_gather_into_tensor(mine, world, group))
    return torch.cat(whole.split(mine.shape[0]), dim) if dim else whole


def block(
    x: Tensor, residual: Tensor, weight: Tensor, world: int, norm: Callable[..., Tensor], dim: int = 0
) -> tuple[Tensor, Tensor]:
    """The gathered norm, and this rank's rows of the residual."""
    total = residual + scatter(x, world, dim)
    return gather(norm(total, weight, 1e-6), world, dim), total


def vllm_like(world: int, group: str = "tp") -> Callable[..., tuple[Tensor, ...]]:
    """A layer as vLLM's sequence-parallel pass leaves it: where the norm is quantised its codes are gathered."""
    ops, ir, kernels = torch.ops.vllm, torch.ops.vllm_ir, torch.ops._C

    def model(x: Tensor, w: Tensor, scale: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        residual = ops.reduce_scatter(x, 0, world, group)
        h = ops.all_gather(ir.rms_norm(residual, w, 1e-6), 0, world, group)
        norm, residual = ir.fused_add_rms_norm(ops.reduce_scatter(h @ up, 0, world, group), residual, w, 1e-5)
        codes = torch.empty(norm.shape, dtype=torch.float8_e4m3fn, device=norm.device)
        kernels.static_scaled_fp8_quant(codes, norm, scale)
        codes = ops.all_gather(codes, 0, world, group)
        h = (codes.float() * scale).to(x.dtype) @ down
        norm, _ = ir.fused_add_rms_norm(ops.reduce_scatter(h, 0, world, group), residual, w, 1e-6)
        return codes, ops.all_gather(norm, 0, world, group)

    return model
