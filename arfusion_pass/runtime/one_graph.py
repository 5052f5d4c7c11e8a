"""Whether all ranks of a group run one graph: their marks (:mod:`arfusion_pass.ops.marks`), compared at first use.

Where one rank's site was fused and another's was not, the one would exchange in a fused kernel and the other in an
all-reduce, each waiting for the other until a timeout. So the first call of every mark compares it over the group,
through the group's store: nothing on the device, nothing in a replayed CUDA graph, and for later calls a look into a
set. What the ranks have in common is the order of a group's fused and missed all-reduces, and what the first call of a
mark reduces: all are at the same call of the group then. What is fused around them, where a graph ends, and, unless
owners send them, which outputs are written, may differ.

A rank that stands in an all-reduce which it missed does not come here before the timeout: what its pass missed it
leaves in the store, for the warning and the error of those that wait for it. That a rank missed something is no proof
that it will not come, so nobody stops waiting for it: it may be compiling still, the note may be of an earlier graph,
a cache hit leaves none, and an engine compiles all pieces before it runs the first. Nor do torch's sequence numbers
prove that it went past: sends and receives of a group count in them, on two of its ranks only.
``ARFUSION_AGREEMENT=0``, on all ranks, switches the comparison off.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from arfusion_pass.config import switch
from arfusion_pass.groups import find_group, resolve_group
from arfusion_pass.ops import marks
from arfusion_pass.ops.marks import Step
from arfusion_pass.runtime import agreement

log = logging.getLogger("arfusion_pass")


class _Compared:
    """What a group's ranks have compared so far."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # one a group: a thread that waits for one must not hold up another
        self.problems: dict[int, str | None] = {}
        self.over = False


_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, _Compared] = weakref.WeakKeyDictionary()


def agree(name: str, mark: int, reduced: Callable[[], str]) -> None:
    """Compare ``mark``, and what is ``reduced``, with the other ranks' at its first call in group ``name``. Collective
    then.

    Raises:
        RuntimeError: the ranks' graphs do not fit together, or their first calls reduce other shapes: on every rank
            that came. Or a rank did not come within the group's timeout. Says which ranks, which all-reduces, and why
            those were missed.
    """
    group = resolve_group(name)
    compared = _groups.get(group)
    if compared is not None and compared.problems.get(mark, "") is None:
        return
    if group.size() == 1 or is_fake(group) or not switch("ARFUSION_AGREEMENT", True):
        return
    compared = _groups.setdefault(group, _Compared())
    with compared.lock:
        if mark not in compared.problems:
            compared.problems[mark] = None if compared.over else _compare(name, group, compared, mark, reduced())
        problem = compared.problems[mark]
    if problem is not None:
        raise RuntimeError(problem)


def publish_missed(name: str, steps: tuple[Step, ...]) -> None:
    """A graph was compiled: where an all-reduce of the group's was missed in it, leave a note for those that wait."""
    missed = "; ".join(step.text for step in steps if not step.fused)
    if not missed or not dist.is_available() or not dist.is_initialized():
        return
    group = find_group(name)
    if group is None or group.size() == 1 or is_fake(group):
        return
    try:
        dist.distributed_c10d._get_process_group_store(group).set(_note(name, group.rank()), missed)
    except Exception as error:  # the note only explains an error of others: never a reason to fail a compilation
        log.debug("arfusion: what was missed could not be left in the store of group %r: %s", name, error)


def is_fake(group: dist.ProcessGroup) -> bool:
    """Whether ``group`` is torch's fake process group, whose other ranks do not exist."""
    try:
        return dist.get_backend(group) == "fake"
    except (RuntimeError, ValueError, KeyError):
        return False


def _note(name: str, rank: int) -> str:
    return f"arfusion/{name}/missed/{rank}"


def _compare(name: str, group: dist.ProcessGroup, compared: _Compared, mark: int, reduced: str) -> str | None:
    """The sentence that all ranks raise, or None."""
    steps = marks.steps_of(mark)
    mine: dict[str, Any] = {"mark": mark, "steps": None, "reduced": reduced}
    if steps is not None:
        mine["steps"] = [[step.key, step.text] for step in steps]
    try:
        everyone = agreement.exchange(
            group,
            f"{name}/graph",
            mine,
            doing="comparing what the pass fused",
            why_absent=lambda rank: _why_absent(name, group, rank),
        )
    except agreement.NoAnswerError as error:
        return str(error)
    if all(other["mark"] == mark for other in everyone):
        return other_shapes(name, [other["reduced"] for other in everyone])
    problem = difference([other["steps"] for other in everyone])
    if problem is not None:
        return f"arfusion: the ranks of group {name!r} do not run one graph: {problem}"
    compared.over = True
    if group.rank() == 0:
        log.warning(
            "arfusion: the ranks of group %r end their graphs in different places; from here on it is not compared "
            "whether they fuse alike",
            name,
        )
    return None


def other_shapes(name: str, everyone: list[str]) -> str | None:
    """The sentence on ranks whose first calls of a graph do not reduce the same, given by rank; None where they do."""
    ranks: dict[str, list[str]] = {}
    for rank, reduced in enumerate(everyone):
        ranks.setdefault(reduced, []).append(str(rank))
    if len(ranks) == 1:
        return None
    listed = "; ".join(f"rank {', '.join(those)}: {reduced}" for reduced, those in ranks.items())
    return (
        f"arfusion: the ranks of group {name!r} do not make the same calls: the first of a graph reduces {listed}. All "
        "ranks have to call a group in one order, with the same shapes"
    )


def difference(everyone: list[list[list[str]] | None]) -> str | None:
    """What stands against it that these ranks' graphs run together, or None where none contradicts another.

    Args:
        everyone: by rank, ``[key, text]`` of each all-reduce in order; None where the graph came from a cache.
    """
    unknown = [rank for rank, steps in enumerate(everyone) if steps is None]
    if unknown:
        ranks = ", ".join(map(str, unknown))
        return (
            f"they differ, and rank {ranks} loaded its graph from Inductor's cache, which does not say how. Run all "
            "ranks with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 to see it"
        )
    for position, row in enumerate(itertools.zip_longest(*(steps or [] for steps in everyone))):
        there = {rank: step for rank, step in enumerate(row) if step is not None}
        if len({step[0] for step in there.values()}) > 1:
            texts = "; ".join(f"rank {rank}: {key}, {text}" for rank, (key, text) in there.items())
            return f"all-reduce {position + 1} of the graph is not the same on all of them ({texts})"
    return None


def _why_absent(name: str, group: dist.ProcessGroup, rank: int) -> str:
    """What the rank that did not come said when it compiled."""
    key = _note(name, rank)
    try:
        store = dist.distributed_c10d._get_process_group_store(group)
        note = store.get(key).decode() if store.check([key]) else None
    except Exception:  # the store may be gone with the rank that kept it
        note = None
    if note is not None:
        return f". It has compiled a graph in which it left alone {note}"
    return ". All ranks have to run one graph, with the pass on, and to come to it within the group's timeout"
