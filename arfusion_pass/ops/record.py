"""The hook by which a recorder sees a fused call's real arguments at run time (``Flags.RECORD``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arfusion_pass.ops.spec import Flags

SITE_SHIFT = 32
"""A recorded call's site number stands in the bits from this one up."""

Observer = Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], None]
_observers: dict[int, Observer] = {}
_next_site = 0


def add_observer(observer: Observer) -> int:
    """Register an observer; gives the flags to add to the call that it shall see."""
    global _next_site
    _next_site += 1
    _observers[_next_site] = observer
    return int(Flags.RECORD) | _next_site << SITE_SHIFT


def strip(flags: int) -> int:
    """``flags`` without the recorder's bits."""
    return flags & ((1 << SITE_SHIFT) - 1) & ~int(Flags.RECORD)


def observe(arguments: dict[str, Any], run: Callable[[dict[str, Any]], None]) -> None:
    """Run a recorded call under its observer (a call whose recorder is gone just runs)."""
    observer = _observers.get(arguments["flags"] >> SITE_SHIFT)
    plain = {**arguments, "flags": strip(arguments["flags"])}
    if observer is None:
        run(plain)
    else:
        observer(plain, run)
