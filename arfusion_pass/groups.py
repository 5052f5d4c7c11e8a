"""Process groups by name: the strings that functional collectives, engines and the fused ops carry.

``register_group``'s table comes first (an engine's own names, such as vLLM's ``"tp:0"``), then c10d's own.
"""

from __future__ import annotations

import torch.distributed as dist

_registered: dict[str, dist.ProcessGroup] = {}
_private: dict[str, dist.ProcessGroup] = {}


def register_group(name: str, group: dist.ProcessGroup) -> None:
    """Make ``group`` known under ``name``, an engine's own name for it. Registering a name again replaces it.

    Raises:
        ValueError: if ``name`` is empty or ``group`` is no process group.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"register_group: the name must be a non-empty string, got {name!r}")
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"register_group: expected a torch.distributed.ProcessGroup for {name!r}, got {group!r}")
    _registered[name] = group


def registered_groups() -> dict[str, dist.ProcessGroup]:
    """A copy of ``register_group``'s table."""
    return dict(_registered)


def register_private(name: str, group: dist.ProcessGroup) -> None:
    """Make ``group`` known under a name that belongs to one eager workspace: resolvable, but no alias of the group.

    :func:`registered_groups` does not list it, so that preparing the group for compiled graphs leaves it alone.
    """
    _private[name] = group


def forget_private(name: str) -> None:
    """Undo :func:`register_private`; an unknown name is ignored."""
    _private.pop(name, None)


def find_group(name: str) -> dist.ProcessGroup | None:
    """The process group called ``name``, or None."""
    if name in _registered:
        return _registered[name]
    if name in _private:
        return _private[name]
    if not dist.is_available():
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group

    try:
        return _resolve_process_group(name)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, KeyError):
        return None


def resolve_group(name: str) -> dist.ProcessGroup:
    """The process group called ``name``.

    Raises:
        ValueError: if there is none, naming the groups that are known.
    """
    group = find_group(name)
    if group is None:
        known = ", ".join(sorted(_registered)) or "none registered"
        state = "initialised" if dist.is_available() and dist.is_initialized() else "not initialised"
        raise ValueError(
            f"no process group is called {name!r} (torch.distributed is {state}; registered names: {known}). "
            "Initialise torch.distributed, or call arfusion_pass.register_group(name, group) for an engine's own name."
        )
    return group
