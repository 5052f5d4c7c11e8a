"""The canonical quantiser ops by name. A new quantiser is one entry here, one op and one kernel header."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from arfusion_pass.ops.spec import QuantSpec

_ir = torch.ops.arfusion_ir


@dataclasses.dataclass(frozen=True)
class Quantiser:
    """One canonical quantiser.

    Attributes:
        name: of its op in ``arfusion_ir``.
        label: what it adds to a pattern's name.
        takes_scale: whether a scale is an input (its signature is ``(x, scale, scale_value, quant)``; otherwise
            ``(x, quant, bound)``).
        has_scales: whether it also returns scales.
    """

    name: str
    label: str
    takes_scale: bool
    has_scales: bool

    @property
    def op(self) -> Any:
        """The op overload."""
        return getattr(_ir, self.name).default

    def arguments(self, norm: Any, spec: QuantSpec, scale: Any, scale_value: float) -> tuple[Any, ...]:
        """The op's positional arguments."""
        if self.takes_scale:
            return (norm, scale, scale_value, spec.pack())
        return (norm, spec.pack(), spec.bound)


QUANTISERS: dict[str, Quantiser] = {
    quantiser.name: quantiser
    for quantiser in (
        Quantiser("quant_fp8_static", "StaticQuantFP8", takes_scale=True, has_scales=False),
        Quantiser("quant_fp8_token", "TokenQuantFP8", takes_scale=False, has_scales=True),
        Quantiser("quant_fp8_group", "GroupQuantFP8", takes_scale=False, has_scales=True),
        Quantiser("quant_int8_token", "TokenQuantINT8", takes_scale=False, has_scales=True),
        Quantiser("quant_nvfp4", "QuantNVFP4", takes_scale=True, has_scales=True),
        Quantiser("quant_mxfp8", "QuantMXFP8", takes_scale=False, has_scales=True),
    )
}
