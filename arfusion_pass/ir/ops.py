"""Canonical one-stage ops in namespace ``arfusion_ir``: what dialects raise to and patterns match on.

Each op is one stage with one meaning, whatever engine spelled it: schema, fake and eager meaning (by way of
:mod:`arfusion_pass.ops.reference`). All arguments are positional, epsilon, bias, flags and the packed quantiser
spec are literals. ``T`` is the dtype of the tensor that is reduced, which is the dtype of ``x`` here: a quantiser
given an fp32 norm therefore rounds to fp32 where its spec says ``T``.

Shapes: ``[..., H]`` in, ``[..., H]`` out. A dynamic quantiser's scales come as a reader of the graph sees them: ``ROW``
and ``LINEAR`` as ``[..., G]``; column-major layouts as the logical ``[T, G]`` (packed: ``[T, ceil(G / 4)]``) with
their strides; swizzled ones as the padded 2-D buffer of :func:`arfusion_pass.ops.layouts.scale_allocation`.
``reduce_scatter`` gives this rank's rows ``[T / world, H]`` of ``[..., H]``, ``all_gather`` all rows ``[T, H]`` again;
row ``t`` is rank ``t // block % world``'s (a ``block`` of 0: ``T / world``). ``fused_add_rms_norm`` adds a residual, an
addend (``[..., H]`` or ``[H]``), or both; ``epsilon_tensor``, one element, stands for ``epsilon`` where it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from arfusion_pass.groups import resolve_group
from arfusion_pass.ops import layouts, reference
from arfusion_pass.ops.checks import check_spec, known
from arfusion_pass.ops.layouts import Size
from arfusion_pass.ops.spec import Flags, QuantFormat, QuantSpec

NAMESPACE = "arfusion_ir"

Pair = tuple[torch.Tensor, torch.Tensor]

_NORM = "Tensor? weight, float epsilon, ScalarType dtype, float weight_bias, int flags"
_DYNAMIC = "(Tensor x, int quant, float bound) -> (Tensor, Tensor)"

SCHEMAS: dict[str, str] = {
    "all_reduce": "(Tensor x, str group) -> Tensor",
    "reduce_scatter": "(Tensor x, str group, SymInt block) -> Tensor",
    "all_gather": "(Tensor x, str group, SymInt block) -> Tensor",
    "rms_norm": f"(Tensor x, {_NORM}, Tensor? epsilon_tensor) -> Tensor",
    "fused_add_rms_norm": (
        f"(Tensor x, Tensor? residual, {_NORM}, ScalarType residual_dtype, Tensor? addend, Tensor? epsilon_tensor, "
        "Tensor? factor, float factor_value) -> (Tensor, Tensor)"
    ),
    "quant_fp8_static": "(Tensor x, Tensor? scale, float scale_value, int quant) -> Tensor",
    "quant_fp8_token": _DYNAMIC,
    "quant_fp8_group": _DYNAMIC,
    "quant_int8_token": _DYNAMIC,
    "quant_mxfp8": _DYNAMIC,
    "quant_nvfp4": "(Tensor x, Tensor? scale, float scale_value, int quant) -> (Tensor, Tensor)",
    "moe_reduce": "(Tensor expert_x, Tensor expert_scale, Tensor? token_input, int flags) -> Tensor",
    "moe_finalize": (
        "(Tensor permuted_x, Tensor index, Tensor? expert_scale, Tensor? shared, "
        "float routed_scaling_factor, int flags) -> Tensor"
    ),
}
"""Op name to schema; a new quantiser adds one line here and one in ``QUANTISERS``."""

QUANTISERS: dict[str, Callable[[QuantSpec], bool]] = {
    "quant_fp8_static": lambda spec: spec.is_static,
    "quant_fp8_token": lambda spec: spec.format == QuantFormat.FP8 and spec.group == -1,
    "quant_fp8_group": lambda spec: spec.format == QuantFormat.FP8 and spec.group > 0,
    "quant_int8_token": lambda spec: spec.format == QuantFormat.INT8,
    "quant_mxfp8": lambda spec: spec.format == QuantFormat.MXFP8,
    "quant_nvfp4": lambda spec: spec.format == QuantFormat.NVFP4,
}
"""Quantiser op to the specs that it takes."""


def ir_op(name: str) -> torch._ops.OpOverload:
    """The op ``arfusion_ir::name``."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


