"""The table of groups that vLLM and SGLang keep, re-made here: what the plug-ins read of it, and when."""

from __future__ import annotations

import sys
import types
import weakref
from typing import Any

import pytest
import torch.distributed as dist

from arfusion_pass import groups
from arfusion_pass.engines import sglang, vllm
from arfusion_pass.engines.groups import coordinators
from tests.simulate import fake_world

MODULE = "an_engine.parallel_state"


class Coordinator:
    """What the engines keep weak references to."""

    def __init__(self, world_size: int, device_group: Any):
        self.world_size, self.device_group = world_size, device_group


def test_coordinators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of more than one rank that are alive, under the engine's names; none of an engine that is not imported."""
    assert coordinators(MODULE) == {}
    engine = types.ModuleType(MODULE)
    monkeypatch.setitem(sys.modules, MODULE, engine)
    assert coordinators(MODULE) == {}, "imported, not initialised"
    with fake_world(2):
        world = dist.group.WORLD
        alive = {"tp:0": Coordinator(2, world), "pp:0": Coordinator(1, world), "gone:0": Coordinator(2, None)}
        engine._groups = {name: weakref.ref(each) for name, each in alive.items()}  # type: ignore[attr-defined]
        assert coordinators(MODULE) == {"tp:0": world}
        del alive["tp:0"]
        assert coordinators(MODULE) == {}


@pytest.mark.parametrize(
    "table", [None, [], {"tp:0": None}, {"tp:0": lambda: Coordinator(2, "a group")}, {3: 4}.items()]
)
def test_a_table_of_another_kind(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that keeps its groups otherwise has none for us; nothing raises."""
    engine = types.ModuleType(MODULE)
    engine._groups = table  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, engine)
    assert coordinators(MODULE) == {}


@pytest.mark.parametrize(
    ("source", "module"),
    [
        (vllm.vllm_groups, "vllm.distributed.parallel_state"),
        (sglang.sglang_groups, "sglang.srt.distributed.parallel_state"),
    ],
)
def test_an_artefact_of_the_engines_cache_finds_its_group(
    source: groups.Source, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the plug-in's source a name resolves although neither the pass nor its key was ever asked for."""
    monkeypatch.setattr(groups, "_sources", [])
    monkeypatch.setattr(groups, "_registered", {})
    groups.add_source(source)
    monkeypatch.delitem(sys.modules, module, raising=False)
    assert groups.find_group("tp:0") is None
    engine = types.ModuleType(module)
    monkeypatch.setitem(sys.modules, module, engine)
    with fake_world(2):
        coordinator = Coordinator(2, dist.group.WORLD)
        engine._groups = {"tp:0": weakref.ref(coordinator)}  # type: ignore[attr-defined]
        assert groups.resolve_group("tp:0") is dist.group.WORLD
