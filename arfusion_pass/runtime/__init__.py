"""What runs a fused op: the kernel library, its workspaces, and the backends beside it.

Importing this package hands the op library its dispatcher, and the kernel library its maker of workspaces. Nothing is
built, loaded or allocated before the first call.
"""

from __future__ import annotations

from typing import Any

from arfusion_pass.ops import library
from arfusion_pass.runtime import native


def _dispatch(op: str, arguments: dict[str, Any]) -> bool:
    from arfusion_pass.runtime import dispatch

    return dispatch.dispatch(op, arguments)


def _make_workspace(group: str, device: int, tokens: int, hidden: int, dtype: int) -> object:
    from arfusion_pass.runtime import workspace

    return workspace.on_first_use(group, device, tokens, hidden, dtype)


library.set_dispatcher(_dispatch)
native.set_workspace_maker(_make_workspace)
