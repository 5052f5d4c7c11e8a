"""One fused call as a value: its inputs on every rank, its run, its reference, and the exact contract between them.

Inputs come from seeds, so every rank can make every rank's input and compute the reference without communication::

    config = Config(tokens=33, hidden=4096, spec=GROUP_FP8, outputs=("residual_out", "norm_out", "quant_out"))
    result = run(config, env)
    verify(config, env, result)
"""

from __future__ import annotations

import dataclasses

import torch

from arfusion_pass.ops import layouts, reference
from arfusion_pass.ops.quantisers import quantise
from arfusion_pass.ops.spec import NO_QUANT, Flags, QuantFormat, QuantSpec
from tests.gpu.compare import POISON, GuardedBuffer, assert_bits, assert_norm, differing
from tests.gpu.harness import Env
from tests.ops.cases import logical_view

OUTPUTS = ("allreduce_out", "residual_out", "norm_out", "quant_out", "scale_out")

ROUNDING_FLAGS = (
    Flags.UNROUNDED_SUM
    | Flags.ROUND_BEFORE_WEIGHT
    | Flags.ADDEND_LAST
    | Flags.DIVIDE_BY_ROOT
    | Flags.RECIPROCAL_ROOT
    | Flags.ADDEND_SCALED
)
"""The flags that say what is computed, apart from the MoE prologues; the others say how."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A call of ``arfusion::allreduce_rms_norm``.

    ``residual`` and ``weight`` are ``"none"``, ``"same"`` (the input's dtype) or ``"fp32"``, a residual
    ``"negative_zero"`` as well; ``addend`` is ``"none"``, ``"row"`` or ``"rows"``; ``factor`` is ``"none"``,
    ``"value"``, ``"element"`` or ``"rows"``, and ``factor_fp32`` its dtype. ``epsilon_in``: epsilon comes in a tensor
    of that dtype. ``outputs`` without ``scale_out``: it follows from the quantiser. ``payload`` names a way of filling
    the inputs.
    """

    tokens: int
    hidden: int
    dtype: torch.dtype = torch.bfloat16
    residual: str = "same"
    weight: str = "same"
    weight_bias: float = 0.0
    epsilon: float = 1e-6
    flags: int = 0
    spec: QuantSpec = NO_QUANT
    outputs: tuple[str, ...] = ("residual_out", "norm_out")
    norm_fp32: bool = False
    residual_out_fp32: bool = False
    logical_scales: bool = False
    given_scale: str = "tensor"
    seed: int = 0
    payload: str = "normal"
    group_name: str | None = None
    addend: str = "none"
    epsilon_in: torch.dtype | None = None
    factor: str = "none"
    factor_fp32: bool = False

    @property
    def epsilon_given(self) -> float:
        """What the call gets as its number."""
        return self.epsilon if self.epsilon_in is None else 1e-6


@dataclasses.dataclass
class Shared:
    """Inputs that all ranks have in common."""

    residual: torch.Tensor | None
    weight: torch.Tensor | None
    scale: torch.Tensor | None
    scale_value: float
    addend: torch.Tensor | None = None
    epsilon_tensor: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    factor_value: float = 1.0


@dataclasses.dataclass
class Result:
    """The outputs of a run, by name, in guarded buffers."""

    buffers: dict[str, GuardedBuffer]
    scale_view: torch.Tensor | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.buffers[name].tensor

    def tensors(self) -> list[torch.Tensor]:
        return [buffer.tensor for buffer in self.buffers.values()]

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: buffer.tensor.clone() for name, buffer in self.buffers.items()}


def rank_input(config: Config, rank: int, device: torch.device) -> torch.Tensor:
    """``x`` of one rank."""
    from tests.gpu.payloads import fill

    generator = torch.Generator(device).manual_seed(config.seed * 64 + rank + 1)
    return fill(config.payload, (config.tokens, config.hidden), config.dtype, generator, device, rank)


