"""``torch.distributed._functional_collectives``: what plain torch, DTensor and ``tp_plan`` models compile to.

    %all_reduce  = _c10d_functional.all_reduce.default(%x, "sum", "0")
    %wait_tensor = _c10d_functional.wait_tensor.default(%all_reduce)

``dist.all_reduce`` under Dynamo gives the same two nodes.
"""

from __future__ import annotations

import torch
import torch.distributed._functional_collectives
from torch import fx

from arfusion_pass.dialects.reading.base import Dialect, Reduced, Refused
from arfusion_pass.graph import argument, describe, is_call, users_of

c10d = torch.ops._c10d_functional


class FunctionalCollectives(Dialect):
    """``_c10d_functional``'s all-reduce and its wait."""

    name = "functional_collectives"

    def all_reduce(self, node: fx.Node) -> Reduced | Refused | None:
        """The all-reduce with its one wait; other reduce ops and the in-place and coalesced forms are refused."""
        if is_call(node, c10d.all_reduce_.default):
            return Refused(
                f"{node.name} reduces in place: the pass runs after Inductor's reinplacing here; install it as "
                "post_grad_custom_post_pass",
                node,
            )
        if is_call(node, c10d.all_reduce_coalesced.default, c10d.all_reduce_coalesced_.default):
            return Refused(f"{node.name} reduces several tensors at once (coalesced); reduce them one by one", node)
        if not is_call(node, c10d.all_reduce.default):
            return None
        reduce_op = argument(node, "reduce_op")
        if reduce_op != "sum":
            return Refused(f"{node.name} reduces by {reduce_op!r}; only 'sum' is fused", node)
        waits = users_of(node, c10d.wait_tensor.default)
        others = [user for user in node.users if user not in waits]
        if others:
            return Refused(f"{node.name} is read by {describe(others[0])} before it is waited for", others[0])
        if len(waits) != 1:
            return Refused(f"{node.name} is waited for {len(waits)} times, expected once", node)
        group = argument(node, "group_name")
        x = argument(node, "input")
        if not isinstance(group, str) or not isinstance(x, fx.Node):
            return Refused(f"{node.name} names its group by {group!r}, not by a string", node)
        return Reduced(node=node, value=waits[0], x=x, group=group, nodes=(node, waits[0]))


DIALECT = FunctionalCollectives()
