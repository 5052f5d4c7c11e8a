"""The process groups of vLLM and SGLang by the names that their all-reduces carry (``"tp:0"``).

Both engines keep a table ``parallel_state._groups`` of name to a weak reference of a coordinator with ``world_size``
and ``device_group``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist

from arfusion_pass.compilation import known


def coordinators(module: str) -> dict[str, dist.ProcessGroup]:
    """Every group of more than one rank in the table of ``module``, an engine's ``parallel_state``.

    Groups that are gone are left out; of a module that was not imported yet, or keeps another table, there are none.
    """
    return known(lambda: _groups(getattr(sys.modules.get(module), "_groups", {}))) or {}


def _groups(table: Any) -> dict[str, dist.ProcessGroup]:
    groups = {}
    for name, reference in list(table.items()):
        coordinator = reference()
        group = getattr(coordinator, "device_group", None)
        if isinstance(group, dist.ProcessGroup) and getattr(coordinator, "world_size", 1) > 1:
            groups[name] = group
    return groups
