"""What Inductor's caches must know of the pass: its sources, its config and the groups it would see."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import uuid
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from arfusion_pass.config import FusionConfig
from arfusion_pass.groups import registered_groups

if TYPE_CHECKING:
    from importlib.abc import Traversable  # which later versions have in importlib.resources.abc

PACKAGE: Traversable = importlib.resources.files("arfusion_pass")
OUTSIDE_THE_REWRITE = (
    *("cli", "comm", "demo", "inspection", "reporting", "runtime", "_kernels"),
    *("__main__.py", "provenance.py", "publishing.py", "testing"),
)
"""What cannot change a rewrite: the command line, the eager API, how graphs are shown, what runs a fused op."""


@functools.cache
def source_hash() -> str:
    """Hash over every source file of the package that shapes the rewrite or the ops in it.

    Over the compiled files where an image was stripped of its sources (``compileall -b``), and the same from a zip file
    as from a folder. A frozen program has neither: one of its processes knows nothing of what another one compiled.
    """
    digest = hashlib.sha256()
    files = _files(PACKAGE)
    sources = {parts: file for parts, file in files.items() if parts[-1].endswith(".py")} or files
    for parts, file in sorted(sources.items()):
        if parts[0].replace(".pyc", ".py") not in OUTSIDE_THE_REWRITE:
            digest.update("/".join(parts).encode())
            digest.update(file.read_bytes())
    if not sources:
        digest.update(uuid.uuid4().bytes)
    return digest.hexdigest()


def _files(folder: Traversable, inside: tuple[str, ...] = ()) -> dict[tuple[str, ...], Traversable]:
    """The Python files below a folder, or below one in a zip file, by their relative paths' parts."""
    found: dict[tuple[str, ...], Traversable] = {}
    for each in folder.iterdir() if folder.is_dir() else ():
        parts = (*inside, each.name)
        if each.is_dir():
            found |= _files(each, parts)
        elif each.name.endswith((".py", ".pyc")):
            found[parts] = each
    return found


def group_sizes() -> dict[str, int]:
    """World size of every process group by name: c10d's own and those of :func:`registered_groups`."""
    sizes = {name: group.size() for name, group in registered_groups().items()}
    if dist.is_available() and dist.is_initialized():
        from torch.distributed import distributed_c10d

        for group, name in distributed_c10d._world.pg_names.items():
            sizes.setdefault(name, group.size())
    return sizes


def pass_key(config: FusionConfig) -> str:
    """The ``uuid`` of a pass: any change in the sources, the config or a group's size gives another."""
    return _digest(config, group_sizes())


def engine_key(config: FusionConfig) -> str:
    """The same for an engine's own cache, which asks at several moments of a start.

    Of the groups it holds only those with an engine's name: they are the ones in its graphs, and c10d's list grows.
    """
    return _digest(config, {name: group.size() for name, group in registered_groups().items()})


def _digest(config: FusionConfig, sizes: dict[str, int]) -> str:
    parts: list[Any] = ["arfusion_pass", source_hash(), repr(config), sorted(sizes.items())]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
