"""FlashInfer's kernels behind our ops (``Flags.FLASHINFER``), for what they get right; the rest runs on ours.

    run("allreduce_rms_norm", arguments)        # FlashInfer's, or ours with a sentence in the log

Optional: ``pip install arfusion-pass[flashinfer]``. FlashInfer is imported when the first call needs it. Always its
``trtllm`` backend (``mnnvl`` and ``auto`` make NVLink multicast objects), always ``fp32_acc``.

Whether a call is refused depends only on its arguments, its group and the GPU's architecture, so all ranks decide
alike; whether FlashInfer is there at all is voted on when the group's FlashInfer workspace is made. What differs where
it does run: a sum that is -0.0 comes out as +0.0, and the norm may differ in its last bit (approximate ``rsqrt`` and
division).
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch

from arfusion_pass.groups import resolve_group
from arfusion_pass.ops import layouts
from arfusion_pass.ops.checks import FusedCall, check_call
from arfusion_pass.ops.flashinfer_enums import SCALE_LAYOUTS
from arfusion_pass.ops.flashinfer_enums import AllReduceFusionPattern as Pattern
from arfusion_pass.ops.flashinfer_specs import STATIC_FP8, TOKEN_FP8, packed_group_fp8
from arfusion_pass.ops.library import fused_op
from arfusion_pass.ops.schema import SCATTERING_OP
from arfusion_pass.ops.spec import Flags, QuantFormat, QuantSpec, ScaleLayout
from arfusion_pass.runtime.agreement import exchange
from arfusion_pass.runtime.aside import aside

log = logging.getLogger("arfusion_pass")

WORLDS = (2, 4, 8)
DEFAULT_MESSAGE = 32 << 20
"""Largest message, in bytes, of a workspace that a compiled graph's first call makes: 512 MiB of memory on 4 ranks."""

MAX_ONESHOT_H200X4 = 2 << 20
"""4 ranks on sm_90: above it FlashInfer's two-shot kernel is faster (``benchmarks/results/tp4.md``); its own limit, 8
MiB, is a B200's."""

ROUNDING = Flags.UNROUNDED_SUM | Flags.ROUND_BEFORE_WEIGHT
"""Beside its approximate root the norm's last bit is open, a division by the root or not."""

_workspaces: dict[
    tuple[str, int, bool], Any
] = {}  # (group name, device, fp32) to FlashInfer's workspace, or to why not
_told: set[str] = set()


def run(op: str, arguments: dict[str, Any]) -> None:
    """Run ``arfusion::op`` on FlashInfer, or, where that is refused, on ours (without the flag). Collective.

    Args:
        op: an op of :mod:`arfusion_pass.ops.schema`.
        arguments: all of its arguments, by name.

    Raises:
        ValueError: arguments that the op itself does not take.
    """
    call = FusedCall.bind(op, arguments)
    check_call(call, eager=True)
    reason = _try(call)
    if reason is not None:
        tell_once(f"arfusion::{op} runs on our kernels instead of FlashInfer's: {reason}")
        fused_op(op)(**{**arguments, "flags": int(call.flags) & ~int(Flags.FLASHINFER)})


