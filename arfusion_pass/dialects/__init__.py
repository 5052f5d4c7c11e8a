"""One file for each way of spelling the ops; :mod:`arfusion_pass.dialects.base` says what a dialect is."""

from __future__ import annotations

from arfusion_pass.dialects import aten, functional_collectives, vllm
from arfusion_pass.dialects.base import Dialect, Norm, Quantised, Reduced, Refused

DIALECTS: tuple[Dialect, ...] = (functional_collectives.DIALECT, aten.DIALECT, vllm.DIALECT)
"""Every dialect, in the order they are asked."""

__all__ = ["DIALECTS", "Dialect", "Norm", "Quantised", "Reduced", "Refused"]
