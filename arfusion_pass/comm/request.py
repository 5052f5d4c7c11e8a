"""One eager call on its way to a fused op: its tensors checked in the caller's own words, its quantiser as a spec.

Every check raises ``ValueError`` before anything is launched and says what is wrong, what was given and what is needed.
What the fused op itself checks (hidden sizes, epsilon) is not repeated here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from arfusion_pass.comm.fusion_workspace import AllReduceFusionWorkspace
from arfusion_pass.ops import layouts
from arfusion_pass.ops.checks import INPUT_DTYPES
from arfusion_pass.ops.flashinfer_specs import FP8
from arfusion_pass.ops.library import fused_op
from arfusion_pass.ops.memory import within_storage
from arfusion_pass.ops.schema import SCHEMAS
from arfusion_pass.ops.spec import NO_QUANT, Flags, QuantFormat, QuantSpec, ScaleLayout

_OPS = {name: fused_op(name) for name in SCHEMAS}


@dataclasses.dataclass
class Quantised:
    """A quantiser and its tensors as the fused op takes them."""

    spec: QuantSpec
    codes: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    scale_value: float = 1.0


NOT_QUANTISED = Quantised(NO_QUANT)

_FP32_ZERO = 2.0**-150
"""The largest number that fp32 rounds to 0."""

_packed = functools.cache(QuantSpec.pack)
"""A handful of specs, each packed once: packing costs as much as all checks of a tensor."""

# Plain integers: combining IntFlag members costs microseconds a call.
_ONESHOT, _TWOSHOT, _NO_PDL = int(Flags.ONESHOT), int(Flags.TWOSHOT), int(Flags.NO_PDL)
_TRIGGER_EARLY, _UNROUNDED_SUM = int(Flags.TRIGGER_EARLY), int(Flags.UNROUNDED_SUM)


class Request:
    """The checks of one call, and its launch.

    Args:
        api: the function called, for messages.
        workspace: where it runs; must be alive.
        reference: the tensor that gives dtype and device (``T`` below is its dtype), under its name.
        tokens, hidden: of the all-reduced tensor.
    """

    def __init__(
        self,
        api: str,
        workspace: AllReduceFusionWorkspace,
        name: str,
        reference: torch.Tensor,
        tokens: int,
        hidden: int,
    ) -> None:
        self.api, self.workspace = api, workspace
        self.dtype, self.device = reference.dtype, reference.device
        self.tokens, self.hidden = tokens, hidden
        if self.dtype not in INPUT_DTYPES:
            self.fail(f"{name} must be bfloat16, float16 or float32, got {_name(self.dtype)}")
        if self.device != workspace.device:
            self.fail(f"{name} must be on {workspace.device} as the workspace is, got {self.device}")

    def fail(self, message: str) -> NoReturn:
        """Raise the ``ValueError``."""
        raise ValueError(f"{self.api}: {message}")

    def tensor(self, name: str, value: Any, dtypes: Sequence[torch.dtype] | None, needed: str) -> torch.Tensor:
        """``value`` is a contiguous tensor on the call's device, of one of ``dtypes``; ``needed`` is its shape."""
        if not isinstance(value, torch.Tensor):
            wanted = needed if dtypes is None else f"{' or '.join(dict.fromkeys(map(_name, dtypes)))} {needed}"
            self.fail(f"{name} is needed, a tensor {wanted}, got {value!r}")
        if value.device != self.device:
            self.fail(f"{name} must be on {self.device} as the input is, got {value.device}")
        if dtypes is None:
            self.need_bytes(name, value)
        elif value.dtype not in dtypes:
            self.fail(f"{name} must be {' or '.join(dict.fromkeys(map(_name, dtypes)))}, got {_name(value.dtype)}")
        need_contiguous(self.api, name, value)
        return value

    def need_bytes(self, name: str, value: torch.Tensor) -> None:
        """``value``, of any dtype, can be viewed as bytes."""
        need_dense(self.api, name, value)
        if value.is_quantized or value.is_conj():
            self.fail(f"{name} must be a dense tensor, got {value.dtype}{' conjugated' if value.is_conj() else ''}")
        if not within_storage(value):
            self.fail(f"{name} reaches beyond its storage, which was freed or made smaller")

    def rows(self, name: str, value: Any, *dtypes: torch.dtype) -> torch.Tensor:
        """``value`` as ``[tokens, hidden]``; given so, with more leading dimensions, or flat. Default dtype: ``T``."""
        needed = f"[{self.tokens}, {self.hidden}]"
        tensor = self.tensor(name, value, dtypes or (self.dtype,), needed)
        if tensor.numel() != self.tokens * self.hidden or (tensor.dim() > 1 and tensor.shape[-1] != self.hidden):
            self.fail(f"{name} must be [token_num, hidden_dim] = {needed}, got {list(tensor.shape)}")
        return tensor if tensor.dim() == 2 else tensor.view(self.tokens, self.hidden)

    def optional_rows(self, name: str, value: Any, *dtypes: torch.dtype) -> torch.Tensor | None:
        """:meth:`rows`, or None for None."""
        return None if value is None else self.rows(name, value, *dtypes)

    def residual(self, name: str, value: Any, without: bool) -> torch.Tensor | None:
        """The residual to add, ``T`` or fp32; None only where the caller said that there is none."""
        without = truth(self.api, "without_residual", without)
        if value is None and without:
            return None
        if value is not None and without:
            self.fail(f"without_residual=True, but {name} was given")
        return self.rows(name, value, self.dtype, torch.float32)

    def gamma(self, name: str, value: Any) -> torch.Tensor:
        """The norm's weight ``[hidden]``, ``T`` or fp32."""
        tensor = self.tensor(name, value, (self.dtype, torch.float32), f"[{self.hidden}]")
        if tensor.numel() != self.hidden:
            self.fail(f"{name} must be [hidden_dim] = [{self.hidden}], got {list(tensor.shape)}")
        return tensor if tensor.dim() == 1 else tensor.view(self.hidden)

    def quantised(
        self,
        spec: QuantSpec,
        quant_out: Any,
        scale_out: Any,
        scale_factor: Any,
        default_scale: float | None = None,
        scale_name: str = "scale_factor",
    ) -> Quantised:
        """Check a quantiser's tensors. ``default_scale`` stands in for a missing ``scale_factor``."""
        result = Quantised(spec, codes=self._codes(spec, quant_out))
        if spec.is_static or spec.format == QuantFormat.NVFP4:
            result.scale, result.scale_value = self._scale(scale_name, scale_factor, spec, default_scale)
        if not spec.is_static:
            result.scales = self._scales(spec, scale_out)
        return result

    def _codes(self, spec: QuantSpec, quant_out: Any) -> torch.Tensor:
        if spec.format == QuantFormat.MXFP8 and self.hidden % 32:
            self.fail(f"MXFP8 needs a hidden_dim that is a multiple of 32, got {self.hidden}")
        if spec.format in (QuantFormat.FP8, QuantFormat.MXFP8):
            return self.rows("quant_out", quant_out, FP8)
        if self.hidden % 16:
            self.fail(f"NVFP4 needs a hidden_dim that is a multiple of 16, got {self.hidden}")
        needed = f"[{self.tokens}, {self.hidden // 2}] uint8"
        codes = self.tensor("quant_out", quant_out, None, needed)
        size = self.tokens * self.hidden // 2
        if codes.numel() * codes.itemsize != size:
            self.fail(
                f"quant_out must hold {size} bytes, such as {needed} (any element type), got {list(codes.shape)} "
                f"{_name(codes.dtype)}"
            )
        return codes.view(-1).view(torch.uint8).view(self.tokens, self.hidden // 2)

    def _scale(
        self, name: str, value: Any, spec: QuantSpec, default: float | None
    ) -> tuple[torch.Tensor | None, float]:
        what = "the dequantisation scale" if spec.is_static else "NVFP4's global encode scale 448 * 6 / amax"
        if value is None and default is not None:
            return None, default
        if isinstance(value, torch.Tensor):
            tensor = self.tensor(name, value, (*INPUT_DTYPES, torch.float64), "of one element")
            if tensor.numel() != 1:
                self.fail(f"{name} must have one element ({what}), got shape {list(value.shape)}")
            return (tensor.float() if tensor.dtype == torch.float64 else tensor), 1.0
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            self.fail(f"{name} is needed ({what}), a float or a tensor of one element, got {value!r}")
        number = real(self.api, name, value)
        if not _FP32_ZERO < number < math.inf:  # comparisons, which a symbolic float of the compiler has too
            self.fail(f"{name} must be positive and finite in fp32 ({what}), got {number}")
        return None, number

    def _scales(self, spec: QuantSpec, scale_out: Any) -> torch.Tensor:
        if spec.format in (QuantFormat.NVFP4, QuantFormat.MXFP8):
            return self._block_scales(spec, scale_out)
        if spec.layout == ScaleLayout.PACKED_UE8M0:
            return self._packed_scales(spec, scale_out)
        scales = self.tensor("scale_out", scale_out, (torch.float32,), f"[{self.tokens}, 1]")
        if tuple(scales.shape) not in ((self.tokens, 1), (self.tokens,)):
            self.fail(f"scale_out must be [token_num, 1] = [{self.tokens}, 1], got {list(scales.shape)}")
        return scales

    def _block_scales(self, spec: QuantSpec, scale_out: Any) -> torch.Tensor:
        """1-byte scales: any tensor with enough bytes; what follows the layout's own size is left alone."""
        allocation = layouts.scale_allocation(self.tokens, self.hidden, spec)
        assert allocation is not None
        size = math.prod(allocation[0])
        needed = (
            f"of at least {size} bytes, such as {list(allocation[0])} {_name(allocation[1])} for {spec.layout.name}"
        )
        scales = self.tensor("scale_out", scale_out, None, needed)
        if scales.numel() * scales.itemsize < size:
            self.fail(f"scale_out must be {needed}, got {list(scales.shape)} {_name(scales.dtype)}")
        return scales.view(-1).view(torch.uint8)[:size].view(allocation[0])

    def _packed_scales(self, spec: QuantSpec, scale_out: Any) -> torch.Tensor:
        words, rows = int(layouts.column_count(self.hidden, spec)), int(layouts.round_up(self.tokens, 4))
        needed = f"int32 [{self.tokens}, {words}] with strides (1, {rows})"
        if not isinstance(scale_out, torch.Tensor):
            self.fail(f"scale_out is needed, a tensor {needed}, got {scale_out!r}")
        if scale_out.device != self.device:
            self.fail(f"scale_out must be on {self.device} as the input is, got {scale_out.device}")
        need_dense(self.api, "scale_out", scale_out)
        right = scale_out.dtype == torch.int32 and tuple(scale_out.shape) == (self.tokens, words)
        if right and scale_out.numel():
            right = (self.tokens == 1 or scale_out.stride(0) == 1) and (words == 1 or scale_out.stride(1) == rows)
        if not right:
            self.fail(
                f"scale_out must be {needed}, got {_name(scale_out.dtype)} {list(scale_out.shape)} with strides "
                f"{tuple(scale_out.stride())}"
            )
        return scale_out

    def group_size(self, value: Any) -> int:
        """``block_quant_group_size``, of a size that the kernels take: the same on every device."""
        vector = 16 // self.dtype.itemsize
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(f"block_quant_group_size is needed, a positive integer, got {value!r}")
        if self.hidden % value:
            self.fail(f"hidden_dim={self.hidden} is no multiple of block_quant_group_size={value}")
        if value & (value - 1) or not vector <= value <= 32 * vector:
            self.fail(
                f"block_quant_group_size must be a power of two from {vector} to {32 * vector} for "
                f"{_name(self.dtype)}, got {value}"
            )
        return value

    def launch(
        self,
        op: str,
        inputs: tuple[Any, ...],
        *,
        residual: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        epsilon: float = 1e-6,
        weight_bias: float = 0.0,
        flags: int = 0,
        quantised: Quantised | None = None,
        **outputs: torch.Tensor | None,
    ) -> None:
        """Run ``arfusion::op``; an fp32 residual beside a 16-bit ``T`` is added without rounding."""
        workspace = self.workspace
        quantised = quantised or NOT_QUANTISED
        if residual is not None and residual.dtype != self.dtype:
            flags |= _UNROUNDED_SUM
        _OPS[op](
            *inputs,
            residual,
            weight,
            quantised.scale,
            workspace.group_name,
            real(self.api, "the epsilon", epsilon),
            real(self.api, "weight_bias", weight_bias),
            flags | workspace.flags,
            quantised.spec.pack() if torch.compiler.is_compiling() else _packed(quantised.spec),
            quantised.spec.bound,
            quantised.scale_value,
            quant_out=quantised.codes,
            scale_out=quantised.scales,
            **outputs,
        )


def open_workspace(api: str, workspace: Any, name: str = "workspace") -> AllReduceFusionWorkspace:
    """``workspace`` as ours, alive."""
    if not isinstance(workspace, AllReduceFusionWorkspace):
        raise ValueError(
            f"{api}: {name} must be an AllReduceFusionWorkspace made by "
            f"arfusion_pass.comm.create_allreduce_fusion_workspace, got {type(workspace).__name__}"
        )
    workspace.require_alive(api)
    return workspace


def input_shape(api: str, name: str, value: Any) -> tuple[int, int]:
    """(tokens, hidden) of an input ``[..., hidden]`` with at least two dimensions, contiguous."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{api}: {name} is needed, a tensor [token_num, hidden_dim], got {value!r}")
    need_dense(api, name, value)
    if value.dim() < 2:
        raise ValueError(f"{api}: {name} must be [token_num, hidden_dim], got {list(value.shape)}")
    need_contiguous(api, name, value)
    return math.prod(value.shape[:-1]), value.shape[-1]


def need_dense(api: str, name: str, value: torch.Tensor) -> None:
    """``ValueError`` where ``value`` is no plain memory: a sparse or a nested tensor. A quantised one has no dtype that
    is taken."""
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else value.layout
        raise ValueError(f"{api}: {name} must be a dense tensor, got {kind} {value.dtype}")


def need_contiguous(api: str, name: str, value: torch.Tensor) -> None:
    """``ValueError`` where ``value`` is not contiguous."""
    need_dense(api, name, value)
    if not value.is_contiguous():
        raise ValueError(
            f"{api}: {name} must be contiguous, got shape {list(value.shape)} strides {list(value.stride())}"
        )


def truth(api: str, name: str, value: Any) -> bool:
    """``value`` as True or False; ``ValueError`` for a tensor, whose truth may be undefined, or cost a wait."""
    if isinstance(value, torch.Tensor):
        raise ValueError(f"{api}: {name} must be True or False, got a tensor {list(value.shape)}")
    return bool(value)


def launch_flags(
    api: str, use_oneshot: bool | None, launch_with_pdl: bool, trigger_completion_at_end: bool = True
) -> int:
    """FlashInfer's control arguments as flags of a fused op."""
    use_oneshot = use_oneshot if use_oneshot is None else truth(api, "use_oneshot", use_oneshot)
    launch_with_pdl = truth(api, "launch_with_pdl", launch_with_pdl)
    trigger_completion_at_end = truth(api, "trigger_completion_at_end", trigger_completion_at_end)
    flags = 0 if use_oneshot is None else _ONESHOT if use_oneshot else _TWOSHOT
    if not launch_with_pdl:
        return flags | _NO_PDL
    return flags if trigger_completion_at_end else flags | _TRIGGER_EARLY


def real(api: str, name: str, value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{api}: {name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{api}: {name} must be finite in fp32, got an integer of {len(str(value))} digits") from None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
