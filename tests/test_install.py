"""Ways to switch the pass on: options, context, chains with installed passes, ``fuse``; and what they refuse."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.passes.split_module import split_module

import arfusion_pass as arf
from arfusion_pass.install import HOOK, CustomInferenceAwareGraphPass, PassChain, chained
from arfusion_pass.ops import library
from arfusion_pass.testing import assert_fused
from tests.models import llama, reduce
from tests.simulate import tensors, trace

TAKES_LISTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
TELLS = hasattr(custom_graph_pass, "CustomInferenceAwareGraphPass")


class Other(CustomGraphPass):
    """Somebody else's pass, with a key."""

    def __init__(self, seen: list[str], key: Any = "other") -> None:
        self.seen, self.key = seen, key

    def __call__(self, graph: fx.Graph) -> None:
        self.seen.append("other")

    def uuid(self) -> Any:
        return self.key


@pytest.fixture
def module() -> fx.GraphModule:
    return trace(lambda x, w: x * w, *tensors((4, 32), (32,)))


def installed() -> Any:
    return getattr(inductor_config, HOOK)


def run_installed(existing: Any, graph: fx.Graph) -> None:
    for member in existing if isinstance(existing, (list, tuple)) else [existing]:
        member(graph)


def test_context(module: fx.GraphModule) -> None:
    """Inside, the pass is installed; outside, everything is as before, also after an error."""
    before = installed()
    with arf.enable() as fusion:
        assert installed() is fusion
        run_installed(installed(), module.graph)
        assert len(fusion.reports) == 1
    assert installed() is before
    with pytest.raises(KeyError), arf.enable():
        raise KeyError
    assert installed() is before


def test_chains_a_custom_pass(module: fx.GraphModule) -> None:
    """A pass with a key runs before ours; the key of both is a key of its own."""
    seen: list[str] = []
    with inductor_config.patch({HOOK: Other(seen)}), arf.enable() as fusion:
        run_installed(installed(), module.graph)
        assert seen == ["other"]
        assert len(fusion.reports) == 1
        assert installed().uuid() == ("other", fusion.uuid())
    seen.clear()
    assert PassChain(Other(seen, None), arf.AllReduceFusionPass()).uuid() is None


class Aware(CustomInferenceAwareGraphPass):
    """A pass of torch's kind that is told whether the graph is for inference, by keyword."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def __call__(self, graph: fx.Graph, *, is_inference: bool) -> None:  # type: ignore[override]
        self.seen.append(is_inference)

    def uuid(self) -> Any:
        return "aware"


@pytest.mark.skipif(not TELLS, reason="this torch tells no pass whether a graph is for inference")
@pytest.mark.parametrize("way", ["enable", "options", "options beside", "list", "tuple", "nested"])
def test_chains_an_inference_aware_pass(way: str, world: None) -> None:
    """Every compile hands it what it asks for, whatever else is in the chain; ours runs behind it."""
    seen: list[Any] = []
    aware = Aware(seen)
    existing = {"list": [Other([]), aware], "tuple": (aware, lambda graph: None)}.get(way, aware)
    if way in ("list", "tuple") and not TAKES_LISTS:
        pytest.skip("this torch takes no lists of passes")
    model = lambda x, w: llama(reduce(x), w, 1e-6)  # noqa: E731
    inputs = [tensor.zero_() for tensor in tensors((4, 32), (32,))]
    torch._dynamo.reset()
    with inductor_config.patch({"fx_graph_cache": False}), torch.no_grad():
        if way == "options beside":
            options = arf.inductor_options(**{HOOK: aware})
            torch.compile(model, options=options)(*inputs)
            fusion = options[HOOK].passes[-1]
        else:
            with inductor_config.patch({HOOK: existing}):
                if way == "options":
                    options = arf.inductor_options()
                    torch.compile(model, options=options)(*inputs)
                    fusion = options[HOOK].passes[-1]
                else:
                    with contextlib.ExitStack() as stack:
                        for _ in range(2 if way == "nested" else 1):
                            fusion = stack.enter_context(arf.enable())
                        torch.compile(model)(*inputs)
    assert seen == [True]
    assert fusion.reports.matched_count == 1


@pytest.mark.slow
def test_a_package_of_aotinductor(world: None, tmp_path: Path) -> None:
    """Exported, compiled with the pass, packaged, loaded: the package calls the fused op, and the options' pass has the
    report though Inductor copies its options."""

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return llama(reduce(x), w, 1e-6)

    inputs = (torch.randn(4, 32), torch.ones(32))
    options = arf.inductor_options()
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(Model(), inputs), package_path=str(tmp_path / "model.pt2"), inductor_configs=options
    )
    assert_fused(options[HOOK].reports, 1)
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_run", lambda call: calls.append(call.op))
        torch._inductor.aoti_load_package(package)(*inputs)
    assert calls == ["allreduce_rms_norm"]


def test_key_of_an_inference_aware_chain() -> None:
    """The key is made of all members' keys, and there is none where one has none."""
    fusion = arf.AllReduceFusionPass()
    assert chained(Aware([]), fusion).uuid() == ("aware", fusion.uuid())
    assert chained([Aware([]), print], fusion).uuid() is None
    for nothing in (None, [], (), [None]):
        assert chained(nothing, fusion) is fusion


