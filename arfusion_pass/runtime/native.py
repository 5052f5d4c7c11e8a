"""The kernel library in this process: found or built, loaded once, connected to the workspace code.

    library = load()          # ctypes view of kernels/api.h; torch.ops.arfusion.* now has CUDA implementations
    library = try_load()      # the same, or None where there is none (said once; failure() tells why)

Importing this module loads nothing. A fused op that is called on CUDA tensors while no library is loaded comes through
:func:`arfusion_pass.runtime.dispatch.dispatch`; from then on torch's dispatcher calls the library's C++ directly.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arfusion_pass.config import switch
from arfusion_pass.ops.schema import NAMESPACE, SCHEMAS
from arfusion_pass.runtime import build, c_api, fallback

log = logging.getLogger("arfusion_pass")

_lock = threading.RLock()
_library: ctypes.CDLL | None = None
_path: Path | None = None
_failure: str | None = None
_callback: Any = None  # the ctypes object must outlive the library's use of it

MakeWorkspace = Callable[[str, int, int, int, int], object]
_make_workspace: MakeWorkspace | None = None


class NativeUnavailableError(RuntimeError):
    """There is no kernel library for this process; the message says why and what to do."""


def loaded() -> ctypes.CDLL | None:
    """The library, or None while it is not loaded."""
    return _library


def loaded_path() -> Path | None:
    """Where the library was loaded from."""
    return _path


def failure() -> str | None:
    """Why loading failed, or None."""
    return _failure


def load() -> ctypes.CDLL:
    """Load the library, building it first where it is not in the cache. Once a process; thread-safe.

    Raises:
        NativeUnavailableError: no GPU, no compiler and no built library, a compiler's error, another ABI. Later calls
            raise it again at once.
    """
    global _library, _path, _failure
    with _lock:
        if _library is not None:
            return _library
        if _failure is not None:
            raise NativeUnavailableError(_failure)
        try:
            path = _find_or_build()
            _library = _open(path)
            _path = path
        except (OSError, RuntimeError, ValueError) as error:
            _failure = str(error)
            raise NativeUnavailableError(_failure) from error
        return _library


def try_load() -> ctypes.CDLL | None:
    """:func:`load`, or None where that fails; the reason is logged once."""
    if _library is not None:
        return _library
    if _failure is not None:
        return None
    try:
        return load()
    except NativeUnavailableError as error:
        log.warning("arfusion: the fused ops run on the reference (correct, not fast): %s", error)
        return None


def set_workspace_maker(make: MakeWorkspace) -> None:
    """What the library's callback runs for a group without a workspace: handed down when the package is imported.

    Args:
        make: called with ``(group, device, tokens, hidden, dtype)`` of the first call; collective over the group.
    """
    global _make_workspace
    _make_workspace = make


def use_thresholds(rows: tuple[tuple[int, int, int], ...]) -> None:
    """Give the library a strategy table for one world size, keeping the rows of other worlds.

    Args:
        rows: ``(world, hidden, largest message in bytes for one-shot)``; hidden 0 for any.
    """
    _replace_rows("arf_get_thresholds", "arf_set_thresholds", rows)


def use_sharded_thresholds(rows: tuple[tuple[int, int, int], ...]) -> None:
    """The same with the table of sharded residuals: ``(world, hidden, smallest message in bytes)``."""
    _replace_rows("arf_get_sharded_thresholds", "arf_set_sharded_thresholds", rows)


def _replace_rows(read: str, write: str, rows: tuple[tuple[int, int, int], ...]) -> None:
    library = load()
    capacity = getattr(library, read)(None, 0)
    old = (c_api.Threshold * max(capacity, 1))()
    count = min(getattr(library, read)(old, capacity), capacity)
    worlds = {world for world, _, _ in rows}
    table = [(row.world, row.hidden, row.oneshot_max_bytes) for row in old[:count] if row.world not in worlds]
    table += list(rows)
    new = (c_api.Threshold * len(table))(*(c_api.Threshold(*row) for row in table))
    c_api.check(library, write, new, len(table))


def _find_or_build() -> Path:
    path = build.library_path()
    if path is not None and build.is_usable(path):
        return path
    if not os.environ.get("ARFUSION_LIBRARY"):
        if not torch.cuda.is_available():
            raise NativeUnavailableError("no CUDA device is visible")
        if not switch("ARFUSION_BUILD", True):
            why = build.distrust(path) if path is not None and os.path.isfile(path) else build.why_not_installed()
            raise NativeUnavailableError(
                f"{(why or f'the kernels are not built ({path})').rstrip('.')}; ARFUSION_BUILD=0 forbids building them "
                "on first use: run `arfusion build`"
            )
    return build.build()


def _open(path: Path) -> ctypes.CDLL:
    """Register the library's ops with torch and connect its callback. A second copy in one process would crash."""
    global _callback
    if other := _mapped_copy(path):
        raise RuntimeError(f"another copy of the kernel library is loaded in this process: {other} (asked for {path})")
    try:
        library = c_api.open_library(path)
        torch.ops.load_library(str(path))
    except OSError as error:
        raise RuntimeError(f"{path} cannot be loaded: {error}. Build it anew: `arfusion build --force`") from error
    missing = [op for op in SCHEMAS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", "CUDA")]
    if missing:
        raise RuntimeError(
            f"{path} registers no CUDA implementation of {', '.join(missing)}: build it anew with `arfusion build`"
        )
    fallback.register(_tell)
    _callback = c_api.PrepareFn(_prepare)
    library.arf_set_prepare(_callback)
    return library


def _tell(error: BaseException) -> None:
    """Hand the library an exception of an op that it may have called: torch keeps none on its way through C++."""
    if (library := _library) is not None:
        text = str(error) if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {error}"
        library.arf_call_failed(text.encode(), int(isinstance(error, ValueError)))


def _mapped_copy(path: Path) -> str | None:
    """The path of another kernel library that this process has mapped, or None."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    mapped = {line.split(maxsplit=5)[5] for line in lines if line.count(" ") >= 5 and "/libarfusion" in line}
    others = mapped - {str(path), os.path.realpath(path)}
    return min(others) if others else None


def _prepare(group: bytes, device: int, tokens: int, hidden: int, dtype: int) -> None:
    """The library's callback: a group has no workspace on that device. No exception may leave it."""
    library = _library
    assert library is not None
    try:
        assert _make_workspace is not None
        _make_workspace(group.decode(), device, tokens, hidden, dtype)
    except ValueError as error:
        library.arf_prepare_failed(str(error).encode(), 1)
    except BaseException as error:
        library.arf_prepare_failed(f"{type(error).__name__}: {error}".encode(), 0)
