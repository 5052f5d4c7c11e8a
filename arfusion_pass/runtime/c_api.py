"""The kernel library's C ABI (``kernels/api.h``) as ctypes: structures, prototypes and error translation.

Only Python's side of set-up, tests and benchmarks goes through here; the fused ops themselves are called through
torch's dispatcher, with no Python in between. ``tests/runtime/test_c_api.py`` compares the structures with api.h.
"""

from __future__ import annotations

import ctypes
import enum
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_longlong, c_uint32, c_void_p
from pathlib import Path

ABI_VERSION = 6
MAX_WORLD = 8
CONTROL_BYTES = 20480


class Status(enum.IntEnum):
    """``arf_status``."""

    OK = 0
    INVALID = 1
    NO_WORKSPACE = 2
    FALLBACK = 3
    EXPIRED = 4
    CUDA = 5
    CAPTURE = 6


class GroupState(enum.IntEnum):
    """``arf_group_state``."""

    UNKNOWN = 0
    WORKSPACE = 1
    FALLBACK = 2
    EXPIRED = 3


class RecordState(enum.IntEnum):
    """``arf_error_record.state``."""

    FINE = 0
    WAITED = 1
    OVERLAPPED = 2


class Strategy(enum.IntEnum):
    """``ARF_AUTO`` and its neighbours."""

    AUTO = 0
    ONESHOT = 1
    TWOSHOT = 2
    TWOSHOT_GATHER = 3
    SHARDED = 4


class ErrorRecord(ctypes.Structure):
    """``arf_error_record``: what a launch writes when a wait expires, or when it finds another one running."""

    _fields_ = [
        ("state", c_uint32),
        ("rank", c_uint32),
        ("peer", c_uint32),
        ("op", c_uint32),
        ("generation", c_uint32),
        ("strategy", c_uint32),
        ("token", c_uint32),
        ("reserved", c_uint32 * 9),
    ]


class WorkspaceDesc(ctypes.Structure):
    """``arf_workspace_desc``."""

    _fields_ = [
        ("group", c_char_p),
        ("device", c_int),
        ("rank", c_int),
        ("world", c_int),
        ("peers", c_void_p * MAX_WORLD),
        ("bytes", c_int64),
        ("control", c_void_p),
        ("error", c_void_p),
        ("timeout_ns", c_int64),
    ]


class Threshold(ctypes.Structure):
    """``arf_threshold``."""

    _fields_ = [("world", c_int32), ("hidden", c_int32), ("oneshot_max_bytes", c_int64)]


class Call(ctypes.Structure):
    """``arf_call``: one op call with bare pointers (tests of simulated ranks, launch plans)."""

    _fields_ = [
        ("op", c_int32),
        ("dtype", c_int32),
        ("tokens", c_int64),
        ("hidden", c_int64),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("residual", c_void_p),
        ("residual_stride", c_int64),
        ("residual_fp32", c_int32),
        ("residual_out_fp32", c_int32),
        ("weight", c_void_p),
        ("weight_fp32", c_int32),
        ("norm_out_fp32", c_int32),
        ("scale", c_void_p),
        ("scale_dtype", c_int32),
        ("scale_value", c_float),
        ("epsilon", c_float),
        ("weight_bias", c_float),
        ("flags", c_int32),
        ("quant_bound", c_float),
        ("quant", c_int64),
        ("allreduce_out", c_void_p),
        ("residual_out", c_void_p),
        ("norm_out", c_void_p),
        ("quant_out", c_void_p),
        ("scale_out", c_void_p),
        ("scale_pad_last", c_int32),
        ("experts", c_int32),
        ("expert_scale", c_void_p),
        ("expert_scale_fp32", c_int32),
        ("routed_scaling_factor", c_float),
        ("index", c_void_p),
        ("permuted_rows", c_int64),
        ("shared", c_void_p),
        ("addend", c_void_p),
        ("addend_rows", c_int32),
        ("epsilon_dtype", c_int32),
        ("epsilon_tensor", c_void_p),
        ("factor", c_void_p),
        ("factor_kind", c_int32),
        ("factor_fp32", c_int32),
        ("factor_value", c_float),
        ("block", c_int64),
        ("own_rows", c_int64),
    ]


