"""Sequence parallelism's op on the kernels of a sharded residual, each rank owning blocks of consecutive tokens.

Ranks are summed in order, in fp32, rounded once, as in every other op of ours, and not as the process group does it.
What the kernels cannot do stays with the group's collectives: a sum read beside its residual add, groups without peer
access, ranks without the library. All of that is the same on all ranks.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from arfusion_pass.groups import resolve_group
from arfusion_pass.ops import layouts
from arfusion_pass.ops.checks import FusedCall
from arfusion_pass.ops.marks import without_mark
from arfusion_pass.ops.memory import row_pitch
from arfusion_pass.ops.schema import SCATTERING_OP
from arfusion_pass.ops.spec import ROUNDING_FLAGS, Flags
from arfusion_pass.runtime import c_api, native, workspace

BLOCKS = Flags.SHARDED | Flags.RESIDUAL_IN_SHARDED | Flags.RESIDUAL_OUT_SHARDED | Flags.OWNER_BLOCKS
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}


def run(arguments: dict[str, Any]) -> bool:
    """Run a checked call of the op on CUDA tensors; False where the process group's collectives have to."""
    if not arguments["group_name"]:
        return False
    call = FusedCall.bind(SCATTERING_OP, arguments)
    if not fits(call, resolve_group(call.group_name).size()):
        return False
    device = call.x.device
    library = native.try_load()
    if library is None:  # other ranks may have one, and learn of it
        workspace.without_library(call.group_name, device.index, native.failure() or "unknown")
        return False
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        try:
            c_api.check(
                library, "arf_launch", call.group_name.encode(), device.index, ctypes.byref(launch_of(call)), stream
            )
        except c_api.NativeError as error:
            if error.status == c_api.Status.FALLBACK:
                return False
            raise
    return True


def fits(call: FusedCall, world: int) -> bool:
    """Whether the kernels have a call, by what all ranks know of it: one sum of a row is read."""
    outputs = call.outputs
    if int(call.tokens) == 0 or world < 2:
        return False
    summed = "allreduce_out" in outputs and (
        call.residual is not None or call.addend is not None or "residual_out" in outputs
    )
    return not summed and ("norm_out" in outputs or "quant_out" in outputs)


def launch_of(call: FusedCall) -> c_api.Call:
    """The launch; the tensors must outlive it."""
    outputs = dict(call.outputs)
    if (total := outputs.pop("allreduce_out", None)) is not None:
        outputs["residual_out"] = total  # without a residual the sum is the residual's
    flags = without_mark(call.flags) & (ROUNDING_FLAGS | Flags.NO_PDL | Flags.TRIGGER_EARLY)
    launch = c_api.Call(
        dtype=_DTYPES[call.x.dtype], tokens=int(call.tokens), hidden=call.x.shape[-1], x=call.x.data_ptr(),
        epsilon=call.epsilon, weight_bias=call.weight_bias, flags=int(flags | BLOCKS), quant=call.spec.pack(),
        quant_bound=call.spec.bound, scale_value=call.scale_value, scale_dtype=_DTYPES[torch.float32],
        block=int(call.block), addend_rows=int(call.addend is not None and call.addend.dim() > 1),
    )  # fmt: skip
    given = {name: getattr(call, name) for name in ("residual", "weight", "scale", "epsilon_tensor", "addend")}
    for name, tensor in {**given, **outputs}.items():
        if tensor is None:
            continue
        setattr(launch, name, tensor.data_ptr())
        if name in ("residual", "weight", "residual_out", "norm_out"):
            setattr(launch, f"{name}_fp32", int(tensor.dtype == torch.float32))
        elif name in ("scale", "epsilon_tensor"):
            setattr(launch, f"{name.split('_')[0]}_dtype", _DTYPES[tensor.dtype])
    for name, tensor in (("x", call.x), ("residual", call.residual)):
        if tensor is not None and (pitch := row_pitch(tensor)) is not None:
            setattr(launch, f"{name}_stride", pitch)
    scales = outputs.get("scale_out")
    if scales is not None and call.spec.layout in layouts.COLUMN_MAJOR:
        whole = layouts.is_transposed(scales, int(call.tokens), call.x.shape[-1], call.spec)
        launch.scale_pad_last = int(whole)  # else the last column's padding lies beyond the tensor
    return launch
