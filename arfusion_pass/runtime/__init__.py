"""What runs a fused op: the kernel library, its workspaces, and the backends beside it.

Importing this package hands the op library its dispatcher, and the kernel library its maker of workspaces. Nothing is
built, loaded or allocated before the first call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arfusion_pass.ops import library, marks
from arfusion_pass.runtime import native


def _dispatch(op: str, arguments: dict[str, Any]) -> bool:
    from arfusion_pass.runtime import dispatch

    return dispatch.dispatch(op, arguments)


def _agree(group: str, mark: int, reduced: Callable[[], str]) -> None:
    from arfusion_pass.runtime import one_graph

    one_graph.agree(group, mark, reduced)


def _compiled(group: str, mark: int, steps: tuple[marks.Step, ...]) -> None:
    from arfusion_pass.runtime import one_graph

    one_graph.publish_missed(group, steps)


def _make_workspace(group: str, device: int, tokens: int, hidden: int, dtype: int) -> object:
    from arfusion_pass.runtime import workspace

    return workspace.on_first_use(group, device, tokens, hidden, dtype)


library.set_dispatcher(_dispatch)
marks.set_runtime(_agree, _compiled)
native.set_workspace_maker(_make_workspace)
