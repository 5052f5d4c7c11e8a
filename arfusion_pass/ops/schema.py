"""The fused ops' schemas in namespace ``arfusion``: frozen, so that kernels can change and callers need not.

Every op reduces over a process group and then runs one epilogue on the sum::

    reduced  = T(sum over ranks, in rank order, in fp32)                      # allreduce_out
    scaled   = T(reduced * factor)                                            # reduced, without a factor
    total    = T(scaled + addend) + residual                                  # residual_out; without either, less
    norm     = total * rsqrt(mean(total ** 2) + epsilon) * (weight_bias + weight)   # norm_out
    quant_out, scale_out = quantiser(norm)

Shapes: ``x``, ``residual`` and the outputs are ``[..., H]`` with the same number of tokens ``T``; leading
dimensions may differ between them (the op flattens). ``weight`` is ``[H]``. ``scale`` has one element: the static
FP8 scale or NVFP4's global scale; without it ``scale_value`` is used. ``addend``, what a graph adds beside the
residual, is ``[H]`` (a bias) or ``[..., H]``. ``factor``, what a graph multiplies by in front of that, has one
element, or one for each token, ``[..., 1]``; without it ``factor_value`` is used, of which 1 multiplies nothing.
``epsilon_tensor`` has one element, which is read when the op runs, rounded to fp32 and taken whatever it is;
``epsilon`` is not read beside it. Dtypes: ``x`` bf16, fp16 or fp32; ``addend`` as ``x``; ``factor``, ``residual``,
``residual_out``, ``weight`` and ``norm_out`` as ``x`` or fp32; ``epsilon_tensor`` fp32, fp64, bf16 or fp16.
An output that is ``None`` is not computed; at least one must be given. Outputs share no memory with each other; one
of ``[..., H]`` may lie on ``x``, ``residual``, ``token_input`` or ``shared``, exactly row on row. ``flags``, ``quant``
and ``quant_bound`` are described in :mod:`arfusion_pass.ops.spec`.

``group_name`` is resolved when the op runs (:mod:`arfusion_pass.groups`); the empty string means no
communication, a world of one rank.
"""

from __future__ import annotations

NAMESPACE = "arfusion"

EPILOGUE_INPUTS = (
    "Tensor? residual, Tensor? weight, Tensor? scale, str group_name, float epsilon=1e-6, float weight_bias=0.0, "
    "int flags=0, int quant=0, float quant_bound=0.0, float scale_value=1.0"
)

RARE_INPUTS = "Tensor? addend=None, Tensor? epsilon_tensor=None, Tensor? factor=None, float factor_value=1.0"
"""Behind the others, and by name: most calls have none."""

OUTPUTS = (
    "Tensor(a!)? allreduce_out=None, Tensor(b!)? residual_out=None, Tensor(c!)? norm_out=None, "
    "Tensor(d!)? quant_out=None, Tensor(e!)? scale_out=None"
)

OUTPUT_NAMES = ("allreduce_out", "residual_out", "norm_out", "quant_out", "scale_out")

SCATTERING_OP = "reduce_scatter_rms_norm_all_gather"
"""Sequence parallelism's op."""

SCHEMAS: dict[str, str] = {
    # x [..., H]
    "allreduce_rms_norm": f"(Tensor x, {EPILOGUE_INPUTS}, *, {RARE_INPUTS}, {OUTPUTS}) -> ()",
    # x = sum over the E local experts of expert_x[e, t] * expert_scale[e, t], plus token_input[t];
    # expert_x [E, T, H], expert_scale [E, T] fp32, token_input [T, H]
    "moe_reduce_allreduce_rms_norm": (
        f"(Tensor expert_x, Tensor expert_scale, Tensor? token_input, {EPILOGUE_INPUTS}, *, {RARE_INPUTS}, {OUTPUTS}) "
        "-> ()"
    ),
    # x = routed_scaling_factor * (sum over k of permuted_x[index[t, k]] * expert_scale[t, k]), plus shared[t];
    # permuted_x [P, H], index [T, K] int32 (-1, or anything outside [0, P), for none), expert_scale [T, K] fp32 or
    # x's dtype, shared [T, H]
    "moe_finalize_allreduce_rms_norm": (
        "(Tensor permuted_x, Tensor index, Tensor? expert_scale, Tensor? shared, float routed_scaling_factor, "
        f"{EPILOGUE_INPUTS}, *, {RARE_INPUTS}, {OUTPUTS}) -> ()"
    ),
    # x [..., H], T rows of which row t is rank t // block % world's, a block of 0 standing for T / world. residual,
    # an addend or a factor of rows, allreduce_out (this rank's rows of the sum) and residual_out hold the rank's own
    # T / world rows; norm_out, quant_out and scale_out all T
    SCATTERING_OP: f"(Tensor x, {EPILOGUE_INPUTS}, SymInt block=0, *, {RARE_INPUTS}, {OUTPUTS}) -> ()",
}
"""Op name to schema. ``tests/ops/test_schema.py`` freezes it and compares it with the op library's own list."""
