"""The mark that a graph's fused calls carry: what the pass made of the all-reduces of one group, as 31 bits.

Ranks that run one program have one mark. It stands in the upper bits of ``flags``, so it is stored with a compiled
artefact, and what runs the ops compares it over the group at a mark's first call, with what that call reduces
(:mod:`arfusion_pass.runtime.one_graph`)::

    mark = mark_of([Step(True, "bfloat16 [.., 4096]", "all_reduce ..."), Step(False, "", "all_reduce_1: ... reads it")])
    remember("tp:0", mark, steps)          # this process knows what stands behind the mark
    flags |= mark << MARK_SHIFT

A recorded call (:mod:`arfusion_pass.ops.record`) has its site's number in the same bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

from arfusion_pass.ops.spec import Flags

MARK_SHIFT = 32
_BITS = 31  # of an int64 whose sign stays 0


@dataclasses.dataclass(frozen=True)
class Step:
    """One all-reduce of a graph.

    Args:
        fused: whether a fused op performs it.
        message: what the ranks send one another, the same on all of them; "" where it is not fused.
        text: the all-reduce, and the reason where it was missed, for a reader.
    """

    fused: bool
    message: str
    text: str

    @property
    def key(self) -> str:
        """What all ranks have in common."""
        return f"fused {self.message}" if self.fused else "missed"


Listener = Callable[[str, int, "tuple[Step, ...]"], None]
Agree = Callable[[str, int, Callable[[], str]], None]

_known: dict[int, tuple[Step, ...]] = {}
_listener: Listener | None = None
_agree: Agree | None = None


def mark_of(steps: Sequence[Step]) -> int:
    """31 bits that stand for ``steps``, never 0."""
    digest = hashlib.sha256("\n".join(step.key for step in steps).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> (32 - _BITS) or 1


def remember(group: str, mark: int, steps: Sequence[Step]) -> None:
    """Keep what stands behind a mark (0: a graph in which nothing of the group's was fused)."""
    if mark:
        _known[mark] = tuple(steps)
    if _listener is not None:
        _listener(group, mark, tuple(steps))


def steps_of(mark: int) -> tuple[Step, ...] | None:
    """What stands behind a mark; None where another process compiled the graph."""
    return _known.get(mark)


def mark_in(flags: int) -> int:
    """The mark in a call's ``flags``; 0 for an eager call, and for a recorded one."""
    return 0 if flags & Flags.RECORD else flags >> MARK_SHIFT


def without_mark(flags: int) -> int:
    """``flags`` without a mark or a site's number."""
    return flags & ((1 << MARK_SHIFT) - 1)


def set_runtime(agree: Agree, listener: Listener) -> None:
    """Handed down by the runtime when the package is imported.

    Args:
        agree: called with the group's name, the mark and what says what is reduced before a marked call runs; raises
            where the ranks differ.
        listener: called with what :func:`remember` is.
    """
    global _agree, _listener
    _agree, _listener = agree, listener


def first_call(group: str, flags: int, reduced: Callable[[], str]) -> None:
    """Before a call runs: compare its mark over the group, where it has one that was not compared yet, and what is
    ``reduced``."""
    if _agree is not None and group and (mark := mark_in(flags)):
        _agree(group, mark, reduced)
