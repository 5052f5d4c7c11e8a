"""A plug-in that cannot start says so in one line, and its engine goes on. No engine is needed here."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import pathlib
import sys
import types
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config

from arfusion_pass.config import FusionConfig
from arfusion_pass.engines import sglang, starting, vllm, vllm_comm
from arfusion_pass.install import HOOK


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """The lines at ERROR so far."""
    log = logging.getLogger("arfusion_pass")
    monkeypatch.setattr(log, "parent", logging.getLogger())
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(vllm, "speak_through", lambda name: None)
    monkeypatch.setattr(sys, "meta_path", [each for each in sys.meta_path if each is not starting._finder])
    monkeypatch.setattr(starting, "_finder", starting._Finder())
    for of_the_process in (vllm.settings, vllm._guard):
        of_the_process.cache_clear()
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    for of_the_process in (vllm.settings, vllm._guard):
        of_the_process.cache_clear()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"reassociate": tru}', "no JSON object"),
        ('{"reasociate": true}', "reasociate"),
        ('{"pdl": 1}', "expected a bool"),
    ],
)
def test_settings_that_cannot_be_read(text: str, part: str, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both plug-ins name the variable, its value and the fault, once, and raise nothing: vLLM would end."""
    monkeypatch.setenv("ARFUSION_CONFIG", text)
    for plugin in (vllm, sglang):
        plugin.register()
    assert len(said()) == 2
    assert all(line.startswith("arfusion: nothing will fuse in ") and part in line and text in line for line in said())


