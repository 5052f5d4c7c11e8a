"""What the op library hands back to Python: groups without a workspace, and calls that name another backend.

``arfusion::_fallback_<op>`` has the schema of ``arfusion::<op>``; the op library redispatches to it where a group
cannot use the exchange kernels (no P2P, several hosts, more than 8 ranks), decided once a group and the same on all
ranks (:mod:`arfusion_pass.runtime.workspace`), and what of sequence parallelism the kernels do not have. Each is::

    x = prologue(...)                                   # MoE ops: the local kernel, all-reduce output only
    x = dist.all_reduce(x.clone(), group)                   # sequence parallelism: a reduce-scatter, all-gathers behind
    arfusion.<allreduce_rms_norm>(x, ..., group_name="")    # a world of one rank: add, norm and quantiser in one kernel

Here the summation order, and so the last bit of a sum, is the process group's, not ours.

``arfusion::_python_<op>`` runs a call whose flags say ``REFERENCE``, ``FLASHINFER`` or ``RECORD``.

``arfusion::_first_<op>`` runs nothing: it raises what is wrong with a call, or with the ranks' graphs
(:mod:`arfusion_pass.runtime.one_graph`). The op library asks it at the first call of each kind, and wherever it refuses
one itself, so that a call is refused in the same words on every back-end.

torch keeps no exception that leaves an op on its way through C++: each tells the library of it first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from arfusion_pass.groups import resolve_group
from arfusion_pass.ops import marks, record
from arfusion_pass.ops.checks import FusedCall, check_call
from arfusion_pass.ops.library import binder, fused_op, run_reference
from arfusion_pass.ops.schema import NAMESPACE, SCATTERING_OP, SCHEMAS
from arfusion_pass.ops.spec import Flags
from arfusion_pass.runtime import flashinfer

_LIBRARY: torch.library.Library | None = None

ADDENDS = Flags.ADDEND_LAST | Flags.ADDEND_SCALED
"""Flags of a call's addend, which the sum alone has not."""

Tell = Callable[[BaseException], None]


def fallback_name(op: str) -> str:
    """``allreduce_rms_norm`` to ``_fallback_allreduce_rms_norm``."""
    return f"_fallback_{op}"


def python_name(op: str) -> str:
    """``allreduce_rms_norm`` to ``_python_allreduce_rms_norm``."""
    return f"_python_{op}"


def first_name(op: str) -> str:
    """``allreduce_rms_norm`` to ``_first_allreduce_rms_norm``."""
    return f"_first_{op}"


def register(tell: Tell = lambda error: None) -> None:
    """Define the three families of ops. Safe to call again.

    Args:
        tell: called with every exception that is about to leave one of them, in the same thread.
    """
    global _LIBRARY
    if _LIBRARY is not None:
        return
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    implementations: dict[str, Callable[..., None]] = {
        "allreduce_rms_norm": allreduce_rms_norm,
        "moe_reduce_allreduce_rms_norm": moe_reduce_allreduce_rms_norm,
        "moe_finalize_allreduce_rms_norm": moe_finalize_allreduce_rms_norm,
        SCATTERING_OP: reduce_scatter_rms_norm_all_gather,
    }
    for op, schema in SCHEMAS.items():
        for name, run in (
            (fallback_name(op), implementations[op]),
            (python_name(op), _python_op(op)),
            (first_name(op), _first_op(op)),
        ):
            library.define(name + schema)
            library.impl(name, _telling(run, tell), "CompositeExplicitAutograd")
    _LIBRARY = library


def _telling(run: Callable[..., None], tell: Tell) -> Callable[..., None]:
    """``run``, whose exceptions ``tell`` hears of first."""

    def told(*args: Any, **kwargs: Any) -> None:
        try:
            run(*args, **kwargs)
        except BaseException as error:
            tell(error)
            raise

    return told


def _first_op(op: str) -> Callable[..., None]:
    """Checks a call of ``op``."""
    bind = binder(op)

    def first(*args: Any, **kwargs: Any) -> None:
        call = FusedCall.bind(op, bind(*args, **kwargs))
        check_call(call, eager=True)
        marks.first_call(call.group_name, call.flags, call.describe_reduced)

    return first