def shared_inputs(config: Config, device: torch.device) -> Shared:
    """Residual, weight and scale."""
    generator = torch.Generator(device).manual_seed(config.seed * 64 + 63)
    shape = (config.tokens, config.hidden)
    residual = weight = scale = None
    kinds = {"same": config.dtype, "fp32": torch.float32}
    if config.residual == "negative_zero":
        residual = torch.full(shape, -0.0, device=device, dtype=config.dtype)
    elif config.residual != "none":
        residual = torch.randn(shape, generator=generator, device=device).to(kinds[config.residual])
    if config.weight != "none":
        weight = torch.randn(config.hidden, generator=generator, device=device).to(kinds[config.weight])
    value = 1.0
    if config.spec.is_static:
        value = 24.0 if config.spec.apply.name == "MULTIPLY" else 0.037
    elif config.spec.format == QuantFormat.NVFP4:
        value = 448.0 * 6.0 / 5.5
    if config.given_scale == "tensor" and (config.spec.is_static or config.spec.format == QuantFormat.NVFP4):
        scale = torch.full((), value, device=device)
        value = 1.0
    addend = epsilon = None
    if config.addend != "none":
        rows = shape if config.addend == "rows" else shape[1:]
        addend = torch.randn(rows, generator=generator, device=device).to(config.dtype)
    if config.epsilon_in is not None:
        epsilon = torch.full((1,), config.epsilon, device=device, dtype=config.epsilon_in)
    factor = None
    if config.factor in ("element", "rows"):
        rows = (config.tokens, 1) if config.factor == "rows" else ()
        factor = torch.randn(rows, generator=generator, device=device)
        factor = factor if config.factor_fp32 else factor.to(config.dtype)
    return Shared(residual, weight, scale, value, addend, epsilon, factor, 0.22 if config.factor == "value" else 1.0)


def allocate(config: Config, device: torch.device) -> Result:
    """Poisoned output buffers."""
    shape = (config.tokens, config.hidden)
    buffers = {}
    for name in config.outputs:
        if name == "quant_out":
            codes = tuple(int(size) for size in layouts.codes_shape(shape, config.spec))
            buffers[name] = GuardedBuffer(codes, layouts.codes_dtype(config.spec), device)
        else:
            wide = (name == "norm_out" and config.norm_fp32) or (name == "residual_out" and config.residual_out_fp32)
            buffers[name] = GuardedBuffer(shape, torch.float32 if wide else config.dtype, device)
    result = Result(buffers)
    allocation = layouts.scale_allocation(config.tokens, config.hidden, config.spec) if "quant_out" in buffers else None
    if allocation is not None:
        buffers["scale_out"] = GuardedBuffer(tuple(map(int, allocation[0])), allocation[1], device)
        if config.logical_scales:
            result.scale_view = logical_view(buffers["scale_out"].tensor, config.tokens, config.spec)
    return result


def launch(config: Config, env: Env, x: torch.Tensor, shared: Shared, result: Result) -> None:
    """Call the op into ``result``."""
    out = {name: buffer.tensor for name, buffer in result.buffers.items()}
    if result.scale_view is not None:
        out["scale_out"] = result.scale_view
    torch.ops.arfusion.allreduce_rms_norm(
        x,
        shared.residual,
        shared.weight,
        shared.scale,
        env.group_name if config.group_name is None else config.group_name,
        config.epsilon_given,
        config.weight_bias,
        int(config.flags),
        config.spec.pack(),
        config.spec.bound,
        shared.scale_value,
        addend=shared.addend,
        epsilon_tensor=shared.epsilon_tensor,
        factor=shared.factor,
        factor_value=shared.factor_value,
        **out,
    )


def run(config: Config, env: Env) -> Result:
    """Make inputs and outputs, call the op, note the outputs as the same on all ranks."""
    x, shared, result = rank_input(config, env.rank, env.device), shared_inputs(config, env.device), None
    result = allocate(config, env.device)
    launch(config, env, x, shared, result)
    env.same(*result.tensors())
    return result


def reduced_reference(config: Config, env: Env) -> torch.Tensor:
    """The fp32 sum over ranks in rank order, rounded once."""
    return reference.sum_in_rank_order(torch.stack([rank_input(config, r, env.device) for r in range(env.world)]))


