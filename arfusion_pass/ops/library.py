"""Defines the fused ops of :mod:`arfusion_pass.ops.schema` in namespace ``arfusion``: schema, fake, reference.

Importing this module is all that a graph or a cached artefact with these ops in it needs. Python defines the schemas;
the native library only adds CUDA implementations, which take over from the reference the moment they are loaded.

Each op, eagerly::

    reduced = ordered_all_reduce(prologue(inputs), group)
    result = epilogue(reduced, residual, weight, scale, ...)
    for every output given: output.copy_(result's field)

Sequence parallelism's op is the all-reduce's op, of a world of one, on this rank's rows, and gathers what is written of
all: one kernel between two collectives where the native library is loaded::

    mine = scatter_rows(x, group, block)
    allreduce_rms_norm(mine, residual, ..., "", allreduce_out=allreduce_out, residual_out=residual_out, norm_out=norm)
    norm_out.copy_(gather_rows(norm, group, block)); ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from arfusion_pass.groups import resolve_group
from arfusion_pass.ops import layouts, marks, record, reference
from arfusion_pass.ops.checks import SHARED_ROWS, FusedCall, check_call
from arfusion_pass.ops.schema import NAMESPACE, OUTPUT_NAMES, SCATTERING_OP, SCHEMAS
from arfusion_pass.ops.spec import Flags

Dispatcher = Callable[[str, dict[str, Any]], bool]
_dispatcher: Dispatcher | None = None


def set_dispatcher(dispatcher: Dispatcher) -> None:
    """What runs a checked call on CUDA tensors that reached the reference: the runtime hands it down when the package
    is imported, so that the ops name no runtime.

    Args:
        dispatcher: called with the op's name and its arguments; True: it ran the call. False: the reference runs it.
    """
    global _dispatcher
    _dispatcher = dispatcher


def native_dispatch(op: str, arguments: dict[str, Any]) -> bool:
    """Whether the dispatcher, if there is one, ran the call."""
    return _dispatcher is not None and _dispatcher(op, arguments)


def fused_op(name: str) -> torch._ops.OpOverload:
    """The op ``arfusion::name``."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def run_reference(op: str, arguments: dict[str, Any]) -> None:
    """Run ``arfusion::op`` on the reference: check, reduce over the group, epilogue, write the outputs given."""
    call = FusedCall.bind(op, arguments)
    check_call(call, eager=True)
    marks.first_call(call.group_name, call.flags, call.describe_reduced)
    _run(call)


@torch.inference_mode()  # as kernels write: into a tensor that requires a gradient, or was made in inference mode, too
def _run(call: FusedCall) -> None:
    group = resolve_group(call.group_name) if call.group_name else None
    if call.op == SCATTERING_OP:
        _run_scattering(call, group)
        return
    outputs = call.outputs
    reduced = reference.ordered_all_reduce(_prologue(call), group)
    result = reference.epilogue(
        reduced,
        None if call.residual is None else call.residual.view(reduced.shape),
        call.weight,
        call.scale,
        epsilon=call.epsilon,
        epsilon_tensor=call.epsilon_tensor,
        weight_bias=call.weight_bias,
        flags=call.flags,
        spec=call.spec,
        scale_value=call.scale_value,
        with_norm="norm_out" in outputs or "quant_out" in outputs,
        addend=_addend(call, reduced),
        factor=_factor(call),
        factor_value=call.factor_value,
    )
    fields = {"allreduce_out": result.reduced, "residual_out": result.total, "norm_out": result.norm}
    for name, value in fields.items():
        if name in outputs and value is not None:
            outputs[name].view(value.shape).copy_(value)
    if result.codes is not None:
        _bytes(outputs["quant_out"]).copy_(_bytes(result.codes))
    if result.scales is not None:
        layouts.write_scales(result.scales, outputs["scale_out"], call.x.shape[-1], call.spec)


def _run_scattering(call: FusedCall, group: dist.ProcessGroup | None) -> None:
    outputs, spec, hidden, block = call.outputs, call.spec, call.x.shape[-1], int(call.block)
    mine = reference.scatter_rows(call.x.view(-1, hidden), group, block)
    tokens = mine.shape[0]
    rows = {name: tensor.view(mine.shape) for name, tensor in outputs.items() if name in SHARED_ROWS}
    gathered = [name for name in ("norm_out", "quant_out") if name in outputs]
    for name in gathered:
        rows[name] = outputs[name].new_empty(tokens, outputs[name].shape[-1])
    if (scales := layouts.allocate_scales(tokens, hidden, spec, mine.device)) is not None:
        rows["scale_out"] = scales
    fused_op("allreduce_rms_norm")(
        x=mine,
        residual=None if call.residual is None else call.residual.view(mine.shape),
        weight=call.weight,
        scale=call.scale,
        group_name="",
        epsilon=call.epsilon,
        weight_bias=call.weight_bias,
        flags=marks.without_mark(call.flags),
        quant=spec.pack(),
        quant_bound=spec.bound,
        scale_value=call.scale_value,
        epsilon_tensor=call.epsilon_tensor,
        addend=_addend(call, mine),
        factor=_factor(call),
        factor_value=call.factor_value,
        **rows,
    )
    for name in gathered:
        own = rows[name].view(torch.uint8)
        outputs[name].view(torch.uint8).view(-1, own.shape[-1]).copy_(reference.gather_rows(own, group, block))
    if scales is not None:
        logical = layouts.read_scales(scales, tokens, hidden, spec)
        layouts.write_scales(reference.gather_rows(logical, group, block), outputs["scale_out"], hidden, spec)


