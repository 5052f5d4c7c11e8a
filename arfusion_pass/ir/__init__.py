"""Canonical one-stage ops in namespace ``arfusion_ir``: what dialects raise to and patterns match."""

from __future__ import annotations

import torch

from arfusion_pass.ir import ops  # defines the ops
from arfusion_pass.ir.quantisers import QUANTISERS, Quantiser

op = torch.ops.arfusion_ir
"""The namespace: ``op.rms_norm.default`` is an overload."""

__all__ = ["QUANTISERS", "Quantiser", "op", "ops"]
