"""A tensor-parallel linear layer in FP8 with static scales, as serving engines run quantised checkpoints. Eagerly::

    codes = (x.float() / input_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    y = torch._scaled_mm(codes, weight.t(), input_scale, weight_scale, out_dtype=x.dtype, use_fast_accum=True)
    y = all_reduce(y)                  # where the layer is split by rows (by its inputs)

Weights are random. All layers of a model have one input scale, so that the layers behind one norm quantise it once.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

FP8 = torch.float8_e4m3fn
MOST = torch.finfo(FP8).max
LARGEST_INPUT = 16.0
"""What an input's scale is calibrated to: with random weights no activation comes near it, and e4m3 is a float."""
LARGEST_WEIGHT = 6.0
"""Standard deviations of a weight that its scale covers."""


class Fp8Linear(torch.nn.Module):
    """A rank's share ``[outputs, inputs]`` of a layer.

    Args:
        inputs, outputs: of the share, each a multiple of 16.
        std: of the weight's elements.
        group: whose ranks' products are summed, of a layer split by rows; None: split by columns.
    """

    def __init__(self, inputs: int, outputs: int, std: float, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.std, self.group = std, group
        self.register_buffer("weight", torch.empty(outputs, inputs, dtype=FP8))
        self.register_buffer("weight_scale", torch.empty(()))
        self.register_buffer("input_scale", torch.empty(()))

    def fill(self, input_scale: torch.Tensor) -> None:
        """Random weights; ``input_scale``, a float32 without dimensions, is shared with other layers."""
        values = torch.randn(self.weight.shape, dtype=torch.bfloat16, device=self.weight.device)
        self.weight.copy_((values * (MOST / LARGEST_WEIGHT)).clamp(-MOST, MOST))
        self.weight_scale.fill_(self.std * LARGEST_WEIGHT / MOST)
        self.input_scale = input_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., inputs]`` in bf16 to ``[..., outputs]`` in bf16."""
        rows = x.reshape(-1, x.shape[-1])
        codes = (rows.float() / self.input_scale).clamp(-MOST, MOST).to(FP8)
        y = torch._scaled_mm(
            codes, self.weight.t(), self.input_scale, self.weight_scale, out_dtype=x.dtype, use_fast_accum=True
        )
        if self.group is not None:
            y = funcol.all_reduce(y, "sum", self.group)
        return y.view(*x.shape[:-1], y.shape[-1])


def share_out(layer: torch.nn.Module, by_rows: dict[str, bool], group: dist.ProcessGroup) -> None:
    """Put a rank's FP8 share in place of each linear layer, which has no memory yet; ``by_rows``: by its name, whether
    it is split by rows."""
    world = group.size()
    for path, module in list(layer.named_modules()):
        if isinstance(module, torch.nn.Linear):
            inputs, outputs, std = module.in_features, module.out_features, module.in_features**-0.5
            with torch.device("meta"):
                if by_rows[path.split(".")[-1]]:
                    share = Fp8Linear(inputs // world, outputs, std, group)
                else:
                    share = Fp8Linear(inputs, outputs // world, std)
            layer.set_submodule(path, share)


def fill(model: torch.nn.Module, device: torch.device) -> None:
    """Give every :class:`Fp8Linear` of ``model`` its random weights and the one input scale."""
    input_scale = torch.full((), LARGEST_INPUT / MOST, device=device)
    for module in model.modules():
        if isinstance(module, Fp8Linear):
            module.fill(input_scale)