# Meanings ------------------------------------------------------------------------------------------------------------


def _all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    return reference.ordered_all_reduce(x.contiguous(), resolve_group(group) if group else None)


def _reduce_scatter(x: torch.Tensor, group: str, block: int) -> torch.Tensor:
    rows = x.contiguous().view(-1, x.shape[-1])
    return reference.scatter_rows(rows, resolve_group(group) if group else None, block)


def _all_gather(x: torch.Tensor, group: str, block: int) -> torch.Tensor:
    rows = x.contiguous().view(-1, x.shape[-1])
    return reference.gather_rows(rows, resolve_group(group) if group else None, block)


def _rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    dtype: torch.dtype,
    weight_bias: float,
    flags: int,
    epsilon_tensor: torch.Tensor | None,
) -> torch.Tensor:
    return reference.rms_norm(x.float(), weight, epsilon, weight_bias, flags, x.dtype, epsilon_tensor).to(dtype)


def _fused_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    epsilon: float,
    dtype: torch.dtype,
    weight_bias: float,
    flags: int,
    residual_dtype: torch.dtype,
    addend: torch.Tensor | None,
    epsilon_tensor: torch.Tensor | None,
    factor: torch.Tensor | None,
    factor_value: float,
) -> Pair:
    if factor is not None:
        factor = factor.view(()) if factor.numel() == 1 else factor.view(*x.shape[:-1], 1)
    total = reference.fused_add(x, residual, addend, flags, factor, factor_value)
    value = total if flags & Flags.UNROUNDED_SUM else total.to(x.dtype).float()
    norm = reference.rms_norm(value, weight, epsilon, weight_bias, flags, x.dtype, epsilon_tensor)
    return norm.to(dtype), total.to(residual_dtype)


def _quantise(x: torch.Tensor, spec: QuantSpec, scale: torch.Tensor | None, scale_value: float) -> Sequence[Any]:
    """``(codes, scales or None)`` in the shapes of the module's docstring."""
    hidden = x.shape[-1]
    flat = x.reshape(-1, hidden)
    codes, scales = reference.quantise(flat, spec, scale, scale_value, x.dtype)
    codes = codes.view(layouts.codes_shape(x.shape, spec))
    if scales is None:
        return codes, None
    buffer = layouts.allocate_scales(flat.shape[0], hidden, spec, x.device)
    assert buffer is not None
    layouts.write_scales(scales, buffer, hidden, spec)
    shape, strides = _scale_geometry(x.shape, spec)
    return codes, buffer.as_strided(shape, strides)


def _scale_geometry(shape: Sequence[Size], spec: QuantSpec) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
    """Shape and strides of the scales that a quantiser of ``[..., H]`` returns."""
    tokens, hidden = layouts.token_count(shape), shape[-1]
    if spec.layout in layouts.COLUMN_MAJOR:
        columns = layouts.column_count(hidden, spec)
        return (tokens, columns), (1, layouts.leading_dimension(tokens, spec))
    allocation = layouts.scale_allocation(tokens, hidden, spec)
    assert allocation is not None
    sizes = allocation[0] if spec.layout in layouts.SWIZZLED else (*shape[:-1], layouts.group_count(hidden, spec))
    strides: list[Size] = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * size)
    return sizes, tuple(strides)


