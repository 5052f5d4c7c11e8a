"""The process groups of vLLM and SGLang by the names that their all-reduces carry (``"tp:0"``).

Both engines keep a table ``parallel_state._groups`` of name to a weak reference of a coordinator with ``world_size``
and ``device_group``.
"""

from __future__ import annotations

import sys

import torch.distributed as dist


def coordinators(module: str) -> dict[str, dist.ProcessGroup]:
    """Every group of more than one rank in the table of ``module``, an engine's ``parallel_state``.

    Groups that are gone are left out; of a module that was not imported yet there are none.
    """
    groups = {}
    for name, reference in list(getattr(sys.modules.get(module), "_groups", {}).items()):
        coordinator = reference()
        group = getattr(coordinator, "device_group", None)
        if group is not None and getattr(coordinator, "world_size", 1) > 1:
            groups[name] = group
    return groups