def verify(config: Config, env: Env, result: Result, on_cpu: bool = False) -> None:
    """Raise AssertionError unless ``result`` keeps the exact contract."""
    verify_epilogue(config, reduced_reference(config, env), shared_inputs(config, env.device), result, on_cpu)


def verify_epilogue(
    config: Config, reduced: torch.Tensor, shared: Shared, result: Result, on_cpu: bool = False
) -> None:
    """The part of :func:`verify` after the all-reduce; the reference runs on the GPU, or on the CPU if ``on_cpu``."""
    if reduced.is_cuda:
        torch.cuda.synchronize()
    for name, buffer in result.buffers.items():
        buffer.assert_guards(name)
    outputs = {name: buffer.tensor for name, buffer in result.buffers.items()}
    if on_cpu:
        reduced = reduced.cpu()
        given = {field.name: getattr(shared, field.name) for field in dataclasses.fields(shared)}
        shared = Shared(**{name: t.cpu() if isinstance(t, torch.Tensor) else t for name, t in given.items()})
        outputs = {name: tensor.cpu() for name, tensor in outputs.items()}
    want = reference.epilogue(
        reduced,
        shared.residual,
        shared.weight,
        None,
        epsilon=config.epsilon,
        epsilon_tensor=shared.epsilon_tensor,
        weight_bias=config.weight_bias,
        flags=int(config.flags) & ROUNDING_FLAGS,
        addend=shared.addend,
        factor=shared.factor,
        factor_value=shared.factor_value,
    )
    assert want.norm is not None
    if "allreduce_out" in outputs:
        assert_bits("allreduce_out", outputs["allreduce_out"], want.reduced)
    if "residual_out" in outputs:
        assert_bits("residual_out", outputs["residual_out"], want.total.to(outputs["residual_out"].dtype))
    if "norm_out" in outputs:
        verify_norm(config, outputs["norm_out"], want.norm, reduced, shared)
    if "quant_out" in outputs:
        verify_quantiser(config, outputs, want.norm, shared, exact="norm_out" in outputs)


def verify_norm(config: Config, got: torch.Tensor, want: torch.Tensor, reduced: torch.Tensor, shared: Shared) -> None:
    """The norm's part. Where T is rounded to before the weight, one step there can become two after it.

    fp32 norms are measured from the exact value: the fp32 reference is itself up to 3.5 ulp from it (its mean's order,
    ``1 / sqrt`` in two roundings), and would use up the 4 that the contract allows.
    """
    want = want.to(got.dtype)
    if config.payload == "integers" and config.flags & (Flags.DIVIDE_BY_ROOT | Flags.RECIPROCAL_ROOT):
        return assert_bits("norm_out", got, norm_by_division(config, reduced, shared))
    rounds_low = bool(config.flags & Flags.ROUND_BEFORE_WEIGHT) and config.dtype != torch.float32
    if got.dtype == torch.float32 and not rounds_low:
        assert_norm("norm_out", got, exact_norm(config, reduced, shared))
        return
    if rounds_low:  # an fp32 norm then has the low dtype's steps times the weight: count them in that dtype
        got, want = got.to(config.dtype), want.to(config.dtype)
    try:
        assert_norm("norm_out", got, want, limit=2 if rounds_low else 1)
    except AssertionError:
        # A row may hold the same mantissa many times, and all of them sit on one side of a rounding boundary or the
        # other: more than 0.1 % may differ then, if each is what 4 ulp of fp32, before the roundings, can lead to.
        weight = None if shared.weight is None or not rounds_low else shared.weight.float() + config.weight_bias
        exact = exact_norm(config, reduced, shared if weight is None else dataclasses.replace(shared, weight=None))
        low, high = ((exact.to(got.device) * (1 + step * 2**-23)).to(got.dtype).float() for step in (-4, 4))
        if weight is not None:
            low, high = ((t * weight.to(got.device)).to(got.dtype).float() for t in (low, high))
        value = got.float()
        inside = ((torch.minimum(low, high) <= value) & (value <= torch.maximum(low, high))) | torch.isnan(low)
        if not inside.all():
            raise