def _addend(call: FusedCall, reduced: torch.Tensor) -> torch.Tensor | None:
    """``[H]``, or as many rows as ``reduced`` has."""
    addend = call.addend
    return addend if addend is None or addend.dim() == 1 else addend.view(reduced.shape)


def _factor(call: FusedCall) -> torch.Tensor | None:
    """One element, or one for each row, as ``[T, 1]``."""
    return None if call.factor is None else call.factor.view(-1, 1)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as a flat run of bytes: copies between 1-byte dtypes never convert."""
    return tensor.view(torch.uint8).view(-1)


def _prologue(call: FusedCall) -> torch.Tensor:
    """The local ``[T, H]`` tensor that is reduced."""
    inputs = call.inputs
    if "token_input" in inputs:
        token_input = inputs["token_input"]
        flat = None if token_input is None else token_input.view(call.x.shape[1:])
        expert_scale = inputs["expert_scale"]
        assert expert_scale is not None
        return reference.moe_reduce(call.x, expert_scale, flat, call.flags)
    if "index" in inputs:
        index, shared = inputs["index"], inputs["shared"]
        assert index is not None
        flat = None if shared is None else shared.view(index.shape[0], call.x.shape[-1])
        return reference.moe_finalize(
            call.x, index, inputs["expert_scale"], flat, call.routed_scaling_factor, call.flags
        )
    return call.x.view(int(call.tokens), call.x.shape[-1])


def binder(name: str) -> Callable[..., dict[str, Any]]:
    """What gives the arguments of ``arfusion::name``, as a call spells them, by name: all of them."""
    schema = fused_op(name)._schema.arguments

    def bind(*args: Any, **kwargs: Any) -> dict[str, Any]:
        arguments = {argument.name: argument.default_value for argument in schema}
        arguments.update(zip(arguments, args, strict=False))
        return {**arguments, **kwargs}

    return bind


def _implementations(name: str) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    """(real, fake, negated) of one op, which bind their arguments by the op's own schema. ``negated`` is what torch
    calls where a tensor is a lazily negated view: it has the inputs negated, and takes no such output."""
    bind = binder(name)

    def real(*args: Any, **kwargs: Any) -> None:
        arguments = bind(*args, **kwargs)
        if arguments["flags"] >> marks.MARK_SHIFT and torch.is_grad_enabled():
            _refuse_gradients(name, arguments)
        if arguments["flags"] & Flags.RECORD:
            record.observe(arguments, lambda plain: fused_op(name)(**plain))
            return
        call = FusedCall.bind(name, arguments)
        check_call(call, eager=True)
        marks.first_call(call.group_name, call.flags, call.describe_reduced)
        if not (call.x.is_cuda and native_dispatch(name, arguments)):
            _run(call)

    def fake(*args: Any, **kwargs: Any) -> None:
        arguments = bind(*args, **kwargs)
        arguments["flags"] = record.strip(arguments["flags"])
        check_call(FusedCall.bind(name, arguments), eager=False)

    def negated(*args: Any, **kwargs: Any) -> None:
        arguments = bind(*args, **kwargs)
        for output in OUTPUT_NAMES:
            if arguments[output] is not None and arguments[output].is_neg():
                raise ValueError(
                    f"arfusion::{name}: {output} must be plain memory, got a lazily negated view: clone it"
                )
        fused_op(name)(**{k: v.resolve_neg() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})

    return real, fake, negated


def _refuse_gradients(op: str, arguments: dict[str, Any]) -> None:
    """A graph's call has no backward: what flows through it would be missing from gradients without a word.

    Inductor runs inference graphs without gradients; this is for a graph that another back-end runs. Eager calls are
    like other kernels', which write outputs that autograd knows nothing of.
    """
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise RuntimeError(
                f"arfusion::{op}: {name} requires a gradient, and a fused call has no backward: run the graph under "
                "torch.no_grad() or torch.inference_mode()"
            )


def _define() -> torch.library.Library | None:
    """Define all ops, once a process: a module imported twice (a reload, two paths) must not define again."""
    if all(hasattr(getattr(torch.ops, NAMESPACE), name) for name in SCHEMAS):
        return None
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in SCHEMAS.items():
        # With any other tag Inductor hands the op a transposed producer's strides.
        library.define(name + schema, tags=(torch.Tag.needs_contiguous_strides,))
        real, fake, negated = _implementations(name)
        library.impl(name, real, "CompositeExplicitAutograd")
        library.impl(name, negated, "Negative")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return library


_library = _define()

__all__ = ["OUTPUT_NAMES", "binder", "fused_op", "native_dispatch", "run_reference", "set_dispatcher"]
