"""Process groups by name: the strings that functional collectives, engines and the fused ops carry.

``register_group``'s table comes first, then what the sources know (an engine's own names, such as vLLM's ``"tp:0"``),
then c10d's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.distributed as dist

Source = Callable[[], Mapping[str, dist.ProcessGroup]]

_registered: dict[str, dist.ProcessGroup] = {}
_private: dict[str, dist.ProcessGroup] = {}
_sources: list[Source] = []


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


def add_source(source: Source) -> None:
    """Ask ``source`` for its groups whenever a name is looked up; adding it again changes nothing.

    For names whose groups come and go: an artefact from an engine's cache may be the first to need a group, long before
    anything of ours is called, and an engine may be made again in a process. ``source`` must be cheap and never raise.
    """
    if source not in _sources:
        _sources.append(source)


def registered_groups() -> dict[str, dist.ProcessGroup]:
    """Every group under an engine's own name: what the sources know now, then ``register_group``'s table."""
    known: dict[str, dist.ProcessGroup] = {}
    for source in reversed(_sources):
        known.update(source())
    return {**known, **_registered}


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
    if (group := registered_groups().get(name) or _private.get(name)) is not None:
        return group
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
        known = ", ".join(sorted(registered_groups())) or "none registered"
        state = "initialised" if dist.is_available() and dist.is_initialized() else "not initialised"
        raise ValueError(
            f"no process group is called {name!r} (torch.distributed is {state}; registered names: {known}). "
            "Initialise torch.distributed, or call arfusion_pass.register_group(name, group) for an engine's own name."
        )
    return group