def test_an_engine_of_another_make(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM that lacks a class that is wrapped: the line names what is missing."""
    monkeypatch.setitem(sys.modules, "vllm.compilation.backends", None)
    monkeypatch.delenv("ARFUSION_CONFIG", raising=False)
    vllm.register()
    (line,) = said()
    assert "vllm" in line.split(": ", 2)[2]


def vllm_without(part: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A vLLM of stand-ins with everything that the plug-in touches but ``part``; gives its modules."""

    class InductorPass:
        pass

    class PostGradPassManager:
        def __init__(self) -> None:
            self.passes: list[Any] = []
            if part == "passes":
                del self.passes

        def configure(self, config: Any) -> None:
            if part != "passes":
                self.passes += ["theirs"]

    fields = [(name, Any, dataclasses.field(default=None)) for name in ("mode", "cache_dir") if name != part]
    CompilationConfig = dataclasses.make_dataclass("CompilationConfig", fields)

    class Hashed:
        def __post_init__(self) -> None:
            self.made = True

        def compute_hash(self) -> Any:
            return 7 if part == "a key that is text" else "theirs"

    compilation = ("compilation_config", Any, dataclasses.field(default_factory=CompilationConfig))
    VllmConfig = dataclasses.make_dataclass(
        "VllmConfig", [compilation] if part != compilation[0] else [], namespace=dict(vars(Hashed))
    )

    class VllmBackend:
        def __init__(self, vllm_config: Any, prefix: str = "") -> None:
            self.manager = PostGradPassManager()
            self.manager.configure(vllm_config)

    class OtherBackend:
        def __init__(self, config: Any, prefix: str = "") -> None:
            self.manager = PostGradPassManager()
            self.manager.configure(config)

    class CompilerManager:
        def compile(self, graph: Any, compile_range: Any) -> Any: ...

    class VllmSerializableFunction:
        @classmethod
        def serialize_compile_artifacts(cls, compiled: Any) -> bytes: ...  # type: ignore[empty-body]

        @classmethod
        def deserialize_compile_artifacts(cls, data: bytes) -> Any: ...

    engine = types.SimpleNamespace(backend=OtherBackend if part == "vllm_config" else VllmBackend, config=VllmConfig)
    contents: dict[str, list[Any]] = {
        "vllm.compilation.passes.inductor_pass": [InductorPass],
        "vllm.compilation.passes.pass_manager": [PostGradPassManager],
        "vllm.compilation.backends": [CompilerManager, engine.backend],
        "vllm.compilation.caching": [VllmSerializableFunction],
        "vllm.config": [VllmConfig, CompilationConfig],
    }
    for name in ("vllm", "vllm.compilation", "vllm.compilation.passes", *contents):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        for each in contents.get(name, ()):
            attribute = "VllmBackend" if each is OtherBackend else each.__name__
            if part != attribute:
                setattr(module, attribute, each)
            if part in vars(each):
                delattr(each, part)
    if part.startswith("vllm."):
        monkeypatch.setitem(sys.modules, part, None)
    return engine


AT_THE_START = (
    *("vllm.config", "vllm.compilation.backends", "vllm.compilation.caching", "vllm.compilation.passes.pass_manager"),
    *("vllm.compilation.passes.inductor_pass", "InductorPass", "PostGradPassManager", "configure", "VllmConfig"),
    *("VllmBackend", "CompilerManager", "compile", "VllmSerializableFunction"),
    *("serialize_compile_artifacts", "deserialize_compile_artifacts", "compute_hash", "__post_init__", "passes"),
    *("CompilationConfig", "cache_dir", "compilation_config", "vllm_config"),
)


@pytest.mark.parametrize("part", ["", *AT_THE_START, "a key that is text"])
def test_a_vllm_that_lacks_a_part(part: str, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the plug-in touches, taken away or called otherwise: one line, and an engine with its passes and key.
    With everything there, both are ours."""
    monkeypatch.delenv("ARFUSION_CONFIG", raising=False)
    engine = vllm_without(part, monkeypatch)
    vllm.register()
    assert len(said()) == (part in AT_THE_START), said()
    if part in ("configure", "compute_hash", "__post_init__"):
        return  # not even this stand-in runs without
    for _ in range(2):
        config = engine.config()
        key, backend = config.compute_hash(), engine.backend(config)
        passes = [type(each).__name__ for each in getattr(backend.manager, "passes", ["str"])]
        assert (passes == ["str"]) == bool(part), passes
    assert (key in ("theirs", 7)) == bool(part)
    lines = said()
    assert len(lines) == bool(part), lines
    assert all(line.startswith("arfusion: nothing will fuse in vLLM: ") for line in lines)


@pytest.mark.parametrize("part", ["", "no module", "PostGradPassManager", "InductorPass", "add"])
def test_an_sglang_that_lacks_a_part(part: str, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its piecewise graphs' pass manager, taken away or changed: one line, none where this SGLang has no such graphs;
    what ``--enable-torch-compile`` compiles has the pass all the same."""
    monkeypatch.delenv("ARFUSION_CONFIG", raising=False)

    class PostGradPassManager:
        def __init__(self) -> None:
            self.passes: list[Any] = []

        def add(self, each: Any) -> None:
            self.passes.append(each)

    if part == "add":
        del PostGradPassManager.add
    managers, passes = (
        types.ModuleType(f"sglang.srt.compilation.{name}") for name in ("pass_manager", "inductor_pass")
    )
    if part != "PostGradPassManager":
        managers.PostGradPassManager = PostGradPassManager  # type: ignore[attr-defined]
    if part != "InductorPass":
        passes.InductorPass = type("InductorPass", (), {})  # type: ignore[attr-defined]
    for name in ("sglang", "sglang.srt", "sglang.srt.compilation"):
        package = types.ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, passes.__name__, passes)
    if part != "no module":
        monkeypatch.setitem(sys.modules, managers.__name__, managers)
    with inductor_config.patch({HOOK: None}):
        sglang.register()
        assert type(getattr(inductor_config, HOOK)).__name__ == "AllReduceFusionPass"
    made = [type(each).__name__ for each in PostGradPassManager().passes]
    assert made == ([] if part else ["ArFusionPass"])
    lines = said()
    assert len(lines) == (part not in ("", "no module")), lines
    assert all(line.startswith("arfusion: nothing will fuse in SGLang's piecewise graphs: ") for line in lines)


FLASHINFER = "import flashinfer.comm as flashinfer_comm\n"
VLLM = {
    "vllm.config": """
class CompilationConfig:
    def __init__(self, cache_dir=""): self.cache_dir = cache_dir
class VllmConfig:
    def __init__(self, compilation_config=None): self.compilation_config = compilation_config or CompilationConfig()
    def __post_init__(self): ...
    def compute_hash(self): return "theirs"
""",
    "vllm.compilation.passes.inductor_pass": "class InductorPass: ...",
    "vllm.compilation.passes.pass_manager": """
import vllm.compilation.passes.fusion.allreduce_rms_fusion
class PostGradPassManager:
    def __init__(self): self.passes = []
    def configure(self, config): self.passes += ["theirs"]
""",
    "vllm.compilation.passes.fusion.allreduce_rms_fusion": FLASHINFER
    + "import vllm.distributed.device_communicators.flashinfer_all_reduce\n"
    + "flashinfer_trtllm_fused_allreduce_norm = None",
    "vllm.compilation.backends": """
from vllm.compilation.passes.pass_manager import PostGradPassManager
class CompilerManager:
    def compile(self, graph): ...
class VllmBackend:
    def __init__(self, vllm_config):
        self.manager = PostGradPassManager()
        self.manager.configure(vllm_config)
""",
    "vllm.compilation.caching": """
class VllmSerializableFunction:
    @classmethod
    def serialize_compile_artifacts(cls, compiled): ...
    @classmethod
    def deserialize_compile_artifacts(cls, data): ...
""",
    "vllm.distributed.device_communicators.flashinfer_all_reduce": FLASHINFER
    + "_fi_ar_workspace = _fi_ar_quant_workspace = destroy_fi_ar_workspace = None",
    "vllm.distributed.parallel_state": """
_groups = {}
class GroupCoordinator:
    def destroy(self): ...
""",
    "vllm.ray.ray_env": "DEFAULT_ENV_VAR_PREFIXES = set()",
    "flashinfer.comm": "theirs = True",
    "sglang.srt.compilation.inductor_pass": "class InductorPass: ...",
    "sglang.srt.compilation.pass_manager": """
import sglang.srt.layers.flashinfer_comm_fusion
class PostGradPassManager:
    def __init__(self): self.passes = []
    def add(self, each): self.passes.append(each)
""",
    "sglang.srt.layers.flashinfer_comm_fusion": "import flashinfer.comm as _flashinfer_comm\n"
    + "_create_allreduce_fusion_workspace = _flashinfer_allreduce_unavailable = None\n"
    + "_flashinfer_create_workspace_supports_group = _flashinfer_create_workspace_supports_comm_backend = None\n"
    + "_flashinfer_allreduce_supports_trigger_completion = _preflight_check_workspace_memory = None",
}
"""An engine on disk, by module: its compiler and its calls import FlashInfer, as the real ones do."""


@pytest.fixture
def on_disk(tmp_path: pathlib.Path, said: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes the engines, without what is named; nothing of them is imported but vLLM's configuration."""
    tops = {name.split(".")[0] for name in VLLM}

    def ours() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in tops]

    def write(without: str = "") -> None:
        for name, text in VLLM.items():
            path = tmp_path.joinpath(*name.split("."))
            path.parent.mkdir(parents=True, exist_ok=True)
            for parent in path.relative_to(tmp_path).parents[:-1]:
                (tmp_path / parent / "__init__.py").touch()
            if name != without:
                path.with_suffix(".py").write_text(text.replace(f"class {without}:", "class Other:"))
        importlib.import_module("vllm.config")

    before = {name: sys.modules[name] for name in ours()}
    for name in before:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("ARFUSION_CONFIG", "ARFUSION_VLLM", "ARFUSION_SGLANG"):
        monkeypatch.delenv(name, raising=False)
    for name in ("ARFUSION_VLLM_COMM", "ARFUSION_SGLANG_COMM"):
        monkeypatch.setenv(name, "1")
    with inductor_config.patch({HOOK: None}):
        yield write
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


def imported() -> list[str]:
    """What is imported of FlashInfer, and of the engines beyond packages."""
    tops = ("flashinfer", "vllm", "sglang")
    return [name for name, module in sys.modules.items() if name.startswith(tops) and not hasattr(module, "__path__")]


def test_registering_imports_nothing(on_disk: Any, said: Any) -> None:
    """An engine's front-end loads plug-ins too: FlashInfer's import would initialise CUDA there, and an engine that
    forks would have to spawn. Its key is ours there all the same; what it imports later is wrapped once, whatever
    comes first and however often we were called, and is loaded by its own loader."""
    on_disk()
    for plugin in (vllm, sglang, vllm, sglang):
        plugin.register()
    assert imported() == ["vllm.config"]
    config = sys.modules["vllm.config"].VllmConfig()  # type: ignore[attr-defined]
    assert config.compute_hash() == vllm.keyed("theirs")
    assert imported() == ["vllm.config"]

    importlib.import_module("vllm.compilation.caching")
    backends = sys.modules["vllm.compilation.backends"]  # what an AOT artefact is keyed for is known before it is keyed
    made = backends.VllmBackend(config)  # type: ignore[attr-defined]
    assert [type(each).__name__ for each in made.manager.passes] == ["ArFusionPass", "str"]
    assert type(backends.__loader__).__name__ == type(backends.__spec__.loader).__name__ == "SourceFileLoader"  # type: ignore[union-attr]
    managers = importlib.import_module("sglang.srt.compilation.pass_manager")
    assert [type(each).__name__ for each in managers.PostGradPassManager().passes] == ["ArFusionPass"]
    carried = importlib.import_module("vllm.ray.ray_env").DEFAULT_ENV_VAR_PREFIXES
    assert carried == {"ARFUSION_"}
    assert config.compute_hash() == vllm.keyed("theirs")
    assert starting._finder.waiting == {}
    assert said() == []


@pytest.mark.parametrize("first", [vllm_comm.CALLS, vllm_comm.WORKSPACES])
def test_calls_are_replaced_together(first: str, on_disk: Any, said: Any) -> None:
    """Whichever of the two modules vLLM imports first: a workspace of FlashInfer's never meets a call of ours. SGLang's
    one is replaced likewise."""
    on_disk()
    vllm.register()
    sglang.register()
    importlib.import_module(first)
    calls, workspaces = (sys.modules[name].flashinfer_comm for name in (vllm_comm.CALLS, vllm_comm.WORKSPACES))  # type: ignore[attr-defined]
    assert calls is workspaces
    assert not hasattr(calls, "theirs")
    assert not hasattr(importlib.import_module(sglang.CALLS)._flashinfer_comm, "theirs")
    assert said() == []


@pytest.mark.parametrize("part", ["vllm.compilation.backends", "CompilerManager", "VllmSerializableFunction"])
def test_a_part_that_is_missed_later(part: str, on_disk: Any, said: Any) -> None:
    """One line when it is known, at the start for a module and where its module is imported for a class; from then on
    an engine with its own passes and key, before it keys a graph."""
    on_disk(part)
    vllm.register()
    vllm.register()
    assert len(said()) == (part in VLLM)
    importlib.import_module("vllm.compilation.caching")
    (line,) = said()
    assert line.startswith("arfusion: nothing will fuse in vLLM: ")
    assert part in line
    config = sys.modules["vllm.config"].VllmConfig()  # type: ignore[attr-defined]
    assert config.compute_hash() == "theirs"
    manager = importlib.import_module("vllm.compilation.passes.pass_manager").PostGradPassManager()
    manager.configure(config)
    assert manager.passes == ["theirs"]
    assert len(said()) == 1


def test_switched_off_imports_nothing(on_disk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor waits for anything but the variables that Ray carries."""
    monkeypatch.setenv("ARFUSION_VLLM", "0")
    monkeypatch.setenv("ARFUSION_SGLANG", "0")
    on_disk()
    vllm.register()
    sglang.register()
    assert imported() == ["vllm.config"]
    assert list(starting._finder.waiting) == ["vllm.ray.ray_env"]


def test_importing_a_plugin_reads_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine imports the module before it calls it: what the environment holds must not fail there."""
    monkeypatch.setenv("ARFUSION_CONFIG", "{")
    for plugin in (vllm, sglang):
        importlib.reload(plugin)
    monkeypatch.delenv("ARFUSION_CONFIG")
    assert vllm.settings() == FusionConfig()


def test_sglang_calls_that_run_here_are_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is compiled, so no graph has a line: each workspace that SGLang makes for its calls is one, with what
    runs them; also an fp32 one, which SGLang names by an argument that FlashInfer does not have."""
    log = logging.getLogger("arfusion_pass")
    monkeypatch.setattr(log, "parent", logging.getLogger())
    monkeypatch.setattr(log, "propagate", True)
    theirs = types.ModuleType("sglang.srt.layers.flashinfer_comm_fusion")
    for name in (
        *("_flashinfer_comm", "_create_allreduce_fusion_workspace", "_flashinfer_allreduce_unavailable"),
        *("_flashinfer_create_workspace_supports_group", "_flashinfer_create_workspace_supports_comm_backend"),
        *("_flashinfer_allreduce_supports_trigger_completion", "_preflight_check_workspace_memory"),
    ):
        setattr(theirs, name, None)
    monkeypatch.setitem(sys.modules, theirs.__name__, theirs)
    sglang.replace_flashinfer()
    create = theirs._create_allreduce_fusion_workspace
    with caplog.at_level(logging.INFO, "arfusion_pass"):
        create(world_size=1, max_token_num=8, hidden_dim=64, dtype=torch.float32, use_fp32_lamport=True).destroy()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("arfusion: SGLang's fused all-reduces run here")
    assert "8 x 64 float32" in line


def vllm_that_calls_flashinfer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of a vLLM that :func:`vllm_comm.replace_flashinfer` replaces and reads, of stand-ins."""
    workspaces, calls, parallel = modules = [
        types.ModuleType(f"vllm.{name}")
        for name in (
            "distributed.device_communicators.flashinfer_all_reduce",
            "compilation.passes.fusion.allreduce_rms_fusion",
            "distributed.parallel_state",
        )
    ]
    workspaces.flashinfer_comm = calls.flashinfer_comm = "theirs"  # type: ignore[attr-defined]
    workspaces._fi_ar_workspace = workspaces._fi_ar_quant_workspace = None  # type: ignore[attr-defined]
    workspaces.destroy_fi_ar_workspace = calls.flashinfer_trtllm_fused_allreduce_norm = None  # type: ignore[attr-defined]
    parallel._groups = {}  # type: ignore[attr-defined]
    parallel.GroupCoordinator = type("GroupCoordinator", (), {"destroy": lambda self: None})  # type: ignore[attr-defined]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return modules


def test_vllm_calls_that_run_here_are_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Each workspace that vLLM makes for its eager calls is a line, with what runs them; vLLM 0.33 keeps it although it
    has no multicast."""
    log = logging.getLogger("arfusion_pass")
    monkeypatch.setattr(log, "parent", logging.getLogger())
    monkeypatch.setattr(log, "propagate", True)
    workspaces, calls, _ = vllm_that_calls_flashinfer(monkeypatch)
    vllm_comm.replace_flashinfer()
    vllm_comm.replace_flashinfer()
    assert workspaces.flashinfer_comm is calls.flashinfer_comm
    create = calls.flashinfer_comm.create_allreduce_fusion_workspace
    sizes = {"world_size": 1, "rank": 0, "max_token_num": 8, "hidden_dim": 64, "dtype": torch.bfloat16}
    with caplog.at_level(logging.INFO, "arfusion_pass"), create(backend="mnnvl", group=None, **sizes) as made:
        assert made.mc_ptr
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("arfusion: vLLM's fused all-reduces run here")
    assert "8 x 64 bfloat16" in line


@pytest.mark.parametrize(
    ("module", "name", "part"),
    [
        (0, "_fi_ar_workspace", "this vLLM has no _fi_ar_workspace: its calls are left to FlashInfer"),
        (1, "flashinfer_comm", "this vLLM has no flashinfer_comm: its calls are left to FlashInfer"),
        (1, "FlashInfer", "FlashInfer cannot be imported"),
        (2, "GroupCoordinator", "this vLLM has no GroupCoordinator"),
    ],
)
def test_a_vllm_whose_calls_are_left_alone(
    module: int, name: str, part: str, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is replaced or read there is missing: one line says so, and nothing is replaced."""
    modules = vllm_that_calls_flashinfer(monkeypatch)
    if name == "FlashInfer":
        modules[1].flashinfer_comm = None
    else:
        delattr(modules[module], name)
    monkeypatch.setattr(vllm, "_wrap", lambda: None)
    monkeypatch.setenv("ARFUSION_VLLM_COMM", "1")
    vllm.register()
    (line,) = said()
    assert line.startswith("arfusion: nothing will fuse in vLLM's calls of FlashInfer: ")
    assert part in line
    assert "theirs" in {getattr(each, "flashinfer_comm", "theirs") for each in modules}
    assert all(isinstance(getattr(each, "flashinfer_comm", ""), str | None) for each in modules)


@pytest.mark.parametrize(("plugin", "calls", "replaced"), [("0", "1", False), ("1", "0", False), ("1", "1", True)])
def test_vllm_calls_are_asked_for(
    plugin: str, calls: str, replaced: bool, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where the plug-in is on and the calls are asked for too."""
    modules = vllm_that_calls_flashinfer(monkeypatch)
    monkeypatch.setattr(vllm, "_wrap", lambda: None)
    monkeypatch.setenv("ARFUSION_VLLM", plugin)
    monkeypatch.setenv("ARFUSION_VLLM_COMM", calls)
    vllm.register()
    assert (modules[0].flashinfer_comm != "theirs") == replaced
    assert said() == []


def test_ray_carries_our_variables(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the plug-in is off: an engine on another host would not know that."""
    ray_env = types.ModuleType("vllm.ray.ray_env")
    ray_env.DEFAULT_ENV_VAR_PREFIXES = {"VLLM_"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, ray_env.__name__, ray_env)
    monkeypatch.setenv("ARFUSION_VLLM", "0")
    vllm.register()
    assert sorted(ray_env.DEFAULT_ENV_VAR_PREFIXES) == ["ARFUSION_", "VLLM_"]
    assert said() == []


@pytest.mark.parametrize(
    ("mode", "backend", "eager", "environment", "part"),
    [
        ("VLLM_COMPILE", "inductor", False, {}, None),
        ("VLLM_COMPILE", "inductor", False, {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}, None),
        ("VLLM_COMPILE", "eager", False, {}, "with the backend inductor, this is eager"),
        ("NONE", "inductor", True, {"VLLM_USE_BREAKABLE_CUDAGRAPH": "0"}, "this is NONE (--enforce-eager)"),
        ("NONE", "inductor", False, {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}, "run here, with ARFUSION_VLLM_COMM=1)"),
        ("NONE", "inductor", False, {"TORCH_COMPILE_DISABLE": "1"}, "(TORCH_COMPILE_DISABLE=1)"),
        ("NONE", "inductor", False, {"VLLM_USE_BREAKABLE_CUDAGRAPH": "0"}, "(asked for, as by -O0)"),
        ("DYNAMO_TRACE_ONCE", "inductor", False, {}, "this is DYNAMO_TRACE_ONCE"),
    ],
)
def test_a_start_that_compiles_nothing_is_told(
    mode: str,
    backend: str,
    eager: bool,
    environment: dict[str, str],
    part: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line that names what has kept vLLM's passes from running, by a user or by vLLM itself; none for one rank, nor
    where they run."""
    for variable in ("TORCH_COMPILE_DISABLE", "VLLM_USE_BREAKABLE_CUDAGRAPH", "ARFUSION_VLLM_COMM"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    told: list[str] = []
    monkeypatch.setattr(vllm, "_say", told.append)
    config = types.SimpleNamespace(
        model_config=types.SimpleNamespace(enforce_eager=eager),
        parallel_config=types.SimpleNamespace(tensor_parallel_size=1),
        compilation_config=types.SimpleNamespace(mode=types.SimpleNamespace(name=mode), backend=backend),
    )
    vllm._tell_of_no_graph(config)
    assert told == []
    config.parallel_config.tensor_parallel_size = 2
    vllm._tell_of_no_graph(config)
    assert len(told) == (part is not None)
    assert part is None or (told[0].startswith("arfusion: nothing will fuse: ") and part in told[0]), told
