"""Process groups by name: several in one graph, names that could be mixed up, unknown names, one rank, none at all."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch import fx

import arfusion_pass as arf
from arfusion_pass import groups
from tests.models import Tensor, llama, reduce
from tests.simulate import c10d, calls, check_fused, check_same, check_unchanged, fake_world, fused_copy, tensors, trace

X, W = (4, 32), (32,)
EPS = 1e-6


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """``register_group``'s table and the sources are put back afterwards."""
    monkeypatch.setattr(groups, "_registered", {})
    monkeypatch.setattr(groups, "_sources", [])


def chain(*names: str) -> fx.GraphModule:
    """One site for each name, each adding to the residual of the one before."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        for name in names:
            r = r + reduce(x, name)
            x = llama(r, w, EPS)
        return x, r

    return trace(model, *tensors(X, X, W))


def fused_groups(module: fx.GraphModule) -> list[str]:
    return [node.kwargs["group_name"] for node in module.graph.nodes if "group_name" in node.kwargs]


@pytest.mark.usefixtures("registered")
def test_two_groups_in_one_graph() -> None:
    """Each fused call reduces over its own site's group (the simulated ranks of two groups send different tensors)."""
    with fake_world(4):
        pair, trio = dist.new_group([0, 1]).group_name, dist.new_group([0, 2, 3]).group_name
        module = chain("0", pair, trio, pair, "0")
        report = check_fused(module, 5)
        assert [site.group for site in report.fused] == ["0", pair, trio, pair, "0"]
        assert fused_groups(fused_copy(module)[0]) == ["0", pair, trio, pair, "0"]


@pytest.mark.usefixtures("registered")
def test_names_that_could_be_mixed_up() -> None:
    """Names that are prefixes, numbers, patterns or spaces are compared as they are."""
    with fake_world(4):
        names = ["tp", "tp:0", "tp:1", "00", "sum", "*", " ", "KeywordArg('group')"]
        for index, name in enumerate(names):
            arf.register_group(name, dist.new_group([0, 1 + index % 3]))
        module = chain(*names)
        fused, report = fused_copy(module)
        assert report.matched_count == len(names), str(report)
        assert fused_groups(fused) == names
        check_same(module, fused)


@pytest.mark.usefixtures("registered")
def test_unknown_group() -> None:
    """A name that nobody knows: its site is missed with advice, the others are fused, and no node of it changes."""
    with fake_world(2):
        fused, report = fused_copy(chain("0", "tp:0", "0"))
        assert [site.fused for site in report.sites] == [True, False, True]
        assert "register_group('tp:0'" in report.missed[0].reason
        assert calls(fused, c10d.all_reduce.default) == 1


@pytest.mark.usefixtures("registered")
def test_registered_name_comes_first() -> None:
    """An engine may call its group ``"0"``, as c10d does: its own registration wins."""
    with fake_world(4):
        pair = dist.new_group([0, 1])
        arf.register_group("0", pair)
        assert groups.find_group("0") is pair
        assert groups.resolve_group("0") is pair


@pytest.mark.usefixtures("registered")
def test_no_process_group() -> None:
    """Without ``init_process_group`` a graph with all-reduces passes through, with a reason."""
    with fake_world(2):
        module = chain("0")
    assert "no process group is called '0'" in check_unchanged(module).missed[0].reason
    with pytest.raises(ValueError, match="not initialised"):
        groups.resolve_group("0")


@pytest.mark.usefixtures("registered")
def test_one_rank() -> None:
    """World size 1: nothing to reduce, nothing is changed."""
    with fake_world(1):
        assert "one rank" in check_unchanged(chain("0")).missed[0].reason


@pytest.mark.usefixtures("registered")
def test_a_source_is_asked_when_a_name_is_needed() -> None:
    """A name that only a source knows resolves from the moment the source knows it until it forgets it, without
    anything of the pass being called in between; a registered group of that name comes first."""
    engine: dict[str, dist.ProcessGroup] = {}
    source = engine.copy
    groups.add_source(source)
    groups.add_source(source)
    assert groups._sources == [source]
    with fake_world(4):
        with pytest.raises(ValueError, match="no process group is called 'tp:0'"):
            groups.resolve_group("tp:0")
        engine["tp:0"] = pair = dist.new_group([0, 1])
        assert groups.resolve_group("tp:0") is pair
        assert groups.registered_groups() == {"tp:0": pair}
        assert check_fused(chain("tp:0"), 1).fused[0].group == "tp:0"
        trio = dist.new_group([0, 2, 3])
        arf.register_group("tp:0", trio)
        assert groups.resolve_group("tp:0") is groups.registered_groups()["tp:0"] is trio
        groups._registered.clear()
        engine.clear()
        assert groups.find_group("tp:0") is None


@pytest.mark.parametrize(("name", "group"), [("", None), (3, None), ("tp:0", None), ("tp:0", "0")])
def test_bad_registration(name: object, group: object) -> None:
    """What is no name and no group is refused at once."""
    with pytest.raises(ValueError, match="register_group"):
        arf.register_group(name, group)  # type: ignore[arg-type]
