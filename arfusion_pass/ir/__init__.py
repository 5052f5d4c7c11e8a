"""Canonical one-stage ops in namespace ``arfusion_ir``: what dialects raise to and patterns match."""

from __future__ import annotations

import torch

from arfusion_pass.ir import ops as _definitions  # noqa: F401  (defines the ops)
from arfusion_pass.ir.quantisers import QUANTISERS, Quantiser

ops = torch.ops.arfusion_ir

__all__ = ["QUANTISERS", "Quantiser", "ops"]