def test_a_torch_without_such_passes(monkeypatch: pytest.MonkeyPatch, module: fx.GraphModule) -> None:
    """Torch 2.11 has no inference-aware passes: the package does without the name."""
    monkeypatch.delattr(custom_graph_pass, "CustomInferenceAwareGraphPass", raising=False)
    spec = importlib.util.find_spec("arfusion_pass.install")
    assert spec is not None
    assert spec.loader is not None
    install = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(install)
    seen: list[str] = []
    chain = install.chained(Other(seen), arf.AllReduceFusionPass())
    chain(module.graph)
    assert (type(chain), seen) == (install.PassChain, ["other"])


def test_chains_a_callable(module: fx.GraphModule) -> None:
    """A plain function has no key: it still runs, and nothing is cached."""
    seen: list[fx.Graph] = []
    with inductor_config.patch({HOOK: seen.append}), arf.enable() as fusion:
        run_installed(installed(), module.graph)
        assert seen == [module.graph]
        assert len(fusion.reports) == 1
        assert installed().uuid() is None


def test_chains_a_list(module: fx.GraphModule) -> None:
    """A list of passes (torch 2.13 and later take one) keeps its order, ours last."""
    seen: list[str] = []
    chain = chained([Other(seen), lambda graph: seen.append("function")], fusion := arf.AllReduceFusionPass())
    chain(module.graph)
    assert seen == ["other", "function"]
    assert len(fusion.reports) == 1
    if TAKES_LISTS:
        with inductor_config.patch({HOOK: [Other(seen)]}), arf.enable() as fusion:
            run_installed(installed(), module.graph)
            assert len(fusion.reports) == 1


def test_nested_contexts(module: fx.GraphModule) -> None:
    """The inner context's pass does the work; the outer one's would find nothing left, and does not run."""
    seen: list[str] = []
    with inductor_config.patch({HOOK: Other(seen)}), arf.enable() as outer, arf.enable() as inner:
        run_installed(installed(), module.graph)
        assert (len(outer.reports), len(inner.reports), seen) == (0, 1, ["other"])


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_mode(mode: str) -> None:
    """torch.compile takes no mode beside options: a mode is expanded to the options it stands for."""
    options = arf.inductor_options(mode=mode, max_autotune_gemm=False)
    expected = {**torch._inductor.list_mode_options()[mode], "max_autotune_gemm": False}
    assert {name: value for name, value in options.items() if name != HOOK} == expected
    assert isinstance(options[HOOK], arf.AllReduceFusionPass)
    torch.compile(lambda x: x, options=options)  # torch knows every name


def test_options() -> None:
    """No mode, or the default one, adds nothing; a pass among the options stays."""
    assert list(arf.inductor_options()) == [HOOK]
    assert list(arf.inductor_options(mode="default")) == [HOOK]
    seen: list[str] = []
    options = arf.inductor_options(**{HOOK: Other(seen)})
    assert isinstance(options[HOOK], PassChain)
    with pytest.raises(ValueError, match="unknown mode 'fast'"):
        arf.inductor_options(mode="fast")