def refusal(call: FusedCall, world: int, capability: tuple[int, int]) -> str | None:
    """Why FlashInfer would get ``call`` wrong (or cannot run it), or None. A pure function of its arguments.

    Args:
        call: a checked call.
        world: ranks of its group.
        capability: the GPU's compute capability.
    """
    if call.op == SCATTERING_OP:
        return "it has no sequence parallelism"
    if call.op != "allreduce_rms_norm":
        return (
            "its MoE kernels round at every step, take fp32 router weights for 16-bit ones, lose NVFP4's global scale "
            "and need every output"
        )
    if world not in WORLDS:
        return f"its kernels take groups of {', '.join(map(str, WORLDS))} ranks, this one has {world}"
    x, tokens = call.x, int(call.tokens)
    if tokens == 0:
        return "there are no tokens"
    vectors, rest = divmod(x.shape[-1] * x.itemsize, 16)
    if rest or not any(vectors % cluster == 0 and vectors // cluster <= 1024 for cluster in (1, 2, 4, 8)):
        return f"its launch cannot divide a hidden size of {x.shape[-1]} among thread blocks"
    if call.flags & Flags.TWOSHOT and tokens <= world:
        return f"its two-shot kernel needs more tokens than ranks, got {tokens} and {world}"
    return _epilogue_refusal(call) or _quantiser_refusal(call, capability)


def _epilogue_refusal(call: FusedCall) -> str | None:
    dtype, outputs = call.x.dtype, call.outputs
    if set(outputs) == {"allreduce_out"}:
        return None
    if "allreduce_out" in outputs and (call.residual is not None or "residual_out" in outputs):
        return "it does not give the all-reduce's result beside the residual"
    if call.addend is not None:
        return "it adds a residual, and nothing beside it"
    if call.factor is not None or call.factor_value != 1.0:
        return "it multiplies the all-reduce's result by nothing"
    if call.epsilon_tensor is not None:
        return "it takes epsilon as a number"
    if "norm_out" not in outputs and "quant_out" not in outputs:
        return "it adds a residual only in front of a norm"
    if call.weight is None:
        return "it has no norm without a weight"
    if call.weight.dtype != dtype:
        return f"it reads a {_name(call.weight)} weight as {_name(call.x)}"
    wrong: list[str] = [
        name for name in ("residual_out", "norm_out") if name in outputs and outputs[name].dtype != dtype
    ]
    if call.residual is not None and call.residual.dtype != dtype:
        wrong.insert(0, "residual")
    if wrong:
        return f"it takes {wrong[0]} in {_name(call.x)} only"
    rounding = call.flags & ROUNDING
    if call.residual is None:
        rounding &= ~Flags.UNROUNDED_SUM
    if rounding and dtype != torch.float32:
        return f"its norm has other rounding points than this one ({Flags(rounding)!r})"
    tensors = {"x": call.x, "residual": call.residual, "weight": call.weight, **outputs}
    odd = [name for name, tensor in tensors.items() if tensor is not None and tensor.data_ptr() % 16]
    return f"{odd[0]} does not start at a multiple of 16 bytes, which it does not check" if odd else None


def _quantiser_refusal(call: FusedCall, capability: tuple[int, int]) -> str | None:
    spec = call.spec
    if spec.format == QuantFormat.NONE or spec in (STATIC_FP8, TOKEN_FP8):
        return None
    if spec.format == QuantFormat.NVFP4:
        if capability < (10, 0):
            return f"its NVFP4 conversion writes zeros before sm_100, this is sm_{capability[0]}{capability[1]}"
        if spec.layout == ScaleLayout.SWIZZLED_8X4:
            return "it leaves scales of layout 8x4 unwritten"
        if call.x.dtype == torch.float32:
            return "it has no NVFP4 for fp32"
        return None if spec == QuantSpec(QuantFormat.NVFP4, 16, spec.layout) else "its NVFP4 has one formula"
    if spec.format == QuantFormat.FP8 and spec.group > 0 and spec == packed_group_fp8(spec.group):
        return None
    return f"it has no such quantiser: {spec}"


def _try(call: FusedCall) -> str | None:
    """Run ``call`` on FlashInfer; why not, or None where it ran."""
    if not call.x.is_cuda:
        return "the tensors are not on a GPU"
    if not call.group_name:
        return "there is no group"
    world = resolve_group(call.group_name).size()
    capability = torch.cuda.get_device_capability(call.x.device)
    if (reason := refusal(call, world, capability)) is not None:
        return reason
    workspace = _workspace(call)
    if isinstance(workspace, str):
        return workspace
    tokens, hidden = int(call.tokens), call.x.shape[-1]
    if not workspace.is_buffer_size_sufficient(world, tokens, hidden, call.x.dtype):
        return f"{tokens} x {hidden} is more than its workspace holds, and it does not go in pieces"
    _module().allreduce_fusion(**call_arguments(call, workspace, world, capability))
    return None


def call_arguments(call: FusedCall, workspace: Any, world: int, capability: tuple[int, int]) -> dict[str, Any]:
    """Keyword arguments of ``flashinfer.comm.allreduce_fusion`` for a call that was not refused.

    A missing residual is a zero one; a ``residual_out`` that nobody reads is scratch, because FlashInfer always stores
    it; a scale is always an fp32 device tensor; NVFP4's padding, which FlashInfer leaves as it is, is zeroed before.
    """
    x, out = call.x, call.outputs
    tokens, hidden = int(call.tokens), x.shape[-1]
    rows = (tokens, hidden)
    common = {
        "input": x.view(rows),
        "workspace": workspace,
        "launch_with_pdl": not call.flags & Flags.NO_PDL,
        "trigger_completion_at_end": not call.flags & Flags.TRIGGER_EARLY,
        "use_oneshot": use_oneshot(call, world, capability),
        "fp32_acc": True,
    }
    if set(out) == {"allreduce_out"}:
        return {**common, "pattern": int(Pattern.kAllReduce), "output": out["allreduce_out"].view(rows)}
    total = out.get("residual_out", out.get("allreduce_out"))
    arguments = {
        **common,
        "pattern": int(_pattern(call.spec, "norm_out" in out)),
        # Without a residual the sum that it stores is the all-reduce's result.
        "residual_in": torch.zeros(rows, dtype=x.dtype, device=x.device)
        if call.residual is None
        else call.residual.view(rows),
        "residual_out": torch.empty(rows, dtype=x.dtype, device=x.device) if total is None else total.view(rows),
        "rms_gamma": call.weight,
        "rms_eps": call.epsilon,
        "weight_bias": call.weight_bias,
    }
    if "norm_out" in out:
        arguments["norm_out"] = out["norm_out"].view(rows)
    if "quant_out" in out:
        arguments["quant_out"] = out["quant_out"].view(tokens, -1)
    spec = call.spec
    if spec.is_static or spec.format == QuantFormat.NVFP4:
        arguments["scale_factor"] = _scale(call)
    if spec.format == QuantFormat.NVFP4:
        code = next(code for code, layout in SCALE_LAYOUTS.items() if layout == spec.layout)
        arguments["layout_code"] = int(code)
        if spec.layout != ScaleLayout.LINEAR:
            out["scale_out"].view(torch.uint8).zero_()
    if spec.layout == ScaleLayout.PACKED_UE8M0:
        arguments["block_quant_group_size"] = spec.group
        arguments["scale_out"] = _packed(out["scale_out"], tokens, hidden, spec)
    elif "scale_out" in out:
        arguments["scale_out"] = out["scale_out"].view(tokens, 1) if spec == TOKEN_FP8 else out["scale_out"]
    return arguments


def use_oneshot(call: FusedCall, world: int, capability: tuple[int, int]) -> bool | None:
    """The strategy asked for, or FlashInfer's own choice (None) where that is safe and not a B200's threshold."""
    if call.flags & (Flags.ONESHOT | Flags.TWOSHOT):
        return bool(call.flags & Flags.ONESHOT)
    tokens = int(call.tokens)
    if tokens <= world:
        return True
    if world == 4 and capability[0] == 9:
        return tokens * call.x.shape[-1] * call.x.itemsize <= MAX_ONESHOT_H200X4
    return None


def prepare(name: str, device: torch.device, max_token_num: int, hidden_dim: int, dtype: torch.dtype) -> str | None:
    """Make FlashInfer's workspace for the group called ``name``; why that is impossible, or None. Collective."""
    made = _make(name, device, max_token_num, hidden_dim, dtype)
    return made if isinstance(made, str) else None


def release(name: str) -> None:
    """Free the FlashInfer workspaces of the group called ``name``, if there are any."""
    for key in [key for key in _workspaces if key[0] == name]:
        workspace = _workspaces.pop(key)
        if not isinstance(workspace, str):
            workspace.destroy()


def unavailable() -> str | None:
    """Why FlashInfer cannot be imported here, or None."""
    try:
        _module()
    except Exception as error:  # its import compiles and probes: anything may be wrong there
        return f"flashinfer.comm cannot be imported ({type(error).__name__}: {error}); pip install flashinfer-python"
    return None


def _module() -> Any:
    return importlib.import_module("flashinfer.comm")


def _workspace(call: FusedCall) -> Any:
    key = (call.group_name, call.x.device.index, call.x.dtype == torch.float32)
    if key in _workspaces:
        return _workspaces[key]
    if torch.cuda.is_current_stream_capturing():
        return "its workspace cannot be made while a CUDA graph is captured: run the call once before"
    hidden = call.x.shape[-1]
    tokens = max(int(call.tokens), DEFAULT_MESSAGE // (hidden * call.x.itemsize))
    return _make(call.group_name, call.x.device, tokens, hidden, call.x.dtype)


def _make(name: str, device: torch.device, tokens: int, hidden: int, dtype: torch.dtype) -> Any:
    """FlashInfer's workspace, or why there is none: the same answer on every rank, kept."""
    if not name or (world := resolve_group(name).size()) not in WORLDS:
        return f"its kernels take groups of {', '.join(map(str, WORLDS))} ranks"
    group = resolve_group(name)
    made: Any = None

    def create() -> Any:
        return _module().create_allreduce_fusion_workspace(
            backend="trtllm",
            world_size=world,
            rank=group.rank(),
            max_token_num=tokens,
            hidden_dim=hidden,
            dtype=dtype,
            group=group,
        )

    reason = _vote(name, "import", unavailable())
    if reason is None:
        mine = None
        try:
            made = aside(create, device.index)
        except Exception as error:
            mine = f"its workspace could not be made: {type(error).__name__}: {error}"
        reason = _vote(name, "workspace", mine)
    key = (name, device.index, dtype == torch.float32)
    _workspaces[key] = made if reason is None else reason
    return _workspaces[key]


def _vote(name: str, stage: str, reason: str | None) -> str | None:
    """None where no rank has a reason, else the first one, the same on every rank."""
    answers = exchange(resolve_group(name), f"{name}/flashinfer-{stage}", reason)
    return next((f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if answer is not None), None)


def _pattern(spec: QuantSpec, with_norm: bool) -> Pattern:
    """FlashInfer's pattern for a quantiser, with or without the norm as an output."""
    if spec.format == QuantFormat.NONE:
        return Pattern.kARResidualRMSNorm
    if spec.format == QuantFormat.NVFP4:
        pair = (Pattern.kARResidualRMSNormFP4Quant, Pattern.kARResidualRMSNormOutFP4Quant)
    elif spec.is_static:
        pair = (Pattern.kARResidualRMSNormFP8Quant, Pattern.kARResidualRMSNormOutFP8Quant)
    elif spec.group > 0:
        pair = (
            Pattern.kARResidualRMSNormPerTokenGroupFP8PackedQuant,
            Pattern.kARResidualRMSNormOutPerTokenGroupFP8PackedQuant,
        )
    else:
        pair = (Pattern.kARResidualRMSNormDynamicFP8Quant, Pattern.kARResidualRMSNormOutDynamicFP8Quant)
    return pair[with_norm]


def _scale(call: FusedCall) -> torch.Tensor:
    """One fp32 element on the device; filled by a kernel, not copied from the host, so that capture allows it."""
    if call.scale is not None:
        return call.scale.reshape(1).float()
    return torch.full((1,), call.scale_value, dtype=torch.float32, device=call.x.device)


def _packed(scales: torch.Tensor, tokens: int, hidden: int, spec: QuantSpec) -> torch.Tensor:
    """``[tokens, words]`` with FlashInfer's strides, of either form that the op takes."""
    words, ld = int(layouts.column_count(hidden, spec)), int(layouts.leading_dimension(tokens, spec))
    if tokens < ld and layouts.is_transposed(scales, tokens, hidden, spec):
        scales[-1, tokens:].zero_()  # FlashInfer zeroes the padding of every column but the last
    return scales.as_strided((tokens, words), (1, ld))


def tell_once(message: str) -> None:
    """Log a warning the first time that this process has cause for it."""
    if message not in _told:
        _told.add(message)
        log.warning("%s", message)


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
