"""When to use one-shot and when two-shot: a measured table per (architecture, world size, hidden size).

One-shot sends every rank's whole message to every peer in one hop; two-shot sends each byte twice, but only
``2 (W - 1) / W`` of the message a rank, in two hops. Which is faster turns on the message size
``tokens * hidden * itemsize`` and on nothing else that may differ between ranks, so that all ranks choose alike::

    table = load()                                    # ARFUSION_THRESHOLDS, the tuned file, or what is built in
    table.oneshot_max_bytes("sm_90", 4, 4096)         # at most so many bytes: one-shot
    table.sharded_min_bytes("sm_90", 2, 4096)         # from so many on a chain's residual is sharded

What a call writes plays no part in the second, so that all calls of a chain decide alike. ``arfusion bench --tune``
measures both crossovers on the machine it runs on and writes ``thresholds.json`` into the cache folder. The file::

    {"version": 1, "oneshot_max_bytes": {"sm_90": {"4": {"*": 1048576, "7168": 917504}}},
     "sharded_min_bytes": {"sm_90": {"2": {"4096": 4194304}}}, "source": "..."}

Without ``sharded_min_bytes`` the built-in one is used.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arfusion_pass.ops.spec import SHARDED_FLAGS, Flags
from arfusion_pass.runtime.build import BuildError, cache_dir
from arfusion_pass.runtime.files import replace_by_text

ANY_HIDDEN = "*"
VERSION = 1
ALWAYS = 1 << 40
"""A threshold of so many bytes: one-shot at every size."""

NEVER = 1 << 62
"""More than any message."""

# The op library's own table (kBuiltIn in kernels/plan.cu, which says how it was measured); tests/gpu compares the two.
_BUILT_IN: dict[str, dict[str, dict[str, int]]] = {
    ANY_HIDDEN: {
        "2": {ANY_HIDDEN: ALWAYS, "4224": 6 << 20},
        "3": {ANY_HIDDEN: 512 << 10},
        "4": {ANY_HIDDEN: 256 << 10},
        "5": {ANY_HIDDEN: 128 << 10},
        "6": {ANY_HIDDEN: 128 << 10},
        "7": {ANY_HIDDEN: 64 << 10},
        "8": {ANY_HIDDEN: 64 << 10},
    },
}

_MOST_SHARDED = 1024 * 16
"""Bytes of the widest row whose residual a table may have sharded (``keeps_sharded`` in ``kernels/payload.cu``)."""

# kBuiltIn in kernels/payload.cu, which says how it was measured.
_BUILT_IN_SHARDED: dict[str, dict[str, dict[str, int]]] = {ANY_HIDDEN: {"2": {ANY_HIDDEN: NEVER, "2048": 2 << 20}}}

Rows = Mapping[str, Mapping[str, Mapping[str, int]]]


class ThresholdError(ValueError):
    """A threshold file that cannot be read or does not hold what it should."""


@dataclasses.dataclass(frozen=True)
class ThresholdTable:
    """Architecture (``"sm_90"`` or ``"*"``) to world size to hidden size (or ``"*"``) to bytes.

    Args:
        oneshot: the nested mapping, keys as in the file.
        source: where it comes from, for reports.
        sharded: the same for a chain's residual: the message in bytes from which it is sharded.
    """

    oneshot: Rows
    source: str
    sharded: Rows = dataclasses.field(default_factory=dict)

    def oneshot_max_bytes(self, arch: str, world_size: int, hidden: int) -> int:
        """The largest message in bytes for which one-shot is used; 0 where it never is.

        The largest measured hidden size that is not above ``hidden`` stands for it, else the smallest (the op library's
        own rule, ``arf_set_thresholds``); an architecture or world size that was not measured has the built-in one.
        """
        return _row(_found(arch, world_size, self.oneshot, _BUILT_IN), hidden, 0)

    def sharded_min_bytes(self, arch: str, world_size: int, hidden: int) -> int:
        """The smallest message in bytes for which a chain's residual is sharded; :data:`NEVER` where it never is. By
        the same rule."""
        return _row(_found(arch, world_size, self.sharded, _BUILT_IN_SHARDED), hidden, NEVER)

    def strategies(
        self, arch: str, world_size: int, hidden: int, itemsize: int, flags: int
    ) -> tuple[tuple[int, str], ...]:
        """What a call with these flags takes, by its tokens: ``((1, "oneshot"), (129, "twoshot"))`` is one-shot from
        one token on and two-shot from 129.

        The op library's rule (``make_plan`` in ``kernels/plan.cu``) for a workspace that holds the message; in a
        smaller one what is too much for one-shot may go two-shot sooner.
        """
        row = hidden * itemsize
        if flags & (Flags.ONESHOT | Flags.TWOSHOT):
            return ((1, "oneshot" if flags & Flags.ONESHOT else "twoshot"),)
        oneshot = self.oneshot_max_bytes(arch, world_size, hidden)
        rows = [(1, "oneshot")] if oneshot >= row else []
        if oneshot < ALWAYS:
            rows.append((oneshot // row + 1, "twoshot"))
        sharded = self._sharded_from(arch, world_size, hidden, row, flags)
        if sharded < ALWAYS:
            rows = [each for each in rows if each[0] < sharded] + [(sharded, "sharded")]
        return tuple(rows)

    def _sharded_from(self, arch: str, world_size: int, hidden: int, row: int, flags: int) -> int:
        """From how many tokens of ``row`` bytes a call's residual is sharded; :data:`NEVER` where it never is."""
        if not flags & SHARDED_FLAGS:
            return NEVER
        if flags & Flags.SHARDED:
            return 1
        smallest = self.sharded_min_bytes(arch, world_size, hidden)
        return NEVER if row > _MOST_SHARDED or smallest >= ALWAYS else max(1, -(-smallest // row))

    def by_hidden(self, arch: str, world_size: int) -> list[tuple[int, int]]:
        """``(hidden, bytes)`` pairs in order of hidden; hidden 0 stands for any. What the op library is given."""
        return _pairs(_found(arch, world_size, self.oneshot, _BUILT_IN))

    def sharded_by_hidden(self, arch: str, world_size: int) -> list[tuple[int, int]]:
        """The same of the other table."""
        return _pairs(_found(arch, world_size, self.sharded, _BUILT_IN_SHARDED))

    def with_measurement(self, arch: str, world_size: int, hidden: int | None, value: int) -> ThresholdTable:
        """A copy in which one entry is replaced (``hidden`` None: the entry for any hidden size)."""
        return dataclasses.replace(self, oneshot=_with(self.oneshot, arch, world_size, hidden, value))

    def with_sharded(self, arch: str, world_size: int, hidden: int | None, value: int) -> ThresholdTable:
        """The same with an entry of the other table."""
        return dataclasses.replace(self, sharded=_with(self.sharded, arch, world_size, hidden, value))

    def save(self, path: Path) -> None:
        """Write the table as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"version": VERSION, "oneshot_max_bytes": self.oneshot, "source": self.source}
        if self.sharded:
            document["sharded_min_bytes"] = self.sharded
        replace_by_text(path, json.dumps(document, indent=2, sort_keys=True) + "\n")


BUILT_IN = ThresholdTable(_BUILT_IN, "built in", _BUILT_IN_SHARDED)


def tuned_path() -> Path:
    """Where ``arfusion bench --tune`` writes, and :func:`load` looks: ``ARFUSION_THRESHOLDS`` or the cache folder.

    Raises:
        ThresholdError: it names a home folder of nobody's.
    """
    try:
        if explicit := os.environ.get("ARFUSION_THRESHOLDS"):
            return Path(explicit).expanduser()
        return cache_dir() / "thresholds.json"
    except (BuildError, RuntimeError) as error:
        raise ThresholdError(f"there is no place for a threshold file: {error}") from None


def load(path: Path | None = None) -> ThresholdTable:
    """The table in force: the file at ``path`` (default: :func:`tuned_path`) where there is one, else the built-in.

    Raises:
        ThresholdError: if the file is not a threshold table, or ``ARFUSION_THRESHOLDS`` names none.
    """
    named = path is not None or os.environ.get("ARFUSION_THRESHOLDS")
    try:
        file = tuned_path() if path is None else path
    except ThresholdError:
        if named:
            raise
        return BUILT_IN  # what is wrong with the cache folder, the kernel library's own search says
    if not os.path.isfile(file):  # nor where it cannot be looked at: a home folder of another user's
        if named:
            raise ThresholdError(f"there is no threshold file {file} (ARFUSION_THRESHOLDS)")
        return BUILT_IN
    try:
        document = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ThresholdError(f"cannot read the threshold file {file}: {error}") from error
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise ThresholdError(
            f"{file} is no threshold table of version {VERSION}: write it anew with `arfusion bench --tune`"
        )
    sharded = _checked(document, "sharded_min_bytes", file) if "sharded_min_bytes" in document else {}
    return ThresholdTable(_checked(document, "oneshot_max_bytes", file), str(file), sharded)


def arch_name(capability: tuple[int, int]) -> str:
    """``(9, 0)`` to ``"sm_90"``."""
    return f"sm_{capability[0]}{capability[1]}"


def _found(arch: str, world_size: int, *sources: Rows) -> Mapping[str, int]:
    """Hidden size to bytes, from the first source that has this architecture (or any) and world size."""
    for source in sources:
        for name in (arch, ANY_HIDDEN):
            by_hidden = source.get(name, {}).get(str(world_size))
            if by_hidden:
                return by_hidden
    return {}


def _pairs(by_hidden: Mapping[str, int]) -> list[tuple[int, int]]:
    return sorted((0 if key == ANY_HIDDEN else int(key), value) for key, value in by_hidden.items())


def _row(by_hidden: Mapping[str, int], hidden: int, missing: int) -> int:
    rows = _pairs(by_hidden)
    below = [value for key, value in rows if key <= hidden]
    return below[-1] if below else rows[0][1] if rows else missing


def _with(rows: Rows, arch: str, world_size: int, hidden: int | None, value: int) -> Rows:
    table = {a: {w: dict(h) for w, h in worlds.items()} for a, worlds in rows.items()}
    key = ANY_HIDDEN if hidden is None else str(hidden)
    table.setdefault(arch, {}).setdefault(str(world_size), {})[key] = int(value)
    return table


def _checked(document: dict[str, Any], name: str, file: Path) -> dict[str, dict[str, dict[str, int]]]:
    table: dict[str, dict[str, dict[str, int]]] = {}
    try:
        for arch, worlds in document[name].items():
            for world, by_hidden in worlds.items():
                if not 2 <= int(world) <= 8 or not by_hidden:
                    raise ValueError(f"world size {world!r}: expected 2 to 8 and at least one entry")
                for hidden, value in by_hidden.items():
                    if (hidden != ANY_HIDDEN and int(hidden) <= 0) or not isinstance(value, int) or value < 0:
                        raise ValueError(f"entry {hidden!r}: {value!r} of world size {world}")
                table.setdefault(str(arch), {})[str(int(world))] = dict(by_hidden)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ThresholdError(f"{file} is no threshold table: {error}") from error
    return table
