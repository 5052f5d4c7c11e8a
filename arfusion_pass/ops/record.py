"""The hook by which a recorder sees a fused call's real arguments at run time (``Flags.RECORD``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arfusion_pass.ops.marks import MARK_SHIFT, mark_in, without_mark
from arfusion_pass.ops.spec import Flags

Observer = Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], None]
_observers: dict[int, tuple[Observer | None, int]] = {}
_next_site = 0


def observed(flags: int, observer: Observer) -> int:
    """``flags`` of the call that ``observer`` shall see; its mark gives way to the site's number, and comes back."""
    global _next_site
    _next_site += 1
    _observers[_next_site] = (observer, mark_in(flags))
    return without_mark(flags) | int(Flags.RECORD) | _next_site << MARK_SHIFT


def forget(flags: int) -> None:
    """Let the recorded call with these ``flags`` run unobserved from now on, whatever it keeps alive."""
    site = flags >> MARK_SHIFT
    _observers[site] = (None, _observers[site][1])


def strip(flags: int) -> int:
    """``flags`` without the recorder's bits, and without a mark."""
    return without_mark(flags) & ~int(Flags.RECORD)


def observe(arguments: dict[str, Any], run: Callable[[dict[str, Any]], None]) -> None:
    """Run a recorded call under its observer (a call whose recording has ended just runs)."""
    observer, mark = _observers.get(arguments["flags"] >> MARK_SHIFT, (None, 0))
    plain = {**arguments, "flags": strip(arguments["flags"]) | mark << MARK_SHIFT}
    if observer is None:
        run(plain)
    else:
        observer(plain, run)