class PlanInfo(ctypes.Structure):
    """``arf_plan_info``: what a call would do."""

    _fields_ = [
        ("strategy", c_int32),
        ("threads", c_int32),
        ("ctas", c_int32),
        ("vectors", c_int32),
        ("pieces", c_int64),
        ("piece_tokens", c_int64),
    ]


PrepareFn = ctypes.CFUNCTYPE(None, c_char_p, c_int, c_longlong, c_longlong, c_int)

_PROTOTYPES: dict[str, tuple[object, tuple[object, ...]]] = {
    "arf_abi_version": (c_int, ()),
    "arf_last_error": (c_char_p, ()),
    "arf_schemas": (c_char_p, ()),
    "arf_spec_constants": (c_char_p, ()),
    "arf_architectures": (c_char_p, ()),
    "arf_register_workspace": (c_int, (POINTER(WorkspaceDesc),)),
    "arf_destroy_workspace": (c_int, (c_char_p, c_int)),
    "arf_mark_fallback": (c_int, (c_char_p, c_int)),
    "arf_group_state": (c_int, (c_char_p, c_int)),
    "arf_read_error": (c_int, (c_char_p, c_int, POINTER(ErrorRecord))),
    "arf_set_timeout": (c_int, (c_char_p, c_int, c_int64)),
    "arf_set_max_ctas": (c_int, (c_char_p, c_int, c_int)),
    "arf_workspace_bytes": (c_int64, (c_int, c_int64, c_int)),
    "arf_workspace_capacity": (c_int64, (c_int, c_int64, c_int)),
    "arf_set_prepare": (None, (PrepareFn,)),
    "arf_prepare_failed": (None, (c_char_p, c_int)),
    "arf_call_failed": (None, (c_char_p, c_int)),
    "arf_prepare_group": (c_int, (c_char_p, c_int, c_longlong, c_longlong, c_int, c_void_p)),
    "arf_set_thresholds": (c_int, (POINTER(Threshold), c_int)),
    "arf_get_thresholds": (c_int, (POINTER(Threshold), c_int)),
    "arf_set_sharded_thresholds": (c_int, (POINTER(Threshold), c_int)),
    "arf_get_sharded_thresholds": (c_int, (POINTER(Threshold), c_int)),
    "arf_set_cast_saturates": (None, (c_int,)),
    "arf_launch": (c_int, (c_char_p, c_int, POINTER(Call), c_void_p)),
    "arf_launch_simulated": (
        c_int,
        (c_int, POINTER(Call), POINTER(c_void_p), c_int64, POINTER(c_void_p), POINTER(c_void_p), c_int64, c_void_p),
    ),
    "arf_plan": (c_int, (c_int, c_int64, POINTER(Call), c_int, POINTER(PlanInfo))),
    "arf_set_launch_override": (None, (c_int, c_int)),
}


class NativeError(RuntimeError):
    """A function of the kernel library failed."""


def open_library(path: Path) -> ctypes.CDLL:
    """The library at ``path`` (already loaded by torch, or not) with its prototypes set.

    Raises:
        OSError: it cannot be opened.
        RuntimeError: it is no kernel library, or one of another ABI version.
    """
    library = ctypes.CDLL(str(path))
    try:
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise RuntimeError(f"{path} is no arfusion kernel library of ABI version {ABI_VERSION}: {error}") from error
    version = library.arf_abi_version()
    if version != ABI_VERSION:
        raise RuntimeError(
            f"{path} has ABI version {version}, this arfusion_pass needs {ABI_VERSION}: "
            "build it anew with `arfusion build`"
        )
    return library


def check(library: ctypes.CDLL, function: str, *arguments: object) -> None:
    """Call ``function`` and raise ``ValueError`` (an argument is wrong) or :class:`NativeError` if it fails."""
    status = getattr(library, function)(*arguments)
    if status == Status.OK:
        return
    message = (library.arf_last_error() or b"").decode(errors="replace")
    if status == Status.INVALID:
        raise ValueError(message)
    raise NativeError(f"{function}: {message}")