def test_options_with_a_compiled_model(world: None) -> None:
    """The options reach the compiler, which hands the graph to the pass."""
    config = arf.FusionConfig(raise_errors=True)
    options = arf.inductor_options(config, fx_graph_cache=False)  # a graph from the cache has no report
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: llama(reduce(x), w, 1e-6), options=options)
    compiled(*(tensor.zero_() for tensor in tensors((4, 32), (32,))))
    assert options[HOOK].reports.matched_count == 1


@pytest.mark.parametrize("thing", [None, 3, fx.Graph(), torch.nn.Linear(2, 2), lambda x: x])
def test_fuse_what_is_no_graph_module(thing: Any) -> None:
    """``fuse`` names what it was given."""
    with pytest.raises(ValueError, match=f"GraphModule, got {type(thing).__name__}"):
        arf.fuse(thing)


@pytest.mark.parametrize("config", [3, "auto", {"strategy": "auto"}, arf.FusionConfig])
def test_bad_config(config: Any, module: fx.GraphModule) -> None:
    """Whatever takes a config says so where it is given something else, under the name that it was called by."""
    uses = {
        "AllReduceFusionPass": arf.AllReduceFusionPass,
        "inductor_options": arf.inductor_options,
        "enable": lambda given: arf.enable(given).__enter__(),
        "fuse": lambda given: arf.fuse(module, given),
    }
    for name, use in uses.items():
        with pytest.raises(ValueError, match=f"^{name}: expected a FusionConfig"):
            use(config)
    if isinstance(config, str):
        with pytest.raises(ValueError, match="a mode is given as mode='auto'"):
            arf.inductor_options(config)


def test_fuse_then_run_the_module(world: None) -> None:
    """``fuse`` works in place, recompiles the module, and is in the list of all reports."""
    module = trace(lambda x, w: llama(reduce(x), w, 1e-6), *tensors((4, 32), (32,)))
    count = len(arf.reports())
    report = arf.fuse(module)
    assert "allreduce_rms_norm" in module.code
    assert arf.reports()[count:] == (report,)
    assert arf.fuse(module).sites == ()  # a second time there is nothing left


def test_fuse_an_exported_program(world: None, tmp_path: Path) -> None:
    """Its signature names the nodes that it returns: it can be saved, and loaded, after ``fuse``."""

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            total = x + reduce(x)
            return llama(total, w, 1e-6), total

    program = torch.export.export(Model(), (torch.randn(4, 32), torch.ones(32))).run_decompositions()
    assert arf.fuse(program.graph_module).matched_count == 1
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    assert "allreduce_rms_norm" in loaded.module().code


def test_fuse_reaches_branches(world: None) -> None:
    """The branches of ``torch.cond`` are graphs of their own: fused as well, or missed with what to do."""

    def fusing(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return llama(reduce(x), w, 1e-6)

    def reducing(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return reduce(x)

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
            return torch.cond(first, fusing, reducing, (x, w))

    inputs = (torch.randn(4, 32), torch.ones(32), torch.tensor(True))
    program = torch.export.export(Model(), inputs).run_decompositions()
    report = arf.fuse(program.graph_module)
    assert_fused(report, 1, missed=1)
    assert "allreduce_rms_norm" in program.graph_module.true_graph_0.code  # type: ignore[operator]
    assert str(report.missed[0].advice).startswith("the all-reduce lies in a graph of its own, that of ")


def test_fuse_reaches_pieces(world: None) -> None:
    """The pieces of a graph that a back-end has split are modules that it calls: each is fused by itself."""

    def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return llama(reduce(llama(reduce(x), w, 1e-6) * 2), w, 1e-6)

    whole = trace(model, *tensors((4, 32), (32,)))
    second = [node.name for node in whole.graph.nodes].index("all_reduce_1")
    order = {node: index for index, node in enumerate(whole.graph.nodes)}
    pieces = split_module(whole, torch.nn.Module(), lambda node: int(order[node] >= second))
    assert_fused(arf.fuse(pieces), 2)
    assert "allreduce_rms_norm" in pieces.submod_0.code and "allreduce_rms_norm" in pieces.submod_1.code  # type: ignore[operator]


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    before = installed()
    yield
    assert installed() is before
