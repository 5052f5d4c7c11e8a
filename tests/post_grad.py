"""A torch.compile back-end that runs Inductor up to its post-grad passes and then the graph eagerly.

Real graphs (Dynamo, AOTAutograd, Inductor's decompositions and joint-graph passes of the running torch), without the
C++ compilation that takes seconds a case. The pass under test runs where Inductor would call it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, fake_tensor_prop, view_to_reshape
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.virtualized import V

import arfusion_pass as arf


def _inner_compile(module: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    if kwargs.get("is_backward"):
        raise AssertionError("inference only")
    view_to_reshape(module)
    with torch.no_grad():
        fake_mode = fake_tensor_prop(module, list(example_inputs))
    with V.set_fake_mode(fake_mode):
        post_grad_passes(module, is_inference=True)
    module.recompile()

    def run(inputs: list[Any]) -> Any:
        return module(*inputs)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def compiled(fn: Callable[..., Any], fusion: arf.AllReduceFusionPass, dynamic: bool | None = None) -> Callable[..., Any]:
    """``fn`` compiled with ``fusion`` as its post-grad pass."""

    def backend(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        with inductor_config.patch(post_grad_custom_post_pass=fusion):
            return compile_fx(module, list(example_inputs), inner_compile=_inner_compile)

    return functools.partial(_no_grad, torch.compile(fn, backend=backend, dynamic=dynamic))


def _no_grad(fn: Callable[..., Any], *args: Any) -> Any:
    with torch.no_grad():
        return fn(*args)