def _python_op(op: str) -> Callable[..., None]:
    """``op`` on the backend that its flags name."""
    bind = binder(op)

    def run(*args: Any, **kwargs: Any) -> None:
        arguments = bind(*args, **kwargs)
        if int(arguments["flags"]) & Flags.RECORD:
            record.observe(arguments, lambda plain: fused_op(op)(**plain))
        elif int(arguments["flags"]) & Flags.FLASHINFER:
            call = FusedCall.bind(op, arguments)
            marks.first_call(call.group_name, call.flags, call.describe_reduced)
            flashinfer.run(op, arguments)
        else:
            run_reference(op, arguments)

    return run


def allreduce_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    group_name: str,
    *scalars: Any,
    **keywords: Any,
) -> None:
    """All-reduce a copy of ``x`` through the process group, then the local epilogue."""
    total = keywords.get("allreduce_out")
    kept = residual is None or total is None or residual.data_ptr() != total.data_ptr()  # it may lie on the residual
    if total is not None and total.dtype == x.dtype and total.is_contiguous() and kept:
        keywords["allreduce_out"] = None
        total = total.view(x.shape).copy_(x)
    else:
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    _all_reduce(total, group_name)
    _local_epilogue(total, residual, weight, scale, *scalars, **keywords)


def moe_reduce_allreduce_rms_norm(
    expert_x: torch.Tensor,
    expert_scale: torch.Tensor,
    token_input: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    group_name: str,
    *scalars: Any,
    **keywords: Any,
) -> None:
    """The local sum over experts, its all-reduce, then the local epilogue."""
    flags = _flags(scalars, keywords) & ~ADDENDS
    total = torch.empty(expert_x.shape[1:], dtype=expert_x.dtype, device=expert_x.device)
    op = torch.ops.arfusion.moe_reduce_allreduce_rms_norm
    op(expert_x, expert_scale, token_input, None, None, None, "", flags=flags, allreduce_out=total)
    _all_reduce(total, group_name)
    _local_epilogue(total, residual, weight, scale, *scalars, **keywords)


def moe_finalize_allreduce_rms_norm(
    permuted_x: torch.Tensor,
    index: torch.Tensor,
    expert_scale: torch.Tensor | None,
    shared: torch.Tensor | None,
    routed_scaling_factor: float,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    group_name: str,
    *scalars: Any,
    **keywords: Any,
) -> None:
    """The local gather and sum over the chosen experts, its all-reduce, then the local epilogue."""
    flags = _flags(scalars, keywords) & ~ADDENDS
    shape = (index.shape[0], permuted_x.shape[-1])
    total = torch.empty(shape, dtype=permuted_x.dtype, device=permuted_x.device)
    op = torch.ops.arfusion.moe_finalize_allreduce_rms_norm
    op(
        permuted_x,
        index,
        expert_scale,
        shared,
        routed_scaling_factor,
        None,
        None,
        None,
        "",
        flags=flags,
        allreduce_out=total,
    )
    _all_reduce(total, group_name)
    _local_epilogue(total, residual, weight, scale, *scalars, **keywords)


def reduce_scatter_rms_norm_all_gather(*args: Any, **keywords: Any) -> None:
    """The group's reduce-scatter, the local epilogue on this rank's rows, and its all-gathers: what the reference makes
    of it, with the op library in place."""
    run_reference(SCATTERING_OP, binder(SCATTERING_OP)(*args, **keywords))


def _all_reduce(total: torch.Tensor, group_name: str) -> None:
    if group_name and total.numel():
        dist.all_reduce(total, group=resolve_group(group_name))


def _local_epilogue(
    total: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    *scalars: Any,
    **keywords: Any,
) -> None:
    """The epilogue on a sum that is already there; nothing where no output of it is left to write."""
    if any(value is not None for name, value in keywords.items() if name.endswith("_out")):
        torch.ops.arfusion.allreduce_rms_norm(total, residual, weight, scale, "", *scalars, **keywords)


def _flags(scalars: tuple[Any, ...], keywords: dict[str, Any]) -> int:
    """The ``flags`` argument: third of ``epsilon, weight_bias, flags, quant, quant_bound, scale_value``."""
    return int(scalars[2]) if len(scalars) > 2 else int(keywords.get("flags", 0))