def norm_by_division(config: Config, reduced: torch.Tensor, shared: Shared) -> torch.Tensor:
    """The fp32 norm of integers, whose sum of squares is exact in any order: each step behind it correctly rounded, as
    on a GPU (a CPU's ``torch.sqrt`` is MKL's, which is not)."""
    value = reduced.float()
    root = torch.sqrt((value.pow(2).mean(-1, keepdim=True) + config.epsilon).double()).float()
    norm = value / root if config.flags & Flags.DIVIDE_BY_ROOT else value * torch.reciprocal(root)
    return norm if shared.weight is None else norm * shared.weight.float()


def exact_norm(config: Config, reduced: torch.Tensor, shared: Shared) -> torch.Tensor:
    """The norm of the reference's sum in fp64, rounded to fp32 once."""
    steps = (shared.addend, config.flags, shared.factor, shared.factor_value)
    total = reference.fused_add(reduced, shared.residual, *steps)
    value = (total if config.flags & Flags.UNROUNDED_SUM else total.to(config.dtype)).double()
    epsilon = config.epsilon if shared.epsilon_tensor is None else shared.epsilon_tensor.float().double()
    norm = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + epsilon)
    if shared.weight is not None:
        norm = norm * (shared.weight.float() + config.weight_bias).double()
    return norm.float()


def verify_quantiser(
    config: Config, outputs: dict[str, torch.Tensor], norm: torch.Tensor, shared: Shared, exact: bool
) -> None:
    """Codes and every byte of the scales, padding included, are the reference quantiser's on the norm produced.

    Without ``norm_out`` the norm that was produced is not known; the reference's stands for it, and the few elements
    where the two may differ (section 5 of the design) may have other codes.
    """
    spec = config.spec
    source = outputs["norm_out"] if exact else norm
    value = config_scale_value(config) if shared.scale is None else 1.0
    codes, scales = quantise(source, spec, shared.scale, value, config.dtype)
    expected: torch.Tensor | None = None
    if scales is not None:
        # Padding inside the tensor given is 0; what lies past a strided view's last element keeps its poison.
        expected = torch.empty_like(outputs["scale_out"])
        expected.view(torch.uint8).fill_(POISON)
        view = logical_view(expected, config.tokens, spec) if config.logical_scales else expected
        layouts.write_scales(scales, view, config.hidden, spec)
    if exact:
        assert_bits("quant_out", outputs["quant_out"], codes.view(outputs["quant_out"].dtype))
        if expected is not None:
            assert_bits("scale_out", outputs["scale_out"], expected)
        return
    wrong = differing(outputs["quant_out"], codes.view(outputs["quant_out"].dtype)).float().mean()
    assert config.tokens * config.hidden < 64 or wrong < 0.02, f"quant_out: {float(wrong):.1%} of the codes differ"


def assert_same_codes(got: Result, want: Result) -> None:
    """Codes and scales of one call and of another that differs in what else it writes."""
    for name in ("quant_out", "scale_out"):
        if name in want.buffers:
            assert_bits(
                f"{name} without norm_out", got.buffers[name].tensor, want.buffers[name].tensor, nan_equal=False
            )


def config_scale_value(config: Config) -> float:
    """The scale that a call without a scale tensor passes by value."""
    return shared_inputs(dataclasses.replace(config, given_scale="value", tokens=1), torch.device("cpu")).scale_value


def with_strategy(config: Config, strategy: str) -> Config:
    """``config`` with ``"oneshot"``, ``"twoshot"`` forced, or ``"auto"``."""
    flag = {"auto": 0, "oneshot": int(Flags.ONESHOT), "twoshot": int(Flags.TWOSHOT)}[strategy]
    rest = int(config.flags) & ~int(Flags.ONESHOT | Flags.TWOSHOT)
    return dataclasses.replace(config, flags=rest | flag)
