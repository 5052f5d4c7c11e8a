"""Compiled with the pass's options, twice the same layer in a module each, and the report printed."""

import json
import os
import sys

import torch
from model import Model, Tensor, join, plain, tokens

import arfusion_pass as arf


class Unfused(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return plain(None, x * 2) @ x.t()


join()
fused, unfused = Model(plain), Unfused()
with torch.no_grad():
    for model in (fused, unfused):
        torch.compile(model, options=arf.inductor_options())(tokens())
if "--json" in sys.argv:
    print(json.dumps([report.to_dict() for report in arf.reports()]))
else:
    print(arf.reports(), flush=True)
if "TORCH_TRACE" in os.environ:
    torch._logging._internal.trace_log.handlers[0].flush()