def _spec(name: str, x: torch.Tensor, quant: int, bound: float) -> QuantSpec:
    """The unpacked spec, checked against the op; ``ValueError`` where it is another op's."""
    spec = QuantSpec.unpack(quant, bound)
    if not QUANTISERS[name](spec):
        raise ValueError(f"{NAMESPACE}::{name}: quant={quant:#x} is another quantiser's: {spec}")
    check_spec(spec)
    if spec.group > 0 and known(x.shape[-1] % spec.group != 0):
        raise ValueError(f"{NAMESPACE}::{name}: hidden size {x.shape[-1]} is no multiple of the group {spec.group}")
    return spec


def _given(name: str) -> Callable[..., Any]:
    """Meaning of a quantiser with a given scale."""

    def quant(x: torch.Tensor, scale: torch.Tensor | None, scale_value: float, quant: int) -> Any:
        codes, scales = _quantise(x, _spec(name, x, quant, 0.0), scale, scale_value)
        return codes if scales is None else (codes, scales)

    return quant


def _dynamic(name: str) -> Callable[..., Any]:
    """Meaning of a quantiser that makes its own scale."""

    def quant(x: torch.Tensor, quant: int, bound: float) -> Any:
        return tuple(_quantise(x, _spec(name, x, quant, bound), None, 1.0))

    return quant


# Fakes ---------------------------------------------------------------------------------------------------------------


def _like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _tokens(x: torch.Tensor) -> Size:
    return layouts.token_count(x.shape)


def _world(group: str) -> int:
    return resolve_group(group).size() if group else 1


def _fake_rows(x: torch.Tensor, count: Size) -> torch.Tensor:
    return x.new_empty((count, x.shape[-1]))


def _fake_codes(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    return x.new_empty(layouts.codes_shape(x.shape, spec), dtype=layouts.codes_dtype(spec))


def _fake_pair(x: torch.Tensor, spec: QuantSpec) -> Pair:
    shape, strides = _scale_geometry(x.shape, spec)
    return _fake_codes(x, spec), x.new_empty_strided(shape, strides, dtype=layouts.scale_dtypes(spec)[0])


def _fake_given(name: str) -> Callable[..., Any]:
    def fake(x: torch.Tensor, scale: torch.Tensor | None, scale_value: float, quant: int) -> Any:
        spec = _spec(name, x, quant, 0.0)
        return _fake_codes(x, spec) if spec.is_static else _fake_pair(x, spec)

    return fake


def _fake_dynamic(name: str) -> Callable[..., Any]:
    return lambda x, quant, bound: _fake_pair(x, _spec(name, x, quant, bound))


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "all_reduce": (_all_reduce, lambda x, group: _like(x)),
    "reduce_scatter": (_reduce_scatter, lambda x, group, block: _fake_rows(x, _tokens(x) // _world(group))),
    "all_gather": (_all_gather, lambda x, group, block: _fake_rows(x, _tokens(x) * _world(group))),
    "rms_norm": (_rms_norm, lambda x, weight, epsilon, dtype, *_: _like(x, dtype)),
    "fused_add_rms_norm": (
        _fused_add_rms_norm,
        lambda x, residual, weight, epsilon, dtype, weight_bias, flags, residual_dtype, *_: (
            _like(x, dtype),
            _like(x, residual_dtype),
        ),
    ),
    "moe_reduce": (reference.moe_reduce, lambda expert_x, *_: expert_x.new_empty(expert_x.shape[1:])),
    "moe_finalize": (
        reference.moe_finalize,
        lambda permuted_x, index, *_: permuted_x.new_empty((index.shape[0], permuted_x.shape[-1])),
    ),
    **{
        name: (_given(name), _fake_given(name))
        if "scale_value" in SCHEMAS[name]
        else (_dynamic(name), _fake_dynamic(name))
        for name in QUANTISERS
    },
}


def _define() -> torch.library.Library | None:
    """Define all ops, once a process."""
    if all(hasattr(getattr(torch.ops, NAMESPACE), name) for name in SCHEMAS):
        return None
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        real, fake = _IMPLEMENTATIONS[name]
        library.impl(name, real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return library


_library = _define()
