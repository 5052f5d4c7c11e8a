"""Where a node comes from: frames of a recorded traceback, the frame that is the user's, the path of a module."""

from __future__ import annotations

import logging
import os
import sysconfig

import pytest
import torch
from torch import fx

import arfusion_pass
from arfusion_pass.graph import describe
from arfusion_pass.source import Source, frames, line_of, module_of, users_frame

TORCH = os.path.join(os.path.dirname(torch.__file__), "distributed", "_functional_collectives.py")
PATHS = (("demo", "model.py"), ("comm", "api.py"))
TRACE = f"""\
  File "/home/me/serve.py", line 21, in forward
    x, r = layer(x, r)
           ^^^^^^^^^^^
  File "/home/me/model.py", line 10, in forward
    dist.all_reduce(y)
  File "{TORCH}", line 179, in all_reduce
    tensor = torch.ops._c10d_functional.all_reduce(
             ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
"""


def node(**meta: object) -> fx.Node:
    graph = fx.Graph()
    made = graph.call_function(torch.ops.aten.add.Tensor, (graph.placeholder("x"), 1))
    made.meta.update(meta)
    return made


def test_the_users_frame_is_the_innermost_that_is_no_plumbing() -> None:
    assert [frame.line for frame in frames(TRACE)] == [21, 10, 179]
    assert line_of(node(stack_trace=TRACE)) == Source("/home/me/model.py", 10, "dist.all_reduce(y)", "forward")
    hook = f'  File "{TORCH}", line 1, in f\n    pass\n'
    assert users_frame(frames(hook)) == Source(TORCH, 1, "pass", "f"), "nothing but plumbing: the innermost of it"
    called = [Source("/home/me/norm.py", 7, "logging.getLogger(name)"), Source(logging.__file__, 2155)]
    assert users_frame(called) == called[0], "where Dynamo breaks in Python's own library, its caller is to blame"
    packages = [Source(os.path.join(sysconfig.get_paths()["purelib"], "somebodys", "model.py"), 1)]
    assert users_frame(packages + called[1:]) == packages[0]
    ours = [Source(os.path.join(os.path.dirname(arfusion_pass.__file__), *path), 1) for path in PATHS]
    assert users_frame([*ours, *frames(hook)]) == ours[0], "of this package's files the demo's model alone is a model"


@pytest.mark.parametrize("file", ["distributed/parallel_state.py", "ir/op.py", "model_executor/parameter.py"])
def test_vllms_dispatch_is_nobodys_model(file: str) -> None:
    """A norm of its IR and a product with its weights are the model's or the layer's that calls them."""
    layer = Source("/site-packages/vllm/model_executor/layers/layernorm.py", 3, "return ir.ops.rms_norm(x)")
    assert users_frame([layer, Source(f"/site-packages/vllm/{file}", 1)]) == layer


@pytest.mark.parametrize("trace", [None, "", "no traceback at all", 3, '  File "a.py", line x'])
def test_what_is_no_traceback_gives_nothing(trace: object) -> None:
    assert line_of(node(stack_trace=trace)) is None
    assert line_of(None) is None


def test_a_frame_without_its_line_of_code() -> None:
    trace = '  File "a.py", line 1, in f\n  File "b.py", line 2, in g\n'
    assert frames(trace) == [Source("a.py", 1, "", "f"), Source("b.py", 2, "", "g")]
    assert str(frames(trace)[1]) == "b.py:2"


def test_a_reason_quotes_the_line_and_names_the_node_only_without_one() -> None:
    assert describe(node(stack_trace=TRACE)) == 'model.py:10 "dist.all_reduce(y)" (aten.add.Tensor)'
    assert describe(node()) == "add_tensor (aten.add.Tensor)"
    long = Source("m.py", 3, "x = " + "y + " * 40 + "z")
    assert len(str(long)) < 100
    assert str(long).endswith('..."')


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("L['self'].layers.0.mlp", "layers.0.mlp"),
        ("L['self'].layers[3].mlp", "layers.3.mlp"),
        ("L['self']._modules['layers']._modules['3'].mlp", "layers.3.mlp"),
        ("L['args'][0].model.layers.0", "model.layers.0"),
        ("L['self'].layers[0].mlp.forward.__self__.down_proj", "layers.0.mlp.down_proj"),
        ("L['model']", None),
        ("layers.7.norm", "layers.7.norm"),
    ],
)
def test_the_module_is_the_innermost_ones_path(path: str, module: str | None) -> None:
    stack = {"1": ("L['self']", torch.nn.Module), "2": (path, torch.nn.Linear)}
    assert module_of(node(nn_module_stack=stack)) == module
    assert module_of(node()) is None


def test_an_input_is_known_by_the_nearest_line_that_reads_it() -> None:
    """Behind a cast without a line, so that the inputs of all layers read alike; by its name where no line is near."""
    graph = fx.Graph()
    epsilon = graph.placeholder("arg3_1")
    cast = graph.call_function(torch.ops.prims.convert_element_type.default, (epsilon, torch.float32))
    total = graph.call_function(torch.ops.aten.add.Tensor, (cast, 1))
    assert describe(epsilon) == "arg3_1 (arg3_1)"
    total.meta["stack_trace"] = TRACE
    assert describe(epsilon) == 'the input read by model.py:10 "dist.all_reduce(y)"'
