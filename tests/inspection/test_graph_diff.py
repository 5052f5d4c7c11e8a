"""Printed graphs and their differences."""

from __future__ import annotations

import re

import pytest
import torch
from torch import fx

from arfusion_pass.inspection.graph_diff import graph_diff, op_counts, op_table, print_graph, unified

BEFORE = """\
  %arg0_1 [placehold] arg0_1()  -> bfloat16[8,64]  users=1
  %all_reduce [call_func] _c10d_functional.all_reduce.default(arg0_1, sum, 0)  -> bfloat16[8,64]  users=1
  %wait_tensor [call_func] _c10d_functional.wait_tensor.default(all_reduce)  -> bfloat16[8,64]  users=1
  %neg [call_func] aten.neg.default(wait_tensor)  -> bfloat16[8,64]  users=1
  return (neg,)
"""
AFTER = """\
  %arg0_1 [placehold] arg0_1()  -> bfloat16[8,64]  users=2
  %auto_functionalized [call_func] auto_functionalized(arfusion.f.default, x=arg0_1)  -> (None, bfloat16[8,64])  users=1
  %getitem [call_func] getitem(auto_functionalized, 1)  -> bfloat16[8,64]  users=1
  %neg [call_func] aten.neg.default(getitem)  -> bfloat16[8,64]  users=1
  return (neg,)
"""


def example_graph() -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(8, 64, dtype=torch.bfloat16)
    total = graph.call_function(torch.ops.aten.sum.dim_IntList, (x, [-1]), {"keepdim": True})
    total.meta["val"] = torch.empty(8, 1, dtype=torch.bfloat16)
    cast = graph.call_function(torch.ops.aten._to_copy.default, (total,), {"dtype": torch.float32})
    cast.meta["val"] = (torch.empty(8, 1), None)
    graph.output((cast, None))
    return graph


def test_printed_nodes() -> None:
    assert print_graph(example_graph()).splitlines() == [
        "  %x [placehold] x()  -> bfloat16[8,64]  users=1",
        "  %sum_dim_int_list [call_func] aten.sum.dim_IntList(x, [-1], keepdim=True)  -> bfloat16[8,1]  users=1",
        "  %_to_copy_default [call_func] aten._to_copy.default(sum_dim_int_list, dtype=torch.float32)"
        "  -> (float32[8,1], None)  users=1",
        "  return (_to_copy_default, None)",
    ]


def test_the_same_graph_prints_the_same_and_without_addresses() -> None:
    class Opaque:
        """Its repr holds an address."""

    graph = example_graph()
    node = graph.placeholder("opaque")
    node.meta["val"] = Opaque()
    text = print_graph(graph)
    assert text == print_graph(graph)
    assert not re.search("0x[0-9a-f]+", text)
    assert "Opaque" in text


def test_symbolic_sizes_are_named() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    module = torch.export.export(
        _Module(double), (torch.ones(4, 8),), dynamic_shapes={"x": {0: torch.export.Dim("tokens")}}
    ).graph_module
    assert re.search(r"aten\.mul\.Tensor\(x, 2\)  -> float32\[[a-z]\w*,8\]", print_graph(module.graph))


class _Module(torch.nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)  # type: ignore[operator]


def test_counts_look_through_auto_functionalized_and_skip_getitem() -> None:
    assert op_counts(AFTER) == {"arfusion.f.default": 1, "aten.neg.default": 1}


def test_table_lists_only_what_changed() -> None:
    table = op_table(BEFORE, AFTER)
    assert [line.split() for line in table.splitlines()] == [
        ["op", "before", "after", "change"],
        ["_c10d_functional.all_reduce.default", "1", "0", "-1"],
        ["_c10d_functional.wait_tensor.default", "1", "0", "-1"],
        ["arfusion.f.default", "0", "1", "+1"],
        ["all", "calls", "3", "2", "-1"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_unified_diff_ignores_user_counts() -> None:
    lines = unified(BEFORE, AFTER, context=1).splitlines()
    assert lines[0] == "@@ -1,5 +1,5 @@"
    assert [line[:6] for line in lines if line[0] == "-"] == ["-  %al", "-  %wa", "-  %ne"]
    assert [line[:6] for line in lines if line[0] == "+"] == ["+  %au", "+  %ge", "+  %ne"]
    assert lines[1] == " " + AFTER.splitlines()[0]


def test_distant_changes_are_separate_hunks() -> None:
    middle = "".join(f"  %n{i} [call_func] aten.neg.default(x)  -> float32[1]  users=1\n" for i in range(20))
    old, new = f"  first\n{middle}  last\n", f"  FIRST\n{middle}  LAST\n"
    assert unified(old, new).count("@@ -") == 2


@pytest.mark.parametrize("text", ["", BEFORE])
def test_no_change_is_said(text: str) -> None:
    assert graph_diff(text, text) == "no change\n"
    assert unified(text, text) == ""
