"""How a plug-in is started: an engine that has asked for nothing must not end because of it, nor import what it would
not import without it."""

from __future__ import annotations

import importlib.abc
import importlib.util
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

log = logging.getLogger("arfusion_pass")


def harmless(engine: str, start: Callable[[], object]) -> bool:
    """Call ``start``, give whether it did; what it raises is one line at ERROR (its traceback at DEBUG), and the engine
    goes on unfused.

    A server may serve without fusion. Without the line nobody would know that it does.
    """
    try:
        start()
    except Exception as error:
        why = "".join(traceback.format_exception_only(error))
        log.error("arfusion: nothing will fuse in %s: %s", engine, " ".join(why.split()))
        log.debug("arfusion: why", exc_info=True)
        return False
    return True


def after_import(module: str, engine: str, do: Callable[[], object]) -> None:
    """Call ``do`` once ``module`` is imported, before whoever imports it has it; now if it is. ``harmless(engine, do)``
    is how. Waiting for the same twice is waiting once.

    An engine loads plug-ins in its front-end too. Its compiler's modules import FlashInfer, whose import initialises
    CUDA: in a process that wants to fork, and would never have imported them.

    Raises:
        ModuleNotFoundError: there is no such module. Its parents are imported to find that out.
    """
    if sys.modules.get(module) is not None:
        harmless(engine, do)
        return
    if module in sys.modules or importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    waiting = _finder.waiting.setdefault(module, [])
    if (engine, do) not in waiting:
        waiting.append((engine, do))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what others find, for the modules that somebody waits for."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[tuple[str, Callable[[], object]]]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]  # those in front have been asked
        others = [finder for finder in behind if hasattr(finder, "find_spec")]
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader until it has loaded; the module names that one as its own."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.theirs, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.theirs.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.theirs
        if module.__spec__ is not None:
            module.__spec__.loader = self.theirs
        self.theirs.exec_module(module)
        for engine, do in _finder.waiting.pop(module.__name__, ()):
            harmless(engine, do)


_finder = _Finder()
