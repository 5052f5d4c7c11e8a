"""One file for each way of spelling the ops; :mod:`arfusion_pass.dialects.base` says what a dialect is."""

from __future__ import annotations

from arfusion_pass.dialects import aten, aten_moe, functional_collectives
from arfusion_pass.dialects.base import Dialect, Norm, Prologue, Quantised, Reduced, Refused

DIALECTS: tuple[Dialect, ...] = (functional_collectives.DIALECT, aten.DIALECT, aten_moe.DIALECT)
"""Every dialect, in the order they are asked."""

__all__ = ["DIALECTS", "Dialect", "Norm", "Prologue", "Quantised", "Reduced", "Refused"]
