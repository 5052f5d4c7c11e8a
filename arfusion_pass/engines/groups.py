"""The process groups of vLLM and SGLang by the names that their all-reduces carry (``"tp:0"``).

Both engines keep a table ``parallel_state._groups`` of name to a weak reference of a coordinator with ``world_size``
and ``device_group``.
"""

from __future__ import annotations

from typing import Any

from arfusion_pass.groups import register_group, registered_groups


def register_coordinators(parallel_state: Any) -> list[str]:
    """Register every group of more than one rank; gives their names. Groups that are gone are left out."""
    names = []
    for name, reference in list(getattr(parallel_state, "_groups", {}).items()):
        coordinator = reference()
        group = getattr(coordinator, "device_group", None)
        if group is None or getattr(coordinator, "world_size", 1) < 2:
            continue
        if registered_groups().get(name) is not group:
            register_group(name, group)
        names.append(name)
    return names
