"""A fused op on CUDA tensors that reached the reference: which backend runs it."""

from __future__ import annotations

from typing import Any

import torch

from arfusion_pass.ops.spec import Flags
from arfusion_pass.runtime import fallback, flashinfer, native, workspace
from arfusion_pass.runtime.agreement import Backend


def dispatch(op: str, arguments: dict[str, Any]) -> bool:
    """A fused op was called on CUDA tensors and reached the reference: the library is not loaded, or must not run it.

    Loads the library if there is one and calls the op again, now served by C++; without one, agrees with the group's
    other ranks on what all of them do instead.

    Returns:
        True: done. False: the caller runs the reference.
    """
    if int(arguments.get("flags") or 0) & Flags.REFERENCE:
        return False
    if int(arguments.get("flags") or 0) & Flags.FLASHINFER:
        flashinfer.run(op, arguments)
        return True
    if native.try_load() is not None:
        getattr(torch.ops.arfusion, op).default(**arguments)
        return True
    group_name = arguments["group_name"]
    if not group_name:
        return False
    device = next(value.device.index for value in arguments.values() if isinstance(value, torch.Tensor))
    if workspace.without_library(group_name, device, native.failure() or "unknown") is Backend.REFERENCE:
        return False
    getattr(torch.ops.arfusion, fallback.fallback_name(op)).default(**arguments)
    return True
