"""What the kernels' tests run on: the first CUDA device or, where there is none, a GPU that the CPU emulates."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from arfusion_pass.runtime import c_api, fallback

EMULATED = not torch.cuda.is_available()
DEVICE = torch.device("cpu") if EMULATED else torch.device("cuda", 0)


def load(path: str | Path) -> ctypes.CDLL:
    """The library at ``path``; one with torch's binding registers its ops."""
    if not EMULATED:
        torch.ops.load_library(str(path))
        fallback.register()  # the first call of each kind is checked there
    library = c_api.open_library(Path(path))
    if EMULATED:  # as this torch's own cast does, which the reference uses
        saturates = not bool(torch.tensor(1e4).to(torch.float8_e4m3fn).float().isnan())
        library.arf_set_cast_saturates(int(saturates))
    return library


def synchronize() -> None:
    if not EMULATED:
        torch.cuda.synchronize()


def stream() -> int:
    return 0 if EMULATED else torch.cuda.current_stream().cuda_stream


def host_mapped(words: int) -> torch.Tensor:
    """Zeros that host and device see."""
    zeros = torch.zeros(words, dtype=torch.int32)
    return zeros if EMULATED else zeros.pin_memory()
